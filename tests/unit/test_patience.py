"""Deadlines that stand still."""

from __future__ import annotations

import asyncio

import pytest

from ramet.patience import Patience


async def test_a_deadline_passes_when_nothing_holds_it() -> None:
    with pytest.raises(TimeoutError):
        async with Patience().limit(0.02):
            await asyncio.sleep(10)


async def test_a_hold_stops_deadlines_that_run_and_those_that_begin() -> None:
    patience = Patience()

    def left() -> list[float | None]:
        now = asyncio.get_running_loop().time()
        return [None if (when := limit.when()) is None else when - now for limit in patience._limits]

    async with patience.limit(100):
        await asyncio.sleep(0.05)
        patience.hold()
        async with patience.limit(50):
            assert left() == [None, None]
            await asyncio.sleep(0.05)
            assert patience.release()
            first, second = left()
            assert first and second
            assert 50 < first <= 99.95  # what it had waited is not given back
            assert 49.95 < second <= 50
    assert left() == []


async def test_a_deadline_passes_after_the_hold() -> None:
    patience = Patience()
    patience.hold()
    began = asyncio.get_running_loop().time()
    asyncio.get_running_loop().call_later(0.2, patience.release)
    with pytest.raises(TimeoutError):
        async with patience.limit(0.1):
            await asyncio.sleep(10)
    assert asyncio.get_running_loop().time() - began >= 0.29


async def test_holds_nest() -> None:
    patience = Patience()
    patience.hold()
    patience.hold()
    assert not patience.release()
    assert patience.held
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(patience.running(), 0.02)
    assert patience.release()
    await patience.running()


async def test_the_end_lets_everybody_go() -> None:
    patience = Patience()
    patience.hold()
    waiting = asyncio.ensure_future(patience.running())
    await asyncio.sleep(0)
    patience.end()
    await asyncio.wait_for(waiting, 1)
