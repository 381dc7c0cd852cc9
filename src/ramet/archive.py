"""A directory of this host as a tar stream: built as it is read, never whole in memory. `extract` is the other way."""

from __future__ import annotations

import asyncio
import os
import stat
import tarfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

from ramet.errors import HostError

CHUNK = 256 << 10  # bytes that travel at a time
BLOCK = tarfile.BLOCKSIZE
Progress = Callable[[int], None]  # called with bytes done so far

_TYPES = {stat.S_IFREG: tarfile.REGTYPE, stat.S_IFDIR: tarfile.DIRTYPE, stat.S_IFLNK: tarfile.SYMTYPE, stat.S_IFIFO: tarfile.FIFOTYPE}


def _error(path: bytes, error: OSError) -> HostError:
    return HostError(f"cannot read {os.fsdecode(path)}: {error.strerror}", details={"path": os.fsdecode(path)})


def _member(path: bytes, name: str, info: os.stat_result, seen: dict[tuple[int, int], str]) -> tarfile.TarInfo | None:
    """The header of one file; None for devices and sockets, which mean nothing elsewhere. seen: where an inode with several links was sent first."""
    kind = _TYPES.get(stat.S_IFMT(info.st_mode))
    if kind is None:
        return None
    member = tarfile.TarInfo(name)
    member.type = kind
    member.mode = stat.S_IMODE(info.st_mode)
    member.mtime = info.st_mtime_ns // 1_000_000_000
    member.uid, member.gid = info.st_uid, info.st_gid
    if kind == tarfile.SYMTYPE:
        member.linkname = os.fsdecode(os.readlink(path))  # noqa: PTH115  (bytes)
    elif kind == tarfile.REGTYPE:
        first = seen.setdefault((info.st_dev, info.st_ino), name) if info.st_nlink > 1 else name
        if first != name:
            member.type, member.linkname = tarfile.LNKTYPE, first
        else:
            member.size = info.st_size
    return member


def _contents(path: bytes, size: int) -> Iterator[bytes]:
    """Exactly `size` bytes of a file, padded to whole blocks."""
    left = size
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK), "rb", buffering=0) as file:
        while left:
            data = file.read(min(CHUNK, left))
            if not data:
                raise HostError(f"{os.fsdecode(path)} became shorter while it was read", hint="Copy it when nothing writes to it.")
            left -= len(data)
            yield data
    if size % BLOCK:
        yield bytes(BLOCK - size % BLOCK)


def _walk(root: bytes) -> Iterator[tuple[bytes, str, os.stat_result]]:
    """Path, name in the archive and status of everything below `root`, parents first, in order of names."""
    waiting = [(root, ".")]
    while waiting:
        path, name = waiting.pop()
        info = os.lstat(path)
        yield path, name, info
        if stat.S_ISDIR(info.st_mode):
            entries = sorted(os.listdir(path), reverse=True)  # noqa: PTH208  (bytes)
            waiting.extend((path + b"/" + entry, f"{name}/{os.fsdecode(entry)}") for entry in entries)


def blocks(root: Path) -> Iterator[bytes]:
    """The tar stream of a directory's contents (under `./`), in pieces of any size. HostError for what cannot be read.

    pax headers where a name, a size or a link does not fit the old format. Devices and sockets are left out.
    """
    seen: dict[tuple[int, int], str] = {}
    path = os.fsencode(root)
    try:
        for path, name, info in _walk(os.fsencode(root)):
            if member := _member(path, name, info, seen):
                yield member.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")
                if member.isreg():
                    yield from _contents(path, member.size)
    except OSError as error:
        raise _error(path, error) from error
    yield bytes(2 * BLOCK)


def _gather(pieces: Iterator[bytes]) -> bytes:
    """The next CHUNK bytes, about; empty at the end."""
    parts: list[bytes] = []
    size = 0
    for piece in pieces:
        parts.append(piece)
        size += len(piece)
        if size >= CHUNK:
            break
    return b"".join(parts)


async def stream(pieces: Iterator[bytes], progress: Progress | None = None) -> AsyncIterator[bytes]:
    """What a blocking iterator yields, read in a thread, in pieces worth sending."""
    done = 0
    while piece := await asyncio.to_thread(_gather, pieces):
        yield piece
        done += len(piece)
        if progress:
            progress(done)


def size_of(root: Path) -> int:
    """Bytes of the files below `root`, hard links counted once, for a progress bar; what cannot be read counts nothing."""
    total = 0
    seen: set[tuple[int, int]] = set()
    for directory, _, names in os.walk(root):
        for name in names:
            try:
                info = os.lstat(os.path.join(directory, name))  # noqa: PTH118
            except OSError:
                continue
            if stat.S_ISREG(info.st_mode) and (info.st_dev, info.st_ino) not in seen:
                if info.st_nlink > 1:
                    seen.add((info.st_dev, info.st_ino))
                total += info.st_size
    return total
