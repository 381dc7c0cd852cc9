"""Every verb, round trip: Client -> HTTP -> server -> a Verbs in memory."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from ramet.client import Client
from ramet.errors import (
    DaemonError,
    ExistsError,
    GuestNotFoundError,
    NotFoundError,
    OutcomeUnknownError,
    RametError,
    SpecError,
    UnauthorizedError,
)
from ramet.model import Channel, Command, Ending, Event, Exit, Lifecycle, Output, Port, ProcessEvent, Size, Spec, Started, State
from ramet.paths import StateDir
from tests.unit.memory import Memory, pair, serving, until

pytestmark = pytest.mark.unit

SPEC = Spec(name="m", cpus=2, memory=1 << 30, env={"A": "é"}, ports=(Port(guest=80),), lifecycle=Lifecycle(create="make"))


@pytest.fixture
def verbs() -> Memory:
    return Memory()


@pytest.fixture
async def client(verbs: Memory, tmp_path: Path) -> AsyncIterator[Client]:
    async with pair(verbs, tmp_path / "s") as made:
        await made.create(SPEC)
        yield made


async def collect(events: AsyncIterator[ProcessEvent]) -> list[ProcessEvent]:
    return [event async for event in events]


async def pieces(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


async def test_machines(client: Client, verbs: Memory) -> None:
    assert (await client.get("m")).spec == SPEC
    assert [m.name for m in await client.list()] == ["m"]
    assert (await client.start("m")).state is State.RUNNING
    await client.stop("m", force=True)
    assert verbs.seen == [("start", "m"), ("stop", "m", True)]
    assert (await client.info()).limits == ("no cgroups",)
    assert await client.metrics("m") == {"mem_total": 1.0, "load1": 0.5}
    assert await client.logs("m", source="qemu", lines=7) == b"m qemu 7\n\xff"
    assert await client.open_port("m", Port(guest=80)) == Port(guest=80, host=40000)
    await client.close_port("m", 80)
    await client.delete("m")
    assert await client.list() == []


async def test_run(client: Client, verbs: Memory) -> None:
    command = Command(argv=("x", ""), env={"E": "1"}, cwd="/tmp", user="u", timeout=1.5, label="l")
    result = await client.run("m", command)
    assert (result.status, result.stdout, result.stderr, result.duration) == (3, b"out\n", "é\n".encode(), 0.25)
    assert verbs.seen == [("run", command, b"")]


@pytest.mark.parametrize("data", [b"", b"text\r\n\0", "é😀".encode(), bytes(range(256)), b"\xff" * 300_000])
async def test_bytes_pass_run_unchanged(client: Client, data: bytes) -> None:
    result = await client.run("m", Command(argv=("cat",)), data)
    assert result.stdout == data
    assert result.truncated == 3


async def test_execute(client: Client, verbs: Memory) -> None:
    command = Command(argv=("echo", "a b"), env={"CODE": "7"}, pty=Size(rows=10, columns=20), detach=True)
    assert await collect(client.execute("m", command)) == [
        Started(process=1, pid=101),
        Output(channel=Channel.STDOUT, data=b"a b\n"),
        Output(channel=Channel.STDERR, data=b"done\n"),
        Exit(ending=Ending.EXITED, code=7),
    ]
    assert verbs.seen == [("execute", command)]
    assert verbs.killed == set()


async def test_input_output_and_signals(client: Client, verbs: Memory) -> None:
    events = client.execute("m", Command(argv=("cat",), stdin=True))
    started = await anext(events)
    assert isinstance(started, Started)
    assert [p.id for p in await client.processes("m")] == [started.process]
    await client.send_input("m", started.process, b"one")
    assert await anext(events) == Output(channel=Channel.STDOUT, data=b"one")
    await client.resize("m", started.process, 30, 90)
    await client.send_input("m", started.process, b"two", eof=True)
    assert await collect(events) == [Output(channel=Channel.STDOUT, data=b"two"), Exit(ending=Ending.EXITED, code=0)]
    assert ("resize", started.process, Size(rows=30, columns=90)) in verbs.seen
    await client.signal("m", 5, 15)
    await client.forget("m", 5)
    assert verbs.seen[-2:] == [("signal", 5, 15), ("forget", 5)]
    assert (await collect(client.attach("m", 5)))[1:] == [
        Output(channel=Channel.STDOUT, data=b"tail\n"),
        Exit(ending=Ending.SIGNALED, code=9),
    ]


async def test_files(client: Client, verbs: Memory) -> None:
    data = bytes(range(256)) * 2000
    await client.write_file("m", "/a b/ü", pieces(data[:7], data[7:]), mode=0o4750, offset=3, flags="ctr", user="u")
    assert verbs.seen == [("write", "/a b/ü", 0o4750, 3, "ctr", "u")]
    assert b"".join([part async for part in client.read_file("m", "/a b/ü")]) == data
    assert b"".join([part async for part in client.read_file("m", "/a b/ü", offset=250, length=10, user="v")]) == data[250:260]
    assert verbs.seen[-1] == ("read", "/a b/ü", 250, 10, "v")
    assert (await client.stat_file("m", "/a b/ü")).mode == 0o4750
    await client.rename_file("m", "/a b/ü", "/c&d=e")
    assert [f.name for f in await client.list_files("m", "/")] == ["c&d=e"]
    await client.remove_file("m", "/c&d=e", recursive=True, user="w")
    await client.make_dir("m", "/d", mode=0o1777, parents=False, user="w")
    assert verbs.seen[-2:] == [("remove", "/c&d=e", True, "w"), ("mkdir", "/d", 0o1777, False, "w")]
    await client.unpack("m", "/t", pieces(b"tar", b"tar"), owners=True, user="u")
    assert verbs.seen[-1] == ("unpack", "/t", True, "u")
    assert b"".join([part async for part in client.pack("m", "/t")]) == b"tartar"


async def test_empty_files(client: Client) -> None:
    await client.write_file("m", "/empty", pieces())
    assert [part async for part in client.read_file("m", "/empty")] == []


async def test_names_that_are_not_utf8(client: Client, verbs: Memory) -> None:
    name = b"/caf\xe9".decode(errors="surrogateescape")
    await client.write_file("m", name, pieces(b"x"))
    assert list(verbs.files) == [name]
    assert (await client.list_files("m", "/"))[0].name == name[1:]
    await client.rename_file("m", name, name + "2")
    assert list(verbs.files) == [name + "2"]


async def test_events(client: Client, verbs: Memory) -> None:
    events = client.events("")
    first = asyncio.ensure_future(anext(events))
    await until(lambda: verbs.listeners)
    verbs.tell(Event(at=1.0, kind="state", machine="m", state=State.FAILED, reason="why"))
    assert await first == Event(at=1.0, kind="state", machine="m", state=State.FAILED, reason="why")
    await events.aclose()  # type: ignore[attr-defined]
    await until(lambda: not verbs.listeners)


async def test_heartbeats_are_swallowed(verbs: Memory, tmp_path: Path) -> None:
    async with pair(verbs, tmp_path / "s", heartbeat=0.01) as client:
        first = asyncio.ensure_future(anext(client.events()))
        await until(lambda: verbs.listeners)
        await asyncio.sleep(0.1)
        assert not first.done()
        verbs.tell(Event(at=1.0, kind="removed", machine="m"))
        assert (await first).kind == "removed"


async def test_errors_keep_class_hint_and_details(client: Client) -> None:
    with pytest.raises(ExistsError) as caught:
        await client.create(SPEC)
    assert (caught.value.message, caught.value.hint) == ("m exists", "Choose another name.")
    with pytest.raises(NotFoundError) as missing:
        await client.get("nobody")
    assert missing.value.details == {"name": "nobody"}
    with pytest.raises(GuestNotFoundError):
        await client.run("m", Command(argv=("missing",)))
    with pytest.raises(GuestNotFoundError):
        await collect(client.execute("m", Command(argv=("missing",))))
    with pytest.raises(GuestNotFoundError):
        await anext(client.read_file("m", "/nowhere"))
    with pytest.raises(RametError, match="RuntimeError") as internal:
        await client.run("m", Command(argv=("broken",)))
    assert type(internal.value) is RametError


async def test_errors_after_the_answer_began(client: Client, verbs: Memory) -> None:
    events = client.execute("m", Command(argv=("dies",)))
    assert isinstance(await anext(events), Started)
    assert await anext(events) == Output(channel=Channel.STDOUT, data=b"so far\n")
    with pytest.raises(GuestNotFoundError, match="the guest is gone") as caught:
        await anext(events)
    assert (caught.value.hint, caught.value.details) == ("h", {"errno": "EIO"})
    with pytest.raises(RametError, match="RuntimeError"):
        await collect(client.execute("m", Command(argv=("bug",))))
    verbs.files["/torn"] = (b"half", 0)
    with pytest.raises(GuestNotFoundError, match="torn"):
        async for _ in client.read_file("m", "/torn"):
            pass


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../machines"])
async def test_names_that_would_be_another_route(client: Client, name: str) -> None:
    with pytest.raises(SpecError):
        await client.delete(name)


async def test_a_wrong_token(client: Client, verbs: Memory, tmp_path: Path) -> None:
    async with serving(verbs, tmp_path / "t") as url, Client(url, "wrong") as stranger:
        with pytest.raises(UnauthorizedError) as caught:
            await stranger.list()
        assert "RAMET_TOKEN" in caught.value.hint


async def test_no_daemon(tmp_path: Path) -> None:
    async with Client(f"unix://{tmp_path}/nobody", "t") as client:
        with pytest.raises(DaemonError, match="cannot reach"):
            await client.list()
    with pytest.raises(SpecError):
        Client("ftp://x", "t")


async def test_discover(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAMET_URL", raising=False)
    monkeypatch.delenv("RAMET_TOKEN", raising=False)
    state = StateDir(root=tmp_path)
    with pytest.raises(DaemonError, match="no daemon runs"):
        Client.discover(state)
    state.daemon.write_text('{"pid": 1}')
    state.token.write_text("t\n")
    with pytest.raises(DaemonError, match="cannot tell"):
        Client.discover(state)
    state.daemon.write_text('{"pid": 1, "url": "http://127.0.0.1:1"}')
    assert Client.discover(state).url == "http://127.0.0.1:1"
    monkeypatch.setenv("RAMET_URL", "http://localhost:2")
    assert Client.discover(state).url == "http://localhost:2"
    monkeypatch.setenv("RAMET_URL", "http://elsewhere:1")
    with pytest.raises(DaemonError, match="RAMET_TOKEN is not set"):  # ours is not sent elsewhere
        Client.discover(state)
    monkeypatch.setenv("RAMET_TOKEN", "theirs")
    assert Client.discover(state).url == "http://elsewhere:1"


@contextlib.asynccontextmanager
async def dropping(path: Path, answer: bytes) -> AsyncIterator[Client]:
    """A peer that reads a request, answers these bytes and hangs up."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(65536)
        writer.write(answer)
        await writer.drain()
        writer.close()

    server = await asyncio.start_unix_server(serve, path)
    async with server, Client(f"unix://{path}", "t") as client:
        yield client


STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/vnd.docker.multiplexed-stream\r\ntransfer-encoding: chunked\r\n\r\n"


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{"])
async def test_a_line_that_breaks(tmp_path: Path, answer: bytes) -> None:
    async with dropping(tmp_path / "d", answer) as client:
        with pytest.raises(OutcomeUnknownError, match="`x`"):
            await client.run("m", Command(argv=("x",)))
        with pytest.raises(DaemonError):
            await client.list()


@pytest.mark.parametrize("rest", [b"", b"0\r\n\r\n", b"c\r\n\x01\0\0\0\0\0\0\x04text\r\n", b"c\r\n\x01\0\0\0\0\0\0\x04text\r\n0\r\n\r\n"])
async def test_a_stream_that_breaks_before_its_exit(tmp_path: Path, rest: bytes) -> None:
    async with dropping(tmp_path / "d", STREAM_HEAD + rest) as client:
        with pytest.raises(OutcomeUnknownError):
            await collect(client.execute("m", Command(argv=("x",))))


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi",
        b"HTTP/1.1 502 Bad\r\ncontent-length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}",
        STREAM_HEAD + b"8\r\n\x09\0\0\0\0\0\0\x04\r\n",
    ],
)
async def test_a_peer_that_is_no_daemon(tmp_path: Path, answer: bytes) -> None:
    async with dropping(tmp_path / "d", answer) as client:
        with pytest.raises(DaemonError):
            await collect(client.execute("m", Command(argv=("x",)))) if b"docker" in answer else await client.info()


async def test_an_endless_upload_that_is_refused_ends(client: Client, verbs: Memory) -> None:
    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield bytes(65536)

    with pytest.raises(GuestNotFoundError, match="no space"):
        await asyncio.wait_for(client.write_file("m", "/full", endless()), 60)
    assert verbs.advanced == 1


async def test_connections_are_used_again(client: Client, verbs: Memory) -> None:
    for _ in range(20):
        await client.run("m", Command(argv=("x",)))
        await collect(client.execute("m", Command(argv=("echo",))))
    assert len(client._http._transport._pool.connections) == 1  # type: ignore[attr-defined]


async def test_many_at_once(client: Client) -> None:
    streams = [client.execute("m", Command(argv=("cat",), stdin=True)) for _ in range(150)]
    started = [await anext(stream) for stream in streams]
    await asyncio.gather(*(client.send_input("m", s.process, b"x", eof=True) for s in started if isinstance(s, Started)))
    ended = await asyncio.gather(*(collect(stream) for stream in streams))
    assert all(isinstance(events[-1], Exit) for events in ended)
