"""The daemon is killed with -9 at every step of what it does. Whoever comes next finds the truth, and nothing that nobody owns."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from ramet import process, recovery
from ramet.engine import Engine
from ramet.errors import BusyError, MachineFailedError, RametError
from ramet.model import Command, Lifecycle, Port, Spec, State
from ramet.paths import MachineDir, StateDir
from ramet.records import dump
from ramet.vm.machine import Vm
from tests.fixtures import Artifacts, Box, States, opened

DEADLINE = 240.0
YES = """
import asyncio, sys
from pathlib import Path
from ramet.engine import Engine
from ramet.model import Command
from ramet.paths import StateDir

async def main():
    async with Engine.open(StateDir(root=Path(sys.argv[1]))) as engine:
        async for event in engine.execute("torn", Command(argv=("sh", "-c", "echo $$ > /tmp/pid; yes"))):
            print(event, flush=True)

asyncio.run(main())
"""


@contextlib.asynccontextmanager
async def doomed(state: StateDir, moment: str, verb: str, spec: Spec) -> AsyncIterator[asyncio.subprocess.Process]:
    """Another process's engine, at work on the state directory."""
    root = Path(__file__).parents[2]
    words = [sys.executable, "-m", "tests.machine.doomed", str(state.root), moment, verb, json.dumps(dump(spec))]
    async with asyncio.timeout(DEADLINE), process.running(words, cwd=root, env={"RAMET_CACHE": os.environ["RAMET_CACHE"]}) as child:
        yield child


async def die(state: StateDir, moment: str, verb: str, spec: Spec) -> None:
    """Let an engine do something and die in the middle."""
    async with doomed(state, moment, verb, spec) as child:
        assert child.stdout
        output = await child.stdout.read()
        assert await child.wait() == -signal.SIGKILL, output.decode()


async def survive(state: StateDir, verb: str, spec: Spec) -> None:
    """Let an engine do something, then kill it when it is idle."""
    async with doomed(state, "never", verb, spec) as child:
        assert child.stdout
        line = await child.stdout.readline()
        assert line == b"done\n", line + await child.stdout.read()
        os.kill(child.pid, signal.SIGKILL)
        await child.wait()


def pids(state: StateDir) -> Iterator[int]:
    for path in state.machines.glob("*/pids"):
        for line in path.read_text().splitlines():
            _, pid, started = line.split()
            if process.start_time(int(pid)) == int(started):
                yield int(pid)


@pytest.mark.parametrize(
    ("moment", "after"),
    [
        ("state:creating", State.FAILED),
        ("step:looking up the image", State.FAILED),
        ("step:making the disk", State.FAILED),
        ("step:preparing the kernel", State.FAILED),
        ("step:booting", State.FAILED),
        ("step:running lifecycle.create", State.FAILED),
        ("state:running", State.RUNNING),
    ],
)
async def test_killed_while_creating(states: States, artifacts: Artifacts, moment: str, after: State) -> None:
    state = states.new()
    spec = artifacts.spec("victim", lifecycle=Lifecycle(create="true"))
    await die(state, moment, "create", spec)
    async with opened(state) as engine:
        (machine,) = await engine.list()
        assert (machine.name, machine.state) == ("victim", after)
        if after is State.FAILED:
            assert machine.reason == "the daemon ended while it was creating"
            assert machine.pid is None
            assert list(pids(state)) == []
            machine = await engine.start("victim")  # what was begun can be finished
        assert machine.state is State.RUNNING
        assert await Box(engine, "victim").text("hostname") == "victim"
    assert list(state.machines.iterdir()) == []


@pytest.mark.parametrize(
    ("moment", "after"), [("state:stopping", State.STOPPED), ("step:powering off", State.STOPPED), ("state:stopped", State.STOPPED)]
)
async def test_killed_while_stopping(states: States, artifacts: Artifacts, moment: str, after: State) -> None:
    state = states.new()
    spec = artifacts.spec("victim")
    async with Engine.open(state) as engine:
        await engine.create(spec)
    await die(state, moment, "stop", spec)
    async with opened(state) as engine:
        (machine,) = await engine.list()
        assert (machine.state, machine.pid) == (after, None)
        assert list(pids(state)) == []


