"""What of a blob that comes from elsewhere is here, and what is to be fetched of it. All of this blocks: threads call it, but for small pieces."""

from __future__ import annotations

import os
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ramet.errors import LayerError, NoSpaceError, RametError
from ramet.paths import StoreDir
from ramet.store import blob, disk, garbage, index, remote
from ramet.store.index import MARK, mark_of
from ramet.store.layer import CHUNK, Layer
from ramet.store.remote import Remote, Want

LONGEST = 2 * CHUNK  # bytes of a frame, at most: zstd makes what does not compress only a little longer
RAW = b""  # the mark of bytes that only the whole blob's digest vouches for
_PIECE = 1 << 20  # bytes of such a piece
_BLOCK = 4096  # bytes of which a hole is a multiple, at least
_SPARE, _LEAST = 0.05, 2 << 30  # of the disk: so much stays free of what nobody waits for; bytes, if that is less


@dataclass(frozen=True, kw_only=True, eq=False)
class Table:
    """The frames of one blob that layers of this host name, by offset."""

    blob: str
    offset: array[int]
    length: array[int]
    marks: bytes

    def __len__(self) -> int:
        return len(self.offset)

    def want(self, row: int) -> Want:
        return Want(blob=self.blob, offset=self.offset[row], length=self.length[row], mark=self.marks[row * MARK : row * MARK + MARK])

    def between(self, begin: int, end: int) -> list[Want]:
        """The frames that begin at begin … end-1."""
        return [self.want(row) for row in range(bisect_left(self.offset, begin), bisect_left(self.offset, end))]


def table(files: StoreDir, digest: str, layers: Iterable[Layer]) -> Table:
    """Of a blob, by the indexes of those of the layers that name it; what cannot be read is left out."""
    rows: set[tuple[int, int, bytes]] = set()
    for record in layers:
        if not record.sealed or digest not in record.blobs:
            continue
        with suppress(RametError):
            found = index.of_layer(files.layer(record.id), record)
            which = record.blobs.index(digest)
            for row, (number, length) in enumerate(zip(found.blob, found.length, strict=True)):
                if number == which and 0 < length <= LONGEST:
                    rows.add((found.offset[row], length, found.mark(row)))
    ordered = sorted(rows)
    return Table(
        blob=digest,
        offset=array("Q", (offset for offset, _, _ in ordered)),
        length=array("I", (length for _, length, _ in ordered)),
        marks=b"".join(mark for _, _, mark in ordered),
    )


def needed(files: StoreDir, layers: Iterable[str]) -> list[Layer]:
    """The records of all layers that reading these takes, sorted. LayerError when one is missing or damaged."""
    known = garbage.Records(files)
    found = []
    for name in sorted(garbage.needed(known, layers)):
        if (record := known.get(name)) is None:
            raise LayerError(f"layer {name} is missing or damaged")
        found.append(record)
    return found


def lacking(files: StoreDir, layers: Iterable[Layer]) -> list[Remote]:
    """The blobs that layers name and that are not wholly here."""
    digests = dict.fromkeys(digest for record in layers for digest in record.blobs)
    found = (remote.load(files, digest) for digest in digests)
    return [each for each in found if each and not each.whole]


def is_here(fd: int, frame: Want) -> bool:
    """Whether a frame is in a blob's file."""
    if not frame.mark or _hollow(fd, frame):
        return False
    return mark_of(os.pread(fd, frame.length, frame.offset)) == frame.mark


def _hollow(fd: int, frame: Want) -> bool:
    try:
        return os.lseek(fd, frame.offset, os.SEEK_HOLE) < frame.offset + frame.length
    except OSError:  # ENXIO: beyond the file's end
        return True


@dataclass(frozen=True, kw_only=True, eq=False)
class Missing:
    """What of a blob is not here: rows of its table, and pieces that no frame covers. Iterating makes the frames one by one, for there can be millions."""

    table: Table
    rows: array[int]
    pieces: tuple[Want, ...]

    def __iter__(self) -> Iterator[Want]:
        yield from map(self.table.want, self.rows)
        yield from self.pieces

    @property
    def size(self) -> int:
        """In bytes."""
        return sum(self.table.length[row] for row in self.rows) + sum(piece.length for piece in self.pieces)


