"""The line to one server of a registry: requests with the authorization that it asks for, redirects, and what its refusals mean."""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import json
import logging
import re
import ssl
import time
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urljoin, urlsplit

import httpx2

from ramet.errors import HostError, ImageError
from ramet.registry import challenge, credentials
from ramet.registry.challenge import Challenge
from ramet.registry.config import Endpoint

CONNECT, SILENCE = 10.0, 30.0  # seconds
ANSWER = 90.0  # seconds for the head of an answer to a request without a body, beyond the silence that is allowed
SLOWEST = 1024  # bytes in a second: a body that comes slower is given up
REDIRECTS = 5
# OpenSSL's names for the alerts of a server that wants another certificate of its client, or any (RFC 8446, 6.2).
_NAMELESS = ("TLSV13_ALERT_CERTIFICATE_REQUIRED", "SSLV3_ALERT_BAD_CERTIFICATE", "SSLV3_ALERT_HANDSHAKE_FAILURE", "TLSV1_ALERT_UNKNOWN_CA")
MOVED = 60.0  # seconds for which a redirect of a blob is remembered; signed addresses last for minutes
WAIT = 60.0  # seconds: the longest Retry-After that is believed
_DOCUMENT = 1 << 20  # bytes of a token or an error
_CONTROL = re.compile(r"[^\x20-\x7e\xa0-\ud7ff\ue000-\ufffd]+")
_PIECE = 256 << 10

Body = Callable[[], AsyncIterable[bytes]]
logging.getLogger("httpx2").setLevel(logging.WARNING)  # it logs each address, and signed ones are secrets


@dataclass(frozen=True, kw_only=True)
class Grant:
    """What is to be allowed. scopes: as token servers name them."""

    scopes: tuple[str, ...]


def pulls(path: str) -> Grant:
    return Grant(scopes=(f"repository:{path}:pull",))


def pushes(path: str, source: str = "") -> Grant:
    """Writing to a repository, with blobs mounted from another."""
    return Grant(scopes=(f"repository:{path}:pull,push", *([f"repository:{source}:pull"] if source else [])))


