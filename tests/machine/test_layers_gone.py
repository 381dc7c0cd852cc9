"""The image file system is killed under machines: its workers, which nobody notices; its keeper, which is the end of those that stand on layers."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Callable

import pytest
import pytest_asyncio

from ramet import process
from ramet.engine import Engine
from ramet.errors import RametError
from ramet.model import State
from ramet.paths import StateDir
from ramet.store import keeper, mounting
from tests.fixtures import Artifacts, Box, States
from tests.machine.aftermath import DEADLINE, Nursery, busy, goes_on, mounts, note, notes, settled, sound, swept
from tests.machine.events import listening

FILL = "dd if=/dev/urandom of=/run/filled bs=1M count=16 2>/dev/null; cd /run; md5sum filled > filled.md5"
VERIFY = "cd /run; md5sum -c filled.md5 >/dev/null && echo same"
KILLS = 30
SOON = 20.0  # seconds until machines have failed: 0.1, on an idle host


@pytest_asyncio.fixture(loop_scope="session")
async def state(states: States) -> AsyncIterator[StateDir]:
    """A state directory; at its end, all that is in it can be removed, and then nothing is left."""
    made = states.new()
    yield made
    async with swept(made):
        pass


@pytest_asyncio.fixture(loop_scope="session")
async def engine(state: StateDir) -> AsyncIterator[Engine]:
    async with swept(state) as made:
        yield made


def cold(state: StateDir, layer: str) -> None:
    """Have what is not mapped read from the file system again."""
    with open(state.store.served(layer), "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


async def until(condition: Callable[[], bool]) -> None:
    """For what tells nobody."""
    async with asyncio.timeout(DEADLINE):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def kill_workers(state: StateDir, enough: asyncio.Event) -> int:
    """Kill one after the other until the caller has had enough; how many."""
    killed = 0
    while not enough.is_set() or killed < KILLS:
        _, workers = mounting.pids(state.store)
        victim = workers[killed % len(workers)]
        os.kill(victim, signal.SIGKILL)
        killed += 1

        def replaced(old: int = victim) -> bool:
            _, now = mounting.pids(state.store)
            return old not in now and len(now) == keeper.workers()

        await until(replaced)
        await asyncio.sleep(0.05)  # the new one gets to answer something
    return killed


async def kill_keeper(state: StateDir) -> float:
    """When it was killed, Unix time."""
    pid, _ = mounting.pids(state.store)
    pidfd = os.pidfd_open(pid)
    try:
        at = time.time()
        os.kill(pid, signal.SIGKILL)
        assert await process.gone(pidfd, DEADLINE)
    finally:
        os.close(pidfd)
    return at


async def test_machines_never_notice_that_workers_are_killed(engine: Engine, state: StateDir, artifacts: Artifacts) -> None:
    await engine.create(artifacts.spec("origin"))
    await Box(engine, "origin").sh(FILL)
    await busy(Box(engine, "origin"))
    snapshot = await engine.snapshot("origin", "filled", test=False)
    enough = asyncio.Event()
    killing = asyncio.create_task(kill_workers(state, enough))
    count = 0
    for number in range(4):
        cold(state, snapshot.memory_layer)
        names = [f"copy{number}-{each}" for each in range(2)]
        await asyncio.gather(*(engine.create_from("origin@filled", name) for name in names))
        for name in names:
            assert await goes_on(Box(engine, name)) > 0
            cold(state, snapshot.memory_layer)
            assert await Box(engine, name).text(VERIFY) == "same"
        cold(state, snapshot.disk_layer)
        for name in names:
            await Box(engine, name).sh("echo 3 > /proc/sys/vm/drop_caches; md5sum /bin/busybox")
            await engine.delete(name)
        count = await goes_on(Box(engine, "origin"))
    enough.set()
    assert await killing >= KILLS
    assert count > 0
    await sound(engine)
    assert mounting.faults(state.store) == []


async def test_without_the_keeper_machines_on_layers_have_failed(engine: Engine, state: StateDir, artifacts: Artifacts) -> None:
    for name in ("saved", "apart"):
        await engine.create(artifacts.spec(name))
        await busy(Box(engine, name))
    await note(Box(engine, "saved"), "before")
    await engine.snapshot("saved", "good", test=False)
    await note(Box(engine, "saved"), "after")
    (outcome,) = await engine.fork("saved", names=("child",))
    assert outcome.error is None
    await note(Box(engine, "child"), "own")
    await settled(engine)
    async with listening(engine) as ear:
        killed = await kill_keeper(state)
        for name in ("saved", "child"):
            event = await ear.until_state(name, State.FAILED)
            assert "image file system" in event.reason
            assert "`ramet restore`" in event.reason
            assert event.at - killed < SOON, f"{name}: {event.at - killed:.3f} s"
    assert (await engine.get("apart")).state is State.RUNNING
    assert await goes_on(Box(engine, "apart")) > 0
    await engine.restore("saved", "good")
    assert await goes_on(Box(engine, "saved")) > 0
    assert await notes(Box(engine, "saved")) == ["before"]
    await engine.start("child")
    assert await notes(Box(engine, "child")) == ["after", "before", "own"]
    (outcome,) = await engine.fork("apart", names=("other",))
    assert outcome.error is None
    assert await goes_on(Box(engine, "other")) > 0
    await sound(engine)


async def test_what_a_dead_keeper_leaves_goes_with_the_daemon(state: StateDir, artifacts: Artifacts) -> None:
    async with Engine.open(state) as engine:
        await engine.create(artifacts.spec("saved"))
        await engine.snapshot("saved", "good", test=False)
        await settled(engine)
        async with listening(engine) as ear:
            await kill_keeper(state)
            await ear.until_state("saved", State.FAILED)
    assert mounts(state) == []


async def test_machines_whose_keeper_died_while_no_daemon_ran(state: StateDir, artifacts: Artifacts, nursery: Nursery) -> None:
    """Their QEMUs live, but what they have not read yet they never will."""
    async with Engine.open(state) as engine:
        for name in ("saved", "apart"):
            await engine.create(artifacts.spec(name))
            await busy(Box(engine, name))
        await note(Box(engine, "saved"), "kept")
    await nursery.survive(state, "fork", name="saved", names=["child"])
    await kill_keeper(state)
    async with Engine.open(state) as engine:
        machines = await sound(engine)
        assert machines["apart"].state is State.RUNNING
        for name in ("saved", "child"):
            assert machines[name].state is State.FAILED
            assert "image file system" in machines[name].reason
            await engine.start(name)
            assert await notes(Box(engine, name)) == ["kept"]


async def test_forks_are_found_again_as_they_were(state: StateDir, artifacts: Artifacts, nursery: Nursery) -> None:
    async with Engine.open(state) as engine:
        await engine.create(artifacts.spec("parent"))
        await busy(Box(engine, "parent"))
        await Box(engine, "parent").sh(FILL)
    await nursery.survive(state, "fork", name="parent", names=["first", "second"])
    serving = mounting.pids(state.store)
    await nursery.survive(state, "pause", name="second")
    async with Engine.open(state) as engine:
        machines = await sound(engine)
        assert {name: machine.state for name, machine in machines.items()} == {
            "parent": State.RUNNING,
            "first": State.RUNNING,
            "second": State.PAUSED,
        }
        assert mounting.pids(state.store) == serving
        await engine.resume("second")
        cold(state, engine._ops.entries[machines["second"].id].record.memory_layer)
        for name in machines:
            assert await goes_on(Box(engine, name)) > 0
            assert await Box(engine, name).text(VERIFY) == "same"


def damage(path: os.PathLike[str]) -> None:
    """Turn every byte of a blob but its ends."""
    with open(path, "r+b") as file:
        content = file.read()
        file.seek(64)
        file.write(bytes(byte ^ 0xFF for byte in content[64:-64]))
        os.fsync(file.fileno())


async def test_a_damaged_blob_fails_who_reads_it_and_nobody_else(engine: Engine, state: StateDir, artifacts: Artifacts) -> None:
    await engine.create(artifacts.spec("origin"))
    await Box(engine, "origin").sh(FILL)
    await engine.snapshot("origin", "filled", test=False)
    await settled(engine)
    snapshot = await engine.get_snapshot("origin@filled")
    await engine.create_from("origin@filled", "reader")
    (blob,) = (await engine.get_layer(snapshot.memory_layer)).blobs
    damage(state.store.blob(blob))
    cold(state, snapshot.memory_layer)
    async with listening(engine) as ear:
        with contextlib.suppress(Exception):
            await Box(engine, "reader").sh(VERIFY)
        event = await ear.until_state("reader", State.FAILED)
    assert mounting.faults(state.store, snapshot.memory_layer)
    assert blob.replace(":", "-") in event.reason
    assert await Box(engine, "origin").text(VERIFY) == "same"
    assert blob.replace(":", "-") in " ".join(await engine.verify_layer(snapshot.memory_layer))
    for verb in (engine.create_from("origin@filled", "another"), engine.restore("origin", "filled")):
        with pytest.raises(RametError) as caught:
            await verb
        assert blob.replace(":", "-") in caught.value.message
    assert (await engine.get("origin")).state is State.RUNNING
    assert await Box(engine, "origin").text(VERIFY) == "same"
    assert {machine.name for machine in await engine.list()} == {"origin", "reader"}


@pytest.mark.parametrize("was", [State.RUNNING, State.PAUSED, State.HIBERNATED, State.STOPPED])
async def test_a_rewind_that_fails_changes_nothing(engine: Engine, state: StateDir, artifacts: Artifacts, was: State) -> None:
    box = Box(engine, "kept")
    await engine.create(artifacts.spec("kept"))
    await engine.snapshot("kept", "spoiled", test=False)
    await settled(engine)
    os.truncate(state.snapshot((await engine.get_snapshot("kept@spoiled")).id).state, 1000)
    await busy(box)
    await note(box, "later")
    before = {State.PAUSED: engine.pause, State.HIBERNATED: engine.hibernate, State.STOPPED: engine.stop}
    if verb := before.get(was):
        await verb("kept")
    await settled(engine)
    shown = await engine.get("kept")
    for _ in range(2):
        with pytest.raises(RametError, match="load") as caught:
            await engine.restore("kept", "spoiled")
        assert caught.value.hint.startswith(f"kept is {was}, as before.")
    after = (await sound(engine))["kept"]
    assert (after.state, after.snapshot, after.reason) == (was, shown.snapshot, shown.reason)
    if was in (State.PAUSED, State.HIBERNATED):
        await engine.resume("kept")
    if was is State.STOPPED:
        await engine.start("kept")
    else:
        assert await goes_on(box) > 0
    assert await notes(box) == ["later"]
