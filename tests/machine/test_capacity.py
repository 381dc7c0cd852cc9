"""The host's memory as something that runs out: who is refused, who makes room, and machines whose memory is lowered while they run."""

from __future__ import annotations

import asyncio
import contextlib
import os
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from ramet import capacity, reclaiming, service
from ramet.client import Client
from ramet.engine import Engine
from ramet.errors import NoCapacityError, SpecError
from ramet.model import Machine, Reclaim, State
from ramet.paths import StateDir
from ramet.vm import balloon
from tests.fixtures import MEMORY, Artifacts, Box, States, opened, retire

MIB = 1 << 20
DEADLINE = 120.0
ONE = MEMORY + capacity.OVERHEAD


def ratio(machines: float) -> str:
    """With which so many of our machines fit, and no more."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    kept = total - capacity.Room(total=total, available=0, overcommit=1.0).promisable
    return repr((machines * ONE + kept) / total)


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A guest on a busy host takes longer."""
    monkeypatch.setattr(balloon, "DEADLINE", 120.0)
    monkeypatch.setattr(balloon, "_STALLED", 15.0)


@pytest_asyncio.fixture(loop_scope="session")
async def small(states: States, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Engine]:
    """An engine on a host with room for two machines."""
    monkeypatch.setenv("RAMET_OVERCOMMIT", ratio(2.5))
    async with opened(states.new()) as engine:
        yield engine


