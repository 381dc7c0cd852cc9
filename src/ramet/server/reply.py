"""How answers leave: records as JSON, and streams that hold back-pressure and end when the client is gone."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

from fastapi import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ramet.errors import OutcomeUnknownError, RametError
from ramet.model import ProcessEvent
from ramet.rest import BYTES, STREAM, Kind, encode, encode_error, frame, to_json

T = TypeVar("T")
log = logging.getLogger("ramet.server")


class GoneError(Exception):
    """The client went away; there is nobody to answer."""


def record(value: Any, status: int = 200) -> Response:
    """A record, or a list or dict of them, as JSON."""
    return Response(to_json(value), status, media_type="application/json")


def done() -> Response:
    return Response(status_code=204)


def internal(error: Exception) -> RametError:
    """What an unexpected exception looks like from outside; the log gets the rest."""
    log.error("unexpected error", exc_info=error)
    return RametError(
        f"an unexpected error in the daemon: {type(error).__name__}", hint="The daemon's log has its traceback; please report it."
    )


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


async def until_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client disconnects (GoneError). For requests whose body has been read."""
    task = asyncio.ensure_future(work)
    watch = asyncio.create_task(_disconnected(request.receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise GoneError
    finally:
        await _end(task, watch)


async def close(iterator: AsyncIterator[Any]) -> None:
    """End an iteration; generators clean up, other iterators have nothing to."""
    if ending := getattr(iterator, "aclose", None):
        await ending()


async def take(iterator: AsyncIterator[T]) -> T:
    """The next item. As a coroutine of its own, so that it may be a task."""
    return await iterator.__anext__()


class StreamReply(Response):
    """Bytes as they come. The iterator is advanced only when the client has taken what came before (uvicorn waits while the socket's
    buffer is full), and is closed as soon as the client is gone, also while it has nothing to say."""

    def __init__(self, chunks: AsyncIterator[bytes], media_type: str) -> None:
        self.chunks = chunks
        self.status_code = 200
        self.media_type = media_type
        self.background = None
        self.init_headers({"cache-control": "no-store", "x-accel-buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sender = asyncio.create_task(self._send(send))
        watch = asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait({sender, watch}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await _end(sender, watch)
            await close(self.chunks)

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for chunk in self.chunks:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
                await asyncio.sleep(0)  # a source that never waits must not starve the rest, nor the news that the client is gone
        except Exception as error:
            # The status is out, so the only way to say that this is not the end is to break the connection:
            # returning before the last piece of the body makes uvicorn do so.
            log.warning("a response was broken off: %s", error)
            return
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def process_reply(request: Request, events: AsyncIterator[ProcessEvent]) -> Response:
    """A process's events, framed. What fails before the first event is an ordinary error."""
    try:
        first = await until_gone(request, take(events))
    except StopAsyncIteration:
        raise OutcomeUnknownError("the process ended without a word") from None

    async def frames() -> AsyncIterator[bytes]:
        try:
            yield encode(first)
            async for event in events:
                yield encode(event)
        except RametError as error:
            yield encode_error(error)
        except Exception as error:
            yield encode_error(internal(error))
        finally:
            await close(events)

    return StreamReply(frames(), STREAM)


async def bytes_reply(request: Request, data: AsyncIterator[bytes], media_type: str = BYTES) -> Response:
    """A file's or tree's bytes: framed for a client that accepts frames, so that an error halfway can be told; else as they are."""
    try:
        first = await until_gone(request, take(data))
    except StopAsyncIteration:
        first = b""
    framed = STREAM in request.headers.get("accept", "")

    async def chunks() -> AsyncIterator[bytes]:
        try:
            if first:
                yield frame(Kind.STDOUT, first) if framed else first
            async for chunk in data:
                yield frame(Kind.STDOUT, chunk) if framed else chunk
        except Exception as error:
            if not framed:
                raise
            yield encode_error(error if isinstance(error, RametError) else internal(error))
        finally:
            await close(data)

    return StreamReply(chunks(), STREAM if framed else media_type)
