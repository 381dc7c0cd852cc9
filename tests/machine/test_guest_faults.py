"""Guests and their QEMU fail in every way we could think of. The list tells the truth, and nothing that nobody owns is left (conftest.py looks)."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from ramet import guest, process, qmp
from ramet.engine import Engine
from ramet.errors import GuestError, MachineFailedError, NotFoundError, OutcomeUnknownError, RametError, StateError
from ramet.model import Command, InitMode, State
from ramet.paths import StateDir
from ramet.vm import machine as vm
from tests.fixtures import Artifacts, Box
from tests.machine.events import listening

DEADLINE = 120.0
SLEEP = Command(argv=("sleep", "1008"))


@pytest_asyncio.fixture(loop_scope="session")
async def victim(engine: Engine, artifacts: Artifacts) -> AsyncIterator[Box]:
    """A machine for one test to break."""
    await engine.create(artifacts.spec("victim"))
    yield Box(engine, "victim")
    await engine.delete("victim")


async def running(box: Box, command: Command) -> asyncio.Future[object]:
    """A command that has started."""
    begun: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def consume() -> None:
        async for _ in box.engine.execute(box.name, command):
            if not begun.done():
                begun.set_result(None)

    task = asyncio.ensure_future(consume())
    await asyncio.wait({task, begun}, return_when=asyncio.FIRST_COMPLETED, timeout=DEADLINE)
    assert begun.done()
    return task


def pids(state: StateDir, machine: str) -> dict[str, int]:
    return vm.pids(state.machine(machine))


# --- kill -9 ---


@pytest.mark.parametrize(("who", "reason"), [("qemu", "QEMU was killed by SIGKILL"), ("both", "QEMU and its shim were killed")])
async def test_qemu_is_killed(victim: Box, state: StateDir, who: str, reason: str) -> None:
    found = pids(state, (await victim.get()).id)
    task = await running(victim, SLEEP)
    async with listening(victim.engine) as ear:
        for name in ("shim", "qemu") if who == "both" else (who,):
            os.kill(found[name], signal.SIGKILL)
        event = await ear.until_state("victim", State.FAILED)
    assert event.reason.startswith(reason)
    with pytest.raises(OutcomeUnknownError):
        await task
    with pytest.raises(StateError, match="it is failed, not running"):
        await victim.sh("true")
    machine = await victim.get()
    assert (machine.state, machine.pid) == (State.FAILED, None)
    assert machine.usage
    assert machine.usage.memory == 0
    assert (await victim.engine.start("victim")).state is State.RUNNING
    assert await victim.text("hostname") == "victim"


async def test_the_shim_is_killed_and_the_machine_runs_on(victim: Box, state: StateDir) -> None:
    found = pids(state, (await victim.get()).id)
    os.kill(found["shim"], signal.SIGKILL)
    assert await victim.text("echo still") == "still"
    assert (await victim.get()).state is State.RUNNING
    stopped = await victim.engine.stop("victim")
    assert stopped.state is State.STOPPED


async def test_the_agent_as_pid_1_is_killed(victim: Box) -> None:
    """A signal does not end the kernel's first process; what would is a fault in it, which the kernel turns into a panic."""
    await victim.sh("kill -9 1", check=False)
    assert await victim.text("echo still") == "still"
    async with listening(victim.engine) as ear:
        with pytest.raises(OutcomeUnknownError):
            await victim.sh("echo c > /proc/sysrq-trigger; sleep 1009")
        event = await ear.until_state("victim", State.FAILED)
    assert "Kernel panic" in event.reason
    assert b"Kernel panic" in await victim.engine.logs("victim")


async def test_the_agent_beside_the_image_s_init_is_killed(engine: Engine, artifacts: Artifacts) -> None:
    await engine.create(artifacts.spec("beside", init=InitMode.IMAGE))
    box = Box(engine, "beside")
    async with listening(engine) as ear:
        with pytest.raises(OutcomeUnknownError):
            await box.sh("kill -9 $PPID; sleep 1010")
        event = await ear.until_state("beside", State.FAILED)
    assert "agent is gone" in event.reason
    machine = await engine.get("beside")
    assert machine.pid is not None, "QEMU still runs, and the list says so"
    with pytest.raises(StateError, match="it is failed"):
        await box.sh("true")
    assert (await engine.stop("beside", force=True)).state is State.STOPPED
    await engine.start("beside")
    assert await box.text("hostname") == "beside"
    await engine.delete("beside")


# --- a guest that does not answer ---


