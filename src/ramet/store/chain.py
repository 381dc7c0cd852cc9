"""A layer with all that it stands on, read as one raw image: each page from the layer that owns it, however long the chain is."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import TypeVar

from ramet.errors import AbsentError, HostError, LayerError
from ramet.paths import LayerDir, StoreDir
from ramet.store import blob, index, layer
from ramet.store.layer import CHUNK_PAGES, PAGE, Kind, Layer
from ramet.store.remote import Want
from ramet.store.runs import Owners, Runs
from ramet.store.source import Parts, Sealed, Source, Spool, zeros

_RELOADS = 40  # each layer of a chain is sealed once, and seldom again: more often a file is not missed by bad luck
_HOPS = 1 << 16  # layers that a page may be moved through: more than a chain can have
_FETCHES = 40  # times that what was just fetched is gone again when it is read: an eviction comes seldom
Locate = Callable[[str], tuple[Layer, LayerDir]]
Fetch = Callable[[list[Want]], None]  # returns when all of them are here; raises what keeps them from it
T = TypeVar("T")


def published(store: StoreDir) -> Locate:
    """Finds layers where they are published."""
    return lambda layer_id: (layer.published(store, layer_id), store.layer(layer_id))


class Chain:
    """Not for several threads at once. Blobs stay open until `close`; other chains of the process share them."""

    def __init__(self, store: StoreDir, head: Layer, locate: Locate, fetch: Fetch | None = None) -> None:
        self.size = head.size
        self.memory = head.kind is Kind.MEMORY
        self._store = store
        self._head = head
        self._locate = locate
        self._fetch = fetch
        self._bottom = _bottom(store, head, locate)
        self._owners = Owners.nobody(head.pages)
        self._names: list[str] = []  # owner i is the layer self._names[i-1]
        self._layers: dict[str, tuple[Layer, LayerDir]] = {}
        self._sources: dict[int, Source] = {}

    @classmethod
    def open(cls, store: StoreDir, layer_id: str, locate: Locate | None = None, *, fetch: Fetch | None = None) -> Chain:
        """A published layer. LayerError when it, or one that it needs, is missing or damaged.

        locate: where layers are found, when some are not published yet. fetch: brings what a read finds to be in a registry only; without it, AbsentError.
        """
        locate = locate or published(store)
        chain = cls(store, locate(layer_id)[0], locate, fetch)
        chain._load()
        return chain

    @classmethod
    def bottom(cls, store: StoreDir, head: Layer) -> Chain:
        """What lies below the first layer of a chain: its base image, or zeros."""
        return cls(store, head, published(store))

    def __enter__(self) -> Chain:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the files. Reading opens them again."""
        for source in self._sources.values():
            source.close()
        self._sources = {}
        self._bottom.close()

    def read(self, offset: int, length: int) -> Parts:
        """The bytes from `offset`: pieces whose lengths add up to min(length, size - offset).

        AbsentError when one of them is in a registry only, LayerError when it is damaged or missing, HostError when the disk fails: no part of what was
        asked for is returned then.
        """
        if offset < 0 or offset >= self.size or length <= 0:
            return []
        stop = min(offset + length, self.size)
        first, end = offset // PAGE, (stop + PAGE - 1) // PAGE
        out = self._read(first, end)
        if front := offset - first * PAGE:
            _drop_front(out, front)
        if back := end * PAGE - stop:
            _drop_back(out, back)
        return out

    def wants(self, first: int, end: int) -> list[Want]:
        """The frames of remote blobs that reading the pages first … end-1 takes, in order, whether they are here or not. Errors as of `read`."""
        return self._gather(first, min(end, self._head.pages), lambda source: source.wants)

    def traced(self, chunks: Iterable[int]) -> list[Want]:
        """The frames that reading chunks takes, by their numbers and in that order, each once. What lies beyond the end is left out."""
        firsts = (number * CHUNK_PAGES for number in chunks if number * CHUNK_PAGES < self._head.pages)
        return list(dict.fromkeys(want for first in firsts for want in self.wants(first, first + CHUNK_PAGES)))

    def owners(self, first: int, end: int) -> Iterator[tuple[int, int, str]]:
        """Which layer the pages first … end-1 come from: first page, the page after the last, and its id, or an empty one for what lies below the chain."""
        for start, stop, owner in self._owners.segments(first, end):
            yield start, stop, self._names[owner - 1] if owner else ""

    def resolved(self) -> tuple[Owners, list[str], dict[str, Layer]]:
        """All of `owners` as a table, the layers that its numbers mean, the first for 1, and the records that it was made from."""
        return self._owners, list(self._names), {name: record for name, (record, _) in self._layers.items()}

    def blobs(self) -> set[str]:
        """Those that reading it may take, as far as records tell."""
        records = [record for record, _ in self._layers.values()]
        if self._head.base_layer:
            with contextlib.suppress(LayerError):  # whoever reads that far is told
                records.append(self._locate(self._head.base_layer)[0])
        return {digest for record in records for digest in record.blobs}

    def _read(self, first: int, end: int) -> Parts:
        for _ in range(_FETCHES if self._fetch else 0):
            try:
                return self._gather(first, end, lambda source: source.read)
            except AbsentError:
                assert self._fetch
                self._fetch(self.wants(first, end))
        return self._gather(first, end, lambda source: source.read)

    def _gather(self, first: int, end: int, ask: Callable[[Source], Callable[[int, int, list[T]], None]]) -> list[T]:
        """What the sources answer for these pages. ask: which of their methods."""
        missing = ""
        for _ in range(_RELOADS):
            known = self._layers
            out: list[T] = []
            used: dict[int, Source] = {}
            try:
                for start, stop, owner in self._owners.segments(first, end):
                    source = used[owner] = self._source(owner)
                    ask(source)(start, stop, out)
                return out
            except AbsentError:
                raise
            except FileNotFoundError as error:
                missing = f"{error.filename} is missing"
                self._load()  # the spool is gone: the layer was sealed meanwhile
            except LayerError as error:
                # A layer of the chain may have adopted what others kept, and those are gone: then the records tell. Else it is damage.
                self._load()
                if self._layers == known:
                    raise
                missing = error.message
            finally:
                for source in used.values():
                    source.release()
        raise LayerError(f"layer {self._head.id} cannot be read: {missing}")

    def _load(self) -> None:
        """Read the records, and what they name: again when that is not there and a record was replaced meanwhile."""
        for _ in range(_RELOADS):
            known = self._layers
            try:
                self._resolve()
                return
            except LayerError:
                if self._layers == known:
                    raise
        self._resolve()

    def _resolve(self) -> None:
        """Read the records, and resolve the pages that sealed layers only point on to."""
        self.close()
        self._layers = {}
        head, files = self._locate(self._head.id)
        self._head = head
        self._layers = {head.id: (head, files)}
        self._names = list(head.chain)
        self._owners = read_owners(files, head)
        for _ in range(_HOPS):
            before = self._owners
            for at in range(len(self._names), 0, -1):  # from the newest down: pages move to older layers
                self._redirect(at)
            if self._owners == before:
                return
        raise LayerError(f"layer {head.id}: its pages are moved from layer to layer without an end")

    def _redirect(self, ordinal: int) -> None:
        record, files = self._layer(self._names[ordinal - 1])
        if not record.beneath or ordinal not in self._owners.owner:
            return
        self._names += [name for name in record.beneath if name not in self._names]
        number = [self._names.index(name) + 1 for name in record.beneath]
        moves = [(first, end, number[to]) for first, end, to in index.of_layer(files, record).moved()]
        self._owners = self._owners.redirect(ordinal, moves)

    def _layer(self, name: str) -> tuple[Layer, LayerDir]:
        if name not in self._layers:
            found = self._layers[name] = self._locate(name)
            if found[0].size != self.size or found[0].base != self._head.base:
                raise LayerError(f"layer {self._head.id} cannot stand on layer {name}: they are not of one size, or not of one base")
        return self._layers[name]

    def _source(self, owner: int) -> Source:
        if not owner:
            return self._bottom
        source = self._sources.get(owner)
        if source is None:
            source = self._sources[owner] = open_source(self._store, *self._layer(self._names[owner - 1]), self._bottom)
        return source


