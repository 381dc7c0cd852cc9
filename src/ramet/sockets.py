"""Unix sockets by path, however long the path is: the kernel takes 107 bytes, state directories can be deeper."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

P = TypeVar("P", bound=asyncio.Protocol)


@contextlib.contextmanager
def address(path: Path) -> Iterator[str]:
    """A short address for a socket's path, valid inside the block: through the open directory."""
    fd = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/{path.name}"
    finally:
        os.close(fd)


def listen(path: Path) -> socket.socket:
    """A listening socket at `path`, replacing what is there. Made before its server runs, there is nothing to wait for: a client's
    connection is queued, and fails the moment the server that inherits the socket is gone."""
    path.unlink(missing_ok=True)
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with address(path) as short:
            server.bind(short)
        path.chmod(0o600)
        server.listen(1)
    except BaseException:
        server.close()
        raise
    return server


async def connect(path: Path, factory: Callable[[], P]) -> tuple[asyncio.Transport, P]:
    """Connect a protocol to the socket at `path`."""
    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    client.setblocking(False)
    try:
        with address(path) as short:
            await asyncio.get_running_loop().sock_connect(client, short)
        return await asyncio.get_running_loop().create_unix_connection(factory, sock=client)
    except BaseException:
        client.close()
        raise
