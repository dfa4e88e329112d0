"""The table of all metric families in docs/metrics.md, written from the code.

    python -m mixvisor.metrics.document                    # print the table
    python -m mixvisor.metrics.document --write FILE       # renew it in FILE
    python -m mixvisor.metrics.document --check FILE       # exit 1 when FILE is out of date

In FILE the table stands between the two marker lines; everything around it is written by hand.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Final

from .families import FAMILIES, SELF_FAMILIES

__all__ = ["BEGIN", "END", "families_table", "renewed"]

BEGIN: Final = "<!-- families: written by python -m mixvisor.metrics.document; do not edit -->"
END: Final = "<!-- families: end -->"


def families_table() -> str:
    """Markdown: name, type, labels and meaning of every family, in the order of the exposition."""
    lines = ["| Name | Type | Labels | Meaning |", "|---|---|---|---|"]
    for family in (*FAMILIES, *SELF_FAMILIES):
        labels = ", ".join(f"`{label}`" for label in family.labels) or "–"
        lines.append(f"| `{family.name}` | {family.kind} | {labels} | {_cell(family.help)} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", r"\|")


def renewed(document: str) -> str:
    """*document* with its table renewed. Raises ValueError without the two markers, in order."""
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the document has no lines {BEGIN!r} and {END!r}, in this order")
    return f"{before}{BEGIN}\n\n{families_table()}\n{END}{after}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The table of all metric families.")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--write", type=Path, metavar="FILE", help="renew the table in FILE")
    choice.add_argument("--check", type=Path, metavar="FILE", help="exit 1 if FILE is out of date")
    options = parser.parse_args(arguments)
    file: Path | None = options.write or options.check
    if file is None:
        print(families_table(), end="")
        return 0
    try:
        old = file.read_text(encoding="utf-8")
        new = renewed(old)
    except (OSError, ValueError) as error:
        print(f"{file}: {error}", file=sys.stderr)
        return 2
    if options.write:
        file.write_text(new, encoding="utf-8")
    elif old != new:
        print(f"{file} is out of date: run python -m mixvisor.metrics.document --write {file}",
              file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
