"""What an operator may write: one frozen model for each table of the TOML file.

Theory.  A configuration is a *value*: it is read, checked as a whole, and only then given to
anybody.  The models say what one key may hold (type, range, words) and fill in the defaults
that follow from other keys of the same table (`bits` and `progress` from `boot`); what several
keys or tables say together, and what the host allows, is in config/rules.py, because those
findings must be had all at once and not one exception at a time.  config/load.py turns both
kinds into `Problem`s with file and line; config/schema.py prints these models for editors.

Invariants.  Nothing here reads a file, the clock or the host.  A model that exists has every
key in range.  Names of keys are those of the conventions in use elsewhere: weight as cgroup v2
has it, cap and reservation in percent of one host CPU as Xen has them.

Units.  Sizes are bytes ("16M", "640K", "1G" are binary multiples), `_us` microseconds, `cap`
and `reservation` percent of one host CPU, addresses guest-physical.

Poor at: boot is one source of bytes (a disk, a flat image, a kernel with its modules, a built-in guest); a
network has no words here yet.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    Strict,
    Tag,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

__all__ = [
    "ARCHITECTURES",
    "BASE_CONTEXT",
    "FLOPPY_MAX_BYTES",
    "GUESTS",
    "LISTEN_ALLOWED",
    "PROGRESS_DEFAULT",
    "Between",
    "BootConfig",
    "Config",
    "DiskBoot",
    "DiskConfig",
    "FlatBoot",
    "GuestBoot",
    "GuestInfo",
    "HostConfig",
    "MetricsConfig",
    "ModuleConfig",
    "MultibootBoot",
    "RomBoot",
    "SchedulerConfig",
    "VmConfig",
    "format_cpus",
    "format_size",
    "parse_cpus",
    "parse_size",
    "usable_cpus",
    "vm_cpus",
]

KIB: Final = 1024
MIB: Final = 1024 * KIB
GIB: Final = 1024 * MIB

PROGRESS_DEFAULT: Final = 0x20000      # where every built-in guest keeps its progress counter
WORKING_SET_DEFAULT: Final = 256 * KIB
WORKING_SET_MAX: Final = GIB
PAGE_BYTES: Final = 4096
FLOPPY_MAX_BYTES: Final = 2880 * KIB   # a larger image is a hard disk
ROM_MAX_BYTES: Final = 256 * KIB       # what fits between KVM's own pages and 4 GiB
POST_PORTS: Final = (0x80, 0x190)      # where BIOSes and test ROMs say how far they are
MEMORY_MIN_BYTES: Final = 64 * KIB
MEMORY_MAX_BYTES: Final = 1024 * GIB
CPU_MAX: Final = 8191                  # CONFIG_NR_CPUS of the largest kernels in use
NAME_PATTERN: Final = r"^[a-zA-Z0-9][a-zA-Z0-9_.-]{0,62}$"
NAME_ALLOWED: Final = (
    "1 to 63 letters, digits, '_', '.' or '-', the first a letter or digit")
BASE_CONTEXT: Final = "base"           # validation context: where relative paths start

Bits = Literal[16, 32, 64]
ARCHITECTURES: Final = (
    "x86", "arm", "aarch64", "riscv32", "riscv64", "ppc", "ppc64", "mips", "mips64", "s390x",
    "sparc64", "m68k",
)


@dataclass(frozen=True, slots=True)
class GuestInfo:
    """A built-in guest as the file sees it: what may be written beside its name."""

    bits: Bits                         # what its work is written for
    about: str                         # one line for people
    parameters: tuple[str, ...] = ()   # keys of `boot` that it takes
    progress: bool = True              # counts its work at PROGRESS_DEFAULT
    console: Literal["serial", "none"] = "none"

    def memory_bytes(self, parameters: Mapping[str, int]) -> int:
        """The least memory it needs: 1 MiB for itself; the working set lies at 2 MiB."""
        if "working_set" not in self.parameters:
            return MIB
        return max(4 * MIB, 2 * MIB + parameters.get("working_set", WORKING_SET_DEFAULT))


# The images are in vm/guests (which config may not import); a test holds the two together.
GUESTS: Final[Mapping[str, GuestInfo]] = {
    "hello": GuestInfo(16, "says hello on the serial port and ends", progress=False,
                       console="serial"),
    "alu": GuestInfo(64, "integer arithmetic in registers"),
    "randmem": GuestInfo(64, "random loads over a working set", ("working_set",)),
    "portio": GuestInfo(64, "computes, then writes to a port: VM exits", ("batch",)),
    "rings": GuestInfo(64, "goes to ring 3 and back by an interrupt"),
}


# ---- values ---------------------------------------------------------------------------------

def _refuse(allowed: str) -> PydanticCustomError:
    """The error of a value: load.py shows `allowed` beside what was found."""
    return PydanticCustomError("not_allowed", "allowed: {allowed}", {"allowed": allowed})


@dataclass(frozen=True, slots=True)
class Between:
    """Whole numbers from `low` to `high`, both included; the unit is only said."""

    low: int
    high: int
    unit: str = ""

    @property
    def allowed(self) -> str:
        return f"{self.low} to {self.high}{' ' + self.unit if self.unit else ''}"

    def check(self, value: int) -> int:
        if not self.low <= value <= self.high:
            raise _refuse(self.allowed)
        return value

    def __get_pydantic_core_schema__(
            self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self.check, handler(source))

    def __get_pydantic_json_schema__(
            self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {**handler(schema), "minimum": self.low, "maximum": self.high}


_SIZE: Final = re.compile(r"([0-9]+)\s*(?:([KMGT])(?:i?B)?|B)?", re.IGNORECASE)
_SHIFT: Final = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}
SIZE_ALLOWED: Final = 'a size such as "640K", "16M" or "1G", or a whole number of bytes'


def parse_size(value: object) -> int:
    """Bytes of `"16M"`, `"640K"`, `"64KiB"` or a plain number. Raises ValueError."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    if isinstance(value, str):
        match = _SIZE.fullmatch(value.strip())
        if match:
            return int(match[1]) << _SHIFT[(match[2] or "").upper()]
    raise ValueError(SIZE_ALLOWED)


