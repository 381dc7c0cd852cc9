"""Saving a machine: an instant is caught, becomes layers and a record, and only then counts.

Every step is told as an activity. What a crash leaves: before the record is written, layers that nobody names (removed by the next collection) and a disk
that `disks.settle` puts right; afterwards the snapshot is whole.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import shutil
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any

from ramet import bringup, disks, guestfs, snapshot
from ramet.db import Record
from ramet.errors import MachineFailedError, RametError
from ramet.model import Compatibility, Snapshot, SnapshotState, State
from ramet.operations import Entry, Operations, log
from ramet.paths import SnapshotDir
from ramet.records import dump
from ramet.store.disk import guard, sync
from ramet.store.layer import Kind, Layer
from ramet.store.runs import Runs
from ramet.store.store import Draft
from ramet.vm import capture
from ramet.vm.capture import Capture
from ramet.vm.disk import Disks
from ramet.vm.machine import Vm
from ramet.vm.memory import PAGE

_DYING = 5.0  # seconds for a QEMU that closed its monitor to end
_SYNC_DEADLINE = 120.0  # seconds for a guest to write back what it holds, before its disk is saved without its memory


@dataclasses.dataclass(kw_only=True)
class Save:
    """A save of a live machine that goes on: `catch` the instant, `keep` it, `settle` the machine.

    snapshot: complete from the begin on but for the pause, so that a QEMU may be started for it before it is whole. disks: what the machine has now,
    layers: what those become; memory: what its memory becomes, None: it is not saved.
    """

    ops: Operations
    entry: Entry
    machine: Vm
    snapshot: Snapshot
    staged: SnapshotDir
    disks: Disks
    layers: tuple[Draft, ...]
    memory: Draft | None
    wanted: Capture

    async def catch(self) -> None:
        """The pause."""
        spool = None
        if self.memory:
            with guard("write", self.memory.spool):
                spool = os.open(self.memory.spool, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            await capture.capture(self.machine, self.wanted, spool, self._step)
        finally:
            if spool is not None:
                os.close(spool)
        self.snapshot = dataclasses.replace(self.snapshot, pause=self.wanted.pause, saved=_saved(self.wanted))

    async def publish(self) -> None:
        """The layers are there; nobody names them yet."""
        await asyncio.to_thread(self._publish)

    async def keep(self) -> None:
        """From here on the snapshot exists, and can be started from."""
        self._step("keeping the snapshot")
        await self.publish()
        self._step("recording the snapshot")
        await _record(self.ops, self.entry, self.snapshot, self.staged)

    def _publish(self) -> None:
        for found, layer in zip(self.disks, self.layers, strict=True):
            disks.publish(self.ops.store, self.machine.files, found, layer)
        if self.memory:
            self.ops.store.publish(self.memory, _packed(self.wanted), durable=False)

    async def settle(self) -> None:
        """The machine's disks stand on the layers, for good and in one step, however many saves there were."""
        self._step("keeping the disk")
        layers = dict(enumerate(self.snapshot.disk_layers))
        await asyncio.to_thread(disks.commit, self.ops.store, self.machine.files, self.disks, layers)
        for at, overlay in enumerate(self.wanted.overlays):
            try:
                await capture.rebase(self.machine, at, overlay, self.ops.state.store.served(layers[at]))
            except RametError as error:
                log.warning("the disk chain of %s stays longer than it needs to be: %s", self.entry.record.name, error.message)

    def _step(self, text: str) -> None:
        self.ops.doing(self.entry, text)


@contextlib.asynccontextmanager
async def live(ops: Operations, entry: Entry, *, name: str = "", memory: bool = True) -> AsyncIterator[Save]:
    """A save of a machine that runs or is paused; what was not kept in the body is gone afterwards. name: empty for an automatic one."""
    assert entry.vm
    made = _new(entry, name, memory)
    async with ops.layers_in_use(), _disks_of(ops, entry) as found:
        with stage(ops, made.id) as staged, contextlib.ExitStack() as stack:
            layers = tuple(stack.enter_context(disks.draft(ops.state, ops.store, each, made.image_digest)) for each in found)
            changes: dict[str, Any] = _disk_layers([each.id for each in layers])
            pages = stack.enter_context(_memory_draft(ops, entry)) if memory else None
            if pages:
                changes |= {"memory_layer": pages.id, "compatibility": await _compatibility(ops, entry)}
            elif entry.record.state is State.RUNNING:
                ops.doing(entry, "writing the files to the disk")
                await guestfs.sync(entry.vm.guest, _SYNC_DEADLINE)
            made = dataclasses.replace(made, **changes)
            wanted = await _wanted(ops, entry, found, staged if memory else None)
            yield Save(
                ops=ops,
                entry=entry,
                machine=entry.vm,
                snapshot=made,
                staged=staged,
                disks=found,
                layers=layers,
                memory=pages,
                wanted=wanted,
            )


