"""The tour as users run it: whole, again, in a log and on a screen, and after every way to interrupt it."""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
import sys
from asyncio.subprocess import PIPE, STDOUT, Process
from collections.abc import AsyncIterator, Sequence

import pytest

from ramet import process, service
from ramet.client import Client
from ramet.model import Machine, State
from ramet.paths import StateDir

DEADLINE = 300.0
ARGV = [sys.executable, "-P", "-c", "import sys; from ramet.cli import main; sys.argv[0] = 'ramet'; main()"]
TITLES = ["Set-up", "Daemon", "Machine", "Commands", "Files", "Web server", "Costs", "Warm up", "Cold boot", "Fork", "Rewind", "Hibernate"]
TITLES += ["Tree", "Times", "Clean-up"]

pytestmark = pytest.mark.timeout(900)


@contextlib.asynccontextmanager
async def touring(state: StateDir) -> AsyncIterator[Process]:
    """A tour that is under way; killed when the body ends before it."""
    env = process.environment({"RAMET_HOME": str(state.root)})
    running = await asyncio.create_subprocess_exec(*ARGV, "tour", env=env, stdin=asyncio.subprocess.DEVNULL, stdout=PIPE, stderr=STDOUT)
    try:
        async with asyncio.timeout(DEADLINE):
            yield running
    finally:
        with contextlib.suppress(ProcessLookupError):
            running.kill()
        await running.wait()


async def whole(state: StateDir) -> str:
    """What a tour said, all of it."""
    async with touring(state) as running:
        said = (await running.communicate())[0].decode()
    assert running.returncode == 0, said
    return said


async def reached(running: Process, title: str) -> None:
    """Read on until the chapter of this title has ended; the next one has begun then."""
    assert running.stdout
    said = []
    while line := (await running.stdout.readline()).decode():
        said.append(line)
        if line.startswith(f"✓ {title}"):
            return
    pytest.fail(f"the tour ended before {title}: {''.join(said)}", pytrace=False)


@contextlib.asynccontextmanager
async def client(state: StateDir) -> AsyncIterator[Client]:
    found = service.status(state)
    assert found
    async with contextlib.aclosing(Client(str(found["url"]), state.token.read_text().strip())) as made:
        yield made


async def left(state: StateDir) -> Sequence[Machine]:
    """The machines; and nothing that tours make beside them is there."""
    async with client(state) as verbs:
        machines = await verbs.list()
        assert len(await verbs.snapshots("hello")) <= 1  # what it was saved as last: its next save is the difference to that
        assert await verbs.snapshots() == []
        assert [each.label for each in await verbs.processes("hello") if each.state == "running"] in ([], ["hello-server"])
        return machines


def titles(said: str) -> list[str]:
    return re.findall(r"^[✓!…] (.{14})", said, re.MULTILINE)


async def test_it_shows_everything_and_does_so_again(daemon: StateDir) -> None:
    first = await whole(daemon)
    assert [title.strip() for title in titles(first)][-len(TITLES) + 1 :] == TITLES[1:]
    assert "\x1b" not in first
    assert re.search(r"^ +hello +[0-9a-f]{8}… +(\d+) +([0-9a-f]{8}) .*\n +tour-1 +[0-9a-f]{8}… +\1 +\2 ", first, re.MULTILINE)
    assert "no such program: ls" in first
    assert re.search(r"^  +└─ hello ", first, re.MULTILINE)
    assert re.search(r"resume → first command +\S+ m?s +[█▏▎▍▌▋▊▉]+ +1/", first)
    assert [each.name for each in await left(daemon)] == ["hello"]
    async with client(daemon) as verbs:
        await verbs.hibernate("hello")
    again = await whole(daemon)
    assert "was hibernated, and goes on" in again
    assert [title.strip() for title in titles(again)] == TITLES
    assert [each.name for each in await left(daemon)] == ["hello"]


async def test_killed_anywhere_the_next_one_cleans_up(daemon: StateDir) -> None:
    for title in ("Daemon", "Machine", "Costs", "Warm up", "Cold boot", "Fork", "Rewind", "Hibernate"):
        async with touring(daemon) as running:
            await reached(running, title)
            running.kill()
            assert await running.wait() == -signal.SIGKILL
    await whole(daemon)
    assert [(each.name, each.state) for each in await left(daemon)] == [("hello", State.RUNNING)]


async def test_interrupted_it_cleans_up_itself(daemon: StateDir) -> None:
    for title in ("Warm up", "Cold boot", "Fork", "Rewind"):
        async with touring(daemon) as running:
            await reached(running, title)
            running.send_signal(signal.SIGINT)
            said = (await running.communicate())[0].decode()
        assert running.returncode == 130, said
        assert "Traceback" not in said
        assert [(each.name, each.state) for each in await left(daemon)] == [("hello", State.RUNNING)]


async def test_a_step_that_fails_is_named_and_nothing_is_left(daemon: StateDir) -> None:
    async with touring(daemon) as running:
        await reached(running, "Fork")
        async with client(daemon) as verbs:
            await verbs.delete("tour-2")  # it is to be hibernated after the next one was rewound
        said = (await running.communicate())[0].decode()
    assert running.returncode == 3, said
    assert re.search(r"^✗ Hibernate +failed: see below$", said, re.MULTILINE)
    assert "error: there is no machine" in said
    assert [(each.name, each.state) for each in await left(daemon)] == [("hello", State.RUNNING)]


async def test_somebody_else_s_machine_is_not_touched(daemon: StateDir) -> None:
    await whole(daemon)
    async with client(daemon) as verbs:
        await verbs.fork("hello", names=("mine",))
        await verbs.fork("mine", names=("tour-2",))
        async with touring(daemon) as running:
            said = (await running.communicate())[0].decode()
        assert running.returncode == 4, said
        assert "`ramet delete tour-2` removes it" in said
        assert {each.name for each in await verbs.list()} == {"hello", "mine", "tour-2"}
