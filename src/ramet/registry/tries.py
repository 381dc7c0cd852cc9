"""How often something is asked for again."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from ramet.errors import HostError

FIRST, LONGEST = 0.5, 10.0  # seconds between two tries
T = TypeVar("T")


class Tries:
    """The tries of one thing: none begins later than `deadline` seconds after the first, or after the last that got somewhere."""

    def __init__(
        self, deadline: float, *, now: Callable[[], float] = time.monotonic, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    ) -> None:
        self._deadline, self._now, self._sleep = deadline, now, sleep
        self._since, self._pause = now(), FIRST

    def moved(self) -> None:
        """It got somewhere."""
        self._since, self._pause = self._now(), FIRST

    async def wait(self, error: HostError) -> None:
        """Until the next try; raises the error when there is none. What is wrong with this host and not with the line is not tried again."""
        asked = error.details.get("retry_after")
        if not isinstance(asked, int | float):
            raise error
        pause = max(asked, self._pause * random.uniform(0.5, 1.0))
        if self._now() + pause > self._since + self._deadline:
            raise error
        await self._sleep(pause)
        self._pause = min(2 * self._pause, LONGEST)


async def tried(deadline: float, attempt: Callable[[], Awaitable[T]]) -> T:
    """Do something again while it fails in a way that may pass."""
    tries = Tries(deadline)
    while True:
        try:
            return await attempt()
        except HostError as error:
            await tries.wait(error)
