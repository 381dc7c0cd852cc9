"""A token server for docker-registry: Bearer tokens by distribution's token authentication, signed by openssl."""

from __future__ import annotations

import base64
import json
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

DEADLINE = 60.0
SERVICE, ISSUER, REFRESH = "the registry", "the tests", "a-refresh-token"


@dataclass(kw_only=True)
class Tokens:
    """credentials: `user:password`, who may do everything; others may read what is below `public/`. lasts: seconds. asked: the scopes of each token."""

    credentials: str
    key: Path
    certificate: Path
    lasts: int = 300
    asked: list[list[str]] = field(default_factory=list)
    realm: str = ""

    def settings(self) -> dict[str, Any]:
        """For a registry's configuration."""
        return {"token": {"realm": self.realm, "service": SERVICE, "issuer": ISSUER, "rootcertbundle": str(self.certificate)}}

    def token(self, user: str, scopes: list[str]) -> str:
        self.asked.append(scopes)
        now = int(time.time())
        access = []
        for scope in scopes:
            kind, name, actions = scope.split(":")
            allowed = actions.split(",") if user else ["pull"] if name.startswith("public/") else []
            access.append({"type": kind, "name": name, "actions": allowed})
        chain = [base64.b64encode(ssl.PEM_cert_to_DER_cert(self.certificate.read_text())).decode()]
        times = {"nbf": now - 60, "iat": now, "exp": now + max(self.lasts, 60)}
        claims = {"iss": ISSUER, "sub": user, "aud": SERVICE, "jti": str(len(self.asked)), "access": access}
        signed = b".".join(_part(json.dumps(each).encode()) for each in ({"typ": "JWT", "alg": "RS256", "x5c": chain}, claims | times))
        sign = ["openssl", "dgst", "-sha256", "-sign", str(self.key)]
        return (
            signed + b"." + _part(subprocess.run(sign, input=signed, check=True, capture_output=True, timeout=DEADLINE).stdout)
        ).decode()


def _part(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")


@contextmanager
def serving(tokens: Tokens) -> Iterator[None]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

        def do_GET(self) -> None:
            query = parse_qs(urlsplit(self.path).query)
            given = self.headers.get("Authorization", "")
            user = tokens.credentials.partition(":")[0] if given else ""
            if given and given != "Basic " + base64.b64encode(tokens.credentials.encode()).decode():
                return self.answer(401, {"errors": [{"code": "UNAUTHORIZED", "message": "wrong password"}]})
            return self.give(user, query.get("scope", []), query.get("service", []))

        def do_POST(self) -> None:
            form = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
            if form.get("grant_type") != ["refresh_token"] or form.get("refresh_token") != [REFRESH]:
                return self.answer(400, {"error": "invalid_grant", "error_description": "no such refresh token"})
            return self.give("refreshed", form["scope"][0].split(), form.get("service", []))

        def give(self, user: str, scopes: list[str], service: list[str]) -> None:
            assert service == [SERVICE]
            self.answer(200, {"token": tokens.token(user, scopes), "expires_in": tokens.lasts})

        def answer(self, status: int, document: dict[str, Any]) -> None:
            data = json.dumps(document).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        tokens.realm = f"http://127.0.0.1:{server.server_address[1]}/token?fixed=1"
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()
