"""The SDK's faces, over a `Verbs` in memory: directly, and through HTTP for the one without an event loop."""

from __future__ import annotations

import asyncio
import inspect
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

import ramet
from ramet import aio, filesystem, sdk, streams
from ramet.aio import AsyncMachine
from ramet.errors import GuestError, GuestNotFoundError, NotFoundError, OutcomeUnknownError, SpecError
from ramet.model import Channel, Drive, Ending, Exit, Output, ProcessEvent, Started, State
from ramet.sdk import Machine
from tests.unit.memory import TOKEN, Memory, beside


@pytest.fixture
def verbs() -> Memory:
    return Memory()


@pytest.fixture
async def machine(verbs: Memory) -> AsyncMachine:
    return await AsyncMachine.create("m", memory="1G", ports=["8000:80"], drives=["data:2G:/data"], verbs=verbs)


async def test_machines(verbs: Memory, machine: AsyncMachine) -> None:
    assert (machine.name, machine.state, machine.record.spec.memory) == ("m", State.RUNNING, 1 << 30)
    assert machine.record.spec.ports[0].host == 8000
    assert machine.record.spec.drives == (Drive(name="data", size=2 << 30, mount="/data"),)
    assert [each.name for each in await AsyncMachine.list(verbs=verbs)] == ["m"]
    with pytest.raises(NotFoundError):
        await AsyncMachine.get("nobody", verbs=verbs)
    with pytest.raises(SpecError, match="memory"):
        await AsyncMachine.create("x", memory="1 parsec", verbs=verbs)
    await machine.stop(force=True)
    await machine.power_on()
    assert verbs.seen == [("stop", "m", True), ("start", "m")]
    assert (await machine.metrics())["load1"] == 0.5
    await machine.delete()
    assert verbs.machines == {}


async def test_run(verbs: Memory, machine: AsyncMachine) -> None:
    assert (await machine.run(["cat"], stdin="héllo")).text == "héllo"
    await machine.run("a | b", env={"A": "1"}, cwd="/c", user="u", timeout=3)
    command = verbs.seen[-1][1]
    assert (command.argv, command.env, command.cwd, command.user, command.timeout) == (("sh", "-c", "a | b"), {"A": "1"}, "/c", "u", 3)  # type: ignore[attr-defined]
    with pytest.raises(GuestError, match="status 3: é") as caught:
        await machine.run("x", check=True)
    assert caught.value.details["status"] == 3


async def test_a_process(verbs: Memory, machine: AsyncMachine) -> None:
    async with await machine.start(["cat"], stdin=True) as process:
        assert [p.id for p in await machine.processes()] == [process.id]
        await process.stdin.write("x" * 600_000)
        await process.stdin.write(b"\nend")
        await process.stdin.close()
        assert len(await process.stdout.read()) == 600_004
        assert await process.wait() == process.exit == Exit(ending=Ending.EXITED, code=0)
    assert verbs.killed == set()


async def test_lines(machine: AsyncMachine) -> None:
    process = await machine.start(["cat"], stdin=True)
    for part in ("on", "e\ntwo\r\nthr", "ee\n\n", "é"):
        await process.stdin.write(part)
    await process.stdin.close()
    assert [line async for line in process.stdout.lines()] == ["one", "two", "three", "", "é"]


async def test_listeners(machine: AsyncMachine) -> None:
    heard: list[bytes] = []

    async def slow(data: bytes) -> None:
        await asyncio.sleep(0)
        heard.append(data)

    process = await machine.start(["echo", "a"], on_stdout=slow, on_stderr=heard.append)
    assert (await process.wait()).status == 0
    assert heard == [b"a\n", b"done\n"]
    assert await process.stdout.read() == b""


async def test_a_listener_that_fails(verbs: Memory, machine: AsyncMachine) -> None:
    def fail(data: bytes) -> None:
        raise ValueError("mine")

    process = await machine.start(["yes"], on_stdout=fail)
    with pytest.raises(ValueError, match="mine"):
        await process.wait()
    assert verbs.killed == {process.id}


