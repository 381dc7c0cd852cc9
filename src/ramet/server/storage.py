"""What is kept: to registries and from them, given up again, checked; blobs, for other hosts."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated

from fastapi import APIRouter, Header, Path, Query, Request
from pydantic import Field
from starlette.responses import Response

from ramet.model import Snapshot, strict
from ramet.rest import BYTES
from ramet.server.reply import bytes_reply, record, until_gone
from ramet.server.requests import BODY_LIMIT, VerbsDep
from ramet.server.snapshots import ONE, SnapshotName
from ramet.storage import Collected, Transfer

router = APIRouter(tags=["storage"])

# Of RFC 9110's ranges only those whose two ends are given: the others may be ignored, and are.
_RANGE = re.compile(r"bytes=([0-9]{1,15})-([0-9]{1,15})")

Digest = Annotated[str, Path(description="A blob's digest, `sha256:…`.", pattern="^sha256:[0-9a-f]{64}$")]


@strict
@dataclass(frozen=True, kw_only=True)
class PushRequest:
    """reference: REGISTRY/NAME:TAG."""

    reference: str


@strict
@dataclass(frozen=True, kw_only=True)
class PullRequest:
    """reference: REGISTRY/NAME:TAG or …@DIGEST. lazy: without its content, which comes when it is needed and in the background."""

    reference: str
    lazy: bool = False


@strict
@dataclass(frozen=True, kw_only=True)
class ConvertRequest:
    """image: as a spec names it. name: the template's; empty: the image's own."""

    image: str
    name: str = ""


@strict
@dataclass(frozen=True, kw_only=True)
class CollectRequest:
    """budget: bytes that all layers may take; without one, only what nothing needs goes. dry_run: only tell."""

    budget: Annotated[int, Field(ge=0)] | None = None
    dry_run: bool = False


@strict
@dataclass(frozen=True, kw_only=True)
class CheckRequest:
    """repair: remove what can be fetched or made again."""

    repair: bool = False


@router.post(
    f"{ONE}/push",
    operation_id="push",
    max_body_size=BODY_LIMIT,
    response_model=Transfer,
    summary="Send it to a registry; what is there already is not sent again. Ends when the client leaves",
)
async def push(snapshot: SnapshotName, wanted: PushRequest, request: Request, verbs: VerbsDep) -> Response:
    return record(await until_gone(request, verbs.push(snapshot, wanted.reference)))


@router.post(
    "/v1/pull",
    operation_id="pull",
    max_body_size=BODY_LIMIT,
    response_model=Transfer,
    summary="Have a snapshot of a registry here, under its name there. Ends when the client leaves",
)
async def pull(wanted: PullRequest, request: Request, verbs: VerbsDep) -> Response:
    return record(await until_gone(request, verbs.pull(wanted.reference, lazy=wanted.lazy)))


@router.post(
    "/v1/convert",
    operation_id="convert",
    max_body_size=BODY_LIMIT,
    status_code=201,
    response_model=Snapshot,
    summary="Make an image a template, without memory. Ends when the client leaves",
)
async def convert(wanted: ConvertRequest, request: Request, verbs: VerbsDep) -> Response:
    return record(await until_gone(request, verbs.convert(wanted.image, wanted.name)), 201)


@router.post(
    "/v1/gc",
    operation_id="gc",
    max_body_size=BODY_LIMIT,
    response_model=Collected,
    summary="Remove what no snapshot and no machine needs, and, beyond a budget, chunks that a registry has too",
)
async def gc(request: Request, verbs: VerbsDep, wanted: CollectRequest = CollectRequest()) -> Response:
    return record(await until_gone(request, verbs.gc(budget=wanted.budget, dry_run=wanted.dry_run)))


@router.post(
    "/v1/fsck",
    operation_id="fsck",
    max_body_size=BODY_LIMIT,
    response_model=list[str],
    summary="Check all that is kept; what is wrong, a sentence each",
)
async def fsck(request: Request, verbs: VerbsDep, wanted: CheckRequest = CheckRequest()) -> Response:
    return record(await until_gone(request, verbs.fsck(repair=wanted.repair)))


@router.get(
    "/v1/blobs/{digest}",
    operation_id="read_blob",
    response_class=Response,
    responses={200: {"content": {BYTES: {}}}, 206: {"content": {BYTES: {}}}},
    summary="Bytes of a blob (zstd seekable); 404 unless all of them are here",
)
async def read_blob(
    digest: Digest,
    request: Request,
    verbs: VerbsDep,
    wanted: Annotated[str, Header(alias="range", description="`bytes=FIRST-LAST`; instead of offset and length.")] = "",
    offset: Annotated[int, Query(ge=0)] = 0,
    length: Annotated[int, Query(ge=-1, description="-1: to the end.")] = -1,
) -> Response:
    found = _RANGE.fullmatch(wanted)
    first, last = (int(found[1]), int(found[2])) if found else (0, -1)
    if first > last:
        reply = await bytes_reply(request, verbs.read_blob(digest, offset=offset, length=length))
    else:
        reply = await bytes_reply(request, verbs.read_blob(digest, offset=first, length=last + 1 - first))
        reply.status_code = 206
        reply.headers["content-range"] = f"bytes {first}-{last}/*"
        if reply.media_type == BYTES:
            reply.headers["content-length"] = str(last + 1 - first)
    reply.headers["accept-ranges"] = "bytes"
    return reply
