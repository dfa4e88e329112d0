"""`profile`: in which ring a guest spends its time, in guest or host context, and in which code."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from .common import connect, notice, output_option, print_json, print_table
from .inside import code_lines

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["profile", "profile_view"]


@click.command()
@click.argument("name")
@click.option("--seconds", type=click.FloatRange(0.1, 600), default=5.0, show_default=True, metavar="N",
              help="How long to take samples.")
@click.option("--hz", type=click.IntRange(1, 1000), default=250, show_default=True, metavar="N",
              help="Samples a second of the VM's own CPU time.")
@output_option
def profile(name: str, seconds: float, hz: int, output: str) -> None:
    """Sample where a running VM spends its CPU time: rings, guest and host context, hot code.

    A sample is taken each 1/N second of the VM's own CPU time, so a VM that sleeps has none. Ctrl-C ends
    it early and shows what there is.
    """
    with connect() as client:
        client.profile(name, hz, seconds)
        try:
            time.sleep(seconds)
        except KeyboardInterrupt:
            notice("ended early")
        answer = client.profile_end(name)
    if output == "json":
        print_json(answer)
        return
    print_table(profile_view(name, answer))


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "–"


def profile_view(name: str, answer: Mapping[str, Any]) -> RenderableType:
    from rich.console import Group
    from rich.text import Text

    from .tables import plain_table

    samples, cpu_ns = answer["samples"], answer["cpu_ns"]
    # Handling is measured by the wall clock, so a VM that lost its CPU in it may seem to have had more than all.
    host_ns = min(answer["host_ns"], cpu_ns)
    lines: list[RenderableType] = [
        Text(f"{name}: {samples} samples in {answer['wall_ns'] / 1e9:.1f} s", style="bold"),
        Text(f"CPU time {cpu_ns / 1e9:.2f} s: guest context {_share(cpu_ns - host_ns, cpu_ns)}, host context "
             f"(handling exits) {_share(host_ns, cpu_ns)}; asleep {answer['sleeping_ns'] / 1e9:.2f} s")]
    if not samples:
        lines.append(Text("No sample: the VM used no CPU time to speak of. Is it waiting for a key?"))
        return Group(*lines)
    rings = answer["rings"]
    lines += [Text(""), plain_table(
        [("Ring", "left"), ("Samples", "right"), ("Share", "right")],
        [[str(ring), str(number), _share(number, samples)] for ring, number in enumerate(rings)]), Text("")]
    lines += [Text(f"{_share(number, samples):>8}  {mode}")
              for mode, number in sorted(answer["modes"].items(), key=lambda item: -item[1])]
    if len(answer["vcpus"]) > 1:
        lines += [Text(""), *(Text(f"{_share(number, samples):>8}  vCPU {vcpu}")
                              for vcpu, number in enumerate(answer["vcpus"]))]
    lines += [Text(""), Text(f"Hottest places of {answer['places']} (one {answer['granularity']} each)", style="bold"),
              plain_table([("Share", "right"), ("Ring", "right"), ("Address", "right"), ("Instruction", "left")],
                          [[_share(place["count"], samples), str(place["ring"]), f"{place['address']:#x}",
                            place["instruction"]] for place in answer["hot"][:10]])]
    for stretch in answer["code"]:
        if stretch["count"] * 20 < samples:
            break
        listed = zip(code_lines((line[:3] for line in stretch["lines"]), -1), stretch["lines"], strict=True)
        lines += [Text(""), Text(f"{_share(stretch['count'], samples)} in {stretch['mode']}", style="bold"),
                  *(Text(f"{_share(line[3], samples) if line[3] else '':>8} {text}") for text, line in listed)]
    return Group(*lines)