async def test_leaving_kills(verbs: Memory, machine: AsyncMachine) -> None:
    async with await machine.start(["sleep"]) as process:
        with pytest.raises(TimeoutError):
            await process.wait(0.01)
    assert verbs.killed == {process.id}
    with pytest.raises(OutcomeUnknownError):
        await process.wait()


async def test_signals(machine: AsyncMachine) -> None:
    process = await machine.start(["sleep"])
    await process.signal(signal.SIGTERM)
    assert await process.wait() == Exit(ending=Ending.SIGNALED, code=15)
    again = await machine.start(["sleep"])
    await again.kill()
    assert (await again.wait()).status == 137


async def test_what_cannot_start(machine: AsyncMachine) -> None:
    with pytest.raises(GuestNotFoundError):
        await machine.start(["missing"])


async def test_an_error_halfway(machine: AsyncMachine) -> None:
    process = await machine.start(["dies"])
    seen = b""
    with pytest.raises(GuestNotFoundError, match="the guest is gone"):
        async for part in process.stdout:
            seen += part
    assert seen == b"so far\n"
    with pytest.raises(GuestNotFoundError):
        await process.wait()


async def test_what_nobody_reads_is_bounded(verbs: Memory, machine: AsyncMachine) -> None:
    async def much() -> AsyncIterator[ProcessEvent]:
        yield Started(process=1, pid=1)
        for _ in range(100):
            yield Output(channel=Channel.STDERR, data=bytes(64 << 10))
        yield Output(channel=Channel.STDOUT, data=b"last")
        yield Exit(ending=Ending.EXITED, code=0)

    process = await streams.AsyncProcess.open(verbs, "m", much())
    await process.wait()
    assert process.stderr.dropped == 84 * 65536
    assert len(await process.stderr.read()) == 1 << 20
    assert await process.stdout.read() == b"last"


async def test_a_slow_reader_holds_the_process(verbs: Memory, machine: AsyncMachine) -> None:
    process = await machine.start(["yes"])
    async for _ in process.stdout:
        await asyncio.sleep(0.05)
        if verbs.advanced > 30:
            break
    before = verbs.advanced
    reading = aiter(process.stdout)
    await anext(reading)
    for _ in range(50):
        await asyncio.sleep(0.001)
    assert verbs.advanced - before < 100  # it stands still with its MiB full
    assert process.stdout.dropped < 1 << 30
    await reading.aclose()  # type: ignore[attr-defined]
    await process.close()


async def test_attach(machine: AsyncMachine) -> None:
    process = await machine.attach(5)
    assert (await process.stdout.read(), (await process.wait()).status) == (b"tail\n", 137)


async def test_terminal(verbs: Memory, machine: AsyncMachine) -> None:
    async with await machine.terminal(30, 100) as terminal:
        command = verbs.seen[-1][1]
        assert (command.pty.rows, command.pty.columns, command.env["TERM"]) == (30, 100, "xterm-256color")  # type: ignore[attr-defined]
        await terminal.write("hi")
        assert await anext(aiter(terminal.stdout)) == b"<hi>"
        await terminal.resize(10, 20)
        await terminal.write("exit\n")
        assert (await terminal.wait()).status == 7


# files


async def test_files(verbs: Memory, machine: AsyncMachine) -> None:
    files = machine.files
    await files.write("/a", "text", mode=0o600)
    assert verbs.seen[-1] == ("write", "/a", 0o600, 0, "ctp", "")
    await files.write("/a", b"more", append=True, user="u")
    assert verbs.seen[-1] == ("write", "/a", 0o644, 0, "cap", "u")
    await files.write("/a", b"new", atomic=True)
    assert verbs.seen[-1][4] == "ctpr"
    assert await files.read("/a") == b"new"
    assert await files.read("/a", offset=1, length=1) == b"e"
    assert await files.read_text("/a") == "new"
    assert await files.exists("/a")
    assert not await files.exists("/b")
    assert not await files.is_dir("/a")
    await files.rename("/a", "/b")
    assert [info.name for info in await files.list("/")] == ["b"]
    await files.remove("/b", recursive=True)
    await files.make_dir("/d")
    assert verbs.seen[-2:] == [("remove", "/b", True, ""), ("mkdir", "/d", 0o755, True, "")]


