"""What the CLI prints: tables that fit, sizes, ages, JSON, errors. Plain Python: rich costs 40 ms, which `ramet list` does not have."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from typing import Any, TextIO

from ramet.errors import RametError
from ramet.records import dump

RED, GREEN, YELLOW, BLUE, CYAN, DIM, BOLD = "31", "32", "33", "34", "36", "2", "1"
GAP = "  "
# Of machines and snapshots; what is not here is on its way to something that is.
_STATES = {"running": GREEN, "ready": GREEN, "failed": RED, "broken": RED, "stopped": DIM, "paused": CYAN, "hibernated": BLUE}


def colours(stream: TextIO) -> bool:
    """Whether to use colours: on a terminal that has them, unless NO_COLOR (https://no-color.org) is set."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def paint(text: str, colour: str, stream: TextIO | None = None) -> str:
    return f"\x1b[{colour}m{text}\x1b[0m" if colour and text and colours(stream or sys.stdout) else text


def colour_of(state: str) -> str:
    """The colour of a machine's or snapshot's state."""
    return _STATES.get(state, YELLOW)


def clean(text: str) -> str:
    """Text that a guest had a hand in: without control characters, for terminals obey them."""
    return "".join(c if c.isprintable() else "�" for c in text)


def say(text: str = "") -> None:
    """A line on stdout."""
    sys.stdout.write(text + "\n")


def note(text: str) -> None:
    """A line on stderr: for people, not for pipes."""
    sys.stderr.write(text + "\n")


def as_json(value: Any) -> None:
    """A record, or several, as the API sends them."""
    say(json.dumps(dump(value), indent=2))


def fail(error: RametError, *, machine_readable: bool = False) -> None:
    """An error, on stderr."""
    if machine_readable:
        note(json.dumps({"error": dump(error.wire())}, indent=2))
        return
    note(paint("error:", RED, sys.stderr) + f" {error.message}")
    for name in error.details.get("dependents") or ():
        note(f"  {clean(str(name))}")
    if error.hint:
        note(paint("hint:", YELLOW, sys.stderr) + f" {error.hint}")
    if log := error.details.get("log"):
        note("\n".join(f"  | {clean(line)}" for line in str(log).rstrip().splitlines()))


def age(since: float) -> str:
    """How long ago, in one unit."""
    seconds = max(0.0, time.time() - since)
    for name, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {name}"
    return f"{seconds:.0f} s"


def width() -> int:
    """Columns to print for: the terminal's, 80 elsewhere."""
    return shutil.get_terminal_size((80, 24)).columns


def _cut(text: str, room: int) -> str:
    return text if len(text) <= room else text[: max(0, room - 1)] + "…"


def table(
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    give: int | Sequence[int] = 0,
    paints: Sequence[str] = (),
    room: int | None = None,
) -> list[str]:
    """Lines of a table. give: the columns that are cut, the first before the next, where it does not fit in `room` columns. paints: a colour
    for the second cell of each row."""
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    over = sum(widths) + len(GAP) * (len(widths) - 1) - (room or width())
    for column in [give] if isinstance(give, int) else give:
        less = min(max(0, over), max(0, widths[column] - max(4, len(heads[column]))))
        widths[column] -= less
        over -= less
    lines = [paint(GAP.join(head.ljust(w) for head, w in zip(heads, widths, strict=True)).rstrip(), DIM)]
    for number, row in enumerate(rows):
        cells = [_cut(cell, w).ljust(w) for cell, w in zip(row, widths, strict=True)]
        if paints and len(cells) > 1:
            cells[1] = paint(cells[1].rstrip(), paints[number]) + " " * (len(cells[1]) - len(cells[1].rstrip()))
        lines.append(GAP.join(cells).rstrip())
    return lines


def facts(pairs: Sequence[tuple[str, str]]) -> list[str]:
    """Names and values below one another; pairs without a value are left out."""
    shown = [(name, value) for name, value in pairs if value]
    wide = max((len(name) for name, _ in shown), default=0)
    return [f"{paint(name.ljust(wide), DIM)}{GAP}{value}" for name, value in shown]
