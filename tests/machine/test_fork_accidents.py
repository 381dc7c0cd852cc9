"""Accidents of one machine in the middle of a fork or a save: its QEMU dies or hangs, a hook of the guest fails, somebody deletes it."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
import pytest_asyncio

from ramet import disks, recovery, restoring
from ramet.engine import Engine
from ramet.errors import BusyError, NotFoundError, RametError
from ramet.guest import Guest
from ramet.model import Event, Snapshot, SnapshotState, State
from ramet.paths import StateDir
from ramet.vm import capture
from ramet.vm import machine as vm
from ramet.vm.machine import Vm
from tests.fixtures import Artifacts, Box, States
from tests.machine.aftermath import DEADLINE, Trouble, busy, goes_on, note, notes, settled, sound, swept, went_on
from tests.machine.doomed import parked
from tests.machine.events import listening


@pytest.fixture(scope="module")
def place(artifacts: Artifacts, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> StateDir:
    scratch = request.getfixturevalue("scratch")
    return States(artifacts, scratch, tmp_path_factory.mktemp("accidents")).new()


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def engine(place: StateDir, artifacts: Artifacts) -> AsyncIterator[Engine]:
    """With a machine `origin` that counts, and a snapshot of it to make others from at once."""
    async with swept(place) as made:
        await made.create(artifacts.spec("origin"))
        await busy(Box(made, "origin"))
        await made.snapshot("origin", "good", test=False)
        await settled(made)
        yield made


@pytest_asyncio.fixture(loop_scope="session")
async def victim(engine: Engine) -> AsyncIterator[Box]:
    """A machine to harm."""
    await engine.create_from("origin@good", "victim")
    yield Box(engine, "victim")
    for machine in await engine.list():
        if machine.name != "origin":
            await engine.delete(machine.name)
    assert await goes_on(Box(engine, "origin")) > 0
    assert set(await sound(engine)) == {"origin"}


def qemu(engine: Engine, name: str) -> int:
    return vm.pids(engine._ops.state.machine(engine._entry(name).record.id))["qemu"]


def doing(machine: str, step: str) -> Callable[[Event], bool]:
    """That this is being done to a machine."""
    return lambda event: event.machine == machine and event.activity is not None and event.activity.step == step


@pytest.fixture
def fragile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every QEMU that is to go on from a snapshot is killed, after it was started."""
    go_on = Vm.go_on

    async def killed(self: Vm, *args: object, **options: object) -> None:
        os.kill(self.pid, signal.SIGKILL)
        await go_on(self, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Vm, "go_on", killed)


async def test_a_child_whose_qemu_is_killed_while_it_starts(engine: Engine, victim: Box, fragile: None) -> None:
    (outcome,) = await engine.fork("victim", names=("child",))
    assert outcome.machine is None
    assert outcome.error and "QEMU was killed by SIGKILL" in outcome.error["message"]
    with pytest.raises(NotFoundError):
        await engine.get("child")
    assert await goes_on(victim) > 0
    assert set(await sound(engine)) == {"origin", "victim"}


async def test_a_parent_whose_qemu_is_killed_while_it_is_saved(engine: Engine, victim: Box) -> None:
    async with listening(engine) as ear:
        forking = asyncio.create_task(engine.fork("victim", names=("child",)))
        await ear.until(doing("victim", "pausing"))
        os.kill(qemu(engine, "victim"), signal.SIGKILL)
        with pytest.raises(RametError):
            await forking
        event = await ear.until_state("victim", State.FAILED)
    assert "QEMU was killed by SIGKILL" in event.reason
    assert set(await sound(engine)) == {"origin", "victim"}
    await engine.restore("victim")
    assert await goes_on(victim) > 0


