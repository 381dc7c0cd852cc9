"""The daemon's start: make the directories and processes agree with the database, and say in the log what was done."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Mapping

from ramet import bringup, disks, images, lifecycle, locks, restoring, rewinding, saving, spacewatch
from ramet.errors import RametError
from ramet.fetchwatch import WAITS
from ramet.model import ImageConfig, Snapshot, State
from ramet.operations import LOST, Entry, Operations, retrieve
from ramet.paths import MachineDir
from ramet.records import load
from ramet.store import disk
from ramet.vm import balloon, capture
from ramet.vm import machine as vm
from ramet.vm.machine import Vm

log = logging.getLogger("ramet")

_AGAIN = 1.0  # seconds that a machine which waits for its memory is given to answer, and until it is asked again
_TRIES = 3  # times that a running machine is tried to be taken over
_AT_ONCE = 5.0  # seconds within which that must fail to be tried again: a line that breaks, not a guest that hangs
_ADOPTING = 5.0  # seconds that the daemon's start waits for running machines to answer; the rest is found in the background


async def reconcile(ops: Operations) -> None:
    """After this, every machine's record is true."""
    for doomed in [*ops.state.machines.glob(".deleting-*"), *ops.state.snapshots.glob(".new-*"), *ops.state.snapshots.glob(".deleting-*")]:
        log.info("finishing the removal of %s", doomed.name)
        await bringup.clear(MachineDir(root=doomed))  # what was put aside for a rewinding may live
    for place in (ops.state.root, *ops.state.images.glob("sha256-*"), *ops.state.machines.iterdir()):
        disk.remove_unwritten(place)  # of layers' directories a collection does, which looks into them anyway
    if not locks.is_held(ops.state.store.lock):
        await ops.layers.stop()  # what a keeper that died has left
    await asyncio.to_thread(restoring.end_traces, ops)
    await _find_snapshots(ops)
    adopting = []
    for record in await ops.db.machines():
        entry = ops.add(await rewinding.recovered(ops, record))
        record = entry.record
        found = images.load(ops.state, record.image_digest) if record.image_digest else None
        entry.image = found.config if found else ImageConfig()
        entry.sought, entry.task = True, asyncio.create_task(_find(ops, entry))
        adopting.append(entry.task)
    for path in ops.state.machines.iterdir():
        if path.name not in ops.entries and not path.name.startswith("."):
            log.warning("%s belongs to no machine of the database; it is left alone", path)
    if adopting:
        _, late = await asyncio.wait(adopting, timeout=_ADOPTING)
        for task in late:
            ops.keep(task)
    for task in adopting:
        task.add_done_callback(retrieve)


async def _find_snapshots(ops: Operations) -> None:
    """Those of the database, and those that were whole when the daemon ended before it could tell the database. One without its files was being deleted."""
    for snapshot in await ops.db.snapshots():
        ops.snapshots[snapshot.id] = snapshot
        if not ops.state.snapshot(snapshot.id).root.exists():
            await ops.snapshots.forget(snapshot)
    for path in ops.state.snapshots.iterdir():
        if path.name in ops.snapshots:
            continue
        try:
            found = load(Snapshot, json.loads(ops.state.snapshot(path.name).record.read_text()))
            await ops.db.add_snapshot(found, None)
        except (OSError, ValueError, RametError) as error:
            log.warning("%s is no snapshot that can be used; it is left alone: %s", path, error)
            continue
        log.info("snapshot %s was whole, and is known again", found.title)
        ops.snapshots[found.id] = found


async def _find(ops: Operations, entry: Entry) -> None:
    try:
        await recover(ops, entry)
    finally:
        entry.sought = False


