"""The image file system: each layer, with all it stands on, as one raw file `mnt/ID`. This is what its worker processes do; `keeper` keeps them.

The node id of a file is its layer's id, so a worker knows nothing that the next one does not: any of them can answer any request, also one that
another took and did not live to answer. Files look writable, for QEMU opens a machine's memory for writing though it maps it privately,
and never change: a WRITE is refused, and a FALLOCATE succeeds and does nothing, so that QEMU goes on to drop its private pages when a guest gives memory back.

What cannot be read is EIO, which QEMU sees as SIGBUS, and one line in faults.log: `UNIX_TIME ID OFFSET MESSAGE`. Wrong data is never served.

What is in a registry only is parked: not answered until the fetcher has it here, and the worker goes on with other requests. A memory waits for ever,
for an error would end its machine; a disk gets the error that the fetcher gives. What a dying process waits for is given up, so that it can die.

What the speed hangs on, measured, in seconds of a worker's cpu for each GB: 0.65 to decompress and 0.15 to verify chunks as a guest's memory has them,
0.2 for the kernel's copy and wake-ups, 0.05 for this Python. Zeros skip the first two. Worth their lines: malloc that keeps freed chunks (`keeper.settle`),
writev of the pieces as they are, zeros that are real pages (0.06).
"""

from __future__ import annotations

import errno
import json
import os
import re
import select
import signal
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Protocol

from ramet.errors import AbsentError, LayerError, RametError
from ramet.paths import StoreDir
from ramet.store import fuse, keeper, remote, wanting
from ramet.store.chain import Chain
from ramet.store.fuse import PAGE, Opcode
from ramet.store.remote import Want
from ramet.store.source import is_hole
from ramet.store.tracing import Recorder

Part = bytes | memoryview

OPEN_CHAINS = 64
MAX_PARTS = 1000  # IOV_MAX is 1024, with the header
TICK = 1.0  # seconds between looks after what is parked
PATIENCE = 600.0  # seconds after which a disk's read fails though nobody said why: the fetcher has deadlines of its own, if there is one
ROUNDS = 3  # times that what was fetched may be gone again before it is asked for only at the next look
FAULTS_LIMIT = 1 << 20  # bytes of faults.log: a guest that touches a damaged page in a loop must not fill the disk
_ZEROS = memoryview(bytes(bytearray(fuse.MAX_READ)))  # written, once for all workers; bytes(n) alone is not
_DONE: tuple[Part, ...] = ()
_LARGE_FOLIOS = tuple(map(int, re.findall(r"\d+", os.uname().release)[:2])) > (6, 18)  # newer kernels than were looked at
_SUCCEED = {Opcode.RELEASE, Opcode.FSYNC, Opcode.FLUSH, Opcode.RELEASEDIR, Opcode.FSYNCDIR, Opcode.ACCESS, Opcode.DESTROY}
_IGNORED = {Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.INTERRUPT}
_RESENT = 1 << 63  # FUSE_UNIQUE_RESEND


class Source(Protocol):
    """What a file's bytes come from: `store.chain.Chain`."""

    @property
    def size(self) -> int: ...

    @property
    def memory(self) -> bool: ...

    def read(self, offset: int, length: int) -> list[Part]:
        """Pieces of min(length, size - offset) bytes together; AbsentError when they must be fetched first, LayerError when they cannot be had."""
        ...

    def wants(self, first: int, end: int) -> list[Want]:
        """What must be here for the pages first … end-1 to be read."""
        ...

    def close(self) -> None: ...


Opener = Callable[[StoreDir, str], Source]


