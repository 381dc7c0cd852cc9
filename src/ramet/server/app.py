"""The application: who may ask, in what shape errors leave, and the routes."""

from __future__ import annotations

import hmac
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ramet import __version__
from ramet.errors import NotFoundError, RametError, SpecError, UnauthorizedError
from ramet.rest import HEARTBEAT_EVERY, to_json
from ramet.server import files, processes, routes, snapshots, storage
from ramet.server.reply import GoneError, internal
from ramet.server.requests import BODY_LIMIT, known_query
from ramet.verbs import Verbs

LOOPBACK = frozenset(
    {"localhost", "127.0.0.1", "[::1]"}
)  # the Host names that a browser cannot be tricked into sending to us for another site

_TOO_LARGE = "Send large input through `exec` and the process's stdin, or as a file."

log = logging.getLogger("ramet.server")


@dataclass(frozen=True, kw_only=True)
class Problem:
    """code: names the error's class; hint: what to do about it; details: for programs."""

    code: str
    message: str
    hint: str
    details: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class ErrorReply:
    """How every error looks."""

    error: Problem


def problem(error: RametError, status: int | None = None) -> Response:
    """The error as the API sends it."""
    headers = {"www-authenticate": 'Bearer realm="ramet"'} if isinstance(error, UnauthorizedError) else {}
    if "retry_after" in error.details:
        headers["retry-after"] = str(error.details["retry_after"])
    return Response(to_json({"error": error.wire()}), status or error.status, headers, "application/json")


class Gate:
    """Before everything else: the Host header, the token. After everything else: unexpected exceptions. Plain ASGI, so that streams pass untouched."""

    def __init__(self, app: ASGIApp, token: str, hosts: Iterable[str]) -> None:
        self._app = app
        self._token = token.encode()
        self._hosts = frozenset(hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if refused := self._refuse(scope):
            await problem(refused)(scope, receive, send)
            return
        began = replaced = False

        async def watched(message: Message) -> None:
            nonlocal began, replaced
            began = True
            if message["type"] == "http.response.start" and message["status"] == 413:  # the framework's own words, as plain text
                replaced = True
                await problem(SpecError(f"the body is larger than {BODY_LIMIT >> 20} MiB", hint=_TOO_LARGE), 413)(scope, receive, send)
            elif not replaced:
                await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception as error:
            if began:
                raise
            await problem(internal(error))(scope, receive, send)

    def _refuse(self, scope: Scope) -> RametError | None:
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1").lower()
        name = host if host.endswith("]") else host.rpartition(":")[0] or host
        if self._hosts and name not in self._hosts:
            # A page whose name was re-pointed at 127.0.0.1 (DNS rebinding) comes with its own name here.
            return UnauthorizedError(f"the Host header names {host!r}, not a loopback address", hint="Use http://127.0.0.1:PORT.")
        if scope["path"] == "/health":
            return None
        scheme, _, value = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() == b"bearer" and hmac.compare_digest(value.strip(), self._token):
            return None
        what = "the token is not the daemon's" if value else "a token is needed"
        return UnauthorizedError(
            what, hint="Send `Authorization: Bearer TOKEN`; the token is in the daemon's state directory, or set RAMET_TOKEN."
        )


def _field(location: tuple[str | int, ...]) -> str:
    """A validation error's place as people write it: ports[0].guest."""
    parts = location[1:] if location and location[0] in ("body", "query", "path", "header") else location
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).lstrip(".")


async def _on_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RametError)
    if error.status >= 500:
        log.warning("%s %s: %s: %s", request.method, request.url.path, error.code, error.message)
    return problem(error)


async def _on_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    fields = []
    for each in error.errors():
        if each["type"] == "json_invalid":
            fields.append(
                {"field": "", "message": f"the body is not JSON: {each.get('ctx', {}).get('error', '')} at character {each['loc'][-1]}"}
            )
        else:
            fields.append({"field": _field(each["loc"]), "message": str(each["msg"])})
    first = fields[0]
    message = f"{first['field']}: {first['message']}" if first["field"] else first["message"]
    more = f" (and {len(fields) - 1} more)" if len(fields) > 1 else ""
    return problem(SpecError(message + more, hint="The fields and their types are in /openapi.json.", details={"fields": fields}))


async def _on_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    phrase = HTTPStatus(error.status_code).phrase.lower()
    if error.status_code == 404:
        return problem(NotFoundError(f"there is nothing at {request.url.path}", hint="The routes are in /openapi.json."))
    kind = SpecError if error.status_code < 500 else RametError
    return problem(kind(f"{request.method} {request.url.path}: {phrase}", hint="The routes are in /openapi.json."), error.status_code)


async def _on_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


def create_app(verbs: Verbs, token: str, *, hosts: Iterable[str] = LOOPBACK, heartbeat: float = HEARTBEAT_EVERY) -> FastAPI:
    """REST over `verbs`. hosts: the names that the Host header may have, empty: any. heartbeat: seconds between signs of life on /v1/events."""
    app = FastAPI(
        title="Ramet",
        version=__version__,
        summary="Virtual development environments and sandboxes",
        docs_url=None,  # they load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        dependencies=[Depends(known_query)],
        responses={"default": {"model": ErrorReply, "description": "What failed, and what to do about it"}},
        exception_handlers={
            RametError: _on_error,
            RequestValidationError: _on_invalid,
            HTTPException: _on_http,
            GoneError: _on_gone,
        },
    )
    app.state.verbs = verbs
    app.state.heartbeat = heartbeat
    for module in (routes, snapshots, storage, processes, files):
        app.include_router(module.router)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    app.add_middleware(Gate, token=token, hosts=hosts)
    return app


def _openapi(app: FastAPI) -> dict[str, Any]:
    """FastAPI's document, with the bearer token that the gate asks for."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
        document.setdefault("components", {})["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"token": []}]
        document["paths"]["/health"]["get"]["security"] = []
        app.openapi_schema = document
    return app.openapi_schema
