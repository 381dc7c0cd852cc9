"""Memory of machines is merged by the host's KSM only where the daemon's administrator asked for it."""

from __future__ import annotations

import asyncio
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from ramet.host import MERGE
from tests.fixtures import Artifacts, Box, States, opened

KSM = Path("/sys/kernel/mm/ksm")
SCANS = 3  # a page is merged when it was the same in two
DEADLINE = 240.0
FILL = "dd if=/dev/zero bs=1M count=32 2>/dev/null | tr '\\0' x > /dev/shm/same || dd if=/dev/zero bs=1M count=32 | tr '\\0' x > /run/same"


@pytest.fixture
def ksm() -> Iterator[None]:
    """KSM runs, and as fast as it can; afterwards it is as before, and nothing is merged any more."""
    if os.geteuid() != 0 or not (KSM / "run").exists() or not Path("/proc/self/ksm_merging_pages").exists():
        pytest.skip("running KSM needs root, and telling whose pages it merged Linux 5.19")
    wanted = {"pages_to_scan": "20000", "sleep_millisecs": "10", "run": "1"}
    before = {name: (KSM / name).read_text().strip() for name in wanted}
    if before["run"] == "1":
        pytest.skip("KSM runs on this host, so what it merges here cannot be told apart")
    for name, value in wanted.items():
        (KSM / name).write_text(value)
    yield
    (KSM / "run").write_text("2")  # what was merged is parted again
    for name in wanted:
        (KSM / name).write_text(before[name])


def number(name: str) -> int:
    return int((KSM / name).read_text())


async def scanned(times: int) -> None:
    """Wait until KSM has looked at everything so often. It stands still where nothing is to be looked at, so there are some pages of ours."""
    with mmap.mmap(-1, 1 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as ours:
        ours.write(b"x" * (1 << 20))
        ours.madvise(mmap.MADV_MERGEABLE)
        goal = number("full_scans") + times
        async with asyncio.timeout(DEADLINE):
            while number("full_scans") < goal:  # noqa: ASYNC110  (KSM tells nobody)
                await asyncio.sleep(0.1)


def merged(pids: list[int]) -> int:
    """Pages of these processes that share their memory with others now."""
    return sum(int(Path(f"/proc/{pid}/ksm_merging_pages").read_text()) for pid in pids)


def mergeable(pid: int) -> int:
    """Bytes of a process that KSM may look at."""
    size = found = 0
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if line.startswith("Size:"):
            size = int(line.split()[1]) << 10
        elif line.startswith("VmFlags:") and "mg" in line.split():
            found += size
    return found


@pytest.mark.usefixtures("ksm")
@pytest.mark.parametrize("asked", [True, False])
async def test_memory_is_merged_where_that_was_asked_for(
    states: States, artifacts: Artifacts, monkeypatch: pytest.MonkeyPatch, asked: bool
) -> None:
    monkeypatch.delenv(MERGE, raising=False)
    if asked:
        monkeypatch.setenv(MERGE, "1")
    async with opened(states.new()) as engine:
        pids = []
        for name in ("one", "two"):
            machine = await engine.create(artifacts.spec(name))
            await Box(engine, name).sh(FILL)
            assert machine.pid
            pids.append(machine.pid)
            assert bool(mergeable(machine.pid)) is asked
        told = [line for line in (await engine.info()).limits if "memory merging" in line]
        assert any("another machine's memory" in line for line in told) is asked
        if asked:
            async with asyncio.timeout(DEADLINE):
                while merged(pids) < 2000:  # noqa: ASYNC110  (32 MiB are 8192 pages in each)
                    await asyncio.sleep(0.2)
        else:
            await scanned(SCANS)
            assert merged(pids) == 0
