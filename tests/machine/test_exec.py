"""Commands in a machine: input, output, ends, terminals, background processes, many at once and many in a row."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from ramet.errors import GuestError, GuestNotFoundError, NotFoundError, SpecError
from ramet.model import Channel, Command, Ending, Exit, Output, Process, ProcessEvent, Size, Started
from tests.fixtures import Box

DEADLINE = 120.0


def sh(script: str, **options: object) -> Command:
    return Command(argv=("sh", "-c", script), **options)  # type: ignore[arg-type]


@contextlib.asynccontextmanager
async def started(box: Box, command: Command) -> AsyncIterator[tuple[Started, AsyncIterator[ProcessEvent]]]:
    """A command that runs, and what comes from it."""
    async with asyncio.timeout(DEADLINE), contextlib.aclosing(box.engine.execute(box.name, command)) as events:
        first = await anext(events)
        assert isinstance(first, Started)
        yield first, events


async def text_until(events: AsyncIterator[ProcessEvent], wanted: str) -> str:
    """Output, until it contains something."""
    seen = b""
    async for event in events:
        assert isinstance(event, Output), (event, seen)
        seen += event.data
        if wanted in seen.decode(errors="replace"):
            return seen.decode(errors="replace")
    raise AssertionError(seen)


async def rest(events: AsyncIterator[ProcessEvent]) -> tuple[bytes, bytes, Exit]:
    out = {Channel.STDOUT: b"", Channel.STDERR: b""}
    async for event in events:
        if isinstance(event, Exit):
            return out[Channel.STDOUT], out[Channel.STDERR], event
        assert isinstance(event, Output)
        out[event.channel] += event.data
    raise AssertionError("no exit")


async def gone(box: Box, pid: int) -> None:
    """Wait until a process of the guest is no more; it is killed at once, but reaped a moment later."""
    async with asyncio.timeout(DEADLINE):
        while (await box.sh(f"kill -0 {pid} 2>/dev/null", check=False)).status == 0:
            pass


# --- output and ends ---


@pytest.mark.parametrize(("script", "ending", "code", "status"), [
    ("exit 0", Ending.EXITED, 0, 0),
    ("exit 42", Ending.EXITED, 42, 42),
    ("exit 255", Ending.EXITED, 255, 255),
    ("kill -9 $$", Ending.SIGNALED, 9, 137),
    ("kill -15 $$", Ending.SIGNALED, 15, 143),
    ("no-such-program", Ending.EXITED, 127, 127),
])  # fmt: skip
async def test_ends(box: Box, script: str, ending: Ending, code: int, status: int) -> None:
    result = await box.sh(script, check=False)
    assert (result.ending, result.code, result.status) == (ending, code, status)


async def test_both_outputs_are_kept_apart(box: Box) -> None:
    result = await box.sh("echo out; echo err >&2; printf 'no newline'")
    assert (result.stdout, result.stderr) == (b"out\nno newline", b"err\n")


async def test_bytes_are_bytes(box: Box) -> None:
    data = bytes(range(256)) * 300
    assert (await box.sh("cat", stdin=data)).stdout == data
    assert (await box.sh(r"printf '\000\377'")).stdout == b"\0\xff"


async def test_stdin_has_an_end_and_without_one_is_empty(box: Box) -> None:
    assert await box.text("wc -c", stdin=b"x" * 1_000_000) == "1000000"
    assert await box.text("wc -c") == "0"
    assert await box.text("readlink /proc/self/fd/0") == "/dev/null"


async def test_a_program_need_not_read_its_input(box: Box) -> None:
    assert await box.text("echo done", stdin=b"x" * 3_000_000) == "done"


@pytest.mark.parametrize(("argv", "kind", "errno"), [
    (("no-such-program",), GuestNotFoundError, "ENOENT"),
    (("/etc/passwd",), GuestError, "EACCES"),
    (("/etc",), GuestError, "EACCES"),
])  # fmt: skip
async def test_what_cannot_be_run(box: Box, argv: tuple[str, ...], kind: type[GuestError], errno: str) -> None:
    with pytest.raises(kind, match=argv[0]) as caught:
        await box.engine.run(box.name, Command(argv=argv))
    assert caught.value.details["errno"] == errno


async def test_no_program_at_all(box: Box) -> None:
    with pytest.raises(SpecError, match="at least a program's name"):
        await box.engine.run(box.name, Command(argv=()))
    with pytest.raises(GuestError):
        await box.engine.run(box.name, Command(argv=("",)))


async def test_users(box: Box) -> None:
    who = "id -u; id -g; id -G; echo $HOME"
    assert await box.text(who) == "0\n0\n0\n/root"
    assert await box.text(who, user="app") == "1000\n1000\n1000 50\n/home/app"
    assert await box.text(who, user="1000") == "1000\n1000\n1000 50\n/home/app"
    assert await box.text("id -u; id -g", user="app:staff") == "1000\n50"
    assert await box.text("id -u; id -g", user="4711:4712") == "4711\n4712"
    with pytest.raises(GuestNotFoundError, match="nobody-here"):
        await box.sh("true", user="nobody-here")
    with pytest.raises(GuestNotFoundError):
        await box.sh("true", user="app:no-group")
    assert (await box.sh("echo x > /root/file", user="app", check=False)).status != 0


async def test_directory_and_environment(box: Box) -> None:
    assert await box.text("pwd", cwd="/etc") == "/etc"
    assert await box.text("pwd", user="app") == "/home/app"
    assert await box.text('printf "%s|" "$A" "$B"', env={"A": "a b\nc", "B": "ü="}) == "a b\nc|ü=|"
    with pytest.raises(GuestNotFoundError, match="/no/where"):
        await box.sh("true", cwd="/no/where")


async def test_long_arguments_arrive_and_too_long_ones_are_refused(box: Box) -> None:
    long = "x" * 100_000
    result = await box.engine.run(box.name, Command(argv=("sh", "-c", "echo ${#1} ${#2}", "sh", long, long)))
    assert result.stdout == b"100000 100000\n"
    with pytest.raises(GuestError, match="the command is too long"):
        await box.engine.run(box.name, Command(argv=("echo", "x" * 300_000)))


# --- deadlines, signals, and what a caller leaves behind ---


async def test_a_deadline_ends_the_whole_group(box: Box) -> None:
    began = time.monotonic()
    result = await box.sh("sleep 1001 & echo $!; sleep 1002", check=False, timeout=5.0)
    assert (result.ending, result.status) == (Ending.TIMEOUT, 124)
    assert time.monotonic() - began < DEADLINE
    await gone(box, int(result.stdout))


async def test_a_deadline_and_a_program_that_does_not_listen(box: Box) -> None:
    result = await box.sh("trap '' TERM; while :; do sleep 1; done", check=False, timeout=5.0)
    assert (result.ending, result.code) == (Ending.TIMEOUT, signal.SIGKILL)


async def test_a_caller_that_goes_away_takes_its_command_along(box: Box) -> None:
    async with started(box, sh("sleep 1003 & echo $!; wait")) as (first, events):
        child = int(await text_until(events, "\n"))
    await gone(box, first.pid)
    await gone(box, child)
    assert first.process not in [each.id for each in await box.engine.processes(box.name)]


async def test_a_grandchild_that_keeps_the_output_open_delays_nothing(box: Box) -> None:
    began = time.monotonic()
    result = await box.sh("setsid sleep 1004 & echo $!")
    assert time.monotonic() - began < 60
    await box.sh(f"kill {int(result.stdout)}")


async def test_signals_go_to_the_group(box: Box) -> None:
    async with started(box, sh("trap 'echo got; exit 5' USR1; sleep 1005 & echo up; wait")) as (first, events):
        await text_until(events, "up")
        await box.engine.signal(box.name, first.process, signal.SIGUSR1)
        out, _, ended = await rest(events)
    assert (out, ended) == (b"got\n", Exit(ending=Ending.EXITED, code=5))
    with pytest.raises(GuestNotFoundError):
        await box.engine.signal(box.name, first.process, signal.SIGTERM)
    with pytest.raises(SpecError, match="99 is not a signal"):
        await box.engine.signal(box.name, first.process, 99)


async def test_input_to_a_running_command(box: Box) -> None:
    async with started(box, sh('while read line; do echo "<$line>"; done; echo end', stdin=True)) as (first, events):
        for word in ("one", "two"):
            await box.engine.send_input(box.name, first.process, f"{word}\n".encode())
            assert await text_until(events, "\n") == f"<{word}>\n"
        await box.engine.send_input(box.name, first.process, b"", eof=True)
        assert await rest(events) == (b"end\n", b"", Exit(ending=Ending.EXITED, code=0))
    with pytest.raises(NotFoundError, match=f"nobody is attached to process {first.process}"):
        await box.engine.send_input(box.name, first.process, b"x")


# --- terminals ---


async def test_a_terminal(box: Box) -> None:
    command = Command(argv=("sh",), stdin=True, pty=Size(rows=33, columns=101), env={"PS1": "$ ", "TERM": "xterm"})
    async with started(box, command) as (first, events):
        await text_until(events, "$ ")
        await box.engine.send_input(box.name, first.process, b"tty; stty size\n")
        seen = await text_until(events, "33 101")
        assert "/dev/pts/" in seen
        await box.engine.resize(box.name, first.process, 50, 132)
        await box.engine.send_input(box.name, first.process, b"stty size\n")
        await text_until(events, "50 132")
        # Not the echo of what was typed, the shell would still be editing its line; nor the shell's own: dash loses what comes between its fork and the exec.
        await box.engine.send_input(box.name, first.process, b"sh -c 'echo re\"\"ady; exec sleep 1006'\n")
        await text_until(events, "ready")
        await box.engine.send_input(box.name, first.process, b"\x03")  # Control-C reaches what is in the foreground
        await text_until(events, "$ ")
        await box.engine.send_input(box.name, first.process, b"exit 7\n")
        _, err, ended = await rest(events)
    assert (err, ended) == (b"", Exit(ending=Ending.EXITED, code=7))


async def test_the_end_of_a_terminal_s_reader_hangs_up(box: Box) -> None:
    async with started(box, Command(argv=("sh",), stdin=True, pty=Size())) as (first, _):
        pass
    await gone(box, first.pid)


async def test_a_terminal_s_size_must_be_one(box: Box) -> None:
    with pytest.raises(SpecError, match="1 to 65535"):
        await box.engine.resize(box.name, 1, 0, 80)


# --- background processes ---


async def listed(box: Box, process: int) -> Process | None:
    return next((each for each in await box.engine.processes(box.name) if each.id == process), None)


async def test_detached_processes_outlive_their_caller(box: Box) -> None:
    command = sh("n=0; while :; do n=$((n+1)); echo line $n; sleep 0.1; done", detach=True, label="counter")
    async with started(box, command) as (first, events):
        await text_until(events, "line 2")
    found = await listed(box, first.process)
    assert found
    assert (found.state, found.detached, found.attached, found.label, found.pid) == ("running", True, False, "counter", first.pid)
    assert found.command.startswith("sh -c n=0")
    assert abs(found.started_at - time.time()) < 3600
    async with contextlib.aclosing(box.engine.attach(box.name, first.process)) as events:
        assert isinstance(await anext(events), Started)
        await text_until(events, "line 5")  # what it wrote meanwhile comes first
        async with contextlib.aclosing(box.engine.attach(box.name, first.process)) as second:
            assert isinstance(await anext(second), Started)
            _, _, ended = await rest(events)
            assert ended.ending is Ending.DETACHED  # the second took over
            await box.engine.signal(box.name, first.process, signal.SIGKILL)
            _, _, ended = await rest(second)
            assert ended == Exit(ending=Ending.SIGNALED, code=9)
    found = await listed(box, first.process)
    assert found
    assert (found.state, found.code) == ("signaled", 9)
    await box.engine.forget(box.name, first.process)
    assert await listed(box, first.process) is None


async def test_a_finished_detached_process_keeps_its_last_output(box: Box) -> None:
    await box.sh("rm -f /tmp/go")
    async with started(box, sh("until [ -e /tmp/go ]; do usleep 20000; done; seq 20000; echo last >&2; exit 3", detach=True)) as (first, _):
        pass
    await box.sh("touch /tmp/go")  # behind the end of that stream, on the same line
    async with asyncio.timeout(DEADLINE):
        while (found := await listed(box, first.process)) and found.state == "running":
            pass
    async with contextlib.aclosing(box.engine.attach(box.name, first.process)) as events:
        assert isinstance(await anext(events), Started)
        out, err, ended = await rest(events)
    assert (err, ended) == (b"last\n", Exit(ending=Ending.EXITED, code=3))
    assert out.endswith(b"19999\n20000\n")
    assert 60 << 10 <= len(out) <= 64 << 10
    await box.engine.forget(box.name, first.process)


async def test_processes_that_are_not_there(box: Box) -> None:
    with pytest.raises(GuestNotFoundError):
        async with contextlib.aclosing(box.engine.attach(box.name, 4_000_000)) as events:
            await anext(events)
    for call in (box.engine.forget(box.name, 4_000_000), box.engine.resize(box.name, 4_000_000, 24, 80)):
        with pytest.raises(GuestNotFoundError):
            await call


async def test_a_running_process_cannot_be_forgotten(box: Box) -> None:
    async with started(box, sh("sleep 1007")) as (first, _):
        with pytest.raises(GuestError):
            await box.engine.forget(box.name, first.process)


# --- many ---


async def test_sixteen_at_once_each_get_their_answer(box: Box) -> None:
    async def one(number: int) -> bytes:
        return (await box.sh(f"cat; echo {number}; echo {number} >&2; exit {number}", stdin=b"%d:" % number, check=False)).stdout

    answers = await asyncio.gather(*(one(number) for number in range(16)))
    assert answers == [b"%d:%d\n" % (number, number) for number in range(16)]


async def test_a_reader_that_does_not_read_stops_nobody_else(box: Box) -> None:
    async with started(box, sh("yes")) as (_, events):
        for _ in range(20):
            assert await box.text("echo fine") == "fine"
        assert isinstance(await anext(events), Output)


async def test_two_floods_share_the_line(box: Box) -> None:
    async def flood() -> int:
        async with started(box, sh("yes | head -c 3000000")) as (_, events):
            return len((await rest(events))[0])

    flooding = asyncio.gather(flood(), flood())
    assert await box.text("echo between") == "between"
    assert await flooding == [3_000_000, 3_000_000]


async def test_a_thousand_in_a_row_leak_nothing(box: Box) -> None:
    def here() -> tuple[int, int]:
        return len(list(Path("/proc/self/fd").iterdir())), len(asyncio.all_tasks())

    async def there() -> tuple[int, int, int]:
        # Without the kernel's own threads, which come and go.
        text = await box.text("ps | grep -vc '\\['; ls /proc/1/fd | wc -l; grep VmRSS /proc/1/status | tr -dc 0-9")
        processes, fds, memory = map(int, text.split())
        return processes, fds, memory

    machine = await box.get()
    qemu = Path(f"/proc/{machine.pid}/fd")
    for _ in range(20):
        await box.engine.run(box.name, Command(argv=("true",)))
    before, before_there, before_qemu = here(), await there(), len(list(qemu.iterdir()))
    for _ in range(1000):
        result = await box.engine.run(box.name, Command(argv=("true",)))
        assert result.status == 0
    after, after_there = here(), await there()
    assert all(now <= then + 5 for now, then in zip(after, before, strict=True))  # what the daemon does by itself
    assert len(list(qemu.iterdir())) <= before_qemu + 1
    assert after_there[:2] == before_there[:2]
    assert after_there[2] <= before_there[2] + 64  # KiB; the kernel counts in batches
    assert [each for each in await box.engine.processes(box.name) if each.label == ""] == []
