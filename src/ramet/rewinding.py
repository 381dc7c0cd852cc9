"""Going back to an instant in place. What the machine is now is put aside, whole and standing still, and taken back where the instant cannot be had.

Its directory gets another name, with its record inside, and its QEMU is stopped; what goes on from the instant gets a directory of its own under the old
name. The rewinding counts from the moment at which what was put aside gets a name under which things are only removed. A daemon that finds something
that was put aside takes it back.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import AsyncIterator

from ramet import bringup
from ramet.db import Record
from ramet.errors import DaemonError, NoSpaceError, RametError
from ramet.model import State
from ramet.operations import Entry, Operations, log
from ramet.paths import MachineDir, StateDir
from ramet.records import dump, load
from ramet.store.disk import guard, replace
from ramet.vm import machine as vm


@contextlib.asynccontextmanager
async def aside(ops: Operations, entry: Entry, was: Record) -> AsyncIterator[None]:
    """In the body the machine has no process and no disk. What it had is gone afterwards; when the body fails, it is there again, and nobody watches it.

    was: its record from before the rewinding began, which it has again then.
    """
    doomed = MachineDir(root=ops.state.machines / f".deleting-{was.id}-{os.urandom(4).hex()}")
    entry.was, waiting, image = was, entry.waiting, entry.image
    try:
        await ops.let_go(entry)
        _put(ops.state, was)
        yield
        _aside(ops.state, was.id).root.rename(doomed.root)
    except BaseException:
        await ops.let_go(entry)
        await _take_back(ops.state, was.id)
        entry.waiting, entry.image = waiting, image
        await _set(ops, was)
        ops.replace(entry, was)
        raise
    finally:
        entry.was = None
    with contextlib.suppress(asyncio.CancelledError):  # it is rewound, whatever ends us now
        await asyncio.shield(ops.spawn(_remove(doomed)))


async def recovered(ops: Operations, record: Record) -> Record:
    """After a restart of the daemon: what a machine is whose rewinding was cut off, if it was."""
    if record.state is not State.RESTORING:
        return record
    await _take_back(ops.state, record.id)
    try:
        was = load(Record, json.loads(ops.state.machine(record.id).before.read_text()))
    except FileNotFoundError:
        return record
    except (OSError, ValueError, DaemonError) as error:  # the host went down with it
        log.warning("%s: %s", ops.state.machine(record.id).before, error)
        return record
    log.info("%s was being rewound when the daemon ended: it is what it was before, %s", was.name, was.state)
    await _set(ops, was)
    return was


def _aside(state: StateDir, machine_id: str) -> MachineDir:
    return MachineDir(root=state.machines / f".before-{machine_id}")


async def _remove(doomed: MachineDir) -> None:
    """Left to the next daemon where it fails."""
    try:
        await bringup.clear(doomed)
    except RametError as error:
        log.warning("what a machine was before it was rewound: %s", error.message)


def _put(state: StateDir, was: Record) -> None:
    """The logs go on in the new directory: they are of the machine, whatever it goes back to."""
    files, place = state.machine(was.id), _aside(state, was.id)
    with guard("write", files.root):
        files.root.mkdir(mode=0o700, exist_ok=True)
        replace(files.before, json.dumps(dump(was)).encode(), durable=False)
        _signal(files, signal.SIGSTOP)
        files.root.rename(place.root)
        files.root.mkdir(mode=0o700)
        for log_file in (*place.root.glob("*.log"), *place.root.glob("*.log.1")):
            os.link(log_file, files.root / log_file.name)


async def _take_back(state: StateDir, machine_id: str) -> None:
    """The directory, with what lives in it."""
    files, place = state.machine(machine_id), _aside(state, machine_id)
    if place.root.exists():
        await bringup.clear(files)
        place.root.rename(files.root)
    _signal(files, signal.SIGCONT)


def _signal(files: MachineDir, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, KeyError):
        os.kill(vm.pids(files)["qemu"], number)


async def _set(ops: Operations, was: Record) -> None:
    """Its record is what it was. Where that cannot be written down, the next daemon takes it from the directory."""
    try:
        await ops.db.update(was)
        ops.state.machine(was.id).before.unlink(missing_ok=True)
    except NoSpaceError as error:
        log.error("%s is %s again, which is not on disk: %s", was.name, was.state, error.message)
