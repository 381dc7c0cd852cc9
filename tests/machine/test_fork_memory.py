"""What machines that were copied have in memory and on disk: exactly what there was at one instant, and then only what they wrote themselves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest_asyncio

from ramet.engine import Engine
from tests.fixtures import Artifacts, Box
from tests.machine import witness
from tests.machine.witness import DEADLINE, FILL, ask, check, check_disk, forked

MIB = 1 << 20


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def stem(engine: Engine, artifacts: Artifacts) -> AsyncIterator[Box]:
    """A machine whose memory and files are being written, and the layers served before the first test, which is not to be blamed for the servers."""
    await engine.create(artifacts.spec("writer"))
    box = Box(engine, "writer")
    await witness.install(box)
    await witness.filling(box)
    async with witness.cleared(engine):
        await forked(box)
    yield box
    await engine.delete("writer")


@pytest_asyncio.fixture(autouse=True, loop_scope="session")
async def cleared(engine: Engine, stem: Box) -> AsyncIterator[None]:
    async with witness.cleared(engine):
        yield


async def written(box: Box, rounds: int) -> None:
    """Wait until every page and file has been written again so many times."""
    now = int((await ask(box, FILL, "stamp")).split()[2])
    until = now + rounds * max(witness.PAGES // 64, witness.FILES)
    async with asyncio.timeout(DEADLINE):
        while int((await ask(box, FILL, "stamp")).split()[2]) < until:
            pass


async def test_forks_are_taken_while_a_program_writes(stem: Box) -> None:
    """Three times, with three children and a child of a child: all that was in memory and on disk belongs to one instant, in each of them."""
    for _ in range(3):
        children = await forked(stem)
        await asyncio.gather(*(check(box) for box in (stem, *children)))
        children += await forked(children[0])
        await asyncio.gather(*(check(box) for box in (stem, *children)))
    family = [stem, *(Box(stem.engine, each.name) for each in await stem.engine.list() if each.name.startswith("writer-"))]
    assert len(family) == 7
    for box in family:
        await check_disk(box)


async def test_no_write_shows_in_another_machine(stem: Box) -> None:
    engine = stem.engine
    await stem.sh("echo nobody > /srv/who; echo nobody > /dev/shm/who")
    await engine.snapshot("writer", "base", test=False)
    before = (await check(stem)).split()[2]
    children = await forked(stem, 3)
    for number, box in enumerate((stem, *children), 1):
        assert int((await ask(box, FILL, f"salt {number}")).split()[2]) >> 32 == number
        await box.sh(f"echo {box.name} > /srv/who; echo {box.name} > /dev/shm/who; sync")
    for box in (stem, *children):
        await written(box, 1)
    for number, box in enumerate((stem, *children), 1):
        assert int((await check(box)).split()[2]) >> 32 == number
        await check_disk(box)
        assert await box.text("cat /srv/who /dev/shm/who") == f"{box.name}\n{box.name}"
    await engine.create_from("writer@base", "unwritten")
    late = Box(engine, "unwritten")
    assert await late.text("cat /srv/who /dev/shm/who") == "nobody\nnobody"
    stamp = int((await check(late)).split()[2])
    assert stamp < 1 << 32
    assert int(before) <= 1 << 32
    await check_disk(late)


async def test_memory_that_one_frees_changes_no_other(stem: Box) -> None:
    """Free pages are given to the host while others, that stand on the same memory, check theirs."""
    children = await forked(stem, 3)
    churn = """
    for round in 1 2 3; do
        dd if=/dev/urandom of=/dev/shm/big bs=1M count=40 2>/dev/null || exit 1
        sum=$(md5sum < /dev/shm/big)
        dd if=/dev/zero of=/dev/null bs=40M count=1 2>/dev/null || exit 2
        test "$sum" = "$(md5sum < /dev/shm/big)" || exit 3
        rm /dev/shm/big
    done
    """
    busy = [asyncio.ensure_future(box.sh(churn, timeout=DEADLINE)) for box in children[:2]]
    checks = 0
    while not all(each.done() for each in busy) or checks < 4:
        await check(children[2])
        await check(stem)
        checks += 1
    await asyncio.gather(*busy)
    for box in (stem, *children):
        await check_disk(box)
    (grandchild,) = await forked(children[0])  # what was freed reads as zeros, and was saved as such
    await check_disk(grandchild)


async def private(box: Box) -> int:
    usage = (await box.get()).usage
    assert usage
    return usage.private - usage.overhead  # QEMU's own grows while code is translated


async def test_memory_that_a_fork_frees_returns_to_the_host(stem: Box) -> None:
    (child,) = await forked(stem)
    await ask(child, FILL, "rest")
    await check(child)
    small = await private(child)
    await child.sh("dd if=/dev/urandom of=/dev/shm/big bs=1M count=80 2>/dev/null", timeout=DEADLINE)
    assert await private(child) > small + 70 * MIB
    await child.sh("rm /dev/shm/big")
    async with asyncio.timeout(DEADLINE):
        while await private(child) > small + 25 * MIB:  # noqa: ASYNC110  (the guest's kernel reports when it likes)
            await asyncio.sleep(0.2)
    await check(child)
    await check(stem)
