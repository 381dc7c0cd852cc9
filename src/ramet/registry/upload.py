"""A blob on its way to a registry, in pieces, and from where it broke off when it did (distribution specification, "Pushing a blob in chunks").

Registries differ in what they make of a break within a piece. The specification lets one ask how far an upload has come; distribution's own server gives up
such an upload, and it begins anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import httpx2

from ramet.errors import HostError, ImageError
from ramet.registry.line import Line, pushes
from ramet.registry.tries import Tries

PIECE = 16 << 20  # bytes of a request
LARGEST = 1 << 30  # bytes: a registry that wants larger pieces gets the blob in one
GRACE = 10.0  # seconds for the piece under way when the upload is cancelled
COMMIT = 300.0  # seconds for the registry to verify the whole
RESTARTS = 3
_READ = 1 << 20
_RANGE = re.compile(r"(?:bytes=)?0-([0-9]{1,18})")


@dataclass(frozen=True, kw_only=True)
class Blob:
    """What is to be uploaded, and where to. read(offset, length): its bytes; called in threads."""

    path: str
    digest: str
    size: int
    read: Callable[[int, int], bytes]


class Upload:
    """One blob's upload."""

    def __init__(self, line: Line, blob: Blob, deadline: float, progress: Callable[[int], None], at: Callable[[str], None]) -> None:
        self._line, self._blob, self._progress, self._at = line, blob, progress, at
        self._grant = pushes(blob.path)
        self._tries = Tries(deadline)
        self._location, self._done, self._best = "", 0, 0
        self._piece, self._restarts, self._deaf = PIECE, 0, 0

    async def run(self, resume: str) -> None:
        """To its end. Raises ImageError, HostError, and what `read` raises."""
        self._location, unsure = resume, bool(resume)
        while True:
            try:
                if unsure and await self._found():
                    break
                unsure = False
                if await self._forward():
                    break
            except HostError as error:
                unsure = True
                await self._tries.wait(error)
        self._progress(self._blob.size)
        self._at("")

    async def _forward(self) -> bool:
        """All that is left to do; False when the upload was lost and is to begin anew."""
        blob = self._blob
        if not self._location:
            await self._begin()
        while blob.size > self._piece and self._done < blob.size:
            if not await _ended(self._patch(), GRACE):
                return False
        return await self._commit()

    # requests

    async def _begin(self) -> None:
        url = f"/v2/{self._blob.path}/blobs/uploads/"
        async with self._line.ask("POST", url, self._grant, headers={"content-length": "0"}) as response:
            if response.status_code != 202:
                raise await self._line.refused(response, self._what)
            least = response.headers.get("oci-chunk-min-length", "")
            if least.isascii() and least.isdigit() and int(least[:18]) > self._piece:
                self._piece = int(least[:18]) if int(least[:18]) <= LARGEST else self._blob.size
            self._moved(response, 0)

    async def _patch(self) -> bool:
        """Send the next piece; False when the upload is lost."""
        begin, end = self._done, min(self._done + self._piece, self._blob.size)
        headers = {"content-range": f"{begin}-{end - 1}", "content-length": str(end - begin), "content-type": "application/octet-stream"}
        async with self._line.ask("PATCH", self._location, self._grant, headers=headers, body=lambda: self._parts(begin, end)) as response:
            if response.status_code in (202, 201, 204):
                said = _RANGE.fullmatch(response.headers.get("range", ""))
                done = int(said[1]) + 1 if said else end
                if not begin < done <= end:
                    return self._lost(ImageError(f"{self._what}: the registry counts {done} bytes of {end}"))
                self._moved(response, done)
                return True
            error = await self._line.refused(response, self._what)
        if isinstance(error, HostError) or response.status_code in (401, 403):
            raise error
        if response.status_code not in (404, 416) and self._piece < self._blob.size:  # it takes no pieces
            self._piece = self._blob.size
        return self._lost(error)

    async def _commit(self) -> bool:
        """Say that this was all, with the bytes where they are few; False when the upload is lost."""
        blob, begin = self._blob, self._done
        url = f"{self._location}{'&' if '?' in self._location else '?'}digest={quote(blob.digest)}"
        headers = {"content-length": str(blob.size - begin), "content-type": "application/octet-stream"}
        body = (lambda: self._parts(begin, blob.size)) if begin < blob.size else None
        async with self._line.ask("PUT", url, self._grant, headers=headers, body=body, silence=COMMIT) as response:
            if response.status_code in (201, 202, 204):
                return True
            error = await self._line.refused(response, self._what)
        if isinstance(error, HostError) or response.status_code in (401, 403):
            raise error
        return self._lost(error)

    async def _found(self) -> bool:
        """Ask how far it has come, after it broke; whether the whole blob is there, which an answer that got lost may have said."""
        async with self._line.ask("HEAD", f"/v2/{self._blob.path}/blobs/{self._blob.digest}", self._grant) as response:
            if response.status_code == 200:
                return True
        if not self._location:
            return False
        if (deaf := self._deaf + 1) > RESTARTS:  # the registry answers, but that place does not
            self._lost(ImageError(f"{self._what}: {self._location} does not answer"))
            return False
        self._deaf = deaf
        location, self._location, self._done = self._location, "", 0
        with contextlib.suppress(ImageError):
            await self._ask(location)
        return False

    async def _ask(self, location: str) -> None:
        """How much an upload has; stays without one where there is none any more."""
        try:
            async with self._line.ask("GET", location, self._grant) as response:
                if response.status_code >= 500 or response.status_code == 429:
                    raise await self._line.refused(response, self._what)
                said = _RANGE.fullmatch(response.headers.get("range", ""))
                # 0-0 is what distribution's server says of nothing, too; our pieces are larger
                done = int(said[1]) + 1 if said and said[1] != "0" else 0
                if response.status_code in (200, 204) and done <= self._blob.size:
                    self._location, self._deaf = location, 0
                    self._moved(response, done)
        except HostError:
            self._location = location
            raise

    # what has become of it

    def _moved(self, response: httpx2.Response, done: int) -> None:
        """The upload has so many bytes, and goes on where the answer says."""
        if said := response.headers.get("location"):
            self._location = self._line.address(said, str(response.url))
        elif not self._location:
            raise ImageError(f"{self._what}: the registry does not say where to", details={"registry": self._line.host})
        self._done = done
        self._at(self._location)
        self._progress(done)
        if done > self._best:
            self._best = done
            self._tries.moved()

    def _lost(self, error: ImageError | HostError) -> bool:
        """Begin anew, unless that was done too often."""
        if (restarts := self._restarts) >= RESTARTS:
            raise error
        self._restarts = restarts + 1
        self._location, self._done = "", 0
        self._at("")
        return False

    async def _parts(self, begin: int, end: int) -> AsyncIterator[bytes]:
        while begin < end:
            part = await asyncio.to_thread(self._blob.read, begin, min(_READ, end - begin))
            if not part:
                raise ImageError(f"{self._what}: it has become shorter meanwhile")
            yield part
            begin += len(part)
            self._progress(begin)

    @property
    def _what(self) -> str:
        return f"{self._line.host}/{self._blob.path}@{self._blob.digest} cannot be uploaded"


async def cancel(line: Line, path: str, response: httpx2.Response) -> None:
    """Give up an upload that an answer has begun, as far as the registry lets us; it forgets it by itself in some days."""
    with contextlib.suppress(HostError, ImageError):
        location = line.address(response.headers.get("location", ""), str(response.url))
        async with line.ask("DELETE", location, pushes(path)):
            pass


async def _ended(work: Coroutine[Any, Any, bool], grace: float) -> bool:
    """What the work says; when we are cancelled it has some seconds to come to its end."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task}, timeout=grace)
        raise
    finally:
        if not task.done():
            task.cancel()
        with contextlib.suppress(BaseException):
            await task
