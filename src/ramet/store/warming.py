"""What was fetched of memories comes into the host's page cache at once: a fault is answered page by page while some of what lies around it is not here
(see `imagefs`), so a guest would ask for each page of a chunk that it waited for already."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Coroutine, Iterable
from pathlib import Path
from typing import Any

from ramet.paths import StoreDir
from ramet.store.layer import CHUNK


class Warmer:
    """One for a fetcher. start: runs something in the background."""

    def __init__(self, files: StoreDir, start: Callable[[Coroutine[Any, Any, None]], object]) -> None:
        self._files = files
        self._start = start
        self._chunks: dict[str, dict[int, None]] = {}
        self._works = False

    def warm(self, layer: str, chunks: Iterable[int]) -> None:
        """Have chunks of a layer's file, by their numbers, in the page cache soon."""
        self._chunks.setdefault(layer, {}).update(dict.fromkeys(chunks))
        if not self._works:
            self._works = True
            self._start(self._work())

    async def _work(self) -> None:
        try:
            while self._chunks:
                layer = next(iter(self._chunks))
                extents = [(number * CHUNK, CHUNK) for number in sorted(self._chunks.pop(layer))]
                await asyncio.to_thread(ahead, self._files.served(layer), extents, anew=True)
        finally:
            self._works = False


def ahead(path: Path, extents: Iterable[tuple[int, int]], *, anew: bool = False) -> None:
    """Have parts of a file, (offset, length) in bytes, in the page cache soon; returns when the kernel has been asked for them. It is advice: no errors.

    anew: the kernel tried before and got an error. What is left of that is never read ahead again, so it is dropped first; what is in use stays.
    """
    with contextlib.suppress(OSError), path.open("rb") as file:
        for offset, length in extents:
            if anew:
                os.posix_fadvise(file.fileno(), offset, length, os.POSIX_FADV_DONTNEED)
            os.posix_fadvise(file.fileno(), offset, length, os.POSIX_FADV_WILLNEED)
