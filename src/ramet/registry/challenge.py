"""WWW-Authenticate: what a registry asks for, and the tokens that answer it (distribution's token authentication, RFC 9110 section 11)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from ramet.errors import ImageError

LIMIT = 16  # challenges looked at
SHORTEST, LONGEST = 60.0, 3600.0  # seconds for which a token is kept: the specification's default, and ours
_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_SCHEME = re.compile(rf"[\s,]*({_TOKEN})(?=\s|,|$)\s*")
_PARAM = re.compile(rf'[\s,]*({_TOKEN})\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s,"]+))')
_BEARER = re.compile(r"[A-Za-z0-9._~+/=-]{1,65536}")


@dataclass(frozen=True, kw_only=True)
class Challenge:
    """scheme: lower case; the rest empty where it was not said."""

    scheme: str
    realm: str = ""
    service: str = ""
    scope: str = ""
    error: str = ""


def parse(header: str) -> list[Challenge]:
    """The challenges of a header; what cannot be understood ends them."""
    found: list[Challenge] = []
    at = 0
    while len(found) < LIMIT and (scheme := _SCHEME.match(header, at)):
        at = scheme.end()
        said: dict[str, str] = {}
        while param := _PARAM.match(header, at):
            at = param.end()
            value = re.sub(r"\\(.)", r"\1", param[2]) if param[2] is not None else param[3]
            said.setdefault(param[1].lower(), value)
        known = {key: said.get(key, "") for key in ("realm", "service", "scope", "error")}
        found.append(Challenge(scheme=scheme[1].lower(), **known))
    return found


def choose(header: str) -> Challenge | None:
    """The challenge that we answer: a Bearer one, else a Basic one."""
    found = {each.scheme: each for each in reversed(parse(header))}
    return found.get("bearer") or found.get("basic")


@dataclass(frozen=True, kw_only=True)
class Token:
    """value: as the Authorization header has it after `Bearer`; lasts: seconds."""

    value: str
    lasts: float


def token(document: Any, where: str) -> Token:
    """A token server's answer. Raises ImageError."""
    value = document.get("token") or document.get("access_token") if isinstance(document, dict) else None
    if not isinstance(value, str) or not _BEARER.fullmatch(value):
        raise ImageError(f"{where} answered without a token")
    lasts = document.get("expires_in")
    if not isinstance(lasts, int | float) or isinstance(lasts, bool):
        lasts = SHORTEST
    # One that is said to last for less is used all the same: a request that it is too old for is refused, and asks for another.
    return Token(value=value, lasts=min(max(float(lasts), 0.0), LONGEST))
