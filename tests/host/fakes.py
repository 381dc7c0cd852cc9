"""A registry that misbehaves on demand: it serves one layout, counts what is asked of it, and cuts, withholds or falsifies answers."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from .layouts import MANIFEST, Layout


@dataclass
class FakeRegistry:
    """cut: blobs that end early; hang: blobs that never end; false: content served instead. asked: how often each digest was fetched."""

    layout: Layout
    cut: set[str] = field(default_factory=set)
    hang: set[str] = field(default_factory=set)
    false: dict[str, bytes] = field(default_factory=dict)
    asked: Counter[str] = field(default_factory=Counter)
    address: str = ""
    closing: threading.Event = field(default_factory=threading.Event)

    @property
    def reference(self) -> str:
        return f"{self.address}/x:1"


@contextmanager
def serving(layout: Layout) -> Iterator[FakeRegistry]:
    fake = FakeRegistry(layout)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None: ...

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            if self.path.rstrip("/") == "/v2":
                return self.answer(b"{}", "application/json")
            digest = self.path.rpartition("/")[2]
            if "/manifests/" in self.path and not digest.startswith("sha256:"):
                digest = layout.manifest
            if not layout.blob(digest).exists():
                self.send_error(404)
                return None
            data = fake.false.get(digest) or layout.blob(digest).read_bytes()
            if self.command == "GET":
                fake.asked[digest] += 1
            return self.answer(data, MANIFEST if "/manifests/" in self.path else "application/octet-stream", digest)

        def answer(self, data: bytes, kind: str, digest: str = "") -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command == "HEAD":
                return
            half = data[: len(data) // 2]
            if digest in fake.cut:
                self.wfile.write(half)
                self.close_connection = True
            elif digest in fake.hang:
                self.wfile.write(half)
                self.wfile.flush()
                fake.closing.wait(120)
                self.close_connection = True
            else:
                self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    fake.address = f"127.0.0.1:{server.server_port}"
    try:
        yield fake
    finally:
        fake.closing.set()
        server.shutdown()
        thread.join(30)
        server.server_close()
