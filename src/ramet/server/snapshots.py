"""Instants: fork, pause, hibernate, rewind; snapshots and templates; the layers that they are made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import APIRouter, Path, Query, Request
from pydantic import Field
from starlette.responses import Response

from ramet.model import ForkOutcome, Machine, Snapshot, TreeNode, strict
from ramet.rest import BYTES
from ramet.server.reply import bytes_reply, record, until_gone
from ramet.server.requests import BODY_LIMIT, Name, VerbsDep
from ramet.storage import LayerInfo

router = APIRouter()

# Names of snapshots hold `/`, which a client may also send as %2F: it is decoded before routes are compared. What may follow such a name is
# only ever asked with POST, which the name alone never is, so that none is taken for the other.
ONE = "/v1/snapshots/{snapshot:path}"
_LAYER = "/v1/layers/{layer}"

SnapshotName = Annotated[str, Path(min_length=1, description="A snapshot's name (`shop@warm`, `acme/shop:1.2`) or id.")]
LayerId = Annotated[str, Path(description="A layer's id.")]


@strict
@dataclass(frozen=True, kw_only=True)
class ForkRequest:
    """names: the children's, instead of `NAME-1`, `NAME-2`…; then count is not looked at."""

    count: Annotated[int, Field(ge=1)] = 1
    names: tuple[str, ...] = ()


@strict
@dataclass(frozen=True, kw_only=True)
class SnapshotRequest:
    """label: what comes after the machine's name and `@`; empty: a number. memory: the running programs too. test: start it once in the background."""

    label: str = ""
    memory: bool = True
    test: bool = True


@strict
@dataclass(frozen=True, kw_only=True)
class RestoreRequest:
    """snapshot: name or id; empty: the last one."""

    snapshot: str = ""


@strict
@dataclass(frozen=True, kw_only=True)
class FromSnapshotRequest:
    """name: the new machine's. disk_only: boot its disk, whatever its memory."""

    name: str
    disk_only: bool = False


@strict
@dataclass(frozen=True, kw_only=True)
class TemplateRequest:
    """label: the template's name. pool: machines to keep restored and parked."""

    label: str = ""
    pool: Annotated[int, Field(ge=0)] = 0


@router.post(
    "/v1/machines/{name}/fork",
    operation_id="fork",
    max_body_size=BODY_LIMIT,
    tags=["snapshots"],
    response_model=list[ForkOutcome],
    summary="Make machines that go on from this one's present instant; one outcome for each, also where it failed",
)
async def fork(name: Name, verbs: VerbsDep, wanted: ForkRequest = ForkRequest()) -> Response:
    return record(await verbs.fork(name, count=wanted.count, names=wanted.names))


@router.post("/v1/machines/{name}/pause", operation_id="pause", tags=["snapshots"], response_model=Machine, summary="Stop its cpus")
async def pause(name: Name, verbs: VerbsDep) -> Response:
    return record(await verbs.pause(name))


@router.post(
    "/v1/machines/{name}/resume",
    operation_id="resume",
    tags=["snapshots"],
    response_model=Machine,
    summary="Let a paused or hibernated machine go on",
)
async def resume(name: Name, verbs: VerbsDep) -> Response:
    return record(await verbs.resume(name))


@router.post(
    "/v1/machines/{name}/hibernate",
    operation_id="hibernate",
    tags=["snapshots"],
    response_model=Machine,
    summary="Save it to the disk and give its memory back to the host",
)
async def hibernate(
    name: Name, verbs: VerbsDep, slim: Annotated[bool, Query(description="Drop its caches and free memory before.")] = True
) -> Response:
    return record(await verbs.hibernate(name, slim=slim))


@router.post(
    "/v1/machines/{name}/compact",
    operation_id="compact",
    tags=["snapshots"],
    response_model=int,
    summary="Give back what its disk holds and nobody needs; the bytes that the host's disk got back",
)
async def compact(name: Name, verbs: VerbsDep) -> Response:
    return record(await verbs.compact(name))


@router.post(
    "/v1/machines/{name}/snapshots",
    operation_id="snapshot",
    max_body_size=BODY_LIMIT,
    tags=["snapshots"],
    status_code=201,
    response_model=Snapshot,
    summary="Keep this instant",
)
async def snapshot(name: Name, verbs: VerbsDep, wanted: SnapshotRequest = SnapshotRequest()) -> Response:
    return record(await verbs.snapshot(name, wanted.label, memory=wanted.memory, test=wanted.test), 201)


