"""What machines and snapshots cost this host: memory as the kernel counts it, the disk file by file, each file divided by those who stand on it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ramet import disks, process
from ramet.db import Record
from ramet.entry import Entry
from ramet.errors import RametError
from ramet.model import Snapshot, State, Usage
from ramet.operations import Operations
from ramet.paths import StateDir, StoreDir
from ramet.store import garbage, layer
from ramet.store.layer import Layer
from ramet.vm import disk, memory

_ASKING = 0.5  # seconds that a guest gets to say what it could give back: 1 ms, or 75 in a fresh fork under emulation
_BLOCK = 512  # bytes, of st_blocks


@dataclass(frozen=True, kw_only=True)
class Member:
    """Who stands on something. layers: by id, those that it names.

    places: files and directories that it needs: its own, its image's, its snapshots', what its drives began with.
    """

    layers: frozenset[str]
    places: frozenset[Path]

    def __or__(self, other: Member) -> Member:
        return Member(layers=self.layers | other.layers, places=self.places | other.places)


@dataclass(frozen=True, kw_only=True)
class Share:
    """Bytes on the host's disk: what nobody else stands on, and its part of the rest."""

    unique: int = 0
    shared: int = 0


def members(state: StateDir, machines: Iterable[Record], snapshots: Iterable[Snapshot]) -> dict[str, Member]:
    """Who stands on what, by id.

    Machines and named snapshots. An automatic snapshot is there only for the machines that came from it or were saved as it, so it is theirs; a parked
    machine is its template's.
    """
    machines = list(machines)
    found: dict[str, Member] = {}

    def add(owner: str, member: Member) -> None:
        found[owner] = found[owner] | member if owner in found else member

    for each in machines:
        files = state.machine(each.id)
        layers = {each.memory_layer, *disks.layers_of(files)}
        add(each.pool or each.id, _member(state, each, layers, files.root))
    for point in snapshots:
        member = _member(state, point, set(point.layers), state.snapshot(point.id).root)
        users = {each.pool or each.id for each in machines if point.id in (each.source_id, each.snapshot_id)}
        for owner in users if users and not point.name else {point.id}:
            add(owner, member)
    return found


def _member(state: StateDir, of: Record | Snapshot, layers: set[str], place: Path) -> Member:
    image = {state.image(of.image_digest).root} if of.image_digest else set()
    blanks = {state.blank(each.name, each.size) for each in of.spec.drives if each.mount}
    return Member(layers=frozenset(layers - {""}), places=frozenset({place, *image, *blanks}))


class Disk:
    """What of a store's disk is whose. Records of layers are read again only where they changed."""

    def __init__(self, store: StoreDir) -> None:
        self._store = store
        self._known: dict[str, tuple[tuple[int, int], Layer]] = {}

    def shares(self, them: Mapping[str, Member]) -> dict[str, Share]:
        """Each file by its blocks, once, however many names it has; divided by its users. The sums are what the files take, but for some bytes."""
        layers = self._layers()
        users: defaultdict[Path, set[str]] = defaultdict(set)
        closures: dict[frozenset[str], list[Path]] = {}
        for owner, member in them.items():
            if member.layers not in closures:
                closures[member.layers] = list(self._paths(layers, member.layers))
            for path in (*closures[member.layers], *member.places):
                users[path].add(owner)
        sizes: dict[tuple[int, int], int] = {}
        owners: defaultdict[tuple[int, int], set[str]] = defaultdict(set)
        for path, those in users.items():
            for inode, size in _files(path):
                sizes[inode] = size
                owners[inode] |= those
        unique: defaultdict[str, int] = defaultdict(int)
        shared: defaultdict[str, float] = defaultdict(float)
        for inode, those in owners.items():
            for owner in those:
                if len(those) == 1:
                    unique[owner] += sizes[inode]
                else:
                    shared[owner] += sizes[inode] / len(those)
        return {owner: Share(unique=unique[owner], shared=round(shared[owner])) for owner in them}

    def _paths(self, layers: Mapping[str, Layer], names: frozenset[str]) -> Iterator[Path]:
        for name in garbage.needed(layers, names):
            yield self._store.layer(name).root
            if found := layers.get(name):
                yield from map(self._store.blob, found.blobs)

    def _layers(self) -> dict[str, Layer]:
        known: dict[str, tuple[tuple[int, int], Layer]] = {}
        for name in (path.name for path in self._store.layers.iterdir() if layer.is_id(path.name)):
            with contextlib.suppress(RametError, OSError):
                files = self._store.layer(name)
                stat = files.record.stat()  # it is only ever replaced
                stamp = (stat.st_ino, stat.st_mtime_ns)
                old = self._known.get(name)
                known[name] = old if old and old[0] == stamp else (stamp, layer.load(files, name))
        self._known = known
        return {name: found for name, (_, found) in known.items()}


