"""The layers of a snapshot as they leave this host: their tables, and blobs that hold nothing but what these layers need.

Blobs of a store are shared by all that is on a host. One of which the layers need not all goes as another blob, of their frames alone: what else is on the
host is nobody's business. What a layer goes as depends on the layers below it only, so that snapshots which share some share them in a registry too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ramet.errors import LayerError
from ramet.paths import StoreDir
from ramet.reference import sha256
from ramet.store import blob, garbage, layer, remote
from ramet.store.chain import published_owners
from ramet.store.index import Index, content_length, mark_of, of_layer
from ramet.store.layer import Layer
from ramet.store.remote import Want
from ramet.store.runs import Owners
from ramet.store.sealing import kept_pages
from ramet.tables import SELF, Tables, frames, is_all_used

_LOOKS = 10  # a layer that is sealed anew meanwhile is read again
Fetch = Callable[[str, Sequence[Want]], None]


@dataclass(frozen=True, kw_only=True)
class Cargo:
    """A blob that is to be sent. layer: one that needs it; read(offset, length): its bytes, if they are here."""

    digest: str
    size: int
    layer: str
    read: Callable[[int, int], bytes]


@dataclass(frozen=True, kw_only=True)
class Sent:
    """A layer that is to be sent. name: the digest of `data`, its tables; blobs: those that no layer before it has."""

    name: str
    data: bytes
    blobs: tuple[Cargo, ...]


class _Frame(NamedTuple):
    """Where a frame is among what is sent."""

    blob: str
    offset: int
    length: int


@dataclass(frozen=True, kw_only=True)
class _Found:
    record: Layer
    owners: Owners
    index: Index


class Packer:
    """Packs the layers that some layers need, those that others stand on first.

    bases: which layer is sent for a raw file that is the base of one (`Layer.base`). fetch: has frames here of blobs that are elsewhere. What is staged
    for it is gone when the stack is closed. LayerError when something is missing, damaged, or not sealed.
    """

    def __init__(self, files: StoreDir, stack: contextlib.ExitStack, bases: Mapping[str, str], fetch: Fetch) -> None:
        self._files = files
        self._stack = stack
        self._bases = bases
        self._fetch = fetch
        self._found: dict[str, _Found] = {}
        self._needed: set[str] = set()
        self.sent: dict[str, Sent] = {}  # by the layer's id on this host, in the order in which they can be admitted
        self._sizes: dict[str, int] = {}  # of the store's blobs
        self._used: dict[str, dict[int, int]] = {}  # of each of the store's blobs, the frames that layers so far need: offset -> length
        self._places: dict[tuple[bytes, int], _Frame] = {}  # by mark and length
        self._cargo: set[str] = set()

    def pack(self, heads: Iterable[str]) -> None:
        """These, and all that they need."""
        heads = list(heads)
        roots = [*heads, *self._bases.values()]
        for look in range(_LOOKS):
            try:
                self._found = {}
                self._needed = garbage.needed(garbage.Records(self._files), roots)
                for name in self._needed:
                    self._found[name] = self._read(name)
                break
            except LayerError:
                if look == _LOOKS - 1:
                    raise
        for name in heads:
            self._layer(name, ())

    def _read(self, name: str) -> _Found:
        record, owners = published_owners(self._files, name)
        if not record.sealed:
            raise LayerError(f"layer {name} is not compressed yet", hint="Try again in a moment.")
        return _Found(record=record, owners=owners, index=of_layer(self._files.layer(name), record))

    def _layer(self, name: str, above: tuple[str, ...]) -> Sent:
        if name in self.sent:
            return self.sent[name]
        if name in above or name not in self._found:
            raise LayerError(f"layer {name} is missing, or stands on itself")
        found = self._found[name]
        record, owners, chain = found.record, found.owners, found.record.chain
        if not set(chain) <= self._needed:  # others need its own pages only, and what else it stood on is gone
            chain = (name,)
            owners = Owners.nobody(record.pages).overlay(kept_pages(found.index), 1, based=bool(record.base))
        names = {each: self._layer(each, (*above, name)).name for each in (*chain, *record.beneath) if each != name}
        base = self._base(record)
        below = self._layer(base, (*above, name)).name if base else ""
        index, blobs, cargo = self._blobs(name, record, found.index)
        data, zero = index.pages()
        tables = Tables(
            kind=record.kind,
            size=record.size,
            data=data * layer.PAGE,
            zero=zero * layer.PAGE,
            blobs=blobs,
            chain=tuple(names.get(each, SELF) for each in chain),
            beneath=tuple(names[each] for each in record.beneath),
            base=below,
            owners=owners,
            index=index,
        )
        packed = tables.pack()
        made = self.sent[name] = Sent(name=sha256(packed), data=packed, blobs=tuple(cargo))
        return made

    def _base(self, record: Layer) -> str:
        if record.base and not record.base_layer and record.base not in self._bases:
            raise LayerError(f"layer {record.id} stands on {record.base}, which no layer was made of")
        return record.base_layer or self._bases.get(record.base, "")

    def _blobs(self, name: str, record: Layer, index: Index) -> tuple[Index, tuple[str, ...], list[Cargo]]:
        """The index as it is sent, the blobs that it names, and those of them that no layer before has."""
        for (which, offset), length in frames(index).items():
            self._used.setdefault(record.blobs[which], {})[offset] = length
        whole = [digest for digest in record.blobs if is_all_used(self._size(digest), self._used.get(digest, {}).values())]
        cargo: list[Cargo] = []
        if len(whole) == len(record.blobs):
            blobs = record.blobs
        else:
            index, blobs, made = self._repacked(name, record, index, set(whole))
            cargo += made
        cargo += [self._local(name, digest) for digest in whole if digest in blobs and digest not in self._cargo]
        for row in range(len(index)):
            if index.length[row]:
                place = _Frame(blobs[index.blob[row]], index.offset[row], index.length[row])
                self._places.setdefault((index.mark(row), index.length[row]), place)
        self._cargo |= {each.digest for each in cargo}
        return index, blobs, cargo

    def _repacked(self, name: str, record: Layer, index: Index, whole: set[str]) -> tuple[Index, tuple[str, ...], list[Cargo]]:
        """The index with frames of blobs that are not sent in others: where a layer before has them, else in one of its own."""
        rows = [row for row in range(len(index)) if index.length[row] and record.blobs[index.blob[row]] not in whole]
        wants = [index.want(row, record.blobs) for row in rows]
        if gone := [want for want in wants if remote.is_remote(self._files, want.blob) and self._frame(want) is None]:
            self._fetch(name, gone)
        writer = self._stack.enter_context(blob.Writer(self._files.blobs))
        own: dict[tuple[bytes, int], _Frame] = {}
        places: list[_Frame] = []
        for row in range(len(index)):
            if not index.length[row]:
                places.append(_Frame("", 0, 0))
                continue
            want = index.want(row, record.blobs)
            key = (want.mark, want.length)
            if want.blob in whole:
                places.append(_Frame(want.blob, want.offset, want.length))
            elif place := self._places.get(key) or own.get(key):
                places.append(place)
            else:
                if (frame := self._frame(want)) is None:
                    raise LayerError(f"layer {name}, chunk {index.chunk[row]}: blob {want.blob} is damaged at {want.offset}")
                own[key] = _Frame("", writer.add(frame, content_length(index.data[row])), want.length)
                places.append(own[key])
        digest = writer.finish()
        named = [place.blob or digest for place in places if place.length]
        blobs = tuple(dict.fromkeys(named))
        number = {each: at for at, each in enumerate(blobs)}
        made = dataclasses.replace(
            index,
            blob=array("H", (number[place.blob or digest] if place.length else 0 for place in places)),
            offset=array("Q", (place.offset for place in places)),
        )
        return made, blobs, [Cargo(digest=digest, size=writer.size, layer=name, read=writer.read)] if digest else []

    def _frame(self, want: Want) -> bytes | None:
        """Its bytes, if those that are here are the right ones."""
        frame = _read(self._files.blob(want.blob), want.offset, want.length)
        return frame if mark_of(frame) == want.mark else None

    def _size(self, digest: str) -> int:
        if digest not in self._sizes:
            try:
                self._sizes[digest] = self._files.blob(digest).stat().st_size
            except FileNotFoundError as error:
                raise LayerError(f"blob {digest} is missing") from error
        return self._sizes[digest]

    def _local(self, name: str, digest: str) -> Cargo:
        path = self._files.blob(digest)
        return Cargo(digest=digest, size=self._size(digest), layer=name, read=functools.partial(_read, path))


def _read(path: Path, offset: int, length: int) -> bytes:
    """Bytes of a blob, whose file is not kept open: it may be gone, and its space is wanted back."""
    try:
        return blob.read(path, offset, length, "a layer")
    finally:
        blob.files.forget(str(path))


def absent(files: StoreDir, cargo: Iterable[Cargo]) -> list[str]:
    """The layers that must be fetched before these can be sent."""
    found = [(each.layer, remote.load(files, each.digest)) for each in cargo if each.layer]
    return sorted({layer for layer, known in found if known and not known.whole})
