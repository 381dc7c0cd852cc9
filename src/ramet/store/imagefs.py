"""The image file system: each layer, with all it stands on, as one raw file `mnt/ID`. This is what its worker processes do; `keeper` keeps them.

The node id of a file is its layer's id, so a worker knows nothing that the next one does not: any of them can answer any request, also one that
another took and did not live to answer. Files look writable, for QEMU opens a machine's memory for writing though it maps it privately,
and never change: a WRITE is refused, and a FALLOCATE succeeds and does nothing, so that QEMU goes on to drop its private pages when a guest gives memory back.

What cannot be read is EIO, which QEMU sees as SIGBUS, and one line in faults.log: `UNIX_TIME ID OFFSET MESSAGE`. Wrong data is never served.

What the speed hangs on, measured, in seconds of a worker's cpu for each GB: 0.65 to decompress and 0.15 to verify chunks as a guest's memory has them,
0.2 for the kernel's copy and wake-ups, 0.05 for this Python. Zeros skip the first two. Worth their lines: malloc that keeps freed chunks (`keeper.settle`),
writev of the pieces as they are, zeros that are real pages (0.06).
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Protocol

from ramet.errors import LayerError, RametError
from ramet.paths import StoreDir
from ramet.store import fuse, keeper
from ramet.store.chain import Chain
from ramet.store.fuse import PAGE, Opcode
from ramet.store.source import is_hole

Part = bytes | memoryview

OPEN_CHAINS = 64
MAX_PARTS = 1000  # IOV_MAX is 1024, with the header
FAULTS_LIMIT = 1 << 20  # bytes of faults.log: a guest that touches a damaged page in a loop must not fill the disk
_ZEROS = memoryview(bytes(bytearray(fuse.MAX_READ)))  # written, once for all workers; bytes(n) alone is not
_DONE: tuple[Part, ...] = ()
_SUCCEED = {Opcode.RELEASE, Opcode.FSYNC, Opcode.FLUSH, Opcode.RELEASEDIR, Opcode.FSYNCDIR, Opcode.ACCESS, Opcode.DESTROY}
_IGNORED = {Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.INTERRUPT}


class Source(Protocol):
    """What a file's bytes come from: `store.chain.Chain`."""

    @property
    def size(self) -> int: ...

    def read(self, offset: int, length: int) -> list[Part]:
        """Pieces of min(length, size - offset) bytes together; LayerError when they cannot be had."""
        ...

    def close(self) -> None: ...


Opener = Callable[[StoreDir, str], Source]


class FileSystem:
    """Answers requests. open_source: LayerError for a layer that is missing or damaged."""

    def __init__(self, files: StoreDir, open_source: Opener) -> None:
        self._files = files
        self._open_source = open_source
        self._open: OrderedDict[int, Source] = OrderedDict()
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
        """The answer's body; OSError for a refusal."""
        try:
            if opcode == Opcode.READ:
                return self.read(node, *fuse.read_request(body))
            if handler := self._answers.get(opcode):
                return handler(node, body)
        except ValueError as error:
            raise OSError(errno.EINVAL, str(error)) from error
        raise OSError(errno.ENOSYS, "not of this file system")

    def read(self, node: int, offset: int, size: int) -> Sequence[Part]:
        """Bytes of a file; EIO, and a line in faults.log, when they cannot be had."""
        try:
            source = self._source(node)
            wanted = max(0, min(size, source.size - offset))
            parts = source.read(offset, wanted) if wanted else []
            if (got := sum(map(len, parts))) != wanted:
                raise LayerError(f"{got} bytes came of {wanted}")
        except Exception as error:
            # Whatever it is, it concerns this read only. What is open is not trusted any more: the layer may be mended, or published by now.
            self._close(node)
            self._fault(node, offset, error)
            raise OSError(errno.EIO, str(error)) from error
        return parts if len(parts) <= MAX_PARTS else [b"".join(parts)]

    def close(self) -> None:
        """Let go of all layers; they are opened again when needed."""
        while self._open:
            self._open.popitem()[1].close()

    def _source(self, node: int) -> Source:
        if (source := self._open.get(node)) is not None:
            self._open.move_to_end(node)
            return source
        source = self._opened(_layer_id(node))
        self._open[node] = source
        if len(self._open) > OPEN_CHAINS:
            self._open.popitem(last=False)[1].close()
        return source

    def _opened(self, layer_id: str) -> Source:
        try:
            return self._open_source(self._files, layer_id)
        except LayerError:
            if self._files.draft(layer_id).root.exists():
                raise LayerError(f"the layer {layer_id} is still being saved") from None
            if not self._files.layer(layer_id).record.exists():
                raise
        return self._open_source(self._files, layer_id)  # published between the two looks

    def _close(self, node: int) -> None:
        if (source := self._open.pop(node, None)) is not None:
            source.close()

    def _fault(self, node: int, offset: int, error: Exception) -> None:
        message = error.message if isinstance(error, RametError) else f"{type(error).__name__}: {error}"
        line = f"{time.time():.3f} {_layer_id(node)} {offset} {' '.join(message.split())}\n"
        try:
            fd = os.open(self._files.faults, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
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
        layer, draft = self._files.layer(layer_id).record, self._files.draft(layer_id).record
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
        for name in os.listdir(self._files.layers):  # noqa: PTH208  (thousands of names: a Path of each costs more than the rest)
            if (node := _node(name.encode(errors="replace"))) is not None:
                yield node, name

    def _statfs(self, node: int, body: memoryview) -> Sequence[Part]:
        found = os.statvfs(self._files.root)
        return (fuse.statfs(found.f_blocks * found.f_frsize // PAGE),)


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


def serve(fd: int, system: FileSystem) -> None:
    """Answer requests until the file system is unmounted. SIGHUP: let go of open layers."""
    waiting = stale = False

    def let_go(number: int, frame: FrameType | None) -> None:
        nonlocal stale
        if waiting:
            system.close()
        else:
            stale = True

    signal.signal(signal.SIGHUP, let_go)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    buffer = memoryview(bytearray(fuse.BUFFER))
    while True:
        if stale:
            stale = False
            system.close()
        waiting = True
        try:
            length = os.readv(fd, [buffer])
        except OSError as error:
            if error.errno in (errno.ENODEV, errno.ECONNABORTED):
                return
            if error.errno not in (errno.ENOENT, errno.EINTR, errno.EAGAIN):  # ENOENT: its asker gave up in this moment
                raise
            continue
        finally:
            waiting = False
        respond(fd, system, buffer[:length])


def respond(fd: int, system: FileSystem, request: memoryview) -> None:
    """Answer one request."""
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
    try:
        os.writev(fd, message)
    except OSError as error:
        # ENOENT: nobody waits for it any more, or it was sent again and another has it.
        if error.errno != errno.ENOENT:
            raise


def chains(files: StoreDir, layer_id: str) -> Source:
    """The real source."""
    return Chain.open(files, layer_id)


def main(argv: Sequence[str], open_source: Opener = chains) -> int:
    """STORE_ROOT FUSE_FD LOCK_FD READY_FD: become the keeper of a file system that is mounted already, see `keeper.keep`."""
    root, *numbers = argv
    fuse_fd, lock_fd, ready_fd = map(int, numbers)
    files = StoreDir(root=Path(root))
    return keeper.keep(files, fuse_fd, lock_fd, ready_fd, lambda fd: serve(fd, FileSystem(files, open_source)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