async def recover(ops: Operations, entry: Entry) -> None:
    """One machine that nobody watches: after a restart of the daemon, or a rewinding that failed."""
    record = entry.record
    files = ops.state.machine(record.id)
    alive = vm.is_alive(files)
    needs_layers = bool(record.memory_layer or disks.layers_of(files))
    if alive and needs_layers and not locks.is_held(ops.state.store.lock):
        log.warning("%s lost the image file system while no daemon ran", record.name)
        await ops.end(entry)
        if record.state in (State.RUNNING, State.PAUSED):
            await _settle(ops, entry, {})
            await ops.set(entry, state=State.FAILED, reason=LOST)
            return
        alive = False
    live = {State.RUNNING, State.PAUSED} | ({State.HIBERNATING, State.RESTORING} if alive else set())
    if record.state in lifecycle.INTERRUPTED and record.state not in live:
        after = lifecycle.INTERRUPTED[record.state]
        log.info("%s was %s when the daemon ended: now %s", record.name, record.state, after or "deleted")
        if after is None:
            await ops.remove(entry)
            return
        await ops.end(entry)
        await _settle(ops, entry, {})
        reason = f"the daemon ended while it was {record.state}" if after is State.FAILED else ""
        await ops.set(entry, state=after, reason=reason)
    elif record.state in live and alive:
        await _adopt(ops, entry)
    elif record.state in live:
        await ops.end(entry)
        await _settle(ops, entry, {})
        death = vm.postmortem(files)
        log.warning("%s ended while no daemon ran: %s", record.name, death.reason)
        await ops.set(entry, state=State.STOPPED if death.clean else State.FAILED, reason=death.reason)
    else:
        if alive:
            log.info("%s is %s but a process of it lives: ended", record.name, record.state)
            await ops.end(entry)
        await _settle(ops, entry, {})


async def _settle(ops: Operations, entry: Entry, active: Mapping[int, int]) -> None:
    """Put the disks right where a save was cut off."""
    try:
        await saving.settle(ops, entry, active)
    except RametError as error:
        log.error("the disk of %s: %s", entry.record.name, error.message)


async def _adopt(ops: Operations, entry: Entry, *, tries: int = _TRIES) -> None:
    """Take a machine that lives over from a daemon that is gone, and make it what the record says it is: a save may have been cut off."""
    files, began = ops.state.machine(entry.record.id), time.monotonic()
    waits = entry.record.reason.startswith(WAITS)  # then its monitor answers when it has the page that it waits for
    try:
        machine = await Vm.adopt(files, deadline=_AGAIN if waits else vm.SPAWN_DEADLINE)
        entry.vm = machine
        if entry.record.memory_limit:
            await balloon.look(machine)
        if entry.record.memory_layer or disks.layers_of(files):
            await ops.use_layers()
        await _settle(ops, entry, await capture.active_overlays(machine))
        if entry.record.state is State.PAUSED:
            await machine.monitor("stop")
            machine.still = True
            ops.watch(entry, machine)
            return
        status = await machine.status()
        if status == "io-error":  # it would take what room there is for the daemon
            _stand_still(ops, entry, machine)
            return
        if status != "running":
            log.info("%s stood still when the daemon ended: it goes on", entry.record.name)
            await machine.monitor("cont")
        await machine.connect_agent(deadline=vm.BOOT_DEADLINE / 3, resync=True)
    except RametError as error:
        if entry.vm and entry.vm.stuck:
            _stand_still(ops, entry, entry.vm)
            return
        if waits and vm.is_alive(files):
            if entry.vm:
                await entry.vm.release()
                entry.vm = None
            ops.spawn(_adopt_later(ops, entry))
            return
        if tries > 1 and time.monotonic() - began < _AT_ONCE and vm.is_alive(files):  # its memory is worth another try
            log.warning("%s cannot be taken over, and is tried again: %s", entry.record.name, error.message)
            await ops.let_go(entry)
            await _adopt(ops, entry, tries=tries - 1)
            return
        reason = f"it could not be found again after a restart of the daemon: {error.message}"
        log.warning("%s: %s", entry.record.name, reason)
        await ops.set(entry, state=State.FAILED, reason=reason)
        return
    log.info("%s runs on (QEMU %d)", entry.record.name, machine.pid)
    if entry.record.state in (State.HIBERNATING, State.RESTORING):
        await ops.set(entry, state=State.RUNNING)
    ops.watch(entry, machine)
    await restoring.open_ports(ops, entry)


def _stand_still(ops: Operations, entry: Entry, machine: Vm) -> None:
    """The disk is full: until there is room."""
    ops.watch(entry, machine)
    machine.still = True
    spacewatch.stand_still(ops, entry)
    ops.on_stuck(entry, machine)


async def _adopt_later(ops: Operations, entry: Entry) -> None:
    await asyncio.sleep(_AGAIN)
    if entry.record.state is State.PAUSED and not entry.operation and entry.record.id in ops.entries:
        await _adopt(ops, entry)