def format_size(size_bytes: int) -> str:
    """The shortest exact way to write a size: 16777216 -> "16M"."""
    for unit in "TGMK":
        if size_bytes and size_bytes % (1 << _SHIFT[unit]) == 0:
            return f"{size_bytes >> _SHIFT[unit]}{unit}"
    return str(size_bytes)


CPUS_ALLOWED: Final = (
    f'host CPUs such as "1", "0-3,6" or [0, 1], each from 0 to {CPU_MAX}, at least one')


def parse_cpus(value: object) -> tuple[int, ...]:
    """Sorted host CPUs of `"0-3,6"` (the kernel's list format), `[0, 1]` or `1`.

    Raises ValueError for anything else, an empty list and numbers over CPU_MAX included.
    """
    found: set[int] = set()
    if isinstance(value, str):
        for part in value.split(","):
            match = re.fullmatch(r"\s*([0-9]{1,5})\s*(?:-\s*([0-9]{1,5})\s*)?", part)
            if not match:
                raise ValueError(CPUS_ALLOWED)
            low, high = int(match[1]), int(match[2] or match[1])
            if low > high:
                raise ValueError(CPUS_ALLOWED)
            found.update(range(low, min(high, CPU_MAX + 1) + 1))
    else:
        items = cast("Iterable[object]", value) if isinstance(value, list | tuple) else (value,)
        for item in items:
            if not isinstance(item, int) or isinstance(item, bool):
                raise ValueError(CPUS_ALLOWED)
            found.add(item)
    if not found or min(found) < 0 or max(found) > CPU_MAX:
        raise ValueError(CPUS_ALLOWED)
    return tuple(sorted(found))


def format_cpus(cpus: Iterable[int]) -> str:
    """The kernel's list format: (0, 1, 2, 6) -> "0-2,6"."""
    runs: list[list[int]] = []
    for cpu in sorted(set(cpus)):
        if runs and runs[-1][1] == cpu - 1:
            runs[-1][1] = cpu
        else:
            runs.append([cpu, cpu])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _size(value: object) -> int:
    try:
        return parse_size(value)
    except ValueError as error:
        raise _refuse(str(error)) from None