async def test_what_a_machine_wrote_while_its_save_was_kept_is_not_lost(
    engine: Engine, victim: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes on with another overlay before the save is whole; then QEMU dies."""
    reached, go, publish = asyncio.Event(), threading.Event(), disks.publish
    loop = asyncio.get_running_loop()

    def held(*args: Any) -> Any:
        loop.call_soon_threadsafe(reached.set)
        go.wait(DEADLINE)
        return publish(*args)

    monkeypatch.setattr(disks, "publish", held)
    await note(victim, "early")
    async with listening(engine) as ear:
        forking = asyncio.create_task(engine.fork("victim", names=("child",)))
        await asyncio.wait_for(reached.wait(), DEADLINE)
        await note(victim, "late")
        os.kill(qemu(engine, "victim"), signal.SIGKILL)
        go.set()
        await asyncio.wait({forking}, timeout=DEADLINE)
        assert forking.done()
        await ear.until_state("victim", State.FAILED)
    monkeypatch.undo()
    forking.exception()  # whether the child came to be is all the same here
    await engine.start("victim")
    assert await notes(victim) == ["early", "late"]
    assert set(await sound(engine)) - {"child"} == {"origin", "victim"}


async def test_a_guest_that_does_not_answer(engine: Engine, victim: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its QEMU hangs: nothing comes of the fork, and the machine goes on when QEMU does."""
    monkeypatch.setattr("ramet.qmp.DEADLINE", 3.0)
    monkeypatch.setattr(capture, "QUIESCE_DEADLINE", 3.0)
    pid = qemu(engine, "victim")
    os.kill(pid, signal.SIGSTOP)
    try:
        with pytest.raises(RametError, match=r"monitor|answer|quiesce") as caught:
            async with asyncio.timeout(DEADLINE):
                await engine.fork("victim", names=("child",))
        assert caught.value.message
    finally:
        os.kill(pid, signal.SIGCONT)
    monkeypatch.undo()
    assert (await engine.get("victim")).state is State.RUNNING
    assert await goes_on(victim) > 0
    assert set(await sound(engine)) == {"origin", "victim"}
    (outcome,) = await engine.fork("victim", names=("child",))
    assert outcome.error is None
    assert await goes_on(Box(engine, "child")) > 0


async def test_an_agent_that_does_not_fall_silent(engine: Engine, victim: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    """The monitor answers and the agent does not: QEMU is stopped once it was asked for all but that."""
    monkeypatch.setattr(capture, "QUIESCE_DEADLINE", 3.0)
    quiesce, pid = Guest.quiesce, qemu(engine, "victim")

    async def hangs(self: Guest, deadline: float = 0.0) -> None:
        os.kill(pid, signal.SIGSTOP)
        try:
            await quiesce(self, deadline)
        finally:
            os.kill(pid, signal.SIGCONT)

    monkeypatch.setattr(Guest, "quiesce", hangs)
    try:
        with pytest.raises(RametError) as caught:
            await asyncio.wait_for(engine.fork("victim", names=("child",)), DEADLINE)
        assert "agent" in caught.value.message
    finally:
        os.kill(pid, signal.SIGCONT)
        monkeypatch.undo()
    assert (await engine.get("victim")).state is State.RUNNING
    assert await goes_on(victim) > 0
    assert set(await sound(engine)) == {"origin", "victim"}


@pytest.mark.parametrize(
    ("script", "wanted", "deadline"),
    [("echo this one will not do >&2; exit 3", "will not do", DEADLINE), ("sleep 1000", "fork.d", 5.0)],
    ids=["fails", "hangs"],
)
async def test_a_hook_that_does_not_succeed_is_the_end_of_the_child(
    engine: Engine, victim: Box, script: str, wanted: str, deadline: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vm, "HOOKS_DEADLINE", deadline)
    await victim.sh(
        f"mkdir -p /etc/ramet/fork.d; printf '#!/bin/sh\\n{script}\\n' > /etc/ramet/fork.d/10-test; chmod +x /etc/ramet/fork.d/10-test"
    )
    async with asyncio.timeout(DEADLINE):
        (outcome,) = await engine.fork("victim", names=("child",))
    assert outcome.machine is None
    assert outcome.error and wanted in outcome.error["message"], outcome.error
    assert await goes_on(victim) > 0
    assert set(await sound(engine)) == {"origin", "victim"}


async def test_deleted_at_every_step_of_its_fork(engine: Engine, victim: Box) -> None:
    """The parent goes; what came of the fork is a child that is whole, or none."""
    async with listening(engine) as ear:
        await engine.fork("victim", names=("child",))
    trouble, steps = Trouble(), ear.steps("victim")
    for step in steps:
        for name in ("child", "victim"):
            if name in {machine.name for machine in await engine.list()}:
                await engine.delete(name)
        await engine.create_from("origin@good", "victim")
        with trouble.at(step):
            async with listening(engine) as ear:
                forking = asyncio.create_task(engine.fork("victim", names=("child",)))
                await ear.until(doing("victim", step))
                await engine.delete("victim")
                await asyncio.wait({forking}, timeout=DEADLINE)
                assert forking.done()
            machines = await sound(engine)
            assert set(machines) <= {"origin", "child"}
            if error := forking.exception():
                assert isinstance(error, RametError), repr(error)
            if "child" in machines:
                assert await goes_on(Box(engine, "child")) > 0
    trouble.check()


async def test_a_child_is_deleted_at_every_step_of_its_start(engine: Engine, victim: Box) -> None:
    async with listening(engine) as ear:
        await engine.fork("victim", names=("child",))
    trouble, steps = Trouble(), ear.steps("child")
    await engine.delete("child")
    for step in steps:
        with trouble.at(step):
            async with listening(engine) as ear:
                forking = asyncio.create_task(engine.fork("victim", names=("child",)))
                await ear.until(doing("child", step))
                await engine.delete("child")
                (outcome,) = await asyncio.wait_for(forking, DEADLINE)
            assert outcome.machine is None
            assert outcome.error and "ended by a delete" in outcome.error["message"]
            assert await goes_on(victim) > 0
            assert set(await sound(engine)) == {"origin", "victim"}
    trouble.check()


@pytest.fixture
def moments(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[SnapshotState, asyncio.Event]]:
    """Set when a snapshot has come to a state."""
    found = {state: asyncio.Event() for state in SnapshotState}
    snapshots, change = engine._ops.snapshots, engine._ops.snapshots.change

    async def changing(snapshot_id: str, **changes: object) -> Snapshot:
        changed = await change(snapshot_id, **changes)
        found[changed.state].set()
        return changed

    monkeypatch.setattr(snapshots, "change", changing)
    yield found


async def test_a_snapshot_is_deleted_while_it_is_sealed(engine: Engine, victim: Box) -> None:
    snapshot = await engine.snapshot("victim", "gone")
    assert snapshot.state is SnapshotState.SAVING
    assert await engine.delete_snapshot("victim@gone") == ["victim@gone"]
    assert await goes_on(victim) > 0
    assert set(await sound(engine)) == {"origin", "victim"}


async def test_a_snapshot_is_deleted_while_it_is_tested(
    engine: Engine, victim: Box, moments: dict[SnapshotState, asyncio.Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    launched, launch = asyncio.Event(), restoring.launch

    async def told(*args: object) -> Vm:
        machine = await launch(*args)  # type: ignore[arg-type]
        launched.set()
        return machine

    monkeypatch.setattr(restoring, "launch", told)
    await engine.snapshot("victim", "gone")
    for moment in (moments[SnapshotState.TESTING], launched):
        await asyncio.wait_for(moment.wait(), DEADLINE)
    assert await engine.delete_snapshot("victim@gone") == ["victim@gone"]
    assert await goes_on(victim) > 0
    assert set(await sound(engine)) == {"origin", "victim"}


async def test_a_template_is_deleted_while_its_pool_is_filled(engine: Engine, victim: Box) -> None:
    await engine.snapshot("victim", "pooled", test=False)
    await settled(engine)
    async with listening(engine) as ear:
        await engine.template("victim@pooled", pool=3)
        await ear.until_state((await ear.until(lambda event: event.machine.startswith("pool-"))).machine, State.PAUSED)
        await ear.until(lambda event: event.machine.startswith("pool-") and bool(event.activity) and event.machine != ear.heard[0].machine)
    await engine.delete_snapshot("victim@pooled", cascade=True)
    await settled(engine)
    assert await goes_on(victim) > 0
    assert set(await sound(engine)) == {"origin", "victim"}


async def test_a_parked_machine_that_died_is_replaced(engine: Engine, victim: Box) -> None:
    """Nobody sees the pool's machines, so nobody else could delete a dead one."""
    await engine.snapshot("victim", "pooled", test=False)
    await settled(engine)
    await engine.template("victim@pooled", pool=1)
    await parked(engine, 1)
    (entry,) = [each for each in engine._ops.entries.values() if each.record.pool]
    async with listening(engine) as ear:
        os.kill(qemu(engine, entry.record.id) if not entry.vm else entry.vm.pid, signal.SIGKILL)
        await ear.until_state(entry.record.name, State.FAILED)
    try:
        await parked(engine, 1)
        await engine.create_from("victim@pooled", "copy")
        assert await goes_on(Box(engine, "copy")) > 0
    finally:
        await engine.delete_snapshot("victim@pooled", cascade=True)


async def test_two_operations_on_one_machine(engine: Engine, victim: Box) -> None:
    """The second is refused at once, with what is under way; the first does not notice."""
    async with listening(engine) as ear:
        forking = asyncio.create_task(engine.fork("victim", names=("child",)))
        await ear.until(lambda event: event.machine == "victim" and bool(event.activity))
        for verb in (engine.hibernate, engine.pause, engine.stop):
            with pytest.raises(BusyError, match="fork"):
                await verb("victim")
        (outcome,) = await forking
    assert outcome.error is None
    assert await goes_on(victim) > 0


# --- a rewind that does not come to its end ---


async def test_a_rewind_whose_qemu_dies_changes_nothing(engine: Engine, victim: Box, request: pytest.FixtureRequest) -> None:
    await note(victim, "later")
    before, count = await victim.get(), await goes_on(victim)
    request.getfixturevalue("fragile")
    with pytest.raises(RametError, match="QEMU was killed by SIGKILL") as caught:
        await engine.restore("victim")
    assert caught.value.hint.startswith("victim is running, as before."), (await engine.get("victim")).reason
    after = await victim.get()
    assert (after.state, after.snapshot, after.started_at, after.reason) == (State.RUNNING, before.snapshot, before.started_at, "")
    assert await went_on(victim, count) > count
    assert await notes(victim) == ["later"]


@pytest.mark.parametrize("step", ["starting QEMU", "loading the devices"])
async def test_a_machine_that_is_being_rewound_is_deleted(engine: Engine, victim: Box, step: str) -> None:
    async with listening(engine) as ear:
        rewinding = asyncio.create_task(engine.restore("victim"))
        await ear.until(doing("victim", step))
        await engine.delete("victim")
        with pytest.raises(RametError):
            await rewinding
    assert set(await sound(engine)) == {"origin"}


async def test_a_daemon_that_ends_while_it_rewinds_leaves_what_was(engine: Engine, victim: Box) -> None:
    await note(victim, "later")
    count = await goes_on(victim)
    entry = engine._entry("victim")
    async with listening(engine) as ear:
        rewinding = asyncio.create_task(engine.restore("victim"))
        await ear.until(doing("victim", "loading the devices"))
        await engine._ops.cancel(entry)  # as the daemon's end does
        with pytest.raises(RametError):
            await rewinding
    assert (entry.record.state, entry.vm) == (State.RUNNING, None)
    await recovery.recover(engine._ops, entry)  # as the next one does
    assert await went_on(victim, count) > count
    assert await notes(victim) == ["later"]
    await sound(engine)
