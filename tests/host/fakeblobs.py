"""Blobs over HTTP, from files: as a registry serves them and as another host's daemon does, and as badly as a test wants. Also a fetcher to ask for them."""

from __future__ import annotations

import os
import random
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from ramet import sockets
from ramet.paths import StateDir, StoreDir
from ramet.store import index, remote
from ramet.store.layer import PAGE, Kind, Layer
from ramet.store.remote import Source, Want
from ramet.store.runs import Runs
from ramet.store.store import Store

DEADLINE = 60.0
PATH = "acme/shop"


@dataclass
class FakeBlobs:
    """files: whose blobs are served. token: what a peer's daemon wants. status, headers: of every answer, when not 200.

    wrong: (digest, offset) of bytes that are flipped; cut: bytes of a body after which the connection breaks; held: blobs whose bodies stop before
    their last byte until `open` is set. asked: digest, begin and end of all answers with bytes, sent: how many bytes those were.
    """

    files: StoreDir
    token: str = ""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    wrong: set[tuple[str, int]] = field(default_factory=set)
    cut: int = -1
    held: set[str] = field(default_factory=set)
    asked: list[tuple[str, int, int]] = field(default_factory=list)
    sent: int = 0
    tries: int = 0
    address: str = ""
    open: threading.Event = field(default_factory=threading.Event)

    @property
    def url(self) -> str:
        return f"http://{self.address}"

    def source(self) -> Source:
        return Source(host=self.address, path=PATH)

    def body(self, digest: str, begin: int, end: int) -> bytes:
        with open(self.files.blob(digest), "rb") as file:
            file.seek(begin)
            data = bytearray(file.read(end - begin))
        for name, offset in self.wrong:
            if name == digest and begin <= offset < end:
                data[offset - begin] ^= 1
        return bytes(data)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    fake: FakeBlobs

    def log_message(self, *_: object) -> None: ...

    def do_GET(self) -> None:
        self.fake.tries += 1
        found = re.fullmatch(rf"/(?:v2/{PATH}|v1)/blobs/(sha256:[0-9a-f]{{64}})", self.path)
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if self.fake.status != 200:
            return self.refuse(self.fake.status)
        if self.path.startswith("/v1/") and self.headers.get("Authorization") != f"Bearer {self.fake.token}":
            return self.refuse(401)
        if not found or not wanted or not self.fake.files.blob(found[1]).exists():
            return self.refuse(404)
        size = self.fake.files.blob(found[1]).stat().st_size
        begin, end = int(wanted[1]), min(int(wanted[2]) + 1, size)
        if begin >= end:
            return self.refuse(416)
        return self.give(found[1], begin, end, size)

    def give(self, digest: str, begin: int, end: int, size: int) -> None:
        fake = self.fake
        fake.asked.append((digest, begin, end))
        data = fake.body(digest, begin, end)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{size}")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if 0 <= fake.cut < len(data):
            self.wfile.write(data[: fake.cut])
            self.close_connection = True
            return
        fake.sent += len(data)
        self.wfile.write(data[:-1])
        self.wfile.flush()
        if digest in fake.held:
            fake.open.wait(DEADLINE)
        self.wfile.write(data[-1:])

    def refuse(self, status: int) -> None:
        self.send_response(status)
        for name, value in self.fake.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def handle(self) -> None:
        try:
            super().handle()
        except ConnectionError:  # the other end is killed now and then
            self.close_connection = True


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


@contextmanager
def serving(files: StoreDir, port: int = 0) -> Iterator[FakeBlobs]:
    fake = FakeBlobs(files)
    server = _Server(("127.0.0.1", port), type("Handler", (_Handler,), {"fake": fake}))
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    fake.address = f"127.0.0.1:{server.server_port}"
    try:
        yield fake
    finally:
        fake.open.set()
        server.shutdown()
        thread.join(30)
        server.server_close()


@dataclass
class Fetching:
    """A fetcher process, and the socket that a keeper would hold. errors: what it printed."""

    files: StoreDir
    environment: Mapping[str, str]
    log: Path
    listener: socket.socket
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """As the keeper does: one, if none runs."""
        if self.process and self.process.poll() is None:
            return
        command = [sys.executable, "-P", "-m", "ramet.store.fetcher", str(self.files.root), str(self.listener.fileno())]
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                command, pass_fds=[self.listener.fileno()], env={**os.environ, **self.environment}, stderr=log, stdout=log
            )

    def kill(self) -> None:
        if self.process:
            self.process.kill()
            self.process.wait(DEADLINE)


@contextmanager
def fetching(files: StoreDir, **environment: str) -> Iterator[Fetching]:
    with sockets.listen(files.fetch) as listener:
        listener.listen(128)
        found = Fetching(files, environment, files.root / "fetcher.log", listener)
        found.start()
        try:
            yield found
        finally:
            found.kill()


def store(root: Path) -> Store:
    state = StateDir(root=root)
    state.create()
    return Store(state.store)


def layer(made: Store, chunks: int, *, seed: int = 0, parent: str = "", first: int = 0) -> Layer:
    """A sealed memory layer with so many chunks of 64 KiB that compress to a half, from chunk `first` on, and as many that are zero behind them."""
    content = random.Random(seed)
    size = 256 * 16 * PAGE
    with made.draft(Kind.MEMORY, size, parent) as draft:
        with open(draft.spool, "wb") as file:
            for _ in range(chunks * 16):
                file.write(content.randbytes(PAGE // 2) + bytes(PAGE // 2))
        record = made.publish(draft, Runs.build([(first * 16, chunks * 16, 0)]), durable=True)
    return made.seal(record.id)


def lend(source: StoreDir, target: StoreDir, records: list[Layer], place: Source) -> None:
    """Have layers of one store in another one, as a lazy pull has: all but the blobs."""
    for record in records:
        shutil.copytree(source.layer(record.id).root, target.layer(record.id).root)
        for digest in record.blobs:
            remote.expect(target, digest, source.blob(digest).stat().st_size, place)


def frames(files: StoreDir, record: Layer) -> list[Want]:
    """Of a layer's own chunks, in order."""
    found = index.of_layer(files.layer(record.id), record)
    return [
        Want(blob=record.blobs[found.blob[row]], offset=found.offset[row], length=found.length[row], mark=found.mark(row))
        for row in range(len(found))
        if found.length[row]
    ]


def same(one: StoreDir, other: StoreDir, wants: list[Want]) -> bool:
    """Whether two stores have the same bytes there."""
    return all(_read(one, want) == _read(other, want) for want in wants)


def _read(files: StoreDir, want: Want) -> bytes:
    with open(files.blob(want.blob), "rb") as file:
        file.seek(want.offset)
        return file.read(want.length)
