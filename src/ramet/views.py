"""Machines, snapshots and layers as users see them: the records, and what follows from others."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Mapping

from ramet import disks, lineage, pulling
from ramet.entry import Entry
from ramet.errors import RametError
from ramet.model import Machine, Snapshot, State, Usage
from ramet.operations import Operations
from ramet.storage import LayerInfo
from ramet.store import garbage, remote
from ramet.store.layer import Layer

_INTERNAL = frozenset({"initialised", "source_id", "snapshot_id", "memory_layer", "pool"})


def machine(ops: Operations, entry: Entry, usage: Usage | None = None) -> Machine:
    """Without what it costs where a fork waits for the answer: counting takes 15 ms for each."""
    record = entry.record
    same = {field.name: getattr(record, field.name) for field in dataclasses.fields(record) if field.name not in _INTERNAL}
    source, point = (ops.snapshots.get(each) for each in (record.source_id, record.snapshot_id))
    return Machine(
        **same,
        pid=entry.vm.pid if entry.vm and not entry.vm.dead.done() else None,
        network=ops.host.network.name,
        ports=tuple(forward.port for forward in entry.forwards.values()),
        activity=entry.activity,
        usage=usage,
        parent=source.machine if source else "",
        snapshot=point.title if point else "",
        memory_granted=entry.vm.granted if entry.vm else None,
    )


def snapshot(ops: Operations, found: Snapshot) -> Snapshot:
    """Blocks: it reads records of layers."""
    records = [entry.record for entry in list(ops.entries.values())]
    stored = 0
    for each in found.layers:
        with contextlib.suppress(RametError):
            stored += ops.store.get(each).stored_bytes
    return dataclasses.replace(
        found,
        stored=stored,
        absent=pulling.absent(ops, found.layers) if remote.is_any(ops.state.store) else 0,
        pooled=sum(each.pool == found.id and each.state is State.PAUSED for each in records),
        dependents=lineage.dependents(found, records, list(ops.snapshots.values())),
    )


def layers(ops: Operations, found: Iterable[Layer]) -> list[LayerInfo]:
    """Blocks, as above: it reads of every machine what its disks stand on, once."""
    users = {
        each.record.name: {each.record.memory_layer, *disks.layers_of(ops.state.machine(each.record.id))}
        for each in list(ops.entries.values())
    }
    users |= {each.title: set(each.layers) for each in list(ops.snapshots.values())}
    records = garbage.Records(ops.store.files)
    for used in users.values():  # a disk's layers stand on their base, which no disk names
        used |= {records[each].base_layer for each in used if each in records}
    return [_layer(ops, each, users) for each in found]


def _layer(ops: Operations, found: Layer, users: Mapping[str, set[str]]) -> LayerInfo:
    return LayerInfo(
        id=found.id,
        kind=found.kind,
        size=found.size,
        parent=found.parent,
        chain=found.chain,
        sealed=found.sealed,
        blobs=found.blobs,
        data=found.data_bytes,
        zero=found.zero_bytes,
        stored=found.stored_bytes,
        created_at=found.created_at,
        used_by=tuple(name for name, used in users.items() if found.id in used),
        absent=sum(remote.absent(ops.store.files, digest) for digest in found.blobs),
    )
