"""The hosts of the lab, and what must be found on each.

Imported on both sides: by the runner, which boots a host, and inside it, where `facts` is compared
with what `mixvisor host` says. So it needs nothing but the standard library.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final, Literal

__all__ = ["CHECKS", "HOSTS", "Host"]

# In the order in which they run; the columns of the table.
CHECKS: Final[Mapping[str, str]] = {
    "detection": "what the host is: `mixvisor host`",
    "modes": "which mode each VM gets and why: `mixvisor modes`",
    "warnings": "what is said of mixing before anything runs, and the exit code of --strict",
    "contract": "the contract suite of the engines (tests/vm/engines)",
    "mixed-run": "the service with two software and two hardware VMs, or with what the host can run",
}


@dataclass(frozen=True)
class Host:
    """An emulated host.

    facts: dotted paths into the object `host` of `mixvisor host -o json`, and the value there.
    quick: seconds, not a minute; those are in `make test`.
    deadline_s: of wall time on a busy machine, after which the host has failed.
    left_out: tests that its emulator cannot pass.
    """

    name: str
    title: str
    emulator: Literal["qemu", "bochs"]
    cpu: str
    technology: Literal["vt-x", "amd-v", "none"]
    deadline_s: int
    facts: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    quick: bool = False
    left_out: tuple[str, ...] = ()

    @property
    def hardware(self) -> bool:
        return self.technology != "none"


_USABLE: Final = {"kvm.state": "usable", "kvm.api_version": 12, "kvm.long_mode": True}
_AMD_V: Final = {**_USABLE, "technology": "amd-v", "virtualization.unrestricted_guest": True,
                 "virtualization.tagged_tlb": True, "virtualization.firmware.state": "allows"}
_VT_X: Final = {**_USABLE, "technology": "vt-x", "virtualization.firmware.state": "allows"}

HOSTS: Final[Mapping[str, Host]] = {host.name: host for host in (
    Host("amd-v", "AMD-V with nested paging", "qemu", "EPYC", "amd-v", 600,
         {**_AMD_V, "virtualization.extended_paging": True, "virtualization.nested": True}, quick=True),
    Host("amd-v-shadow", "AMD-V without nested paging", "qemu", "EPYC,-npt", "amd-v", 600,
         {**_AMD_V, "virtualization.extended_paging": False}),
    Host("none", "no hardware virtualization", "qemu", "qemu64,-svm", "none", 600,
         {"technology": "none", "kvm.state": "missing", "virtualization.extended_paging": None,
          "virtualization.unrestricted_guest": None, "virtualization.mitigations": []}, quick=True),
    Host("vt-x", "VT-x with EPT and unrestricted guest", "bochs", "corei7_haswell_4770", "vt-x", 1500,
         {**_VT_X, "virtualization.extended_paging": True, "virtualization.unrestricted_guest": True,
          "virtualization.tagged_tlb": True}),
    Host("vt-x-ept", "VT-x with EPT, no unrestricted guest", "bochs", "corei5_lynnfield_750", "vt-x", 1500,
         {**_VT_X, "virtualization.extended_paging": True, "virtualization.unrestricted_guest": False}),
    Host("vt-x-shadow", "VT-x without EPT", "bochs", "core2_penryn_t9600", "vt-x", 1500,
         {**_VT_X, "virtualization.extended_paging": False, "virtualization.unrestricted_guest": False,
          "virtualization.tagged_tlb": False},
         # The first touch of a page is a fault that leaves the guest, and with it goes the shadow of STI. Where the
         # page has been touched in this VM before, the same test passes on this host.
         left_out=("test_whole.py::test_the_instruction_behind_sti_is_done_before_an_interrupt_also_after_a_move",)),
)}
