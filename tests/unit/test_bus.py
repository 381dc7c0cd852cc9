"""Events to listeners: each its own, all of them, in order; a slow one is told that it lost some."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from ramet.bus import Bus
from ramet.errors import DaemonError
from ramet.model import Event, State


def event(number: int, machine: str = "web") -> Event:
    return Event(at=float(number), kind="state", machine=machine, state=State.RUNNING)


def listeners(bus: Bus) -> list[object]:
    return [each for each in bus._subscriptions if not each._closed]


async def take(events: object, count: int) -> list[float]:
    return [(await asyncio.wait_for(anext(events), 60)).at for _ in range(count)]  # type: ignore[call-overload]


async def test_listeners_hear_what_comes_after_them_in_order() -> None:
    bus = Bus()
    bus.publish(event(0))
    everything, one = bus.subscribe(""), bus.subscribe("web")
    for number in range(1, 5):
        bus.publish(event(number, "web" if number % 2 else "other"))
    assert await take(everything, 4) == [1, 2, 3, 4]
    assert await take(one, 2) == [1, 3]
    for each in (everything, one):
        await each.aclose()  # type: ignore[attr-defined]
    assert not listeners(bus)


async def test_a_listener_that_waits_is_woken() -> None:
    bus = Bus()
    events = bus.subscribe("")
    waiting = asyncio.ensure_future(take(events, 1))
    await asyncio.sleep(0)
    bus.publish(event(1))
    assert await waiting == [1]
    await events.aclose()  # type: ignore[attr-defined]


async def test_a_slow_listener_is_cut_off_and_harms_nobody() -> None:
    bus = Bus()
    slow, quick = bus.subscribe(""), bus.subscribe("")
    heard = 0
    for number in range(1500):
        bus.publish(event(number))
        heard += len(await take(quick, 1))
    assert heard == 1500
    got = 0
    with pytest.raises(DaemonError, match="events were lost"):
        while True:
            got += len(await take(slow, 1))
    assert got == 1000
    with contextlib.suppress(StopAsyncIteration):
        await quick.aclose()  # type: ignore[attr-defined]
    assert not listeners(bus)


async def test_a_cancelled_listener_is_forgotten() -> None:
    bus = Bus()
    events = bus.subscribe("")
    listening = asyncio.ensure_future(take(events, 1))
    await asyncio.sleep(0)
    listening.cancel()
    await asyncio.wait({listening})
    await events.aclose()  # type: ignore[attr-defined]
    assert not listeners(bus)


async def test_a_listener_that_never_began_is_forgotten_too() -> None:
    bus = Bus()
    events = bus.subscribe("")
    bus.publish(event(1))
    del events
    assert not listeners(bus)
