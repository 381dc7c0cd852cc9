"""Live progress: a bar on a terminal, a line for each new step elsewhere. rich is imported only when a bar is shown."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

from ramet.cli import text
from ramet.errors import RametError
from ramet.model import Activity

if TYPE_CHECKING:
    from ramet.verbs import Verbs

T = TypeVar("T")
PATIENCE = 0.3  # seconds before a copy shows a bar: most are over by then

Show = Callable[[str, float | None], None]


@contextlib.contextmanager
def _bar(*columns: Any) -> Any:
    from rich.console import Console
    from rich.progress import Progress

    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        yield bar


@contextlib.asynccontextmanager
async def steps(verbs: Verbs, name: str) -> AsyncIterator[None]:
    """Show what the daemon does to a machine, while the body waits for it."""
    if sys.stderr.isatty():
        from rich.progress import BarColumn, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn

        columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=24), TaskProgressColumn(), TimeElapsedColumn()
        with _bar(*columns) as bar:
            task = bar.add_task(name, total=None)

            def show(step: str, fraction: float | None) -> None:
                bar.update(task, description=f"{name}: {step}", total=None if fraction is None else 1.0, completed=fraction or 0.0)

            async with _following(verbs, name, show):
                yield
    else:
        async with _following(verbs, name, _lines(name)):
            yield


def _lines(name: str) -> Show:
    last = ""

    def show(step: str, fraction: float | None) -> None:
        nonlocal last
        if step != last:
            last = step
            text.note(f"{name}: {step}")

    return show


@contextlib.asynccontextmanager
async def _following(verbs: Verbs, name: str, show: Show) -> AsyncIterator[None]:
    """Call `show` for each activity of a machine. Progress is a courtesy: that it fails must not fail the work."""

    async def follow() -> None:
        with contextlib.suppress(RametError):
            async for event in verbs.events(name):
                if isinstance(event.activity, Activity):
                    show(text.clean(event.activity.step), event.activity.fraction)

    task = asyncio.create_task(follow())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def copying(title: str, work: Callable[[Callable[[int, int | None], None]], Coroutine[Any, Any, T]]) -> T:
    """Run a copy, which reports bytes done and in all; a bar appears on a terminal when it takes longer than a moment."""
    done, total = 0, None

    def moved(now: int, whole: int | None) -> None:
        nonlocal done, total
        done, total = now, whole

    task = asyncio.ensure_future(work(moved))
    try:
        await asyncio.wait({task}, timeout=PATIENCE)
        if not task.done() and sys.stderr.isatty():
            from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn

            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                DownloadColumn(),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
            )
            with _bar(*columns) as bar:
                shown = bar.add_task(title, total=total)
                while not task.done():
                    await asyncio.wait({task}, timeout=0.1)
                    bar.update(shown, completed=done, total=total)
        return await task
    finally:
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
