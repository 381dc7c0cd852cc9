"""Machines with a program inside that knows what its memory, its files and its descriptors must hold (`witness.c`), and what tests of forks say to them."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

from ramet import paths
from ramet.engine import Engine
from ramet.errors import NotFoundError
from ramet.model import Snapshot, SnapshotState
from tests.fixtures import Box

DEADLINE = 240.0
SOURCE = Path(__file__).with_name("witness.c")
FILL, HOLD, DRAW = 7001, 7002, 7003  # ports
PAGES, FILES = 16 * 256, 100


def binary() -> bytes:
    """The program, compiled once for each version of its source."""
    cached = paths.cache_dir() / "tools" / f"witness-{hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]}"
    if not cached.exists():
        cached.parent.mkdir(parents=True, exist_ok=True)
        made = cached.with_suffix(f".{os.getpid()}")
        subprocess.run(["musl-gcc", "-static", "-O2", "-Wall", "-Wextra", "-Werror", "-o", made, SOURCE], check=True, timeout=120)
        made.rename(cached)
    return cached.read_bytes()


async def put(box: Box, path: str, data: bytes, *, mode: int = 0o755) -> None:
    """A file in a machine."""

    async def pieces() -> AsyncIterator[bytes]:
        yield data

    await box.engine.write_file(box.name, path, pieces(), mode=mode)


async def install(box: Box) -> None:
    await put(box, "/bin/witness", binary())


async def start(box: Box, words: str, port: int) -> None:
    """Run a witness in the background; returns when it answers."""
    await box.sh(
        f"setsid witness {words} >/tmp/{port}.log 2>&1 & until echo hello | nc 127.0.0.1 {port} 2>/dev/null | grep -q .; do usleep 20000; done",
        timeout=60,
    )


async def filling(box: Box) -> None:
    """Memory and files are written all the time, from here on."""
    await start(box, f"fill {FILL} 4711 {PAGES // 256} /srv/files {FILES}", FILL)
    await check(box, FILL)  # all was written once


async def ask(box: Box, port: int, line: str = "check") -> str:
    """What a witness answers."""
    return await box.text(f"echo {line} | nc 127.0.0.1 {port}", timeout=DEADLINE)


async def check(box: Box, port: int = FILL) -> str:
    """All is as it must be; returns the answer."""
    answer = await ask(box, port)
    assert answer.startswith("ok "), f"{box.name}: {answer or (await box.text(f'cat /tmp/{port}.log'))!r}"
    return answer


async def check_disk(box: Box) -> None:
    """As `check`, of what is on the disk, not only in the page cache."""
    await box.sh("sync; echo 3 > /proc/sys/vm/drop_caches", timeout=DEADLINE)
    await check(box, FILL)


async def forked(box: Box, count: int = 1) -> list[Box]:
    """Children of a machine, each of which lives."""
    outcomes = await box.engine.fork(box.name, count=count)
    assert [each.error for each in outcomes] == [None] * count
    return [Box(box.engine, each.name) for each in outcomes]


async def saved(engine: Engine, name: str) -> Snapshot:
    """A snapshot, once nothing is done to it any more."""
    async with asyncio.timeout(DEADLINE):
        while (found := await engine.get_snapshot(name)).state in (SnapshotState.SAVING, SnapshotState.TESTING):  # noqa: ASYNC110  (no event tells)
            await asyncio.sleep(0.05)
    return found


async def at_rest(engine: Engine) -> None:
    """Wait until no snapshot of any machine is compressed or tested any more."""
    for machine in await engine.list():
        with contextlib.suppress(NotFoundError):
            for each in await engine.snapshots(machine.name):
                with contextlib.suppress(NotFoundError):
                    await saved(engine, each.id)


@contextlib.asynccontextmanager
async def cleared(engine: Engine) -> AsyncIterator[None]:
    """Afterwards, machines and snapshots that were not there before are gone."""
    machines, points = {each.name for each in await engine.list()}, {each.id for each in await engine.snapshots()}
    try:
        yield
    finally:
        await at_rest(engine)
        for machine in await engine.list():
            if machine.name not in machines:
                await engine.delete(machine.name)
        for point in await engine.snapshots():
            with contextlib.suppress(NotFoundError):  # it went with another
                if point.id not in points:
                    await engine.delete_snapshot(point.id, cascade=True)
