"""The queue of snapshots that are to be compressed, over real records. Snapshots that are broken need no work, and so no process is started."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from ramet.db import Database
from ramet.host import Host
from ramet.model import Snapshot, SnapshotState, Spec
from ramet.operations import Operations
from ramet.paths import StateDir
from ramet.sealing import Sealer

BROKEN = Snapshot(
    id="s1", name="web@one", machine="web", state=SnapshotState.BROKEN, reason="its test failed", created_at=1.0, memory=False, spec=Spec(name="web")
)  # fmt: skip


@pytest_asyncio.fixture
async def ops(tmp_path: Path) -> AsyncIterator[Operations]:
    state = StateDir(root=tmp_path)
    state.create()
    async with Database.open(state.database) as database:
        made = Operations(state, database, Host(state))
        await database.add_snapshot(BROKEN, None)
        made.snapshots[BROKEN.id] = BROKEN
        yield made


async def _worked(ops: Operations) -> None:
    """Returns when the worker has ended."""
    while ops._background:
        await asyncio.wait(ops._background, timeout=60)


async def test_what_is_broken_stays_broken(ops: Operations) -> None:
    done: list[Snapshot] = []
    Sealer(ops, done.append).add(BROKEN, test=False)
    await _worked(ops)
    assert ops.snapshots[BROKEN.id] == BROKEN
    assert not done


async def test_what_comes_while_layers_are_collected_has_its_turn(ops: Operations, monkeypatch: pytest.MonkeyPatch) -> None:
    sealer = Sealer(ops, lambda _: None)
    collect, collections = ops.collect, 0

    async def another() -> None:
        nonlocal collections
        collections += 1
        await collect()
        if collections == 1:
            sealer.add(BROKEN, test=False)

    monkeypatch.setattr(ops, "collect", another)
    sealer.add(BROKEN, test=False)
    await _worked(ops)
    assert collections == 2  # one after each: the second was taken from the queue
