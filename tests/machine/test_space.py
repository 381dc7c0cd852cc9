"""A host whose disk is full: creating fails with that reason, and leaves nothing."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from ramet import service
from ramet.engine import Engine
from ramet.errors import DaemonError, NoSpaceError, StateError
from ramet.model import Event, Machine, State
from ramet.paths import StateDir
from tests.fixtures import Artifacts, Box, States, opened

DEADLINE = 120.0
LITTLE = 512 << 10  # bytes: enough for a daemon, too little for guests
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")


@pytest.fixture
def small(states: States, tmp_path: Path) -> Iterator[StateDir]:
    """A state directory on a file system of 16 MiB."""
    root = tmp_path / "small"
    root.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m,mode=700", "ramet-test", str(root)], check=True)
    yield states.new(root)
    states.scratch.states.pop()
    subprocess.run(["umount", str(root)], check=True)


def fill(state: StateDir, left: int) -> Path:
    """Take all of the space but `left` bytes."""
    ballast = state.root / "ballast"
    free = os.statvfs(state.root)
    with open(ballast, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(4096, free.f_bavail * free.f_frsize - left))
    return ballast


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


async def stuck(engine: Engine, happening: AsyncIterator[Event], state: State = State.PAUSED) -> Machine:
    """When it stands still for want of room, or whatever else it is to be."""
    async with asyncio.timeout(DEADLINE):
        while (await anext(happening)).state is not state:
            pass
    return await engine.get("fat")


@needs_root
async def test_no_space_while_a_machine_runs(small: StateDir, artifacts: Artifacts) -> None:
    """The host is full while the guest writes: it stands still, with the reason, and goes on when there is room. Nothing is lost, not even the command."""
    async with opened(small) as engine:
        await engine.create(artifacts.spec("fat"))
        box = Box(engine, "fat")
        await box.sh("echo kept > /kept; sync")
        ballast, happening = fill(small, 1 << 20), engine.events("fat")
        writing = asyncio.create_task(box.text(WRITE, timeout=DEADLINE))
        found = await stuck(engine, happening)
        assert found.reason.startswith("the host's disk is full")
        with pytest.raises(NoSpaceError, match="cannot go on"):
            await engine.resume("fat")
        with pytest.raises(StateError):
            await box.sh("true")
        assert not writing.done()
        ballast.unlink()
        found = await stuck(engine, happening, State.RUNNING)
        assert found.reason == ""
        assert await writing == "written"
        assert await box.text(VERIFY) == "kept"


@needs_root
async def test_a_machine_without_space_outlives_its_daemon(small: StateDir, artifacts: Artifacts) -> None:
    """Its state could not be written down: the next daemon finds it out by looking."""
    async with contextlib.AsyncExitStack() as stack:
        async with Engine.open(small) as engine:
            stack.push_async_callback(emptied, small)
            await engine.create(artifacts.spec("fat"))
            await Box(engine, "fat").sh("echo kept > /kept; sync")
            await Box(engine, "fat").sh(WRITING)
            ballast, happening = fill(small, 0), engine.events("fat")
            await stuck(engine, happening)
        os.truncate(ballast, ballast.stat().st_size - LITTLE)
        for _ in range(2):
            async with Engine.open(small) as engine:
                found = await engine.get("fat")
                assert (found.state, found.reason[:23]) == (State.PAUSED, "the host's disk is full")
                free = os.statvfs(small.root)
                assert free.f_bavail * free.f_frsize > LITTLE / 2, "that is not for the guest"
        async with Engine.open(small) as engine:
            happening = engine.events("fat")
            ballast.unlink()
            await stuck(engine, happening, State.RUNNING)
            async with asyncio.timeout(DEADLINE):
                while not await Box(engine, "fat").text("cat /sum 2>/dev/null || true"):  # noqa: ASYNC110
                    await asyncio.sleep(0.1)
            assert await Box(engine, "fat").text(VERIFY) == "kept"


async def emptied(state: StateDir) -> None:
    async with opened(state):
        pass


@needs_root
@pytest.mark.parametrize("verb", ["stop", "stop --force", "delete", "pause"])
async def test_what_is_done_to_a_machine_without_space(small: StateDir, artifacts: Artifacts, verb: str) -> None:
    async with opened(small) as engine:
        await engine.create(artifacts.spec("fat"))
        await Box(engine, "fat").sh("echo kept > /kept; sync")
        await Box(engine, "fat").sh(WRITING)
        ballast, happening = fill(small, 0), engine.events("fat")
        await stuck(engine, happening)
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
