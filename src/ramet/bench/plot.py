"""What machines cost the host over time, as CSV and as a picture. Only `draw` needs matplotlib, which is in the dependency group `bench`."""

from __future__ import annotations

import csv
import io
import itertools
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from ramet.errors import HostError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MISSING = "pictures are drawn with matplotlib, which is not installed"
HINT = "From a checkout `./ramet bench giveback` installs it by itself; elsewhere: pip install matplotlib"
_MIB = 1 << 20
# Blue, vermilion and green of Okabe and Ito, "Color Universal Design" (2008): told apart with every kind of colour blindness, and by their dashes in grey.
LINES: tuple[tuple[str, Any], ...] = (("#D55E00", "-"), ("#0072B2", (0, (6, 1.5))), ("#009E73", (0, (2, 1))))
_SHADES = ("#ffffff", "#eef1f5")
_INK = "#333333"
_SIZE = (8.4, 5.2)  # inches: at 100 dots each the width of a README; its text is then as large as the README's
_DOTS = 200


@dataclass(frozen=True, kw_only=True)
class Point:
    """One look at one machine. seconds: from the begin of its run; memory: PSS of QEMU; disk: blocks of its own overlay, both in bytes."""

    seconds: float
    machine: str
    memory: int
    disk: int
    phase: str


def as_csv(points: Sequence[Point]) -> str:
    """A line each, under the names of the columns."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(field.name for field in fields(Point))
    for point in points:
        writer.writerow((asdict(point) | {"seconds": f"{point.seconds:.2f}"}).values())
    return text.getvalue()


def parse(text: str) -> list[Point]:
    """What `as_csv` wrote. ValueError, KeyError: it did not."""
    return [
        Point(
            seconds=float(row["seconds"]),
            machine=row["machine"],
            memory=int(row["memory"]),
            disk=int(row["disk"]),
            phase=row["phase"],
        )
        for row in csv.DictReader(io.StringIO(text))
    ]


def phases(points: Sequence[Point]) -> list[tuple[str, float, float]]:
    """Name, begin and end of each stretch of one machine's points."""
    found: list[tuple[str, float, float]] = []
    for name, stretch in itertools.groupby(points, key=lambda point: point.phase):
        times = [point.seconds for point in stretch]
        if found:  # it ends where the next one begins: no gap between the shades
            found[-1] = (*found[-1][:2], times[0])
        found.append((name, times[0], times[-1]))
    return found


def machines(points: Sequence[Point]) -> dict[str, list[Point]]:
    """The points of each, in the order in which they came."""
    found: dict[str, list[Point]] = {}
    for point in points:
        found.setdefault(point.machine, []).append(point)
    return found


def aligned(runs: dict[str, list[Point]]) -> dict[str, list[Point]]:
    """The runs with each phase beginning at the same second in all of them: a phase is as long as the longest. They have the same phases."""
    stretches = {name: phases(points) for name, points in runs.items()}
    begins = [0.0]
    for same in zip(*stretches.values(), strict=True):
        begins.append(begins[-1] + max(end - begin for _, begin, end in same))
    found: dict[str, list[Point]] = {}
    for name, points in runs.items():
        grouped = (list(stretch) for _, stretch in itertools.groupby(points, key=lambda point: point.phase))
        shifted = zip(begins, grouped, strict=False)
        found[name] = [replace(point, seconds=begin + point.seconds - own[0].seconds) for begin, own in shifted for point in own]
    return found


def longest(runs: dict[str, list[Point]]) -> list[tuple[str, float, float]]:
    """The phases of runs that were aligned: to where the longest of each ends."""
    return [(same[0][0], same[0][1], max(end for _, _, end in same)) for same in zip(*map(phases, runs.values()), strict=True)]


def check() -> None:
    """HostError where no picture can be drawn; ask before measuring for minutes."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise HostError(MISSING, hint=HINT) from None


def draw(points: Sequence[Point], title: str) -> dict[str, bytes]:
    """The picture as files: by ending, `svg` and `png`. An opaque, bright ground: it reads the same on a dark page. HostError: no matplotlib."""
    check()
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # No pyplot: it would look for a screen. The salt makes the names in the SVG the same each time.
    with matplotlib.rc_context(
        {"svg.hashsalt": "ramet", "font.size": 10, "text.color": _INK, "axes.labelcolor": _INK, "axes.edgecolor": "#999999"}
    ):
        figure = Figure(figsize=_SIZE, facecolor="#ffffff", layout="constrained")
        FigureCanvasAgg(figure)
        memory, disk = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1.2))
        runs = aligned(machines(points))
        _panel(memory, runs, "memory")
        _panel(disk, runs, "disk")
        _words(memory, disk, runs, title)
        return {"svg": _svg(figure), "png": _file(figure, "png")}


def _panel(axes: Axes, runs: dict[str, list[Point]], what: str) -> None:
    for number, (_, begin, end) in enumerate(longest(runs)):
        axes.axvspan(begin, end, color=_SHADES[number % 2], zorder=0, linewidth=0)
    for (name, points), (color, dashes) in zip(runs.items(), itertools.cycle(LINES)):
        heights = [getattr(point, what) / _MIB for point in points]
        axes.plot([point.seconds for point in points], heights, label=name, color=color, linestyle=dashes, linewidth=2)
    axes.set_ylabel(f"{what}, MiB")
    axes.set_ylim(bottom=0)
    axes.margins(x=0)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.tick_params(colors=_INK)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _words(memory: Axes, disk: Axes, runs: dict[str, list[Point]], title: str) -> None:
    memory.set_title(title, loc="left", fontsize=11, pad=22)
    top = memory.get_xaxis_transform()
    for name, begin, end in longest(runs):
        memory.text((begin + end) / 2, 1.02, name, transform=top, ha="center", va="bottom", fontsize=9)
    memory.set_ylim(top=memory.get_ylim()[1] * 1.3)  # room for the legend above the curves
    memory.legend(loc="upper left", fontsize=9, framealpha=0.9, edgecolor="#cccccc")
    disk.set_xlabel("seconds")


def _file(figure: Any, ending: str) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format=ending, dpi=_DOTS, metadata={"Date": None} if ending == "svg" else None)
    return file.getvalue()


def _svg(figure: Any) -> bytes:
    """Without spaces at the ends of its lines: it is kept in repositories."""
    return re.sub(rb"[ \t]+\n", b"\n", _file(figure, "svg"))