class Line:
    """One server. client: for it; abroad: for where it redirects to."""

    def __init__(self, place: Endpoint, trust: Callable[[str], ssl.SSLContext]) -> None:
        self.host, self.base, self._plain = place.host, place.base, place.plain
        self.answered = False  # whether it ever did, or another in its name
        self._trust = trust
        self._distrusted = False  # its certificate did not verify: ours may be others the next time
        self._client = self._connected()
        self._abroad: httpx2.AsyncClient | None = None
        self._granted: dict[Grant, tuple[str, float]] = {}  # the Authorization header, and until when it may be used
        self._asking: dict[Grant, asyncio.Lock] = {}
        self._moved: dict[str, tuple[str, float]] = {}

    def _connected(self) -> httpx2.AsyncClient:
        return _client(None if self._plain else self._trust(self.host))

    async def aclose(self) -> None:
        await self._client.aclose()
        if self._abroad:
            await self._abroad.aclose()

    @contextlib.asynccontextmanager
    async def ask(
        self,
        method: str,
        url: str,
        grant: Grant,
        *,
        headers: Mapping[str, str] | None = None,
        body: Body | None = None,
        silence: float = 0.0,
    ) -> AsyncIterator[httpx2.Response]:
        """An answer of whatever status, its body still to be read; what needs authorization has got it, as far as we have any.

        url: absolute or from the server's root. body: called for each sending; `headers` has its length.
        silence: seconds, where more than SILENCE. Raises HostError, ImageError.
        """
        url = self.address(url)
        response = await self._again(url, headers) if method == "GET" and url in self._moved else None
        if response is None:
            response = await self._authorized(method, url, grant, headers, body, silence)
            response = await self._follow(method, url, response, grant, headers) if method in ("GET", "HEAD") else response
        try:
            yield response
        finally:
            await response.aclose()

    # sending

    async def _send(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str] | None,
        authorization: str = "",
        body: Body | None = None,
        silence: float = 0.0,
    ) -> httpx2.Response:
        if self._distrusted:
            last, self._client, self._distrusted = self._client, self._connected(), False
            await last.aclose()
        client = self._for(url)
        whole = {"accept-encoding": "identity", **(headers or {})}
        if authorization and client is self._client:
            whole["authorization"] = authorization
        times = httpx2.Timeout(SILENCE, connect=CONNECT, read=silence or SILENCE, pool=None)
        with self.told():
            for harmless in (method in ("GET", "HEAD"), False):
                request = client.build_request(method, url, headers=whole, content=body() if body else None, timeout=times)
                try:
                    async with asyncio.timeout(None if body else ANSWER + silence):
                        response = await client.send(request, stream=True)
                    self.answered = True
                    return response
                except (httpx2.RemoteProtocolError, httpx2.ReadError, httpx2.WriteError):
                    if not harmless:  # else it may only be that a kept connection was closed at the other end just now
                        raise
        raise AssertionError

    def address(self, location: str, base: str = "") -> str:
        """Where a server's answer leads to. The server itself is never left for its unencrypted self, as misconfigured proxies would have it."""
        try:
            url = urljoin(base or self.base, location)
            parts = urlsplit(url)
            known = parts.scheme in ("https", "http") and parts.hostname and parts.port != 0
        except ValueError:
            known = None
        if not known:
            raise ImageError(f"registry {self.host}: it leads nowhere: {_clean(location)}", details={"registry": self.host})
        here = urlsplit(self.base)
        return parts._replace(scheme=here.scheme).geturl() if parts.netloc.lower() == here.netloc.lower() else url

    def _for(self, url: str) -> httpx2.AsyncClient:
        """The client for an address. What leaves TLS for none is refused: snapshots hold secrets, and so do tokens."""
        if _origin(url) == _origin(self.base):
            return self._client
        if (there := urlsplit(url)).scheme != "https" and not (self._plain and there.scheme == "http"):
            raise ImageError(f"registry {self.host}: it leads to {_shown(url)}, which is not encrypted", details={"registry": self.host})
        if self._abroad is None:
            self._abroad = _client(httpx2.create_ssl_context())
        return self._abroad

    async def _authorized(
        self, method: str, url: str, grant: Grant, headers: Mapping[str, str] | None, body: Body | None, silence: float
    ) -> httpx2.Response:
        authorization = self._grant(grant)
        response = await self._send(method, url, headers, authorization, body, silence)
        asked = challenge.choose(response.headers.get("www-authenticate", "")) if response.status_code == 401 else None
        if asked is None or self._for(url) is not self._client:
            return response
        try:
            found = await self._answer(asked, grant, authorization)
        except BaseException:
            await response.aclose()
            raise
        if found == authorization:  # nobody else to be
            return response
        await response.aclose()
        return await self._send(method, url, headers, found, body, silence)

    async def _follow(
        self, method: str, url: str, response: httpx2.Response, grant: Grant, headers: Mapping[str, str] | None
    ) -> httpx2.Response:
        start, hops = url, 0
        while response.status_code in (301, 302, 303, 307, 308) and (location := response.headers.get("location")):
            await response.aclose()
            if (hops := hops + 1) > REDIRECTS:
                raise ImageError(f"registry {self.host}: it redirects without end", details={"registry": self.host})
            url = self.address(location, url)
            response = await self._send(method, url, headers, self._grant(grant))
        if hops and method == "GET" and response.status_code == 206:
            while len(self._moved) >= 1000:
                self._moved.pop(next(iter(self._moved)))
            self._moved[start] = (url, time.monotonic() + MOVED)
        return response

    async def _again(self, url: str, headers: Mapping[str, str] | None) -> httpx2.Response | None:
        """Ask where the registry sent us a moment ago; None when that does not help any more."""
        location, until = self._moved[url]
        with contextlib.suppress(HostError):
            if time.monotonic() < until:
                response = await self._send("GET", location, headers)
                if response.status_code == 206:
                    return response
                await response.aclose()
        self._moved.pop(url, None)
        return None

    # who we are

    def _grant(self, grant: Grant) -> str:
        value, until = self._granted.get(grant, ("", 0.0))
        return value if time.monotonic() < until else ""

    async def _answer(self, asked: Challenge, grant: Grant, refused: str) -> str:
        """The authorization that a challenge asks for; the same as `refused` when there is no other."""
        async with self._asking.setdefault(grant, asyncio.Lock()):
            if (found := self._grant(grant)) and found != refused:
                return found
            known = await credentials.find(self.host, grant.scopes[0].split(":")[1])
            if asked.scheme == "basic":
                value, lasts = (known.basic, challenge.LONGEST) if known and known.user else ("", 0.0)
            elif known and known.bearer:
                value, lasts = f"Bearer {known.bearer}", challenge.LONGEST
            else:
                token = await self._token(asked, grant, known)
                value, lasts = f"Bearer {token.value}", token.lasts
            self._granted[grant] = (value, time.monotonic() + lasts)
            return value

    async def _token(self, asked: Challenge, grant: Grant, known: credentials.Credentials | None) -> challenge.Token:
        ours = {scope.rpartition(":")[0] for scope in grant.scopes}
        # a repository that the registry knows by another name
        scopes = [*grant.scopes, *(scope for scope in asked.scope.split() if scope.rpartition(":")[0] not in ours)]
        with self.told():
            realm = httpx2.URL(self.address(asked.realm))
        where = f"the token server of {self.host}, {_shown(str(realm))},"
        headers: dict[str, str] = {}
        body: Body | None = None
        method = "GET"
        if known and known.identity:
            fields = {"grant_type": "refresh_token", "refresh_token": known.identity, "client_id": "ramet", "scope": " ".join(scopes)}
            data = str(httpx2.QueryParams(fields | {"service": asked.service})).encode()
            method, body = "POST", lambda: _once(data)
            headers = {"content-type": "application/x-www-form-urlencoded", "content-length": str(len(data))}
        else:
            query = [*realm.params.multi_items(), *([("service", asked.service)] if asked.service else []), *(("scope", s) for s in scopes)]
            if known and known.user:
                query.append(("account", known.user))
                headers = {"authorization": known.basic}
            realm = realm.copy_with(params=query)
        response = await self._send(method, str(realm), headers, body=body)
        try:
            if response.status_code != 200:
                raise await self.refused(response, f"{where} refuses a token for {grant.scopes[0].split(':')[1]}")
            return challenge.token(_json(await self.document(response, _DOCUMENT)), where)
        finally:
            await response.aclose()

    # reading

    async def pieces(self, response: httpx2.Response) -> AsyncGenerator[bytes, None]:
        """A body as it comes. The time that the reader takes is not counted."""
        if response.headers.get("content-encoding", "identity") != "identity":
            raise ImageError(f"registry {self.host}: it compresses what it was asked for as it is", details={"registry": self.host})
        waited, got = 0.0, 0
        async with contextlib.aclosing(response.aiter_raw()) as body:
            while True:
                begun = time.monotonic()
                with self.told():
                    piece = await anext(body, b"")
                if not piece:
                    return
                waited, got = waited + time.monotonic() - begun, got + len(piece)
                if waited > SILENCE + got / SLOWEST:
                    raise self.failed(f"registry {self.host} is too slow: {got} bytes in {waited:.0f} s")
                yield piece

    async def document(self, response: httpx2.Response, limit: int) -> bytes:
        """A whole body of at most `limit` bytes."""
        found = bytearray()
        async with contextlib.aclosing(self.pieces(response)) as pieces:
            async for piece in pieces:
                found += piece
                if len(found) > limit:
                    raise ImageError(
                        f"registry {self.host}: more than {limit} bytes of what is to be small", details={"registry": self.host}
                    )
        return bytes(found)

    # what goes wrong

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        """Failures of the line as errors of ours."""
        try:
            yield
        except (httpx2.TimeoutException, TimeoutError) as error:
            what = "cannot be reached" if isinstance(error, httpx2.ConnectTimeout) else "does not answer in time"
            raise self.failed(f"registry {self.host} {what}") from error
        except httpx2.ConnectError as error:
            raise self._unreachable(error) from error
        except httpx2.ProxyError as error:
            raise self.failed(f"registry {self.host} cannot be reached through the proxy: {_clean(str(error))}") from error
        except (httpx2.UnsupportedProtocol, httpx2.LocalProtocolError, httpx2.InvalidURL) as error:
            raise ImageError(
                f"registry {self.host}: it says what cannot be followed: {_clean(str(error))}", details={"registry": self.host}
            ) from error
        except (httpx2.HTTPError, ssl.SSLError) as error:  # TLS's alerts come after the greeting, and httpx passes them on as they are
            if (refusal := _tls(error)) and refusal.reason in _NAMELESS:
                raise ImageError(
                    f"registry {self.host}: it wants a certificate from those who come",
                    hint=f"Put yours into /etc/containers/certs.d/{self.host}/ as NAME.cert and NAME.key.",
                    details={"registry": self.host},
                ) from error
            raise self.failed(f"registry {self.host}: the connection broke: {_clean(str(error)) or type(error).__name__}") from error

    def failed(self, message: str, *, status: int = 0, retry_after: float = 0.0) -> HostError:
        """What may be otherwise when asked again."""
        return HostError(
            message,
            hint="Look at the name, the network and https_proxy." if not status else "",
            details={"registry": self.host, "status": status, "retry_after": retry_after},
        )

    def _unreachable(self, error: BaseException) -> HostError | ImageError:
        cause = _tls(error)
        self._distrusted = self._distrusted or cause is not None
        if isinstance(cause, ssl.SSLCertVerificationError):
            return ImageError(
                f"registry {self.host}: its certificate does not verify: {cause.verify_message}",
                hint=f"Put its authority's certificate into /etc/containers/certs.d/{self.host}/ca.crt.",
                details={"registry": self.host},
            )
        if cause and cause.reason in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE"):
            return ImageError(
                f"registry {self.host}: it speaks no TLS",
                hint="Only registries on this host may do without, and those that registries.conf calls insecure.",
                details={"registry": self.host},
            )
        return self.failed(f"registry {self.host} cannot be reached: {_clean(str(error))}")

    async def refused(self, response: httpx2.Response, what: str) -> HostError | ImageError:
        """The error for an answer that is none of those hoped for. what: begins the message."""
        status, said = response.status_code, ""
        with contextlib.suppress(HostError, ImageError):
            said = _said(await self.document(response, _DOCUMENT))
        details = {"registry": self.host, "status": status}
        because = f": {said}" if said else ""
        if status == 429 or status >= 500 or status == 408:
            reason = "too many requests" if status == 429 else f"it answers {status}"
            return self.failed(
                f"{what}: {reason}{because}", status=status, retry_after=retry_after(response.headers.get("retry-after", ""))
            )
        if status == 404:
            return ImageError(f"{what}: not there{because}", hint="Look at the name.", details=details)
        if status in (401, 403):
            return ImageError(
                f"{what}: the registry refuses access{because}",
                hint=f"Look at the name; log in with `skopeo login {self.host}` or `docker login {self.host}`.",
                details=details,
            )
        return ImageError(f"{what}: the registry answers {status}{because}", details=details)


