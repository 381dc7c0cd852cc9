"""What is fetched that no guest waits for: what is likely to be read next, what starts touched before, whole blobs."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain as joined
from typing import TypeVar

from ramet.errors import LayerError, RametError
from ramet.paths import StoreDir
from ramet.store import disk, garbage, remote, stock, tracing
from ramet.store.chain import Chain
from ramet.store.errands import Errands
from ramet.store.keeper import say
from ramet.store.layer import Layer
from ramet.store.remote import Remote, Want
from ramet.store.schedule import SPAN, Rank, Readers
from ramet.store.stock import Table
from ramet.store.warming import Warmer

_SIDES = 3  # blobs at one time, so that one that is being verified does not hold up the line
_TABLES = 64  # blobs whose frames are remembered for reading ahead
_PART = 64  # chunks of a trace that are in the page cache together
_GROUP = 2 * SPAN[Rank.BRING]
AGAIN = 60.0  # seconds until the background tries again what it could not have

Tell = Callable[[int, int], None]
T = TypeVar("T")


@dataclass
class _Read:
    """A blob that guests read. table: its frames, once somebody reads on and on."""

    readers: Readers = field(default_factory=Readers)
    table: asyncio.Future[Table] | None = None


class Bringer:
    """One for a fetcher."""

    def __init__(self, files: StoreDir, errands: Errands) -> None:
        self._files = files
        self._errands = errands
        self._read: OrderedDict[str, _Read] = OrderedDict()
        self._tracing: set[str] = set()
        self._look = asyncio.Event()
        self._looking = False
        self.to_go = 0
        self.warmer = Warmer(files, errands.start)

    def read(self, head: str, frames: Sequence[Want], *, memory: bool = False) -> None:
        """A guest reads frames of a layer, in order: if it reads on and on, what follows is fetched; of a memory, what lies around."""
        for frame in frames:
            found = self._read.setdefault(frame.blob, _Read())
            self._read.move_to_end(frame.blob)
            if len(self._read) > _TABLES:
                self._read.popitem(last=False)
            ahead = found.readers.touch(frame.offset, frame.offset + frame.length)
            if memory and not ahead:
                half = self._errands.around.length // 2
                ahead = frame.offset - half, frame.offset + frame.length + half
            if ahead:
                found.table = found.table or asyncio.ensure_future(asyncio.to_thread(self._table, head, frame.blob))
                self._errands.start(self._ahead(found.table, *ahead))

    def trace(self, layers: Iterable[str]) -> None:
        """Fetch what starts from the layers touched."""
        for name in layers:
            if name not in self._tracing:
                self._tracing.add(name)
                self._errands.start(self._trace(name))

    async def bring(self, layers: Sequence[str], tell: Tell) -> None:
        """Have all of the blobs here that reading the layers takes. tell: bytes that are here, bytes in all."""
        records = await asyncio.to_thread(stock.needed, self._files, layers)
        blobs = await asyncio.to_thread(stock.lacking, self._files, records)
        done, total = 0, sum(each.size for each in blobs)
        tell(done, total)

        def came(count: int) -> None:
            nonlocal done
            done += count
            tell(done, total)

        async def one(each: Remote) -> None:
            await self._whole(each, records, Rank.BRING, came)

        await _side_by_side(_SIDES, iter(blobs), one)

    @property
    def busy(self) -> bool:
        """Whether the background has something to do, now or later."""
        return self._looking or self._look.is_set() or bool(self._tracing)

    def look(self) -> None:
        """There may be something to fetch in the background."""
        self._look.set()

    async def background(self) -> None:
        """Fetch whatever is not here, for ever: traces first, one blob after the other. What fails is left for later."""
        loop = asyncio.get_running_loop()
        while True:
            await self._look.wait()
            self._look.clear()
            self._looking = True
            await self._errands.calm()
            try:
                failed = await self._pass()
            except (RametError, OSError) as error:
                failed = str(error)
            if failed:
                say(f"the background goes on later: {failed}")
                loop.call_later(AGAIN, self.look)
            self._looking = bool(failed)

    async def _pass(self) -> str:
        """Fetch what is not here; why some of it still is not, if so."""
        failed = ""
        records = await asyncio.to_thread(garbage.readable, self._files)
        blobs = [each for each in await asyncio.to_thread(stock.lacking, self._files, records) if not each.evicted]
        self.to_go = sum(remote.absent(self._files, each.digest) for each in blobs)
        digests = {each.digest for each in blobs}
        for record in records:
            with contextlib.suppress(RametError):  # it fails below again
                _, parts = await asyncio.to_thread(self._traced, record.id)
                frames = [each for _, part in parts for each in part if each.blob in digests]
                await self._errands.fetch(frames, Rank.BACKGROUND, patience=0, tell=self._came)
        for each in blobs:
            if await asyncio.to_thread(stock.is_cramped, self._files.blobs):
                return "the disk is almost full"
            try:
                await self._whole(each, records, Rank.BACKGROUND, self._came)
            except RametError as error:
                failed = error.message
        return failed

    def _came(self, count: int) -> None:
        self.to_go = max(0, self.to_go - count)

    def _table(self, head: str, digest: str) -> Table:
        return stock.table(self._files, digest, stock.needed(self._files, [head]))

    async def _ahead(self, known: asyncio.Future[Table], begin: int, end: int) -> None:
        with contextlib.suppress(RametError):
            table = await asyncio.shield(known)
            await self._errands.fetch(table.between(begin, end), Rank.AHEAD, patience=0)

    async def _trace(self, name: str) -> None:
        async def one(part: Sequence[int], frames: list[Want]) -> None:
            await self._errands.fetch(frames, Rank.TRACE)
            if memory:
                self.warmer.warm(name, part)

        try:
            memory, parts = await asyncio.to_thread(self._traced, name)
            lacking = await asyncio.to_thread(lambda: [(part, left) for part, frames in parts if (left := self._errands.missing(frames))])
            await asyncio.gather(*(one(part, left) for part, left in lacking))
        except RametError as error:
            say(f"the trace of layer {name}: {error.message}")
        finally:
            self._tracing.discard(name)

    def _traced(self, name: str) -> tuple[bool, list[tuple[list[int], list[Want]]]]:
        """Whether a layer is a memory, and its trace in parts: chunks, and the frames that they take, in order."""
        if not (chunks := tracing.load(self._files, name)):
            return False, []
        parts = [chunks[at : at + _PART] for at in range(0, len(chunks), _PART)]
        with Chain.open(self._files, name) as chain:
            return chain.memory, [(part, chain.traced(part)) for part in parts]

    async def _whole(self, found: Remote, records: Sequence[Layer], rank: Rank, came: Callable[[int], None]) -> None:
        """Have all of a blob here, and verify it as a whole. Nobody gives up chunks of it meanwhile. LayerError when that fails though each frame is right."""
        lock = await asyncio.to_thread(disk.lock, self._files.blob(found.digest))
        try:
            await self._fetch(found, records, rank, came)
        finally:
            os.close(lock)

    async def _fetch(self, found: Remote, records: Sequence[Layer], rank: Rank, came: Callable[[int], None]) -> None:
        table = await asyncio.to_thread(stock.table, self._files, found.digest, records)
        missing = await asyncio.to_thread(stock.missing, self._files, found.size, table)
        if rank is Rank.BRING:
            came(found.size - missing.size)
        await self._groups(missing, rank, came)
        if await asyncio.to_thread(stock.settle, self._files, found.digest):
            return
        # What no frame covers may be wrong, nothing else: frames were verified, or are fetched again by whoever reads them.
        again = joined.from_iterable(stock.raw(found.digest, begin, end) for begin, end in stock.uncovered(found.size, table))
        await self._groups(again, rank, lambda count: None)
        if not await asyncio.to_thread(stock.settle, self._files, found.digest):
            where = ", ".join(source.host for source in found.sources)
            raise LayerError(
                f"blob {found.digest} does not match its digest: what {where} has of it is not what it should be",
                hint="Whoever pushed it can push it again.",
            )

    async def _groups(self, frames: Iterable[Want], rank: Rank, came: Callable[[int], None]) -> None:
        """Fetch frames, not too many at one time: whoever comes next with a higher rank is not kept waiting, and memory is limited."""

        async def one(group: list[Want]) -> None:
            if rank is Rank.BACKGROUND:
                await self._errands.fetch(group, rank, patience=0, tell=came)
            else:
                await self._errands.fetch(group, rank, tell=came)

        await _side_by_side(2, _grouped(frames), one)


def _grouped(frames: Iterable[Want]) -> Iterator[list[Want]]:
    group: list[Want] = []
    size = 0
    for frame in frames:
        group.append(frame)
        size += frame.length
        if size >= _GROUP:
            yield group
            group, size = [], 0
    if group:
        yield group


async def _side_by_side(count: int, items: Iterator[T], work: Callable[[T], Awaitable[None]]) -> None:
    """Do something with all items, so many at one time; the first error ends it."""

    async def side() -> None:
        for item in items:
            await work(item)

    sides = [asyncio.ensure_future(side()) for _ in range(count)]
    try:
        await asyncio.gather(*sides)
    finally:
        for each in sides:
            each.cancel()
        await asyncio.gather(*sides, return_exceptions=True)
