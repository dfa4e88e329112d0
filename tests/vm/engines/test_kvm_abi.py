"""The KVM numbers written in abi.py are those of the kernel's header."""

from __future__ import annotations

import ctypes
import pathlib
import shutil
import subprocess

import pytest

from mixvisor.vm.engines.base import GPR
from mixvisor.vm.engines.kvm import abi

HEADER = pathlib.Path("/usr/include/linux/kvm.h")
STRUCTS = {
    "kvm_userspace_memory_region": abi.UserMemoryRegion,
    "kvm_regs": abi.Registers,
    "kvm_segment": abi.SegmentAbi,
    "kvm_dtable": abi.TableAbi,
    "kvm_sregs": abi.SpecialRegisters,
    "kvm_cpuid_entry2": abi.CpuidEntry,
    "kvm_enable_cap": abi.EnableCapability,
    "kvm_msr_entry": abi.MsrEntry,
    "kvm_debugregs": abi.DebugRegisters,
    "kvm_xsave": abi.Xsave,
}
EVENTS = [
    *(f"exception.{name}" for name in ("injected", "nr", "has_error_code", "pending", "error_code")),
    *(f"interrupt.{name}" for name in ("injected", "nr", "soft", "shadow")),
    *(f"nmi.{name}" for name in ("injected", "pending", "masked")), "flags", "smi.smm", "smi.pending",
]
NUMBERS = {
    "KVM_CAP_MAX_VCPUS": abi.CAP_MAX_VCPUS, "KVM_CAP_SPLIT_IRQCHIP": abi.CAP_SPLIT_IRQCHIP,
    "KVM_CAP_TSC_DEADLINE_TIMER": abi.CAP_TSC_DEADLINE_TIMER, "KVM_CAP_XSAVE": abi.CAP_XSAVE,
    "KVM_VCPUEVENT_VALID_SHADOW": abi.EVENT_SHADOW,
    "KVM_X86_SHADOW_INT_MOV_SS": abi.SHADOW_MOV_SS, "KVM_X86_SHADOW_INT_STI": abi.SHADOW_STI,
}


def fields(structure: type[ctypes.Structure]) -> list[str]:
    return [name for name, *_ in structure._fields_]