class _Zeros:
    """What lies below a chain without a base."""

    def read(self, first: int, end: int, out: Parts) -> None:
        zeros((end - first) * PAGE, out)

    def wants(self, first: int, end: int, out: list[Want]) -> None:
        pass

    def release(self) -> None:
        pass

    def close(self) -> None:
        pass


class _Image(_Zeros):
    """A raw image, and zeros behind its end."""

    def __init__(self, store: StoreDir, head: Layer) -> None:
        self._head = head
        self._path = str(store.state / head.base)

    def read(self, first: int, end: int, out: Parts) -> None:
        length = (end - first) * PAGE
        try:
            data = blob.files.read(self._path, length, first * PAGE)
        except FileNotFoundError as error:
            raise LayerError(f"layer {self._head.id}: its base image {self._head.base} is missing") from error
        except OSError as error:
            raise HostError(f"cannot read {self._path}: {error.strerror}", details={"path": self._path, "errno": error.errno}) from error
        if data:
            out.append(data)
        if len(data) < length:
            zeros(length - len(data), out)

    def close(self) -> None:
        blob.files.forget(self._path)


class _Below:
    """Another layer, and zeros behind its end."""

    def __init__(self, store: StoreDir, head: Layer, locate: Locate) -> None:
        self._store = store
        self._head = head
        self._locate = locate
        self._opened: Chain | None = None

    @property
    def _chain(self) -> Chain:
        if self._opened is None:
            base, _ = self._locate(self._head.base_layer)
            if base.kind is not Kind.DISK or base.base:
                raise LayerError(f"layer {self._head.id} cannot have layer {base.id} as its base: that is no disk without a base")
            self._opened = Chain.open(self._store, base.id, self._locate)
        return self._opened

    def read(self, first: int, end: int, out: Parts) -> None:
        found = self._chain.read(first * PAGE, (end - first) * PAGE)
        out += found
        if behind := (end - first) * PAGE - sum(map(len, found)):
            zeros(behind, out)

    def wants(self, first: int, end: int, out: list[Want]) -> None:
        out += self._chain.wants(first, end)

    def release(self) -> None:
        pass

    def close(self) -> None:
        if self._opened is not None:
            self._opened.close()
            self._opened = None


