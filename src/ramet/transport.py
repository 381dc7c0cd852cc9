"""How the client reaches a daemon: httpx2's HTTP/1.1 over TCP or a Unix socket, and one thing more: an answer that comes before the
request is all sent is heard at once. Without it a refused upload would be sent to its end, and an endless one for ever."""

from __future__ import annotations

import ssl
from collections.abc import Iterable
from typing import Any

import httpcore2
import httpx2

IDLE = 4.0  # seconds that a connection is kept for the next request: below uvicorn's 5, so that none is written to one that is being closed


class _Stream(httpcore2.AsyncNetworkStream):
    """A connection that refuses to write once there is something to read: HTTP/1.1 servers speak only when asked, so that is the answer
    (or the end). httpcore takes a WriteError as the sign to look for it."""

    def __init__(self, inner: httpcore2.AsyncNetworkStream) -> None:
        self._inner = inner

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return await self._inner.read(max_bytes, timeout)

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        if self._inner.get_extra_info("is_readable"):
            raise httpcore2.WriteError("the server answered before it had read the request")
        await self._inner.write(buffer, timeout)

    async def aclose(self) -> None:
        await self._inner.aclose()

    async def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore2.AsyncNetworkStream:
        # Below TLS there is always something to read (session tickets), so an encrypted connection is not watched.
        return await self._inner.start_tls(ssl_context, server_hostname, timeout)

    def get_extra_info(self, info: str) -> Any:
        return self._inner.get_extra_info(info)


class _Backend(httpcore2.AsyncNetworkBackend):
    def __init__(self) -> None:
        self._inner = httpcore2.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        return _Stream(await self._inner.connect_tcp(host, port, timeout, local_address, socket_options))

    async def connect_unix_socket(
        self, path: str, timeout: float | None = None, socket_options: Iterable[Any] | None = None
    ) -> httpcore2.AsyncNetworkStream:
        return _Stream(await self._inner.connect_unix_socket(path, timeout, socket_options))

    async def sleep(self, seconds: float) -> None:
        await self._inner.sleep(seconds)


class Transport(httpx2.AsyncHTTPTransport):
    """httpx2's own transport over our connections. It makes no TLS context until one is needed, which saves 20 ms of every CLI call.

    No limit on connections: each streamed process holds one, and the daemon is ours.
    """

    def __init__(self, *, socket: str | None = None) -> None:
        self._pool = httpcore2.AsyncConnectionPool(max_connections=None, keepalive_expiry=IDLE, uds=socket, network_backend=_Backend())
