"""Chunks that a registry has too are given up under machines that run, sleep and start, and nobody reads anything else than before."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from ramet.engine import Engine
from ramet.model import State
from ramet.paths import StateDir
from ramet.store import remote
from tests.fixtures import Artifacts, Box, States, opened
from tests.host.conftest import Registry, registries
from tests.machine.witness import saved

__all__ = ["registries"]
DEADLINE = 300.0
NOISE = "dd if=/dev/urandom of=/srv/noise bs=1M count=24"


@pytest_asyncio.fixture(loop_scope="session")
async def elsewhere(states: States, tmp_path: Path) -> AsyncIterator[Engine]:
    """Another host: one that has no images, and has never seen a machine."""
    state = StateDir(root=tmp_path / "elsewhere")
    state.root.mkdir()
    shutil.copy(states.artifacts.store.kvm, state.kvm)
    state.create()
    states.scratch.add(state)
    async with opened(state) as engine:
        yield engine


def absent(engine: Engine) -> int:
    files = engine._ops.state.store
    return sum(remote.absent(files, path.name.replace("-", ":", 1)) for path in files.remotes.iterdir())


async def settled(engine: Engine) -> None:
    """Returns when nothing is being compressed or tested: until then nothing is collected."""
    async with asyncio.timeout(DEADLINE):
        while True:
            found = await engine.gc(dry_run=True)
            if not any("is being saved" in each for each in found.postponed):
                return
            await asyncio.sleep(0.1)


@pytest_asyncio.fixture(loop_scope="session")
async def pulled(artifacts: Artifacts, states: States, elsewhere: Engine, registries: Callable[..., Registry]) -> str:
    """A template that `elsewhere` has all of: a machine that knows the digest of 24 MiB of its disk."""
    name = f"{registries().address}/acme/shop:1"
    async with opened(states.new()) as engine:
        await engine.create(artifacts.spec("shop"))
        await Box(engine, "shop").sh(f"mkdir -p /srv; {NOISE}; echo in memory > /run/word; sync; sha256sum /srv/noise > /run/sum")
        await engine.snapshot("shop", "warm")
        await saved(engine, "shop@warm")
        await engine.push("shop@warm", name)
    await elsewhere.pull(name)
    assert absent(elsewhere) == 0
    return name


async def right(engine: Engine, machine: str) -> None:
    """It has what it had when it was saved, in memory and on its disk."""
    box = Box(engine, machine)
    assert await box.text("cat /run/word") == "in memory"
    await box.sh("cd / && echo 3 > /proc/sys/vm/drop_caches; sha256sum -c /run/sum")


async def test_chunks_are_given_up_and_come_back(elsewhere: Engine, pulled: str) -> None:
    # What a machine that runs needs stays.
    await elsewhere.create_from(pulled, "twin")
    kept = await elsewhere.gc(budget=0)
    assert kept.evicted == 0
    assert any("machines use the rest" in each for each in kept.postponed)
    assert absent(elsewhere) == 0
    await right(elsewhere, "twin")

    # One that sleeps needs nothing until it wakes up.
    await elsewhere.hibernate("twin")
    await settled(elsewhere)
    plan = await elsewhere.gc(budget=0, dry_run=True)
    assert absent(elsewhere) == 0
    given = await elsewhere.gc(budget=0)
    assert given.evicted == pytest.approx(plan.evicted, abs=1 << 20)
    assert given.evicted > 24 << 20
    assert absent(elsewhere) > 24 << 20
    assert await elsewhere.fsck() == []
    assert (await elsewhere.resume("twin")).state is State.RUNNING
    await right(elsewhere, "twin")
    assert await elsewhere.fsck() == []

    # Machines start while chunks are given up all the time.
    await elsewhere.delete("twin")
    async with given_up_meanwhile(elsewhere):
        for machine in ("first", "second"):
            await elsewhere.create_from(pulled, machine)
            await right(elsewhere, machine)
            await elsewhere.delete(machine)
    assert await elsewhere.fsck() == []

    await elsewhere.delete_snapshot(pulled)
    await elsewhere.gc()
    store = elsewhere._ops.state.store
    assert [*store.remotes.iterdir(), *store.blobs.iterdir(), *store.layers.iterdir()] == []


@contextlib.asynccontextmanager
async def given_up_meanwhile(engine: Engine) -> AsyncIterator[None]:
    done = asyncio.Event()
    rounds = 0

    async def collect() -> None:
        nonlocal rounds
        while not done.is_set():
            await engine.gc(budget=0)
            rounds += 1

    collecting = asyncio.create_task(collect())
    try:
        yield
    finally:
        done.set()
        await collecting
    assert rounds
