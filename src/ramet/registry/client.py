"""A registry: what is read from it and written to it. All that it says is checked before anybody else sees it."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Self, TypeVar
from urllib.parse import quote

import httpx2

from ramet.errors import HostError, ImageError
from ramet.reference import DIGEST, INDEXES, OCI_MANIFEST, PATH, TAG, sha256
from ramet.registry import upload
from ramet.registry.config import HOST, Config, Endpoint
from ramet.registry.line import Line, body, pulls, pushes
from ramet.registry.tries import Tries, tried

DEADLINE = 60.0  # seconds
MANIFEST = 4 << 20  # bytes: the least that registries must take, and the most that many do
STRANGER = 10.0  # seconds for which a registry is tried that was not heard of yet
SHUNNED = 30.0  # seconds for which a mirror that failed is not asked
SKIP = 1 << 20  # bytes read for nothing where a server gives the whole instead of a range
_ACCEPT = ", ".join((OCI_MANIFEST, *INDEXES, "application/vnd.docker.distribution.manifest.v2+json"))
_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(?:\d{1,18}|\*)")
T = TypeVar("T")


class Registry:
    """One registry, by its name in references (`ghcr.io`, `127.0.0.1:5000`). Any number of requests at once; connections are kept and used again.

    Methods raise ImageError and HostError as the package says; paths are `acme/shop`, digests `sha256:…`. Reads go to the mirrors first that
    registries.conf names. A HostError comes once trying again for `deadline` seconds (0: once) did not help, or for 10 where there never was an answer;
    what makes progress is not counted.
    """

    def __init__(self, host: str, config: Config, deadline: float) -> None:
        self.host = host
        self._config, self._longest = config, deadline
        self._lines: dict[tuple[str, bool], Line] = {}
        self._shunned: dict[tuple[str, bool], float] = {}

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, host: str, *, config: Config | None = None, deadline: float = DEADLINE) -> AsyncIterator[Self]:
        """config: Config.load() by default. Nothing is asked yet."""
        if not HOST.fullmatch(host):
            raise ImageError(f"{host!r} is not a registry's name", hint="Write it as ghcr.io or registry.example.com:5000.")
        registry = cls(host, config or Config.load(), deadline)
        try:
            yield registry
        finally:
            for line in registry._lines.values():
                await line.aclose()

    @property
    def _deadline(self) -> float:
        """A registry that has never answered may be no more than a mistyped name."""
        return self._longest if any(line.answered for line in self._lines.values()) else min(self._longest, STRANGER)

    # reading

    async def manifest(self, path: str, reference: str) -> tuple[str, bytes]:
        """A manifest or index by tag or digest: its digest, and its bytes (at most 4 MiB), verified."""
        named = bool(DIGEST.fullmatch(reference))
        if not named and not TAG.fullmatch(reference):
            raise ImageError(f"registry {self.host}: {reference!r} is neither a tag nor a digest")
        what = _what(self.host, path, reference)

        async def ask(line: Line, place: Endpoint) -> tuple[str, bytes]:
            url = f"/v2/{place.path}/manifests/{reference}"
            async with line.ask("GET", url, pulls(place.path), headers={"accept": _ACCEPT}) as response:
                if response.status_code != 200:
                    raise await line.refused(response, what)
                data = await line.document(response, MANIFEST)
                said = reference if named else response.headers.get("docker-content-digest", "")
            digest = sha256(data)
            if said.startswith("sha256:") and said != digest:
                raise ImageError(
                    f"{what}: digest mismatch: what came has the digest {digest}", hint="Try again; if it stays, push it again."
                )
            return digest, data

        return await tried(self._deadline, lambda: self._read(path, ask, digest=named))

    async def blob(self, path: str, digest: str, limit: int) -> bytes:
        """A whole blob of at most `limit` bytes, verified."""
        what = _what(self.host, path, digest)

        async def ask(line: Line, place: Endpoint) -> bytes:
            async with line.ask("GET", _blob(place.path, digest), pulls(place.path)) as response:
                if response.status_code != 200:
                    raise await line.refused(response, what)
                data = await line.document(response, limit)
            if await asyncio.to_thread(sha256, data) != digest:
                raise ImageError(
                    f"{what}: digest mismatch: what came is not what its digest names", hint="Try again; if it stays, push it again."
                )
            return data

        return await tried(self._deadline, lambda: self._read(path, ask))

    async def stream(self, path: str, digest: str, offset: int, length: int) -> AsyncGenerator[bytes, None]:
        """Exactly bytes offset … offset+length-1 of a blob, in pieces as they come; NOT verified. Close it (aclosing) when not read to its end.

        A connection that breaks is followed by another from where it broke.
        """
        tries, got = Tries(self._deadline), 0
        while got < length:
            try:
                async with self._part(path, digest, offset + got, offset + length) as pieces:
                    async for piece in pieces:
                        if got == length:  # more than was asked for
                            break
                        part = piece[: length - got]
                        got += len(part)
                        tries.moved()
                        yield part
                if got < length:
                    raise self._own(path)[0].failed(f"{_what(self.host, path, digest)}: cut short after {offset + got} bytes")
            except HostError as error:
                await tries.wait(error)

    @contextlib.asynccontextmanager
    async def _part(self, path: str, digest: str, begin: int, end: int) -> AsyncIterator[AsyncIterator[bytes]]:
        """What one server gives of bytes begin … end-1, perhaps less, perhaps more."""
        async with contextlib.AsyncExitStack() as opened:

            async def ask(line: Line, place: Endpoint) -> tuple[Line, Endpoint, httpx2.Response, int]:
                headers = {"range": f"bytes={begin}-{end - 1}"}
                response = await opened.enter_async_context(line.ask("GET", _blob(place.path, digest), pulls(place.path), headers=headers))
                if response.status_code not in (200, 206):
                    raise await line.refused(response, _what(self.host, path, digest))
                return line, place, response, _skip(response, begin, end, _what(line.host, place.path, digest))

            line, place, response, skip = await self._read(path, ask)
            pieces = await opened.enter_async_context(contextlib.aclosing(line.pieces(response)))
            try:
                yield _behind(pieces, skip) if skip else pieces
            except HostError:
                self._shunned[place.host, place.plain] = time.monotonic() + SHUNNED  # counts for mirrors only
                raise

    async def has(self, path: str, digest: str) -> int | None:
        """The size of a blob that the registry itself (no mirror) has in that repository; None when it has it not."""

        async def ask() -> int | None:
            line, place = self._own(path)
            # what is not there yet may be hidden from whom may only read
            async with line.ask("HEAD", _blob(place.path, digest), pushes(place.path)) as response:
                if response.status_code == 404:
                    return None
                size = response.headers.get("content-length", "")
                if response.status_code != 200 or not re.fullmatch(r"[0-9]{1,18}", size):
                    raise await line.refused(response, _what(self.host, path, digest))
                return int(size)

        return await tried(self._deadline, ask)

    # writing

    async def put_manifest(self, path: str, reference: str, data: bytes, media_type: str) -> str:
        """Publish a document under a tag or its digest; returns the digest."""
        digest = sha256(data)
        if reference != digest and not TAG.fullmatch(reference):
            raise ImageError(f"registry {self.host}: {reference!r} is neither a tag nor the document's digest")
        what = f"{_what(self.host, path, reference)} cannot be written"

        async def ask() -> str:
            line, place = self._own(path)
            headers = {"content-type": media_type, "content-length": str(len(data))}
            url = f"/v2/{place.path}/manifests/{reference}"
            async with line.ask("PUT", url, pushes(place.path), headers=headers, body=body(data)) as response:
                if response.status_code not in (200, 201, 202):
                    raise await line.refused(response, what)
                said = response.headers.get("docker-content-digest", "")
            if said.startswith("sha256:") and said != digest:
                raise ImageError(f"{what}: digest mismatch: the registry has made {said[:80]} of it")
            return digest

        return await tried(self._deadline, ask)

    async def mount(self, path: str, digest: str, source: str) -> bool:
        """Have a blob of the repository `source` in the repository `path` too, without sending it; whether the registry did so."""

        async def ask() -> bool:
            line, place = self._own(path)
            _, other = self._own(source)
            if other.host != place.host:
                return False
            url = f"/v2/{place.path}/blobs/uploads/?mount={quote(_checked(digest))}&from={quote(other.path)}"
            async with line.ask("POST", url, pushes(place.path, other.path), headers={"content-length": "0"}) as response:
                if response.status_code == 202:  # an upload was begun instead
                    await upload.cancel(line, place.path, response)
                elif response.status_code >= 500 or response.status_code == 429:
                    raise await line.refused(response, _what(self.host, path, digest))
                return response.status_code == 201

        try:
            return await tried(self._deadline, ask)
        except ImageError:  # what may not be read there cannot be mounted from there
            return False

    async def upload(
        self,
        path: str,
        digest: str,
        size: int,
        read: Callable[[int, int], bytes],
        progress: Callable[[int], None],
        *,
        resume: str = "",
        at: Callable[[str], None] = lambda location: None,
    ) -> None:
        """Upload a blob. read(offset, length) is called in threads; progress(bytes that the registry has) may go back.

        at: told where the upload can go on, whenever that changes; `resume` is what it was told last, in an earlier call for the same blob.
        Cancelled, it ends once the piece under way (at most 16 MiB) is sent, for 10 s at most: most registries give up an upload that broke within a piece.
        """
        line, place = self._own(path)
        blob = upload.Blob(path=place.path, digest=_checked(digest), size=size, read=read)
        await upload.Upload(line, blob, self._deadline, progress, at).run(resume)

    # where

    def _line(self, place: Endpoint) -> Line:
        key = (place.host, place.plain)
        if key not in self._lines:
            self._lines[key] = Line(place, self._config.trust)
        return self._lines[key]

    def _own(self, path: str) -> tuple[Line, Endpoint]:
        """The registry itself."""
        (place,) = self._config.endpoints(self.host, _named(path), write=True)
        return self._line(place), place

    async def _read(self, path: str, ask: Callable[[Line, Endpoint], Awaitable[T]], *, digest: bool = True) -> T:
        """Ask the mirrors in their order, then the registry itself."""
        *mirrors, last = self._config.endpoints(self.host, _named(path), digest=digest)
        for place in mirrors:
            key = (place.host, place.plain)
            if self._shunned.get(key, 0.0) > time.monotonic():
                continue
            try:
                return await ask(self._line(place), place)
            except HostError:
                self._shunned[key] = time.monotonic() + SHUNNED
            except ImageError:
                continue
        return await ask(self._line(last), last)


def _named(path: str) -> str:
    if len(path) > 255 or not PATH.fullmatch(path):
        raise ImageError(f"{path!r} is not a repository's name")
    return path


def _checked(digest: str) -> str:
    if not DIGEST.fullmatch(digest):
        raise ImageError(f"{digest!r} is not a sha256 digest")
    return digest


def _blob(path: str, digest: str) -> str:
    return f"/v2/{path}/blobs/{_checked(digest)}"


def _what(host: str, path: str, reference: str) -> str:
    return f"{host}/{path}{'@' if ':' in reference else ':'}{reference}"


async def _behind(pieces: AsyncIterator[bytes], skip: int) -> AsyncIterator[bytes]:
    """What comes after so many bytes."""
    async for piece in pieces:
        if len(piece) > skip:
            yield piece[skip:]
        skip = max(0, skip - len(piece))


def _skip(response: httpx2.Response, begin: int, end: int, what: str) -> int:
    """How many bytes of the body come before the range that was asked for."""
    if response.status_code == 200:
        if begin > SKIP:
            raise ImageError(f"{what}: the registry gives no parts of blobs")
        return begin
    found = _RANGE.fullmatch(response.headers.get("content-range", ""))
    if not found or int(found[1]) != begin or int(found[2]) >= end:
        raise ImageError(f"{what}: the registry gives another part than was asked for")
    return 0
