"""How much of its memory a guest may use now: a balloon inside it, which QEMU asks to grow, and which the guest lets shrink before it kills a program."""

from __future__ import annotations

import asyncio
import logging

from ramet.errors import RametError
from ramet.vm.machine import Vm

log = logging.getLogger("ramet")

DEADLINE = 30.0  # seconds for a guest to get there
_STALLED = 5.0  # seconds without a step after which it will not: QEMU tells of steps once a second


async def look(machine: Vm) -> int:
    """The bytes of memory that the guest has; noted in `machine.granted`, as every later change is."""
    found = int((await machine.monitor("query-balloon"))["actual"])
    machine.granted = found
    return found


async def resize(machine: Vm, size: int, *, stands: bool = False) -> int:
    """Have the guest give memory up, or take it back, until it has `size` bytes; how many it has then.

    A guest that needs more keeps what it needs, and is not asked any further: it would else look for free pages all the time. stands: its cpus do not run,
    so that it gets there only later, and is not waited for.
    """
    machine.balloon_target = size
    await machine.monitor("balloon", value=size)
    try:
        async with asyncio.timeout(0 if stands else DEADLINE):
            while True:
                machine.balloon_changed.clear()
                if await look(machine) == size:
                    return size
                async with asyncio.timeout(_STALLED):
                    await machine.balloon_changed.wait()
    except TimeoutError:
        reached = await look(machine)
    if reached > size and not stands and machine.balloon_target == size:  # else another has asked for something else
        await machine.monitor("balloon", value=reached)
    return reached


async def apply(name: str, machine: Vm, size: int) -> None:
    """After a start: have the guest keep to its limit. It is usable before, and without."""
    try:
        if await look(machine) != size:
            await resize(machine, size)
    except RametError as error:
        log.warning("the memory of %s could not be limited: %s", name, error.message)
