"""From pages to compressed chunks: drops what is zero or as it was before, writes each chunk once per host, and reads everything back."""

from __future__ import annotations

import dataclasses
import heapq
from array import array
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from types import TracebackType
from typing import Protocol

from ramet.errors import LayerError
from ramet.paths import StoreDir
from ramet.store import blob, index, remote
from ramet.store.chain import Chain
from ramet.store.index import MARK, Index, mark_of
from ramet.store.layer import CHUNK_PAGES, PAGE, Layer
from ramet.store.runs import ZERO, Runs

Progress = Callable[[float], None]  # how much is done, 0 to 1
_ZERO_PAGE = bytes(PAGE)
_BLOCK = 256  # pages that are read at once: 1 MiB
_ALL = (1 << CHUNK_PAGES) - 1


class Pages(Protocol):
    """What is sealed: `source.Spool`, or what a layer adopts."""

    @property
    def runs(self) -> Runs:
        """Which pages there are, and where."""

    def pages(self, where: int, count: int) -> bytes:
        """So many pages from the place that a run tells."""


@dataclass(frozen=True, kw_only=True)
class Sealing:
    """What came of a layer's pages. kept: the pages that the index answers for. stored: bytes of the layer's own blob."""

    index: Index
    blobs: tuple[str, ...]
    beneath: tuple[str, ...]
    kept: Runs
    stored: int

    def without_moves(self) -> Sealing:
        """With an index that points to no other layer."""
        made = self.index
        index = dataclasses.replace(made, moved_first=made.moved_first[:0], moved_count=made.moved_count[:0], moved_to=made.moved_to[:0])
        return dataclasses.replace(self, index=index, beneath=())


class Known:
    """Where in the store's blobs a frame is already. Not in remote ones: what is made here must not hang on what can be given up again."""

    def __init__(self, store: StoreDir) -> None:
        self._store = store
        self._indexes: list[tuple[Layer, Index]] = []
        self._begin: list[int] = []  # the number of each index' first row among all
        self._rows: dict[int, int] = {}  # first half of a frame's mark -> row
        self._read: set[Path] = set()

    def __enter__(self) -> Known:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for path in self._read:
            blob.files.forget(str(path))

    def add(self, layer: Layer, rows: Index) -> None:
        """Frames of another layer may be referred to."""
        lasting = [not remote.is_remote(self._store, digest) for digest in layer.blobs]
        if not any(lasting):
            return
        begin = self._begin[-1] + len(self._indexes[-1][1]) if self._indexes else 0
        self._indexes.append((layer, rows))
        self._begin.append(begin)
        found = zip(array("Q", rows.marks)[::2], range(begin, begin + len(rows)), strict=True)
        if all(lasting):
            self._rows.update(found)
        else:
            usable = {which for which, lasts in enumerate(lasting) if lasts}
            self._rows.update(each for each, which in zip(found, rows.blob, strict=True) if which in usable)

    def find(self, mark: bytes, frame: bytes) -> tuple[str, int] | None:
        """Blob and offset of a frame with the same bytes: they are read and compared, so that damage elsewhere does not spread."""
        row = self._rows.get(int.from_bytes(mark[:8], "little"))
        if row is None:
            return None
        which = bisect_right(self._begin, row) - 1
        layer, rows = self._indexes[which]
        row -= self._begin[which]
        if not rows.length[row] or rows.mark(row) != mark or rows.length[row] != len(frame) or rows.blob[row] >= len(layer.blobs):
            return None
        digest, offset = layer.blobs[rows.blob[row]], rows.offset[row]
        path = self._store.blob(digest)
        self._read.add(path)
        try:
            same = blob.read(path, offset, len(frame), layer.id) == frame
        except LayerError:
            return None
        return (digest, offset) if same else None


def known(store: StoreDir, layers: Iterable[Layer]) -> Known:
    """The frames of the sealed ones of these layers."""
    found = Known(store)
    for layer in layers:
        if layer.sealed:
            try:
                found.add(layer, index.of_layer(store.layer(layer.id), layer))
            except LayerError:
                continue  # nothing of a damaged layer is worth referring to
    return found


