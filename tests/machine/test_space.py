"""A host whose disk is full: creating fails with that reason, and leaves nothing."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ramet.engine import Engine
from ramet.errors import NoSpaceError, OutcomeUnknownError
from ramet.model import State
from ramet.paths import StateDir
from tests.fixtures import Artifacts, Box, States, opened

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


@needs_root
async def test_no_space_while_a_machine_runs(small: StateDir, artifacts: Artifacts) -> None:
    """The host is full while the guest writes: it is told at once, with the reason, and after making room what the guest had synced is there."""
    async with opened(small) as engine:
        await engine.create(artifacts.spec("fat"))
        box = Box(engine, "fat")
        await box.sh("echo kept > /kept; sync")
        ballast, happening = fill(small, 1 << 20), engine.events("fat")
        with pytest.raises(OutcomeUnknownError, match="no space left on the host's disk"):
            await box.sh("dd if=/dev/urandom of=/big bs=1M count=20; sync")
        async with asyncio.timeout(60):
            while (await anext(happening)).state is not State.FAILED:
                pass
        found = await engine.get("fat")
        assert found.state is State.FAILED
        assert "no space left" in found.reason
        ballast.unlink()
        assert (await engine.start("fat")).state is State.RUNNING
        assert await box.text("cat /kept") == "kept"


async def test_an_engine_that_finds_no_space_says_so(small: StateDir) -> None:
    fill(small, 0)
    with pytest.raises(NoSpaceError):
        async with Engine.open(small):
            pass
