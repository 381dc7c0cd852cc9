"""Processes of a guest: run to the end, stream, list, feed, signal."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Body, Query, Request
from starlette.responses import Response

from ramet.model import Command, Process, Size
from ramet.rest import PIECE, STREAM, RunReply, RunRequest
from ramet.server.reply import done, process_reply, record, until_gone
from ramet.server.requests import BODY_LIMIT, Name, ProcessId, VerbsDep, body

router = APIRouter(prefix="/v1/machines/{name}", tags=["processes"])

_STREAM: dict[int | str, dict[str, Any]] = {
    200: {
        "content": {STREAM: {}},
        "description": "Docker's multiplexed stream: a byte, three zero bytes, u32 big-endian size, payload. "
        "0 started (JSON), 1 stdout, 2 stderr, 3 exit (JSON), 4 error (JSON). Closing the connection kills a process that is not detached.",
    }
}


@router.post("/run", operation_id="run", max_body_size=BODY_LIMIT, response_model=RunReply, summary="Run a command to its end")
async def run(name: Name, request: Request, verbs: VerbsDep, command: RunRequest) -> Response:
    what, stdin = command.split()
    return record(RunReply.of(await until_gone(request, verbs.run(name, what, stdin))))


@router.post(
    "/exec",
    operation_id="execute",
    max_body_size=BODY_LIMIT,
    response_class=Response,
    responses=_STREAM,
    summary="Start a command and stream what it does",
)
async def execute(name: Name, request: Request, verbs: VerbsDep, command: Command) -> Response:
    return await process_reply(request, verbs.execute(name, command))


@router.get("/processes", operation_id="processes", response_model=list[Process], summary="What the agent started")
async def processes(name: Name, verbs: VerbsDep) -> Response:
    return record(await verbs.processes(name))


@router.get(
    "/processes/{process}/output",
    operation_id="attach",
    response_class=Response,
    responses=_STREAM,
    summary="Stream a process that runs already",
)
async def attach(name: Name, process: ProcessId, request: Request, verbs: VerbsDep) -> Response:
    return await process_reply(request, verbs.attach(name, process))


@router.post(
    "/processes/{process}/stdin",
    operation_id="send_input",
    status_code=204,
    openapi_extra={"requestBody": {"content": {"application/octet-stream": {}}}},
    summary="Write the body to a process's stdin; waits while the process does not read",
)
async def send_input(
    name: Name, process: ProcessId, request: Request, verbs: VerbsDep, eof: Annotated[bool, Query(description="Nothing follows.")] = False
) -> Response:
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) <= PIECE:
        # Small enough to hold: then nothing of the request is left to read, and a client that goes away while the process does not read is noticed.
        await until_gone(request, verbs.send_input(name, process, await request.body(), eof=eof))
        return done()
    async for chunk in body(request):
        await verbs.send_input(name, process, chunk)
    if eof:
        await verbs.send_input(name, process, b"", eof=True)
    return done()


@router.post(
    "/processes/{process}/signal",
    operation_id="signal",
    max_body_size=BODY_LIMIT,
    status_code=204,
    summary="Signal a process's whole group",
)
async def signal(
    name: Name, process: ProcessId, verbs: VerbsDep, signal: Annotated[int, Body(embed=True, ge=1, le=64, description="Its number.")]
) -> Response:
    await verbs.signal(name, process, signal)
    return done()


@router.post(
    "/processes/{process}/resize",
    operation_id="resize",
    max_body_size=BODY_LIMIT,
    status_code=204,
    summary="Change the size of a process's terminal",
)
async def resize(name: Name, process: ProcessId, verbs: VerbsDep, size: Size) -> Response:
    await verbs.resize(name, process, size.rows, size.columns)
    return done()


@router.delete("/processes/{process}", operation_id="forget", status_code=204, summary="Drop a finished process from the list")
async def forget(name: Name, process: ProcessId, verbs: VerbsDep) -> Response:
    await verbs.forget(name, process)
    return done()
