"""What no layer that is kept needs: layers, blobs, and what was abandoned half-made."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ramet import locks
from ramet.errors import RametError
from ramet.paths import StoreDir
from ramet.store import disk, layer
from ramet.store.layer import Layer

Step = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Freed:
    """What a gc removed, or would. bytes: on the disk. drafts: half-made layers. postponed: why something stays that perhaps need not, one sentence each."""

    layers: tuple[str, ...] = ()
    blobs: tuple[str, ...] = ()
    drafts: int = 0
    bytes: int = 0
    postponed: tuple[str, ...] = ()


def readable(store: StoreDir) -> list[Layer]:
    """The published layers whose record is whole, oldest first."""
    found = []
    for name in _names(store):
        try:
            found.append(layer.load(store.layer(name), name))
        except RametError:
            continue
    return sorted(found, key=lambda each: (each.created_at, each.id))


class Records(Mapping[str, Layer]):
    """The published layers whose record is whole, each read when it is asked for, once."""

    def __init__(self, store: StoreDir) -> None:
        self._store = store
        self._found: dict[str, Layer | None] = {}

    def __getitem__(self, layer_id: str) -> Layer:
        if layer_id not in self._found:
            try:
                self._found[layer_id] = layer.load(self._store.layer(layer_id), layer_id)
            except RametError:
                self._found[layer_id] = None
        if (found := self._found[layer_id]) is None:
            raise KeyError(layer_id)
        return found

    def __iter__(self) -> Iterator[str]:
        return (name for name in _names(self._store) if name in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def needed(layers: Mapping[str, Layer], keep: Iterable[str], *, whole: bool = True) -> set[str]:
    """The layers that reading, sealing or building on the kept ones takes; those that take part in others only by their pages, if not `whole`.

    A layer in a chain is needed for its own pages only: those are in it, or where it points on to. One that is not sealed yet is compared with its
    parent when it is, so the parent must be readable. A base is below all of a chain, so what needs the chain's head needs it.
    """
    wholes: set[str] = set()
    content: set[str] = set()
    waiting = [(name, whole) for name in keep]
    while waiting:
        name, is_whole = waiting.pop()
        if name in wholes or (name in content and not is_whole):
            continue
        (wholes if is_whole else content).add(name)
        found = layers.get(name)
        if found is None:
            continue
        waiting += [(other, False) for other in (*(found.chain if is_whole else ()), *found.beneath)]
        if is_whole and found.base_layer:
            waiting.append((found.base_layer, True))
        if not found.sealed and found.parent:
            waiting.append((found.parent, True))
    return wholes | content


class _Collection:
    """One run. What is locked when it begins is in somebody's hands, and stays with what it needs."""

    def __init__(self, store: StoreDir, step: Step, *, dry_run: bool) -> None:
        self._store = store
        self._step = step
        self._dry_run = dry_run
        self._layers: dict[str, Layer] = {}
        self._damaged: dict[str, RametError] = {}
        self._held: set[str] = set()
        self._drafts: list[Path] = []
        self.removed: list[str] = []
        self.blobs: list[str] = []
        self.drafts = 0
        self.bytes = 0
        self.postponed: list[str] = []

    def look(self) -> None:
        """The layers before the drafts: one that does without others since is seen after a draft that stands on those was written down."""
        names = _names(self._store)
        for name in names:
            self._see(name)
        for path in sorted(self._store.layers.iterdir()):
            name = path.name.removeprefix(disk.STAGED)
            if path.name.startswith(disk.STAGED) and layer.is_id(name):
                self._see_draft(path, name)
            elif layer.is_id(name) and name not in names:
                self._see(name)

    def see(self, names: Iterable[str]) -> None:
        """Look at those that were published since."""
        for name in names:
            if name not in self._layers and layer.is_id(name):
                self._see(name)

    def _see(self, name: str) -> None:
        files = self._store.layer(name)
        if not self._dry_run:
            disk.remove_unwritten(files.root)
        try:
            record = self._layers[name] = layer.load(files, name)
        except RametError as error:
            record = None
            if files.root.exists():  # else it went while we looked
                self._damaged[name] = error
        busy = layer.index_file(files, record) if record and record.sealed else files.runs
        if locks.is_held(files.root) or locks.is_held(busy):
            self._held.add(name)

    def _see_draft(self, path: Path, name: str) -> None:
        held = locks.is_held(path)
        try:
            record = layer.load(self._store.draft(name), name)
        except RametError:
            if not path.exists():  # published meanwhile, or given up
                self.see([name])
                return
            record = None
        if not held:
            self._drafts.append(path)
        elif record:
            self._held |= {record.parent, record.base_layer, *record.chain} - {"", name}

    def remove_drafts(self) -> None:
        for path in self._drafts:
            self._step("gc draft")
            self.drafts += self._remove(path, path)

    def remove_layers(self, keep: set[str]) -> None:
        keep |= self._held
        kept = needed(self._layers, keep)
        if broken := sorted(kept & set(self._damaged)):
            self.postponed.append(f"no layers were removed: what layer {broken[0]} needs is not known: {self._damaged[broken[0]].message}")
            return
        for name in sorted((set(self._layers) | set(self._damaged)) - kept):
            self._step("gc layer")
            # By one rename out of sight first: a layer that is half removed would be a damaged one.
            if self._remove(self._store.layer(name).root, self._store.draft(name).root):
                self.removed.append(name)

    def remove_blobs(self) -> None:
        with alone(self._store) as nobody_else:
            if not nobody_else:
                self.postponed.append("no blobs were removed: a layer is being sealed or pulled")
                return
            named = set()
            for name in _names(self._store):
                if name in self.removed:  # it would be
                    continue
                try:
                    named |= {digest.replace(":", "-") for digest in layer.load(self._store.layer(name), name).blobs}
                except RametError as error:
                    if not self._store.layer(name).root.exists():
                        continue
                    self.postponed.append(f"no blobs were removed: what layer {name} refers to is not known: {error.message}")
                    return
            # The blob before where it is to be had: without that, what is left of a sparse one would pass for a whole one.
            for path in _unnamed(self._store.blobs, named):
                self._step("gc blob")
                self._unlink(path)
                self.blobs.append(path.name.replace("-", ":", 1))
            for path in _unnamed(self._store.remotes, named):
                self._step("gc remote")
                self._unlink(path)

    def _unlink(self, path: Path) -> None:
        self.bytes += disk.allocated(path)
        if not self._dry_run:
            with disk.guard("remove", path):
                path.unlink(missing_ok=True)

    def _remove(self, path: Path, trash: Path) -> bool:
        lock = locks.try_lock(path)
        if lock is None:
            return False
        try:
            size = sum(disk.allocated(file) for file in path.iterdir())
            if not self._dry_run:
                with disk.guard("remove", path):
                    if path != trash:
                        path.rename(trash)
                    shutil.rmtree(trash)
            self.bytes += size
        finally:
            os.close(lock)
        return True


