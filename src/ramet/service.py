"""The daemon from outside: is one running, start one, end it. Light to import, for every command line begins here."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys

from ramet import locks, process
from ramet.errors import DaemonError
from ramet.paths import StateDir

START_DEADLINE = 30.0
STOP_DEADLINE = 60.0
READY = b"ready\n"


async def ensure_running(state: StateDir | None = None) -> None:
    """Start a daemon for the state directory when none runs; returns when it answers. DaemonError shows its log's tail."""
    state = state or StateDir.default()
    if status(state):
        return
    state.create()
    reader, writer = os.pipe()
    try:
        command = [sys.executable, "-P", "-m", "ramet.daemon", str(state.root), str(writer)]
        process.spawn_detached(command, log=state.log, env=process.confided(), pass_fds=[writer])
    finally:
        os.close(writer)
    answer = await _read_all(reader, START_DEADLINE)
    if answer != READY and not await _settled(state):  # another may have won the race
        tail = "\n".join(state.log.read_text(errors="replace").splitlines()[-process.TAIL_LINES :])
        raise DaemonError("the daemon did not start", hint=f"See {state.log}.", details={"log": tail})


def status(state: StateDir) -> dict[str, object] | None:
    """pid and url of the running daemon; None when none holds the state directory, or cannot be asked yet."""
    if locks.is_held(state.lock):
        with contextlib.suppress(OSError, ValueError, KeyError):
            found: dict[str, object] = json.loads(state.daemon.read_text())
            if found.pop("started", None) in (None, process.start_time(int(str(found["pid"])))):  # else of one that was killed
                return found
    return None


async def _settled(state: StateDir) -> dict[str, object] | None:
    """The same, after one that is about to start has done so, or has failed."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(START_DEADLINE):
            while not (found := status(state)) and locks.is_held(state.lock):  # noqa: ASYNC110
                await asyncio.sleep(0.02)
            return found
    return None


async def stop(state: StateDir) -> bool:
    """End the running daemon; its machines run on. False when none ran."""
    found = await _settled(state)
    if not found:
        return False
    pid = int(str(found["pid"]))
    with contextlib.suppress(ProcessLookupError):
        fd = os.pidfd_open(pid)
        try:
            signal.pidfd_send_signal(fd, signal.SIGTERM)
            if not await process.gone(fd, STOP_DEADLINE):
                raise DaemonError(f"the daemon (pid {pid}) did not end within {STOP_DEADLINE:.0f} s")
        finally:
            os.close(fd)
    return True


async def _read_all(fd: int, deadline: float) -> bytes:
    """What comes through a pipe until its end or the deadline (seconds); closes it."""
    stream = asyncio.StreamReader()
    with open(fd, "rb") as file:
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(stream), file)
        try:
            return await asyncio.wait_for(stream.read(), deadline)
        except TimeoutError:
            return b""
        finally:
            transport.close()
