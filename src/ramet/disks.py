"""The machines' disks on this host: made empty, frozen into layers, put right after an interruption. `vm/disk.py` says what the files mean."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from ramet.errors import LayerError, MachineFailedError
from ramet.paths import MachineDir, StateDir
from ramet.store import qcow2
from ramet.store.disk import guard
from ramet.store.layer import Kind, Layer
from ramet.store.store import Draft, Store
from ramet.vm import argv, disk
from ramet.vm.disk import DiskState

_OLD = "disk.qcow2"  # of Ramet 0.1, where a machine had one overlay for life


def base(state: StateDir, found: DiskState, image_digest: str) -> Path:
    """The raw file that a machine's overlay stands on."""
    return state.store.served(found.layer) if found.layer else state.image(image_digest).disk


def layer_of(files: MachineDir) -> str:
    """The layer that the machine's disk stands on, and so needs the image file system; empty where it stands on an image, or there is none."""
    found = disk.read(files)
    return found.layer if found else ""


def argument(state: StateDir, files: MachineDir, found: DiskState, image_digest: str) -> argv.Disk:
    """The disk as QEMU is told of it."""
    return argv.Disk(overlay=files.overlay(found.number), base=base(state, found, image_digest), number=found.number)


async def make(files: MachineDir, layer: str, size: int) -> DiskState:
    """An empty overlay over a layer (or the image); whatever the machine had is gone."""
    old = disk.read(files)
    number = old.number + 1 if old else 0
    files.overlay(number).unlink(missing_ok=True)  # of a save that was cut off
    await qcow2.create(files.overlay(number), size)
    made = DiskState(number=number, layer=layer, size=size)
    disk.write(files, made)
    forget(files, made)
    return made


def forget(files: MachineDir, found: DiskState) -> None:
    """Remove the overlays that are not the machine's own any more."""
    for number in disk.others(files, found):
        files.overlay(number).unlink(missing_ok=True)


async def add(files: MachineDir, found: DiskState) -> Path:
    """The file of the overlay that is to follow the machine's own."""
    path = files.overlay(found.number + 1)
    await qcow2.create(path, found.size)  # which refuses to overwrite: what a save that was cut off has left is for `settle`
    return path


def current(files: MachineDir, size: int) -> DiskState | None:
    """What the machine has; the file of an older Ramet gets its place first. size: of the disk, as the spec has it."""
    found = disk.read(files)
    old = files.root / _OLD
    if found is None and old.exists():
        old.rename(files.overlay(0))
        found = DiskState(number=0, layer="", size=size)
        disk.write(files, found)
    return found


def draft(state: StateDir, store: Store, found: DiskState, image_digest: str) -> Draft:
    """The layer that the machine's overlay is to become."""
    bottom = "" if found.layer else str(state.image(image_digest).disk.relative_to(state.root))
    return store.draft(Kind.DISK, found.size, parent=found.layer, base=bottom)


def publish(store: Store, files: MachineDir, found: DiskState, made: Draft) -> Layer:
    """The overlay that `disk.json` names is a layer too; nobody writes to it any more. Not on the disk before `commit`."""
    with guard("write", made.spool):
        os.link(files.overlay(found.number), made.spool)
    return store.publish(made, qcow2.runs(made.spool, found.size), durable=False)


def commit(store: Store, files: MachineDir, found: DiskState, layer_id: str) -> None:
    """The next overlay over that layer is the machine's from now on."""
    store.settle(layer_id)
    after = DiskState(number=found.number + 1, layer=layer_id, size=found.size)
    disk.write(files, after)
    forget(files, after)


async def freeze(state: StateDir, store: Store, files: MachineDir, image_digest: str) -> Layer:
    """All of it at once."""
    found = disk.read(files)
    if found is None:
        raise MachineFailedError(f"{files.disk} is gone")

    def work() -> Layer:
        with draft(state, store, found, image_digest) as made:
            layer = publish(store, files, found, made)
            commit(store, files, found, layer.id)
        return layer

    return await asyncio.to_thread(work)


async def settle(state: StateDir, store: Store, files: MachineDir, image_digest: str, active: int | None) -> DiskState | None:
    """Put right what a save left that was cut off, or that failed at its end; what the machine has then.

    active: the number of the overlay that a QEMU which lives writes to; None: none lives.
    """
    found = disk.read(files)
    if found is None:
        return None
    later = [number for number in disk.others(files, found) if number > found.number]
    if later and active is not None and active == found.number:
        files.overlay(later[0]).unlink()  # it was made, and never used
    elif later:
        await freeze(state, store, files, image_digest)
        found = disk.read(files) or found
    if active is not None and found.number != active:
        raise LayerError(f"the disk of the running machine is overlay {active}, but {files.disk} names {found.number}")
    forget(files, found)
    return found