def collect(store: StoreDir, keep: Iterable[str] | Callable[[], Iterable[str]], step: Step, *, dry_run: bool = False) -> Freed:
    """Remove what neither `keep` names nor those need. keep: a function is called after the layers were listed. dry_run: only say what that would be."""
    run = _Collection(store, step, dry_run=dry_run)
    run.look()
    names = set(keep() if callable(keep) else keep)
    run.see(names)
    run.remove_drafts()
    run.remove_layers(names)
    run.remove_blobs()
    return Freed(layers=tuple(run.removed), blobs=tuple(run.blobs), drafts=run.drafts, bytes=run.bytes, postponed=tuple(run.postponed))


def _names(store: StoreDir) -> list[str]:
    return sorted(path.name for path in store.layers.iterdir() if layer.is_id(path.name))


def _unnamed(directory: Path, named: set[str]) -> list[Path]:
    """Blobs, or records of where they are to be had, that no layer names, and those that are half-made."""
    if not directory.is_dir():  # of an older Ramet
        return []
    return sorted(
        path
        for path in directory.iterdir()
        if path.name.startswith(("sha256-", disk.STAGED)) and path.name not in named and path.name.removeprefix(disk.STAGED) not in named
    )


@contextmanager
def alone(store: StoreDir) -> Iterator[bool]:
    """Whether nobody else refers to blobs that no record names yet, in the body."""
    fd = os.open(store.blobs, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(fd)
