"""A host whose disk is full: creating fails with that reason, and leaves nothing."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from ramet import service
from ramet.engine import Engine
from ramet.errors import DaemonError, NoSpaceError, StateError
from ramet.model import State
from ramet.paths import StateDir
from tests.fixtures import Artifacts, Box, States, opened
from tests.machine.aftermath import swept
from tests.machine.events import listening
from tests.machine.fullness import fill, free, mounted

DEADLINE = 120.0
LITTLE = 512 << 10  # bytes: enough for a daemon, too little for guests
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")


@pytest.fixture
def small(states: States, tmp_path: Path) -> Iterator[StateDir]:
    """A state directory on a file system of 16 MiB."""
    with mounted(states, tmp_path / "small", 16 << 20) as made:
        yield made


@pytest_asyncio.fixture(loop_scope="session")
async def outlived(small: StateDir) -> AsyncIterator[StateDir]:
    """The same, for machines that several daemons have: none is left at its end."""
    yield small
    async with swept(small):
        pass


@needs_root
@pytest.mark.parametrize("left", [0, 64 << 10, 160 << 10])
async def test_no_space_while_creating(small: StateDir, artifacts: Artifacts, left: int) -> None:
    async with opened(small) as engine:
        ballast = fill(small, left)
        with pytest.raises(NoSpaceError, match="no space left") as caught:
            await engine.create(artifacts.spec("fat"))
        assert caught.value.hint
        assert [machine.name for machine in await engine.list()] == []
        assert list(small.machines.iterdir()) == []
        ballast.unlink()
        assert (await engine.create(artifacts.spec("fat"))).state is State.RUNNING


WRITE = "dd if=/dev/urandom of=/big bs=1M count=8 2>/dev/null; sync; md5sum < /big > /sum; sync; echo written"
WRITING = f"setsid sh -c 'sleep 2; {WRITE}' > /dev/null 2>&1 < /dev/null &"
VERIFY = "echo 3 > /proc/sys/vm/drop_caches; md5sum < /big | cmp - /sum && cat /kept"


@needs_root
async def test_no_space_while_a_machine_runs(small: StateDir, artifacts: Artifacts) -> None:
    """The host is full while the guest writes: it stands still, with the reason, and goes on when there is room. Nothing is lost, not even the command."""
    async with opened(small) as engine, listening(engine) as ear:
        await engine.create(artifacts.spec("fat"))
        box = Box(engine, "fat")
        await box.sh("echo kept > /kept; sync")
        ballast = fill(small, 1 << 20)
        writing = asyncio.create_task(box.text(WRITE, timeout=DEADLINE))
        await ear.until_state("fat", State.PAUSED)
        assert (await engine.get("fat")).reason.startswith("the host's disk is full")
        with pytest.raises(NoSpaceError, match="cannot go on"):
            await engine.resume("fat")
        with pytest.raises(StateError):
            await box.sh("true")
        assert not writing.done()
        ballast.unlink()
        assert await writing == "written"
        await ear.until(lambda _: ear.states("fat")[-1] is State.RUNNING)
        found = await engine.get("fat")
        assert (found.state, found.reason) == (State.RUNNING, "")
        assert await box.text(VERIFY) == "kept"


@needs_root
async def test_a_machine_without_space_outlives_its_daemon(outlived: StateDir, artifacts: Artifacts) -> None:
    """Its state could not be written down: the next daemon finds it out by looking."""
    async with Engine.open(outlived) as engine, listening(engine) as ear:
        await engine.create(artifacts.spec("fat"))
        await Box(engine, "fat").sh("echo kept > /kept; sync")
        await Box(engine, "fat").sh(WRITING)
        ballast = fill(outlived, 0)
        await ear.until_state("fat", State.PAUSED)
    os.truncate(ballast, ballast.stat().st_size - LITTLE)
    for _ in range(2):
        async with Engine.open(outlived) as engine:
            found = await engine.get("fat")
            assert (found.state, found.reason[:23]) == (State.PAUSED, "the host's disk is full")
            assert free(outlived) > LITTLE / 2, "that is not for the guest"
    async with Engine.open(outlived) as engine, listening(engine) as ear:
        ballast.unlink()
        await ear.until_state("fat", State.RUNNING)
        async with asyncio.timeout(DEADLINE):
            while not await Box(engine, "fat").text("cat /sum 2>/dev/null || true"):  # noqa: ASYNC110
                await asyncio.sleep(0.1)
        assert await Box(engine, "fat").text(VERIFY) == "kept"


@needs_root
@pytest.mark.parametrize("verb", ["stop", "stop --force", "delete", "pause"])
async def test_what_is_done_to_a_machine_without_space(small: StateDir, artifacts: Artifacts, verb: str) -> None:
    async with opened(small) as engine, listening(engine) as ear:
        await engine.create(artifacts.spec("fat"))
        await Box(engine, "fat").sh("echo kept > /kept; sync")
        await Box(engine, "fat").sh(WRITING)
        ballast = fill(small, 0)
        await ear.until_state("fat", State.PAUSED)
        async with asyncio.timeout(DEADLINE):
            if verb == "delete":
                await engine.delete("fat")
                assert await engine.list() == []
            elif verb == "pause":
                with pytest.raises(StateError):
                    await engine.pause("fat")
            else:
                stopped = await engine.stop("fat", force=verb != "stop")
                assert stopped.state is State.STOPPED
                assert verb != "stop" or "the host's disk is full" in stopped.reason
                ballast.unlink()
                await engine.start("fat")
                assert await Box(engine, "fat").text("cat /kept") == "kept"


@needs_root
async def test_a_daemon_starts_on_a_full_disk(small: StateDir) -> None:
    """For it is needed to make room."""
    for _ in range(2):
        await service.ensure_running(small)
        await service.stop(small)
        assert small.reserve.stat().st_blocks
        ballast = fill(small, 0)
        await service.ensure_running(small)
        assert not small.reserve.exists()
        await service.stop(small)
        ballast.unlink()
    fill(small, 0)
    with pytest.raises(DaemonError) as caught:
        await service.ensure_running(small)
    assert "no space left" in caught.value.details["log"]
    assert "Traceback" not in caught.value.details["log"]


async def test_an_engine_that_finds_no_space_says_so(small: StateDir) -> None:
    fill(small, 0)
    with pytest.raises(NoSpaceError):
        async with Engine.open(small):
            pass
