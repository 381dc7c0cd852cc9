"""A registry that goes away while machines need it: those that wait for their memory stand still with the reason, the others do not notice."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import os
import select
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import pytest_asyncio

from ramet.engine import Engine
from ramet.errors import AbsentError, NotFoundError, StateError
from ramet.fetchwatch import WAITS
from ramet.model import Machine, State
from ramet.paths import StateDir
from ramet.store import eviction, index, remote
from ramet.store.fetching import Fetcher
from ramet.store.layer import CHUNK
from tests.fixtures import Artifacts, Box, States, opened
from tests.host.conftest import DEADLINE as SOON
from tests.host.conftest import need
from tests.machine.aftermath import TICKER
from tests.machine.events import Ear
from tests.machine.events import listening as hearing

DEADLINE = 240.0
SIZE = 16  # MiB of what no start touches, once in memory and once on the disk
FILL = f"dd if=/dev/urandom of=$1 bs=1M count={SIZE} && sha256sum $1 > $1.sum"


@dataclass
class Unreliable:
    """A docker-registry that can be ended and started again at the same address. name: of the snapshot in it."""

    config: Path
    taken: socket.socket = field(default_factory=socket.socket)  # bound and not listening: nobody else gets the port meanwhile
    process: subprocess.Popen[bytes] | None = None

    def __post_init__(self) -> None:
        self.taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.taken.bind(("127.0.0.1", 0))

    @property
    def port(self) -> int:
        return int(self.taken.getsockname()[1])

    @property
    def name(self) -> str:
        return f"127.0.0.1:{self.port}/acme/shop:1"

    def up(self) -> None:
        self.down()
        root = self.config.parent
        self.config.write_text(
            f"version: 0.1\nlog: {{accesslog: {{disabled: true}}}}\nhttp: {{addr: '127.0.0.1:{self.port}', secret: test}}\n"
            f"storage: {{filesystem: {{rootdirectory: '{root}/data'}}}}\n"
        )
        command = ["docker-registry", "serve", str(self.config)]
        self.process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        end = time.monotonic() + SOON
        while True:
            with contextlib.suppress(OSError):
                return socket.create_connection(("127.0.0.1", self.port)).close()
            assert self.process.poll() is None and time.monotonic() < end, "the registry does not listen"
            time.sleep(0.02)

    def down(self) -> None:
        if self.process:
            self.process.kill()
            self.process.wait(SOON)
            self.process = None


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def registry(engine: Engine, artifacts: Artifacts, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Unreliable]:
    """It has a machine with a ticking program and a file in its memory, and another on its disk."""
    need("docker-registry")
    made = Unreliable(config=tmp_path_factory.mktemp("registry") / "config.yml")
    made.up()
    try:
        await engine.create(artifacts.spec("shop"))
        box = Box(engine, "shop")
        await box.sh(
            f"mkdir -p /srv; set -- /srv/noise; {FILL}; sync; echo 3 > /proc/sys/vm/drop_caches; sleep 5"
        )  # free pages are given back
        await box.sh(f"set -- /run/noise; {FILL}")
        await box.sh(f"({TICKER}) > /dev/null 2>&1 &")
        await engine.snapshot("shop", "warm", test=False)
        await engine.delete("shop")
        await engine.push("shop@warm", made.name)
        await engine.delete_snapshot("shop@warm")
        yield made
    finally:
        made.down()
        made.taken.close()


@pytest.fixture
def elsewhere(states: States, tmp_path: Path, registry: Unreliable, monkeypatch: pytest.MonkeyPatch) -> Iterator[StateDir]:
    """Another host, which fetches only what somebody waits for."""
    monkeypatch.setenv("RAMET_FETCH_RATE", "1")
    monkeypatch.setenv("RAMET_FETCH_DEADLINE", "3")
    state = StateDir(root=tmp_path / "elsewhere")
    state.root.mkdir()
    shutil.copy(states.artifacts.store.kvm, state.kvm)
    state.create()
    states.scratch.add(state)
    registry.up()
    yield state
    registry.down()


@contextlib.asynccontextmanager
async def lacking(state: StateDir, registry: Unreliable, *names: str, disk: bool = False) -> AsyncIterator[Engine]:
    """An engine with machines from the registry, of which all is here but the file in their memory, or the one on the disk."""
    async with opened(state) as engine:
        await engine.pull(registry.name)
        for name in names:
            await engine.create_from(registry.name, name)
            assert await Box(engine, name).text("hostname; cat /run/noise.sum /srv/noise.sum | wc -l") == f"{name}\n2"
        found = await engine.get_snapshot(registry.name)
        await asyncio.to_thread(hollow, engine, registry, found.disk_layer if disk else found.memory_layer)
        yield engine


def hollow(engine: Engine, registry: Unreliable, layer: str) -> None:
    """Give up the chunks of a layer that do not compress at all, which hold nothing but the files, and end the registry. All others are in the page cache:
    the kernel asks for several at once, and one that is not here would have those beside it wait too."""
    registry.down()  # first: what a start touched is asked for again when a fetcher dies, and the files are in that trace
    end_fetcher(engine._ops.state)  # what it fetches ahead would come afterwards
    files, record = engine._ops.store.files, engine._ops.store.get(layer)
    found = index.of_layer(files.layer(layer), record)
    for digest in record.blobs:
        known = remote.load(files, digest)
        assert known
        remote.save(files, dataclasses.replace(known, whole=False))
    gone = set()
    for chunk, blob, offset, length in zip(found.chunk, found.blob, found.offset, found.length, strict=True):
        if length >= CHUNK:
            gone.add(chunk)
            with open(files.blob(record.blobs[blob]), "r+b") as file:
                eviction.punch(file.fileno(), offset, offset + length)
    with open(files.served(layer), "rb", buffering=0) as served:
        os.posix_fadvise(served.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        os.posix_fadvise(served.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # what is asked for, and nothing beside it
        for chunk in range(record.size // CHUNK):
            if chunk not in gone:
                os.pread(served.fileno(), CHUNK, chunk * CHUNK)


@contextlib.asynccontextmanager
async def reading(engine: Engine, name: str, file: str = "/run/noise") -> AsyncIterator[asyncio.Task[str]]:
    """A program that needs what is not here, while the body runs."""
    task = asyncio.create_task(Box(engine, name).text(f"sha256sum -c {file}.sum 2>&1; echo", check=False))
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def changes(ear: Ear, name: str) -> list[State | str]:
    """The states after the first that it ran in; each new reason is an event too."""
    found = [state for state, _ in itertools.groupby(ear.states(name))]
    return found[found[0] is State.RUNNING :]


async def waits(ear: Ear, engine: Engine, name: str) -> Machine:
    await ear.until_state(name, State.PAUSED)
    machine = await engine.get(name)
    assert machine.reason.startswith(f"{WAITS} (layer {engine._entry(name).record.memory_layer}, blob sha256:")
    assert "127.0.0.1" in machine.reason
    assert machine.reason.endswith("; it goes on when that can be had")
    return machine


async def test_a_machine_waits_for_its_memory(elsewhere: StateDir, registry: Unreliable, monkeypatch: pytest.MonkeyPatch) -> None:
    async with lacking(elsewhere, registry, "one", "two") as engine, hearing(engine) as ear:
        found = await engine.get_snapshot(registry.name)
        assert found.absent > (SIZE - 4) << 20
        assert found.origin.startswith(registry.name.rpartition(":")[0] + "@sha256:")
        assert found.absent >= (await engine.get_layer(found.memory_layer)).absent > (SIZE - 4) << 20
        async with reading(engine, "one") as task:
            machine = await waits(ear, engine, "one")
            with pytest.raises(StateError, match="one waits for a part of its memory") as refused:
                await engine.resume("one")
            assert refused.value.message == f"one {(await engine.get('one')).reason}"
            for verb in (engine.snapshot, engine.fork, engine.hibernate):
                with pytest.raises(StateError, match="one waits for a part of its memory"):
                    await verb("one")
            assert await Box(engine, "two").text("hostname") == "two", "it has all that it needs"
            assert (await engine.get("two")).state is State.RUNNING
            assert not task.done()
            monkeypatch.setattr("ramet.fetchwatch.SOON", DEADLINE)
            registry.up()
            assert (await engine.resume("one")).reason == ""
            assert await asyncio.wait_for(task, DEADLINE) == "/run/noise: OK"
        assert changes(ear, "one") == [State.PAUSED, State.RUNNING]
        assert "two" not in {event.machine for event in ear.heard if event.state}
        told = [event.reason for event in ear.heard if event.machine == "one" and event.state is State.PAUSED]
        assert told[0].startswith(WAITS) and machine.pid == (await engine.get("one")).pid
        began = time.time()
        told_time = int(await Box(engine, "one").text("date +%s"))
        assert began - 3 < told_time < time.time() + 1, "its clock stood still, and was set"


async def test_it_goes_on_by_itself_also_when_the_fetcher_died(elsewhere: StateDir, registry: Unreliable) -> None:
    async with lacking(elsewhere, registry, "one") as engine, hearing(engine) as ear:
        async with reading(engine, "one") as task:
            await waits(ear, engine, "one")
            os.kill(fetcher(elsewhere), signal.SIGKILL)
            await asyncio.to_thread(waited_for, elsewhere)
            assert (await engine.get("one")).state is State.PAUSED
            registry.up()
            assert await asyncio.wait_for(task, DEADLINE) == "/run/noise: OK"
        await ear.until(lambda _: changes(ear, "one")[-1:] == [State.RUNNING])
        assert changes(ear, "one") == [State.PAUSED, State.RUNNING]


async def test_it_waits_on_when_the_daemon_ends(elsewhere: StateDir, registry: Unreliable) -> None:
    async with Engine.open(elsewhere) as engine:
        await engine.pull(registry.name)
        await engine.create_from(registry.name, "one")
        assert await Box(engine, "one").text("hostname") == "one"
        await asyncio.to_thread(hollow, engine, registry, (await engine.get_snapshot(registry.name)).memory_layer)
        async with hearing(engine) as ear, reading(engine, "one"):
            machine = await waits(ear, engine, "one")
    async with opened(elsewhere) as engine, hearing(engine) as ear:
        found = await engine.get("one")
        assert (found.state, found.reason) == (State.PAUSED, machine.reason)
        with pytest.raises(StateError, match=WAITS):
            await engine.resume("one")
        registry.up()
        await ear.until_state("one", State.RUNNING)
        assert (await engine.get("one")).pid == machine.pid
        assert await Box(engine, "one").text("sha256sum -c /run/noise.sum") == "/run/noise: OK"


def waited_for(state: StateDir) -> None:
    """Returns when a new fetcher has tried too."""
    end = time.monotonic() + DEADLINE
    while not asyncio.run(Fetcher(state.store, lambda: None).status()).waiting:
        assert time.monotonic() < end
        time.sleep(0.1)


def fetcher(state: StateDir) -> int:
    (line,) = [line for line in state.store.pids.read_text().splitlines() if line.startswith("fetcher ")]
    return int(line.split()[1])


def end_fetcher(state: StateDir) -> None:
    """Kill it, if there is one; returns when it has ended. Its keeper starts another where one is needed."""
    with contextlib.suppress(ValueError, ProcessLookupError):
        fd = os.pidfd_open(fetcher(state))
        try:
            signal.pidfd_send_signal(fd, signal.SIGKILL)
            assert select.select([fd], [], [], SOON)[0]
        finally:
            os.close(fd)


async def test_a_machine_that_waits_can_be_ended(elsewhere: StateDir, registry: Unreliable) -> None:
    async with lacking(elsewhere, registry, "one") as engine:
        layer = (await engine.get_snapshot(registry.name)).memory_layer
        for how in ("stop", "stop --force", "restore", "delete"):
            if (await engine.get("one")).state is State.STOPPED:
                await engine.restore("one")
                await asyncio.to_thread(hollow, engine, registry, layer)
            async with hearing(engine) as ear, reading(engine, "one") as task:
                machine = await waits(ear, engine, "one")
                match how:
                    case "restore":
                        registry.up()
                        assert (await engine.restore("one")).state is State.RUNNING
                        assert await Box(engine, "one").text("hostname") == "one"
                        await asyncio.to_thread(hollow, engine, registry, layer)
                    case "delete":
                        await engine.delete("one")
                        with pytest.raises(NotFoundError):
                            await engine.get("one")
                    case _:
                        stopped = await engine.stop("one", force=how.endswith("force"))
                        assert (stopped.state, stopped.reason) == (State.STOPPED, "")
                        registry.up()
                assert not Path(f"/proc/{machine.pid}").exists()
                await asyncio.wait({task}, timeout=DEADLINE)
                assert task.exception()


async def test_what_cannot_start_says_what_it_waited_for(
    elsewhere: StateDir, registry: Unreliable, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(elsewhere) as engine, hearing(engine) as ear:
        await engine.pull(registry.name, lazy=True)
        registry.down()
        with monkeypatch.context() as patched, pytest.raises(AbsentError, match=f"one {WAITS} .*127.0.0.1"):
            patched.setattr("ramet.vm.machine.LOAD_DEADLINE", 20.0)
            patched.setattr("ramet.restoring.ANSWER_DEADLINE", 20.0)
            await engine.create_from(registry.name, "one")
        assert any(step.startswith(WAITS) for step in ear.steps("one"))
        assert await engine.list() == []
        registry.up()
        await engine.create_from(registry.name, "one")
        assert await Box(engine, "one").text("hostname") == "one"


async def test_a_disk_that_cannot_be_read_is_an_error_in_the_guest(elsewhere: StateDir, registry: Unreliable) -> None:
    async with lacking(elsewhere, registry, "one", disk=True) as engine, hearing(engine) as ear:
        async with reading(engine, "one", "/srv/noise") as task:
            assert "Input/output error" in await asyncio.wait_for(task, DEADLINE)
        await ear.until(lambda event: event.machine == "one" and "its disk could not be read" in event.reason)
        machine = await engine.get("one")
        assert machine.state is State.RUNNING
        assert "127.0.0.1" in machine.reason
        registry.up()
        assert await Box(engine, "one").text("echo 3 > /proc/sys/vm/drop_caches; cd /; sha256sum -c /srv/noise.sum") == "/srv/noise: OK"
        assert (await engine.get("one")).reason == machine.reason, "what the guest made of the error is not known"
        await engine.stop("one")
        assert (await engine.start("one")).reason == ""