def retry_after(value: str) -> float:
    """Seconds that a Retry-After header asks for, at most WAIT; 0 when it says nothing."""
    if value.isascii() and value.isdigit():
        return min(float(value[:9]), WAIT)
    with contextlib.suppress(ValueError, OverflowError):
        return min(max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time()), WAIT)
    return 0.0


def _tls(error: BaseException) -> ssl.SSLError | None:
    """What TLS said about it, if it did."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ssl.SSLError):
        cause = cause.__cause__ or cause.__context__
    return cause


def _client(context: ssl.SSLContext | None) -> httpx2.AsyncClient:
    """Through the environment's proxies, but for what is on this host."""
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=16, keepalive_expiry=60.0)
    direct: dict[str, httpx2.AsyncBaseTransport | None] = dict.fromkeys(f"all://{host}" for host in ("localhost", "127.0.0.1", "[::1]"))
    return httpx2.AsyncClient(verify=context or False, limits=limits, mounts=direct, headers={"user-agent": "ramet"})


async def _once(data: bytes) -> AsyncIterator[bytes]:
    yield data


def body(data: bytes) -> Body:
    """Bytes as a request's body, in pieces: the limit on silence is for each."""

    async def parts() -> AsyncIterator[bytes]:
        view = memoryview(data)
        for at in range(0, len(data), _PIECE):
            yield bytes(view[at : at + _PIECE])

    return parts


def _origin(url: str) -> tuple[str, str | None, int]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"https": 443}.get(parts.scheme, 80)


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def _said(data: bytes) -> str:
    """What a registry's error document says, on one line."""
    document = _json(data)
    if document is None and data[:1] != b"<":  # plain text, and no proxy's page
        return _clean(data.decode(errors="replace"))
    errors = document.get("errors") if isinstance(document, dict) else None
    first = errors[0] if isinstance(errors, list) and errors else document
    if not isinstance(first, dict):
        return ""
    words = [first.get(key) for key in ("code", "message", "details", "error", "error_description")]
    return _clean(", ".join(word for word in words if isinstance(word, str) and word))


def _clean(text: str) -> str:
    """A stranger's words for a terminal: one line, no control characters, not too many."""
    text = _CONTROL.sub(" ", text).strip()
    return text if len(text) <= 300 else text[:300] + "…"


def _shown(url: str) -> str:
    """An address without what may be secret in it."""
    parts = urlsplit(url)
    return _clean(f"{parts.scheme}://{parts.hostname or ''}{parts.path}")
