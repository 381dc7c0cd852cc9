"""Deadlines that stand still while the machine that they wait for does."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator


class Patience:
    """Time as a guest has it: `hold` stops it, `release` lets it go on; both nest. Deadlines are its seconds."""

    def __init__(self) -> None:
        self._depth = 0
        self._running = asyncio.Event()
        self._running.set()
        self._limits: dict[asyncio.Timeout, float] = {}  # seconds that are left; while held only

    @property
    def held(self) -> bool:
        return self._depth > 0

    async def running(self) -> None:
        """Wait until it is not held."""
        await self._running.wait()

    def hold(self) -> None:
        self._depth += 1
        if self._depth > 1:
            return
        self._running.clear()
        now = asyncio.get_running_loop().time()
        for limit in self._limits:
            when = limit.when()
            if when is not None and not limit.expired():
                self._limits[limit] = when - now
                limit.reschedule(None)

    def release(self) -> bool:
        """Whether it runs again: the last hold was taken back."""
        self._depth -= 1
        assert self._depth >= 0
        if self._depth:
            return False
        self._running.set()
        now = asyncio.get_running_loop().time()
        for limit, left in self._limits.items():
            if limit.when() is None:
                limit.reschedule(now + left)
        return True

    def end(self) -> None:
        """Whoever waits for `running` waits no longer: there is nothing to wait for."""
        self._running.set()

    @contextlib.asynccontextmanager
    async def limit(self, seconds: float) -> AsyncGenerator[None, None]:
        """As asyncio.timeout, in this time."""
        async with asyncio.timeout(None if self.held else seconds) as limit:
            self._limits[limit] = seconds
            try:
                yield
            finally:
                del self._limits[limit]
