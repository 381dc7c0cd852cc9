"""What no layer that is kept needs: layers, blobs, and what was abandoned half-made."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
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
    """What a gc removed. bytes: what it took on the disk. drafts: half-made layers. postponed: why something stays that perhaps need not, one sentence each."""

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


def needed(layers: dict[str, Layer], keep: Iterable[str]) -> set[str]:
    """The layers that reading, sealing or building on the kept ones takes.

    A layer in a chain is needed for its own pages only: those are in it, or where it points on to. One that is not sealed yet is compared with its
    parent when it is, so the parent must be readable.
    """
    whole: set[str] = set()
    content: set[str] = set()
    waiting = [(name, True) for name in keep]
    while waiting:
        name, is_whole = waiting.pop()
        if name in whole or (name in content and not is_whole):
            continue
        (whole if is_whole else content).add(name)
        found = layers.get(name)
        if found is None:
            continue
        waiting += [(other, False) for other in (*(found.chain if is_whole else ()), *found.beneath)]
        if not found.sealed and found.parent:
            waiting.append((found.parent, True))
    return whole | content


class _Collection:
    """One run. What is locked when it begins is in somebody's hands, and stays with what it needs."""

    def __init__(self, store: StoreDir, step: Step) -> None:
        self._store = store
        self._step = step
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
        store = self._store
        for path in sorted(store.layers.iterdir()):
            draft = path.name.startswith(disk.STAGED)
            name = path.name.removeprefix(disk.STAGED)
            if not layer.is_id(name):
                continue
            files = store.draft(name) if draft else store.layer(name)
            held = locks.is_held(path) or (not draft and locks.is_held(files.runs))
            try:
                record = layer.load(files, name)
            except RametError as error:
                record = None
                if not draft and path.exists():  # else it went while we looked
                    self._damaged[name] = error
            if draft and not held:
                self._drafts.append(path)
            elif draft:
                self._held |= {record.parent} - {""} if record else set()
            else:
                self._held |= {name} if held else set()
                if record:
                    self._layers[name] = record

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
        with _alone(self._store.blobs) as alone:
            if not alone:
                self.postponed.append("no blobs were removed: a layer is being sealed")
                return
            named = set()
            for name in _names(self._store):
                try:
                    named |= {digest.replace(":", "-") for digest in layer.load(self._store.layer(name), name).blobs}
                except RametError as error:
                    if not self._store.layer(name).root.exists():
                        continue
                    self.postponed.append(f"no blobs were removed: what layer {name} refers to is not known: {error.message}")
                    return
            for path in sorted(self._store.blobs.iterdir()):
                if path.name not in named and path.name.startswith(("sha256-", disk.STAGED)):
                    self._step("gc blob")
                    self.bytes += disk.allocated(path)
                    with disk.guard("remove", path):
                        path.unlink(missing_ok=True)
                    self.blobs.append(path.name.replace("-", ":", 1))

    def _remove(self, path: Path, trash: Path) -> bool:
        lock = locks.try_lock(path)
        if lock is None:
            return False
        try:
            size = sum(disk.allocated(file) for file in path.iterdir())
            with disk.guard("remove", path):
                if path != trash:
                    path.rename(trash)
                shutil.rmtree(trash)
            self.bytes += size
        finally:
            os.close(lock)
        return True


def collect(store: StoreDir, keep: Iterable[str] | Callable[[], Iterable[str]], step: Step) -> Freed:
    """Remove what neither `keep` names nor those need. keep: a function is called after the layers were listed."""
    run = _Collection(store, step)
    run.look()
    names = set(keep() if callable(keep) else keep)
    run.remove_drafts()
    run.remove_layers(names)
    run.remove_blobs()
    return Freed(layers=tuple(run.removed), blobs=tuple(run.blobs), drafts=run.drafts, bytes=run.bytes, postponed=tuple(run.postponed))


def _names(store: StoreDir) -> list[str]:
    return sorted(path.name for path in store.layers.iterdir() if layer.is_id(path.name))


@contextmanager
def _alone(directory: Path) -> Iterator[bool]:
    """Whether nobody else refers to blobs that no record names yet, in the body."""
    fd = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(fd)
