"""Ports of a machine on the host's loopback, and the network from inside."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import socket
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from ramet.errors import ExistsError, NotFoundError
from ramet.model import Port
from tests.fixtures import Box

DEADLINE = 120.0


async def connect(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.wait_for(asyncio.open_connection("127.0.0.1", port), DEADLINE)


async def request(port: int, path: str) -> bytes:
    reader, writer = await connect(port)
    writer.write(f"GET {path} HTTP/1.0\r\n\r\n".encode())
    try:
        return await asyncio.wait_for(reader.read(), DEADLINE)
    finally:
        writer.close()


@pytest_asyncio.fixture(loop_scope="session")
async def web(box: Box) -> AsyncIterator[int]:
    """A web server inside, and the host's port for it."""
    await box.sh("mkdir -p /srv/www; echo hello > /srv/www/index.html; httpd -p 8080 -h /srv/www")
    port = await box.engine.open_port(box.name, Port(guest=8080))
    yield port.host
    await box.engine.close_port(box.name, 8080)
    await box.sh("killall httpd")


async def test_http_through_a_forward(web: int) -> None:
    assert (await request(web, "/")).endswith(b"\r\n\r\nhello\n")
    answers = await asyncio.gather(*(request(web, "/") for _ in range(16)))
    assert all(answer.endswith(b"hello\n") for answer in answers)


async def test_a_big_download_is_whole(box: Box, web: int) -> None:
    await box.sh("dd if=/dev/urandom of=/srv/www/big bs=1M count=8 2>/dev/null")
    body = (await request(web, "/big")).partition(b"\r\n\r\n")[2]
    assert hashlib.sha256(body).hexdigest() == (await box.text("sha256sum < /srv/www/big")).split()[0]


async def test_the_machine_shows_its_ports(box: Box, web: int) -> None:
    assert (await box.get()).ports == (Port(guest=8080, host=web),)
    assert await box.engine.open_port(box.name, Port(guest=8080)) == Port(guest=8080, host=web)


async def test_half_close_reaches_both_sides(box: Box) -> None:
    """The server answers only when the client has said that it is done."""
    serving = asyncio.ensure_future(box.sh("nc -l -p 9000 -e sha256sum"))
    port = (await box.engine.open_port(box.name, Port(guest=9000))).host
    await box.sh("while ! grep -q :2328 /proc/net/tcp /proc/net/tcp6; do usleep 10000; done")
    data = os.urandom(300_000)
    reader, writer = await connect(port)
    writer.write(data)
    writer.write_eof()
    answer = await asyncio.wait_for(reader.read(), DEADLINE)
    assert answer.split()[0].decode() == hashlib.sha256(data).hexdigest()
    writer.close()
    await serving
    await box.engine.close_port(box.name, 9000)


async def test_nobody_listens_inside(box: Box) -> None:
    port = (await box.engine.open_port(box.name, Port(guest=4711))).host
    reader, writer = await connect(port)
    with contextlib.suppress(ConnectionResetError):
        assert await asyncio.wait_for(reader.read(), DEADLINE) == b""
    writer.close()
    await box.engine.close_port(box.name, 4711)


async def test_a_port_that_was_closed_is_closed(box: Box) -> None:
    port = (await box.engine.open_port(box.name, Port(guest=4712))).host
    await box.engine.close_port(box.name, 4712)
    with pytest.raises(ConnectionRefusedError):
        await connect(port)
    with pytest.raises(NotFoundError, match=f"port 4712 of {box.name} is not open"):
        await box.engine.close_port(box.name, 4712)
    assert (await box.get()).ports == ()


async def test_a_host_port_that_is_taken(box: Box) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        number = taken.getsockname()[1]
        with pytest.raises(ExistsError, match=f"host port {number} is in use"):
            await box.engine.open_port(box.name, Port(guest=4713, host=number))
    assert (await box.get()).ports == ()


async def test_the_network_inside(box: Box) -> None:
    text = await box.text("ip addr show scope global; ip route; cat /etc/resolv.conf")
    assert "10.0.2.15/24" in text
    assert "default via 10.0.2.2" in text
    assert "nameserver 10.0.2.3" in text
    assert await box.text("hostname; ping -c1 -W5 127.0.0.1 > /dev/null && echo up", check=False) in ("ports\nup", "ports")


async def test_what_a_guest_reaches_of_the_host_is_told(box: Box) -> None:
    """QEMU's user network hands 10.0.2.2 to the host's 127.0.0.1, and what listens there trusts who comes: where that is so, `ramet info` says it."""
    came: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    server = await asyncio.start_server(lambda reader, writer: (came.set_result(None), writer.close())[1], "127.0.0.1", 0)
    number = server.sockets[0].getsockname()[1]
    await box.sh(f"echo x | timeout 60 nc -w 50 10.0.2.2 {number}", check=False)
    await asyncio.wait({came}, timeout=5)  # a connection that was made may be told after the command's end
    reached = came.done()
    server.close()
    await server.wait_closed()
    assert reached == any("loopback" in limit for limit in (await box.engine.info()).limits)