def _files(path: Path) -> Iterator[tuple[tuple[int, int], int]]:
    """A file, or a directory with the files in it: which inodes they are, and the bytes that they take. Nothing where it has gone."""
    with contextlib.suppress(OSError):
        stat = path.stat()
        yield (stat.st_dev, stat.st_ino), stat.st_blocks * _BLOCK
        for each in os.scandir(path) if path.is_dir() else ():
            with contextlib.suppress(FileNotFoundError):
                stat = each.stat(follow_symlinks=False)
                yield (stat.st_dev, stat.st_ino), stat.st_blocks * _BLOCK


def measure(pid: int, size: int, served: Path) -> Usage:
    """What a QEMU costs in memory (bytes) and cpu (seconds); nothing where it is gone. size: of its guest's memory; served: where memory layers are."""
    try:
        held = memory.held(pid, size, served)
    except (OSError, ValueError, IndexError):
        return Usage()
    return Usage(
        memory=held.total,
        private=held.private,
        shared=max(0, held.total - held.private),
        overhead=held.cache + held.heap + held.program,
        returned=max(0, size - held.guest),
        cpu=process.cpu_time(pid),
    )


class Accounts:
    """The books of this host's machines and snapshots."""

    def __init__(self, ops: Operations) -> None:
        self._ops = ops
        self._disk = Disk(ops.state.store)

    async def of(self, entries: Iterable[Entry]) -> dict[str, Usage]:
        """By id: these machines, and all snapshots, with those of the machines that are parked for them. No guest is asked."""
        wanted = [(each.record, each.vm.pid if each.vm and not each.vm.dead.done() else None) for each in entries]
        everybody = [each.record for each in self._ops.entries.values()]
        return await asyncio.to_thread(self._count, wanted, everybody, list(self._ops.snapshots.values()))

    async def one(self, entry: Entry, *, ask: bool = False) -> Usage:
        """Of a machine. ask: its guest, too, what it could give back, if it says so in time."""
        asked = self._reclaimable(entry) if ask else _nothing()
        found, reclaimable = await asyncio.gather(self.of([entry]), asked)
        return dataclasses.replace(found.get(entry.record.id, Usage()), reclaimable=reclaimable)

    async def metrics(self, entry: Entry) -> dict[str, float]:
        """What a machine costs, as numbers."""
        usage = dataclasses.asdict(await self.one(entry))
        return {f"host_{name}": value for name, value in usage.items() if value is not None}

    def _count(self, wanted: list[tuple[Record, int | None]], everybody: list[Record], snapshots: list[Snapshot]) -> dict[str, Usage]:
        state = self._ops.state
        shares = self._disk.shares(members(state, everybody, snapshots))
        found = {owner: Usage(disk_unique=share.unique, disk_shared=share.shared) for owner, share in shares.items()}
        for record, pid in wanted:
            mine = measure(pid, record.spec.memory, state.store.mount) if pid else Usage()
            mine = dataclasses.replace(mine, disk=disk.allocated(state.machine(record.id)))
            owner = record.pool or record.id
            found[owner] = _sum(found.get(owner, Usage()), mine)
        return found

    async def _reclaimable(self, entry: Entry) -> int | None:
        """None where it does not run, or does not answer in time."""
        if entry.vm and entry.record.state is State.RUNNING:
            with contextlib.suppress(RametError, TimeoutError):
                async with asyncio.timeout(_ASKING):
                    return reclaimable(await entry.vm.guest.metrics())
        return None


def reclaimable(metrics: Mapping[str, float]) -> int | None:
    """Clean page cache, by what a guest says; None where its agent, of an older snapshot, does not say it."""
    found = metrics.get("mem_reclaimable")
    return None if found is None else int(found)


async def _nothing() -> None:
    return None


def _sum(one: Usage, other: Usage) -> Usage:
    added = {
        each.name: getattr(one, each.name) + getattr(other, each.name) for each in dataclasses.fields(Usage) if each.name != "reclaimable"
    }
    return Usage(**added)
