"""The guest's end of the agent's line, played by a test: it reads frames and answers whatever the test wants, right or wrong."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import AsyncIterator
from pathlib import Path

from ramet import agentwire as wire
from ramet import sockets
from ramet.agentwire import EndKind, Kind, Op
from ramet.guest import Guest, Stream

DEADLINE = 60.0
VERSION = b"0.1.0"


class FakeAgent:
    """One connection of a host, from its first byte."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def raw(self, size: int) -> bytes:
        return await asyncio.wait_for(self._reader.readexactly(size), DEADLINE)

    async def read(self) -> wire.Frame:
        """The next frame of the host; padding is skipped."""
        first = b"\0"
        while first == b"\0":
            first = await self.raw(1)
        kind, flags, zero, stream, length = wire.HEADER.unpack(first + await self.raw(wire.HEADER.size - 1))
        assert zero == 0
        assert length <= wire.MAX_PAYLOAD
        return wire.Frame(Kind(kind), flags, stream, await self.raw(length))

    async def expect(self, kind: Kind) -> wire.Frame:
        """The next frame, which must be of this kind; credit is given whenever the host likes."""
        while (frame := await self.read()).kind is Kind.CREDIT and kind is not Kind.CREDIT:
            pass
        assert frame.kind is kind, frame
        return frame

    async def expect_open(self, op: Op) -> int:
        frame = await self.expect(Kind.OPEN)
        assert struct.unpack_from("<H", frame.payload)[0] == op
        return frame.stream

    async def quiet(self) -> bool:
        """Whether the host has closed the line."""
        return await asyncio.wait_for(self._reader.read(1), DEADLINE) == b""

    def send(self, kind: Kind, stream: int, payload: bytes = b"", flags: int = 0) -> None:
        self.send_raw(wire.frame(kind, stream, payload, flags))

    def send_raw(self, data: bytes) -> None:
        self._writer.write(data)

    def answer_sync(self, nonce: bytes) -> None:
        self.send(Kind.SYNC, 0, nonce + struct.pack("<I", wire.VERSION) + b"B" * 16 + VERSION)

    def started(self, stream: int, process: int = 1, pid: int = 100) -> None:
        self.send(Kind.STARTED, stream, struct.pack("<II", process, pid))

    def end(self, stream: int, kind: EndKind = EndKind.EXITED, code: int = 0, message: bytes = b"") -> None:
        self.send(Kind.END, stream, struct.pack("<B3xi", kind, code) + message)

    def close(self) -> None:
        self._writer.close()


@contextlib.asynccontextmanager
async def line(directory: Path) -> AsyncIterator[tuple[Path, asyncio.Future[FakeAgent]]]:
    """A socket on which a fake agent waits for a host."""
    path = directory / "agent.sock"
    agent: asyncio.Future[FakeAgent] = asyncio.get_running_loop().create_future()

    def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        agent.set_result(FakeAgent(reader, writer))

    listening = sockets.listen(path)
    server = await asyncio.start_unix_server(connected, sock=listening)
    try:
        yield path, agent
    finally:
        server.close()
        if agent.done():
            agent.result().close()
            with contextlib.suppress(OSError):
                await agent.result()._writer.wait_closed()
        await server.wait_closed()


@contextlib.asynccontextmanager
async def pair(directory: Path, *, silence: float = 60.0, resync: bool = False) -> AsyncIterator[tuple[Guest, FakeAgent]]:
    """A Guest that has connected to a fake agent."""
    async with line(directory) as (path, arriving):
        connecting = asyncio.ensure_future(Guest.connect(path, deadline=DEADLINE, resync=resync, silence=silence))
        agent = await asyncio.wait_for(arriving, DEADLINE)
        if resync:
            assert await agent.raw(len(wire.RESYNC)) == wire.RESYNC
        hello = await agent.expect(Kind.SYNC)
        agent.answer_sync(hello.payload)
        guest = await connecting
        try:
            yield guest, agent
        finally:
            guest.abort("the test ended")


async def collect(stream: Stream) -> list[object]:
    """The events of a stream, to its end."""
    async with asyncio.timeout(DEADLINE), contextlib.aclosing(stream.events()) as events:
        return [event async for event in events]


async def answered(guest: Guest, agent: FakeAgent) -> None:
    """The line still works."""
    pinging = asyncio.ensure_future(guest.ping())
    agent.end(await agent.expect_open(Op.PING))
    await pinging
