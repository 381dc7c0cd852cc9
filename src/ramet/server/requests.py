"""What requests carry: the parameters that several routes share, bodies as they arrive, and refusing what nobody asked for."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, cast
from urllib.parse import parse_qs

from fastapi import Depends, Path, Query, Request
from starlette.requests import ClientDisconnect

from ramet.errors import SpecError
from ramet.server.reply import GoneError
from ramet.verbs import OUTPUT_LIMIT, Verbs

BODY_LIMIT = 2 * OUTPUT_LIMIT  # bytes of a JSON body, which is held whole: stdin of `run`, in base64


def get_verbs(request: Request) -> Verbs:
    return cast(Verbs, request.app.state.verbs)


def exact(request: Request, name: str) -> str:
    """A query parameter with bytes that are not UTF-8 kept (as surrogates): the guest's file names are bytes."""
    values: dict[str, list[str]] = parse_qs(
        request.scope["query_string"].decode("ascii", "surrogateescape"), keep_blank_values=True, errors="surrogateescape"
    )
    return values[name][-1]


def _path(request: Request, path: Annotated[str, Query(description="A path in the guest.", min_length=1)]) -> str:
    return exact(request, "path")


def _target(request: Request, target: Annotated[str, Query(description="The new path in the guest.", min_length=1)]) -> str:
    return exact(request, "target")


VerbsDep = Annotated[Verbs, Depends(get_verbs)]
Name = Annotated[str, Path(description="A machine's name or id.")]
ProcessId = Annotated[int, Path(description="The agent's number for the process.")]
GuestPath = Annotated[str, Depends(_path)]
GuestTarget = Annotated[str, Depends(_target)]
User = Annotated[str, Query(description="Who does it in the guest: name, uid, name:group or uid:gid. Empty: root.")]


def octal(mode: str, name: str = "mode") -> int:
    """Permission bits as people write them: 644, 0755, 0o1777."""
    try:
        value = int(mode, 8)
    except ValueError:
        value = -1
    if not 0 <= value <= 0o7777:
        raise SpecError(f"{name}: {mode!r} is not a file mode", hint="Write octal permission bits, such as 0644.")
    return value


async def body(request: Request) -> AsyncIterator[bytes]:
    """The request's body as it arrives; the client's socket is read only as fast as this is. GoneError when the client leaves halfway."""
    try:
        async for chunk in request.stream():
            if chunk:
                yield chunk
    except ClientDisconnect:
        raise GoneError from None


def known_query(request: Request) -> None:
    """Refuse query parameters that the route does not have: a misspelt one must not be silence."""
    if not request.scope["query_string"]:
        return
    known = _parameters(request).get(request.scope["route"].operation_id, frozenset())
    if unknown := sorted(set(request.query_params) - known):
        raise SpecError(
            f"{unknown[0]}: there is no such query parameter",
            hint=f"This route takes {', '.join(sorted(known)) or 'none'}.",
            details={"fields": [{"field": name, "message": "unknown query parameter"} for name in unknown]},
        )


def _parameters(request: Request) -> dict[str, frozenset[str]]:
    """operation id -> names of its query parameters, as the OpenAPI document lists them."""
    state = request.app.state
    if not hasattr(state, "parameters"):
        operations = (operation for item in request.app.openapi()["paths"].values() for operation in item.values())
        state.parameters = {
            o["operationId"]: frozenset(p["name"] for p in o.get("parameters", ()) if p["in"] == "query") for o in operations
        }
    return cast("dict[str, frozenset[str]]", state.parameters)
