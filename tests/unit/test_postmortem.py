"""How a QEMU ended, from what it left on the disk; and whether one lives."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from ramet import process
from ramet.paths import MachineDir
from ramet.vm import machine as vm


@pytest.fixture
def files(tmp_path: Path) -> MachineDir:
    return MachineDir(root=tmp_path)


@pytest.mark.parametrize(
    ("exit_text", "console", "clean", "reason"),
    [
        ("exited 0\n", "", True, "the guest powered off"),
        (
            "exited 0\n",
            "[1.0] Kernel panic - not syncing: Attempted to kill init!\n[1.1] more\n",
            False,
            "the guest died: [1.0] Kernel panic - not",
        ),
        ("exited 0\n", "ramet-agent: fatal: /dev/vda: not ext4\n", False, "the guest died: ramet-agent: fatal: /dev/vda: not ext4"),
        ("signaled 9\n", "", False, "QEMU was killed by SIGKILL"),
        ("signaled 11\n", "", False, "QEMU was killed by SIGSEGV"),
        ("exited 1\n", "", False, "QEMU exited with status 1: no message"),
        ("", "", False, "QEMU and its shim were killed, or the host went down"),
        (None, "", False, "QEMU and its shim were killed, or the host went down"),
    ],
)
def test_reasons(files: MachineDir, exit_text: str | None, console: str, clean: bool, reason: str) -> None:
    if exit_text is not None:
        files.exit.write_text(exit_text)
    files.console.write_text(console)
    death = vm.postmortem(files)
    assert death.clean is clean
    assert death.reason.startswith(reason)
    assert death.log == console


def test_a_refusal_of_qemu_is_its_last_line(files: MachineDir) -> None:
    files.exit.write_text("exited 1\n")
    files.qemu_log.write_text("warning: x\nqemu-system-x86_64: Failed to lock byte 100\n")
    death = vm.postmortem(files)
    assert death.reason == "QEMU exited with status 1: qemu-system-x86_64: Failed to lock byte 100"
    assert "warning: x" in death.log


def test_nonsense_in_the_exit_file(files: MachineDir) -> None:
    for text in ("signaled", "exited x\n", "signaled 4711\n", "\0\0\0", "signaled nine"):
        files.exit.write_text(text)
        assert not vm.postmortem(files).clean


def test_the_log_s_tail_spans_its_two_files(files: MachineDir) -> None:
    files.console.with_name("console.log.1").write_bytes(b"a" * 5000 + b"older\n")
    files.console.write_bytes(b"newer \xff\n")
    text = vm.tail(files.console)
    assert text.endswith("aolder\nnewer \ufffd\n")
    assert len(text.encode(errors="replace")) <= vm.TAIL + 2
    assert vm.tail(files.qemu_log) == ""


def test_a_machine_lives_while_somebody_holds_its_lock(files: MachineDir) -> None:
    assert not vm.is_alive(files)
    files.lock.touch()
    assert not vm.is_alive(files)
    fd = os.open(files.lock, os.O_RDWR)
    fcntl.flock(fd, fcntl.LOCK_EX)
    assert vm.is_alive(files)
    os.close(fd)
    assert not vm.is_alive(files)


def test_a_pid_that_was_given_to_another_is_not_ours(files: MachineDir) -> None:
    mine, parent = os.getpid(), os.getppid()
    files.pids.write_text(f"shim {mine} {process.start_time(mine)}\nqemu {parent} 1\n")
    assert vm.pids(files) == {"shim": mine}
    files.pids.unlink()
    assert vm.pids(files) == {}


async def test_killing_what_is_not_there(files: MachineDir) -> None:
    await vm.kill(files)
    files.lock.touch()
    await vm.kill(files)
