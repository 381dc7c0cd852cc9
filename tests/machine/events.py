"""Hear what happens to machines while something is done."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from ramet.engine import Engine
from ramet.model import Event, State

DEADLINE = 120.0


@dataclass
class Ear:
    """Everything heard since `listening` began."""

    heard: list[Event] = field(default_factory=list)
    _changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    def states(self, machine: str) -> list[State | str]:
        """The states that a machine went through; `removed` when it is gone."""
        return [event.state or event.kind for event in self.heard if event.machine == machine and event.kind in ("state", "removed")]

    def steps(self, machine: str) -> list[str]:
        """What was being done to it, each step once."""
        return list(dict.fromkeys(event.activity.step for event in self.heard if event.machine == machine and event.activity))

    async def until(self, wanted: Callable[[Event], bool]) -> Event:
        """The first event that is wanted, of those heard and to come."""
        async with asyncio.timeout(DEADLINE), self._changed:
            while not (found := [event for event in self.heard if wanted(event)]):
                await self._changed.wait()
            return found[0]

    async def until_state(self, machine: str, state: State) -> Event:
        return await self.until(lambda event: event.machine == machine and event.state is state)

    async def take(self, event: Event) -> None:
        async with self._changed:
            self.heard.append(event)
            self._changed.notify_all()


@contextlib.asynccontextmanager
async def listening(engine: Engine) -> AsyncIterator[Ear]:
    ear = Ear()
    events = engine.events()

    async def listen() -> None:
        async for event in events:
            await ear.take(event)

    task = asyncio.create_task(listen())
    try:
        yield ear
        await asyncio.sleep(0)  # what was published is in the queue; one turn of the loop brings it here
    finally:
        task.cancel()
        await asyncio.wait({task})
