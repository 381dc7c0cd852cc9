"""The two ways in which a layer's own pages are kept, read alike: a spool as it was saved, or sealed in blobs."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

from ramet.errors import AbsentError, HostError, LayerError
from ramet.paths import StoreDir
from ramet.store import blob, remote
from ramet.store.index import Index, content_length, mark_of
from ramet.store.layer import CHUNK_PAGES, PAGE, Layer
from ramet.store.remote import Want
from ramet.store.runs import ZERO, Runs, find

Parts = list[bytes | memoryview]

_ZEROS = bytes(1 << 20)
_ZERO_VIEW = memoryview(_ZEROS)
_DATA, _ZERO, _NEITHER = range(3)
_SPAN = 4 << 20  # bytes of neighbouring frames that are read at once


def zeros(length: int, out: Parts) -> None:
    """Append so many zero bytes, all from one buffer."""
    while length > len(_ZEROS):
        out.append(_ZERO_VIEW)
        length -= len(_ZEROS)
    out.append(_ZERO_VIEW[:length])


def is_hole(part: bytes | memoryview) -> bool:
    """Whether it came from `zeros`."""
    return isinstance(part, memoryview) and part.obj is _ZEROS


class Source(Protocol):
    """A layer's own pages, or what lies below a chain."""

    def read(self, first: int, end: int, out: Parts) -> None:
        """Append the pages first … end-1. AbsentError when one is in a registry only, LayerError when one is damaged or missing."""

    def wants(self, first: int, end: int, out: list[Want]) -> None:
        """Append the frames of remote blobs that reading these pages takes, whether they are here or not."""

    def release(self) -> None:
        """Close what is not worth keeping open between reads."""

    def close(self) -> None:
        """Close everything; it is opened again when it is wanted again."""


class Spool:
    """Pages in an open file, at the places that the runs tell.

    length: of the file when it was published: what is missing before it is damage, what is missing behind it reads as zeros (a qcow2 file need not be
    extended to the end of its last cluster).
    """

    def __init__(self, runs: Runs, path: Path, what: str, *, length: int, fd: int = -1) -> None:
        self.runs = runs
        self._path = path
        self._what = what
        self._length = length
        self._fd = fd
        self._lent = fd >= 0

    def read(self, first: int, end: int, out: Parts) -> None:
        """Also FileNotFoundError, when it is gone since the layer was sealed."""
        runs = self.runs
        at = find(runs, first)
        while first < end:
            if at >= len(runs) or first < runs.first[at]:
                raise LayerError(f"{self._what} does not have page {first}, though it should")
            start, where = runs.first[at], runs.where[at]
            stop = min(end, start + runs.count[at])
            if where == ZERO:
                zeros((stop - first) * PAGE, out)
            else:
                out.append(self.pages(where + first - start, stop - first))
            first = stop
            at += 1

    def wants(self, first: int, end: int, out: list[Want]) -> None:
        pass  # a spool is here

    def pages(self, where: int, count: int) -> bytes:
        """So many pages of the file, from its page `where`."""
        length, offset = count * PAGE, where * PAGE
        try:
            if self._fd < 0:
                self._fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
            data = os.pread(self._fd, length, offset)
            while len(data) < length and (more := os.pread(self._fd, length - len(data), offset + len(data))):
                data += more
        except FileNotFoundError:
            raise
        except OSError as error:
            raise HostError(
                f"cannot read {self._what}: {error.strerror}", details={"path": str(self._path), "errno": error.errno}
            ) from error
        if len(data) < length:
            if offset + len(data) < self._length:
                raise LayerError(f"{self._what} is truncated: it has {offset + len(data)} bytes of {self._length}")
            data += bytes(length - len(data))
        return data

    def release(self) -> None:
        # Not kept open: a spool goes away when its layer is sealed, and nobody would tell us to give its space back.
        if self._fd >= 0 and not self._lent:
            os.close(self._fd)
            self._fd = -1

    def close(self) -> None:
        self.release()


