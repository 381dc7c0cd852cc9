"""Giving back what a machine's disk holds and nobody needs: what was written over, is zero, or is as it was before.

The overlay becomes a layer, as in a save, and is compressed. Layers below, on which nobody else stands, give it the pages that it still reads from them,
and go, where enough of them is not read any more.
What a crash leaves is what one of a save leaves: a disk that `disks.settle` puts right, and a layer that is compressed when the daemon starts again.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable
from pathlib import Path

from ramet import disks, saving
from ramet.errors import RametError
from ramet.model import State
from ramet.operations import Entry, Operations, log
from ramet.sealing import Sealer
from ramet.store import garbage
from ramet.store.disk import allocated
from ramet.store.garbage import Records
from ramet.vm import disk

_TRIM_DEADLINE = 120.0  # seconds for the guest to write back what is dirty, and to tell of all that is free


async def compact(ops: Operations, sealer: Sealer, entry: Entry) -> int:
    """Bytes that the host's disk got back. The machine runs, is paused, or is stopped, and goes on as it was."""
    layers, before = await asyncio.to_thread(_taken, ops, entry, frozenset())
    if entry.vm and entry.record.state is State.RUNNING:
        await _trim(ops, entry)
    tops = await saving.freeze(ops, entry)
    ops.doing(entry, "compressing the disk", 0.0)
    async with ops.layers_in_use():
        below = [each for each in await asyncio.to_thread(_loose, ops, tops) if each not in tops]
        await sealer.compress(
            [*below, *tops], thorough=True, progress=lambda done: ops.doing(entry, "compressing the disk", done), what="compressing a disk"
        )
    await ops.collect()
    _, after = await asyncio.to_thread(_taken, ops, entry, layers)
    return max(0, before - after)


async def _trim(ops: Operations, entry: Entry) -> None:
    """Have the guest tell of what it does not use. One that cannot is compacted all the same."""
    assert entry.vm
    ops.doing(entry, "trimming")
    try:
        await entry.vm.guest.slim(_TRIM_DEADLINE)
    except RametError as error:
        log.warning("%s is compacted untrimmed: %s", entry.record.name, error.message)


def _taken(ops: Operations, entry: Entry, others: frozenset[str]) -> tuple[frozenset[str], int]:
    """The layers that a machine's disks need, and the bytes that they, `others` and its overlays take on the host's disk."""
    records = Records(ops.store.files)
    files = ops.state.machine(entry.record.id)
    layers = frozenset(garbage.needed(records, disks.layers_of(files)))
    paths: list[Path] = []
    for each in layers | others:
        with contextlib.suppress(FileNotFoundError):
            paths += ops.store.files.layer(each).root.iterdir()
    blobs = {digest for each in layers | others if each in records for digest in records[each].blobs}
    return layers, disk.allocated(files) + sum(allocated(path) for path in [*paths, *map(ops.store.files.blob, blobs)])


def _loose(ops: Operations, tops: Iterable[str]) -> list[str]:
    """The layers of disks that are not compressed, and belong to no snapshot, which would have it done; of each disk the lowest first."""
    records = Records(ops.store.files)
    saved = {layer for each in list(ops.snapshots.values()) for layer in each.disk_layers}
    chains = [each for top in tops if top in records for each in records[top].chain]
    return [each for each in chains if each not in saved and each in records and not records[each].sealed]


async def finish(ops: Operations, sealer: Sealer) -> None:
    """After a restart of the daemon: compress what a freezing that was cut off has left of machines' disks."""
    for entry in list(ops.entries.values()):
        try:
            tops = disks.layers_of(ops.state.machine(entry.record.id))
            if loose := await asyncio.to_thread(_loose, ops, tops):
                async with ops.layers_in_use():
                    await sealer.compress(loose, what="compressing a disk")
                await ops.collect()  # what they took over
        except RametError as error:
            log.warning("the disk of %s stays uncompressed for now: %s", entry.record.name, error.message)
