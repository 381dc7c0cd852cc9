"""Before a machine is saved for long: its guest drops its caches, compacts its memory and trims its disk, and what it freed goes back to the host."""

from __future__ import annotations

import asyncio
import shutil

from ramet.entry import Entry
from ramet.errors import RametError
from ramet.operations import Operations, log
from ramet.vm import capture, memory
from ramet.vm.machine import Vm

_DEADLINE = 60.0  # seconds for the guest to write back what is dirty and to drop the rest
_GIVING = 15.0  # seconds for it to give back what it freed
# Its kernel tells of free pages two seconds after the first (mm/page_reporting.c), and again two seconds later where there are more. Nothing tells us.
_QUIET = 3.0
_PAUSE = 1.0  # seconds after which what a machine from a snapshot gives back in one go has come
_LOOK = 0.1
_STEP = 1 << 20  # bytes: less is no news
_DIRTY = 5  # a guest's kernel lets at most a fifth of the memory be dirty (vm.dirty_ratio)
_SPARE = 16 << 20


async def slim(ops: Operations, entry: Entry) -> int:
    """Have a machine that runs give back what it can do without; returns how many bytes fewer the host holds for it. One that is paused is left alone.

    A guest that cannot, or not in time, is left as it is, with a line in the log.
    """
    machine = entry.vm
    assert machine
    free = shutil.disk_usage(ops.state.machines).free
    if free < entry.record.spec.memory // _DIRTY + _SPARE:  # what it writes back might not fit, and a write that fails stops it
        log.warning("%s is not slimmed before its hibernation: little space left on the disk", entry.record.name)
        return 0
    before = now = 0
    try:
        if not await machine.running():
            return 0
        base = await capture.ram_address(machine)
        before = now = await _held(machine, base, entry.record.spec.memory)
        ops.doing(entry, "dropping caches")
        await machine.guest.slim(_DEADLINE)
        ops.doing(entry, "giving memory back")
        now = await _given_back(machine, base, entry.record.spec.memory, pause=_PAUSE if entry.record.memory_layer else 0.0)
    except (RametError, OSError) as error:
        log.warning("%s is not slimmed before its hibernation: %s", entry.record.name, error)
    return max(0, before - now)


async def _held(machine: Vm, base: int, size: int) -> int:
    """Bytes of the guest's memory that are its own."""
    spans = await asyncio.to_thread(memory.private, machine.pid, base, size)
    return sum(count for _, count in spans) * memory.PAGE


async def _given_back(machine: Vm, base: int, size: int, *, pause: float) -> int:
    """Wait until no more comes back; what is left. It can end as soon as the host holds no more than what is in use.

    pause: seconds without news that it takes besides, where the machine's own memory is only a part of that.
    """
    clock = asyncio.get_running_loop().time
    end = clock() + _GIVING
    used = size - int((await machine.guest.metrics()).get("mem_free", size))
    first = least = await _held(machine, base, size)
    since = clock()
    while clock() < min(end, since + _QUIET) and not machine.dead.done():
        await asyncio.sleep(_LOOK)
        now = await _held(machine, base, size)
        if now < least - _STEP:
            least, since = now, clock()
        if least < first and least < used + _STEP and clock() >= since + pause:  # a fork's own may be less from the begin on
            break
    return least
