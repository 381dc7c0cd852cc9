"""Chunks that a registry has too, given up again: first of the blobs that were used longest ago, and in each first what no trace names.

Frames are given up whole: their bytes read as zeros afterwards, also where a block of the file system has a part of another frame, so that nothing which is
half there looks like damage. One that is fetched and given up in the same moment is missed by its reader, who asks for it again.
"""

from __future__ import annotations

import bisect
import ctypes
import fcntl
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ramet.errors import LayerError, RametError
from ramet.paths import StoreDir
from ramet.store import disk, garbage, index, remote, tracing
from ramet.store.chain import Chain
from ramet.store.garbage import Records, Step
from ramet.store.layer import PAGE, Layer
from ramet.store.remote import Remote

_PIECE = 16 << 20  # bytes that are given up before it is looked whether that is enough
_KEEP_SIZE, _PUNCH_HOLE = 1, 2  # include/uapi/linux/falloc.h
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, kw_only=True)
class Evicted:
    """What was given up, or would be. bytes: on the disk. blobs: whose. postponed: why that is less than was asked for, a sentence each."""

    bytes: int = 0
    blobs: tuple[str, ...] = ()
    postponed: tuple[str, ...] = ()


def stored(files: StoreDir) -> int:
    """Bytes that all layers take on the disk."""
    places = (files.layers, files.blobs, files.remotes)
    return sum(disk.allocated(Path(root, name)) for place in places for root, _, names in os.walk(place) for name in names)


def evict(files: StoreDir, excess: int, in_use: Callable[[], Iterable[str]], step: Step, *, dry_run: bool = False) -> Evicted:
    """Give up so many bytes, or as many as there are. in_use: the layers that somebody reads now; asked again for each blob, since machines start meanwhile."""
    run = _Eviction(files, step, dry_run=dry_run)
    freed: dict[str, int] = {}
    postponed: list[str] = []
    for digest in sorted(run.users, key=lambda each: (remote.used(files, each), each)):
        if (missing := excess - sum(freed.values())) <= 0:
            break
        with garbage.alone(files) as nobody_else:
            if not nobody_else:
                postponed.append("no chunks were given up: a layer is being sealed or pulled")
                break
            if digest in run.blobs(in_use()):
                remote.touch(files, [digest])
            else:
                try:
                    freed[digest] = run.give_up(digest, missing)
                except RametError as error:
                    postponed.append(f"blob {digest} stays as it is: {error.message}")
    return Evicted(bytes=sum(freed.values()), blobs=tuple(each for each in freed if freed[each]), postponed=tuple(postponed))


def readers(files: StoreDir, heads: Iterable[str], blobs: Iterable[str]) -> list[str]:
    """Those of the layers that may read from the blobs."""
    records, wanted = Records(files), set(blobs)
    found = []
    for head in heads:
        below = [records[name] for name in garbage.needed(records, [head]) if name in records]
        if any(wanted.intersection(each.blobs) for each in below):
            found.append(head)
    return found


def drop_cached(files: StoreDir, layers: Iterable[str]) -> None:
    """Have the kernel forget what it keeps in memory of layers that are served. What somebody maps stays."""
    for each in layers:
        try:
            fd = os.open(files.served(each), os.O_RDONLY | os.O_CLOEXEC)
        except OSError:  # not served any more
            continue
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def punch(fd: int, begin: int, end: int) -> None:
    """Make these bytes of a file zeros that take no space. OSError."""
    if _libc.fallocate(fd, _PUNCH_HOLE | _KEEP_SIZE, ctypes.c_longlong(begin), ctypes.c_longlong(end - begin)):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