class FileSystem:
    """Answers requests. open_source: LayerError for a layer that is missing or damaged."""

    def __init__(self, files: StoreDir, open_source: Opener) -> None:
        self.files = files
        self._open_source = open_source
        self._open: OrderedDict[int, tuple[Source, Recorder]] = OrderedDict()
        self._owner = (os.geteuid(), os.getegid())
        self._answers: dict[int, Callable[[int, memoryview], Sequence[Part]]] = {
            Opcode.LOOKUP: self._lookup,
            Opcode.GETATTR: lambda node, body: (fuse.attr_answer(self._attributes(node)),),
            Opcode.SETATTR: self._setattr,
            Opcode.OPEN: lambda node, body: (fuse.open_answer(),),
            Opcode.OPENDIR: lambda node, body: (fuse.open_answer(),),
            Opcode.READDIR: self._readdir,
            Opcode.STATFS: self._statfs,
            Opcode.FALLOCATE: self._fallocate,
            Opcode.WRITE: self._write,
        } | {opcode: lambda node, body: _DONE for opcode in _SUCCEED}

    def answer(self, opcode: int, node: int, body: memoryview) -> Sequence[Part]:
        """The answer's body; OSError for a refusal, AbsentError for a READ that must wait."""
        try:
            if opcode == Opcode.READ:
                return self.read(node, *fuse.read_request(body))
            if handler := self._answers.get(opcode):
                return handler(node, body)
        except ValueError as error:
            raise OSError(errno.EINVAL, str(error)) from error
        raise OSError(errno.ENOSYS, "not of this file system")

    def read(self, node: int, offset: int, size: int) -> Sequence[Part]:
        """Bytes of a file; AbsentError when they must be fetched first; EIO, and a line in faults.log, when they cannot be had.

        EAGAIN for what the kernel reads around a page of a memory: it then asks for that page alone. Around a fault lie 128 KiB, of which a guest that starts
        needs a quarter: to fetch the rest would take its time, to wait for it would stop a machine whose own page is here, to note it would fill its trace.
        """
        try:
            source, recorder = self._source(node)
            around = source.memory and not _is_needed(offset, size)
            if around and recorder:
                raise AbsentError("what is noted is read page by page")
            wanted = max(0, min(size, source.size - offset))
            recorder.note(offset, wanted)
            parts = source.read(offset, wanted) if wanted else []
            if (got := sum(map(len, parts))) != wanted:
                raise LayerError(f"{got} bytes came of {wanted}")
        except AbsentError as error:
            if around:
                raise OSError(errno.EAGAIN, error.message) from error
            raise
        except Exception as error:
            raise self.failed(node, offset, error) from error
        return parts if len(parts) <= MAX_PARTS else [b"".join(parts)]

    def wants(self, node: int, offset: int, size: int) -> tuple[list[Want], bool]:
        """What must be here for a read, and whether it is of a memory. EIO, and a line in faults.log, when that cannot be said."""
        try:
            source, _ = self._source(node)
            return source.wants(offset // PAGE, -(-(offset + size) // PAGE)), source.memory
        except Exception as error:
            raise self.failed(node, offset, error) from error

    def failed(self, node: int, offset: int, error: Exception) -> OSError:
        """EIO; there is a line in faults.log."""
        # Whatever it is, it concerns this read only. What is open is not trusted any more: the layer may be mended, or published by now.
        self._close(node)
        self._fault(node, offset, error)
        return OSError(errno.EIO, str(error))

    def close(self) -> None:
        """Let go of all layers; they are opened again when needed."""
        for node in list(self._open):
            self._close(node)

    def _source(self, node: int) -> tuple[Source, Recorder]:
        if (found := self._open.get(node)) is not None:
            self._open.move_to_end(node)
            return found
        layer_id = _layer_id(node)
        found = self._open[node] = (self._opened(layer_id), Recorder(self.files.layer(layer_id).tracing))
        if len(self._open) > OPEN_CHAINS:
            self._close(next(iter(self._open)))
        return found

    def _opened(self, layer_id: str) -> Source:
        try:
            return self._open_source(self.files, layer_id)
        except LayerError:
            if self.files.draft(layer_id).root.exists():
                raise LayerError(f"the layer {layer_id} is still being saved") from None
            if not self.files.layer(layer_id).record.exists():
                raise
        return self._open_source(self.files, layer_id)  # published between the two looks

    def _close(self, node: int) -> None:
        if (found := self._open.pop(node, None)) is not None:
            for each in found:
                each.close()

    def _fault(self, node: int, offset: int, error: Exception) -> None:
        message = error.message if isinstance(error, RametError) else f"{type(error).__name__}: {error}"
        line = f"{time.time():.3f} {_layer_id(node)} {offset} {' '.join(message.split())}\n"
        try:
            fd = os.open(self.files.faults, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            try:
                if os.fstat(fd).st_size < FAULTS_LIMIT:
                    os.write(fd, line.encode(errors="replace"))
            finally:
                os.close(fd)
        except OSError as failed:  # a full disk must not cost the worker its life
            sys.stderr.write(f"{line.rstrip()} (not in faults.log: {failed})\n")

    def _size(self, node: int) -> int:
        """The size of a layer, or of one that is being saved: a machine starts from that while its pages are still on their way."""
        layer_id = _layer_id(node)
        layer, draft = self.files.layer(layer_id).record, self.files.draft(layer_id).record
        for record in (layer, draft, layer):  # the third for a layer that was published between the first two looks
            if (size := _recorded_size(record)) is not None:
                return size
        raise OSError(errno.ENOENT, f"there is no layer {layer_id}")

    def _attributes(self, node: int) -> bytes:
        return fuse.attributes(node, 0 if node == fuse.ROOT else self._size(node), *self._owner)

    def _lookup(self, node: int, body: memoryview) -> Sequence[Part]:
        found = _node(fuse.name_request(body)) if node == fuse.ROOT else None
        if found is None:
            raise OSError(errno.ENOENT, "not the name of a layer")
        return (fuse.entry(found, self._attributes(found)),)

    def _setattr(self, node: int, body: memoryview) -> Sequence[Part]:
        attributes, size = self._attributes(node), fuse.setattr_request(body)
        if size is not None and (node == fuse.ROOT or size != self._size(node)):
            raise OSError(errno.EPERM, "layers never change")
        return (fuse.attr_answer(attributes),)

    def _fallocate(self, node: int, body: memoryview) -> Sequence[Part]:
        if (needed := fuse.fallocate_request(body)) and needed > self._size(node):
            raise OSError(errno.EPERM, "layers never grow")  # "done" would make the kernel believe in a longer file
        return _DONE

    def _write(self, node: int, body: memoryview) -> Sequence[Part]:
        raise OSError(errno.EROFS, "layers never change")

    def _readdir(self, node: int, body: memoryview) -> Sequence[Part]:
        offset, size = fuse.read_request(body)
        return (fuse.directory(sorted(self._published()), offset, size),)

    def _published(self) -> Iterator[tuple[int, str]]:
        for name in os.listdir(self.files.layers):  # noqa: PTH208  (thousands of names: a Path of each costs more than the rest)
            if (node := _node(name.encode(errors="replace"))) is not None:
                yield node, name

    def _statfs(self, node: int, body: memoryview) -> Sequence[Part]:
        found = os.statvfs(self.files.root)
        return (fuse.statfs(found.f_blocks * found.f_frsize // PAGE),)


def _is_needed(offset: int, size: int) -> bool:
    """Whether all that a READ asks for may be needed, for it may be one folio. Those of FUSE's files are pages; should they be larger one day, they are
    powers of two that lie at multiples of their size, and one that is refused when it is asked for alone is an error in the guest."""
    return size <= PAGE or (_LARGE_FOLIOS and not size & (size - 1) and not offset % size)


def _layer_id(node: int) -> str:
    return f"{node:016x}"


def _node(name: bytes) -> int | None:
    """The node id of a file's name; None when it is no layer's id."""
    if len(name) != fuse.NAME_LENGTH or name.strip(b"0123456789abcdef"):
        return None
    node = int(name, 16)
    return node if fuse.ROOT < node < 1 << 63 else None


def _recorded_size(record: Path) -> int | None:
    """None: there is none, or it is not (yet) whole."""
    try:
        size = json.loads(record.read_bytes())["size"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return size if isinstance(size, int) and 0 <= size < 1 << 62 else None


def present(parts: Sequence[Part]) -> list[Part]:
    """The same answer with all its pages in memory.

    A kernel that has to fetch one while the worker is being killed gives up, and the reader gets EIO. Zeros that were never written are the host's one
    zero page, which the kernel does not take on its fast way.
    """
    found: list[Part] = []
    for part in parts:
        if is_hole(part):
            part = _ZEROS[: len(part)]
        elif part:
            bytes(part[::PAGE])
            part[-1]
        found.append(part)
    return found


@dataclass(frozen=True, kw_only=True)
class Parked:
    """A READ that is not answered yet. request: as it came; since: monotonic. rounds: how often it was fetched, and was gone again."""

    request: bytes
    unique: int
    node: int
    pid: int
    offset: int
    memory: bool
    since: float
    rounds: int


class Worker:
    """Answers the requests of one descriptor, until the file system is unmounted. SIGHUP: it lets go of open layers."""

    def __init__(self, fd: int, system: FileSystem) -> None:
        keeper_pid = os.getppid()
        self._fd = fd
        self._system = system
        self._buffer = memoryview(bytearray(fuse.BUFFER))
        self._poll = select.epoll()
        self._line = wanting.Line(system.files, self._poll, lambda: os.kill(keeper_pid, wanting.NUDGE))
        self._parked: dict[int, Parked] = {}  # by the numbers of what the fetcher was asked
        self._late: list[Parked] = []  # it is asked again at the next look
        self._look_at = 0.0
        self._stale = False
        self._woken, waker = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.signal(signal.SIGHUP, self._let_go)
        signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
        self._poll.register(self._woken, select.EPOLLIN)
        os.set_blocking(fd, False)
        # Exclusive: a request wakes one of those who wait for it, as it would in a read that blocks.
        self._poll.register(fd, select.EPOLLIN | select.EPOLLEXCLUSIVE)

    def run(self) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        idle = False
        while True:
            if idle or self._parked or self._late:
                self._listen()
            if self._stale:
                self._stale = False
                self._system.close()
            try:
                length = os.readv(self._fd, [self._buffer])
            except OSError as error:
                if error.errno in (errno.ENODEV, errno.ECONNABORTED):
                    return
                if error.errno not in (errno.ENOENT, errno.EINTR, errno.EAGAIN):  # ENOENT: its asker gave up in this moment
                    raise
                idle = error.errno == errno.EAGAIN
                continue
            idle = False
            self._respond(self._buffer[:length])

    def _let_go(self, number: int, frame: FrameType | None) -> None:
        self._stale = True

    def _listen(self) -> None:
        """Wait for a request, an answer of the fetcher, a signal; where something is parked, no longer than until the next look."""
        waits = bool(self._parked or self._late)
        for fd, events in self._poll.poll(max(0.0, self._look_at - time.monotonic()) if waits else None):
            if fd == self._woken:
                os.read(self._woken, fuse.BUFFER)
            elif fd == self._line.fileno():
                for number, error in self._line.ready(events):
                    if (parked := self._parked.pop(number, None)) is not None:
                        self._answered(parked, error)
        if waits and time.monotonic() >= self._look_at:
            self._look()

    def _respond(self, request: memoryview) -> None:
        try:
            respond(self._fd, self._system, request)
        except AbsentError:
            self._park(bytes(request), time.monotonic())
        if fuse.IN.unpack_from(request)[1] == Opcode.INTERRUPT:
            self._look_at = 0.0  # it may be of a process that dies; which other worker has its request we cannot know, so each looks anyway

    def _park(self, request: bytes, since: float, rounds: int = 0) -> None:
        _, _, unique, node, _, _, pid, *_ = fuse.IN.unpack_from(request)
        offset, size = fuse.read_request(request[fuse.IN.size :])
        try:
            wants, memory = self._system.wants(node, offset, size)
        except OSError as error:
            _send(self._fd, [fuse.refusal(unique, error.errno or errno.EIO)])
            return
        if unique & _RESENT:  # after another worker's death, perhaps to us again
            for number in [number for number, parked in self._parked.items() if parked.unique == unique]:
                self._forget(number)
        if not self._parked and not self._late:
            self._look_at = time.monotonic() + TICK
        parked = Parked(request=request, unique=unique, node=node, pid=pid, offset=offset, memory=memory, since=since, rounds=rounds)
        if rounds % (ROUNDS + 1) == ROUNDS:
            self._late.append(parked)
        else:
            self._parked[self._line.want(_layer_id(node), wants, memory=memory, at=offset)] = parked

    def _answered(self, parked: Parked, error: RametError | None) -> None:
        if error is None:
            self._again(parked)
        elif parked.memory:
            self._late.append(parked)
        else:
            self._fail(parked, error)

    def _again(self, parked: Parked) -> None:
        try:
            respond(self._fd, self._system, memoryview(parked.request))
        except AbsentError:
            self._park(parked.request, parked.since, parked.rounds + 1)

    def _fail(self, parked: Parked, error: RametError) -> None:
        _send(self._fd, [fuse.refusal(parked.unique, self._system.failed(parked.node, parked.offset, error).errno or errno.EIO)])

    def _forget(self, number: int) -> Parked:
        self._line.forget(number)
        return self._parked.pop(number)

    def _look(self) -> None:
        """Ask again for what is late, mend the line, and give up what nobody waits for any more, or waited for too long."""
        now = time.monotonic()
        self._look_at = now + TICK
        dying = {pid: _is_dying(pid) for pid in {parked.pid for parked in (*self._parked.values(), *self._late)}}
        late, self._late = self._late, []
        for number, parked in list(self._parked.items()):
            if dying[parked.pid] or (not parked.memory and now - parked.since > PATIENCE):
                late.append(self._forget(number))
        for parked in late:
            if dying[parked.pid]:
                _send(self._fd, [fuse.refusal(parked.unique, errno.EINTR)])
            elif not parked.memory and now - parked.since > PATIENCE:
                self._fail(parked, AbsentError(f"it could not be fetched in {PATIENCE:g} s"))
            else:
                self._again(parked)
        self._line.tend()


def _is_dying(pid: int) -> bool:
    """Whether a process, or a thread, has been killed or is gone. pid 0: one that we cannot see.

    A signal that kills nobody must not fail a read: a processor of a machine that has a page fault while it is kicked would end its machine.
    """
    try:
        status = Path(f"/proc/{pid}/status").read_text() if pid else ""
    except OSError:
        return True
    words = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    pending = int(words.get("SigPnd", "0"), 16) | int(words.get("ShdPnd", "0"), 16)
    return bool(pending >> (signal.SIGKILL - 1) & 1) or words.get("State", "").strip()[:1] in ("Z", "X")


def serve(fd: int, system: FileSystem) -> None:
    """What a worker process does."""
    Worker(fd, system).run()


def respond(fd: int, system: FileSystem, request: memoryview) -> None:
    """Answer one request. AbsentError: it is a READ that must wait, and is not answered."""
    if len(request) < fuse.IN.size:
        raise OSError(errno.EPROTO, f"a request of {len(request)} bytes")
    length, opcode, unique, node, *_ = fuse.IN.unpack_from(request)
    if opcode in _IGNORED:
        return
    try:
        if length != len(request):
            raise OSError(errno.EINVAL, "a request of another length than it says")
        parts = present(system.answer(opcode, node, request[fuse.IN.size :]))
        message = fuse.answer(unique, parts, sum(map(len, parts)))
    except OSError as error:
        message = [fuse.refusal(unique, error.errno or errno.EIO)]
    _send(fd, message)


def _send(fd: int, message: Sequence[Part]) -> None:
    try:
        os.writev(fd, message)
    except OSError as error:
        # ENOENT: nobody waits for it any more, or it was sent again and another has it.
        if error.errno != errno.ENOENT:
            raise


def chains(files: StoreDir, layer_id: str) -> Source:
    """The real source. What it may read counts as used now."""
    chain = Chain.open(files, layer_id)
    remote.touch(files, chain.blobs() if remote.is_any(files) else ())
    return chain


def main(argv: Sequence[str], open_source: Opener = chains, fetcher: Sequence[str] = keeper.FETCHER) -> int:
    """STORE_ROOT FUSE_FD LOCK_FD READY_FD FETCH_FD: become the keeper of a file system that is mounted already, see `keeper.keep`."""
    root, *numbers = argv
    fuse_fd, lock_fd, ready_fd, fetch_fd = map(int, numbers)
    files = StoreDir(root=Path(root))
    child = keeper.Fetcher([*fetcher, root, str(fetch_fd)], fetch_fd)
    return keeper.keep(files, fuse_fd, lock_fd, ready_fd, lambda fd: serve(fd, FileSystem(files, open_source)), child)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