def _cpus(value: object) -> tuple[int, ...]:
    try:
        return parse_cpus(value)
    except ValueError as error:
        raise _refuse(str(error)) from None


_SIZE_PATTERN: Final = r"^\s*[0-9]+\s*([KMGTkmgt]([iI]?[bB])?|[bB])?\s*$"
Size = Annotated[
    int,
    BeforeValidator(_size),
    WithJsonSchema({"anyOf": [
        {"type": "string", "pattern": _SIZE_PATTERN},
        {"type": "integer", "minimum": 0},
    ]}),
]
CpuList = Annotated[
    tuple[int, ...],
    BeforeValidator(_cpus),
    WithJsonSchema({"anyOf": [
        {"type": "string",
         "pattern": r"^\s*[0-9]+(\s*-\s*[0-9]+)?(\s*,\s*[0-9]+(\s*-\s*[0-9]+)?)*\s*$"},
        {"type": "integer", "minimum": 0, "maximum": CPU_MAX},
        {"type": "array", "minItems": 1, "uniqueItems": True,
         "items": {"type": "integer", "minimum": 0, "maximum": CPU_MAX}},
    ]}),
]
# Strict: without it TOML's `true` would pass for 1 and "100" for 100.
Whole = Annotated[int, Strict()]
Flag = Annotated[bool, Strict()]
Text = Annotated[str, Strict()]


def _percent(value: float) -> float:
    if not 0.0 <= value <= 100.0:          # a NaN is in no range
        raise _refuse("a number from 0 to 100 percent")
    return value


Percent = Annotated[float, Strict(), AfterValidator(_percent),
                    WithJsonSchema({"type": "number", "minimum": 0, "maximum": 100})]


class _Table(BaseModel):
    """Every table: unknown keys are errors, values never change."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


def _located(path: Path, info: ValidationInfo) -> Path:
    """A path of the file, relative to the file's folder where one is given."""
    context = cast("Mapping[str, Any] | None", info.context)
    base = context.get(BASE_CONTEXT) if context else None
    return path if base is None else Path(base) / path


def _not_empty(value: object) -> object:
    # Path("") is ".", which would then be refused as a directory: say the real fault.
    if not isinstance(value, str | Path) or str(value).strip() == "" or "\0" in str(value):
        raise _refuse("the path of a file")
    return value


FilePath = Annotated[Path, BeforeValidator(_not_empty),
                     WithJsonSchema({"type": "string", "minLength": 1})]


# ---- boot -----------------------------------------------------------------------------------

