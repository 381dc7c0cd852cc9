"""The real agent on a socket, beside an ordinary system: what being quiet means for its streams and for its processes."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import random
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from ramet import agentwire as wire
from ramet import binaries, sockets
from ramet.agentwire import EndKind, Frame, Kind, Op, OpenFlag, Tag
from ramet.errors import GuestError, HostError, MachineFailedError, OutcomeUnknownError
from ramet.guest import Guest, Identity, Stream
from ramet.model import Command, Ending, Exit, Output, Process, Started
from ramet.paths import cache_dir
from tests.unit.fakeagent import DEADLINE

MOMENT = 0.3  # in which an agent that is not quiet would have said something


@pytest_asyncio.fixture
async def agent(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The program."""
    monkeypatch.setenv("RAMET_CACHE", os.environ.get("RAMET_TEST_CACHE") or str(cache_dir()))
    try:
        return (await binaries.ensure()).agent
    except HostError as error:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(error.message)


@contextlib.contextmanager
def running(agent: Path, end: socket.socket) -> Iterator[None]:
    """The agent on one end of a line; it goes with the other end."""
    process = subprocess.Popen([agent, "--fd", str(end.fileno())], pass_fds=[end.fileno()], stdout=subprocess.DEVNULL)
    end.close()
    try:
        yield
    finally:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(DEADLINE)
        process.kill()
        process.wait()


class Host:
    """A host that says what a test wants, and sees every frame. gate: a file; scripts that begin with `waiting` go on when it is there."""

    def __init__(self, line: socket.socket, gate: Path) -> None:
        self.line = line
        self.gate = gate
        self.waiting = f"until [ -e {gate} ]; do sleep 0.02; done; "
        self.nonce = os.urandom(wire.NONCE)
        self.decoder = wire.Decoder(self.nonce)
        self.frames: list[Frame] = []
        self.pids: dict[int, int] = {}  # of the agent's processes

    def send(self, data: bytes) -> None:
        self.line.sendall(data)

    def open(self, stream: int, op: Op, *params: bytes, flags: int = 0) -> None:
        self.send(wire.open_frames(stream, op, flags, params))

    def sync(self, *, behind: bytes = b"") -> None:
        """Begin anew as another host would."""
        self.nonce = os.urandom(wire.NONCE)
        self.decoder = wire.Decoder(self.nonce)
        self.send(wire.frame(Kind.SYNC, 0, self.nonce) + behind)
        assert wire.parse_sync(self.next().payload)[1]

    def next(self, timeout: float = DEADLINE) -> Frame:
        self.line.settimeout(timeout)
        while not self.frames:
            data = self.line.recv(1 << 16)
            assert data
            self.frames += self.decoder.feed(data)
        return self.frames.pop(0)

    def end(self, stream: int) -> tuple[wire.End, bytes]:
        """What a stream says until its END; other streams' frames are dropped."""
        said = b""
        while True:
            frame = self.next()
            if frame.stream == stream and frame.kind is Kind.DATA:
                said += frame.payload
            elif frame.stream == stream and frame.kind is Kind.END:
                return wire.parse_end(frame.payload), said

    def until(self, stream: int, kind: Kind) -> Frame:
        while (frame := self.next()).stream != stream or frame.kind is not kind:
            pass
        return frame

    def call(self, stream: int, op: Op, *params: bytes) -> tuple[wire.End, bytes]:
        self.open(stream, op, *params)
        return self.end(stream)

    def shell(self, stream: int, script: str, *params: bytes, flags: int = 0) -> int:
        """Start a script; returns its process id."""
        args = [wire.param(Tag.ARG, arg) for arg in ("sh", "-c", script)]
        self.open(stream, Op.EXEC, *args, *params, flags=flags)
        process, pid = wire.parse_pair(self.until(stream, Kind.STARTED).payload)
        self.pids[process] = pid
        return process

    def gone(self, process: int) -> None:
        """Wait until a process has ended and was reaped."""
        deadline = time.monotonic() + DEADLINE
        while Path(f"/proc/{self.pids[process]}").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def quiesce(self, stream: int) -> None:
        """END is the last thing that comes."""
        assert self.call(stream, Op.QUIESCE)[0] == wire.End(EndKind.EXITED, 0, "")
        assert not self.frames
        self.silent()

    def silent(self) -> None:
        with pytest.raises(TimeoutError):
            self.next(MOMENT)

    def processes(self, stream: int) -> dict[int, Process]:
        return {each.id: each for each in wire.parse_processes(self.call(stream, Op.LIST)[1])}


