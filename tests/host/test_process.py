"""The one module that starts programs: environment, descriptors, deadline, kill ladder, and errors that say what went wrong."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from ramet import process
from ramet.errors import CommandError, HostError, NoSpaceError

STUBBORN = (
    "import os,signal,sys; [signal.signal(n, signal.SIG_IGN) for n in (15, 1, 2)]; os.fork(); print('up', flush=True); signal.pause()"
)


def group(pid: int) -> list[int]:
    """The live processes of a process group."""
    found = []
    for name in filter(str.isdigit, (path.name for path in Path("/proc").iterdir())):
        try:
            fields = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == pid and fields[0] != "Z":
            found.append(int(name))
    return found


async def test_output_and_exit() -> None:
    ended = await process.run(["sh", "-c", "echo out; echo err >&2; exit 3"], deadline=30, apart=True)
    assert (ended.returncode, ended.output, ended.errors) == (3, "out\n", "err\n")
    together = await process.run(["sh", "-c", "echo out; echo err >&2"], deadline=30)
    assert sorted(together.output.split()) == ["err", "out"]
    assert await process.output(["printf", " x \n"], deadline=30) == "x"


async def test_input() -> None:
    assert (await process.run(["cat"], deadline=30, input=b"x" * 300_000)).output == "x" * 300_000
    assert (await process.run(["cat"], deadline=30)).output == ""


async def test_the_environment_is_a_fixed_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_PRELOAD", "/nowhere.so")
    monkeypatch.setenv("SECRET", "x")
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    seen = dict(line.split("=", 1) for line in (await process.run(["env"], deadline=30, env={"EXTRA": "1"})).output.splitlines())
    assert {"LD_PRELOAD", "SECRET"}.isdisjoint(seen)
    assert (seen["LC_ALL"], seen["EXTRA"]) == ("C.UTF-8", "1")
    assert seen["PATH"] == "/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin"


async def test_only_descriptors_that_were_passed() -> None:
    reader, writer = os.pipe()
    os.set_inheritable(reader, True)
    listing = (await process.run(["ls", "/proc/self/fd"], deadline=30, pass_fds=[writer])).output.split()
    os.close(reader)
    os.close(writer)
    assert str(writer) in listing
    assert str(reader) not in listing


async def test_a_failure_shows_the_command_and_the_end_of_its_log() -> None:
    script = "for i in $(seq 100); do echo line $i; done; echo the reason >&2; exit 7"
    with pytest.raises(CommandError) as caught:
        (await process.run(["sh", "-c", script], deadline=30)).check("making it")
    error = caught.value
    assert error.message == "making it failed: sh exited 7: the reason"
    assert error.details["returncode"] == 7
    assert len(error.details["log"].splitlines()) == process.TAIL_LINES
    assert error.details["argv"][0] == "sh"


async def test_a_signal_is_named() -> None:
    with pytest.raises(CommandError, match="was killed by SIGKILL"):
        (await process.run(["sh", "-c", "kill -9 $$"], deadline=30)).check()


@pytest.mark.parametrize("words", ["dd: writing: No space left on device", "cp: x: Disk quota exceeded"])
async def test_a_full_disk_is_told_apart(words: str) -> None:
    with pytest.raises(NoSpaceError, match="making it: no space left on the disk") as caught:
        (await process.run(["sh", "-c", f"echo '{words}' >&2; echo; exit 1"], deadline=30)).check("making it")
    assert "df -h" in caught.value.hint


async def test_a_program_that_is_not_there() -> None:
    with pytest.raises(HostError, match="the program no-such-program is not installed") as caught:
        await process.run(["no-such-program"], deadline=30)
    assert "ramet setup" in caught.value.hint


async def test_the_deadline_ends_the_whole_group(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(process, "KILL_GRACE", 0.3)
    pid_file = tmp_path / "pid"
    code = f"import os; open({str(pid_file)!r}, 'w').write(str(os.getpid())); {STUBBORN}"
    began = time.monotonic()
    with pytest.raises(HostError, match="did not end within 5 s"):
        await process.run([sys.executable, "-c", code], deadline=5)
    assert time.monotonic() - began < 120
    assert group(int(pid_file.read_text())) == []


async def test_cancelling_ends_the_whole_group() -> None:
    async with asyncio.timeout(30):
        async with process.running(["sh", "-c", "sleep 1000 & echo up; wait"]) as child:
            assert child.stdout
            assert await child.stdout.readline() == b"up\n"
            assert len(group(child.pid)) == 2
        assert group(child.pid) == []


async def test_the_ladder_asks_first() -> None:
    async with process.running(["sh", "-c", "trap 'echo bye; exit 0' TERM; echo up; while :; do sleep 0.1; done"]) as child:
        assert child.stdout
        assert await child.stdout.readline() == b"up\n"
    assert (await child.stdout.read()).endswith(b"bye\n")  # dash says first that its sleep was terminated too
    assert child.returncode == 0


async def test_lines_as_they_come() -> None:
    lines: list[str] = []
    ended = await process.run(["printf", r"10%%\r20%%\rdone\n\xff\nlast"], deadline=30, on_line=lines.append)
    assert lines == ["10%", "20%", "done", "\ufffd"]
    assert ended.output.endswith("last")


async def test_output_without_lines_is_not_kept_whole() -> None:
    ended = await process.run(["sh", "-c", "seq 200000"], deadline=60, on_line=lambda line: None)
    assert len(ended.output.splitlines()) <= process.TAIL_LINES + 1


async def test_a_detached_program_outlives_its_starter(tmp_path: Path) -> None:
    log = tmp_path / "log"
    pid = process.spawn_detached(["sh", "-c", "echo up; exec sleep 1000"], log=log)
    fd = os.pidfd_open(pid)
    try:
        assert os.getsid(pid) == pid
        started = process.start_time(pid)
        assert started is not None
        assert not await process.gone(fd, 0.05)
        os.kill(pid, signal.SIGKILL)
        assert await process.gone(fd, 10)
        assert process.start_time(pid) is None, "a zombie is nobody"
    finally:
        os.close(fd)
        process._detached.pop().wait()


def test_start_time_names_a_process() -> None:
    assert process.start_time(os.getpid()) == process.start_time(os.getpid())
    assert process.start_time(4_000_000) is None
