"""`python -P -m ramet.store.fetcher STORE_ROOT LISTEN_FD`: the process that fetches what is not here, for all machines of a host.

A child of the keeper, so that it outlives the daemon. It holds nothing that would be lost with it: what it fetched is in the blobs' files, verified, and who
waits asks its successor again.

PROTOCOL. JSON, one object a line, over the Unix socket that the keeper made. A question has an `id` and an `op`; any number at one time. Whoever
closes the connection gives up what it asked for. All answers have the question's id; the last one has `ok` or `error` (as the API sends it).

want        head: the layer that is read, at: where in its file, memory: whether it is a memory, frames: [[blob, offset, length, mark in hex], …]. A guest
            waits. For a memory there is no error but for a question that makes no sense: it is tried for ever. For others after RAMET_FETCH_DEADLINE
            seconds.
bring       layers: fetch all that reading them takes; {done, total} in bytes now and then.
trace       layers: fetch what starts from them touched; answered at once.
background  look for what is to be fetched in the background; answered at once.
status      {status: `fetching.Status`}
retry       try what failed now.
watch       {event, …} as `fetching.Notice`, from what waits now on, until the connection is closed.

Environment: RAMET_PEERS (URLs of other hosts' daemons, with commas), RAMET_PEER_TOKEN, RAMET_FETCH_RATE (bytes a second for the background as in 10M,
0 for no background), RAMET_FETCH_DEADLINE (seconds).
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import httpcore2

from ramet import records, units
from ramet.errors import LayerError, RametError, SpecError
from ramet.paths import StoreDir
from ramet.reference import DIGEST
from ramet.store import layer
from ramet.store.bringing import Bringer
from ramet.store.errands import DEADLINE, Errands, notice
from ramet.store.fetching import LINE, Notice, Status
from ramet.store.index import MARK
from ramet.store.keeper import say
from ramet.store.layer import CHUNK
from ramet.store.remote import Want
from ramet.store.schedule import Rank
from ramet.store.stock import LONGEST
from ramet.store.supply import Supply

IDLE = 60.0  # seconds
_EVERY = 0.1  # seconds between two words of progress
_BACKLOG = 1024
_READ = 1 << 20  # bytes that are read from a connection at once
_UNREAD = 16 << 20  # bytes of answers that somebody may leave unread

Question = dict[str, Any]


class Fetcher:
    """All connections share the errands."""

    def __init__(self, errands: Errands, bringer: Bringer) -> None:
        self.errands = errands
        self.bringer = bringer
        self.watchers: dict[Callable[[Notice], None], None] = {}
        errands.heard = self._heard

    def _heard(self, what: Notice) -> None:
        for watcher in list(self.watchers):
            watcher(what)

    def status(self) -> Status:
        waiting = (errand.waiting() for errand in self.errands.foreground)
        return Status(
            fetched=self.errands.fetched,
            peers=self.errands.from_peers,
            requests=self.errands.requests,
            foreground=len(self.errands.foreground),
            background=self.bringer.to_go,
            waiting=tuple(each for each in waiting if each),
        )


class Connection:
    """One who asks."""

    def __init__(self, fetcher: Fetcher, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._fetcher = fetcher
        self._reader = reader
        self._writer = writer
        self._tasks: set[asyncio.Task[None]] = set()
        self._ops: dict[str, Callable[[int, Question], Awaitable[None]]] = {
            "want": self._want,
            "bring": self._bring,
            "trace": self._trace,
            "background": self._background,
            "status": self._status,
            "retry": self._retry,
            "watch": self._watch,
        }

    async def serve(self) -> None:
        """Answer until the connection is closed."""
        try:
            while line := await self._reader.readline():
                question = json.loads(line)
                task = asyncio.ensure_future(self._answer(question))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
        except (OSError, ValueError) as error:  # ValueError: no JSON, or a line without end
            if isinstance(error, ValueError):
                say(f"a question that is none: {error}")
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            self._writer.transport.abort()

    async def _answer(self, question: Question) -> None:
        number = question["id"]
        try:
            await self._ops[question["op"]](number, question)
        except RametError as error:
            self._say(number, error=error.wire())
        except (KeyError, ValueError, TypeError) as error:
            self._say(number, error=SpecError(f"the fetcher does not understand the question: {error!r}").wire())

    def _say(self, number: int, **words: Any) -> None:
        if self._writer.transport.get_write_buffer_size() > _UNREAD:
            self._writer.transport.abort()
        self._writer.write(json.dumps({"id": number, **words}).encode() + b"\n")

    async def _want(self, number: int, question: Question) -> None:
        frames = [_frame(*each) for each in question["frames"]]
        head, memory = _layer(question["head"]), bool(question["memory"])
        self._fetcher.bringer.read(head, frames, memory=memory)
        patience = float("inf") if memory else None
        await self._fetcher.errands.fetch(frames, Rank.FOREGROUND, head=head, patience=patience)
        self._say(number, ok=True)
        if memory:
            self._fetcher.bringer.warmer.warm(head, [int(question["at"]) // CHUNK])

    async def _bring(self, number: int, question: Question) -> None:
        loop = asyncio.get_running_loop()
        said = -_EVERY

        def tell(done: int, total: int) -> None:
            nonlocal said
            if loop.time() - said >= _EVERY:
                said = loop.time()
                self._say(number, done=done, total=total)

        await self._fetcher.bringer.bring(list(map(_layer, question["layers"])), tell)
        self._say(number, ok=True)

    async def _trace(self, number: int, question: Question) -> None:
        self._fetcher.bringer.trace(list(map(_layer, question["layers"])))
        self._say(number, ok=True)

    async def _background(self, number: int, question: Question) -> None:
        self._fetcher.bringer.look()
        self._say(number, ok=True)

    async def _status(self, number: int, question: Question) -> None:
        self._say(number, ok=True, status=records.dump(self._fetcher.status()))

    async def _retry(self, number: int, question: Question) -> None:
        self._fetcher.errands.retry()
        self._say(number, ok=True)

    async def _watch(self, number: int, question: Question) -> None:
        def tell(what: Notice) -> None:
            self._say(number, **records.dump(what))

        for errand in self._fetcher.errands.foreground:
            if errand.announced and (waiting := errand.waiting()):
                tell(notice("waiting", waiting))
        self._fetcher.watchers[tell] = None
        try:
            await asyncio.get_running_loop().create_future()  # until the connection is closed
        finally:
            del self._fetcher.watchers[tell]


def _layer(name: Any) -> str:
    if not isinstance(name, str) or not layer.is_id(name):
        raise ValueError(f"{name!r} is no layer's id")
    return name


def _frame(blob: str, offset: int, length: int, mark: str) -> Want:
    if not DIGEST.fullmatch(blob) or offset < 0 or length <= 0 or len(found := bytes.fromhex(mark)) != MARK:
        raise ValueError("a frame that is none")
    if length > LONGEST:
        raise LayerError(f"a layer names a frame of {length} bytes in blob {blob} at {offset}: none is longer than {LONGEST}")
    return Want(blob=blob, offset=offset, length=length, mark=found)


async def serve(files: StoreDir, listener: socket.socket) -> None:
    """Serve a listening socket until nobody is connected and nothing is to be done, for a while."""
    loop = asyncio.get_running_loop()
    listener.setblocking(False)
    listener.listen(_BACKLOG)
    peers = [each.strip() for each in os.environ.get("RAMET_PEERS", "").split(",") if each.strip()]
    connections: set[asyncio.Task[None]] = set()
    async with Supply.open(files, peers, os.environ.get("RAMET_PEER_TOKEN", "")) as supply:
        errands = Errands(files, supply, deadline=_seconds("RAMET_FETCH_DEADLINE", DEADLINE), rate=(rate := _rate()) or 0)
        bringer = Bringer(files, errands)
        fetcher = Fetcher(errands, bringer)
        if rate != 0:
            errands.start(bringer.background())
            bringer.look()
        try:
            while True:
                try:
                    async with asyncio.timeout(IDLE):
                        line, _ = await loop.sock_accept(listener)
                except TimeoutError:
                    if connections or errands.busy or (rate != 0 and bringer.busy):
                        continue
                    return
                # Not a server of asyncio's: it would own the listening socket, which is the keeper's.
                reader, writer = await asyncio.open_unix_connection(sock=line, limit=LINE)
                task = loop.create_task(Connection(fetcher, reader, writer).serve())
                connections.add(task)
                task.add_done_callback(connections.discard)
        finally:
            for task in connections:
                task.cancel()
            await asyncio.gather(*connections, return_exceptions=True)
            await errands.close()


def _rate() -> int | None:
    """RAMET_FETCH_RATE in bytes a second; None for no limit."""
    text = os.environ.get("RAMET_FETCH_RATE", "")
    try:
        return units.parse_size(text) if text else None
    except ValueError as error:
        say(f"RAMET_FETCH_RATE is ignored: {error}")
        return None


def _seconds(name: str, default: float) -> float:
    text = os.environ.get(name, "")
    try:
        found = float(text) if text else default
    except ValueError:
        found = -1.0
    if found < 0:
        say(f"{name} is ignored: {text!r} is no number of seconds")
        return default
    return found


def main(argv: Sequence[str]) -> int:
    """Fetch until there is nothing to fetch; whoever connects later has the keeper start another."""
    root, fd = argv
    # Measured: every piece of a download costs 0.1 ms of one core, and in pieces of 64 KiB that is more than all the rest.
    httpcore2.AsyncHTTP11Connection.READ_NUM_BYTES = _READ
    with socket.socket(fileno=int(fd)) as listener:
        asyncio.run(serve(StoreDir(root=Path(root)), listener))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
