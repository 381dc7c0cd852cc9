"""What happens, told to whoever listens. A listener that does not keep up is cut off rather than waited for or buffered without limit."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from ramet.errors import DaemonError
from ramet.model import Event

_BACKLOG = 1000


class Bus:
    """Publish and subscribe, inside one event loop."""

    def __init__(self) -> None:
        self._queues: dict[asyncio.Queue[Event], str] = {}
        self._lost: set[asyncio.Queue[Event]] = set()

    def publish(self, event: Event) -> None:
        for queue, machine in list(self._queues.items()):
            if machine in ("", event.machine):
                try:
                    queue.put_nowait(event)
                except asyncio.QueueFull:
                    self._lost.add(queue)

    def subscribe(self, machine: str) -> AsyncIterator[Event]:
        """Events from this call on; machine: only this one's, empty: all."""
        queue: asyncio.Queue[Event] = asyncio.Queue(_BACKLOG)
        self._queues[queue] = machine
        return self._iterate(queue)

    async def _iterate(self, queue: asyncio.Queue[Event]) -> AsyncIterator[Event]:
        try:
            while True:
                yield await queue.get()
                if queue in self._lost and queue.empty():
                    raise DaemonError(
                        "events were lost: this listener was too slow", hint="Subscribe again, and read `ramet list` for what was missed."
                    )
        finally:
            self._queues.pop(queue, None)
            self._lost.discard(queue)
