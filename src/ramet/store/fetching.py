"""The daemon's line to the fetcher (`ramet.store.fetcher`), and a blocking one for threads and the seal process. PROTOCOL there says what is sent.

The keeper holds the listening socket, so a connection is accepted as soon as a fetcher runs; `nudge` has the keeper start one if none does. When a
fetcher dies, its successor is asked again: it fetches only what is not here.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ramet import records, sockets
from ramet.errors import AbsentError, HostError, from_wire
from ramet.paths import StoreDir
from ramet.store import wanting
from ramet.store.remote import Want

PATIENCE = 30.0  # seconds for a fetcher to start or to be replaced, and for an answer that needs no network
LINE = 4 << 20  # bytes of the longest line
BATCH = 256  # frames of one want
_TRIES = 5  # fetchers in a row that may die over one question
_HINT = "`ramet fsck` and the store's imagefs.log may say more."

Progress = Callable[[int, int], None]  # bytes that are here, bytes in all


@dataclass(frozen=True, kw_only=True)
class Waiting:
    """Somebody waits for a chunk that could not be fetched so far. head: the layer that is read; memory: it is a memory, and waits for ever;
    since: Unix; reason: a sentence's rest, names the host."""

    head: str
    memory: bool
    blob: str
    offset: int
    since: float
    reason: str


