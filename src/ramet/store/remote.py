"""Blobs that are elsewhere: where each is to be had. What of it is here lies in its file among the blobs, which has holes for the rest.

Nothing says which chunks are here: a chunk is read, and does not match its digest where it is not. So a crash, a lost write or a flipped bit in the cache only
mean that the chunk is fetched again.

The daemon, the fetcher and a collection write to the records: one after the other, by a lock on their directory.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from ramet import records
from ramet.errors import DaemonError, HostError, LayerError, NotFoundError, SpecError
from ramet.paths import StoreDir
from ramet.reference import DIGEST
from ramet.store import disk

_MINUTE = 60.0


@dataclass(frozen=True, kw_only=True)
class Want:
    """A frame of a blob. blob: `sha256:…`; offset, length: bytes of the blob; mark: the first 16 bytes of the frame's SHA-256."""

    blob: str
    offset: int
    length: int
    mark: bytes


@dataclass(frozen=True, kw_only=True)
class Source:
    """A repository that has a blob. host: as in an image's name (`ghcr.io`, `127.0.0.1:5000`); path: `acme/shop`."""

    host: str
    path: str


@dataclass(frozen=True, kw_only=True)
class Remote:
    """size: bytes of the whole blob. sources: the one named last first. whole: all of it is here, and was verified.

    evicted: chunks of it were given up for their space, so it is not fetched in the background any more.
    """

    digest: str
    size: int
    sources: tuple[Source, ...]
    whole: bool = False
    evicted: bool = False


def load(files: StoreDir, digest: str) -> Remote | None:
    """None for a blob that was made here. LayerError when the record is damaged."""
    path = files.remote(digest)
    try:
        found = records.load(Remote, json.loads(path.read_bytes()), "record")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise HostError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, DaemonError) as error:
        raise LayerError(f"where blob {digest} is to be had is not known: {path} is damaged", hint="Pull what needs it again.") from error
    if found.digest != digest:
        raise LayerError(f"where blob {digest} is to be had is not known: {path} is another blob's", hint="Pull what needs it again.")
    return found


def save(files: StoreDir, found: Remote) -> None:
    """Atomically; durable."""
    disk.replace(files.remote(found.digest), json.dumps(records.dump(found)).encode(), durable=True)


def change(files: StoreDir, digest: str, **changes: bool) -> None:
    """Change a record, if there is one; what another process changes of it at the same time is not lost."""
    with disk.locked(files.remotes, alone=True):
        if found := load(files, digest):
            save(files, replace(found, **changes))  # type: ignore[arg-type]


def expect(files: StoreDir, digest: str, size: int, source: Source) -> None:
    """Have a place for a blob that is not here, and know where it is to be had. One that is here stays as it is; one more source is remembered."""
    with disk.locked(files.remotes, alone=True):
        found = load(files, digest)
        path = files.blob(digest)
        if not found and path.exists():
            return
        others = tuple(each for each in found.sources if each != source) if found else ()
        whole = bool(found and found.whole and path.exists())  # a collection that was cut off takes the blob before its record
        save(
            files, replace(found, sources=(source, *others), whole=whole) if found else Remote(digest=digest, size=size, sources=(source,))
        )
        place(files, digest, size)


def place(files: StoreDir, digest: str, size: int) -> None:
    """Have a file for a blob, of its length."""
    path = files.blob(digest)
    with disk.guard("write", path):
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(fd, size)
        finally:
            os.close(fd)


def is_remote(files: StoreDir, digest: str) -> bool:
    """Whether what is not here of a blob can be fetched."""
    return files.remote(digest).exists()


def is_any(files: StoreDir) -> bool:
    """Whether any blob here can be fetched."""
    try:
        with os.scandir(files.remotes) as found:
            return any(True for _ in found)
    except FileNotFoundError:  # of an older Ramet
        return False


def absent(files: StoreDir, digest: str) -> int:
    """Bytes of a blob that are not here, as its file's holes have it."""
    with contextlib.suppress(FileNotFoundError):
        if is_remote(files, digest):
            found = files.blob(digest).stat()
            return max(0, found.st_size - found.st_blocks * 512)
    return 0


def lend(files: StoreDir, digest: str, offset: int, length: int) -> tuple[int, int]:
    """A descriptor of a blob, for others to read from, and where the bytes asked for end. length: -1 for all that follow.

    NotFoundError unless all of them are here. What a crash or a flipped bit did to them is for their reader to find: he has their digests.
    """
    if not DIGEST.fullmatch(digest):
        raise SpecError(f"{digest!r} is no blob's digest", hint="Write sha256: and 64 hexadecimal digits.")
    elsewhere = is_remote(files, digest)  # asked before and after: a collection takes the blob first, a pull the record
    gone = NotFoundError(f"these bytes of blob {digest} are not here", details={"digest": digest})
    try:
        fd = os.open(files.blob(digest), os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise gone from None
    except OSError as error:
        raise HostError(f"cannot read blob {digest}: {error.strerror}") from error
    size = os.fstat(fd).st_size
    end = size if length < 0 else offset + length
    whole = not (elsewhere or is_remote(files, digest)) or list(held(fd, offset, end)) == [(offset, end)]
    if not 0 <= offset <= end <= size or not (whole or offset == end):
        os.close(fd)
        raise gone
    return fd, end


def used(files: StoreDir, digest: str) -> float:
    """When a blob that can be fetched was last used, Unix time; 0 where it cannot."""
    try:
        return files.remote(digest).stat().st_mtime
    except FileNotFoundError:
        return 0.0


def touch(files: StoreDir, digests: Iterable[str]) -> None:
    """Note that blobs are in use, at most once a minute: those that were used longest ago are given up first."""
    now = time.time()
    for digest in digests:
        with contextlib.suppress(OSError):
            if 0 < used(files, digest) < now - _MINUTE:
                os.utime(files.remote(digest), (now, now))


def held(fd: int, offset: int, end: int) -> Iterator[tuple[int, int]]:
    """The parts of offset … end-1 of a file that are no holes: begin and end of each."""
    while offset < end:
        try:
            begin = os.lseek(fd, offset, os.SEEK_DATA)
        except OSError:  # ENXIO: nothing but a hole from here on
            return
        if begin >= end:
            return
        stop = min(end, os.lseek(fd, begin, os.SEEK_HOLE))
        yield begin, stop
        offset = stop


def gaps(ranges: Iterable[tuple[int, int]], size: int) -> Iterator[tuple[int, int]]:
    """What of 0 … size-1 lies between ranges, which are sorted, and behind them: begin and end of each."""
    at = 0
    for begin, end in ranges:
        if begin > at:
            yield at, min(begin, size)
        at = max(at, end)
    if at < size:
        yield at, size
