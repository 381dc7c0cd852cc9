"""Commands in a guest: what the image and the spec add to them, run to an end, and the TCP ports of a guest on the host's loopback."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import Callable

from ramet import agentwire
from ramet.errors import ExistsError, GuestError, HostError, RametError
from ramet.guest import Guest, Stream
from ramet.model import Channel, Command, Exit, ImageConfig, Output, Port, Result, Spec
from ramet.verbs import OUTPUT_LIMIT

CHUNK = 64 << 10


def effective(spec: Spec, image: ImageConfig, command: Command) -> Command:
    """The command with the image's and the spec's environment, user and directory where it names none itself."""
    return dataclasses.replace(
        command,
        env={**image.env, **spec.env, **command.env},
        user=command.user or spec.user or image.user,
        cwd=command.cwd or spec.workdir or image.workdir,
    )


async def run(guest: Guest, command: Command, stdin: bytes) -> Result:
    """Run to the end. Cancelling kills the command. Output beyond OUTPUT_LIMIT of each channel is read, counted and dropped."""
    began = time.monotonic()
    kept: dict[Channel, list[bytes]] = {Channel.STDOUT: [], Channel.STDERR: []}
    room = {Channel.STDOUT: OUTPUT_LIMIT, Channel.STDERR: OUTPUT_LIMIT}
    truncated = 0
    stream = guest.execute(dataclasses.replace(command, stdin=bool(stdin)))
    feeder = asyncio.create_task(_feed(stream, stdin)) if stdin else None
    try:
        async with contextlib.aclosing(stream.events()) as events:
            async for event in events:
                if isinstance(event, Output):
                    piece = event.data[: room[event.channel]]
                    room[event.channel] -= len(piece)
                    truncated += len(event.data) - len(piece)
                    kept[event.channel].append(piece)
                elif isinstance(event, Exit):
                    return Result(
                        ending=event.ending,
                        code=event.code,
                        status=event.status,
                        stdout=b"".join(kept[Channel.STDOUT]),
                        stderr=b"".join(kept[Channel.STDERR]),
                        duration=time.monotonic() - began,
                        truncated=truncated,
                    )
        raise GuestError("the command's stream ended without an exit")
    finally:
        if feeder:
            feeder.cancel()


async def _feed(stream: Stream, data: bytes) -> None:
    """Send stdin; a program that ends without reading it all is its own business."""
    with contextlib.suppress(RametError):
        await stream.write(data)
        stream.eof()


class Forward:
    """A TCP port of a guest, served on the host's loopback as long as this object is open."""

    def __init__(self, port: Port, server: asyncio.Server) -> None:
        self.port = port
        self._server = server
        self._tasks: set[asyncio.Task[None]] = set()

    @classmethod
    async def open(cls, port: Port, guest: Callable[[], Guest]) -> Forward:
        """Listen. guest: asked at each connection. ExistsError when the host port is taken."""
        forward: Forward | None = None

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task and forward
            forward._tasks.add(task)
            task.add_done_callback(forward._tasks.discard)
            try:
                await _relay(guest(), port.guest, reader, writer)
                writer.close()
            except (RametError, OSError, asyncio.CancelledError):  # the last: of `close`; asyncio's streams would log it as an error
                writer.transport.abort()

        try:
            server = await asyncio.start_server(serve, "127.0.0.1", port.host, limit=CHUNK)
        except OSError as error:
            if port.host and error.errno == 98:
                raise ExistsError(
                    f"host port {port.host} is in use", hint=f"Name another, `OTHER:{port.guest}`, or only `{port.guest}` for any free one."
                ) from error
            raise HostError(f"cannot listen on host port {port.host}: {error.strerror}", hint="Ports below 1024 need root.") from error
        forward = cls(Port(guest=port.guest, host=server.sockets[0].getsockname()[1]), server)
        return forward

    async def close(self) -> None:
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def _relay(guest: Guest, port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Copy both ways between a host connection and one inside the guest; each side's end of data is passed on."""
    stream = await guest.dial(port)

    async def upward() -> None:
        while data := await reader.read(CHUNK):
            await stream.write(data)
        stream.eof()

    async def downward() -> None:
        while not isinstance(event := await stream.next(), agentwire.End):
            if isinstance(event, Output):
                writer.write(event.data)
                await writer.drain()
            elif isinstance(event, agentwire.Eof):
                writer.write_eof()

    up, down = asyncio.create_task(upward()), asyncio.create_task(downward())
    try:
        await asyncio.wait({up, down}, return_when=asyncio.FIRST_COMPLETED)
        if not down.done():
            up.result()  # a client that broke off ends the connection inside too; one that only has no more to say does not
            await down
    finally:
        stream.close()
        up.cancel()
        down.cancel()
        await asyncio.gather(up, down, return_exceptions=True)
