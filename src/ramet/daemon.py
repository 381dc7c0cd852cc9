"""The composition root: one daemon for one state directory. It owns nothing that dies with it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import secrets
import shutil
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import uvicorn

from ramet import locks, process
from ramet.engine import Engine
from ramet.errors import DaemonError, RametError
from ramet.paths import StateDir
from ramet.server.app import create_app
from ramet.service import READY, ensure_running, status, stop
from ramet.store.disk import replace

_RESERVE = 2 << 20  # bytes: a start writes 200 KB, most of it the database's
_ENOUGH = 4 * _RESERVE

__all__ = ["embedded", "ensure_running", "run", "serve", "status", "stop", "token"]


@contextlib.contextmanager
def _only_one(state: StateDir) -> Iterator[None]:
    """Hold the state directory. DaemonError when another daemon does."""
    state.create()
    fd = locks.take(state.lock)
    if fd is None:
        raise DaemonError(
            f"another daemon holds {state.root}", hint="`ramet daemon status` shows it; RAMET_HOME names another state directory."
        )
    try:
        _spare(state)
        yield
    finally:
        os.close(fd)


def _spare(state: StateDir) -> None:
    """A full disk must not keep from starting who is needed to make room on it: for that a little is put by while there is enough."""
    with contextlib.suppress(OSError):
        free = shutil.disk_usage(state.root).free
        if free < _RESERVE:
            state.reserve.unlink(missing_ok=True)
        elif free > _ENOUGH and not state.reserve.exists():
            with open(state.reserve, "xb") as file:
                os.posix_fallocate(file.fileno(), 0, _RESERVE)


@contextlib.asynccontextmanager
async def embedded(state: StateDir) -> AsyncIterator[Engine]:
    """The verbs in this process, for programs that need no daemon. DaemonError when one holds the state directory."""
    with _only_one(state):
        async with Engine.open(state) as engine:
            yield engine


def token(state: StateDir) -> str:
    """The bearer token, made at the first start, readable by its owner only."""
    with contextlib.suppress(FileNotFoundError):
        if found := state.token.read_text().strip():
            return found
    made = secrets.token_urlsafe(32)
    replace(state.token, f"{made}\n".encode(), durable=False)
    return made


def _listen(state: StateDir) -> socket.socket:
    """Loopback, on RAMET_PORT, else the last daemon's port where it is free (so that a restart moves nothing), else any."""
    named = os.environ.get("RAMET_PORT", "0")
    if not named.isdecimal() or int(named) > 65535:
        raise DaemonError(f"RAMET_PORT is {named!r}", hint="Set it to a free port, 1 to 65535, or unset it.")
    wanted, last = int(named), 0
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        last = int(str(json.loads(state.daemon.read_text())["url"]).rpartition(":")[2])
        last = last if 0 < last < 65536 else 0
    for port in [wanted] if wanted else [last, 0]:
        server = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # named: asyncio sets TCP_NODELAY only on these
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
    found = {"pid": os.getpid(), "started": process.start_time(os.getpid()), "url": f"http://127.0.0.1:{server.getsockname()[1]}"}
    replace(state.daemon, json.dumps(found).encode(), durable=False)


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
                os.write(ready, READY)
                os.close(ready)
            logging.getLogger("ramet").info("serving %s on port %d", state.root, server.getsockname()[1])
            await http.serve(sockets=[server])


def run(root: Path, ready: int | None = None) -> None:
    """Serve in this process, logging to stderr."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s")
    try:
        asyncio.run(serve(StateDir(root=root), ready))
    except RametError as error:
        sys.exit(f"error: {error.message}\nhint: {error.hint}")


if __name__ == "__main__":
    run(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else None)