def private(pid: int) -> int:
    """Bytes that a process shares with nobody."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
    return sum(int(lines[name].split()[0]) << 10 for name in ("Private_Clean", "Private_Dirty"))


async def until(what: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE):
        while not what():  # noqa: ASYNC110  (memory makes no events)
            await asyncio.sleep(0.1)


# who is refused


async def test_two_starts_at_once_do_not_both_slip_through(small: Engine, artifacts: Artifacts) -> None:
    names = ("a", "b", "c", "d")
    ended = await asyncio.gather(*(small.create(artifacts.spec(name)) for name in names), return_exceptions=True)
    refused = [each for each in ended if isinstance(each, NoCapacityError)]
    assert len([each for each in ended if isinstance(each, Machine)]) == 2
    assert len(refused) == 2, ended
    assert refused[0].details["retry_after"] > 0
    assert len(await small.list()) == 2, "who was refused left nothing"
    info = await small.info()
    assert info.memory_committed == 2 * ONE
    assert info.memory_committed <= info.memory_capacity < 3 * ONE


async def test_what_is_at_rest_makes_room_and_finds_none_when_it_comes_back(small: Engine, artifacts: Artifacts) -> None:
    for name in ("a", "b"):
        await small.create(artifacts.spec(name))
    await small.hibernate("a")
    assert (await small.info()).memory_committed == ONE
    await small.create(artifacts.spec("c"))
    with pytest.raises(NoCapacityError):
        await small.resume("a")
    assert (await small.get("a")).state is State.HIBERNATED, "and nothing was lost"
    await small.pause("c")
    with pytest.raises(NoCapacityError):  # it stands still, but holds its memory
        await small.resume("a")
    await small.stop("c")
    await small.resume("a")
    with pytest.raises(NoCapacityError):
        await small.start("c")
    assert (await small.get("c")).state is State.STOPPED
    assert await Box(small, "a").text("hostname") == "a"


async def test_children_are_refused_one_by_one(small: Engine, artifacts: Artifacts) -> None:
    await small.create(artifacts.spec("parent"))
    outcomes = await small.fork("parent", count=3)
    codes = [each.error["code"] if each.error else "" for each in outcomes]
    assert sorted(codes) == ["", "no_capacity", "no_capacity"]
    assert len(await small.list()) == 2
    assert await Box(small, "parent").text("hostname") == "parent"
    [child] = [each.name for each in outcomes if not each.error]
    await small.snapshot("parent", "here", test=False)
    with pytest.raises(NoCapacityError):
        await small.create_from("parent@here", "copy")
    await small.restore("parent", "here")  # it has its memory
    await small.delete(child)
    await small.create_from("parent@here", "copy")


async def test_a_pool_is_filled_when_there_is_room_again(small: Engine, artifacts: Artifacts) -> None:
    await small.create(artifacts.spec("parent"))
    await small.snapshot("parent", "here", test=False)

    async def pooled(wanted: int) -> None:
        async with asyncio.timeout(DEADLINE):
            while (await small.get_snapshot("shop:1")).pooled != wanted:  # noqa: ASYNC110  (parked machines make no events for users)
                await asyncio.sleep(0.1)

    await small.template("parent@here", label="shop:1", pool=2)
    await pooled(1)
    async with asyncio.timeout(DEADLINE):
        while not small._forks._short:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    await small.stop("parent")
    small._forks.replenish()
    await pooled(2)
    await small.delete_snapshot("shop:1", cascade=True)


async def test_over_http_it_is_a_503_that_says_when_to_ask_again(
    states: States, artifacts: Artifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAMET_OVERCOMMIT", ratio(0.5))
    state = states.new()
    await service.ensure_running(state)
    try:
        found = service.status(state)
        assert found
        async with contextlib.aclosing(Client(str(found["url"]), state.token.read_text().strip())) as verbs:
            with pytest.raises(NoCapacityError) as caught:
                await verbs.create(artifacts.spec("big"))
            assert "ramet hibernate" in caught.value.hint
            assert await verbs.list() == []
        await asyncio.to_thread(_refused, f"{found['url']}/v1/machines", state, artifacts.tiny)
    finally:
        await retire(state)


def _refused(url: str, state: StateDir, image: str) -> None:
    body = f'{{"name": "big", "image": "{image}", "memory": {MEMORY}}}'.encode()
    headers = {"authorization": f"Bearer {state.token.read_text().strip()}", "content-type": "application/json"}
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=60)
    assert caught.value.code == 503
    assert int(caught.value.headers["retry-after"]) > 0
    caught.value.close()


# memory that is lowered and raised


async def test_memory_goes_down_and_the_host_gets_it(box: Box) -> None:
    await box.sh("dd if=/dev/urandom of=/dev/shm/full bs=1M count=100 2>/dev/null; rm /dev/shm/full")
    engine, pid = box.engine, (await box.get()).pid
    assert pid
    total = int(await box.text("awk '/MemFree/ {print $2}' /proc/meminfo")) << 10
    lowered = await engine.update(box.name, memory=128 * MIB)
    assert (lowered.memory_limit, lowered.memory_granted) == (128 * MIB, 128 * MIB)
    assert (await engine.info()).memory_committed == 128 * MIB + capacity.OVERHEAD
    left = int(await box.text("awk '/MemFree/ {print $2}' /proc/meminfo")) << 10
    assert left < total - 64 * MIB
    await until(lambda: private(pid) < 128 * MIB + 64 * MIB)
    raised = await engine.update(box.name, memory=0)
    assert (raised.memory_limit, raised.memory_granted) == (0, MEMORY)
    await box.sh("dd if=/dev/zero of=/dev/null bs=150M count=1")  # all of it can be used again


async def test_the_balloon_takes_what_the_host_holds(box: Box) -> None:
    """Page cache that nobody gives back by itself: the balloon makes the guest drop it."""
    engine, pid = box.engine, (await box.get()).pid
    assert pid
    await engine.update(box.name, reclaim=Reclaim.OFF)
    await box.sh("dd if=/dev/urandom of=/srv/file bs=1M count=120 2>/dev/null; sync; cat /srv/file > /dev/null")
    full = private(pid)
    lowered = await engine.update(box.name, memory=64 * MIB)
    assert lowered.memory_granted
    assert lowered.memory_granted < 128 * MIB
    await until(lambda: private(pid) < full - 40 * MIB)
    await box.sh("rm /srv/file")
    await engine.update(box.name, memory=0, reclaim=Reclaim.GENTLE)


async def test_a_guest_that_needs_more_gets_it_back_and_nobody_is_killed(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = box.engine
    monkeypatch.setattr(reclaiming, "AGAIN", 1.0)
    monkeypatch.setattr(reclaiming, "_SPARE", 1e-6)  # more than there is: it is left alone for now
    await engine.update(box.name, memory=96 * MIB)
    assert await box.text("dd if=/dev/zero of=/dev/null bs=150M count=1 2>/dev/null && echo whole", timeout=DEADLINE) == "whole"
    assert "Killed process" not in await box.text("dmesg")
    async with asyncio.timeout(DEADLINE):
        while ((await box.get()).memory_granted or 0) <= 150 * MIB:  # noqa: ASYNC110  (QEMU tells within a second)
            await asyncio.sleep(0.1)
    machine = await box.get()
    assert machine.memory_limit == 96 * MIB, "what was asked for"
    assert machine.memory_granted
    assert (await engine.info()).memory_committed == machine.memory_granted + capacity.OVERHEAD, "what it has counts"
    monkeypatch.setattr(reclaiming, "_SPARE", 8)
    await settled(engine, box.name, 96 * MIB)  # by itself, for the need is over
    await engine.update(box.name, memory=0)


async def test_what_cannot_be_given_is_said(box: Box) -> None:
    engine = box.engine
    await box.sh("dd if=/dev/urandom of=/dev/shm/held bs=1M count=110 2>/dev/null")
    lowered = await engine.update(box.name, memory=64 * MIB)
    assert lowered.memory_limit == 64 * MIB
    assert lowered.memory_granted
    assert 110 * MIB < lowered.memory_granted < MEMORY
    assert "Killed process" not in await box.text("rm /dev/shm/held; dmesg")
    await engine.update(box.name, memory=0)
    for wrong in (MEMORY + MIB, 32 * MIB):
        with pytest.raises(SpecError, match="64 MiB and 256 MiB"):
            await engine.update(box.name, memory=wrong)


async def settled(engine: Engine, name: str, size: int) -> None:
    """Its guest has so much."""
    async with asyncio.timeout(DEADLINE):
        while (await engine.get(name)).memory_granted != size:  # noqa: ASYNC110
            await asyncio.sleep(0.1)


async def test_a_limit_goes_where_the_machine_goes(states: States, artifacts: Artifacts) -> None:
    state = states.new()
    half = 128 * MIB
    async with Engine.open(state) as engine:
        await engine.create(artifacts.spec("web"))
        await engine.update("web", memory=half)
        await engine.fork("web", names=("child",))
        await settled(engine, "child", half)
        assert (await engine.get("child")).memory_limit == half
        await engine.hibernate("child")
        await engine.resume("child")
        await settled(engine, "child", half)
        await engine.pause("child")
        assert (await engine.update("child", memory=0)).memory_granted == half, "it stands still"
        await engine.resume("child")
        await settled(engine, "child", MEMORY)
        await engine.hibernate("child")
        await engine.update("child", memory=half)
    async with opened(state) as engine:  # another daemon
        await settled(engine, "web", half)
        await engine.resume("child")
        await settled(engine, "child", half)
        await engine.stop("web")
        assert (await engine.update("web", memory=96 * MIB)).memory_granted is None
        await engine.start("web")
        await settled(engine, "web", 96 * MIB)
        assert int(await Box(engine, "web").text("nproc")) == 1


async def test_raising_needs_room_too(small: Engine, artifacts: Artifacts) -> None:
    for name in ("a", "b"):
        await small.create(artifacts.spec(name))
        await small.update(name, memory=64 * MIB)
    await small.create(artifacts.spec("c"))
    await small.update("a", memory=0)
    with pytest.raises(NoCapacityError):
        await small.update("b", memory=0)
    assert (await small.get("b")).memory_limit == 64 * MIB
    await small.stop("c")
    assert (await small.update("b", memory=0)).memory_granted == MEMORY