@pytest.mark.parametrize("moment", ["state:deleting", "removed"])
async def test_killed_while_deleting(states: States, artifacts: Artifacts, moment: str) -> None:
    state = states.new()
    spec = artifacts.spec("victim")
    async with Engine.open(state) as engine:
        await engine.create(spec)
    await die(state, moment, "delete", spec)
    async with opened(state) as engine:
        assert await engine.list() == []
    assert list(state.machines.iterdir()) == []
    assert list(pids(state)) == []


async def test_killed_in_the_middle_of_a_removal(states: States, artifacts: Artifacts) -> None:
    """The directory was renamed, and not yet emptied."""
    state = states.new()
    async with Engine.open(state) as engine:
        made = await engine.create(artifacts.spec("victim"))
        await engine.stop("victim", force=True)
    root = state.machine(made.id).root
    root.rename(root.with_name(f".deleting-{root.name}"))
    async with opened(state) as engine:
        (machine,) = await engine.list()
        assert machine.state is State.STOPPED
        await engine.delete("victim")
    assert list(state.machines.iterdir()) == []


async def test_machines_outlive_a_killed_daemon(states: States, artifacts: Artifacts) -> None:
    state = states.new()
    spec = artifacts.spec("hardy", ports=(Port(guest=8080),))
    await survive(state, "create", spec)
    before = sorted(pids(state))
    assert len(before) == 2
    async with Engine.open(state) as engine:
        (machine,) = await engine.list()
        assert machine.state is State.RUNNING
        assert sorted(pids(state)) == before
        assert [port.guest for port in machine.ports] == [8080]
        box = Box(engine, "hardy")
        detached = Command(argv=("sh", "-c", "while :; do date > /tmp/alive; sleep 0.2; done"), detach=True, label="background")
        async with contextlib.aclosing(engine.execute("hardy", detached)) as events:
            started = await anext(events)
    async with opened(state) as engine:  # and a polite restart
        assert sorted(pids(state)) == before
        box = Box(engine, "hardy")
        (found,) = await engine.processes("hardy")
        assert (found.pid, found.state, found.label) == (started.pid, "running", "background")
        await box.sh('a=$(cat /tmp/alive); while [ "$a" = "$(cat /tmp/alive)" ]; do usleep 100000; done')


async def test_a_daemon_killed_with_a_command_under_way(states: States, artifacts: Artifacts) -> None:
    """Its command goes when the next daemon takes the line; the line itself comes back at a frame's boundary."""
    state = states.new()
    await survive(state, "create", artifacts.spec("torn"))
    async with asyncio.timeout(DEADLINE), process.running([sys.executable, "-c", YES, str(state.root)]) as child:
        assert child.stdout
        for _ in range(20):
            assert await child.stdout.readline()
        os.kill(child.pid, signal.SIGKILL)
        await child.wait()
    async with opened(state) as engine:
        box = Box(engine, "torn")
        assert await box.text("while kill -0 $(cat /tmp/pid) 2>/dev/null; do usleep 100000; done; echo gone") == "gone"
        assert (await engine.get("torn")).state is State.RUNNING


@pytest.mark.parametrize(
    ("victims", "reason"), [(("qemu",), "QEMU was killed by SIGKILL"), (("shim", "qemu"), "QEMU and its shim were killed")]
)
async def test_a_machine_that_died_while_no_daemon_ran(states: States, artifacts: Artifacts, victims: tuple[str, ...], reason: str) -> None:
    state = states.new()
    await survive(state, "create", artifacts.spec("lonely"))
    (path,) = state.machines.glob("*/pids")
    numbers = {line.split()[0]: int(line.split()[1]) for line in path.read_text().splitlines()}
    fds = [os.pidfd_open(number) for number in numbers.values()]
    for victim in victims:
        os.kill(numbers[victim], signal.SIGKILL)
    for fd in fds:
        assert await process.gone(fd, 30)
        os.close(fd)
    async with opened(state) as engine:
        (machine,) = await engine.list()
        assert machine.state is State.FAILED
        assert machine.reason.startswith(reason)
        assert (await engine.start("lonely")).state is State.RUNNING


