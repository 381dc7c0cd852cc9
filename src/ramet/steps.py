"""What a long job is doing, for people: on a terminal a bar that moves and then a line that stays; elsewhere plain lines, one for each thing begun or done."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from enum import StrEnum

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

_TITLE = 14  # columns
_QUICK = 0.05  # seconds below which nobody wants to know
_SLOW = 1.0  # seconds after which a log tells what is being done


class Mark(StrEnum):
    """How a step ended."""

    OK = "ok"
    LIMITED = "limited"
    BACKGROUND = "background"
    MISSING = "missing"


_SIGNS = {Mark.OK: ("✓", "green"), Mark.LIMITED: ("!", "yellow"), Mark.BACKGROUND: ("…", "cyan"), Mark.MISSING: ("✗", "red")}


def seconds(value: float) -> str:
    """A duration in few characters: `80 ms`, `2.4 s`, `3 min 20 s`."""
    if value < 1:
        return f"{value * 1000:.0f} ms"
    if value < 59.95:
        return f"{value:.1f} s"
    return f"{round(value) // 60} min {round(value) % 60} s"


def hang(console: Console, head: str, width: int, text: str) -> None:
    """Print a head of `width` columns and beside it a text, its lines below one another. Only a terminal has lines wrapped: elsewhere they are searched.

    Both are rich's markup."""
    if not console.is_terminal:
        first, *rest = text.split("\n")
        lines = [(head or " " * width) + first, *(" " * width + line for line in rest)]
        console.print("\n".join(lines), highlight=False, soft_wrap=True)
        return
    grid = Table.grid(padding=0)
    grid.add_column(width=width, no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row(head, text)
    console.print(grid, highlight=False)


class Step:
    """One thing that is being done."""

    def __init__(self, console: Console, title: str) -> None:
        self._console = console
        self._title = title
        self._began = time.monotonic()
        self._said = ("", -1)
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._ended = False

    @property
    def took(self) -> float:
        return time.monotonic() - self._began

    def progress(self, text: str, fraction: float | None = None) -> None:
        """What is being done now, and how much of it is done (0 to 1, None: unknown)."""
        if self._console.is_terminal:
            self._move(text, fraction)
            return
        quarter = int((fraction or 0.0) * 4)
        if (text, quarter) != self._said and self.took >= _SLOW:
            self._said = (text, quarter)
            percent = f" {fraction:.0%}" if fraction else ""
            self._console.print(f"   {self._title}: {text}{percent}", markup=False, highlight=False, soft_wrap=True)

    def _move(self, text: str, fraction: float | None) -> None:
        """The bar; begun when there is something to say, for most steps are over at once."""
        if not self._bar:
            self._bar = Progress(
                SpinnerColumn(),
                TextColumn("{task.fields[title]}"),
                BarColumn(bar_width=20),
                TextColumn("{task.description}"),
                TimeElapsedColumn(),
                console=self._console,
                transient=True,
            )
            self._task = self._bar.add_task("", total=None, title=self._title.ljust(_TITLE))
            self._bar.start()
        self._bar.update(self._task, description=escape(text[:30]), total=None if fraction is None else 1.0, completed=fraction or 0.0)

    def end(self, mark: Mark, detail: str) -> None:
        """The line that stays; further lines of the detail go below it. Only the first call counts."""
        self.close()
        if self._ended:
            return
        self._ended = True
        sign, colour = _SIGNS[mark]
        took = f"  [dim]{seconds(self.took)}[/]" if self.took >= _QUICK else ""
        first, *rest = detail.splitlines() or [""]
        text = "\n".join([escape(first) + took, *map(escape, rest)])
        hang(self._console, f"[{colour}]{sign}[/] [bold]{self._title.ljust(_TITLE)}[/] ", _TITLE + 3, text)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar:
            self._bar.stop()
            self._bar = None


class Steps:
    """A list of steps on a console."""

    def __init__(self, console: Console) -> None:
        self.console = console

    @contextlib.contextmanager
    def step(self, title: str) -> Iterator[Step]:
        """Do a step in the body, which calls its `end`; the bar goes away however the body ends."""
        step = Step(self.console, title)
        try:
            yield step
        finally:
            step.close()

    def note(self, text: str) -> None:
        """What to do about the step that has just ended."""
        hang(self.console, "", _TITLE + 3, f"[yellow]{escape(text)}[/]")