@pytest.fixture
def host(agent: Path, tmp_path: Path) -> Iterator[Host]:
    near, far = socket.socketpair()
    with near, running(agent, far):
        made = Host(near, tmp_path / "gate")
        made.sync()
        yield made
        near.close()


# --- quiet ---


def test_a_quiet_agent_says_nothing_and_loses_nothing(host: Host) -> None:
    host.shell(1, "for i in $(seq 2000); do echo $i; done; exec sleep 60")
    host.shell(2, "cat; exit 5", flags=OpenFlag.STDIN)
    host.quiesce(3)
    assert host.call(4, Op.RESUME)[0] == wire.End(EndKind.EXITED, 0, "")
    host.send(wire.frame(Kind.DATA, 2, b"to stdin") + wire.frame(Kind.EOF, 2))
    assert host.end(2) == (wire.End(EndKind.EXITED, 5, ""), b"to stdin")


def test_output_waits_in_its_pipe_and_ends_wait_too(host: Host) -> None:
    host.shell(1, "read line; echo $line; exit 7", flags=OpenFlag.STDIN)
    late = host.shell(2, f"{host.waiting}echo late; exit 3")
    host.quiesce(3)
    host.gate.touch()  # both what was written and the exit fall into the quiet
    host.gone(late)
    host.silent()
    host.send(wire.open_frames(4, Op.RESUME, 0, ()) + wire.frame(Kind.DATA, 1, b"line\n"))
    ends: dict[int, wire.End] = {}
    said = {1: b"", 2: b"", 4: b""}
    while len(ends) < 3:
        frame = host.next()
        if frame.kind is Kind.END:
            ends[frame.stream] = wire.parse_end(frame.payload)
        elif frame.kind is Kind.DATA:
            said[frame.stream] += frame.payload
    assert {stream: end.code for stream, end in ends.items()} == {1: 7, 2: 3, 4: 0}
    assert said == {1: b"line\n", 2: b"late\n", 4: b""}


def test_a_deadline_passes_while_it_is_quiet(host: Host) -> None:
    process = host.shell(1, "exec sleep 60", wire.param(Tag.TIMEOUT, 3000))
    host.quiesce(2)
    host.gone(process)
    host.silent()
    host.open(3, Op.RESUME)
    assert host.end(1)[0].kind is EndKind.TIMEOUT


def test_resume_without_quiet_and_quiet_twice(host: Host) -> None:
    assert host.call(1, Op.RESUME)[0].kind is EndKind.EXITED
    host.send(
        b"".join(
            wire.open_frames(i, op, 0, ()) for i, op in ((2, Op.QUIESCE), (3, Op.RESUME), (4, Op.QUIESCE), (5, Op.RESUME), (6, Op.PING))
        )
    )
    assert [host.next().stream for _ in range(5)] == [2, 3, 4, 5, 6]


def test_a_detached_process_goes_on_and_what_it_wrote_is_kept(host: Host) -> None:
    process = host.shell(1, f"{host.waiting}echo written while quiet; exit 4", flags=OpenFlag.DETACH)
    host.send(wire.frame(Kind.CLOSE, 1))
    host.quiesce(2)
    host.gate.touch()
    host.gone(process)
    assert host.call(3, Op.RESUME)[0].code == 0
    end, said = host.call(4, Op.ATTACH, wire.param(Tag.PROCESS, process))
    assert (end.code, said) == (4, b"written while quiet\n")


# --- another host ---