def missing(files: StoreDir, blob_size: int, frames: Table) -> Missing:
    """What of a blob is not here; reads all of it that is no hole. LayerError for a frame beyond the blob's end."""
    path = files.blob(frames.blob)
    rows = array("I")
    pieces: list[Want] = []
    with disk.guard("read", path):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            for row in range(len(frames)):
                want = frames.want(row)
                if (end := want.offset + want.length) > blob_size:
                    raise LayerError(f"a layer names bytes of blob {frames.blob} up to {end}, and it has only {blob_size}")
                if not is_here(fd, want):
                    rows.append(row)
            for begin, end in uncovered(blob_size, frames):
                pieces += _absent(fd, frames.blob, begin, end)
        finally:
            os.close(fd)
    return Missing(table=frames, rows=rows, pieces=tuple(pieces))


def uncovered(blob_size: int, frames: Table) -> Iterator[tuple[int, int]]:
    """The parts of a blob that no frame covers: its seek table, and frames of layers that are not on this host."""
    return remote.gaps(((offset, offset + length) for offset, length in zip(frames.offset, frames.length, strict=True)), blob_size)


def raw(digest: str, begin: int, end: int) -> Iterator[Want]:
    """Bytes begin … end-1 in pieces, by no mark."""
    for offset in range(begin, end, _PIECE):
        yield Want(blob=digest, offset=offset, length=min(_PIECE, end - offset), mark=RAW)


def _absent(fd: int, digest: str, begin: int, end: int) -> Iterator[Want]:
    """What of an uncovered part may not be here: its holes, and its edges, which share blocks with frames."""
    inner, outer = -(-begin // _BLOCK) * _BLOCK, end // _BLOCK * _BLOCK
    if outer - inner < _PIECE:
        yield from raw(digest, begin, end)
        return
    at = begin
    for start, stop in remote.held(fd, inner, outer):
        yield from raw(digest, at, start)
        at = stop
    yield from raw(digest, at, end)


def land(fd: int, frames: Sequence[Want], base: int, data: memoryview) -> list[Want]:
    """Write those frames that match their marks; returns them. base: where `data` begins in the blob. NoSpaceError, HostError: some are not written."""
    good = []
    spans: list[tuple[int, int]] = []
    for frame in frames:
        begin, end = frame.offset - base, frame.offset - base + frame.length
        if frame.mark and mark_of(data[begin:end]) != frame.mark:
            continue
        good.append(frame)
        if spans and spans[-1][1] == begin:
            spans[-1] = (spans[-1][0], end)
        else:
            spans.append((begin, end))
    for begin, end in spans:
        _write(fd, data[begin:end], base + begin)
    return good


def _write(fd: int, data: memoryview, offset: int) -> None:
    try:
        while data:
            done = os.pwrite(fd, data, offset)
            data, offset = data[done:], offset + done
    except OSError as error:
        failed = disk.failure("what was fetched cannot be kept", error)
        if isinstance(failed, NoSpaceError):
            raise NoSpaceError("no space left on the disk of the cache", details=failed.details) from error
        raise failed from error


def settle(files: StoreDir, digest: str) -> bool:
    """Whether the whole blob matches its digest; that is remembered then. Nobody collects garbage meanwhile."""
    with disk.locked(files.blobs):
        path = files.blob(digest)
        if blob.digest(path) != digest:
            return False
        disk.sync(path)  # `whole` says that nothing need be looked at again, after a crash of the host too
        remote.change(files, digest, whole=True, evicted=False)
        return True


def is_cramped(path: Path) -> bool:
    """Whether the disk is so full that nothing is to be fetched that nobody waits for."""
    found = os.statvfs(path)
    return found.f_bavail < min(found.f_blocks * _SPARE, _LEAST / found.f_frsize)