def _disk_layers(layers: Sequence[str]) -> dict[str, Any]:
    """What a snapshot says of the layers of the disks."""
    return {"disk_layer": layers[0], "drive_layers": tuple(layers[1:])}


@contextlib.asynccontextmanager
async def _disks_of(ops: Operations, entry: Entry) -> AsyncIterator[Disks]:
    """What the machine has. When the body fails, QEMU is asked which overlays it writes to: perhaps the next ones already, which must have their place then."""
    await ops.use_layers()
    found = await _settled(ops, entry)
    if not found:
        raise MachineFailedError(f"{entry.record.name} has no disk yet", hint="Start it once.")
    try:
        yield found
    except BaseException:
        try:
            await _settled(ops, entry)
        except RametError as error:  # the next save, or start, tries again before it does anything else
            log.error("the disk of %s: %s", entry.record.name, error.message)
        raise


async def _settled(ops: Operations, entry: Entry) -> Disks:
    active: dict[int, int] = {}
    if entry.vm and not entry.vm.dead.done():
        try:
            active = await capture.active_overlays(entry.vm)
        except RametError:
            await asyncio.wait({entry.vm.dead}, timeout=_DYING)  # a QEMU that ends closes its monitor first
            if not entry.vm.dead.done():
                raise
    return await settle(ops, entry, active)


async def settle(ops: Operations, entry: Entry, active: Mapping[int, int]) -> Disks:
    """Put the disks right where a save was cut off; what the machine has then. active: the overlays that a QEMU which lives writes to."""
    found = await ops.settle_disks(entry, active)
    if active:
        await _stand(ops, entry, found)
    return found


async def _stand(ops: Operations, entry: Entry, found: Disks) -> None:
    """Have a QEMU that lives read its disks from what they stand on now."""
    assert entry.vm
    if any(each.layer for each in found):
        await ops.use_layers()
    io = (await ops.host.boot(fresh=False)).disk_io
    for at, overlay in enumerate(disks.arguments(ops.state, entry.vm.files, found, entry.record.image_digest, io)):
        try:
            await capture.settle(entry.vm, at, overlay)
        except RametError as error:
            log.warning("the disk chain of %s stays longer than it needs to be: %s", entry.record.name, error.message)


async def save(ops: Operations, entry: Entry, *, name: str, memory: bool) -> Snapshot:
    """Save a machine that runs or is paused, or without memory one that is stopped."""
    if entry.vm:
        async with live(ops, entry, name=name, memory=memory) as made:
            await made.catch()
            await made.keep()
            await made.settle()
        return made.snapshot
    found = _new(entry, name, memory)
    async with ops.layers_in_use(), _disks_of(ops, entry) as had:
        found = dataclasses.replace(found, **_disk_layers(await _frozen(ops, entry, had)))
        with stage(ops, found.id) as staged:
            await _record(ops, entry, found, staged)
    return found


async def freeze(ops: Operations, entry: Entry) -> tuple[str, ...]:
    """Make the machine's overlays layers and give it empty ones, for no snapshot; the layers' ids. The machine may run, be paused, or stopped."""
    if entry.vm:
        async with live(ops, entry, memory=False) as made:
            await made.catch()
            await made.publish()
            await made.settle()
        return made.snapshot.disk_layers
    async with ops.layers_in_use(), _disks_of(ops, entry) as had:
        return await _frozen(ops, entry, had)


async def _frozen(ops: Operations, entry: Entry, had: Disks) -> tuple[str, ...]:
    """The same for a machine that has no QEMU."""
    files = ops.state.machine(entry.record.id)
    ops.doing(entry, "freezing the disk")
    await disks.add(files, had)
    return tuple(each.id for each in await disks.freeze(ops.state, ops.store, files, entry.record.image_digest))


async def hibernate(ops: Operations, entry: Entry, *, slimmed: int = 0) -> Snapshot:
    """Save a machine and end its QEMU. Nothing waits for it to go on, so its pages are compressed straight from its memory.

    slimmed: bytes of memory that it gave back just before.
    """
    machine = entry.vm
    assert machine
    made = _new(entry, "", True)

    def step(text: str) -> None:
        ops.doing(entry, text)

    async with ops.layers_in_use(), _disks_of(ops, entry) as found:
        with stage(ops, made.id) as staged:
            compatibility = await _compatibility(ops, entry)
            wanted = await _wanted(ops, entry, found, staged)
            await capture.prepare(machine, wanted)
            began = time.monotonic()
            async with capture.still(machine, step) as stillness:
                await capture.catch(machine, wanted, None, step)
                step("keeping the disk")
                below = await disks.freeze(ops.state, ops.store, machine.files, made.image_digest)
                memory = await _sealed(ops, entry, machine, wanted)
                made = dataclasses.replace(
                    made,
                    compatibility=compatibility,
                    **_disk_layers([each.id for each in below]),
                    memory_layer=memory.id,
                    pause=time.monotonic() - began,
                    saved=_saved(wanted),
                    slimmed=slimmed,
                )
                step("recording the snapshot")
                await _record(ops, entry, made, staged, into=State.HIBERNATED)
                stillness.go_on = False
    return made


