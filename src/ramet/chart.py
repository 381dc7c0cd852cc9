"""What the tour draws: numbers beside one another, durations as bars. Pure; lines of at most WIDTH columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ramet.steps import seconds

WIDTH = 63  # columns that a terminal of 80 has beside a step's title
_BAR = 16  # columns of the longest bar
_EIGHTHS = " ▏▎▍▌▋▊▉"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table, two spaces between its columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def bars(times: Mapping[str, float]) -> list[str]:
    """A line for each duration (seconds): a bar, and how many times shorter it is than the first, which is the longest by its nature."""
    first = next(iter(times.values()), 0.0)
    longest = max(times.values(), default=0.0)
    return aligned([(title, seconds(took).rjust(6), _bar(took, longest), _ratio(first, took)) for title, took in times.items()])


def _bar(took: float, longest: float) -> str:
    eighths = max(1, round(_BAR * 8 * took / max(longest, 1e-9)))
    return ("█" * (eighths // 8) + _EIGHTHS[eighths % 8]).rstrip().ljust(_BAR)


def _ratio(first: float, took: float) -> str:
    times = first / max(took, 1e-9)
    return "" if took == first else f"1/{times:.1f}" if times < 10 else f"1/{times:.0f}"


def ordinal(number: int) -> str:
    """`1st`, `22nd`, `113th`."""
    end = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{end}"