def test_another_host_finds_what_was_attached_detached(host: Host) -> None:
    talking = host.shell(1, f"{host.waiting}echo still here; read line; echo got $line; exit 9", flags=OpenFlag.STDIN)
    ended = host.shell(2, f"{host.waiting}echo last words; exit 3")
    host.quiesce(3)
    host.gate.touch()
    host.gone(ended)
    host.sync()
    found = host.processes(1)
    assert set(found) == {talking, ended}
    assert all(each.detached and not each.attached for each in found.values())
    assert (found[talking].state, found[ended].state, found[ended].code) == ("running", "exited", 3)
    assert host.call(2, Op.ATTACH, wire.param(Tag.PROCESS, ended)) == (wire.End(EndKind.EXITED, 3, ""), b"last words\n")
    host.open(3, Op.ATTACH, wire.param(Tag.PROCESS, talking))
    assert host.until(3, Kind.DATA).payload == b"still here\n"
    host.send(wire.frame(Kind.DATA, 3, b"it\n"))
    assert host.end(3) == (wire.End(EndKind.EXITED, 9, ""), b"got it\n")


def test_a_sync_that_was_not_announced_still_kills(host: Host) -> None:
    process = host.shell(1, "exec sleep 60")
    host.sync()
    assert process not in host.processes(1)


def test_the_quiet_ends_with_the_sync(host: Host) -> None:
    host.shell(1, "exec sleep 60")
    host.quiesce(2)
    host.sync()
    process = host.shell(1, "exec sleep 60")
    host.sync()  # of a host that did not ask for quiet: what it started ends
    assert list(host.processes(1)) == [process - 1]


def test_half_a_file_operation_does_not_wait_for_ever(host: Host, tmp_path: Path) -> None:
    target = tmp_path / "file"
    args = [wire.param(Tag.ARG, arg) for arg in ("write", str(target), "0", "644", "cr")]
    host.open(1, Op.EXEC, *args, flags=OpenFlag.STDIN | OpenFlag.BUILTIN)
    process, host.pids[process] = wire.parse_pair(host.until(1, Kind.STARTED).payload)
    host.send(wire.frame(Kind.DATA, 1, b"half"))
    assert host.processes(2) == {}  # it is nobody's program
    host.quiesce(3)
    host.sync()
    host.gone(process)
    assert list(tmp_path.iterdir()) == []


def test_connections_close(host: Host) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        host.open(1, Op.DIAL, wire.param(Tag.PORT, server.getsockname()[1]))
        accepted, _ = server.accept()
        with accepted:
            host.until(1, Kind.STARTED)
            host.quiesce(2)
            accepted.send(b"waits")
            host.silent()
            host.sync()
            accepted.settimeout(DEADLINE)
            with contextlib.suppress(ConnectionResetError):  # for what it did not read
                assert accepted.recv(100) == b""


@pytest.mark.parametrize(
    "sent",
    [wire.open_frames(9, Op.PING, 0, ()), wire.frame(Kind.DATA, 1, b"x"), wire.credit(1, 1, 5), b"\xee" * 40],
    ids=["ping", "data", "credit", "junk"],
)
def test_anything_else_ends_the_quiet_without_a_word_and_kills_nothing(host: Host, sent: bytes) -> None:
    process = host.shell(1, "exec sleep 60")
    host.quiesce(2)
    host.send(sent)
    host.silent()
    host.send(wire.RESYNC)
    host.sync()
    assert host.processes(1)[process].state == "running"


def test_identify_right_behind_the_sync_and_beside_an_ordinary_system(host: Host) -> None:
    before = (socket.gethostname(), Path("/etc/machine-id").exists() and Path("/etc/machine-id").read_text())
    host.shell(1, "exec sleep 60")
    host.quiesce(2)
    identity = Identity(hostname="somebody-else", machine_id="0" * 31 + "1", generation="01234567-89ab-4def-8123-456789abcdef")
    host.sync(behind=wire.open_frames(1, Op.IDENTIFY, 0, identity.params()))
    end, _ = host.end(1)
    assert (end.kind, end.code) == (EndKind.FAILED, errno.EPERM)
    assert before == (socket.gethostname(), Path("/etc/machine-id").exists() and Path("/etc/machine-id").read_text())
    end, _ = host.call(2, Op.IDENTIFY, wire.param(Tag.HOSTNAME, "-"))
    assert end == wire.End(EndKind.FAILED, errno.EINVAL, "not a hostname")
    end, _ = host.call(3, Op.IDENTIFY, wire.param(Tag.ENTROPY, bytes(513)))
    assert end.code == errno.EPROTO


