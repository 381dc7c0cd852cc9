"""All that is kept, held against what it should be: what is wrong, and what of that can be put right without a loss.

What operations leave for a moment, a directory before the database knows of it, is wrong only when it is there before and after the rest was looked at.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ramet import disks, images, locks
from ramet.errors import BusyError, RametError
from ramet.model import Snapshot, SnapshotState, State
from ramet.operations import Entry, Operations, log
from ramet.paths import ImageDir
from ramet.store import garbage, mending
from ramet.store.garbage import Records
from ramet.store.remote import Remote
from ramet.vm import disk
from ramet.vm import machine as vm

Mend = Callable[[], Awaitable[object]]

_LOOKS = 5  # times that layers are read anew because they changed meanwhile
_HAVE_DISKS = frozenset({State.RUNNING, State.PAUSED, State.STOPPED, State.HIBERNATED})


@dataclass(frozen=True, kw_only=True)
class Problem:
    """text: a sentence that names the thing, and says what can be done. mend: puts it right; None: nothing does without a loss."""

    text: str
    mend: Mend | None = None


async def check(ops: Operations, *, repair: bool) -> list[str]:
    """What is wrong, a sentence each. repair: put right what can be, and say what remains; what was put right is in the log."""
    before = {each.text for each in await _fleeting(ops)}
    found = [Problem(text=text) for text in await ops.db.problems()]
    found += await _snapshots(ops)
    found += await asyncio.to_thread(lambda: [*_images(ops), *_blobs(ops)])
    if repair:
        found = await _mended(found)
    found += [Problem(text=text) for text in await _layers(ops, repair=repair)]
    again = [each for each in await _fleeting(ops) if each.text in before]
    return [each.text for each in found + (await _mended(again) if repair else again)]


async def _mended(problems: list[Problem]) -> list[Problem]:
    """Those that remain."""
    left = []
    for each in problems:
        if each.mend is None:
            left.append(each)
            continue
        try:
            await each.mend()
        except RametError as error:
            left.append(Problem(text=f"{each.text} ({error.message})"))
        else:
            log.warning("put right: %s", each.text)
    return left


# layers


async def _layers(ops: Operations, *, repair: bool) -> list[str]:
    """What is wrong with those that snapshots and machines need."""
    try:
        texts = await _verified(ops)
    except RametError as error:
        return [f"layers cannot be checked: {error.message}"]
    if texts and repair and (count := await asyncio.to_thread(mending.mend, ops.store.files, _heads(ops))):
        log.warning("put right: %d damaged pieces of blobs were given up, and are fetched again", count)
        ops.layers.forget()
        texts = await _verified(ops)
    return texts


async def _verified(ops: Operations) -> list[str]:
    for _ in range(_LOOKS):
        heads = _heads(ops)
        texts = await asyncio.to_thread(ops.store.verify, *sorted(heads))
        if not texts or heads == _heads(ops):  # else it may have been deleted while it was read
            break
    return texts


def _heads(ops: Operations) -> frozenset[str]:
    """What a snapshot needs that is known to be broken is not asked for."""
    broken = {name for each in ops.snapshots.values() if each.state is SnapshotState.BROKEN for name in each.layers}
    sound = {name for each in ops.snapshots.values() if each.state is not SnapshotState.BROKEN for name in each.layers}
    return ops.needed_layers() - (broken - sound)


def _blobs(ops: Operations) -> Iterator[Problem]:
    files = ops.store.files

    def mend(found: Remote) -> Mend:
        return lambda: asyncio.to_thread(mending.place, files, found)

    for text, found in mending.misplaced(files):
        yield Problem(text=text, mend=mend(found) if found else None)


# snapshots


async def _snapshots(ops: Operations) -> list[Problem]:
    looked = await asyncio.to_thread(lambda: [(each, _lost(ops, each)) for each in list(ops.snapshots.values())])
    return [
        Problem(text=f"snapshot {each.title} cannot be used: {why}; delete it", mend=functools.partial(_broken, ops, each.id, why))
        for each, why in looked
        if why and each.id in ops.snapshots
    ]


async def _broken(ops: Operations, snapshot_id: str, why: str) -> None:
    """Nobody starts from it any more; what there is of it stays."""
    if snapshot_id in ops.snapshots:
        await ops.snapshots.change(snapshot_id, state=SnapshotState.BROKEN, reason=why)


def _lost(ops: Operations, found: Snapshot) -> str:
    """Why a snapshot is not whole, which is not known of it yet."""
    if found.state is SnapshotState.BROKEN:
        return ""
    place = ops.state.snapshot(found.id)
    if not place.root.is_dir():
        return f"its directory {place.root} is gone"
    if found.memory and not place.state.is_file():
        return f"{place.state}, the state of its devices, is gone"
    records = Records(ops.store.files)
    gone = sorted(name for name in garbage.needed(records, found.layers) if name not in records)
    return f"layer {gone[0]} is missing, or its record is damaged" if gone else ""


# images


def _images(ops: Operations) -> Iterator[Problem]:
    for path in sorted(ops.state.images.glob("sha256-*")):
        place = ImageDir(root=path)
        found = images.load(ops.state, path.name.replace("-", ":", 1))
        if found is None:
            if path.is_dir() and any(path.iterdir()):  # one that was cut off has its directory before its record; the next takes that
                yield Problem(text=f"image {path.name} is not whole: its record or its disk is missing; it is made again when it is needed")
            continue
        why = _unreadable(place.disk, found.disk_size)
        if why:
            yield Problem(text=f"image {found.reference}: {why}; restore the file: machines stand on just this one")


def _unreadable(path: Path, size: int) -> str:
    try:
        with open(path, "rb") as file:
            found = path.stat().st_size
            file.read(1)
    except FileNotFoundError:  # its disk lies in layers
        return ""
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"
    return "" if found == size else f"{path} has {found} bytes, and should have {size}"


# what comes and goes


async def _fleeting(ops: Operations) -> list[Problem]:
    return [
        *await _garbage(ops),
        *await asyncio.to_thread(lambda: [*_directories(ops), *_machines(ops), *_sockets(ops)]),
    ]


async def _garbage(ops: Operations) -> list[Problem]:
    try:
        would = await ops.gc(dry_run=True)
    except RametError:  # what is needed is not known; which is said of what should tell
        return []
    found = [f"layer {name} belongs to nothing" for name in would.layers]
    found += [f"blob {name} belongs to no layer" for name in would.blobs]
    found += [f"{would.drafts} layers were never finished"] if would.drafts else []
    return [Problem(text=f"{text}; `ramet gc` removes it", mend=lambda: _collected(ops)) for text in found]


async def _collected(ops: Operations) -> None:
    """BusyError when that must wait."""
    if (freed := await ops.gc()).postponed:
        raise BusyError("; ".join(freed.postponed))


def _directories(ops: Operations) -> Iterator[Problem]:
    for what, place, known in (("machine", ops.state.machines, ops.entries), ("snapshot", ops.state.snapshots, ops.snapshots)):
        for path in sorted(place.iterdir()):
            if path.name.startswith("."):
                yield Problem(text=f"{path} was left half-made or half-removed; a restart of the daemon removes it")
            elif path.name not in known:
                yield Problem(text=f"{path} belongs to no {what} of the database; delete it, or restore the database")


def _machines(ops: Operations) -> Iterator[Problem]:
    for entry in list(ops.entries.values()):
        if entry.record.state in _HAVE_DISKS and not entry.operation:
            for why in _of_machine(ops, entry):
                yield Problem(text=f"machine {entry.record.name}: {why}")


def _of_machine(ops: Operations, entry: Entry) -> Iterator[str]:
    files = ops.state.machine(entry.record.id)
    if not files.root.is_dir():
        yield f"its directory {files.root} is gone; delete it"
        return
    try:
        found = disk.read(files)
    except (OSError, RametError) as error:
        yield str(error)
        return
    for each in found:
        overlay = files.overlay(each.number, each.name)
        if not overlay.is_file():
            yield f"its disk {overlay} is gone; `ramet restore` goes back to its last snapshot"
        base = disks.base(ops.state, each, entry.record.image_digest)
        if base and not base.is_relative_to(ops.state.store.mount) and not base.is_file():
            yield f"{base}, on which its disk stands, is gone; restore the file"


def _sockets(ops: Operations) -> Iterator[Problem]:
    def stale(path: Path, whose: str) -> Problem:
        async def remove() -> None:
            path.unlink(missing_ok=True)

        return Problem(text=f"{path} is left of {whose} that ended", mend=remove)

    store = ops.state.store
    if store.fetch.exists() and not locks.is_held(store.lock):
        yield stale(store.fetch, "an image file system")
    for entry in list(ops.entries.values()):
        files = ops.state.machine(entry.record.id)
        for path in (files.qmp, files.agent):
            if path.exists() and not entry.vm and not entry.operation and not vm.is_alive(files):
                yield stale(path, "a machine")