class _Disk(_Table):
    """An image in a drive."""

    disk: FilePath = Field(description="Disk image, relative to this file.")
    writable: Literal["no", "overlay", "yes"] = Field(
        default="no",
        description="Where writes go: no (write-protected), overlay (the image stays as it is) or yes (into the "
                    "image).")
    overlay: FilePath | None = Field(
        default=None,
        description="File that keeps what was written, relative to this file, made when it is not there. Default: "
                    "what was written is discarded when the VM ends.")
    type: Literal["auto", "floppy", "hard"] = Field(
        default="auto", description="Kind of drive. auto: a floppy up to 2880K, else a hard disk.")

    @field_validator("disk", "overlay")
    @classmethod
    def _locate(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        return None if value is None else _located(value, info)

    @model_validator(mode="after")
    def _overlay_used(self) -> Self:
        if self.overlay is not None and self.writable != "overlay":
            raise _refuse('overlay = "FILE" only with writable = "overlay"')
        return self

    def is_floppy(self, size_bytes: int) -> bool:
        """Which kind of drive an image of this size gets."""
        return size_bytes <= FLOPPY_MAX_BYTES if self.type == "auto" else self.type == "floppy"


class DiskConfig(_Disk):
    """A disk beside the one that the VM boots from."""


class DiskBoot(_Disk):
    """Boot from a disk image through its boot sector and the small BIOS."""

    @property
    def kind(self) -> Literal["disk"]:
        return "disk"

    @property
    def image(self) -> Path:
        return self.disk


class FlatBoot(_Table):
    """Load the bytes of a file into memory and start executing there."""

    flat: FilePath = Field(description="File whose bytes are loaded, relative to this file.")
    bits: Bits = Field(
        default=16, description="Mode the vCPU starts in: 16 (real), 32 (protected) or 64 (long).")
    load: Annotated[Whole, Between(0, MEMORY_MAX_BYTES)] = Field(
        default=0x10000, description="Guest-physical address of the first byte.")
    entry: Annotated[Whole, Between(0, MEMORY_MAX_BYTES)] | None = Field(
        default=None, description="Linear address where execution starts; default: load.")

    @field_validator("flat")
    @classmethod
    def _locate(cls, value: Path, info: ValidationInfo) -> Path:
        return _located(value, info)

    @property
    def kind(self) -> Literal["flat"]:
        return "flat"

    @property
    def image(self) -> Path:
        return self.flat

    @property
    def start(self) -> int:
        """Where execution starts."""
        return self.load if self.entry is None else self.entry


class RomBoot(_Table):
    """Start from the reset vector of a ROM image: a BIOS, or a test that runs in place of one."""

    rom: FilePath = Field(description="ROM image, relative to this file: whole pages of 4K, at most 256K. It "
                                      "ends at 4 GiB, and a copy of its last 128K at 1 MiB; both are writable.")
    post: Annotated[Whole, Between(0, 0xFFFF)] | None = Field(
        default=None,
        description="Port to which the ROM writes its POST codes; default: 0x80 and 0x190 are both taken for it.")

    @field_validator("rom")
    @classmethod
    def _locate(cls, value: Path, info: ValidationInfo) -> Path:
        return _located(value, info)

    @property
    def kind(self) -> Literal["rom"]:
        return "rom"

    @property
    def image(self) -> Path:
        return self.rom

    @property
    def post_ports(self) -> tuple[int, ...]:
        return POST_PORTS if self.post is None else (self.post,)


MODULES_MAX: Final = 8                 # each is a descriptor of the worker
LINE_ALLOWED: Final = "one line of at most 4096 characters"
CommandLine = Annotated[str, Strict(), AfterValidator(lambda text: _line(text))]


def _line(text: str) -> str:
    if len(text) > 4096 or any(character in text for character in "\0\r\n"):
        raise _refuse(LINE_ALLOWED)
    return text


def _named_line(file: Path, text: str) -> str:
    """A command line as a guest gets it: the name of the file first, as GRUB and QEMU have it."""
    return f"{file.name} {text}".rstrip()


class ModuleConfig(_Table):
    """A file that a multiboot kernel finds in memory."""

    file: FilePath = Field(description="The file, relative to this file.")
    cmdline: CommandLine = Field(default="", description="Its command line; the file's name is put before it.")

    @field_validator("file")
    @classmethod
    def _locate(cls, value: Path, info: ValidationInfo) -> Path:
        return _located(value, info)


def _module(value: object) -> object:
    return {"file": value} if isinstance(value, str) else value


class MultibootBoot(_Table):
    """Boot a Multiboot 1 kernel: a 32-bit ELF file, or one whose header has the addresses."""

    multiboot: FilePath = Field(description="The kernel, relative to this file.")
    cmdline: CommandLine = Field(
        default="", description="The kernel's command line; its file's name is put before it.")
    modules: Annotated[tuple[Annotated[ModuleConfig, BeforeValidator(_module)], ...],
                       Field(max_length=MODULES_MAX)] = Field(
        default=(), description=f"At most {MODULES_MAX} files that it finds in memory: \"FILE\" or "
                                '{ file = "FILE", cmdline = "..." }.')

    @field_validator("multiboot")
    @classmethod
    def _locate(cls, value: Path, info: ValidationInfo) -> Path:
        return _located(value, info)

    @property
    def kind(self) -> Literal["multiboot"]:
        return "multiboot"

    @property
    def image(self) -> Path:
        return self.multiboot

    @property
    def command_line(self) -> str:
        return _named_line(self.multiboot, self.cmdline)

    @property
    def module_files(self) -> tuple[Path, ...]:
        return tuple(module.file for module in self.modules)

    @property
    def module_lines(self) -> list[str]:
        return [_named_line(module.file, module.cmdline) for module in self.modules]


class GuestBoot(_Table):
    """Run one of the built-in guests."""

    guest: Text = Field(description="Built-in guest to run.",
                        json_schema_extra={"enum": list(GUESTS)})
    working_set: Size | None = Field(
        default=None,
        description="randmem: bytes that the random loads go over, a power of two from 4K to 1G. "
                    "Default: 256K.")
    batch: Annotated[Whole, Between(1, 1_000_000_000)] | None = Field(
        default=None,
        description="portio: rounds of arithmetic between two port writes. Default: 1000.")

    @field_validator("guest")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in GUESTS:
            raise _refuse(" or ".join(f'"{name}"' for name in GUESTS))
        return value

    @field_validator("working_set")
    @classmethod
    def _power(cls, value: int | None) -> int | None:
        if value is not None and (
                not PAGE_BYTES <= value <= WORKING_SET_MAX or value & (value - 1)):
            raise _refuse("a power of two from 4K to 1G")
        return value

    @property
    def kind(self) -> Literal["guest"]:
        return "guest"

    @property
    def image(self) -> None:
        return None

    @property
    def parameters(self) -> dict[str, int]:
        """The parameters that the file gives; the guest's own defaults fill the rest."""
        given = {"working_set": self.working_set, "batch": self.batch}
        return {key: value for key, value in given.items() if value is not None}


BOOT_KINDS: Final = ("disk", "flat", "multiboot", "guest", "rom")
BOOT_ALLOWED: Final = (
    'exactly one of { disk = "FILE" }, { flat = "FILE" }, { multiboot = "FILE" }, { rom = "FILE" } and '
    '{ guest = "NAME" }')
TAG_PREFIX: Final = "boot:"            # load.py takes such parts out of an error's place


def _boot_tag(value: object) -> str | None:
    if isinstance(value, DiskBoot | FlatBoot | MultibootBoot | GuestBoot | RomBoot):
        return TAG_PREFIX + value.kind
    if isinstance(value, Mapping):
        kinds = [kind for kind in BOOT_KINDS if kind in value]
        if len(kinds) == 1:
            return TAG_PREFIX + kinds[0]
    return None


BootConfig = Annotated[
    Annotated[DiskBoot, Tag("boot:disk")]
    | Annotated[FlatBoot, Tag("boot:flat")]
    | Annotated[MultibootBoot, Tag("boot:multiboot")]
    | Annotated[GuestBoot, Tag("boot:guest")]
    | Annotated[RomBoot, Tag("boot:rom")],
    Discriminator(
        _boot_tag, custom_error_type="not_allowed", custom_error_message="allowed: {allowed}",
        custom_error_context={"allowed": BOOT_ALLOWED}),
]


# ---- tables ---------------------------------------------------------------------------------

class VmConfig(_Table):
    """One virtual machine."""

    name: Text = Field(
        description="Unique name: " + NAME_ALLOWED + ".",
        json_schema_extra={"pattern": NAME_PATTERN})
    engine: Literal["auto", "kvm", "software"] = Field(
        default="auto",
        description="What executes the guest: kvm (/dev/kvm), software (no CPU feature needed), "
                    "or auto: whichever the mode asks for.")
    mode: Literal["auto", "software", "hardware"] = Field(
        default="auto",
        description="Virtualization mode. auto follows the rules and avoids mixing modes; "
                    "hardware is never bent into software.")
    fallback: Flag = Field(
        default=False,
        description="Under mode = auto, allow software for a guest that needs hardware when the "
                    "host has none.")
    check_accesses: Flag = Field(
        default=True,
        description="In software mode: check at each access what a processor checks (limits and types of segments, "
                    "LOCK, alignment). Costs nothing where segments are flat; without it words in memory are up to "
                    "twice as fast in real mode. Hardware always does.")
    os: Annotated[Text, Field(min_length=1, max_length=63)] = Field(
        default="other",
        description="Guest system, such as dos, linux, windows-8 or openbsd; some need hardware.")
    arch: Literal[
        "x86", "arm", "aarch64", "riscv32", "riscv64", "ppc", "ppc64", "mips", "mips64", "s390x",
        "sparc64", "m68k",
    ] = Field(default="x86", description="Architecture that the guest is written for; its width "
                                         "is said by bits.")
    bits: Bits = Field(
        default=16,
        description="Width of the guest. Default: that of the built-in guest or flat image, 32 for a "
                    "multiboot kernel, else 16. A 64-bit guest needs hardware.")
    vcpus: Annotated[Whole, Between(1, 1024)] = Field(
        default=1, description="Virtual CPUs. More than one needs hardware, and there are at most 16.")
    memory: Size = Field(
        default=16 * MIB, validate_default=True,
        description='Guest memory, such as "16M" or "640K": whole pages of 4K, at least 64K.')
    boot: BootConfig = Field(description="What runs: " + BOOT_ALLOWED + ".")
    disks: tuple[DiskConfig, ...] = Field(
        default=(),
        description="Disks beside the one that it boots from, as boot = { disk = ... } describes one. Floppies are A: "
                    "and B:, hard disks the first and second, the boot disk before others of its kind.")
    weight: Annotated[Whole, Between(1, 10_000)] = Field(
        default=100, description="Share of the CPUs beside other VMs; twice the weight, twice the "
                                 "time.")
    cap: Annotated[Whole, Between(0, 102_400, "percent of one host CPU (0: no cap)")] = Field(
        default=0, description="Most CPU time it may take, in percent of one host CPU; 0 = none.")
    reservation: Annotated[Whole, Between(0, 102_400, "percent of one host CPU")] = Field(
        default=0, description="CPU time it is always given when it wants it, in percent of one "
                               "host CPU.")
    cpus: CpuList | None = Field(
        default=None, description='Host CPUs it may run on, such as "1" or "0-3,6". Default: all '
                                  "that VMs may use.")
    latency: Literal["low", "normal", "high"] = Field(
        default="normal",
        description="How soon it gets the CPU once it wants it: low for whoever waits at a keyboard, high for "
                    "work that may wait. No class gets more CPU time.")
    autostart: Flag = Field(default=True, description="Start it with the service.")
    restart: Literal["no", "on-failure", "always"] = Field(
        default="no", description="Whether it is started again after it ended by itself.")
    console: Literal["auto", "text", "serial", "none"] = Field(
        default="auto",
        description="What `mixvisor console` shows: the text screen, the serial port or nothing. "
                    "auto: text for a disk or a multiboot kernel, serial for a flat image.")
    progress: Annotated[Whole, Between(0, MEMORY_MAX_BYTES - 8)] | None = Field(
        default=None,
        description="Guest-physical address of a 64-bit counter that the guest raises as it "
                    "works, a multiple of 8 inside its memory. Built-in guests have their own.")
    measure: Flag = Field(
        default=False,
        description="Whether `mixvisor measure --vms` may borrow it: for that minute a script decides when it "
                    "runs, together with the other VMs that are measured.")

    @field_validator("name")
    @classmethod
    def _named(cls, value: str) -> str:
        if not re.fullmatch(NAME_PATTERN[1:-1], value):
            raise _refuse(NAME_ALLOWED)
        return value

    @field_validator("memory")
    @classmethod
    def _pages(cls, value: int) -> int:
        if not MEMORY_MIN_BYTES <= value <= MEMORY_MAX_BYTES or value % PAGE_BYTES:
            raise _refuse("64K to 1T, in whole pages of 4K")
        return value

    @field_validator("progress")
    @classmethod
    def _aligned(cls, value: int | None) -> int | None:
        # An aligned 64-bit word never tears: the reader maps it and needs no lock.
        if value is not None and value % 8:
            raise _refuse("a multiple of 8")
        return value

    @model_validator(mode="before")
    @classmethod
    def _follow_boot(cls, data: object) -> object:
        """Fill in `bits` and `progress` from what boots, where the file is silent."""
        if not isinstance(data, Mapping):
            return data
        table = dict(cast("Mapping[str, object]", data))
        boot = table.get("boot")
        if isinstance(boot, BaseModel):
            boot = boot.model_dump()
        if not isinstance(boot, Mapping):
            return table
        source = cast("Mapping[str, object]", boot)
        guest = source.get("guest")
        info = GUESTS.get(guest) if isinstance(guest, str) else None
        if info is not None:
            table.setdefault("bits", info.bits)
            if info.progress:
                table.setdefault("progress", PROGRESS_DEFAULT)
        elif "multiboot" in source:
            table.setdefault("bits", 32)
        elif "flat" in source and source.get("bits", 16) in (16, 32, 64):
            table.setdefault("bits", source.get("bits", 16))
        return table

    @property
    def drives(self) -> tuple[DiskBoot | DiskConfig, ...]:
        """Every disk of the VM, the one that it boots from first."""
        return (self.boot, *self.disks) if isinstance(self.boot, DiskBoot) else ()

    @property
    def console_kind(self) -> Literal["text", "serial", "none"]:
        """`console` with auto resolved: what a person would look at first."""
        if self.console != "auto":
            return self.console
        if isinstance(self.boot, GuestBoot):
            return GUESTS[self.boot.guest].console
        return "serial" if self.boot.kind == "flat" else "text"


class HostConfig(_Table):
    """What of the host VMs may use."""

    cpus: CpuList | None = Field(
        default=None,
        description='Host CPUs that VMs may use, such as "1" or "1-3". Default: all but the '
                    "lowest-numbered, which is left to the rest of the system (the only one of a "
                    "host with one).")
    dispatch: Literal["auto", "precise", "gentle", "signal", "plain"] = Field(
        default="auto",
        description="How a VM's turn is enforced: precise (real-time priorities), gentle "
                    "(SCHED_OTHER and SCHED_IDLE), signal (SIGSTOP and SIGCONT), plain (left to "
                    "the kernel). auto: precise where permitted and a CPU is left over, else the "
                    "next that works.")
    conflicts: Literal["refuse", "warn"] = Field(
        default="refuse",
        description="While another hypervisor runs VMs with a driver of its own (VirtualBox, VMware): "
                    "refuse hardware VMs, since two users of VT-x can crash the host, or only warn.")
    state_dir: FilePath | None = Field(
        default=None,
        description="Folder for the control socket and what is needed to find running VMs again, "
                    "relative to this file. Default: below XDG_RUNTIME_DIR or /run.")

    @field_validator("state_dir")
    @classmethod
    def _locate(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        return None if value is None else _located(value, info)


class SchedulerConfig(_Table):
    """How the host CPUs are shared."""

    policy: Literal["fair", "batch", "partition", "kernel"] = Field(
        default="fair",
        description="fair: CPU time in proportion to weight, over all host CPUs. batch: the same over "
                    "long times, and a host CPU changes between modes as rarely as the mode_ keys "
                    "allow. partition: host CPUs are given to modes by demand. kernel: weights as "
                    "nice levels, the kernel does the rest.")
    slice_us: Annotated[Whole, Between(500, 100_000, "microseconds")] = Field(
        default=5000, description="How long a vCPU runs before the next is chosen, in "
                                  "microseconds.")
    ratelimit_us: Annotated[Whole, Between(0, 100_000, "microseconds")] = Field(
        default=1000, description="A vCPU that was chosen runs at least this long before one that "
                                  "wakes up may take its place, in microseconds.")
    migrate_resist_us: Annotated[Whole, Between(0, 1_000_000, "microseconds")] = Field(
        default=500, description="A vCPU moves to another host CPU only if it gains more than "
                                 "this, in microseconds.")
    random_order: Annotated[Whole, Between(0, 100, "percent of a slice (0: the order is fixed)")] = Field(
        default=50,
        description="Where VMs of both modes share a host CPU, who comes next is left to chance among those whose "
                    "turns are closer than this, in percent of a slice: that is how the cost of mixing is measured "
                    "while VMs run. Shares stay exact; a VM may be this much further behind for a moment. 0: never, "
                    "and nothing is measured.")
    random_seed: Annotated[Whole, Between(0, 2**31 - 1)] = Field(
        default=1, description="Of that chance: the same seed, the same order.")
    mode_batch_us: Annotated[Whole, Between(0, 10_000_000, "microseconds")] = Field(
        default=25_000,
        description="batch: how much time the VMs of one mode may be owed together before a host CPU "
                    "changes to them, in microseconds.")
    mode_wait_max_us: Annotated[Whole, Between(0, 60_000_000, "microseconds")] = Field(
        default=200_000,
        description="batch: a VM that is owed time waits at most about this long because its mode is "
                    "not the one that runs, in microseconds.")
    mode_loss_max: Percent = Field(
        default=0.0,
        description="batch: most time that may be lost to changes of mode, in percent; raises "
                    "mode_batch_us to what that needs at the cost of a crossing. 0: no such limit.")
    crossing_cost_us: Annotated[Whole, Between(0, 100_000, "microseconds")] = Field(
        default=50,
        description="Extra cost of a change of mode on this host over a change of VM within a mode, in "
                    "microseconds; only mode_loss_max uses it. Not given: as measured, and this default until then.")


LISTEN_ALLOWED: Final = (
    '"ADDRESS:PORT" such as "127.0.0.1:9736" or "[::1]:9736", or "none"')
_LISTEN: Final = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9._-]+)):([0-9]{1,5})")