@pytest.mark.parametrize("seed", range(6))
def test_streams_are_unharmed_however_often_it_is_quiet(host: Host, seed: int) -> None:
    chance = random.Random(seed)
    host.shell(1, "read line; seq 40000; exit 2", flags=OpenFlag.STDIN)
    host.shell(2, "cat", flags=OpenFlag.STDIN)
    host.send(wire.frame(Kind.DATA, 1, b"go\n"))
    meant = bytes(chance.randrange(256) for _ in range(300_000))
    said = {1: b"", 2: b""}
    ends: dict[int, int] = {}
    waiting = b""  # what must not be sent while it is quiet
    asked, fed, credit = 3, 0, wire.WINDOW
    quiet = False
    while len(ends) < 2:
        if not quiet:
            piece = meant[fed : fed + min(credit, chance.randint(0, 20_000))]
            fed, credit = fed + len(piece), credit - len(piece)
            waiting += wire.frame(Kind.DATA, 2, piece) if piece else b""
            waiting += wire.frame(Kind.EOF, 2) if piece and fed == len(meant) else b""
            quiet = chance.random() < 0.3
            host.send(waiting + (wire.open_frames(asked, Op.QUIESCE, 0, ()) if quiet else b""))
            waiting = b""
        frame = host.next()
        match frame.kind:
            case Kind.DATA:
                said[frame.stream] += frame.payload
                waiting += wire.credit(frame.stream, frame.flags, len(frame.payload))
            case Kind.CREDIT:
                credit += wire.parse_credit(frame.payload)
            case Kind.END if frame.stream == asked:
                assert not host.frames
                if chance.random() < 0.1:
                    host.silent()
                host.open(asked + 1, Op.RESUME)
                asked, quiet = asked + 2, False
            case Kind.END if frame.stream in said:
                ends[frame.stream] = wire.parse_end(frame.payload).code
    assert ends == {1: 2, 2: 0}
    assert said == {1: "".join(f"{i}\n" for i in range(1, 40001)).encode(), 2: meant}


@contextlib.contextmanager
def unanswering() -> Iterator[socket.socket]:
    """A listening socket whose queue is full: whoever connects waits."""
    with contextlib.ExitStack() as stack:
        full = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(2):
            client = stack.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(full.getsockname())
        yield full


def test_a_connection_that_never_comes_ends_at_its_deadline(host: Host) -> None:
    with unanswering() as full:
        end, _ = host.call(1, Op.DIAL, wire.param(Tag.PORT, full.getsockname()[1]), wire.param(Tag.TIMEOUT, 200))
    assert end.code == errno.ETIMEDOUT


@pytest.mark.parametrize("refused", [False, True])
def test_a_connection_that_fails_while_it_is_quiet(host: Host, refused: bool) -> None:
    with unanswering() as full:
        params = [wire.param(Tag.PORT, full.getsockname()[1]), *([] if refused else [wire.param(Tag.TIMEOUT, 3000)])]
        host.open(1, Op.DIAL, *params)
        host.quiesce(2)
        if refused:
            full.close()
        with pytest.raises(TimeoutError):
            host.next(1.5 if refused else 4.5)  # the next SYN goes out after one second
        host.open(3, Op.RESUME)
        assert host.end(1)[0].code == (errno.ECONNREFUSED if refused else errno.ETIMEDOUT)


# --- the two halves together ---


@contextlib.asynccontextmanager
async def reached(agent: Path, directory: Path) -> AsyncIterator[Guest]:
    """A Guest whose line is open and that has said nothing."""
    path = directory / "agent.sock"
    with sockets.listen(path) as listening:
        guest = await Guest.reach(path)
        end, _ = listening.accept()
    with running(agent, end):
        try:
            yield guest
        finally:
            guest.abort("the test ended")
            await asyncio.sleep(0)  # the transport closes


@contextlib.asynccontextmanager
async def connected(agent: Path, directory: Path) -> AsyncIterator[Guest]:
    async with reached(agent, directory) as guest:
        guest.greet(resync=False)
        await guest.answered(DEADLINE)
        yield guest