class _Eviction:
    """One run over a store. users: by each blob that can be had elsewhere, the layers that name it."""

    def __init__(self, files: StoreDir, step: Step, *, dry_run: bool) -> None:
        self._files = files
        self._step = step
        self._dry_run = dry_run
        self._records = Records(files)
        self._traced: dict[str, set[tuple[int, int]]] | None = None
        self.users: dict[str, list[Layer]] = defaultdict(list)
        for each in self._records.values():
            for digest in each.blobs:
                if remote.is_remote(files, digest):
                    self.users[digest].append(each)

    def blobs(self, layers: Iterable[str]) -> set[str]:
        """All that reading these layers may take."""
        return {digest for name in garbage.needed(self._records, layers) if name in self._records for digest in self._records[name].blobs}

    def give_up(self, digest: str, most: int) -> int:
        """Bytes of the blob that its file does not take any more: so many, or all. LayerError, HostError."""
        path = self._files.blob(digest)
        found = remote.load(self._files, digest)
        if found is None or not found.sources:
            return 0
        with disk.guard("free a part of", path):
            try:
                fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            except FileNotFoundError:
                return 0
            try:
                size = -(-os.fstat(fd).st_size // PAGE) * PAGE  # to its end, the last block is only emptied
                if not _lock(fd):
                    raise LayerError("it is being fetched as a whole")
                if not any(remote.held(fd, 0, size)):
                    return 0
                self._note(found)
                kept = sorted(self._of_traces().get(digest, ()))
                starts = self._starts(digest)
                freed = self._punched(fd, remote.gaps(kept, size), starts, most)
                return freed + self._punched(fd, kept if self._dry_run else [(0, size)], starts, most - freed)
            finally:
                os.close(fd)

    def _note(self, found: Remote) -> None:
        """Say that it is not whole before it is so, and should not be at once again. When the blob was used last stays as it is."""
        if (found.whole or not found.evicted) and not self._dry_run:
            self._step("evict record")
            last = remote.used(self._files, found.digest)
            remote.change(self._files, found.digest, whole=False, evicted=True)
            os.utime(self._files.remote(found.digest), (last, last))

    def _punched(self, fd: int, ranges: Iterable[tuple[int, int]], starts: Sequence[int], most: int) -> int:
        before, freed = _taken(fd), 0
        for first, last in ranges:
            for begin, end in _pieces(first, last, starts):
                if freed >= most:
                    return freed
                self._step("evict chunks")
                if self._dry_run:
                    freed += sum(stop - start for start, stop in remote.held(fd, begin, end))
                else:
                    punch(fd, first, end)  # from the range's begin on: two pieces may have parts of one block
                    freed = before - _taken(fd)
        return freed

    def _starts(self, digest: str) -> list[int]:
        """Where frames of the blob begin, as far as the layers here know."""
        found: set[int] = set()
        for each in self.users[digest]:
            rows = index.of_layer(self._files.layer(each.id), each)
            which = each.blobs.index(digest)
            found.update(rows.offset[row] for row in range(len(rows)) if rows.length[row] and rows.blob[row] == which)
        return sorted(found)

    def _of_traces(self) -> dict[str, set[tuple[int, int]]]:
        """The frames that starts have touched, by their blobs."""
        if self._traced is None:
            self._traced = defaultdict(set)
            for name in self._records:
                try:
                    self._trace(name, self._traced)
                except RametError:  # what a damaged trace or layer names is not known
                    continue
        return self._traced

    def _trace(self, name: str, found: dict[str, set[tuple[int, int]]]) -> None:
        chunks = tracing.load(self._files, name)
        if not chunks:
            return
        with Chain.open(self._files, name) as chain:
            for want in chain.traced(chunks):
                found[want.blob].add((want.offset, want.offset + want.length))


def _lock(fd: int) -> bool:
    """Keep those out who fetch and verify the whole blob, until it is closed; whether there is none."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _taken(fd: int) -> int:
    return os.fstat(fd).st_blocks * 512


def _pieces(begin: int, end: int, starts: Sequence[int]) -> Iterator[tuple[int, int]]:
    """The range in pieces, none of which ends inside a frame."""
    while begin < end:
        stop = end
        if end - begin > _PIECE:
            at = bisect.bisect_right(starts, begin + _PIECE)
            if at and starts[at - 1] > begin:
                stop = min(end, starts[at - 1])
            elif at < len(starts):
                stop = min(end, starts[at])
        yield begin, stop
        begin = stop