async def test_a_file_in_and_out(machine: AsyncMachine, tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(b"x" * 700_000)
    (tmp_path / "in").chmod(0o4755)
    seen: list[tuple[int, int | None]] = []
    await machine.files.upload(tmp_path / "in", "/f", progress=lambda done, total: seen.append((done, total)))
    report = await machine.files.download("/f", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == b"x" * 700_000
    assert (tmp_path / "out").stat().st_mode & 0o7777 == 0o755
    assert (report.files, report.size) == (1, 700_000)
    assert seen[-1] == (700_000, 700_000)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]


async def test_a_download_that_breaks_leaves_what_was_there(verbs: Memory, machine: AsyncMachine, tmp_path: Path) -> None:
    (tmp_path / "f").write_text("old")
    verbs.files["/torn"] = (b"half", 0o644)
    with pytest.raises(GuestNotFoundError, match="torn"):
        await machine.files.download("/torn", tmp_path / "f")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("f", "old")]


async def test_a_tree_in(verbs: Memory, machine: AsyncMachine, tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    (tmp_path / "t/f").write_text("x")
    await machine.files.upload(tmp_path / "t", "/t", user="u")
    assert verbs.seen[-1] == ("unpack", "/t", False, "u")
    assert len(verbs.files["/t"][0]) == 4 * 512 + 1024 - 512


# without an event loop


@pytest.fixture
def sync(verbs: Memory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    with beside(verbs, tmp_path / "s") as url:
        monkeypatch.setenv("RAMET_URL", url)
        monkeypatch.setenv("RAMET_TOKEN", TOKEN)
        yield ramet.Machine.create("m")
        sdk.close()


def test_the_sync_face(sync: Machine, verbs: Memory, tmp_path: Path) -> None:
    assert [machine.name for machine in Machine.list()] == [sync.name] == ["m"]
    assert Machine.get("m").run(["cat"], stdin="hi").text == "hi"
    with sync.start(["cat"], stdin=True) as process:
        process.stdin.write("a\nb\n")
        process.stdin.close()
        assert list(process.stdout.lines()) == ["a", "b"]
        assert process.wait().status == 0
    with sync.start(["echo", "x"]) as process:
        assert b"".join(process.stdout) == b"x\n"
    with sync.start(["sleep"]) as process, pytest.raises(TimeoutError):
        process.wait(0.05)
    sync.files.write("/f", "data")
    assert b"".join(sync.files.stream("/f")) == b"data" == sync.files.read("/f")
    with pytest.raises(GuestNotFoundError):
        sync.files.read("/nowhere")
    with sync.terminal() as terminal:
        terminal.write("exit")
        assert terminal.wait().code == 7
    sync.delete()
    assert verbs.machines == {}


@pytest.mark.parametrize(
    ("face", "original"),
    [
        (sdk.Machine, aio.AsyncMachine),
        (sdk.Files, filesystem.AsyncFiles),
        (sdk.Process, streams.AsyncProcess),
        (sdk.Terminal, streams.AsyncTerminal),
        (sdk.Output, streams.AsyncOutput),
        (sdk.Input, streams.AsyncInput),
    ],
)
def test_both_faces_have_the_same_methods(face: type, original: type) -> None:
    inside = {"put", "end", "open"}  # for those who make them

    def public(kind: type) -> set[str]:
        return {name for name in dir(kind) if not name.startswith("_")}

    assert public(original) - inside <= public(face)
    for name in public(original) - inside:
        method = getattr(original, name)
        if inspect.iscoroutinefunction(method):
            assert inspect.signature(getattr(face, name)) == inspect.signature(method)
            assert getattr(face, name).__doc__ == method.__doc__


async def test_the_loop_serves_from_inside_another(verbs: Memory) -> None:
    async def give() -> int:
        return 3

    assert await asyncio.to_thread(sdk.wait, give()) == 3
    sdk.close()
