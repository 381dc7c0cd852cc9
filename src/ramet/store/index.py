"""Where a sealed layer's chunks are: for each, which of its 16 pages are data and which are zero, and the frame that holds the data."""

from __future__ import annotations

import hashlib
from array import array
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from weakref import WeakValueDictionary

from ramet.errors import HostError, LayerError
from ramet.paths import LayerDir
from ramet.store import columns
from ramet.store.layer import CHUNK_PAGES, PAGE, Layer, index_file
from ramet.store.remote import Want

MARK = 16  # bytes of the SHA-256 of a compressed frame
_MAGIC = b"RAMETIDX"
_TYPES = "IHHHQIBIIH"


@dataclass(frozen=True, kw_only=True, eq=False)
class Index:
    """Columns, one row a chunk, ascending. A page in neither mask is as it was before: in the layer that `moved` names, else in what lies below the chain.

    chunk: number (of 64 KiB). data, zero: one bit a page, the first page's lowest. blob: which of the record's. offset, length: bytes of the frame
    in it; a chunk without data has none. marks: the first 16 bytes of each frame's SHA-256, one after the other.
    moved_first, moved_count: pages. moved_to: which of the record's `beneath`.
    """

    chunk: array[int]
    data: array[int]
    zero: array[int]
    blob: array[int]
    offset: array[int]
    length: array[int]
    marks: bytes
    moved_first: array[int]
    moved_count: array[int]
    moved_to: array[int]

    def __len__(self) -> int:
        return len(self.chunk)

    def mark(self, row: int) -> bytes:
        return self.marks[row * MARK : row * MARK + MARK]

    def want(self, row: int, blobs: Sequence[str]) -> Want:
        """The frame of a row that has data. blobs: the record's."""
        return Want(blob=blobs[self.blob[row]], offset=self.offset[row], length=self.length[row], mark=self.mark(row))

    def rows(self, first: int, end: int) -> tuple[int, int]:
        """The rows of the chunks that hold any of the pages first … end-1."""
        low = bisect_left(self.chunk, first // CHUNK_PAGES)
        return low, bisect_left(self.chunk, (end + CHUNK_PAGES - 1) // CHUNK_PAGES, low)

    def moved(self) -> Iterator[tuple[int, int, int]]:
        """First page, the page after the last, and which of `beneath` holds them."""
        for first, count, to in zip(self.moved_first, self.moved_count, self.moved_to, strict=True):
            yield first, first + count, to

    def pages(self) -> tuple[int, int]:
        """How many hold data, and how many are zero."""
        return sum(map(int.bit_count, self.data)), sum(map(int.bit_count, self.zero))

    def dump(self) -> bytes:
        """As a file."""
        marks = array("B", self.marks)
        moved = [self.moved_first, self.moved_count, self.moved_to]
        return columns.dump(_MAGIC, [self.chunk, self.data, self.zero, self.blob, self.offset, self.length, marks, *moved])

    @classmethod
    def load(cls, data: bytes, what: str) -> Index:
        """From a file; LayerError, which begins with `what`, when it is damaged."""
        chunk, mask, zero, blob, offset, length, marks, first, count, to = columns.load(_MAGIC, _TYPES, data, what)
        rows = len(chunk)
        if any(len(column) != rows for column in (mask, zero, blob, offset, length)) or len(marks) != rows * MARK:
            raise LayerError(f"{what} is damaged: its columns are not of one length")
        return cls(
            chunk=chunk,
            data=mask,
            zero=zero,
            blob=blob,
            offset=offset,
            length=length,
            marks=marks.tobytes(),
            moved_first=first,
            moved_count=count,
            moved_to=to,
        )

    def problems(self, *, pages: int, blobs: int, beneath: int) -> list[str]:
        """What cannot be, when the index is of a layer that has so many pages, and names so many blobs and layers beneath."""
        found = []
        if any(a >= b for a, b in zip(self.chunk, self.chunk[1:], strict=False)):
            found.append("its chunks are not in order")
        if len(self) and self.chunk[-1] * CHUNK_PAGES >= pages:
            found.append(f"chunk {self.chunk[-1]} is beyond the layer's end")
        for row in range(len(self)):
            if self.data[row] & self.zero[row]:
                found.append(f"chunk {self.chunk[row]}: a page is data and zero at once")
            if self.data[row] and self.blob[row] >= blobs:
                found.append(f"chunk {self.chunk[row]} is in a blob that the layer does not name")
        if any(to >= beneath for to in self.moved_to):
            found.append("it names a layer that the record does not")
        return found


_loaded: WeakValueDictionary[tuple[str, str], Index] = WeakValueDictionary()


def of_layer(files: LayerDir, layer: Layer) -> Index:
    """The index of a sealed layer, read once for all chains of this process. LayerError when it is missing or damaged."""
    key = (str(index_file(files, layer)), layer.index_digest)
    index = _loaded.get(key)
    if index is None:
        index = _loaded[key] = read(files, layer)
    return index


def read(files: LayerDir, layer: Layer) -> Index:
    """The index as it is on the disk now."""
    what = f"the index of layer {layer.id}"
    path = index_file(files, layer)
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise LayerError(f"{what} is missing") from error
    except OSError as error:
        raise HostError(f"cannot read {path}: {error.strerror}") from error
    if "sha256:" + hashlib.sha256(data).hexdigest() != layer.index_digest:
        raise LayerError(f"{what} is damaged: its content does not match the record's digest")
    return Index.load(data, what)


def mark_of(frame: bytes | memoryview) -> bytes:
    """What tells a compressed frame from any other."""
    return hashlib.sha256(frame).digest()[:MARK]


def content_length(data: int) -> int:
    """Bytes that the frame of a chunk with such a mask of data pages holds."""
    return data.bit_count() * PAGE
