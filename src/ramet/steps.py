"""What a long job is doing, for people: on a terminal a bar that moves and then a line that stays; elsewhere plain lines, one for each thing begun or done."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from enum import StrEnum

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

_TITLE = 14  # columns
_QUICK = 0.05  # seconds below which nobody wants to know


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
    return f"{value:.1f} s" if value < 60 else f"{value // 60:.0f} min {value % 60:.0f} s"


class Step:
    """One thing that is being done."""

    def __init__(self, console: Console, title: str) -> None:
        self._console = console
        self._title = title
        self._began = time.monotonic()
        self._said = ("", -1)
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self.ended = False
        if console.is_terminal:
            columns = (SpinnerColumn(), TextColumn("{task.fields[title]}"), BarColumn(bar_width=24), TextColumn("{task.description}"), TimeElapsedColumn())
            self._bar = Progress(*columns, console=console, transient=True)
            self._task = self._bar.add_task("", total=None, title=title.ljust(_TITLE))
            self._bar.start()

    @property
    def took(self) -> float:
        return time.monotonic() - self._began

    def progress(self, text: str, fraction: float | None = None) -> None:
        """What is being done now, and how much of it is done (0 to 1, None: unknown)."""
        if self._bar:
            total = None if fraction is None else 1.0
            self._bar.update(self._task, description=escape(text[:32]), total=total, completed=fraction or 0.0)
            return
        quarter = int((fraction or 0.0) * 4)
        if (text, quarter) != self._said:
            self._said = (text, quarter)
            percent = f" {fraction:.0%}" if fraction else ""
            self._console.print(f"   {self._title}: {text}{percent}", markup=False, highlight=False, soft_wrap=True)

    def end(self, mark: Mark, detail: str) -> None:
        """The line that stays; further lines of the detail go below it."""
        self.close()
        self.ended = True
        sign, colour = _SIGNS[mark]
        first, *rest = detail.splitlines() or [""]
        took = f"  [dim]{seconds(self.took)}[/]" if self.took >= _QUICK else ""
        self._console.print(f"[{colour}]{sign}[/] [bold]{self._title.ljust(_TITLE)}[/] {escape(first)}{took}", highlight=False, soft_wrap=True)
        for line in rest:
            self._console.print(" " * (_TITLE + 3) + line, markup=False, highlight=False, soft_wrap=True)

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
        for line in text.splitlines():
            self.console.print(" " * (_TITLE + 3) + line, style="yellow", markup=False, highlight=False, soft_wrap=True)
