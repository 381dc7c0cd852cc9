"""What the guest deletes, or writes as zeros, takes no room in the host's file: st_blocks is looked at, which is what `du` shows."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest_asyncio

from ramet.vm import disk
from tests.fixtures import Artifacts, Box, States
from tests.machine.aftermath import swept

MIB = 1 << 20
SIZE = 192  # MiB of the file
METADATA = 4 * MIB  # what an overlay may grow by for a file that is gone: its tables, 64 KiB for each 512 MiB, and ext4's own bookkeeping
DEADLINE = 180.0  # seconds; on an idle host it is done in one: ext4 discards what was deleted when its journal commits, every five seconds
WRITE = f"dd if=/dev/zero bs=1M count={SIZE} 2>/dev/null | tr '\\0' x > /srv/big; sync"


def taken(box: Box) -> int:
    """Bytes on the host of the machine's own overlay."""
    return disk.allocated(box.engine._ops.state.machine(box.engine._entry(box.name).record.id))


async def returned(box: Box, most: int) -> None:
    """Wait until the overlay takes at most so many bytes."""
    async with asyncio.timeout(DEADLINE):
        while taken(box) > most:  # noqa: ASYNC110  (a file that shrinks tells nobody)
            await asyncio.sleep(0.1)


@pytest_asyncio.fixture(loop_scope="session")
async def roomy(states: States, artifacts: Artifacts) -> AsyncIterator[Box]:
    """With an engine of its own, for a fork starts the image file system."""
    async with swept(states.new()) as engine:
        await engine.create(artifacts.spec("roomy", disk=1 << 30))
        yield Box(engine, "roomy")


async def test_a_deleted_file_s_room_is_the_host_s_again(roomy: Box) -> None:
    before = taken(roomy)
    await roomy.sh(WRITE, timeout=600)
    full = taken(roomy)
    assert full - before >= SIZE * MIB
    await roomy.sh("rm /srv/big; sync")
    await returned(roomy, full - SIZE * MIB * 95 // 100)


async def test_a_file_of_the_parent_s_costs_a_child_nothing_to_delete(roomy: Box) -> None:
    engine = roomy.engine
    await roomy.sh(WRITE, timeout=600)
    (outcome,) = await engine.fork(roomy.name, names=("pruner",))
    assert outcome.machine, outcome
    child = Box(engine, "pruner")
    before = taken(child)
    await child.sh("rm /srv/big; sync; sleep 6; sync")  # ext4 discards it when its journal commits, 5 s after the last
    assert int(await child.text("df -m / | awk 'NR == 2 {print $3}'")) < SIZE
    assert taken(child) - before <= METADATA
    # What it writes next is its own, and goes back as in any machine.
    await child.sh(WRITE, timeout=600)
    full = taken(child)
    assert full >= SIZE * MIB
    await child.sh("rm /srv/big; sync")
    await returned(child, full - SIZE * MIB * 95 // 100)
    assert int(await roomy.text("tr -d x < /srv/big | wc -c")) == 0
    assert int(await roomy.text("wc -c < /srv/big")) == SIZE * MIB


async def test_zeros_are_not_stored(roomy: Box) -> None:
    await roomy.sh("sync")
    before = taken(roomy)
    await roomy.sh(f"dd if=/dev/zero of=/srv/zeros bs=1M count={SIZE} conv=fsync", timeout=600)
    assert taken(roomy) - before <= METADATA
    assert await roomy.text("du -m /srv/zeros | cut -f1") == str(SIZE)
