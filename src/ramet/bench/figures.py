"""What a bench says: figures with goals, as a table for people or as JSON for programs. Pure."""

from __future__ import annotations

import json
import statistics
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

WIDTH = 80
_COLUMNS = (("figure", 44), ("value", 9), ("unit", 6), ("goal", 9), ("holds", 5))


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One measured number. goal: as people read it, empty for none; holds: None without a goal, or where it does not apply (the notes say why).

    n, p50, p99: of a distribution, in the figure's unit.
    """

    figure: str
    value: float
    unit: str
    goal: str = ""
    holds: bool | None = None
    n: int | None = None
    p50: float | None = None
    p99: float | None = None


@dataclass(frozen=True, kw_only=True)
class Report:
    """The figures of one run. header: what they were measured on; notes: what a reader should know."""

    header: str
    figures: tuple[Figure, ...]
    notes: tuple[str, ...] = field(default=())

    @property
    def status(self) -> int:
        """0: all goals hold; 1: one does not."""
        return 1 if any(figure.holds is False for figure in self.figures) else 0


def percentile(samples: Sequence[float], share: float) -> float:
    """The sample below which `share` of them lie (nearest rank)."""
    ordered = sorted(samples)
    return ordered[min(len(ordered) - 1, max(0, round(share * len(ordered)) - 1))]


def limit(figure: str, value: float, unit: str, at_most: float) -> Figure:
    """A figure with an upper goal."""
    return Figure(figure=figure, value=value, unit=unit, goal=f"<= {at_most:g}", holds=value <= at_most)


def at_least(figure: str, value: float, unit: str, least: float) -> Figure:
    """A figure with a lower goal."""
    return Figure(figure=figure, value=value, unit=unit, goal=f">= {least:g}", holds=value >= least)


def distribution(figure: str, samples: Sequence[float], unit: str, at_most: float | None = None, *, applies: bool = True) -> Figure:
    """The median of many samples. applies: False where the goal is for other conditions: then it may hold, and cannot fail."""
    middle = statistics.median(samples)
    holds = None if at_most is None else True if middle <= at_most else False if applies else None
    return Figure(
        figure=figure,
        value=middle,
        unit=unit,
        goal="" if at_most is None else f"<= {at_most:g}",
        holds=holds,
        n=len(samples),
        p50=middle,
        p99=percentile(samples, 0.99),
    )


def number(value: float) -> str:
    """Three digits, and whole numbers whole."""
    if value == int(value):
        return str(int(value))
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _row(cells: Sequence[str]) -> str:
    padded = [cell.rjust(width) if name == "value" else cell.ljust(width) for cell, (name, width) in zip(cells, _COLUMNS, strict=True)]
    return " ".join(padded).rstrip()


def table(report: Report) -> str:
    """80 columns; a distribution has its spread on a second line."""
    words = {True: "yes", False: "NO", None: ""}
    lines = [*textwrap.wrap(report.header, WIDTH), "", _row([name for name, _ in _COLUMNS]), "-" * (WIDTH - 1)]
    for each in report.figures:
        *above, last = textwrap.wrap(each.figure, _COLUMNS[0][1])
        lines += above
        lines.append(_row([last, number(each.value), each.unit, each.goal, words[each.holds]]))
        if each.n is not None and each.p50 is not None and each.p99 is not None:
            lines.append(f"  n {each.n}, p50 {number(each.p50)}, p99 {number(each.p99)} {each.unit}")
    for note in report.notes:
        lines += ["", *textwrap.wrap(note, WIDTH)]
    return "\n".join(lines) + "\n"


def as_json(report: Report) -> str:
    """A list of objects: figure, value, unit, goal (null: none), holds (null: no goal, or it does not apply), and n, p50, p99 of distributions."""
    return json.dumps([_object(figure) for figure in report.figures], indent=1) + "\n"


def _object(figure: Figure) -> dict[str, Any]:
    found: dict[str, Any] = {
        "figure": figure.figure,
        "value": figure.value,
        "unit": figure.unit,
        "goal": figure.goal or None,
        "holds": figure.holds,
    }
    if figure.n is not None:
        found |= {"n": figure.n, "p50": figure.p50, "p99": figure.p99}
    return found