class _Columns:
    """The index while it is made."""

    def __init__(self) -> None:
        self.chunk, self.data, self.zero = array("I"), array("H"), array("H")
        self.blob, self.offset, self.length = array("H"), array("Q"), array("I")
        self.marks = bytearray()
        self.moved: list[tuple[int, int]] = []  # page, which of beneath

    def add(self, chunk: int, data: int, zero: int, place: tuple[int, int, int], mark: bytes) -> None:
        """place: blob, offset, length."""
        self.chunk.append(chunk)
        self.data.append(data)
        self.zero.append(zero)
        self.blob.append(place[0])
        self.offset.append(place[1])
        self.length.append(place[2])
        self.marks += mark

    def finish(self) -> Index:
        first, count, to = array("I"), array("I"), array("H")
        for page, target in self.moved:
            if first and first[-1] + count[-1] == page and to[-1] == target:
                count[-1] += 1
            else:
                first.append(page)
                count.append(1)
                to.append(target)
        return Index(
            chunk=self.chunk,
            data=self.data,
            zero=self.zero,
            blob=self.blob,
            offset=self.offset,
            length=self.length,
            marks=bytes(self.marks),
            moved_first=first,
            moved_count=count,
            moved_to=to,
        )


class Sealer:
    """Takes a layer's chunks one by one.

    below: what the layer is a difference of; None when that is gone, and nothing is compared then. adopted: layers that may not be pointed to.
    """

    def __init__(self, writer: blob.Writer, frames: Known, below: Chain | None, *, based: bool, adopted: Collection[str] = ()) -> None:
        self._writer = writer
        self._frames = frames
        self._below = below
        self._based = based
        self._adopted = adopted
        self._columns = _Columns()
        self._own: dict[bytes, tuple[int, int]] = {}  # mark -> offset and length, of frames written here
        self._blobs: dict[str, int] = {}  # other layers' blobs that are referred to, from 1 on; 0 is the layer's own
        self._beneath: dict[str, int] = {}

    def run(self, sources: Sequence[Pages], progress: Progress | None, moved: Iterable[tuple[int, int, str]] = ()) -> Sealing:
        """Everything that the sources hold, no page twice. The writer's blob is finished when this returns; its index may be written before it is published.

        moved: pages of none of them, in order, where nothing is compared: first page, the page after the last, and the layer that has them.
        """
        for first, end, owner in moved:
            for page in range(first, end):
                self._moved(page, owner)
        total = sum(sum(source.runs.count) for source in sources) or 1
        done = 0
        for chunk, parts in groupby(heapq.merge(*map(chunks, sources), key=itemgetter(0)), itemgetter(0)):
            pages = sorted((stretch for _, found in parts for stretch in found), key=itemgetter(0))
            self._chunk(chunk, pages)
            done += sum(count for _, count, _ in pages)
            if progress and not chunk & 0x3F:
                progress(done / total)
        digest = self._writer.finish()
        made = self._columns.finish()
        others = list(self._blobs)
        if not digest and others:
            made.blob[:] = array("H", (max(0, which - 1) for which in made.blob))
        blobs = (*([digest] if digest else []), *others)
        return Sealing(
            index=made, blobs=blobs, beneath=tuple(self._beneath), kept=kept_pages(made), stored=self._writer.size if digest else 0
        )

    def _chunk(self, chunk: int, pages: list[Stretch]) -> None:
        data = zero = 0
        parts: list[bytes] = []
        begin = chunk * CHUNK_PAGES
        below, owners = self._before(begin, begin + CHUNK_PAGES)
        for first, count, content in pages:
            for page in range(count):
                at = page * PAGE
                number = first + page - begin
                if content is None or content.startswith(_ZERO_PAGE, at):
                    # What nobody owns is as in the base: zero there too where a guest trims all that its file system never used.
                    if owners is None or owners[number] or (self._based and not below.startswith(_ZERO_PAGE, number * PAGE)):
                        zero |= 1 << number
                    continue
                same = below and below.startswith(content[at : at + PAGE], number * PAGE)
                if same and owners and owners[number] not in self._adopted:
                    self._moved(first + page, owners[number])
                    continue
                data |= 1 << number
                parts.append(content[at : at + PAGE])
        if data:
            self._columns.add(chunk, data, zero, *self._place(b"".join(parts)))
        elif zero:
            self._columns.add(chunk, 0, zero, (0, 0, 0), bytes(MARK))

    def _before(self, first: int, end: int) -> tuple[bytes, list[str] | None]:
        """What lies below the chunk: its content, empty where it cannot be the same, and for each page the layer that it comes from; None when nobody knows."""
        below = self._below
        if below is None:
            return b"", None
        end = min(end, (below.size + PAGE - 1) // PAGE)
        owners = [name for start, stop, name in below.owners(first, end) for _ in range(start, stop)]
        if not self._based and not any(owners):
            return b"", owners
        try:
            content = b"".join(below.read(first * PAGE, (end - first) * PAGE))
        except LayerError:
            return b"", owners  # damage below is no reason to keep this layer from being sealed
        return content.ljust((end - first) * PAGE, b"\0"), owners

    def _moved(self, page: int, owner: str) -> None:
        if owner:
            self._columns.moved.append((page, self._beneath.setdefault(owner, len(self._beneath))))

    def _place(self, content: bytes) -> tuple[tuple[int, int, int], bytes]:
        """Blob, offset and length of the chunk's frame, written if there is none like it, and its mark."""
        frame = blob.compress(content)
        mark = mark_of(frame)
        if (own := self._own.get(mark)) and own[1] == len(frame) and self._writer.read(*own) == frame:
            return (0, *own), mark
        if elsewhere := self._frames.find(mark, frame):
            which = self._blobs.setdefault(elsewhere[0], len(self._blobs) + 1)
            return (which, elsewhere[1], len(frame)), mark
        at = self._writer.add(frame, len(content))
        self._own[mark] = (at, len(frame))
        return (0, at, len(frame)), mark


Stretch = tuple[int, int, bytes | None]  # first page, count, their content; None when they are zero


def chunks(source: Pages) -> Iterator[tuple[int, list[Stretch]]]:
    """What the source holds of each chunk, in order."""
    now = -1
    pages: list[Stretch] = []
    for first, count, where in source.runs:
        end = first + count
        while first < end:
            # Blocks end where chunks do, so that no chunk's pages are copied twice.
            stop = min(end, (first // _BLOCK + 1) * _BLOCK) if where != ZERO else end
            block = source.pages(where, stop - first) if where != ZERO else None
            for chunk, low, high in _cut(first, stop):
                if chunk != now:
                    if pages:
                        yield now, pages
                    now, pages = chunk, []
                part = None if block is None else block[(low - first) * PAGE : (high - first) * PAGE]
                pages.append((low, high - low, part))
            where += stop - first if where != ZERO else 0
            first = stop
    if pages:
        yield now, pages


def _cut(first: int, end: int) -> Iterator[tuple[int, int, int]]:
    while first < end:
        chunk = first // CHUNK_PAGES
        stop = min(end, (chunk + 1) * CHUNK_PAGES)
        yield chunk, first, stop
        first = stop


def kept_pages(made: Index) -> Runs:
    """The pages that the index answers for, as runs whose places mean nothing but data or zero."""

    def pages() -> Iterator[tuple[int, int, int]]:
        for chunk, data, zero in zip(made.chunk, made.data, made.zero, strict=True):
            begin = chunk * CHUNK_PAGES
            if data == _ALL:
                yield begin, CHUNK_PAGES, begin
                continue
            for page in range(CHUNK_PAGES):
                if data >> page & 1:
                    yield begin + page, 1, begin + page
                elif zero >> page & 1:
                    yield begin + page, 1, ZERO

    return Runs.build(pages())


def read_back(chain: Chain, source: Pages) -> None:
    """LayerError unless the sealed layer reads as the source does, in each of its pages."""
    for first, count, where in source.runs:
        for start in range(0, count, _BLOCK):
            length = min(_BLOCK, count - start)
            wanted = bytes(length * PAGE) if where == ZERO else source.pages(where + start, length)
            got = b"".join(chain.read((first + start) * PAGE, length * PAGE))
            if got != wanted[: len(got)] or len(got) < length * PAGE - (PAGE - 1):
                raise LayerError(f"what was sealed does not read as what was saved, in the {length} pages from {first + start}")
