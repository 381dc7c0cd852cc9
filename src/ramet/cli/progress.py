"""Live progress: a bar on a terminal, a line for each new step elsewhere. rich is imported only when a bar is shown."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import termios
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

from ramet.cli import text
from ramet.errors import RametError
from ramet.model import Activity, State

if TYPE_CHECKING:
    from ramet.verbs import Verbs

T = TypeVar("T")
STANDING = 1.0  # seconds of a command after which somebody may wonder
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

    async with _beside(follow()):
        yield


@contextlib.asynccontextmanager
async def standing(verbs: Verbs, name: str) -> AsyncIterator[None]:
    """Say when the machine that the body works with stands still, and why: else a command in it only seems to hang. What is over soon costs nothing."""

    async def follow() -> None:
        await asyncio.sleep(STANDING)
        with contextlib.suppress(RametError):
            now = await verbs.get(name)
            told = _stands(name, "", now.state, now.reason)
            async for event in verbs.events(name):
                if event.state:
                    told = _stands(name, told, event.state, event.reason)

    async with _beside(follow()):
        yield


def _stands(name: str, told: str, state: State, reason: str) -> str:
    """What is said of it, where that is something else than was told before."""
    now = text.clean(reason) or "it is paused" if state is State.PAUSED else ""
    if now != told:
        _apart(f"{name}: {now or 'it goes on'}")
    return now


def _apart(line: str) -> None:
    """A line on stderr, also while our terminal is raw."""
    raw = False
    with contextlib.suppress(termios.error):
        raw = not termios.tcgetattr(sys.stderr)[1] & termios.OPOST
    text.note(f"\r\n{line}\r" if raw else line)


@contextlib.asynccontextmanager
async def _beside(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Something is done while the body is."""
    task = asyncio.create_task(work)
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
