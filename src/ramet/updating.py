"""What can be changed of a machine that is there: how much of its memory it may use, and how hard it gives back what it does not."""

from __future__ import annotations

import dataclasses

from ramet import capacity
from ramet.capacity import Claim
from ramet.entry import Entry
from ramet.lifecycle import Operation
from ramet.model import Reclaim, State
from ramet.operations import Operations
from ramet.vm import balloon


async def update(ops: Operations, entry: Entry, *, memory: int | None, reclaim: Reclaim | None) -> None:
    """Write it down, then do it where the machine lives; else its next start does. NoCapacityError where it wants more than the host has for it.

    reclaim: the caretaker tells the guest, within seconds.
    """
    limit = None if memory is None else capacity.limit(entry.record.spec, memory)

    async def work(held: Entry) -> None:
        if reclaim is not None:
            await ops.set(held, spec=dataclasses.replace(held.record.spec, reclaim=reclaim))
        if limit is not None:
            await _limit(ops, held, limit)

    await ops.perform(entry, Operation.UPDATE, work)


async def _limit(ops: Operations, entry: Entry, limit: int) -> None:
    before, size = entry.record.memory_limit, limit or entry.record.spec.memory
    has = entry.claim()
    if has and size + capacity.OVERHEAD > has.memory:
        ops.admit(entry, Claim(memory=size + capacity.OVERHEAD))
    ops.note(entry, memory_limit=limit)  # at once: others that ask for memory must see it
    try:
        await ops.set(entry, memory_limit=limit)
    except BaseException:
        ops.note(entry, memory_limit=before)
        raise
    if entry.vm:
        ops.doing(entry, "resizing its memory")
        await balloon.resize(entry.vm, size, stands=entry.record.state is State.PAUSED)
