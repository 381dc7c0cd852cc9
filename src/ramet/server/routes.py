"""Machines: their life, what they say, their ports; the host; events."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request
from pydantic import Field
from starlette.responses import Response

from ramet.errors import RametError
from ramet.model import Event, HostInfo, Machine, Port, Reclaim, Spec, strict
from ramet.rest import BYTES, HEARTBEAT, LINES, to_json
from ramet.server.reply import StreamReply, close, done, internal, record, take, until_gone
from ramet.server.requests import BODY_LIMIT, Name, VerbsDep

router = APIRouter()


@router.get("/health", operation_id="health", tags=["host"], summary="Whether the daemon answers; needs no token")
async def health() -> dict[str, str]:
    return {"status": "ok"}


@router.get(
    "/v1/info", operation_id="info", tags=["host"], response_model=HostInfo, summary="This host: accelerator, kernel, capacity, limits"
)
async def info(verbs: VerbsDep) -> Response:
    return record(await verbs.info())


@router.post(
    "/v1/machines",
    operation_id="create",
    max_body_size=BODY_LIMIT,
    tags=["machines"],
    status_code=201,
    response_model=Machine,
    summary="Make a machine and start it; answers when commands run in it",
)
async def create(spec: Spec, verbs: VerbsDep) -> Response:
    return record(await verbs.create(spec), 201)


@router.get("/v1/machines", operation_id="list", tags=["machines"], response_model=list[Machine], summary="All machines")
async def list_machines(verbs: VerbsDep) -> Response:
    return record(await verbs.list())


@router.get(
    "/v1/machines/{name}", operation_id="get", tags=["machines"], response_model=Machine, summary="One machine, with what it costs now"
)
async def get(name: Name, verbs: VerbsDep) -> Response:
    return record(await verbs.get(name))


@router.delete(
    "/v1/machines/{name}",
    operation_id="delete",
    tags=["machines"],
    status_code=204,
    summary="Remove a machine and its disk, whatever it is doing",
)
async def delete(name: Name, verbs: VerbsDep) -> Response:
    await verbs.delete(name)
    return done()


@strict
@dataclass(frozen=True, kw_only=True)
class UpdateRequest:
    """What is not given stays. memory: bytes that it may use, 0: all that it was made with. reclaim: how hard it gives back what it does not use."""

    memory: Annotated[int, Field(ge=0)] | None = None
    reclaim: Reclaim | None = None


@router.patch(
    "/v1/machines/{name}",
    operation_id="update",
    max_body_size=BODY_LIMIT,
    tags=["machines"],
    response_model=Machine,
    summary="Change what it may cost; its `memory_granted` is what the guest has then",
)
async def update(name: Name, wanted: UpdateRequest, verbs: VerbsDep) -> Response:
    return record(await verbs.update(name, memory=wanted.memory, reclaim=wanted.reclaim))


@router.post("/v1/machines/{name}/start", operation_id="start", tags=["machines"], response_model=Machine, summary="Boot from its own disk")
async def start(name: Name, verbs: VerbsDep) -> Response:
    return record(await verbs.start(name))


@router.post("/v1/machines/{name}/stop", operation_id="stop", tags=["machines"], response_model=Machine, summary="Power off")
async def stop(name: Name, verbs: VerbsDep, force: Annotated[bool, Query(description="At once, as a power cut.")] = False) -> Response:
    return record(await verbs.stop(name, force=force))


@router.get(
    "/v1/machines/{name}/logs",
    operation_id="logs",
    tags=["machines"],
    response_class=Response,
    responses={200: {"content": {BYTES: {}}}},
    summary="The tail of the guest's console, or of QEMU's messages",
)
async def logs(
    name: Name,
    request: Request,
    verbs: VerbsDep,
    source: Annotated[Literal["console", "qemu"], Query(description="Whose.")] = "console",
    lines: Annotated[int, Query(ge=1, le=1_000_000, description="How many at most.")] = 200,
) -> Response:
    return Response(await until_gone(request, verbs.logs(name, source=source, lines=lines)), media_type=BYTES)


@router.get(
    "/v1/machines/{name}/metrics",
    operation_id="metrics",
    tags=["machines"],
    response_model=dict[str, float],
    summary="The guest's own numbers",
)
async def metrics(name: Name, request: Request, verbs: VerbsDep) -> Response:
    return record(await until_gone(request, verbs.metrics(name)))


@router.post(
    "/v1/machines/{name}/ports",
    operation_id="open_port",
    max_body_size=BODY_LIMIT,
    tags=["ports"],
    response_model=Port,
    summary="Make a TCP port of the guest reachable on the host's loopback",
)
async def open_port(name: Name, port: Port, verbs: VerbsDep) -> Response:
    return record(await verbs.open_port(name, port))


@router.delete(
    "/v1/machines/{name}/ports/{guest}", operation_id="close_port", tags=["ports"], status_code=204, summary="Take the port back"
)
async def close_port(name: Name, guest: int, verbs: VerbsDep) -> Response:
    await verbs.close_port(name, guest)
    return done()


@router.get(
    "/v1/events",
    operation_id="events",
    tags=["host"],
    response_class=Response,
    responses={200: {"model": Event, "content": {LINES: {}}}},
    summary="What happens from now on, one JSON object a line",
    description='A line of kind `heartbeat` comes at once and then every 15 seconds. A line `{"error": …}` is the last.',
)
async def events(request: Request, verbs: VerbsDep, machine: Annotated[str, Query(description="Only this one's.")] = "") -> Response:
    source = verbs.events(machine)
    pending = asyncio.ensure_future(take(source))
    await asyncio.sleep(0)  # so that an iterator that begins with its first step has begun before we answer
    return StreamReply(_lines(source, pending, request.app.state.heartbeat), LINES)


async def _lines(source: AsyncIterator[Event], pending: asyncio.Future[Event], every: float) -> AsyncIterator[bytes]:
    """Events as lines, with a heartbeat where `every` seconds pass in silence. pending: the first step, which is under way."""
    try:
        yield _line(Event(at=time.time(), kind=HEARTBEAT, machine=""))
        while True:
            finished, _ = await asyncio.wait({pending}, timeout=every)
            if not finished:
                yield _line(Event(at=time.time(), kind=HEARTBEAT, machine=""))
                continue
            event = pending.result()
            pending = asyncio.ensure_future(take(source))
            yield _line(event)
    except StopAsyncIteration:
        return
    except RametError as error:
        yield _line({"error": error.wire()})
    except Exception as error:
        yield _line({"error": internal(error).wire()})
    finally:
        pending.cancel()
        await asyncio.wait({pending})
        await close(source)


def _line(value: object) -> bytes:
    return to_json(value) + b"\n"
