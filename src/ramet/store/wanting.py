"""A worker's line to the fetcher: what it wants, sent as JSON lines over `fetch.sock`, see `fetcher`. Plain sockets: whatever the workers import they pay for.

The keeper holds the listening socket all its life. So to connect always works, also while no fetcher runs: the connection waits for the next one, and a
SIGUSR1 tells the keeper that one is wanted.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any

from ramet.errors import AbsentError, HostError, RametError, from_wire
from ramet.paths import StoreDir
from ramet.store.remote import Want

NUDGE = signal.SIGUSR1
_LONGEST = 1 << 20  # bytes of an answer: an error's words
_PIECE = 1 << 16
_PAUSE = 1.0  # seconds between two connections


def nudge(files: StoreDir, keeper: int) -> None:
    """Have the keeper start the fetcher, if none runs. HostError when it cannot: it is gone, or was started by a Ramet that knew of no fetcher."""
    try:
        # A keeper that does not wait for the signal would die of it, and all machines with it: only one that listens does.
        with contextlib.suppress(BlockingIOError), connect(files):
            pass
        os.kill(keeper, NUDGE)
    except OSError as error:
        raise HostError(
            f"nothing can be fetched from a registry: what serves {files.mount} has no fetcher: {error.strerror}",
            hint="An older Ramet may have started it. Stop or hibernate all machines, then `ramet daemon stop`: the next start has a new one.",
        ) from error


def connect(files: StoreDir) -> socket.socket:
    """A connection to the fetcher, or to the next one; it does not block. OSError: the keeper is gone, or too many wait already."""
    line = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        line.setblocking(False)
        # Through the open directory: the kernel takes 107 bytes, state directories can be deeper. `sockets` does the same, but has asyncio with it.
        fd = os.open(files.fetch.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            line.connect(f"/proc/self/fd/{fd}/{files.fetch.name}")
        finally:
            os.close(fd)
    except BaseException:
        line.close()
        raise
    return line


def message(number: int, head: str, wants: Sequence[Want], *, memory: bool, at: int = 0) -> bytes:
    """The line that asks for frames of the layer `head`. at: where in its file they are read."""
    frames = [frame(want) for want in wants]
    return json.dumps({"id": number, "op": "want", "head": head, "memory": memory, "at": at, "frames": frames}).encode() + b"\n"


def frame(want: Want) -> list[Any]:
    """As a want has it on the line."""
    return [want.blob, want.offset, want.length, want.mark.hex()]


class Line:
    """What is wanted, sent again whenever the connection breaks. poll: hears of the socket; give `ready` its events. nudge: starts the fetcher."""

    def __init__(self, files: StoreDir, poll: select.epoll, nudge: Callable[[], None]) -> None:
        self._files = files
        self._poll = poll
        self._nudge = nudge
        self._socket: socket.socket | None = None
        self._wanted: dict[int, bytes] = {}
        self._number = 0
        self._tried = -_PAUSE
        self._out = bytearray()
        self._in = bytearray()

    def fileno(self) -> int:
        """-1 while there is no connection."""
        return -1 if self._socket is None else self._socket.fileno()

    def want(self, head: str, wants: Sequence[Want], *, memory: bool, at: int = 0) -> int:
        """Ask for frames, see `message`; the number that the answer will have."""
        self._number += 1
        text = self._wanted[self._number] = message(self._number, head, wants, memory=memory, at=at)
        if self._socket is None:
            self.tend()
        else:
            self._out += text
            try:
                self._flush()
            except OSError:
                self._broken()
        return self._number

    def forget(self, number: int) -> None:
        """Nobody waits for this answer any more."""
        self._wanted.pop(number, None)

    def tend(self) -> None:
        """Connect, if somebody waits and there is no connection; call it now and then."""
        if self._socket is not None or not self._wanted:
            return
        self._tried = time.monotonic()
        try:
            self._nudge()
            self._socket = connect(self._files)
            self._poll.register(self._socket, select.EPOLLIN)
            self._out[:] = b"".join(self._wanted.values())
            self._flush()
        except OSError:  # again at the next call
            self.close()

    def ready(self, events: int) -> list[tuple[int, RametError | None]]:
        """The answers that came: each one's number, and why it cannot be had, or None when it is here."""
        found: list[tuple[int, RametError | None]] = []
        try:
            if events & select.EPOLLOUT:
                self._flush()
            if events & ~select.EPOLLOUT:
                self._receive(found)
        except (OSError, ValueError):
            self._broken()
        return found

    def close(self) -> None:
        if self._socket is not None:
            self._poll.unregister(self._socket)
            self._socket.close()
            self._socket = None
        self._in.clear()

    def _broken(self) -> None:
        self.close()
        if time.monotonic() - self._tried > _PAUSE:  # else a fetcher that ends at once would keep us busy: `tend` will do it
            self.tend()

    def _flush(self) -> None:
        assert self._socket is not None
        with contextlib.suppress(BlockingIOError):
            while self._out:
                del self._out[: self._socket.send(self._out)]
        self._poll.modify(self._socket, select.EPOLLIN | (select.EPOLLOUT if self._out else 0))

    def _receive(self, found: list[tuple[int, RametError | None]]) -> None:
        """Append the answers that came. OSError, ValueError: nothing more comes from this connection."""
        assert self._socket is not None
        ended = False
        with contextlib.suppress(BlockingIOError):
            while data := self._socket.recv(_PIECE):
                self._in += data
            ended = True
        *lines, rest = bytes(self._in).split(b"\n")
        self._in[:] = rest
        for text in lines:
            number, error = _answer(text)
            if self._wanted.pop(number, None) is not None:
                found.append((number, error))
        if ended or len(rest) > _LONGEST:
            raise ConnectionResetError(errno.ECONNRESET, "the fetcher is gone")


def _answer(text: bytes) -> tuple[int, RametError | None]:
    """ValueError for what is no answer."""
    value: Any = json.loads(text)
    if not isinstance(value, dict) or not isinstance(value.get("id"), int):
        raise ValueError("no answer")
    if value.get("ok") is True:
        return value["id"], None
    error = value.get("error")
    if not isinstance(error, dict):
        raise ValueError("no answer")
    found = from_wire(error)
    return value["id"], found if isinstance(found, AbsentError) else AbsentError(found.message, hint=found.hint, details=found.details)
