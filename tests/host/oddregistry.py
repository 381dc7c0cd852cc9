"""A server of HTTP/1.1 whose answers a test makes up: cut short, late, wrong, or elsewhere."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from urllib.parse import parse_qs, urlsplit

DEADLINE = 60.0


@dataclass
class Request:
    """target: as it came. headers: names in lower case. body: what came of it."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes = b""

    @property
    def path(self) -> str:
        return urlsplit(self.target).path

    @property
    def query(self) -> dict[str, str]:
        return {key: values[0] for key, values in parse_qs(urlsplit(self.target).query).items()}

    @property
    def range(self) -> tuple[int, int]:
        """The first byte that is wanted, and the one after the last."""
        first, _, last = self.headers["range"].removeprefix("bytes=").partition("-")
        return int(first), int(last) + 1


@dataclass
class Answer:
    """cut: close the connection after so many bytes of the body. drip: seconds between two bytes of it. claim: the Content-Length, when it is a lie."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None
    drip: float = 0.0
    claim: int | None = None


def part(content: bytes, request: Request) -> Answer:
    """A range as it should be answered."""
    begin, end = request.range
    return Answer(206, content[begin:end], {"content-range": f"bytes {begin}-{end - 1}/{len(content)}"})


Script = Callable[[Request], Answer | None]


@dataclass
class Odd:
    """A server that answers as `script` says; None: the connection is closed. swallow: how many bytes of the next body to read before the line breaks."""

    script: Script
    address: str = ""
    asked: list[Request] = field(default_factory=list)
    swallow: list[int] = field(default_factory=list)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self._one(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError, ssl.SSLError):
            pass
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError, ssl.SSLError):
                await writer.wait_closed()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        method, target, _ = head[0].split(" ")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:] if line)}
        request = Request(method, target, headers)
        self.asked.append(request)
        length = int(headers.get("content-length", "0"))
        if length and self.swallow:
            request.body = await reader.readexactly(min(length, self.swallow.pop(0)))
        else:
            request.body = await reader.readexactly(length)
        answer = self.script(request)
        if answer is None:
            return False
        body = b"" if method == "HEAD" else answer.body
        claim = len(answer.body) if answer.claim is None else answer.claim
        lines = [f"HTTP/1.1 {answer.status} x", f"content-length: {claim}", *(f"{k}: {v}" for k, v in answer.headers.items()), "", ""]
        writer.write("\r\n".join(lines).encode())
        if answer.drip:
            for byte in body:
                writer.write(bytes([byte]))
                await asyncio.sleep(answer.drip)
        else:
            writer.write(body[: answer.cut])
        await writer.drain()
        return answer.cut is None


@contextlib.asynccontextmanager
async def serving(
    serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]], context: ssl.SSLContext | None = None
) -> AsyncIterator[str]:
    """Have each connection to an address of loopback served, with TLS where there is a context; those that are left are given up."""
    tasks: set[asyncio.Task[None]] = set()

    async def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        tasks.add(task)
        with contextlib.suppress(asyncio.CancelledError):
            await serve(reader, writer)

    server = await asyncio.start_server(accepted, "127.0.0.1", 0, ssl=context)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@contextlib.asynccontextmanager
async def odd(script: Script, context: ssl.SSLContext | None = None) -> AsyncIterator[Odd]:
    """Serve on loopback, with TLS where there is a context."""
    made = Odd(script)
    async with serving(made.serve, context) as made.address:
        yield made
