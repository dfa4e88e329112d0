"""`scan`: what an image's code asks of whoever virtualizes it, before anybody runs it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .common import output_option, print_json, print_table

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ..vm.code.scan import Report

__all__ = ["report_json", "report_view", "scan"]


class _Number(click.ParamType):
    """A number as people write addresses: 0x7c00 or 31744."""

    name = "address"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return int(value, 0)
        except (TypeError, ValueError):
            self.fail(f"{value!r} is no address; write it as 0x7c00 or 31744", param, ctx)


@click.command()
@click.argument("image", type=click.Path(path_type=Path))
@click.option("--format", "kind", type=click.Choice(["boot-sector", "multiboot", "bzimage", "elf", "rom", "flat"]),
              default=None, help="What the image is; found out unless given.")
@click.option("--bits", type=click.Choice(["16", "32", "64"]), default=None,
              help="Flat code: the mode it starts in [16].")
@click.option("--base", type=_Number(), default=None, help="Flat code: where its first byte is loaded [0x10000].")
@click.option("--entry", type=_Number(), default=None, help="Flat code: where it starts [--base].")
@click.option("--for", "technology", type=click.Choice(["vt-x", "amd-v", "pvm", "none"]), default=None,
              help="Recommend for a host with this hardware virtualization, instead of for this one.")
@output_option
def scan(image: Path, kind: str | None, bits: str | None, base: int | None, entry: int | None,
         technology: str | None, output: str) -> None:
    """Read the code that IMAGE can reach, and say which mode it wants.

    IMAGE is a disk (its boot sector), a multiboot kernel, an ELF file, a bzImage, or flat code. Counted
    are privileged, sensitive but unprivileged, I/O, esoteric and 64-bit instructions, with the
    addresses of the first of each. Nothing is run.
    """
    from ..service.backend import ServiceError
    from ..vm.code.image import ImageError, load
    from ..vm.code.scan import scan as scan_image

    try:
        found = load(image, format=kind, bits=int(bits) if bits else None, base=base, entry=entry)
    except ImageError as error:
        raise ServiceError(str(error)) from error
    if technology is None:
        from ..vm.host import HostFacts
        technology = HostFacts.read().technology
    report = scan_image(found, technology)       # type: ignore[arg-type]  # click has checked it
    if output == "json":
        print_json(report_json(image, technology, report))
        return
    print_table(report_view(str(image), technology, report))


def report_json(image: Path, technology: str, report: Report) -> dict[str, Any]:
    from ..vm.code.classes import Kind
    advice = report.advice
    assert advice is not None

    def findings(listed: Any) -> list[dict[str, Any]]:
        return [{"class": f.kind.value, "instruction": f.family, "mode": f.mode, "count": f.count,
                 "addresses": f.addresses} for f in listed]

    def places(told: tuple[int, list[int]]) -> dict[str, Any]:
        return {"count": told[0], "addresses": told[1]}

    return {
        "schema": 1, "image": str(image), "format": report.format, "size_bytes": report.size,
        "entries": [{"bits": e.bits, "address": e.linear, "what": e.what} for e in report.entries],
        "instructions": report.instructions, "code_bytes": report.code_bytes, "complete": report.complete,
        "modes": dict(report.modes),
        "counts": {**{kind.value: report.total(kind) for kind in Kind},
                   "64-bit": report.modes["64-bit long mode"]},
        "findings": findings(report.findings), "entered": [asdict(step) for step in report.entered],
        "software": {"trap": report.traps, "patch": report.patches, "translate": report.translated,
                     "cannot": report.modes["64-bit long mode"]},
        "pvm_cannot": [{key: value for key, value in f.items() if key != "class"}
                       for f in findings(report.pvm_cannot)],
        "not_followed": {"indirect": places(report.indirect), "outside": places(report.outside),
                         "undecodable": places(report.undecodable)},
        "technology": technology,
        "recommended": {"mode": advice.mode, "rule": advice.rule, "reason": advice.reason,
                        "addresses": list(advice.addresses)},
    }


def _addresses(told: tuple[int, list[int]] | tuple[int, tuple[int, ...]]) -> str:
    count, first = told
    more = " …" if count > len(first) else ""
    return " ".join(f"{address:#x}" for address in first) + more


def _number(count: int, what: str) -> str:
    return f"{count} {what}{'s'[:count != 1]}"


def report_view(name: str, technology: str, report: Report) -> RenderableType:
    """The same for a person."""
    from rich.console import Group
    from rich.text import Text

    from .tables import MODE_STYLE, plain_table

    advice = report.advice
    assert advice is not None
    entries = ", ".join(f"{entry.linear:#x} ({entry.what}, {entry.bits} bits)" for entry in report.entries)
    modes = ", ".join(f"{count} in {mode}" for mode, count in report.modes.most_common())
    lines: list[RenderableType] = [
        Text(f"{name}: {report.format}, {_number(report.size, 'byte')}, entered at {entries}", style="bold"),
        Text(f"{_number(report.instructions, 'instruction')} ({_number(report.code_bytes, 'byte')}) can be reached"
             + (f": {modes}" if modes else "")
             + ("" if report.complete else "; the scan stopped there, there is more")), Text("")]
    if report.findings:
        columns = [("Class", "left"), ("Instruction", "left"), ("Mode", "left"), ("Count", "right"), ("At", "left")]
        lines += [plain_table(columns, [[f.kind.value, f.family, f.mode, str(f.count),
                                         _addresses((f.count, f.addresses))] for f in report.findings]), Text("")]
    lines += [Text(f"At {step.address:#x}: {step.mode} ({step.how})") for step in report.entered]
    lines.append(Text(
        f"Software virtualization (the guest's ring 0 in ring 1): {report.traps} trap by themselves, {report.patches} "
        f"do not and must be patched, {report.translated} in real mode must be translated"
        + (f", {report.modes['64-bit long mode']} of 64 bits cannot be run so" if report.modes["64-bit long mode"]
           else "")))
    if technology == "pvm" and report.pvm_cannot:
        listed = "; ".join(f"{f.family} ({f.mode}) {_addresses((f.count, f.addresses))}" for f in report.pvm_cannot)
        lines.append(Text(f"KVM under PVM cannot run these in ring 0: {listed}"))
    unseen = [f"{_number(told[0], what)} ({_addresses(told)})" for told, what in (
        (report.indirect, "indirect jump or call"), (report.outside, "target outside the image"),
        (report.undecodable, "place that does not decode")) if told[0]]
    if unseen:
        lines.append(Text(f"Not followed: {'; '.join(unseen)}"))
    where = f" ({_addresses((len(advice.addresses), advice.addresses))})" if advice.addresses else ""
    lines.append(Text.assemble("Recommended on ", technology if technology != "none" else "a host without VT-x or "
                               "AMD-V", ": ", (advice.mode, MODE_STYLE[advice.mode]),
                               f", rule {advice.rule}: {advice.reason}{where}"))
    return Group(*lines)
