"""What a machine no longer needs goes back to the host: what it freed, and what it has not used for a while."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from ramet import reclaim
from ramet.engine import Engine
from ramet.guest import Guest
from ramet.kernels import KernelKind
from ramet.model import Reclaim
from tests.fixtures import Artifacts, Box, States, opened
from tests.machine import witness
from tests.machine.witness import DEADLINE, check, forked

MIB = 1 << 20
MUCH = 300 * MIB
LONG = 2 * DEADLINE


def guest_of(box: Box) -> Guest:
    (found,) = (each for each in box.engine._ops.entries.values() if each.record.name == box.name)
    assert found.vm
    return found.vm.guest


async def private(box: Box) -> int:
    """Bytes of the guest's that nobody else has: what QEMU itself takes grows while code is translated, and is left out."""
    usage = (await box.get()).usage
    assert usage
    return usage.private - usage.overhead


async def falls(box: Box, limit: int) -> None:
    """Wait until the host holds no more than so much for it."""
    async with asyncio.timeout(LONG):
        while await private(box) > limit:  # noqa: ASYNC110  (the guest's kernel reports when it likes)
            await asyncio.sleep(0.5)


async def frees(box: Box) -> None:
    """What a guest writes to its tmpfs and removes is the host's again."""
    await box.sh(f"dd if=/dev/urandom of=/dev/shm/big bs=1M count={MUCH // MIB} 2>/dev/null", timeout=LONG)
    full = await private(box)
    await box.sh("rm /dev/shm/big")
    await falls(box, full - MUCH * 95 // 100)


async def reads(box: Box) -> None:
    """What a guest read once, and then does not use, is the host's again."""
    await box.sh("cat /srv/big > /dev/null", timeout=LONG)
    assert (await guest_of(box).metrics())["mem_reclaimable"] >= MUCH
    full = await private(box)
    await box.engine.update(box.name, reclaim=Reclaim.EAGER)  # only now, so that none of it has gone before it was seen
    await falls(box, full - MUCH * 8 // 10)
    async with asyncio.timeout(LONG):
        while (await guest_of(box).metrics())["mem_reclaimable"] >= MUCH // 5:  # noqa: ASYNC110
            await asyncio.sleep(0.5)


WRITE = f"dd if=/dev/urandom of=/srv/big bs=1M count={MUCH // MIB} 2>/dev/null; sync; echo 3 > /proc/sys/vm/drop_caches"


@pytest_asyncio.fixture(scope="module", loop_scope="session", autouse=True)
async def served(engine: Engine, artifacts: Artifacts) -> None:
    """The layers are served before the first test, which is not to be blamed for the servers."""
    async with witness.cleared(engine):
        await engine.create(artifacts.spec("seed"))
        await forked(Box(engine, "seed"))


async def test_what_is_freed_returns_from_every_kind_of_machine(engine: Engine, artifacts: Artifacts) -> None:
    """Cold-booted, a fork, a fork of a fork, and one that was hibernated; nobody has told their guests anything."""
    async with witness.cleared(engine):
        await engine.create(artifacts.spec("giver", memory=1 << 30, reclaim=Reclaim.OFF))
        box = Box(engine, "giver")
        await frees(box)
        (child,) = await forked(box)
        await frees(child)
        (grandchild,) = await forked(child)
        await frees(grandchild)
        await engine.hibernate(child.name)
        await engine.resume(child.name)
        await frees(child)


@pytest_asyncio.fixture(loop_scope="session")
async def with_debian(states: States, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Engine]:
    """An engine whose machines have Debian's kernel."""
    monkeypatch.setenv("RAMET_KERNEL", KernelKind.DEBIAN)
    async with opened(states.new()) as engine:
        yield engine


async def test_a_file_that_was_read_once_returns(engine: Engine, artifacts: Artifacts) -> None:
    async with witness.cleared(engine):
        await engine.create(artifacts.spec("reader", memory=1 << 30, disk=1 << 30, reclaim=Reclaim.OFF))
        box = Box(engine, "reader")
        await box.sh(WRITE, timeout=LONG)
        (child,) = await forked(box)
        await asyncio.gather(*map(_by_itself, (box, child)))  # at once, for it takes a while


async def _by_itself(box: Box) -> None:
    await reads(box)
    async with asyncio.timeout(LONG):
        while (await guest_of(box).metrics())["damon_reclaimed"] < MUCH * 8 // 10:  # noqa: ASYNC110  (told once an interval)
            await asyncio.sleep(0.5)


async def test_a_file_that_was_read_once_returns_without_damon(with_debian: Engine, artifacts: Artifacts) -> None:
    await with_debian.create(artifacts.spec("reader", memory=1 << 30, disk=1 << 30, reclaim=Reclaim.OFF))
    box = Box(with_debian, "reader")
    assert not await guest_of(box).tune(reclaim.damon(Reclaim.EAGER))
    assert "damon_reclaimed" not in await guest_of(box).metrics()
    await box.sh(WRITE, timeout=LONG)
    await reads(box)


async def test_the_agent_stays_resident(engine: Engine, artifacts: Artifacts) -> None:
    """All that could be taken of a guest is taken, and the agent reads nothing from a disk to go on: neither its program nor its memory."""
    async with witness.cleared(engine):
        await engine.create(artifacts.spec("resident", reclaim=Reclaim.OFF))
        box = Box(engine, "resident")
        faults = "cut -d' ' -f12 /proc/1/stat"  # major faults, man 5 proc
        status = "grep VmRSS /proc/1/status | tr -dc 0-9"
        await guest_of(box).reclaim(64 * MIB)
        before = [int(await box.text(each)) for each in (faults, status)]
        await guest_of(box).reclaim(1 << 30)
        await guest_of(box).slim(LONG)
        assert (await guest_of(box).metrics())["mem_reclaimable"] < 4 * MIB
        after = [int(await box.text(each)) for each in (faults, status)]
        assert after[0] == before[0]
        assert after[1] >= before[1]
        assert "Locked:" in await box.text("grep -E 'Locked: +[1-9]' /proc/1/smaps | head -1")


async def told(box: Box, enabled: str, policy: Reclaim) -> str:
    """Wait until a guest's kernel has a policy; the thread that carries it out."""
    wanted = str(reclaim.damon(policy).get("min_age", ""))
    async with asyncio.timeout(LONG):
        while True:
            found, thread, age = (await box.text("cd /sys/module/damon_reclaim/parameters; cat enabled kdamond_pid min_age")).split()
            if found == enabled and wanted in ("", age):
                return thread
            await asyncio.sleep(0.2)


async def test_a_policy_is_told_and_changed_and_inherited(engine: Engine, artifacts: Artifacts) -> None:
    async with witness.cleared(engine):
        await engine.create(artifacts.spec("told", reclaim=Reclaim.GENTLE))
        box = Box(engine, "told")
        first = await told(box, "Y", Reclaim.GENTLE)
        await engine.update("told", reclaim=Reclaim.EAGER)
        second = await told(box, "Y", Reclaim.EAGER)
        assert first != second
        assert await guest_of(box).tune(reclaim.damon(Reclaim.EAGER))  # as a daemon says that has just started
        (child,) = await forked(box)
        for each in (box, child):
            assert await told(each, "Y", Reclaim.EAGER) == second
        await engine.update("told", reclaim=Reclaim.OFF)
        assert await told(box, "N", Reclaim.OFF) == "-1"
        assert await told(child, "Y", Reclaim.EAGER) == second


async def test_what_one_gives_back_changes_no_other(engine: Engine, artifacts: Artifacts) -> None:
    """One of a family gives back all that it can, again and again, while the others, that stand on the same memory, check theirs."""
    async with witness.cleared(engine):
        await engine.create(artifacts.spec("family", reclaim=Reclaim.OFF))
        stem = Box(engine, "family")
        await witness.install(stem)
        await witness.filling(stem)
        giver, other = await forked(stem, 2)

        async def give() -> None:
            for _ in range(4):
                await guest_of(giver).slim(LONG)
                await giver.sh("cat /srv/files/*/* > /dev/null 2>&1 || true", timeout=LONG)
                await guest_of(giver).reclaim(256 * MIB, LONG)

        giving = asyncio.ensure_future(give())
        while not giving.done():
            await check(other)
            await check(stem)
        await giving
        for box in (giver, other, stem):
            await check(box)