async def test_a_guest_that_is_silent(victim: Box, state: StateDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guest, "SILENCE", 3.0)
    await victim.engine.stop("victim", force=True)
    await victim.engine.start("victim")
    qemu = pids(state, (await victim.get()).id)["qemu"]
    os.kill(qemu, signal.SIGSTOP)
    loop = asyncio.get_running_loop()
    began = loop.time()
    try:
        with pytest.raises(OutcomeUnknownError, match=r"outcome of `true` is unknown.*did not answer for 3 s") as caught:
            await victim.engine.run("victim", Command(argv=("true",)))
        assert "may have run" in caught.value.hint
        assert loop.time() - began < DEADLINE
        assert "victim" in [each.name for each in await victim.engine.list()]
    finally:
        os.kill(qemu, signal.SIGCONT)
    monkeypatch.setattr(guest, "SILENCE", 60.0)
    async with asyncio.timeout(DEADLINE):  # the line is taken up again by itself, once the guest is back
        while True:
            try:
                assert await victim.text("echo back") == "back"
                return
            except (MachineFailedError, OutcomeUnknownError):
                await asyncio.sleep(0.1)


async def test_a_silent_guest_can_be_stopped_and_deleted(
    engine: Engine, artifacts: Artifacts, state: StateDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guest, "SHORT", 2.0)
    monkeypatch.setattr(qmp, "DEADLINE", 2.0)
    made = await engine.create(artifacts.spec("frozen"))
    os.kill(pids(state, made.id)["qemu"], signal.SIGSTOP)
    async with asyncio.timeout(DEADLINE):
        stopped = await engine.stop("frozen")
    assert stopped.state is State.STOPPED
    assert stopped.reason == "QEMU did not answer; it was cut off with SIGKILL"
    await engine.start("frozen")
    os.kill(pids(state, made.id)["qemu"], signal.SIGSTOP)
    async with asyncio.timeout(DEADLINE):
        await engine.delete("frozen")
    assert not state.machine(made.id).root.exists()


# --- a guest that takes all it can ---


async def test_a_guest_that_floods_its_console(victim: Box, state: StateDir) -> None:
    files = state.machine((await victim.get()).id)
    await victim.sh("yes 'a line for the console, again and again' | head -c 2600000 > /dev/console", timeout=100.0)
    kept = sum(path.stat().st_size for path in files.root.glob("console.log*"))
    assert 1 << 20 <= kept <= 2 * vm.LOG_CAP + 4096
    assert (await victim.engine.logs("victim", lines=5)).count(b"again and again") >= 4
    assert await victim.text("echo fine") == "fine"


async def test_a_guest_that_fills_its_disk(victim: Box) -> None:
    free = int((await victim.engine.metrics("victim"))["disk_free"])
    await victim.sh(f"fallocate -l {free - (4 << 20)} /srv/most; dd if=/dev/zero of=/srv/rest bs=64k 2>&1 | grep -i 'no space'")
    assert await victim.text("echo fine; df / | tail -1 | awk '{print $5}'") == "fine\n100%"
    stopped = await victim.engine.stop("victim")
    assert (stopped.state, stopped.reason) == (State.STOPPED, "")
    await victim.engine.start("victim")
    await victim.sh("rm /srv/most /srv/rest; echo x > /srv/new")


async def test_a_guest_that_fills_its_process_table(victim: Box) -> None:
    """The agent still answers, says what is wrong, and the machine can be stopped."""
    result = await victim.sh("while :; do sleep 1011 & done", check=False, timeout=100.0)
    assert b"can't fork" in result.stderr
    assert (await victim.engine.metrics("victim"))["processes"] > 500
    few = (victim.engine.run("victim", Command(argv=("sleep", "1"))) for _ in range(16))  # only the shell's own place is free
    refused = [each for each in await asyncio.gather(*few, return_exceptions=True) if isinstance(each, GuestError)]
    assert refused
    assert {each.details["errno"] for each in refused} <= {"EAGAIN", "ENOMEM"}
    assert "process table is full" in refused[0].hint or "memory" in refused[0].hint
    assert (await victim.get()).state is State.RUNNING
    async with asyncio.timeout(DEADLINE):
        stopped = await victim.engine.stop("victim")
    assert (stopped.state, stopped.reason) == (State.STOPPED, "")
    await victim.engine.start("victim")
    assert await victim.text("echo fine") == "fine"


