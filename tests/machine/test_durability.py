"""What the guest flushed is there after QEMU was killed with -9, in a machine on an image and in a fork, whose disk stands on a layer."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from ramet.engine import Engine
from ramet.model import Command, Output, State
from tests.fixtures import Artifacts, Box, States, opened

ROUNDS = 6
# Each line that it says is of a file that was flushed before: sizes below and above a cluster (64 KiB), in room that files of earlier rounds had.
WRITER = """
cd /srv; rm -f ./$(($1 - 2))-*; n=0
while :; do
  n=$((n+1)); f=$1-$n
  dd if=/dev/urandom of=$f bs=1k count=$((n * 37 % 200 + 1)) conv=fsync 2>/dev/null || exit 1
  echo "$f $(md5sum < $f | cut -c-32)"
done
"""


@pytest_asyncio.fixture(loop_scope="session")
async def engine_of_its_own(states: States) -> AsyncIterator[Engine]:
    async with opened(states.new()) as engine:
        yield engine


async def flushed(box: Box, number: int, lines: int) -> dict[str, str]:
    """Have files written; when the guest has said so many lines, QEMU is killed. What was said, by file."""
    said: dict[str, str] = {}
    heard = b""
    command = Command(argv=("sh", "-c", WRITER, "sh", str(number)))
    with contextlib.suppress(Exception):  # the machine dies in the middle of it
        async with contextlib.aclosing(box.engine.execute(box.name, command)) as events:
            async for event in events:
                if isinstance(event, Output):
                    heard += event.data
                if heard.count(b"\n") >= lines:
                    pid = (await box.get()).pid
                    assert pid
                    os.kill(pid, signal.SIGKILL)
                    break
    for line in heard.decode().splitlines():
        name, _, digest = line.partition(" ")
        said[name] = digest
    assert len(said) >= lines
    return said


async def died(box: Box) -> None:
    events = box.engine.events(box.name)
    while (await box.get()).state is State.RUNNING:
        await anext(events)


async def whole(box: Box, said: dict[str, str]) -> None:
    """Every file is as it was said to be."""
    for name, digest in said.items():
        assert await box.text(f"md5sum < /srv/{name} | cut -c-32") == digest, name


@pytest.mark.parametrize("of", ["machine", "fork"])
async def test_what_was_flushed_survives_the_death_of_qemu(engine_of_its_own: Engine, artifacts: Artifacts, of: str) -> None:
    engine = engine_of_its_own
    await engine.create(artifacts.spec("machine"))
    if of == "fork":
        await Box(engine, "machine").sh("dd if=/dev/urandom of=/srv/before bs=1M count=8; sync")
        (outcome,) = await engine.fork("machine", names=("fork",))
        assert outcome.machine, outcome
    box = Box(engine, of)
    earlier: dict[str, str] = {}
    for number in range(ROUNDS):
        said = await flushed(box, number, 1 + number * 5 % 13)
        await died(box)
        await engine.start(of)
        await whole(box, earlier | said)
        earlier = said


async def test_flushes_are_passed_on_to_the_host_s_disk(engine_of_its_own: Engine, artifacts: Artifacts) -> None:
    """Else a power cut would lose what the guest flushed: no file is opened so that QEMU ignores flushes, and each fsync becomes one."""
    engine = engine_of_its_own
    await engine.create(artifacts.spec("flusher"))
    machine = engine._entry("flusher").vm
    assert machine

    async def flushes() -> int:
        return sum(each["stats"]["flush_operations"] for each in await machine.monitor("query-blockstats"))

    before = await flushes()
    await Box(engine, "flusher").sh("for i in 1 2 3 4 5; do dd if=/dev/urandom of=/srv/f$i bs=4k count=1 conv=fsync 2>/dev/null; done")
    assert await flushes() >= before + 5
    nodes = await machine.monitor("query-named-block-nodes")
    assert nodes
    assert not any(node["cache"]["no-flush"] for node in nodes)
