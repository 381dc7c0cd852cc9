"""What happens, told to whoever listens. A listener that does not keep up is cut off rather than waited for or buffered without limit."""

from __future__ import annotations

import asyncio
import time
import weakref
from collections.abc import AsyncIterator, Callable

from ramet.errors import DaemonError
from ramet.model import Activity, Event

_BACKLOG = 1000


class _Subscription(AsyncIterator[Event]):
    """One listener's events. A class and not a generator: one that never began would never be told that it ended."""

    def __init__(self, machine: str) -> None:
        self._machine = machine
        self._queue: asyncio.Queue[Event] = asyncio.Queue(_BACKLOG)
        self._lost = False
        self._closed = False

    def offer(self, event: Event) -> None:
        if self._machine in ("", event.machine) and not self._closed:
            try:
                self._queue.put_nowait(event)
            except asyncio.QueueFull:
                self._lost = True

    async def __anext__(self) -> Event:
        if self._closed:
            raise StopAsyncIteration
        if self._lost and self._queue.empty():
            await self.aclose()
            raise DaemonError(
                "events were lost: this listener was too slow", hint="Subscribe again, and read `ramet list` for what was missed."
            )
        return await self._queue.get()

    async def aclose(self) -> None:
        self._closed = True


class Bus:
    """Publish and subscribe, inside one event loop."""

    def __init__(self) -> None:
        self._subscriptions: weakref.WeakSet[_Subscription] = weakref.WeakSet()  # a listener that is gone is forgotten

    def publish(self, event: Event) -> None:
        for subscription in list(self._subscriptions):
            subscription.offer(event)

    def teller(self, verb: str, name: str) -> Callable[[str, float | None], None]:
        """A function that tells what is being done to what is no machine; small steps of a long way are not worth an event each."""
        told = Activity(verb=verb, step="")

        def say(step: str, fraction: float | None = None) -> None:
            nonlocal told
            now = Activity(verb=verb, step=step, fraction=fraction)
            if now.goes_on_from(told):
                return
            told = now
            self.publish(Event(at=time.time(), kind="activity", machine=name, activity=now))

        return say

    def subscribe(self, machine: str) -> AsyncIterator[Event]:
        """Events from this call on; machine: only this one's, empty: all."""
        subscription = _Subscription(machine)
        self._subscriptions.add(subscription)
        return subscription
