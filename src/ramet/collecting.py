"""What the host's disk gets back: what nothing needs, and where layers take more than they may, chunks that a registry has too."""

from __future__ import annotations

import asyncio

from ramet import disks, locks
from ramet.model import SnapshotState
from ramet.operations import Operations
from ramet.paths import MachineDir
from ramet.storage import Collected
from ramet.store import eviction
from ramet.store.eviction import Evicted
from ramet.units import format_size


async def collect(ops: Operations, *, budget: int | None, dry_run: bool) -> Collected:
    """budget: bytes that all layers may take, None: any number. dry_run: only say what would go. HostError."""
    freed = await ops.gc(dry_run=dry_run)
    stored = await asyncio.to_thread(eviction.stored, ops.store.files)
    stored -= freed.bytes if dry_run else 0
    given = Evicted()
    if budget is not None and stored > budget:
        given = await ops.evict(stored - budget, lambda: in_use(ops), dry_run=dry_run)
        if given.blobs and not dry_run:
            await asyncio.to_thread(_drop_cached, ops, given)
        stored -= given.bytes
    postponed = [*freed.postponed, *given.postponed]
    if budget is not None and stored > budget:
        postponed.append(f"layers take more than {format_size(budget)}: machines use the rest, or it can be had nowhere else")
    return Collected(
        layers=freed.layers,
        blobs=freed.blobs,
        evicted=given.bytes,
        bytes=freed.bytes + given.bytes,
        stored=stored,
        postponed=tuple(postponed),
    )


def in_use(ops: Operations) -> frozenset[str]:
    """The layers that a machine reads now, or will in a moment; a test of a snapshot is one too."""
    found: set[str] = set()
    for entry in list(ops.entries.values()):
        record, files = entry.record, ops.state.machine(entry.record.id)
        if entry.vm or entry.operation or locks.is_held(files.lock):
            points = [point for name in (record.snapshot_id, record.source_id, record.pool) if (point := ops.snapshots.get(name))]
            found |= {
                *(each.memory_layer for each in entry.records),
                *disks.layers_of(files),
                *(layer for point in points for layer in point.layers),
            }
    for each in list(ops.snapshots.values()):
        if each.state is SnapshotState.TESTING:
            found |= set(each.layers)
    for path in ops.state.machines.iterdir():  # also those that a lost database does not name any more
        if locks.is_held(path / "lock"):
            found |= disks.layers_of(MachineDir(root=path))
    return frozenset(found - {""})


def _drop_cached(ops: Operations, given: Evicted) -> None:
    """Of what nobody uses; the image file system may be gone by now, and then nothing is cached."""
    if locks.is_held(ops.state.store.lock):
        files = ops.store.files
        eviction.drop_cached(files, eviction.readers(files, ops.needed_layers() - in_use(ops), given.blobs))
