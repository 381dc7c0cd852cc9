"""Unix sockets at paths longer than the kernel takes."""

from __future__ import annotations

import asyncio
import os
import stat
from pathlib import Path

import pytest

from ramet import sockets


@pytest.fixture
def deep(tmp_path: Path) -> Path:
    directory = tmp_path.joinpath(*["a-directory-of-a-name-that-is-not-short"] * 5)
    directory.mkdir(parents=True)
    path = directory / "agent.sock"
    assert len(os.fsencode(path)) > 200
    return path


async def test_listen_and_connect_at_a_long_path(deep: Path) -> None:
    with sockets.listen(deep) as server:
        assert stat.S_IMODE(deep.stat().st_mode) == 0o600
        transport, _ = await sockets.connect(deep, asyncio.Protocol)  # queued: nobody has accepted yet
        peer, _ = server.accept()
        peer.sendall(b"x")
        peer.close()
        transport.abort()
        await asyncio.sleep(0)


async def test_a_listener_replaces_what_is_there(deep: Path) -> None:
    with sockets.listen(deep), sockets.listen(deep) as server:
        transport, _ = await sockets.connect(deep, asyncio.Protocol)
        server.accept()[0].close()
        transport.abort()
        await asyncio.sleep(0)


async def test_nobody_listens(deep: Path) -> None:
    with pytest.raises(FileNotFoundError):
        await sockets.connect(deep, asyncio.Protocol)
    sockets.listen(deep).close()
    with pytest.raises(ConnectionRefusedError):
        await sockets.connect(deep, asyncio.Protocol)


async def test_a_server_that_dies_takes_the_queued_with_it(deep: Path) -> None:
    server = sockets.listen(deep)
    lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    class Client(asyncio.Protocol):
        def connection_lost(self, exc: Exception | None) -> None:
            lost.set_result(None)

    await sockets.connect(deep, Client)
    server.close()
    await asyncio.wait_for(lost, 60)
