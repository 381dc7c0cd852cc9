"""Blobs: zstd files of independent frames with a seek table behind them, named by the SHA-256 of all of it.

The format is zstd's contrib/seekable_format: `zstd -d` unpacks it to all its pages, one after the other. Where a frame is and what it must hash to is in a
layer's index; nothing that was not verified is decompressed.
"""

from __future__ import annotations

import hashlib
import os
import struct
import threading
from array import array
from collections import OrderedDict
from pathlib import Path
from types import TracebackType

import zstandard

from ramet.errors import HostError, LayerError
from ramet.store import disk
from ramet.store.layer import new_id

# Measured on a guest's memory: level 1 compresses 0.7 GB/s, level 3 0.56 GB/s for 4 % less.
LEVEL = 1
_SKIPPABLE, _SEEKABLE = 0x184D2A5E, 0x8F92EAB1
_HEAD, _FOOT = struct.Struct("<II"), struct.Struct("<IBI")
_BUFFER = 1 << 20
_OPEN = 256  # descriptors of a process for blobs: a quarter of the usual limit
_FRAMES = 128  # decompressed frames that a process remembers: at most 8 MiB, for faults that come page by page


class Writer:
    """A blob that is being made: staged in the blobs' directory, renamed to its digest by `publish`, gone when the body ends before that.

    The bytes depend on the frames alone.
    """

    def __init__(self, blobs: Path) -> None:
        self._blobs = blobs
        self._path = blobs / f"{disk.STAGED}{new_id()}"
        self._fd = -1
        self._hash = hashlib.sha256()
        self._pending = bytearray()
        self._table = array("I")
        self._digest = ""
        self.size = 0

    def __enter__(self) -> Writer:
        with disk.guard("write", self._path):
            self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        os.close(self._fd)
        self._path.unlink(missing_ok=True)

    def add(self, frame: bytes, content: int) -> int:
        """Append a frame that holds `content` bytes; its offset."""
        at = self.size
        self._table.extend((len(frame), content))
        self._append(frame)
        return at

    def read(self, offset: int, length: int) -> bytes:
        """What was appended there."""
        self._flush()
        with disk.guard("read", self._path):
            return os.pread(self._fd, length, offset)

    def finish(self) -> str:
        """Write the seek table, and all of it to the disk. The blob's digest, empty when it has no frames."""
        if not self._table:
            return ""
        count = len(self._table) // 2
        table = b"".join(struct.pack("<II", *self._table[at : at + 2]) for at in range(0, 2 * count, 2))
        self._append(_HEAD.pack(_SKIPPABLE, len(table) + _FOOT.size) + table + _FOOT.pack(count, 0, _SEEKABLE))
        self._flush()
        digest = f"sha256:{self._hash.hexdigest()}"
        with disk.guard("write", self._path):
            os.fsync(self._fd)
        self._digest = digest
        return digest

    def publish(self) -> None:
        """Give what was finished its name, on the disk when this returns."""
        if not self._digest:
            return
        with disk.guard("write", self._path):
            self._path.rename(self._blobs / self._digest.replace(":", "-"))
        disk.sync(self._blobs)

    def _append(self, data: bytes) -> None:
        self._hash.update(data)
        self._pending += data
        self.size += len(data)
        if len(self._pending) >= _BUFFER:
            self._flush()

    def _flush(self) -> None:
        with disk.guard("write", self._path):
            disk.write_all(self._fd, self._pending)
        self._pending.clear()


class Files:
    """Descriptors of files that do not change, kept open: the least recently used are closed.

    Reads hold a lock, so that no thread reads from a descriptor that another has closed.
    """

    def __init__(self, limit: int = _OPEN) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._fds: OrderedDict[str, int] = OrderedDict()

    def read(self, path: str, length: int, offset: int) -> bytes:
        """os.pread, with its errors; fewer bytes at the file's end only."""
        with self._lock:
            fd = self._open(path)
            data = os.pread(fd, length, offset)
            while len(data) < length and (more := os.pread(fd, length - len(data), offset + len(data))):
                data += more
            return data

    def is_hole(self, path: str, offset: int) -> bool:
        """Whether there is a hole in a file at an offset, or that is behind its end. OSError: it cannot be opened."""
        with self._lock:
            fd = self._open(path)
            try:
                return os.lseek(fd, offset, os.SEEK_DATA) != offset
            except OSError:  # ENXIO: nothing but a hole from here on
                return True

    def _open(self, path: str) -> int:
        fd = self._fds.get(path)
        if fd is None:
            fd = self._fds[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            if len(self._fds) > self._limit:
                os.close(self._fds.popitem(last=False)[1])
        else:
            self._fds.move_to_end(path)
        return fd

    def forget(self, path: str) -> None:
        """Close it; reading it again opens it again."""
        with self._lock:
            fd = self._fds.pop(path, None)
            if fd is not None:
                os.close(fd)


class Frames:
    """Decompressed frames by their marks: what was verified once and is wanted again soon, for faults come page by page."""

    def __init__(self, limit: int = _FRAMES) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._kept: OrderedDict[bytes, bytes] = OrderedDict()

    def get(self, mark: bytes) -> bytes | None:
        with self._lock:
            found = self._kept.get(mark)
            if found is not None:
                self._kept.move_to_end(mark)
            return found

    def put(self, mark: bytes, content: bytes) -> None:
        with self._lock:
            self._kept[mark] = content
            if len(self._kept) > self._limit:
                self._kept.popitem(last=False)


files = Files()
frames = Frames()
_local = threading.local()


def compress(content: bytes) -> bytes:
    """One frame, with its content's length and no checksum: the index has the digest."""
    compressor = getattr(_local, "compressor", None)
    if compressor is None:
        compressor = _local.compressor = zstandard.ZstdCompressor(level=LEVEL, write_content_size=True, write_checksum=False)
    frame: bytes = compressor.compress(content)
    return frame


def decompress(frame: bytes | memoryview, length: int) -> bytes:
    """The content of a verified frame. ValueError when it is not `length` bytes: one that lies must not make us allocate what it says."""
    if zstandard.frame_content_size(frame) != length:
        raise ValueError("it holds another number of bytes")
    decompressor = getattr(_local, "decompressor", None)
    if decompressor is None:
        decompressor = _local.decompressor = zstandard.ZstdDecompressor()
    try:
        content: bytes = decompressor.decompress(frame)
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from error
    if len(content) != length:
        raise ValueError("it holds another number of bytes")
    return content


def read(path: Path | str, offset: int, length: int, what: str) -> bytes:
    """That many bytes of a blob. LayerError, which begins with `what`, when it is missing or shorter; HostError when the disk fails."""
    name = os.path.basename(path)  # noqa: PTH119  (called for every read)
    try:
        data = files.read(str(path), length, offset)
    except FileNotFoundError as error:
        raise LayerError(f"{what}: blob {name} is missing") from error
    except OSError as error:
        raise HostError(f"{what}: cannot read blob {path}: {error.strerror}", details={"path": str(path), "errno": error.errno}) from error
    if len(data) != length:
        files.forget(str(path))
        raise LayerError(f"{what}: blob {name} is truncated: it should have {length} bytes at {offset}, and has {len(data)}")
    return data


def digest(path: Path) -> str:
    """`sha256:…` of a file's content."""
    with disk.guard("read", path), open(path, "rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
