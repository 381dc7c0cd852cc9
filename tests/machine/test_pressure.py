"""A host that runs low on memory, as a file says that it does, and real machines: who gives back, who stands still, who is put to sleep, who is left alone."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from ramet import capacity
from ramet.caretaker import Caretaker
from ramet.engine import Engine
from ramet.model import Command, Result, State
from ramet.paths import StateDir
from ramet.pressure import HostSample, Limits
from tests.fixtures import Artifacts, Box, States, opened
from tests.machine.doomed import parked

DEADLINE = 240.0
# As the product's, in tenths of the time; an emulated guest on a busy host may use what it likes of a processor.
QUICK = Limits(idle=2.0, patience=1.5, again=5.0, working=2.0)
FULL, LOW, ENOUGH = 100, 5, 50
EIGHTY = "dd if=/dev/zero of=/srv/cold bs=1M count=80 2>/dev/null; sync; cat /srv/cold > /dev/null"


class Gauge:
    """The host, as a file says it is. looks: how often it was looked at."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.looks = 0
        self.show(ENOUGH)

    def show(self, available: int) -> None:
        self._path.write_text(str(available))

    def __call__(self) -> HostSample:
        self.looks += 1
        return HostSample(at=time.monotonic(), total=FULL, available=int(self._path.read_text()))

    async def pass_by(self, looks: int) -> None:
        """Let so many looks go by."""
        until = self.looks + looks
        async with asyncio.timeout(DEADLINE):
            while self.looks < until:  # noqa: ASYNC110
                await asyncio.sleep(0.05)


@pytest.fixture
def gauge(tmp_path: Path) -> Gauge:
    return Gauge(tmp_path / "available")


@pytest.fixture
def place(states: States) -> StateDir:
    return states.new()


@pytest_asyncio.fixture(loop_scope="session")
async def watched(place: StateDir, gauge: Gauge) -> AsyncIterator[Engine]:
    """An engine whose host is the gauge's."""
    async with opened(place) as engine, Caretaker(engine._ops, engine._forks, sample=gauge, limits=QUICK, every=0.4).working():
        yield engine


@contextlib.asynccontextmanager
async def used(box: Box) -> AsyncIterator[asyncio.Task[Result]]:
    """A command is under way in it, and does nothing."""
    running = asyncio.create_task(box.engine.run(box.name, Command(argv=("sleep", "100000"))))
    try:
        yield running
    finally:
        running.cancel()
        await asyncio.wait({running})


async def told(engine: Engine, name: str, wanted: State) -> list[State]:
    """The states that it goes through, up to one."""
    seen: list[State] = []
    async with asyncio.timeout(DEADLINE):
        async for event in engine.events(name):
            if event.state and (not seen or seen[-1] is not event.state):
                seen.append(event.state)
            if event.state is wanted:
                return seen
    raise AssertionError


async def cached(box: Box) -> int:
    """Kilobytes of the guest's page cache."""
    return int(await box.text("awk '/^Cached/ {print $2}' /proc/meminfo"))


async def test_the_ladder(watched: Engine, gauge: Gauge, artifacts: Artifacts) -> None:
    boxes = {}
    for name in ("idle", "busy"):
        await watched.create(artifacts.spec(name))
        boxes[name] = Box(watched, name)
        await boxes[name].sh(EIGHTY)
    async with used(boxes["busy"]) as running:
        full = await cached(boxes["busy"])
        await gauge.pass_by(12)  # longer than it takes to be idle
        assert {each.state for each in await watched.list()} == {State.RUNNING}, "nothing is done to a host that has room"
        going = asyncio.create_task(told(watched, "idle", State.HIBERNATED))
        await asyncio.sleep(0)
        gauge.show(LOW)
        seen = await going
        assert [each for each in seen if each is not State.RUNNING] == [State.PAUSED, State.HIBERNATING, State.HIBERNATED]
        async with asyncio.timeout(DEADLINE):
            while (slept := await watched.get("idle")).activity or not slept.reason:  # noqa: ASYNC110  (the last lines of the operation)
                await asyncio.sleep(0.05)
        assert slept.reason.startswith("hibernated, for the host ran low on memory")
        async with asyncio.timeout(DEADLINE):
            while await cached(boxes["busy"]) > full - 20_000:  # noqa: ASYNC110  (a guest in use gives back what it does not need)
                await asyncio.sleep(0.2)
        await gauge.pass_by(12)
        busy = await watched.get("busy")
        assert (busy.state, busy.reason) == (State.RUNNING, ""), "never a machine in use"
        assert not running.done()
        gauge.show(ENOUGH)
        await gauge.pass_by(3)
        assert (await watched.get("idle")).state is State.HIBERNATED, "nobody is woken"
        awake = await watched.resume("idle")
        assert (awake.state, awake.reason) == (State.RUNNING, "")
        assert await boxes["idle"].text("hostname; wc -c < /srv/cold") == f"idle\n{80 << 20}"


async def test_a_paused_one_says_why_and_goes_on_when_it_is_told(watched: Engine, gauge: Gauge, artifacts: Artifacts) -> None:
    await watched.create(artifacts.spec("idle"))
    paused = asyncio.create_task(told(watched, "idle", State.PAUSED))
    await asyncio.sleep(0)
    gauge.show(LOW)
    await paused
    gauge.show(ENOUGH)
    await gauge.pass_by(8)
    found = await watched.get("idle")
    assert found.state is State.PAUSED
    assert found.reason.startswith("paused, for the host ran low on memory")
    gone_on = await watched.resume("idle")
    assert (gone_on.state, gone_on.reason) == (State.RUNNING, "")
    assert await Box(watched, "idle").text("hostname") == "idle"


async def test_a_guest_that_hangs_keeps_nobody_up(watched: Engine, gauge: Gauge, artifacts: Artifacts) -> None:
    """It answers nothing, and so it cannot be paused either."""
    for name in ("hung", "idle"):
        await watched.create(artifacts.spec(name))
    entry = watched._entry("hung")
    assert entry.vm
    await entry.vm.monitor("stop")  # all of the guest stands still, and nobody says so
    going = asyncio.create_task(told(watched, "idle", State.HIBERNATED))
    await asyncio.sleep(0)
    gauge.show(LOW)
    await going
    assert (await watched.get("hung")).state is State.RUNNING
    gauge.show(ENOUGH)
    await entry.vm.monitor("cont")
    assert await Box(watched, "hung").text("hostname", timeout=DEADLINE) == "hung"


async def test_parked_machines_are_ended_and_parked_again(
    watched: Engine, gauge: Gauge, artifacts: Artifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capacity, "RETRY_AFTER", 1.0)
    await watched.create(artifacts.spec("stem"))
    await watched.snapshot("stem", "warm", test=False)
    async with used(Box(watched, "stem")) as running:
        await watched.template("stem@warm", label="spare", pool=2)
        await parked(watched, 2)
        gauge.show(LOW)
        await parked(watched, 0)
        await gauge.pass_by(8)
        assert (await watched.get_snapshot("spare")).pooled == 0, "not before there is room"
        gauge.show(ENOUGH)
        await parked(watched, 2)
        assert (await watched.create_from("spare", "claimed")).state is State.RUNNING
        assert not running.done()
        await watched.template("spare", pool=0)
        await parked(watched, 0)
