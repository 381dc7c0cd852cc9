"""A worker's line to the fetcher, and what it parks: over real sockets, without a kernel's file system."""

from __future__ import annotations

import errno
import json
import os
import select
import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from ramet import sockets
from ramet.errors import AbsentError, HostError
from ramet.paths import StateDir, StoreDir
from ramet.store import fuse, imagefs, wanting
from ramet.store.fuse import Opcode
from ramet.store.imagefs import FileSystem, Part, Worker
from ramet.store.remote import Want
from ramet.store.wanting import Line

ID = "00000000000000aa"
NODE = int(ID, 16)
DEADLINE = 30.0
BLOB = "sha256:" + "0" * 64


def wants(count: int = 1) -> list[Want]:
    return [Want(blob=BLOB, offset=number << 16, length=1000, mark=bytes(16)) for number in range(count)]


@dataclass
class Bed:
    """The fetcher's side is the test's. nudges: how often it was called for."""

    files: StoreDir
    listener: socket.socket
    poll: select.epoll
    nudges: list[int] = field(default_factory=list)
    closing: list[Any] = field(default_factory=list)

    def line(self) -> Line:
        made = Line(self.files, self.poll, lambda: self.nudges.append(1))
        self.closing.append(made)
        return made

    def accept(self) -> socket.socket:
        self.listener.settimeout(DEADLINE)
        connection, _ = self.listener.accept()
        connection.settimeout(DEADLINE)
        self.closing.append(connection)
        return connection

    def answers(self, line: Line, count: int) -> dict[int, str]:
        """What comes within the deadline: the messages of errors, empty for none."""
        found: dict[int, str] = {}
        end = time.monotonic() + DEADLINE
        while len(found) < count and time.monotonic() < end:
            for fd, events in self.poll.poll(0.1):
                assert fd == line.fileno()
                found |= {number: error.message if error else "" for number, error in line.ready(events)}
            line.tend()
        return found


@pytest.fixture
def bed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bed]:
    monkeypatch.setattr(wanting, "_PAUSE", 0.0)
    state = StateDir(root=tmp_path / ("deep" * 30))
    state.create()
    with sockets.listen(state.store.fetch) as listener, select.epoll() as poll:
        made = Bed(state.store, listener, poll)
        yield made
        for each in made.closing:
            each.close()


def asked(connection: socket.socket, count: int) -> list[dict[str, Any]]:
    data = b""
    while data.count(b"\n") < count:
        data += connection.recv(1 << 20)
    return [json.loads(line) for line in data.splitlines()]


def test_a_want_is_asked_for_and_answered(bed: Bed) -> None:
    line = bed.line()
    assert line.fileno() == -1
    number = line.want(ID, wants(2), memory=True, at=65536)
    fetcher = bed.accept()
    [question] = asked(fetcher, 1)
    frames = [[BLOB, 0, 1000, "00" * 16], [BLOB, 65536, 1000, "00" * 16]]
    assert question == {"id": number, "op": "want", "head": ID, "memory": True, "at": 65536, "frames": frames}
    second = line.want(ID, wants(), memory=False)
    for piece in (f'{{"id": {second}, "ok"', ': true}\n{"id": 99, "ok": true}\n{"id":', f' {number}, "ok": true}}\n'):
        fetcher.sendall(piece.encode())
        time.sleep(0.01)
    assert bed.answers(line, 2) == {number: "", second: ""}
    assert len(bed.nudges) == 1


def test_whatever_error_comes_it_is_that_something_is_absent(bed: Bed) -> None:
    line = bed.line()
    number = line.want(ID, wants(), memory=False)
    bed.accept().sendall(json.dumps({"id": number, "error": HostError("no such host").wire()}).encode() + b"\n")
    [(_, events)] = bed.poll.poll(DEADLINE)
    [(_, error)] = line.ready(events)
    assert isinstance(error, AbsentError) and error.message == "no such host"


@pytest.mark.parametrize("end", [b"", b"nonsense\n", b'{"id": 1}\n', b"[]\n", b'{"id": "x", "ok": true}\n', b"x" * 2000])
def test_what_was_not_answered_is_asked_again_when_the_line_breaks(bed: Bed, end: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wanting, "_LONGEST", 1000)
    line = bed.line()
    numbers = [line.want(ID, wants(), memory=True) for _ in range(4)]
    line.forget(numbers[3])
    first = bed.accept()
    asked(first, 4)
    first.sendall(json.dumps({"id": numbers[1], "ok": True}).encode() + b"\n" + end)
    if not end:
        first.close()
    assert bed.answers(line, 1) == {numbers[1]: ""}
    second = bed.accept()
    assert [question["id"] for question in asked(second, 2)] == [numbers[0], numbers[2]]
    assert len(bed.nudges) == 2


