"""The composition root: one daemon for one state directory. It owns nothing that dies with it."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import logging
import os
import secrets
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import uvicorn

from ramet import process
from ramet.engine import Engine
from ramet.errors import DaemonError
from ramet.paths import StateDir
from ramet.server.app import create_app

START_DEADLINE = 30.0
STOP_DEADLINE = 60.0


@contextlib.contextmanager
def _only_one(state: StateDir) -> Iterator[None]:
    """Hold the state directory. DaemonError when another daemon does."""
    state.create()
    fd = os.open(state.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise DaemonError(
            f"another daemon holds {state.root}", hint="`ramet daemon status` shows it; RAMET_HOME names another state directory."
        ) from None
    finally:
        os.close(fd)


def token(state: StateDir) -> str:
    """The bearer token, made at the first start, readable by its owner only."""
    with contextlib.suppress(FileNotFoundError):
        if found := state.token.read_text().strip():
            return found
    made = secrets.token_urlsafe(32)
    fd = os.open(state.token.with_suffix(".new"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(fd, "w") as file:
        file.write(made + "\n")
    state.token.with_suffix(".new").rename(state.token)
    return made


def _listen(state: StateDir) -> socket.socket:
    """Loopback, on RAMET_PORT, else the last daemon's port where it is free (so that a restart moves nothing), else any."""
    wanted = int(os.environ.get("RAMET_PORT", "0"))
    last = 0
    with contextlib.suppress(OSError, ValueError, KeyError):
        last = int(str(json.loads(state.daemon.read_text())["url"]).rpartition(":")[2])
    for port in [wanted] if wanted else [last, 0]:
        server = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind(("127.0.0.1", port))
            server.listen(128)
            return server
        except OSError as error:
            server.close()
            if port in (wanted, 0):
                raise DaemonError(f"cannot listen on port {port}: {error.strerror}", hint="Set RAMET_PORT to a free one.") from error
    raise AssertionError


def _announce(state: StateDir, server: socket.socket) -> None:
    """Where clients find us, published whole."""
    new = state.daemon.with_suffix(".new")
    new.write_text(json.dumps({"pid": os.getpid(), "url": f"http://127.0.0.1:{server.getsockname()[1]}"}))
    new.rename(state.daemon)


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers, which would end the process before the engine has closed."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def end(self) -> None:
        self.should_exit = True


async def serve(state: StateDir, ready: int | None = None) -> None:
    """Serve until SIGTERM or SIGINT. ready: a descriptor that is closed when requests are answered."""
    with _only_one(state):
        secret = token(state)
        async with Engine.open(state) as engine:
            server = _listen(state)
            config = uvicorn.Config(
                create_app(engine, secret), log_config=None, access_log=False, timeout_graceful_shutdown=5, lifespan="off", ws="none"
            )
            http = _Server(config)
            for number in (signal.SIGTERM, signal.SIGINT):
                asyncio.get_running_loop().add_signal_handler(number, http.end)
            _announce(state, server)
            if ready is not None:
                os.write(ready, b"ready\n")
                os.close(ready)
            logging.getLogger("ramet").info("serving %s on port %d", state.root, server.getsockname()[1])
            await http.serve(sockets=[server])


async def ensure_running(state: StateDir | None = None) -> None:
    """Start a daemon for the state directory when none runs; returns when it answers. DaemonError shows its log's tail."""
    state = state or StateDir.default()
    if status(state):
        return
    state.create()
    reader, writer = os.pipe()
    try:
        process.spawn_detached([sys.executable, "-m", "ramet.daemon", str(state.root), str(writer)], log=state.log, pass_fds=[writer])
    finally:
        os.close(writer)
    loop = asyncio.get_running_loop()
    stream = asyncio.StreamReader()
    transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(stream), open(reader, "rb"))
    try:
        answer = await asyncio.wait_for(stream.read(), START_DEADLINE)
    except TimeoutError:
        answer = b""
    finally:
        transport.close()
    if answer != b"ready\n" and not status(state):  # another may have won the race
        tail = "\n".join(state.log.read_text(errors="replace").splitlines()[-process.TAIL_LINES :])
        raise DaemonError("the daemon did not start", hint=f"See {state.log}.", details={"log": tail})


def status(state: StateDir) -> dict[str, object] | None:
    """pid and url of the running daemon; None when none holds the state directory."""
    try:
        fd = os.open(state.lock, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        with contextlib.suppress(OSError, ValueError):
            found: dict[str, object] = json.loads(state.daemon.read_text())
            return found
        return None
    finally:
        os.close(fd)
    return None


async def stop(state: StateDir) -> bool:
    """End the running daemon; its machines run on. False when none ran."""
    found = status(state)
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


def run(root: Path, ready: int | None = None) -> None:
    """Serve in this process, logging to stderr."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s")
    try:
        asyncio.run(serve(StateDir(root=root), ready))
    except DaemonError as error:
        sys.exit(f"error: {error.message}\nhint: {error.hint}")


if __name__ == "__main__":
    run(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else None)
