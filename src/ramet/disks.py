"""The machines' disks on this host: made empty, frozen into layers, put right after an interruption. `vm/disk.py` says what the files mean."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from ramet import blank
from ramet.errors import LayerError, MachineFailedError
from ramet.model import Drive, Spec
from ramet.paths import MachineDir, StateDir
from ramet.store import qcow2
from ramet.store.disk import guard
from ramet.store.layer import Kind, Layer
from ramet.store.store import Draft, Store
from ramet.vm import argv, disk
from ramet.vm.disk import Disks, DiskState

_OLD = "disk.qcow2"  # of Ramet 0.1, where a machine had one overlay for life


def base(state: StateDir, found: DiskState, image_digest: str) -> Path | None:
    """The raw file that an overlay of a machine stands on; None: on nothing."""
    if found.layer:
        return state.store.served(found.layer)
    below = _bottom(state, found, image_digest)
    return state.root / below if below else None


def _bottom(state: StateDir, found: DiskState, image_digest: str) -> str:
    """What is below the first layer of a disk that stands on none yet, relative to the state directory."""
    return found.base if found.name else str(state.image(image_digest).disk.relative_to(state.root))


def layers_of(files: MachineDir) -> frozenset[str]:
    """The layers that the machine's disks stand on, for which they need the image file system."""
    return frozenset(each.layer for each in disk.read(files)) - {""}


def arguments(state: StateDir, files: MachineDir, found: Disks, image_digest: str, io: argv.DiskIo) -> tuple[argv.Disk, ...]:
    """The disks as QEMU is told of them."""
    return tuple(
        argv.Disk(
            name=each.name, overlay=files.overlay(each.number, each.name), base=base(state, each, image_digest), number=each.number, io=io
        )
        for each in found
    )


async def make(state: StateDir, files: MachineDir, spec: Spec, layers: Sequence[str] = ()) -> Disks:
    """Empty overlays over the layers of a snapshot (or over what a new machine begins with), and the directory for them; whatever the machine had is gone."""
    old = {each.name: each.number for each in disk.read(files)}
    files.root.mkdir(mode=0o700, exist_ok=True)
    made: list[DiskState] = []
    for at, drive in enumerate((Drive(name="", size=spec.disk), *spec.drives)):
        below = "" if layers or not drive.mount else str((await blank.ensure(state, drive)).relative_to(state.root))
        number = old.get(drive.name, -1) + 1
        made.append(DiskState(number=number, layer=layers[at] if layers else "", size=drive.size, name=drive.name, base=below))
    try:
        for each in made:
            files.overlay(each.number, each.name).unlink(missing_ok=True)  # of a save that was cut off
            await qcow2.create(files.overlay(each.number, each.name), each.size)
    except BaseException:
        for each in made:
            files.overlay(each.number, each.name).unlink(missing_ok=True)
        raise
    found = tuple(made)
    disk.write(files, found)
    forget(files, found)
    return found


def forget(files: MachineDir, found: Disks) -> None:
    """Remove the overlays that are not the machine's own any more."""
    for each in found:
        for number in disk.others(files, each):
            files.overlay(number, each.name).unlink(missing_ok=True)


async def add(files: MachineDir, found: Disks, io: argv.DiskIo = argv.PLAIN) -> tuple[argv.Disk, ...]:
    """The overlays that are to follow the machine's own, each of an empty file, standing on nothing yet."""
    made = tuple(
        argv.Disk(name=each.name, overlay=files.overlay(each.number + 1, each.name), number=each.number + 1, io=io) for each in found
    )
    for old, each in zip(found, made, strict=True):
        await qcow2.create(each.overlay, old.size)  # which refuses to overwrite: what a save that was cut off has left is for `settle`
    return made


def current(files: MachineDir, size: int) -> Disks:
    """What the machine has; the file of an older Ramet gets its place first. size: of the root disk, as the spec has it."""
    found = disk.read(files)
    old = files.root / _OLD
    if not found and old.exists():
        old.rename(files.overlay(0))
        found = (DiskState(number=0, layer="", size=size),)
        disk.write(files, found)
    return found


def draft(state: StateDir, store: Store, found: DiskState, image_digest: str) -> Draft:
    """The layer that an overlay of the machine is to become."""
    bottom = "" if found.layer else _bottom(state, found, image_digest)
    return store.draft(Kind.DISK, found.size, parent=found.layer, base=bottom)


def publish(store: Store, files: MachineDir, found: DiskState, made: Draft) -> Layer:
    """The overlay that `disk.json` names is a layer too; nobody writes to it any more. Not on the disk before `commit`."""
    with guard("write", made.spool):
        os.link(files.overlay(found.number, found.name), made.spool)
    return store.publish(made, qcow2.runs(made.spool, found.size), durable=False)


def commit(store: Store, files: MachineDir, found: Disks, layers: Mapping[int, str]) -> None:
    """The next overlays over these layers are the machine's from now on: of all disks at once. layers: by the disk's place among them."""
    for layer_id in layers.values():
        store.settle(layer_id)
    after = tuple(
        DiskState(number=each.number + 1, layer=layers[at], size=each.size, name=each.name) if at in layers else each
        for at, each in enumerate(found)
    )
    disk.write(files, after)
    forget(files, after)


async def freeze(
    state: StateDir, store: Store, files: MachineDir, image_digest: str, only: Collection[int] | None = None
) -> tuple[Layer, ...]:
    """All of it at once. only: the places of the disks that are frozen, where not all are."""
    found = disk.read(files)
    if not found:
        raise MachineFailedError(f"{files.disk} is gone")

    def work() -> tuple[Layer, ...]:
        with contextlib.ExitStack() as stack:
            drafts = {
                at: stack.enter_context(draft(state, store, each, image_digest))
                for at, each in enumerate(found)
                if only is None or at in only
            }
            made = {at: publish(store, files, found[at], each) for at, each in drafts.items()}
            commit(store, files, found, {at: layer.id for at, layer in made.items()})
        return tuple(made.values())

    return await asyncio.to_thread(work)


async def settle(state: StateDir, store: Store, files: MachineDir, image_digest: str, active: Mapping[int, int]) -> Disks:
    """Put right what a save left that was cut off, or that failed at its end; what the machine has then.

    active: the numbers of the overlays that a QEMU which lives writes to, by the disks' places; none: none lives.
    """
    found = disk.read(files)
    cut_off = set()
    for at, each in enumerate(found):
        later = [number for number in disk.others(files, each) if number > each.number]
        if later and active.get(at) == each.number:
            files.overlay(later[0], each.name).unlink()  # it was made, and never used
        elif later:
            cut_off.add(at)
    if cut_off:
        await freeze(state, store, files, image_digest, cut_off)
        found = disk.read(files)
    for at, each in enumerate(found):
        if active.get(at, each.number) != each.number:
            raise LayerError(f"disk {at} of the running machine is in overlay {active[at]}, but {files.disk} names {each.number}")
    forget(files, found)
    return found