@dataclass(frozen=True, kw_only=True)
class Status:
    """fetched: bytes since the fetcher's start, of these from peers; requests: over the network; foreground: reads that wait; background: bytes to go."""

    fetched: int = 0
    peers: int = 0
    requests: int = 0
    foreground: int = 0
    background: int = 0
    waiting: tuple[Waiting, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Notice:
    """event: `waiting` (from now on, or for another reason), `served` (nothing of that head waits any more), `failed` (a read of a disk was answered
    with an error; others of that head may still wait). All but the head is empty for `served`."""

    event: str
    head: str
    memory: bool = False
    blob: str = ""
    offset: int = 0
    since: float = 0.0
    reason: str = ""


class Fetcher:
    """What is asked for is given up when the task that asks is cancelled."""

    def __init__(self, files: StoreDir, nudge: Callable[[], None]) -> None:
        self._files = files
        self._nudge = nudge

    @classmethod
    @contextlib.asynccontextmanager
    async def connect(cls, files: StoreDir, nudge: Callable[[], None]) -> AsyncIterator[Fetcher]:
        """Ask the fetcher of a store. nudge: has the keeper start one where none runs. HostError when the image file system is not there."""
        line = cls(files, nudge)
        async with line._open():
            yield line

    async def bring(self, layers: Iterable[str], progress: Progress | None = None) -> None:
        """Fetch all that reading these layers can need; what is here is verified, not fetched again. AbsentError, HostError, LayerError: it cannot be had."""
        async for said in self._ask("bring", layers=list(layers)):
            if progress and "total" in said:
                progress(int(said["done"]), int(said["total"]))

    async def trace(self, layers: Iterable[str]) -> None:
        """Have what starts from these layers touched before fetched soon; does not wait for it."""
        await self._told("trace", layers=list(layers))

    async def background(self) -> None:
        """Look for what is to be fetched in the background."""
        await self._told("background")

    async def retry(self) -> None:
        """Try at once what failed and waits to be tried again."""
        await self._told("retry")

    async def status(self) -> Status:
        said = await self._told("status")
        return records.load(Status, said.get("status"), "status")

    async def watch(self) -> AsyncGenerator[Notice, None]:
        """What reads wait for, from what does so now on; ends when the image file system does. After a fetcher's death all that waited is
        said to be served: what still waits is said anew."""
        waiting: set[str] = set()
        while True:
            with contextlib.suppress(ConnectionError):
                async for said in self._once("watch"):
                    notice = records.load(Notice, {key: value for key, value in said.items() if key != "id"}, "notice")
                    (waiting.add if notice.event == "waiting" else waiting.discard)(notice.head)
                    yield notice
            for head in sorted(waiting):
                yield Notice(event="served", head=head)
            waiting.clear()

    async def _told(self, op: str, **words: Any) -> dict[str, Any]:
        async with asyncio.timeout(PATIENCE * 2):
            return [said async for said in self._ask(op, **words)][-1]

    async def _ask(self, op: str, **words: Any) -> AsyncIterator[dict[str, Any]]:
        """The answers to a question, of one fetcher after the other if they die over it."""
        for _ in range(_TRIES):
            try:
                async for said in self._once(op, **words):
                    yield said
                return
            except ConnectionError:
                continue
        raise HostError(f"the store's fetcher ended {_TRIES} times in a row while it was asked to {op}", hint=_HINT)

    async def _once(self, op: str, **words: Any) -> AsyncIterator[dict[str, Any]]:
        """The answers of one fetcher, the last one included. The error that it answers with; ConnectionError when it ends before."""
        async with self._open() as (reader, writer):
            writer.write(json.dumps({"id": 1, "op": op, **words}).encode() + b"\n")
            await writer.drain()
            while line := await reader.readline():
                said = json.loads(line)
                if error := said.get("error"):
                    raise from_wire(error)
                yield said
                if said.get("ok"):
                    return
        raise ConnectionResetError("the fetcher ended")

    @contextlib.asynccontextmanager
    async def _open(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        """A connection. Each question has its own, so that closing it gives the question up."""
        reader = asyncio.StreamReader(limit=LINE)
        try:
            async with asyncio.timeout(PATIENCE):
                transport, protocol = await sockets.connect(self._files.fetch, lambda: asyncio.StreamReaderProtocol(reader))
        except (OSError, TimeoutError) as error:
            raise _gone(self._files, error) from error
        try:
            self._nudge()
            yield reader, asyncio.StreamWriter(transport, protocol, reader, asyncio.get_running_loop())
        finally:
            transport.abort()


def fetch_now(
    files: StoreDir, head: str, wants: Sequence[Want], *, deadline: float = 60.0, nudge: Callable[[], None] = lambda: None
) -> None:
    """Have frames here when this returns; blocks. head: the layer that is read. AbsentError when they cannot be had within so many seconds,
    HostError when there is no image file system to ask. A fetcher that dies is asked again where `nudge` starts one, or another question does."""
    end = time.monotonic() + deadline
    for at in range(0, len(wants), BATCH):
        question = wanting.message(1, head, wants[at : at + BATCH], memory=False)
        while (answer := _asked(files, question, end, nudge)) is None:
            pass
        if answer.get("error"):
            raise from_wire(answer["error"])


def _asked(files: StoreDir, question: bytes, end: float, nudge: Callable[[], None]) -> dict[str, Any] | None:
    """The answer; None when the fetcher ended before it gave one."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as line:
        _limit(line, end)
        try:
            with sockets.address(files.fetch) as short:
                line.connect(short)
        except OSError as error:
            raise _gone(files, error) from error
        nudge()
        try:
            _limit(line, end)
            line.sendall(question)
            found = bytearray()
            while not found.endswith(b"\n"):
                _limit(line, end)
                if not (more := line.recv(1 << 16)):
                    return None
                found += more
        except TimeoutError as error:
            raise AbsentError("chunks that are not here were not fetched in time") from error
        except ConnectionError:
            return None
        answer: dict[str, Any] = json.loads(found)
        return answer


def _limit(line: socket.socket, end: float) -> None:
    left = end - time.monotonic()
    if left <= 0:
        raise AbsentError("chunks that are not here were not fetched in time")
    line.settimeout(left)


def _gone(files: StoreDir, error: Exception) -> HostError:
    return HostError(f"what is not here cannot be fetched: nobody listens at {files.fetch}: {error}", hint=_HINT)
