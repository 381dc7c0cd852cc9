"""Frames are fetched for those who want them: requests are made as `schedule` says, what comes is verified and written, what fails is tried again."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import time
import traceback
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable
from dataclasses import dataclass, field
from typing import Any

from ramet.errors import AbsentError, HostError, ImageError, LayerError, NoSpaceError, NotFoundError, RametError
from ramet.paths import StoreDir
from ramet.store import stock
from ramet.store.fetching import Notice, Waiting
from ramet.store.keeper import say
from ramet.store.remote import Want
from ramet.store.schedule import Around, Rank, Request, Schedule, backoff
from ramet.store.supply import Place, Supply
from ramet.watch import uncut

DEADLINE = 60.0  # seconds for which the read of a disk is tried
SILENCE = 15.0  # seconds without a byte after which a request has failed
MOMENT = 1.0  # seconds that a read must have been failing before others hear of it
CALM = 10.0  # seconds without a read that waits until the background goes on: a guest that starts computes between its reads
_INLINE = 256 << 10  # bytes that are hashed and written without a thread, which costs more
_MANY = 64  # frames that are not looked for in the loop's thread: hashing them would hold up guests
_GATHERED = 1 << 20  # bytes of which nobody waits for the first
_POLITE = 60.0  # seconds that a registry's Retry-After is believed


@dataclass(eq=False, kw_only=True)
class Errand:
    """Frames that somebody waits for. patience: seconds without a frame after which a failure ends the errand; limit: when that is, by the loop's clock.

    since: Unix. failed, reason: the frame that could not be had last, and why. announced: the reason that others have heard of.
    """

    rank: Rank
    left: dict[Want, None]
    over: asyncio.Future[None]
    patience: float
    limit: float
    head: str = ""
    tell: Callable[[int], None] | None = None
    since: float = field(default_factory=time.time)
    failed: Want | None = None
    reason: str = ""
    announced: str = ""

    @property
    def endless(self) -> bool:
        return self.patience == float("inf")

    def waiting(self) -> Waiting | None:
        """What it waits for, when that could not be had so far."""
        if self.failed is None:
            return None
        blob, offset = self.failed.blob, self.failed.offset
        return Waiting(head=self.head, memory=self.endless, blob=blob, offset=offset, since=self.since, reason=self.reason)

    def end(self, error: RametError | None = None) -> None:
        if not self.over.done():
            self.over.set_exception(error) if error else self.over.set_result(None)


class Errands:
    """fetched, requests: bytes and requests over the network since the begin. heard: told what reads wait for.

    deadline: seconds for which the read of a disk is tried. rate: bytes a second for the background, 0: any. calm: see CALM.
    """

    def __init__(self, files: StoreDir, supply: Supply, *, deadline: float = DEADLINE, rate: int = 0, calm: float = CALM) -> None:
        self.fetched = 0
        self.from_peers = 0
        self.requests = 0
        self.heard: Callable[[Notice], None] = lambda notice: None
        self.foreground: dict[Errand, None] = {}
        self.around = Around()
        self._files = files
        self._supply = supply
        self._deadline = deadline
        self._rate = rate
        self._calm = calm
        self._schedule = Schedule()
        self._errands: dict[Want, dict[Errand, None]] = {}
        self._failures: dict[Want | str, int] = {}
        self._asked_to_wait: set[str] = set()
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._stirred = False
        self._changed = asyncio.Event()
        self._urgent_at = self._loop.time()

    async def fetch(
        self,
        frames: Iterable[Want],
        rank: Rank,
        *,
        head: str = "",
        patience: float | None = None,
        tell: Callable[[int], None] | None = None,
    ) -> None:
        """Have frames here. AbsentError when they could not be had: at the first failure after `patience` seconds without a frame, by default the deadline's.

        tell: the length of each one as it comes, first of all that are here.
        """
        frames = dict.fromkeys(frames)
        missing = list(frames)
        if len(frames) > _MANY:
            missing = await asyncio.to_thread(self.missing, frames)
        missing = self.missing(missing)  # without an await between this and the errand, or some would be fetched twice
        if tell and len(missing) < len(frames):
            tell(sum(frame.length for frame in frames) - sum(frame.length for frame in missing))
        if not missing:
            return
        patience = self._deadline if patience is None else patience
        errand = Errand(
            rank=rank,
            left=dict.fromkeys(missing),
            over=self._loop.create_future(),
            patience=patience,
            limit=self._loop.time() + patience,
            head=head,
            tell=tell,
        )
        if rank is Rank.FOREGROUND:
            self._encourage(missing)
            self.foreground[errand] = None
        for frame in missing:
            self._errands.setdefault(frame, {})[errand] = None
        self._schedule.add(missing, rank)
        self._stir()
        try:
            await errand.over
        finally:
            self._leave(errand)

    def retry(self) -> None:
        """Try what failed now."""
        self._schedule.release()
        self._failures.clear()
        self._stir()

    @property
    def busy(self) -> bool:
        """Whether anything is wanted, or under way."""
        return bool(self._errands) or self._schedule.requests > 0

    def start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Do something beside; ended by `close`."""
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def close(self) -> None:
        if self._timer:
            self._timer.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def calm(self) -> None:
        """Wait until no guest has waited for a while."""
        while left := self._until_calm():
            await self._wait_changed(left)

    def _until_calm(self) -> float:
        """Seconds that the background is still to wait, if nothing else happens; 0 when it may go on."""
        return SILENCE if self.foreground else max(0.0, self._urgent_at + self._calm - self._loop.time())

    def missing(self, frames: Iterable[Want]) -> list[Want]:
        """Those that are not here; any thread."""
        fds: dict[str, int] = {}
        found = []
        try:
            for frame in frames:
                if frame.blob not in fds:
                    with contextlib.suppress(OSError):
                        fds[frame.blob] = os.open(self._files.blob(frame.blob), os.O_RDONLY | os.O_CLOEXEC)
                if frame.blob not in fds or not stock.is_here(fds[frame.blob], frame):
                    found.append(frame)
        finally:
            for fd in fds.values():
                os.close(fd)
        return found

    def _encourage(self, frames: Iterable[Want]) -> None:
        """A blob that only others failed to have is tried at once for the first guest that needs it, unless its registry asked us to wait."""
        waited_for = {frame.blob for errand in self.foreground for frame in errand.left}
        for digest in {frame.blob for frame in frames} - waited_for - self._asked_to_wait:
            self._schedule.release(digest)

    def _leave(self, errand: Errand) -> None:
        """It is done, failed, or nobody waits any more."""
        for frame in errand.left:
            others = self._errands.get(frame, {})
            others.pop(errand, None)
            if not others:
                self._errands.pop(frame, None)
                self._failures.pop(frame, None)
            if not any(other.rank is errand.rank for other in others):
                self._schedule.remove([frame], errand.rank)
        if errand.rank is Rank.FOREGROUND:
            self._urgent_at = self._loop.time()
            del self.foreground[errand]
            if errand.announced and not any(other.announced and other.head == errand.head for other in self.foreground):
                self.heard(Notice(event="served", head=errand.head))
        self._stir()

    def _stir(self) -> None:
        """Something changed. What comes within one turn of the loop is looked at together, so that it can be asked for together."""
        if not self._stirred:
            self._stirred = True
            self._loop.call_soon(self._pump)

    def _pump(self) -> None:
        self._stirred = False
        now = self._loop.time()
        while request := self._schedule.next(now):
            self.start(self._carry(request))
        if self._timer:
            self._timer.cancel()
        due = self._schedule.due(now)
        self._timer = self._loop.call_at(due, self._stir) if due is not None else None
        self._changed.set()
        self._changed = asyncio.Event()

    async def _wait_changed(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._changed.wait()

    async def _carry(self, request: Request) -> None:
        """Make a request, of one place after the other until all of it is here."""
        errors: list[RametError] = []
        try:
            for place in self._supply.places(request.blob):
                try:
                    await self._stream(place, request)
                except NoSpaceError:
                    raise
                except NotFoundError as error:  # a peer that has not got it: no reason, the registry has it
                    errors[:0] = [error]
                    continue
                except RametError as error:
                    errors.append(error)
                if not request.left:
                    break
        except RametError as error:
            errors.append(error)
        except OSError as error:
            errors.append(HostError(f"cannot write blob {request.blob}: {error.strerror}"))
        except Exception as error:  # a mistake of ours must not leave guests waiting without a word
            say("".join(traceback.format_exception(error)))
            errors.append(HostError(f"the fetcher failed: {error!r}"))
        finally:
            self._schedule.end(request)
            self._stir()
        if request.left:
            self._fail(request, errors)
        else:
            self._recovered(request.blob)

    async def _stream(self, place: Place, request: Request) -> None:
        """Have what is left of a request from one place. LayerError when some of it was not what it should be."""
        frames = list(request.left)
        base = frames[0].offset
        length = max(frame.offset + frame.length for frame in frames) - base
        came = bytearray()
        at = 0
        began, first = self._loop.time(), 0.0
        fd = os.open(self._files.blob(request.blob), os.O_WRONLY | os.O_CLOEXEC)
        try:
            self.requests += 1
            async with contextlib.aclosing(place.stream(request.blob, base, length)) as pieces:
                while at < len(frames):
                    came += await self._piece(place, pieces, request)
                    first = first or self._loop.time()
                    stop = at
                    while stop < len(frames) and frames[stop].offset + frames[stop].length - base <= len(came):
                        stop += 1
                    if stop == at or (stop < len(frames) and len(came) < _GATHERED and request.rank is not Rank.FOREGROUND):
                        continue
                    await self._land(fd, frames[at:stop], base, came)
                    at = stop
                    if at < len(frames) and (done := min(frames[at].offset - base, len(came))) > 0:
                        del came[:done]
                        base += done
                with contextlib.suppress(TimeoutError, RametError):
                    async with asyncio.timeout(SILENCE):
                        await anext(pieces, b"")  # the answer's end, without which the connection could not be used again
        finally:
            os.close(fd)
        if request.rank is Rank.FOREGROUND:
            self.around.measured(first - began, self._loop.time() - first)
        if wrong := next(iter(request.left), None):
            place.blame()
            raise LayerError(f"{place.name} has other bytes in blob {request.blob} at {wrong.offset} than it should")

    async def _piece(self, place: Place, pieces: AsyncGenerator[bytes, None], request: Request) -> bytes:
        """The next bytes. What no guest waits for pauses while one does, and the background keeps to its rate."""
        while request.rank >= Rank.BRING and self._schedule.urgent:
            await self._wait_changed(SILENCE)
        while request.rank is Rank.BACKGROUND and (left := self._until_calm()):
            await self._wait_changed(left)
        try:
            async with asyncio.timeout(SILENCE):
                piece = await anext(pieces, b"")
        except TimeoutError:
            place.blame()
            raise HostError(f"{place.name} sent nothing for {SILENCE:g} s") from None
        if not piece:
            raise HostError(f"{place.name} sent less than it should")
        self.fetched += len(piece)
        if place.is_peer:
            self.from_peers += len(piece)
        end = self._loop.time() + len(piece) / self._rate if self._rate else 0.0
        while request.rank is Rank.BACKGROUND and (left := end - self._loop.time()) > 0:
            await self._wait_changed(left)
        return piece

    async def _land(self, fd: int, frames: list[Want], base: int, came: bytearray) -> None:
        """Verify and write frames; those that are good are done."""
        with memoryview(came) as view:
            if frames[-1].offset - frames[0].offset < _INLINE:
                good = stock.land(fd, frames, base, view)
            else:
                good = await uncut(stock.land, fd, frames, base, view)
        for frame in good:
            self._schedule.done(frame)
            self._failures.pop(frame, None)
            for errand in self._errands.pop(frame, ()):
                errand.left.pop(frame, None)
                errand.limit = self._loop.time() + errand.patience
                if errand.tell:
                    errand.tell(frame.length)
                if not errand.left:
                    errand.end()

    def _recovered(self, digest: str) -> None:
        if self._failures.pop(digest, 0):
            say(f"blob {digest} can be had again")
        self._asked_to_wait.discard(digest)

    def _fail(self, request: Request, errors: list[RametError]) -> None:
        """Have it tried again later, and end what has waited long enough."""
        reason = "; ".join(dict.fromkeys(error.message for error in errors[-2:])) or "nobody has it"
        told = max((float(error.details.get("retry_after") or 0) for error in errors), default=0.0)
        now = self._loop.time()
        nothing = len(request.left) == len(request.frames)
        for what in [request.blob] if nothing else list(request.left):
            count = self._failures[what] = self._failures.get(what, 0) + 1
            if count == 1:
                say(f"blob {request.blob} at {next(iter(request.left)).offset}: {reason}")
            self._schedule.hold(what, now + max(backoff(count, random.random()), min(told, _POLITE)))
        if told:
            self._asked_to_wait.add(request.blob)
        hopeless = all(isinstance(error, ImageError | NotFoundError | NoSpaceError) for error in errors)
        firsts = {errand: frame for frame in reversed(request.left) for errand in self._errands.get(frame, ())}
        for errand, frame in firsts.items():
            self._disappoint(errand, frame, reason, hopeless=hopeless)

    def _disappoint(self, errand: Errand, frame: Want, reason: str, *, hopeless: bool) -> None:
        first = errand.failed is None
        errand.failed, errand.reason = frame, reason
        if hopeless and errand.rank is Rank.BRING:
            errand.limit = 0.0
        if self._loop.time() >= errand.limit:
            self._expire(errand)
        elif first and errand.rank is Rank.FOREGROUND:
            self._loop.call_later(MOMENT, self._announce, errand)
            if not errand.endless:
                self._loop.call_at(errand.limit, self._expire, errand)
        elif errand.announced:
            self._announce(errand)

    def _announce(self, errand: Errand) -> None:
        if errand.over.done() or errand.reason == errand.announced or (waiting := errand.waiting()) is None:
            return
        known = any(other.announced == errand.reason and other.head == errand.head for other in self.foreground)
        errand.announced = errand.reason
        if not known:
            self.heard(notice("waiting", waiting))

    def _expire(self, errand: Errand) -> None:
        if errand.over.done() or (waiting := errand.waiting()) is None:
            return
        if self._loop.time() < errand.limit:  # some of it came meanwhile
            self._loop.call_at(errand.limit, self._expire, errand)
            return
        if errand.rank is Rank.FOREGROUND:
            self.heard(notice("failed", waiting))
        text = f"blob {waiting.blob} at {waiting.offset} is not here and cannot be had: {waiting.reason}"
        errand.end(AbsentError(text, details={"blob": waiting.blob, "offset": waiting.offset}))


def notice(event: str, waiting: Waiting) -> Notice:
    return Notice(event=event, **vars(waiting))
