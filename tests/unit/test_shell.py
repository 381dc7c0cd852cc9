"""`ramet shell` on a real terminal: every key passes, the size follows, and the terminal is as it was, however it ends."""

from __future__ import annotations

import dataclasses
import fcntl
import os
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ramet.model import Size, State
from tests.unit.memory import ARGV, Memory, beside, environment

PATIENCE = 60.0


class Terminal:
    """A pseudo-terminal with a program on it; its near end is ours."""

    def __init__(self, url: str, *arguments: str) -> None:
        self.near, self.far = os.openpty()
        self.resize(33, 101)
        self.before = termios.tcgetattr(self.far)
        env = environment(url, TERM="vt220")
        del env["COLUMNS"]
        self.program = subprocess.Popen(
            [*ARGV, *arguments], stdin=self.far, stdout=self.far, stderr=self.far, env=env, start_new_session=True
        )
        self.seen = b""

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self.far, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, data: bytes) -> None:
        os.write(self.near, data)

    def expect(self, text: bytes) -> None:
        """Read until it shows."""
        deadline = time.monotonic() + PATIENCE
        while text not in self.seen:
            assert select.select([self.near], [], [], max(0, deadline - time.monotonic()))[0], self.seen
            self.seen += os.read(self.near, 4096)

    def ended(self) -> int:
        return self.program.wait(PATIENCE)

    def restored(self) -> bool:
        return termios.tcgetattr(self.far) == self.before

    def close(self) -> None:
        if self.program.poll() is None:
            self.program.kill()
        self.program.wait()
        os.close(self.near)
        os.close(self.far)


@pytest.fixture
def verbs() -> Memory:
    made = Memory()
    made.stock()
    return made


@pytest.fixture
def terminal(verbs: Memory, tmp_path: Path) -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []
    with beside(verbs, tmp_path / "s") as url:

        def start(*arguments: str) -> Terminal:
            opened.append(Terminal(url, *arguments))
            return opened[-1]

        yield start
        for each in opened:
            each.close()


def test_a_session(terminal: Callable[..., Terminal], verbs: Memory) -> None:
    ours = terminal("shell", "m", "-u", "me", "-e", "A=1")
    ours.type(b"early")
    ours.expect(b"<early>")
    command = verbs.seen[0][1]
    assert (command.pty, command.user, command.env) == (Size(rows=33, columns=101), "me", {"TERM": "vt220", "A": "1"})  # type: ignore[attr-defined]
    assert command.argv[0] == "sh"  # type: ignore[attr-defined]
    assert not ours.restored()  # raw: nothing is echoed or waited for here
    ours.type(b"a")
    ours.expect(b"<a>")
    ours.type(b"\x03\x04\x1a\r")  # Ctrl-C, Ctrl-D, Ctrl-Z and return are the guest's business
    ours.expect(b"<\x03\x04\x1a\r>")
    ours.type(b"exit")
    assert ours.ended() == 7
    assert ours.restored()


def test_the_size_follows(terminal: Callable[..., Terminal], verbs: Memory) -> None:
    ours = terminal("shell", "m")
    ours.type(b"up")
    ours.expect(b"<up>")
    ours.resize(50, 132)
    ours.program.send_signal(signal.SIGWINCH)
    deadline = time.monotonic() + PATIENCE
    while not any(call[0] == "resize" for call in verbs.seen):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert verbs.seen[-1] == ("resize", 1, Size(rows=50, columns=132))
    ours.type(b"exit")
    assert ours.ended() == 7


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_the_terminal_is_restored_when_we_are_told_to_end(terminal: Callable[..., Terminal], verbs: Memory, number: signal.Signals) -> None:
    ours = terminal("shell", "m")
    ours.type(b"up")
    ours.expect(b"<up>")
    ours.program.send_signal(number)
    assert ours.ended() == 128 + number
    assert ours.restored()
    deadline = time.monotonic() + PATIENCE
    while not verbs.killed:  # the remote shell ends with us
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_terminal_is_restored_when_the_guest_fails(terminal: Callable[..., Terminal]) -> None:
    ours = terminal("run", "-t", "m", "dies")
    assert ours.ended() == 125
    assert ours.restored()
    ours.expect(b"error:")
    ours.expect(b"the guest is gone")


def test_a_command_on_a_terminal(terminal: Callable[..., Terminal]) -> None:
    ours = terminal("run", "-it", "m", "cat")
    ours.type(b"raw\r")
    ours.expect(b"raw\r")
    ours.program.kill()
    assert ours.ended() == -9


def test_errors_before_the_terminal_is_touched(terminal: Callable[..., Terminal]) -> None:
    ours = terminal("shell", "nobody")
    assert ours.ended() == 125
    assert ours.restored()


def test_a_machine_that_stands_still_is_told_in_a_shell_too(terminal: Callable[..., Terminal], verbs: Memory) -> None:
    ours = terminal("shell", "m")
    ours.type(b"up")
    ours.expect(b"<up>")
    verbs.machines["m"] = dataclasses.replace(verbs.machines["m"], state=State.PAUSED, reason="waits for its memory")
    ours.expect(b"\r\nm: waits for its memory\r\n")  # a raw terminal begins no line by itself
    ours.type(b"exit")
    assert ours.ended() == 7
    assert ours.restored()