@router.post(
    "/v1/machines/{name}/restore",
    operation_id="restore",
    max_body_size=BODY_LIMIT,
    tags=["snapshots"],
    response_model=Machine,
    summary="Rewind it in place; what it did since is gone",
)
async def restore(name: Name, verbs: VerbsDep, wanted: RestoreRequest = RestoreRequest()) -> Response:
    return record(await verbs.restore(name, wanted.snapshot))


@router.get(
    "/v1/snapshots",
    operation_id="snapshots",
    tags=["snapshots"],
    response_model=list[Snapshot],
    summary="All that have a name, or those of one machine, the automatic ones too; oldest first",
)
async def snapshots(verbs: VerbsDep, machine: Annotated[str, Query(description="Only this one's.")] = "") -> Response:
    return record(await verbs.snapshots(machine))


@router.post(
    f"{ONE}/machines",
    operation_id="create_from",
    max_body_size=BODY_LIMIT,
    tags=["snapshots"],
    status_code=201,
    response_model=Machine,
    summary="Make a machine from it; answers when commands run in it",
)
async def create_from(snapshot: SnapshotName, wanted: FromSnapshotRequest, verbs: VerbsDep) -> Response:
    return record(await verbs.create_from(snapshot, wanted.name, disk_only=wanted.disk_only), 201)


@router.post(
    f"{ONE}/template",
    operation_id="template",
    max_body_size=BODY_LIMIT,
    tags=["snapshots"],
    response_model=Snapshot,
    summary="Give it a name that machines are made from, and keep some ready",
)
async def template(
    snapshot: SnapshotName,
    verbs: VerbsDep,
    wanted: TemplateRequest = TemplateRequest(),
) -> Response:
    return record(await verbs.template(snapshot, label=wanted.label, pool=wanted.pool))


@router.get(ONE, operation_id="get_snapshot", tags=["snapshots"], response_model=Snapshot, summary="One snapshot, by name or id")
async def get_snapshot(snapshot: SnapshotName, verbs: VerbsDep) -> Response:
    return record(await verbs.get_snapshot(snapshot))


@router.delete(
    ONE,
    operation_id="delete_snapshot",
    tags=["snapshots"],
    response_model=list[str],
    summary="Remove it; the names of what goes, in order. 409 with `dependents` when others stand on it",
)
async def delete_snapshot(
    snapshot: SnapshotName,
    verbs: VerbsDep,
    cascade: Annotated[bool, Query(description="With all that stands on it.")] = False,
    dry_run: Annotated[bool, Query(description="Only tell.")] = False,
) -> Response:
    return record(await verbs.delete_snapshot(snapshot, cascade=cascade, dry_run=dry_run))


@router.get(
    "/v1/tree",
    operation_id="tree",
    tags=["snapshots"],
    response_model=list[TreeNode],
    summary="Who descends from whom: images, machines, snapshots; parents before children",
)
async def tree(request: Request, verbs: VerbsDep) -> Response:
    return record(await until_gone(request, verbs.tree()))


@router.get("/v1/layers", operation_id="layers", tags=["layers"], response_model=list[LayerInfo], summary="All layers, oldest first")
async def layers(verbs: VerbsDep) -> Response:
    return record(await verbs.layers())


@router.get(_LAYER, operation_id="get_layer", tags=["layers"], response_model=LayerInfo, summary="One layer")
async def get_layer(layer: LayerId, verbs: VerbsDep) -> Response:
    return record(await verbs.get_layer(layer))


@router.get(
    f"{_LAYER}/verify",
    operation_id="verify_layer",
    tags=["layers"],
    response_model=list[str],
    summary="Read and check every chunk; what is wrong, a sentence each",
)
async def verify_layer(layer: LayerId, request: Request, verbs: VerbsDep) -> Response:
    return record(await until_gone(request, verbs.verify_layer(layer)))


@router.get(
    f"{_LAYER}/export",
    operation_id="export_layer",
    tags=["layers"],
    response_class=Response,
    responses={200: {"content": {BYTES: {}}}},
    summary="The layer with all it stands on, as the raw image",
)
async def export_layer(layer: LayerId, request: Request, verbs: VerbsDep) -> Response:
    return await bytes_reply(request, verbs.export_layer(layer))