async def test_a_guest_that_powered_off_while_no_daemon_ran(states: States, artifacts: Artifacts) -> None:
    state = states.new()
    await survive(state, "create", artifacts.spec("sleepy"))
    with pytest.raises(RametError):
        async with Engine.open(state) as engine:
            (number,) = [
                int(line.split()[1]) for path in state.machines.glob("*/pids") for line in path.read_text().splitlines() if "qemu" in line
            ]
            fd = os.pidfd_open(number)
            entry = next(iter(engine._ops.entries.values()))
            assert entry.vm
            await entry.vm.guest.power_off(0.1)
            raise RametError("the daemon goes before the guest does")
    assert await process.gone(fd, 60)
    os.close(fd)
    async with opened(state) as engine:
        (machine,) = await engine.list()
        assert (machine.state, machine.reason) == (State.STOPPED, "the guest powered off")


@pytest.mark.parametrize("after", ["found", "stop --force", "delete"])
async def test_nothing_is_done_to_a_machine_that_is_not_found_yet(
    states: States, artifacts: Artifacts, monkeypatch: pytest.MonkeyPatch, after: str
) -> None:
    """Its QEMU lives and does not answer the new daemon. What is saved of it as if it were stopped would not be what it goes on from."""
    state = states.new()
    async with Engine.open(state) as engine:
        await engine.create(artifacts.spec("slow"))
        await Box(engine, "slow").sh("echo kept > /srv/kept; sync")
    (files,) = state.machines.iterdir()
    (pid,) = [int(line.split()[1]) for line in (files / "pids").read_text().splitlines() if "qemu" in line]
    disks = {path.name: path.read_bytes() for path in files.glob("disk*.json")}
    monkeypatch.setattr(recovery, "_ADOPTING", 0.1)
    os.kill(pid, signal.SIGSTOP)
    try:
        async with opened(state) as engine:
            verbs = (engine.snapshot, engine.fork, engine.pause, engine.hibernate, engine.compact, engine.stop)
            for verb in (*verbs, lambda name: engine.run(name, Command(argv=("true",)))):
                with pytest.raises(BusyError, match="slow is being found again after a restart of the daemon"):
                    await verb("slow")
            assert [each.state for each in await engine.list()] == [State.RUNNING]
            assert await engine.snapshots() == []
            assert {path.name: path.read_bytes() for path in files.glob("disk*.json")} == disks
            if after == "delete":
                await engine.delete("slow")
                assert await engine.list() == []
                return
            if after == "stop --force":
                assert (await engine.stop("slow", force=True)).state is State.STOPPED
                assert (await engine.start("slow")).state is State.RUNNING
            else:
                os.kill(pid, signal.SIGCONT)
                (entry,) = engine._ops.entries.values()
                assert entry.task
                await asyncio.wait_for(asyncio.shield(entry.task), DEADLINE)
            assert await Box(engine, "slow").text("cat /srv/kept") == "kept"
            await engine.snapshot("slow", "now")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


async def test_a_machine_whose_lines_break_at_once_is_tried_again(
    states: States, artifacts: Artifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The monitor's and then the agent's, each once: its memory is not given up for that."""
    state = states.new()
    async with Engine.open(state) as engine:
        await engine.create(artifacts.spec("torn"))
        await Box(engine, "torn").sh("echo here > /run/here")
    adopt, connect, broken = Vm.adopt, Vm.connect_agent, list[str]()

    async def adopting(files: MachineDir, *, deadline: float) -> Vm:
        if "monitor" not in broken:
            broken.append("monitor")
            raise MachineFailedError("QEMU's monitor does not answer: broken")
        return await adopt(files, deadline=deadline)

    async def connecting(self: Vm, *, deadline: float, resync: bool) -> None:
        if "agent" not in broken:
            broken.append("agent")
            raise MachineFailedError("the guest's agent is gone: broken")
        await connect(self, deadline=deadline, resync=resync)

    monkeypatch.setattr(Vm, "adopt", adopting)
    monkeypatch.setattr(Vm, "connect_agent", connecting)
    async with opened(state) as engine:
        assert broken == ["monitor", "agent"]
        assert (await engine.get("torn")).state is State.RUNNING
        assert await Box(engine, "torn").text("cat /run/here") == "here"