async def test_a_fork_bomb_does_not_outlive_a_power_cut(victim: Box) -> None:
    """Nothing but the agent gets a turn for long, so this only asks for what must always work: the list, and the end."""
    bomb = Command(argv=("sh", "-c", "bomb() { bomb | bomb & }; bomb"), detach=True, label="bomb")
    (await running(victim, bomb)).cancel()
    async with asyncio.timeout(DEADLINE):
        while (await victim.engine.metrics("victim"))["processes"] < 300:
            pass
        assert (await victim.get()).state is State.RUNNING
        assert (await victim.engine.stop("victim", force=True)).state is State.STOPPED


async def test_a_guest_that_runs_out_of_memory(victim: Box) -> None:
    """The kernel kills what took it; the agent is exempt."""
    result = await victim.sh("tail /dev/zero", check=False, timeout=100.0)
    assert result.status != 0
    assert await victim.text("echo fine") == "fine"


# --- operations that are overtaken ---


@pytest.mark.parametrize("step", ["looking up the image", "making the disk", "preparing the kernel", "booting"])
async def test_deleted_while_it_is_created(engine: Engine, artifacts: Artifacts, step: str, state: StateDir) -> None:
    async with listening(engine) as ear:
        creating = asyncio.ensure_future(engine.create(artifacts.spec("unwanted")))
        await ear.until(lambda event: bool(event.activity and event.activity.step == step))
        with contextlib.suppress(NotFoundError):  # it may have cleaned up by itself
            await engine.delete("unwanted")
        with pytest.raises(RametError):
            await creating
    with pytest.raises(NotFoundError):
        await engine.get("unwanted")
    assert {path.name for path in state.machines.iterdir()} == {each.id for each in await engine.list()}


async def test_a_creator_that_goes_away_does_not_stop_the_creation(engine: Engine, artifacts: Artifacts) -> None:
    async with listening(engine) as ear:
        creating = asyncio.ensure_future(engine.create(artifacts.spec("orphan")))
        await ear.until(lambda event: bool(event.activity and event.activity.step == "booting"))
        creating.cancel()
        await ear.until_state("orphan", State.RUNNING)
    assert await Box(engine, "orphan").text("hostname") == "orphan"
    await engine.delete("orphan")


async def test_deleted_while_it_is_stopped(engine: Engine, artifacts: Artifacts) -> None:
    await engine.create(artifacts.spec("unwanted"))
    async with listening(engine) as ear:
        stopping = asyncio.ensure_future(engine.stop("unwanted"))
        await ear.until_state("unwanted", State.STOPPING)
        await engine.delete("unwanted")
        with pytest.raises(RametError):
            await stopping
    with pytest.raises(NotFoundError):
        await engine.get("unwanted")


async def test_two_deletions_at_once(engine: Engine, artifacts: Artifacts) -> None:
    await engine.create(artifacts.spec("unwanted"))
    results = await asyncio.gather(*(engine.delete("unwanted") for _ in range(2)), return_exceptions=True)
    assert sum(each is None for each in results) >= 1
    assert all(each is None or isinstance(each, RametError) for each in results)
    with pytest.raises(NotFoundError):
        await engine.get("unwanted")


async def test_qemu_dies_while_it_boots(engine: Engine, artifacts: Artifacts, state: StateDir) -> None:
    async with listening(engine) as ear:
        creating = asyncio.ensure_future(engine.create(artifacts.spec("stillborn")))
        await ear.until(lambda event: bool(event.activity and event.activity.step == "booting"))
        (entry,) = [each for each in await engine.list() if each.name == "stillborn"]
        async with asyncio.timeout(DEADLINE):
            while "qemu" not in (found := pids(state, entry.id)):  # noqa: ASYNC110  (the shim writes a file)
                await asyncio.sleep(0.01)
        os.kill(found["qemu"], signal.SIGKILL)
        with pytest.raises(MachineFailedError, match="QEMU was killed by SIGKILL"):
            await creating
    for machine in await engine.list():
        if machine.name == "stillborn":  # it had been started: it is kept, to be looked at
            assert machine.state is State.FAILED
            await engine.delete("stillborn")


async def test_a_process_of_the_machine_still_holds_its_directory(victim: Box, state: StateDir) -> None:
    """A second QEMU on one disk would destroy it: the lock refuses, whatever the database believes."""
    files = state.machine((await victim.get()).id)
    assert vm.is_alive(files)
    assert set(pids(state, files.root.name)) == {"shim", "qemu"}
    assert process.start_time(pids(state, files.root.name)["qemu"])