class MetricsConfig(_Table):
    """Where Prometheus finds the metrics."""

    listen: Text = Field(
        default="127.0.0.1:9736",
        description="Address of the metrics endpoint: " + LISTEN_ALLOWED + ".")

    @field_validator("listen")
    @classmethod
    def _address(cls, value: str) -> str:
        match = _LISTEN.fullmatch(value)
        if value != "none" and not (match and 0 <= int(match[3]) <= 65535):
            raise _refuse(LISTEN_ALLOWED)
        return value

    @property
    def address(self) -> tuple[str, int] | None:
        """(address, port), or None for no endpoint; port 0 lets the kernel choose."""
        match = _LISTEN.fullmatch(self.listen)
        return (match[1] or match[2], int(match[3])) if match else None


class Config(_Table):
    """A whole configuration."""

    host: HostConfig = Field(
        default_factory=HostConfig, description="What of the host VMs may use.")
    scheduler: SchedulerConfig = Field(
        default_factory=SchedulerConfig, description="How the host CPUs are shared.")
    metrics: MetricsConfig = Field(
        default_factory=MetricsConfig, description="Where Prometheus finds the metrics.")
    vms: tuple[VmConfig, ...] = Field(
        default=(), alias="vm", description="The virtual machines, one [[vm]] table each.")
    path: Path | None = Field(default=None, exclude=True)      # the file it came from

    def vm(self, name: str) -> VmConfig:
        """The VM of that name. Raises KeyError."""
        for vm in self.vms:
            if vm.name == name:
                return vm
        raise KeyError(name)


def vm_cpus(config: Config, online: Iterable[int]) -> tuple[int, ...]:
    """Host CPUs that VMs may use: `usable_cpus` of the configuration's [host] table."""
    return usable_cpus(config.host, online)


def usable_cpus(host: HostConfig, online: Iterable[int]) -> tuple[int, ...]:
    """What `[host] cpus` says, or all of `online` but the lowest-numbered (if there are two).

    One CPU is left to the rest of the system because precise dispatch takes the others whole
    (the kernel then keeps only about 5 % of a contended CPU for everybody else). CPUs that are
    not online are left out; rules.py has refused a file that names them.
    """
    present = tuple(sorted(set(online)))
    if host.cpus is not None:
        return tuple(cpu for cpu in host.cpus if cpu in present)
    return present[1:] if len(present) > 1 else present
