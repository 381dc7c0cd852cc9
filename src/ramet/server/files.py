"""Files of a guest: ranges, directories, whole trees as tar."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from ramet.model import FileInfo
from ramet.rest import BYTES, TAR
from ramet.server.reply import bytes_reply, done, record, until_gone
from ramet.server.requests import GuestPath, GuestTarget, Name, User, VerbsDep, body, octal
from ramet.verbs import WRITE_FLAGS

router = APIRouter(prefix="/v1/machines/{name}/files", tags=["files"])

Mode = Annotated[str, Query(description="Permission bits of a new one, octal.")]


@router.get("", operation_id="read_file", response_class=Response, responses={200: {"content": {BYTES: {}}}}, summary="The bytes of a file")
async def read_file(
    name: Name,
    request: Request,
    verbs: VerbsDep,
    path: GuestPath,
    offset: Annotated[int, Query(ge=0)] = 0,
    length: Annotated[int, Query(ge=-1, description="-1: to the end.")] = -1,
    user: User = "",
) -> Response:
    return await bytes_reply(request, verbs.read_file(name, path, offset=offset, length=length, user=user))


@router.put(
    "",
    operation_id="write_file",
    status_code=204,
    openapi_extra={"requestBody": {"content": {BYTES: {}}}},
    summary="Write the body to a file",
)
async def write_file(
    name: Name,
    request: Request,
    verbs: VerbsDep,
    path: GuestPath,
    mode: Mode = "0644",
    offset: Annotated[int, Query(ge=0)] = 0,
    flags: Annotated[
        str, Query(pattern="^[cxtapr]*$", description="Letters of create, exclusive (x), truncate, append, parents, replace (atomically).")
    ] = WRITE_FLAGS,
    user: User = "",
) -> Response:
    await verbs.write_file(name, path, body(request), mode=octal(mode), offset=offset, flags=flags, user=user)
    return done()


@router.delete("", operation_id="remove_file", status_code=204, summary="Remove a file or a directory")
async def remove_file(
    name: Name,
    verbs: VerbsDep,
    path: GuestPath,
    recursive: Annotated[bool, Query(description="With all that a directory holds.")] = False,
    user: User = "",
) -> Response:
    await verbs.remove_file(name, path, recursive=recursive, user=user)
    return done()


@router.get("/stat", operation_id="stat_file", response_model=FileInfo, summary="What a path is; symbolic links are not followed")
async def stat_file(name: Name, request: Request, verbs: VerbsDep, path: GuestPath, user: User = "") -> Response:
    return record(await until_gone(request, verbs.stat_file(name, path, user=user)))


@router.get("/list", operation_id="list_files", response_model=list[FileInfo], summary="The entries of a directory")
async def list_files(name: Name, request: Request, verbs: VerbsDep, path: GuestPath, user: User = "") -> Response:
    return record(await until_gone(request, verbs.list_files(name, path, user=user)))


@router.post("/rename", operation_id="rename_file", status_code=204, summary="Rename or move within one file system")
async def rename_file(name: Name, verbs: VerbsDep, path: GuestPath, target: GuestTarget, user: User = "") -> Response:
    await verbs.rename_file(name, path, target, user=user)
    return done()


@router.post("/dir", operation_id="make_dir", status_code=204, summary="Make a directory")
async def make_dir(
    name: Name,
    verbs: VerbsDep,
    path: GuestPath,
    mode: Mode = "0755",
    parents: Annotated[bool, Query(description="Make those above it too, and be content when it is there.")] = True,
    user: User = "",
) -> Response:
    await verbs.make_dir(name, path, mode=octal(mode), parents=parents, user=user)
    return done()


@router.get(
    "/tree",
    operation_id="pack",
    response_class=Response,
    responses={200: {"content": {TAR: {}}}},
    summary="A tar stream of a directory's contents, or of one file",
)
async def pack(name: Name, request: Request, verbs: VerbsDep, path: GuestPath, user: User = "") -> Response:
    return await bytes_reply(request, verbs.pack(name, path, user=user), TAR)


@router.put(
    "/tree",
    operation_id="unpack",
    status_code=204,
    openapi_extra={"requestBody": {"content": {TAR: {}}}},
    summary="Write a tar stream into a directory",
)
async def unpack(
    name: Name,
    request: Request,
    verbs: VerbsDep,
    path: GuestPath,
    owners: Annotated[bool, Query(description="Keep the archive's owners (as root).")] = False,
    user: User = "",
) -> Response:
    await verbs.unpack(name, path, body(request), owners=owners, user=user)
    return done()