async def collect(stream: Stream) -> tuple[bytes, Exit]:
    said = b""
    async with asyncio.timeout(DEADLINE), contextlib.aclosing(stream.events()) as events:
        async for event in events:
            if isinstance(event, Output):
                said += event.data
            elif isinstance(event, Exit):
                return said, event
    raise AssertionError


async def test_a_guest_that_cannot_take_its_identity_is_not_connected_to(agent: Path, tmp_path: Path) -> None:
    async with reached(agent, tmp_path) as guest:
        guest.greet(resync=False, identity=Identity(hostname="somebody-else"))
        with pytest.raises(MachineFailedError, match="did not take its new identity: this system is not the agent's own") as caught:
            await guest.answered(DEADLINE)
        assert caught.value.details == {"errno": "EPERM"}
        assert guest.closed.done()


async def test_what_is_asked_while_it_is_quiet_is_done_afterwards(agent: Path, tmp_path: Path) -> None:
    async with connected(agent, tmp_path) as guest:
        cat = guest.execute(Command(argv=("cat",), stdin=True))
        assert isinstance(await cat.next(), Started)
        for round_ in range(20):
            await guest.quiesce(DEADLINE)
            command = guest.execute(Command(argv=("echo", str(round_))))
            calls: list[Awaitable[object]] = [cat.write(b"%d" % round_), guest.ping(), guest.processes(), collect(command)]
            tasks: list[asyncio.Future[object]] = [asyncio.ensure_future(call) for call in calls]
            assert not (await asyncio.wait(tasks, timeout=0.02))[0]
            await guest.resume(DEADLINE)
            results = await asyncio.wait_for(asyncio.gather(*tasks), DEADLINE)
            assert results[-1] == (b"%d\n" % round_, Exit(ending=Ending.EXITED, code=0))
        cat.eof()
        assert await collect(cat) == (b"".join(b"%d" % i for i in range(20)), Exit(ending=Ending.EXITED, code=0))


async def test_a_flood_goes_on_after_each_quiet(agent: Path, tmp_path: Path) -> None:
    async with connected(agent, tmp_path) as guest:
        flood = asyncio.ensure_future(collect(guest.execute(Command(argv=("sh", "-c", "seq 300000")))))
        for _ in range(30):
            await guest.quiesce(DEADLINE)
            await guest.resume(DEADLINE)
        said, end = await flood
        assert end.code == 0
        assert said == "".join(f"{i}\n" for i in range(1, 300001)).encode()


async def test_hooks_of_a_system_that_has_none(agent: Path, tmp_path: Path) -> None:
    if Path(wire.HOOKS).exists():
        pytest.skip(f"this system has {wire.HOOKS}, whose programs no test may run")
    async with connected(agent, tmp_path) as guest:
        await guest.run_hooks("01234567-89ab-4def-8123-456789abcdef", "child", DEADLINE)


async def test_the_memory_of_another_system_is_left_alone(agent: Path, tmp_path: Path) -> None:
    async with connected(agent, tmp_path) as guest:
        calls: list[Awaitable[object]] = [guest.reclaim(4096), guest.tune({"min_age": 5, "enabled": 1}), guest.slim(DEADLINE)]
        for call in calls:
            with pytest.raises(GuestError, match="this system is not the agent's own"):
                await call
        metrics = await guest.metrics()
        assert 0 < metrics["mem_reclaimable"] < metrics["mem_total"]
        assert metrics["mem_refaulted"] >= 0
        assert "damon_reclaimed" not in metrics


async def test_an_agent_that_dies_while_quiet(agent: Path, tmp_path: Path) -> None:
    async with connected(agent, tmp_path) as guest:
        stream = guest.execute(Command(argv=("sleep", "60")))
        await guest.quiesce(DEADLINE)
        pinging = asyncio.ensure_future(guest.ping())
        await asyncio.sleep(0)
        guest.abort("gone")
        with pytest.raises(OutcomeUnknownError):
            await collect(stream)
        with pytest.raises(MachineFailedError):
            await pinging
        with pytest.raises((MachineFailedError, OutcomeUnknownError)):
            await guest.resume()
