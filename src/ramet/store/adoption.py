"""What a layer takes over from layers below it that nobody else needs, so that they can go: a chain would grow by one with each fork otherwise."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from types import TracebackType

from ramet.errors import LayerError
from ramet.paths import StoreDir
from ramet.store import index, remote
from ramet.store.chain import Chain, spool_runs
from ramet.store.layer import PAGE, Layer
from ramet.store.runs import ZERO, Owners, Runs
from ramet.store.sealing import Sealing, kept_pages, read_back

# Bytes of data that a layer still owns above which it stays where it is. The base of a memory has 30 to 100 MB, and copying it would cost each fork that much;
# one base does not grow a chain, and a chain of larger ones is bounded by what the machine has.
LARGEST = 8 << 20
# Of such a one, the share of its data that must not be read any more, for its heir to be worth writing out the rest: who asks for it waits for that.
WASTE = 0.25


def fetched(store: StoreDir, record: Layer) -> bool:
    """Whether a layer came from a registry: its pages may not be here, and what is written anew would be no longer what can be had there."""
    return bool(record.origin) or any(remote.is_remote(store, digest) for digest in record.blobs)


class Adoption:
    """What `layer_id` takes over of the layers in `adopt`, as it is before. Falsy when that is nothing, and none of them is named.

    Nothing of layers that came from a registry. thorough: also of large ones, where that frees enough.
    It is also what is sealed, for `sealing`: `runs` and `pages`.
    LayerError when something is missing or damaged.
    """

    def __init__(self, store: StoreDir, record: Layer, adopt: Collection[str], *, thorough: bool = False) -> None:
        self.record = record
        self.runs = Runs.build(())
        self.adopted: frozenset[str] = frozenset()
        self._store = store
        self._asked = frozenset() if fetched(store, record) else frozenset(adopt) - {record.id}
        self._thorough = thorough

    def __enter__(self) -> Adoption:
        self._layers: dict[str, Layer] = {}
        while True:
            self._chain = Chain.open(self._store, self.record.id)
            before = self._layers
            # What each layer holds must be of the same moment as who owns what: sealing moves pages from one to the other.
            self._owners, self._names, self._layers = self._chain.resolved()
            self._head = self._names.index(self.record.id) + 1
            self._asked -= {name for name, record in self._layers.items() if fetched(self._store, record)}
            try:
                self._choose()
                return self
            except BaseException as error:
                self._chain.close()
                if not isinstance(error, LayerError | FileNotFoundError) or self._layers == before:
                    raise

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._chain.close()

    def __bool__(self) -> bool:
        return bool(self.adopted)

    def pages(self, where: int, count: int) -> bytes:
        """So many pages from the page `where`; the last one of the layer is filled up with zeros."""
        return b"".join(self._chain.read(where * PAGE, count * PAGE)).ljust(count * PAGE, b"\0")

    def moved(self) -> Iterator[tuple[int, int, str]]:
        """The pages of a sealed layer that are still in others: first page, the page after the last, and the other."""
        if not self.record.sealed:
            return
        for first, end, _ in index.of_layer(self._store.layer(self.record.id), self.record).moved():
            for start, stop, owner in self._owners.segments(first, end):
                if (name := self._names[owner - 1]) not in self.adopted:
                    yield start, stop, name

    def owners(self, made: Sealing) -> tuple[Owners, tuple[str, ...]]:
        """The table of owners and the chain of the layer, when it was sealed with all this."""
        names = self._names + [name for name in made.beneath if name not in self._names]
        moved = zip(made.index.moved_first, made.index.moved_count, made.index.moved_to, strict=True)
        moves = [(first, first + count, names.index(made.beneath[to]) + 1) for first, count, to in moved]
        owners = self._owners.redirect(self._head, moves)
        return owners.adopt(names, self._head, self._numbers())

    def read_back(self, chain: Chain) -> None:
        """LayerError unless the layer reads through the other chain as before, in all that it owns now."""
        owned = {self._head, *self._numbers()} if self.record.sealed else self._numbers()
        for first, end, owner in self._owners.segments(0, self._owners.pages):
            if owner in owned:
                read_back(chain, _Part(self, Runs.build([(first, end - first, first)])))

    def _numbers(self) -> set[int]:
        return {self._names.index(name) + 1 for name in self.adopted if name in self._names}

    def _choose(self) -> None:
        """Of the layers asked for those that are small enough, with their pages; and of a sealed layer its own, for all of it is written anew."""
        record = self.record
        runs: list[tuple[int, int, int]] = []
        # What is in no chain any more may still be what the spool's pages are as before.
        adopted = set() if record.sealed else set(self._asked.difference(self._names))
        used = set(self._owners.owner)
        for name in self._asked.intersection(self._names):
            number = self._names.index(name) + 1
            # One that is only named, and owns nothing, may be gone already.
            pieces, held = [], 0
            if number in used:
                pieces, held = list(_owned(self._owners, number, self._held(name))), self._layers[name].data_bytes
            if self._worth(sum(count for _, count, where in pieces if where != ZERO) * PAGE, held):
                runs += pieces
                adopted.add(name)
        # A name that only stands in the way of others' pages is no reason to write a sealed layer anew.
        if runs or not record.sealed or adopted & {*record.chain, *record.beneath}:
            self.adopted = frozenset(adopted)
            own = self._held(record.id) if record.sealed else ()
            self.runs = Runs.build([*runs, *((first, count, where if where == ZERO else first) for first, count, where in own)])

    def _worth(self, owned: int, held: int) -> bool:
        """Whether to take over so many bytes of the data that a layer has."""
        return owned <= LARGEST or (self._thorough and owned <= held * (1 - WASTE))

    def _held(self, name: str) -> Runs:
        """The pages that a layer can answer for itself; the others that it owns are as they were below the chain, for its heir as well."""
        record, files = self._layers[name], self._store.layer(name)
        if record.sealed:
            return kept_pages(index.of_layer(files, record))
        return spool_runs(files, record)


class _Part:
    """Some of the pages of an adoption's layer, as it is before."""

    def __init__(self, whole: Adoption, runs: Runs) -> None:
        self.runs = runs
        self.pages = whole.pages


def _owned(owners: Owners, number: int, held: Runs) -> Iterator[tuple[int, int, int]]:
    """The parts of the runs that a layer owns: first page, count, and the first page again, or ZERO."""
    for first, count, where in held:
        for start, stop, owner in owners.segments(first, first + count):
            if owner == number:
                yield start, stop - start, where if where == ZERO else start