def _new(entry: Entry, name: str, memory: bool) -> Snapshot:
    record = entry.record
    return Snapshot(
        id=os.urandom(6).hex(),
        name=name,
        machine=record.name,
        state=SnapshotState.SAVING,
        created_at=time.time(),
        memory=memory,
        spec=record.spec,
        parent=record.snapshot_id,
        image_digest=record.image_digest,
        memory_limit=record.memory_limit,
    )


@contextlib.contextmanager
def stage(ops: Operations, snapshot_id: str) -> Iterator[SnapshotDir]:
    """A directory for what is not a layer; gone afterwards, unless it was published."""
    staged = ops.state.snapshot(f".new-{snapshot_id}")
    with guard("write", staged.root):
        staged.root.mkdir(mode=0o700)
    try:
        yield staged
    finally:
        shutil.rmtree(staged.root, ignore_errors=True)


def _publish_directory(made: Snapshot, staged: SnapshotDir, final: SnapshotDir) -> None:
    """Durable, then under its name."""
    with guard("write", staged.root):
        staged.record.write_text(json.dumps(dump(made), indent=1))
        for path in (*staged.root.iterdir(), staged.root):
            sync(path)
        staged.root.rename(final.root)
        sync(final.root.parent)


async def _record(ops: Operations, entry: Entry, made: Snapshot, staged: SnapshotDir, *, into: State | None = None) -> None:
    """The same, and the machine stands on it. into: the machine's state from then on."""
    record = dataclasses.replace(entry.record, snapshot_id=made.id)
    if into:
        record = dataclasses.replace(record, state=into, memory_layer="")
    await admit(ops, made, staged, record)
    ops.replace(entry, record)


async def admit(ops: Operations, made: Snapshot, staged: SnapshotDir, machine: Record | None = None) -> None:
    """The moment from which a snapshot exists. machine: the record of the one that it is of, as it is from then on, where it is of any."""
    place = ops.state.snapshot(made.id)
    try:
        await asyncio.to_thread(_publish_directory, made, staged, place)
        await ops.db.add_snapshot(made, machine)
    except BaseException:
        shutil.rmtree(place.root, ignore_errors=True)
        raise
    ops.snapshots[made.id] = made


async def _wanted(ops: Operations, entry: Entry, found: Disks, staged: SnapshotDir | None) -> Capture:
    """What to catch, with the files of the overlays that the machine will get."""
    assert entry.vm
    overlays = await disks.add(entry.vm.files, found, (await ops.host.boot(fresh=False)).disk_io)
    return Capture(overlays=overlays, state=staged.state if staged else None, size=entry.record.spec.memory)


def _memory_draft(ops: Operations, entry: Entry) -> Draft:
    return ops.store.draft(Kind.MEMORY, entry.record.spec.memory, parent=entry.record.memory_layer)


def _saved(wanted: Capture) -> int:
    """Bytes of the memory that was caught."""
    return sum(count for _, count in wanted.spans) * PAGE


def _packed(wanted: Capture) -> Runs:
    """Where the pages lie in a file that holds them one after the other."""

    def runs() -> Iterator[tuple[int, int, int]]:
        at = 0
        for first, count in wanted.spans:
            yield first, count, at
            at += count

    return Runs.build(runs())


async def _sealed(ops: Operations, entry: Entry, machine: Vm, wanted: Capture) -> Layer:
    """A layer of the memory of a process that stands still."""
    at = wanted.base // PAGE
    runs = Runs.build((first, count, at + first) for first, count in wanted.spans)
    loop = asyncio.get_running_loop()

    def progress(fraction: float) -> None:
        loop.call_soon_threadsafe(ops.doing, entry, "saving memory", fraction)

    def work() -> Layer:
        memory = os.open(f"/proc/{machine.pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
        try:
            with _memory_draft(ops, entry) as draft:
                return ops.store.publish_sealed(draft, memory, runs, progress=progress)
        finally:
            os.close(memory)

    return await asyncio.to_thread(work)


async def _compatibility(ops: Operations, entry: Entry) -> Compatibility:
    """What the running machine is; its QEMU is asked, for the host's may have been replaced since it started."""
    assert entry.vm
    boot = await ops.host.boot(fresh=False)
    version = (await entry.vm.monitor("query-version"))["qemu"]
    config = bringup.config(entry.record.spec, boot, ops.host.network)
    config = dataclasses.replace(config, accelerator=entry.record.accelerator or config.accelerator)
    return snapshot.compatibility(config, "{major}.{minor}.{micro}".format(**version), ops.host.cpu, entry.record.kernel)
