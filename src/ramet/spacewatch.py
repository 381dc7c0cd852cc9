"""Machines that wait for room on the host's disk. Where it is full, QEMU stops a machine's cpus rather than tell its guest, which would go on without what it
wrote: so nothing is lost. Such a machine counts as paused, with the reason, and goes on by itself when there is room."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import Awaitable, Callable

from ramet.errors import MachineFailedError, NoSpaceError, RametError
from ramet.model import State
from ramet.operations import Entry, Operations, log
from ramet.vm.machine import FULL, Vm

_REASON = f"{FULL}: it stands still, and goes on when there is room"
# Bytes that must be free before machines go on, or so small a part of the disk where that is less: little would be used up at once.
_ENOUGH = 64 << 20
_PART = 16
_LOOK = 2.0  # seconds between two looks at the disk: it tells nobody


class Spacewatch:
    """One host's. resume: lets a paused machine go on."""

    def __init__(self, ops: Operations, resume: Callable[[Entry], Awaitable[None]]) -> None:
        self._ops = ops
        self._resume = resume
        self._looking: asyncio.Task[None] | None = None
        ops.on_stuck = self._stuck

    def begin(self) -> None:
        """Have those that wait go on when there is room; after a restart of the daemon, those that waited before."""
        if self._looking is None or self._looking.done():
            self._looking = self._ops.spawn(self._look())

    def require_room(self, entry: Entry) -> None:
        """NoSpaceError where a machine stands still because there is none, and there still is none."""
        if _waits(entry) and not self._has_room():
            raise NoSpaceError(f"{entry.record.name} cannot go on: {FULL}")

    def _has_room(self) -> bool:
        disk = shutil.disk_usage(self._ops.state.root)
        return disk.free >= min(_ENOUGH, disk.total // _PART)

    def _stuck(self, entry: Entry, machine: Vm) -> None:
        """Called when QEMU has stopped a machine. What is being done to it fails, for it would wait; what runs in it only waits."""
        if machine.still:  # that is known
            self.begin()
            return
        machine.still = True
        if entry.operation:
            machine.lose(_REASON)
        else:
            with contextlib.suppress(MachineFailedError):
                machine.guest.hold()
        self._ops.spawn(self._hold(entry, machine))

    async def _hold(self, entry: Entry, machine: Vm) -> None:
        """Have it paused, with the reason, when nothing is being done to it any more."""
        await self._ops.settle(entry)
        if entry.vm is not machine or entry.record.state not in (State.RUNNING, State.PAUSED):
            return
        if await machine.running():  # a save that failed has let it go on, and it did find room
            await machine.unpause()
            return
        if entry.operation:
            self._ops.spawn(self._hold(entry, machine))
            return
        stand_still(self._ops, entry)
        self.begin()

    async def _look(self) -> None:
        """As long as anybody waits."""
        while waiting := [each for each in self._ops.entries.values() if _waits(each)]:
            for entry in waiting if self._has_room() else ():
                if entry.operation is None:
                    try:
                        await self._resume(entry)
                    except RametError as error:  # the next look may be luckier
                        log.info("%s: %s", entry.record.name, error.message)
                    else:
                        log.info("%s goes on: there is room on the disk again", entry.record.name)
            await asyncio.sleep(_LOOK)


def stand_still(ops: Operations, entry: Entry) -> None:
    """It counts as paused, with the reason. Not on the disk, which is full: a daemon that starts anew finds it out by looking."""
    ops.note(entry, state=State.PAUSED, reason=_REASON)
    log.warning("%s: %s", entry.record.name, _REASON)


def _waits(entry: Entry) -> bool:
    return bool(entry.vm) and entry.record.state is State.PAUSED and entry.record.reason.startswith(FULL)