def _bottom(store: StoreDir, head: Layer, locate: Locate) -> Source:
    if head.base_layer:
        return _Below(store, head, locate)
    return _Image(store, head) if head.base else _Zeros()


def open_source(store: StoreDir, record: Layer, files: LayerDir, below: Source) -> Source:
    """A layer's own pages, as they are kept now. FileNotFoundError when it was sealed since `record` was read."""
    if record.sealed:
        return Sealed(store, record, index.of_layer(files, record), below)
    return Spool(spool_runs(files, record), files.spool, f"the spool of layer {record.id}", length=record.spool_bytes)


def spool_runs(files: LayerDir, record: Layer) -> Runs:
    """The runs of a layer that is not sealed. FileNotFoundError when they are gone, LayerError when they are damaged."""
    what = f"the table of runs of layer {record.id}"
    try:
        return Runs.load(files.runs.read_bytes(), what)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise HostError(f"cannot read {what}: {error.strerror}", details={"path": str(files.runs), "errno": error.errno}) from error


def published_owners(store: StoreDir, layer_id: str) -> tuple[Layer, Owners]:
    """The record of a published layer and the table of owners that belongs to it. LayerError when one is missing or damaged."""
    record = layer.published(store, layer_id)
    while True:
        try:
            return record, read_owners(store.layer(layer_id), record)
        except LayerError:
            before, record = record, layer.published(store, layer_id)
            if record == before:
                raise


def read_owners(files: LayerDir, record: Layer) -> Owners:
    """A layer's table of owners. LayerError when it is missing or damaged."""
    what = f"the table of owners of layer {record.id}"
    path = layer.owners_file(files, record)
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise LayerError(f"{what} is missing") from error
    except OSError as error:
        raise HostError(f"cannot read {what}: {error.strerror}", details={"path": str(path), "errno": error.errno}) from error
    return Owners.load(data, what, pages=record.pages, layers=len(record.chain))


def _drop_front(out: Parts, length: int) -> None:
    while length >= len(out[0]):
        length -= len(out.pop(0))
    if length:
        out[0] = memoryview(out[0])[length:]


def _drop_back(out: Parts, length: int) -> None:
    while length >= len(out[-1]):
        length -= len(out.pop())
    if length:
        out[-1] = memoryview(out[-1])[:-length]