def test_a_fetcher_that_does_not_read_blocks_nobody(bed: Bed) -> None:
    line = bed.line()
    numbers = [line.want(ID, wants(64), memory=True) for _ in range(400)]
    fetcher = bed.accept()
    fetcher.setblocking(False)
    data = b""
    end = time.monotonic() + DEADLINE
    while data.count(b"\n") < 400 and time.monotonic() < end:
        try:
            data += fetcher.recv(1 << 20)
        except BlockingIOError:
            for _, events in bed.poll.poll(1):
                assert line.ready(events) == []
    assert [json.loads(text)["id"] for text in data.splitlines()] == numbers


def test_who_cannot_be_reached_is_tried_again(bed: Bed) -> None:
    bed.files.fetch.rename(bed.files.fetch.with_suffix(".away"))
    line = bed.line()
    number = line.want(ID, wants(), memory=True)
    assert line.fileno() == -1
    line.tend()
    bed.files.fetch.with_suffix(".away").rename(bed.files.fetch)
    line.tend()
    fetcher = bed.accept()
    assert [question["id"] for question in asked(fetcher, 1)] == [number]


class Far:
    """A layer that is not here until `here` is set."""

    size = 1 << 20
    memory = False
    here = False

    def __init__(self, files: StoreDir, layer_id: str) -> None:
        pass

    def read(self, offset: int, length: int) -> list[Part]:
        if not Far.here:
            raise AbsentError("it is far away")
        return [bytes(length)]

    def wants(self, first: int, end: int) -> list[Want]:
        return wants(end - first)

    def close(self) -> None:
        pass


@dataclass
class Served:
    """A worker, and the kernel's side of its descriptor."""

    worker: Worker
    kernel: socket.socket

    def read(self, unique: int, pid: int) -> None:
        body = fuse.READ_IN.pack(0, 65536, 4096, 0, 0, 0, 0)
        self.worker._respond(memoryview(fuse.IN.pack(fuse.IN.size + len(body), Opcode.READ, unique, NODE, 0, 0, pid, 0, 0) + body))

    def answers(self) -> dict[int, int]:
        """Of each request that was answered: the errno."""
        found = {}
        self.kernel.setblocking(False)
        while True:
            try:
                _, error, unique = fuse.OUT.unpack_from(self.kernel.recv(1 << 20))
            except BlockingIOError:
                return found
            found[unique] = -error


@pytest.fixture
def served(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.setattr(os, "kill", lambda pid, number: bed.nudges.append(number))
    monkeypatch.setattr(Far, "here", False)
    monkeypatch.setattr(Far, "memory", False)
    before, wakeup = signal.getsignal(signal.SIGHUP), signal.set_wakeup_fd(-1)
    kernel, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    worker = Worker(ours.fileno(), FileSystem(bed.files, Far))
    with kernel, ours:
        yield Served(worker, kernel)
    waker = signal.set_wakeup_fd(wakeup)
    signal.signal(signal.SIGHUP, before)
    worker._line.close()
    worker._poll.close()
    for fd in (waker, worker._woken):
        os.close(fd)


def test_a_disk_does_not_wait_for_ever_where_nobody_answers(served: Served, bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    served.read(2, os.getpid())
    served.worker._look()
    assert served.answers() == {} and bed.nudges == [wanting.NUDGE]
    monkeypatch.setattr(imagefs, "PATIENCE", 0.0)
    served.worker._look()
    assert served.answers() == {2: errno.EIO}
    assert "could not be fetched" in bed.files.faults.read_text()
    monkeypatch.setattr(Far, "memory", True)
    served.read(4, os.getpid())
    served.worker._look()
    assert served.answers() == {}


def test_what_a_dying_process_waits_for_is_given_up(served: Served, bed: Bed) -> None:
    pid = os.fork()
    if not pid:
        os._exit(0)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    for unique, who in ((2, pid), (4, os.getpid()), (6, 0), (8, 1 << 30)):
        served.read(unique, who)
    served.worker._look()
    os.waitpid(pid, 0)
    assert served.answers() == {2: errno.EINTR, 8: errno.EINTR}
    assert not bed.files.faults.exists()


def test_a_request_that_is_sent_again_takes_the_place_of_the_first(served: Served, bed: Bed) -> None:
    resent = 1 << 63 | 2
    for _ in range(3):
        served.read(resent, os.getpid())
    fetcher = bed.accept()
    number = asked(fetcher, 3)[-1]["id"]
    Far.here = True
    for each in (1, 2, number):
        fetcher.sendall(json.dumps({"id": each, "ok": True}).encode() + b"\n")
    served.worker._listen()
    assert served.kernel.recv(1 << 20) == fuse.OUT.pack(16 + 4096, 0, resent) + bytes(4096)
    assert served.answers() == {}
