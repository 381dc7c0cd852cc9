"""The daemon as a process: started once, refused twice, killed and found again, and its machines outlive all of that."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator

import pytest

from ramet import process, service
from ramet.client import Client
from ramet.errors import DaemonError, OutcomeUnknownError, RametError
from ramet.model import Command, Machine, Port, Spec, State
from ramet.paths import StateDir
from tests.fixtures import Artifacts, States

DEADLINE = 120.0


def pid_of(state: StateDir) -> int:
    found = service.status(state)
    assert found
    return int(str(found["pid"]))


@contextlib.asynccontextmanager
async def client(state: StateDir) -> AsyncIterator[Client]:
    """A client of the daemon that runs now."""
    found = service.status(state)
    assert found
    async with contextlib.aclosing(Client(str(found["url"]), state.token.read_text().strip())) as made:
        yield made


async def kill(state: StateDir) -> None:
    """kill -9, and wait until it has happened."""
    fd = os.pidfd_open(pid_of(state))
    try:
        signal.pidfd_send_signal(fd, signal.SIGKILL)
        assert await process.gone(fd, 30)
    finally:
        os.close(fd)


async def test_it_starts_once_and_ends_politely(daemon: StateDir) -> None:
    first = pid_of(daemon)
    await asyncio.gather(*(service.ensure_running(daemon) for _ in range(4)))
    assert pid_of(daemon) == first
    async with client(daemon) as verbs:
        assert await verbs.list() == []
        assert (await verbs.info()).state_dir == str(daemon.root)
    assert await service.stop(daemon) is True
    assert await service.stop(daemon) is False
    assert service.status(daemon) is None


async def test_many_who_start_it_at_once_get_one(states: States) -> None:
    state = states.new()
    await asyncio.gather(*(service.ensure_running(state) for _ in range(4)))
    async with client(state) as verbs:
        assert await verbs.list() == []
    await service.stop(state)


async def test_a_second_daemon_on_the_state_directory_refuses(daemon: StateDir) -> None:
    first = pid_of(daemon)
    ended = await process.run([sys.executable, "-m", "ramet.daemon", str(daemon.root)], deadline=DEADLINE)
    assert ended.returncode == 1
    assert f"another daemon holds {daemon.root}" in ended.output
    assert "hint:" in ended.output
    assert pid_of(daemon) == first
    async with client(daemon) as verbs:
        await verbs.list()


async def test_machines_outlive_restarts_and_kills(daemon: StateDir, artifacts: Artifacts) -> None:
    async with client(daemon) as verbs:
        made = await verbs.create(artifacts.spec("hardy", ports=(Port(guest=8080),)))
        await verbs.run("hardy", Command(argv=("sh", "-c", "echo hello > /srv/index.html; httpd -p 8080 -h /srv")))
        command = Command(argv=("sleep", "1013"), detach=True, label="background")
        async with contextlib.aclosing(verbs.execute("hardy", command)) as events:
            await anext(events)
    for end in (kill, service.stop, kill):
        await end(daemon)
        await service.ensure_running(daemon)
        async with client(daemon) as verbs:
            found = await settled(verbs, "hardy")
            assert (found.id, found.pid, found.state) == (made.id, made.pid, State.RUNNING)
            assert [each.label for each in await verbs.processes("hardy") if each.state == "running"] == ["background"]
            (port,) = (await verbs.get("hardy")).ports
            assert await get(port.host) == b"hello\n"


async def settled(verbs: Client, name: str) -> object:
    """The machine, once the daemon has found it again."""
    async with asyncio.timeout(DEADLINE):
        while True:
            with contextlib.suppress(RametError):
                await verbs.run(name, Command(argv=("true",)))
                return await verbs.get(name)


async def get(port: int) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /index.html HTTP/1.0\r\n\r\n")
    try:
        return (await asyncio.wait_for(reader.read(), DEADLINE)).partition(b"\r\n\r\n")[2]
    finally:
        writer.close()


async def test_a_caller_learns_that_the_daemon_was_killed(daemon: StateDir, artifacts: Artifacts) -> None:
    async with client(daemon) as verbs:
        await verbs.create(artifacts.spec("torn"))
        running = asyncio.ensure_future(verbs.run("torn", Command(argv=("sleep", "1014"))))
        async with asyncio.timeout(DEADLINE):
            while not await verbs.processes("torn"):
                pass
        await kill(daemon)
        with pytest.raises(OutcomeUnknownError):
            await running
        with pytest.raises(DaemonError):
            await verbs.list()
    await service.ensure_running(daemon)
    async with client(daemon) as verbs:
        await settled(verbs, "torn")
        async with asyncio.timeout(DEADLINE):
            while await verbs.processes("torn"):  # it was not detached: nobody is there to have its result
                pass


async def test_killed_in_the_middle_of_a_creation(daemon: StateDir, artifacts: Artifacts) -> None:
    async with client(daemon) as verbs:
        creating = await booting(verbs, artifacts.spec("halfway"))
        await kill(daemon)
        with pytest.raises(RametError):
            await creating
    await service.ensure_running(daemon)
    async with client(daemon) as verbs:
        (machine,) = await verbs.list()
        assert (machine.state, machine.reason) == (State.FAILED, "the daemon ended while it was creating")
        await verbs.delete("halfway")
        assert await verbs.list() == []


async def booting(verbs: Client, spec: Spec) -> asyncio.Future[Machine]:
    """A creation that has come so far. The daemon tells from its answer on, and so that is waited for first."""
    async with asyncio.timeout(DEADLINE), verbs._open("GET", "/v1/events", "the events") as answer:
        creating = asyncio.ensure_future(verbs.create(spec))
        async for line in answer.aiter_lines():
            if (json.loads(line).get("activity") or {}).get("step") == "booting":
                return creating
    raise AssertionError


async def test_stopped_in_the_middle_of_a_creation(daemon: StateDir, artifacts: Artifacts) -> None:
    """A polite end waits for what is under way, for a while; what the caller was told is what there is."""
    async with client(daemon) as verbs:
        creating = await booting(verbs, artifacts.spec("halfway"))
        await service.stop(daemon)
        (answer,) = await asyncio.gather(creating, return_exceptions=True)
    await service.ensure_running(daemon)
    async with client(daemon) as verbs:
        found = await verbs.list()
        if isinstance(answer, OutcomeUnknownError):
            assert {machine.state for machine in found} <= {State.FAILED, State.RUNNING}
        elif isinstance(answer, BaseException):
            assert isinstance(answer, RametError)
            assert all(machine.state is State.FAILED and machine.pid is None for machine in found)
        else:
            assert [(machine.id, machine.state) for machine in found] == [(answer.id, State.RUNNING)]