@pytest.fixture(scope="module")
def header(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """What a C program sees in the installed header: name -> number."""
    if not HEADER.exists():
        pytest.skip("no <linux/kvm.h> here: install linux-libc-dev")
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler here")
    wanted: list[tuple[str, str]] = [(name, name) for name in abi.IOCTLS]
    # Of a kernel newer than the header: the number in the kernel's own source is all there is.
    text = HEADER.read_text()
    codes = [code for code in abi.ExitCode if f"KVM_EXIT_{code.name} " in text]
    offsets = [path for path in abi.RUN_OFFSETS if "memory_fault" in text or not path.startswith("memory_fault")]
    wanted += [("KVM_API_VERSION", "KVM_API_VERSION"),
               ("KVM_CAP_IMMEDIATE_EXIT", "KVM_CAP_IMMEDIATE_EXIT"),
               ("KVM_CAP_X86_USER_SPACE_MSR", "KVM_CAP_X86_USER_SPACE_MSR"),
               ("MSR_REASONS", "KVM_MSR_EXIT_REASON_INVAL | KVM_MSR_EXIT_REASON_UNKNOWN")]
    wanted += [(f"KVM_EXIT_{code.name}", f"KVM_EXIT_{code.name}") for code in codes]
    wanted += [(f"KVM_SYSTEM_EVENT_{event.name}", f"KVM_SYSTEM_EVENT_{event.name}") for event in abi.SystemEvent]
    wanted += [(f"KVM_INTERNAL_ERROR_{code.name}", f"KVM_INTERNAL_ERROR_{code.name}")
               for code in abi.InternalError]
    wanted += [(f"KVM_EXIT_IO_{way.name}", f"KVM_EXIT_IO_{way.name}") for way in abi.IoDirection]
    wanted += [(f"run.{path}", f"offsetof(struct kvm_run, {path})") for path in offsets]
    for name, structure in STRUCTS.items():
        wanted.append((f"{name}", f"sizeof(struct {name})"))
        wanted += [(f"{name}.{field}", f"offsetof(struct {name}, {field})")
                   for field in fields(structure)]
    wanted += [(name, name) for name in NUMBERS]
    wanted += [(f"events.{path}", f"offsetof(struct kvm_vcpu_events, {path})") for path in EVENTS]
    wanted.append(("kvm_vcpu_events", "sizeof(struct kvm_vcpu_events)"))
    wanted.append(("kvm_msrs.entries", "offsetof(struct kvm_msrs, entries)"))
    wanted.append(("kvm_cpuid2.entries", "offsetof(struct kvm_cpuid2, entries)"))
    prints = "\n".join(
        f'printf("{name} %llu\\n", (unsigned long long)({expression}));'
        for name, expression in wanted)
    folder = tmp_path_factory.mktemp("abi")
    source = folder / "abi.c"
    source.write_text("#include <stdio.h>\n#include <stddef.h>\n#include <linux/kvm.h>\n"
                      f"int main(void) {{\n{prints}\nreturn 0; }}\n")
    subprocess.run([compiler, "-o", folder / "abi", source], check=True, timeout=60)
    out = subprocess.run([folder / "abi"], check=True, capture_output=True, text=True, timeout=10)
    return {name: int(value) for name, value in (line.split() for line in out.stdout.splitlines())}


def test_ioctl_numbers_are_those_of_the_header(header):
    assert {name: header[name] for name in abi.IOCTLS} == abi.IOCTLS
    assert header["KVM_API_VERSION"] == abi.API_VERSION
    assert header["KVM_CAP_IMMEDIATE_EXIT"] == abi.CAP_IMMEDIATE_EXIT
    assert header["KVM_CAP_X86_USER_SPACE_MSR"] == abi.CAP_X86_USER_SPACE_MSR
    assert header["MSR_REASONS"] == abi.MSR_REASONS


def test_exit_codes_are_those_of_the_header(header):
    known = [code for code in abi.ExitCode if f"KVM_EXIT_{code.name}" in header]
    assert len(known) >= 36                        # as many as Linux 6.1 has
    assert {code.name: int(code) for code in known} == {code.name: header[f"KVM_EXIT_{code.name}"] for code in known}
    assert {event.name: int(event) for event in abi.SystemEvent} == {
        event.name: header[f"KVM_SYSTEM_EVENT_{event.name}"] for event in abi.SystemEvent}
    assert {code.name: int(code) for code in abi.InternalError} == {
        code.name: header[f"KVM_INTERNAL_ERROR_{code.name}"] for code in abi.InternalError}
    assert (
        header["KVM_EXIT_IO_IN"], header["KVM_EXIT_IO_OUT"]) == (abi.IoDirection.IN, abi.IoDirection.OUT)


def test_offsets_in_the_run_page_are_those_of_the_header(header):
    known = {path: at for path, at in abi.RUN_OFFSETS.items() if f"run.{path}" in header}
    assert {path: header[f"run.{path}"] for path in known} == known
    assert set(abi.RUN_OFFSETS) - set(known) <= {"memory_fault.gpa", "memory_fault.size"}


@pytest.mark.parametrize("name", STRUCTS)
def test_structs_have_the_headers_size_and_offsets(header, name):
    structure = STRUCTS[name]
    assert ctypes.sizeof(structure) == header[name]
    assert {field: getattr(structure, field).offset for field in fields(structure)} == {
        field: header[f"{name}.{field}"] for field in fields(structure)}


def test_the_cpuid_table_starts_where_the_header_says(header):
    assert abi.CpuidHeader.entries.offset == header["kvm_cpuid2.entries"]


def test_the_numbers_of_a_whole_state_are_those_of_the_header(header):
    assert {name: header[name] for name in NUMBERS} == NUMBERS
    assert abi.MsrHeader.entries.offset == header["kvm_msrs.entries"]


def test_events_lie_where_the_header_says(header):
    def offset(path: str) -> int:
        structure, at = abi.Events, 0
        for name in path.split("."):
            member = getattr(structure, name)
            at += member.offset
            structure = dict(structure._fields_).get(name)
        return at

    assert ctypes.sizeof(abi.Events) == header["kvm_vcpu_events"]
    assert {path: offset(path) for path in EVENTS} == {path: header[f"events.{path}"] for path in EVENTS}


def test_general_registers_have_the_order_of_the_engines_contract():
    assert tuple(fields(abi.Registers)) == GPR
