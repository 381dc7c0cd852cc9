"""Where bytes of blobs come from: other hosts' daemons first, then the registries that have them. What comes is verified by whoever asked."""

from __future__ import annotations

import contextlib
import functools
import ssl
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import replace
from typing import Protocol

import httpx2

from ramet.errors import HostError, LayerError, NotFoundError, RametError
from ramet.paths import StoreDir
from ramet.registry.client import Registry
from ramet.registry.config import Config
from ramet.store import remote

LEFT_OUT = 30.0  # seconds that a peer which failed is not asked
UNKNOWN = 5.0  # seconds that a peer is not asked again for a blob of which it had not all that was wanted
_TIMEOUT = httpx2.Timeout(10.0, connect=2.0)  # seconds: a peer is near, or of no use
_SKIPPED = 1 << 20  # bytes of an answer without Range that are read for nothing, at most


class Place(Protocol):
    """Something that blobs can be had from."""

    @property
    def name(self) -> str:
        """For sentences."""

    @property
    def is_peer(self) -> bool: ...

    def stream(self, digest: str, offset: int, length: int) -> AsyncGenerator[bytes, None]:
        """Bytes of a blob as they come, unverified. HostError: try again; ImageError, NotFoundError: no use."""

    def blame(self) -> None:
        """What it sent was wrong."""


class Peer:
    """Another host's daemon. url: of its API."""

    is_peer = True

    def __init__(self, url: str, client: httpx2.AsyncClient) -> None:
        self.name = f"the peer {url}"
        self.url = url
        self._client = client
        self._out = 0.0
        self._lacks: dict[str, float] = {}

    def has(self, digest: str) -> bool:
        """Whether it is worth asking."""
        now = time.monotonic()
        self._lacks = {name: until for name, until in self._lacks.items() if until > now}
        return self._out <= now and digest not in self._lacks

    def blame(self) -> None:
        self._out = time.monotonic() + LEFT_OUT

    async def stream(self, digest: str, offset: int, length: int) -> AsyncGenerator[bytes, None]:
        headers = {"Range": f"bytes={offset}-{offset + length - 1}"}
        try:
            async with self._client.stream("GET", f"{self.url}/v1/blobs/{digest}", headers=headers) as response:
                if response.status_code == httpx2.codes.NOT_FOUND:
                    self._lacks[digest] = time.monotonic() + UNKNOWN
                    raise NotFoundError(f"{self.name} does not have it")
                skip = self._skipped(response, offset)
                async for data in response.aiter_raw():
                    if not length:  # of an answer without Range there is more
                        return
                    piece = data[skip : skip + length]
                    skip = max(0, skip - len(data))
                    length -= len(piece)
                    if piece:
                        yield piece
        except (httpx2.HTTPError, ssl.SSLError) as error:
            self.blame()
            raise HostError(f"{self.name} failed: {str(error) or type(error).__name__}") from error
        if not length:
            return
        self.blame()
        raise HostError(f"{self.name} sent less than it should")

    def _skipped(self, response: httpx2.Response, offset: int) -> int:
        """Bytes of the answer that come before those that were asked for."""
        if response.status_code == httpx2.codes.OK and offset <= _SKIPPED:
            return offset
        if response.status_code == httpx2.codes.PARTIAL_CONTENT and response.headers.get("Content-Range", "").startswith(
            f"bytes {offset}-"
        ):
            return 0
        self.blame()
        raise HostError(f"{self.name} answered {response.status_code}")


class Repository:
    """A repository of a registry. direct: none of its mirrors is asked."""

    is_peer = False

    def __init__(self, supply: Supply, host: str, path: str, *, direct: bool = False) -> None:
        self.name = host
        self._supply = supply
        self._path = path
        self._direct = direct

    async def stream(self, digest: str, offset: int, length: int) -> AsyncGenerator[bytes, None]:
        registry = await self._supply.registry(self.name, direct=self._direct)
        async with contextlib.aclosing(registry.stream(self._path, digest, offset, length)) as pieces:
            async for piece in pieces:
                yield piece

    def blame(self) -> None: ...


class Supply:
    """Connections are kept. Use `open`."""

    def __init__(self, files: StoreDir, peers: Sequence[Peer], stack: contextlib.AsyncExitStack) -> None:
        self._files = files
        self._peers = peers
        self._stack = stack
        self._registries: dict[tuple[str, bool], Registry] = {}

    @functools.cached_property
    def _config(self) -> Config:
        return Config.load()

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, files: StoreDir, peers: Sequence[str] = (), token: str = "") -> AsyncIterator[Supply]:
        """peers: URLs of other daemons; token: the bearer token that they know."""
        async with contextlib.AsyncExitStack() as stack:
            headers = {"Authorization": f"Bearer {token}"} if token else {}
            found = []
            if peers:
                client = await stack.enter_async_context(httpx2.AsyncClient(headers=headers, timeout=_TIMEOUT))
                found = [Peer(url.rstrip("/"), client) for url in peers]
            yield cls(files, found, stack)

    def places(self, digest: str) -> list[Place]:
        """Where to ask for a blob, in order. LayerError when nobody knows."""
        found = remote.load(self._files, digest)
        if found is None:
            raise LayerError(f"nothing says where blob {digest} is to be had", hint="Pull what needs it again.")
        places: list[Place] = [peer for peer in self._peers if peer.has(digest)]
        for source in found.sources:
            places.append(Repository(self, source.host, source.path))
            with contextlib.suppress(RametError):  # it is said when the first is asked
                if len(self._config.endpoints(source.host, source.path)) > 1:  # mirrors may have what is wrong
                    places.append(Repository(self, source.host, source.path, direct=True))
        return places

    async def registry(self, host: str, *, direct: bool) -> Registry:
        """The client of a registry. It does not try again: that is scheduled with all else that is to be fetched."""
        key = (host, direct)
        if key not in self._registries:
            config = (
                replace(self._config, rules=tuple(replace(rule, mirrors=()) for rule in self._config.rules)) if direct else self._config
            )
            opened = await self._stack.enter_async_context(Registry.open(host, config=config, deadline=0))
            self._registries.setdefault(key, opened)
        return self._registries[key]
