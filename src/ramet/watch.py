"""Work that is watched or waited for: progress of programs that do not tell, by what they have written; threads that must come to their end."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
Progress = Callable[[str, float | None], None]  # what is being done, and how much of it (0 to 1, None: cannot be known)
PERIOD = 0.5  # seconds between two looks


async def uncut(work: Callable[..., T], *arguments: Any) -> T:
    """Do it in a thread; a caller who is cancelled waits for its end, for what it made must be removed."""
    task = asyncio.ensure_future(asyncio.to_thread(work, *arguments))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        if not task.cancelled():
            task.exception()
        raise


async def watched(work: Coroutine[Any, Any, T], look: Callable[[], None]) -> T:
    """Do the work and call `look` now and then meanwhile; what it raises ends the work."""
    task = asyncio.ensure_future(work)
    try:
        while not (await asyncio.wait({task}, timeout=PERIOD))[0]:
            look()
        return task.result()
    finally:
        if not task.done():
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


def allocated(path: Path) -> int:
    """Bytes of disk that a file takes; 0 while there is none."""
    try:
        return path.stat().st_blocks * 512
    except FileNotFoundError:
        return 0


def written(root: Path) -> int:
    """Bytes in the files below a directory in which a program is writing and renaming."""
    total = 0
    for directory, _, names in os.walk(root):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.lstat(os.path.join(directory, name)).st_size  # noqa: PTH118  (a Path for each file would be most of the cost)
    return total