class Sealed:
    """Pages in the frames of blobs. below: where those are that the index says nothing of."""

    def __init__(self, store: StoreDir, layer: Layer, index: Index, below: Source) -> None:
        self._store = store
        self._index = index
        self._what = f"layer {layer.id}"
        self._blobs = layer.blobs
        self._paths = [str(store.blob(digest)) for digest in layer.blobs]
        self._remote = [remote.is_remote(store, digest) for digest in layer.blobs]
        self._below = below

    def read(self, first: int, end: int, out: Parts) -> None:
        rows = list(self._rows(first, end))
        if any(self._remote):
            self._look(rows)
        spans = self._spans(*self._index.rows(first, end))
        for row, start, stop in rows:
            if row < 0:
                self._below.read(start, stop, out)
            else:
                begin = self._index.chunk[row] * CHUNK_PAGES
                self._chunk(row, start - begin, stop - begin, spans.get(row), out)

    def wants(self, first: int, end: int, out: list[Want]) -> None:
        index = self._index
        remotes = [remote.is_remote(self._store, digest) for digest in self._blobs]
        for row, start, stop in self._rows(first, end):
            if row < 0:
                self._below.wants(start, stop, out)
                continue
            begin = index.chunk[row] * CHUNK_PAGES
            for low, high, kind, _ in layout(index.data[row], index.zero[row]):
                low, high = max(begin + low, start), min(begin + high, stop)
                if low < high and kind == _NEITHER:
                    self._below.wants(low, high, out)
            if index.blob[row] < len(remotes) and remotes[index.blob[row]] and self._takes(row, start, stop):
                out.append(index.want(row, self._blobs))

    def _look(self, rows: Iterable[tuple[int, int, int]]) -> None:
        """AbsentError when one is sure to be missing, before any is read: a hole that is read fills the page cache with zeros, and what lies before it
        would be decompressed for nothing."""
        index = self._index
        for row, start, stop in rows:
            if row < 0 or not self._is_remote(which := index.blob[row]) or not self._takes(row, start, stop):
                continue
            what = f"{self._what}, chunk {index.chunk[row]}"
            try:
                # In the middle, for the blocks at its ends may be data of the frames beside it.
                hole = blob.files.is_hole(self._paths[which], index.offset[row] + index.length[row] // 2)
            except OSError:
                continue  # whoever reads it says why
            if hole:
                raise self._absent(row, what, LayerError(f"{what}: its frame is missing"))

    def _is_remote(self, which: int) -> bool:
        return which < len(self._remote) and self._remote[which]

    def _takes(self, row: int, first: int, end: int) -> bool:
        """Whether reading these pages of a chunk takes its frame."""
        index = self._index
        begin = index.chunk[row] * CHUNK_PAGES
        return any(
            kind == _DATA and begin + low < end and begin + high > first for low, high, kind, _ in layout(index.data[row], index.zero[row])
        )

    def _rows(self, first: int, end: int) -> Iterator[tuple[int, int, int]]:
        """The pages first … end-1 in order, each stretch with the row that its chunk has in the index; -1 where it has none."""
        index = self._index
        row, last = index.rows(first, end)
        while first < end:
            chunk = first // CHUNK_PAGES
            if row < last and index.chunk[row] == chunk:
                stop = min(end, (chunk + 1) * CHUNK_PAGES)
                yield row, first, stop
                row += 1
            else:
                stop = min(end, index.chunk[row] * CHUNK_PAGES) if row < last else end
                yield -1, first, stop
            first = stop

    def release(self) -> None:
        pass

    def close(self) -> None:
        for path in self._paths:
            blob.files.forget(path)

    def frame(self, row: int, compressed: memoryview | None = None) -> bytes:
        """The verified content of a chunk's frame. compressed: its bytes, where they were read already."""
        index = self._index
        what = f"{self._what}, chunk {index.chunk[row]}"
        if index.blob[row] >= len(self._paths):
            raise LayerError(f"{what}: the index names a blob that the record does not")
        path = self._paths[index.blob[row]]
        try:
            if compressed is None:
                compressed = memoryview(blob.read(path, index.offset[row], index.length[row], what))
            if mark_of(compressed) != index.mark(row):
                raise LayerError(f"{what}: blob {Path(path).name} is damaged at {index.offset[row]}: the frame does not match its digest")
        except LayerError as error:
            raise self._absent(row, what, error) from error
        try:
            return blob.decompress(compressed, content_length(index.data[row]))
        except ValueError as error:
            raise LayerError(f"{what}: blob {Path(path).name}: the frame at {index.offset[row]} is not understood: {error}") from error

    def _absent(self, row: int, what: str, error: LayerError) -> LayerError:
        """What it means that a frame does not read as it should: that it must be fetched, where it can be, else what was found."""
        digest, offset = self._blobs[self._index.blob[row]], self._index.offset[row]
        if not remote.is_remote(self._store, digest):
            return error
        blob.files.forget(self._paths[self._index.blob[row]])  # whoever fetches may make the file anew
        return AbsentError(
            f"{what}: blob {digest} has not been fetched from its registry at {offset}", details={"blob": digest, "offset": offset}
        )

    def _spans(self, row: int, last: int) -> dict[int, memoryview]:
        """The compressed frames of several rows, read with as few calls as they lie together."""
        index = self._index
        found: dict[int, memoryview] = {}
        if last - row < 2:
            return found
        while row < last:
            if not index.length[row] or index.blob[row] >= len(self._paths):
                row += 1
                continue
            which, begin = index.blob[row], index.offset[row]
            end = begin
            rows = []
            while row < last and end - begin < _SPAN and (not index.length[row] or (index.blob[row] == which and index.offset[row] == end)):
                if index.length[row]:
                    rows.append(row)
                end += index.length[row]
                row += 1
            try:
                view = memoryview(blob.read(self._paths[which], begin, end - begin, self._what))
            except LayerError:
                continue  # each is read by itself then, and the one that fails is named
            for each in rows:
                at = index.offset[each] - begin
                found[each] = view[at : at + index.length[each]]
        return found

    def _chunk(self, row: int, first: int, end: int, compressed: memoryview | None, out: Parts) -> None:
        """Append the pages first … end-1, counted from the chunk's first."""
        index = self._index
        data = index.data[row]
        if data == 0xFFFF and end - first == CHUNK_PAGES:
            out.append(self.frame(row, compressed))
            return
        content: memoryview | None = None
        for start, stop, kind, offset in layout(data, index.zero[row]):
            low, high = max(start, first), min(stop, end)
            if low >= high:
                continue
            if kind == _DATA:
                if content is None:
                    content = memoryview(self._cached(row, compressed))
                at = offset + (low - start) * PAGE
                out.append(content[at : at + (high - low) * PAGE])
            elif kind == _ZERO:
                zeros((high - low) * PAGE, out)
            else:
                begin = index.chunk[row] * CHUNK_PAGES
                self._below.read(begin + low, begin + high, out)

    def _cached(self, row: int, compressed: memoryview | None) -> bytes:
        mark = self._index.mark(row)
        length = content_length(self._index.data[row])
        found = blob.frames.get(mark)
        if found is None or len(found) != length:
            found = self.frame(row, compressed)
            blob.frames.put(mark, found)
        return found


@functools.lru_cache(maxsize=1024)
def layout(data: int, zero: int) -> tuple[tuple[int, int, int, int], ...]:
    """A chunk's masks as stretches of pages of one kind: first page, the page after the last, the kind, and for data the offset in the frame."""
    found: list[tuple[int, int, int, int]] = []
    offset = 0
    for page in range(CHUNK_PAGES):
        kind = _DATA if data >> page & 1 else _ZERO if zero >> page & 1 else _NEITHER
        if found and found[-1][2] == kind:
            found[-1] = (found[-1][0], page + 1, kind, found[-1][3])
        else:
            found.append((page, page + 1, kind, offset))
        offset += PAGE if kind == _DATA else 0
    return tuple(found)
