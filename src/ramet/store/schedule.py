"""What is fetched next, and in which requests: pure. Frames that somebody wants wait in queues; `next` makes one request of those that lie together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import islice

from ramet.store.remote import Want

GAP = 64 << 10  # bytes between two frames that are fetched along rather than asked for apart
HORIZON = 1024  # frames from a queue's head that a request is made of: those further back have time
FIRST, LONGEST = 0.2, 10.0  # seconds until something is tried again: at first, at most


class Rank(IntEnum):
    """What frames are wanted for; the lower, the sooner. FOREGROUND: a guest waits. AHEAD: of one that reads on and on. BRING: a user waits."""

    FOREGROUND = 0
    AHEAD = 1
    TRACE = 2
    BRING = 3
    BACKGROUND = 4


# Bytes of a request, at most. What is in large requests comes late to a guest that happens to need its end, so only what nobody waits for is.
SPAN = {Rank.FOREGROUND: 4 << 20, Rank.AHEAD: 4 << 20, Rank.TRACE: 4 << 20, Rank.BRING: 16 << 20, Rank.BACKGROUND: 4 << 20}
# A request is made while fewer than so many are under way, whatever for: a guest's read never queues behind a download, which has the line alone.
SLOTS = {Rank.FOREGROUND: 12, Rank.AHEAD: 6, Rank.TRACE: 4, Rank.BRING: 4, Rank.BACKGROUND: 1}


@dataclass(eq=False, kw_only=True)
class Request:
    """frames: of one blob, by offset. rank: of the one that is wanted soonest; also of one that began to be wanted while it was under way."""

    blob: str
    frames: tuple[Want, ...]
    rank: Rank
    left: dict[Want, None] = field(init=False)

    def __post_init__(self) -> None:
        self.left = dict.fromkeys(self.frames)


class Schedule:
    """Times are seconds of any clock."""

    def __init__(self) -> None:
        self._wanted: dict[Want, int] = {}  # a bit for each rank
        self._queues: dict[Rank, dict[Want, None]] = {rank: {} for rank in Rank}
        self._flying: dict[Want, Request] = {}
        self._requests: set[Request] = set()
        self._held: dict[Want | str, float] = {}

    def add(self, frames: Iterable[Want], rank: Rank) -> None:
        """Somebody wants frames."""
        for frame in frames:
            before = self._wanted.get(frame, 0)
            self._wanted[frame] = before | 1 << rank
            if request := self._flying.get(frame):
                request.rank = min(request.rank, rank)
            elif not before or rank < _first(before):
                self._unqueue(frame, before)
                self._queues[rank][frame] = None

    def remove(self, frames: Iterable[Want], rank: Rank) -> None:
        """Nobody of that rank wants them any more. Requests under way go on."""
        for frame in frames:
            before = self._wanted.get(frame, 0)
            after = before & ~(1 << rank)
            if after == before:
                continue
            if after:
                self._wanted[frame] = after
            else:
                del self._wanted[frame]
                self._held.pop(frame, None)
            if frame not in self._flying and (not after or _first(after) != _first(before)):
                self._unqueue(frame, before)
                if after:
                    self._queues[_first(after)][frame] = None

    def next(self, now: float) -> Request | None:
        """The request to make now; None when none is to be made until something is added or ends, or `due`."""
        for rank in Rank:
            if len(self._requests) >= SLOTS[rank]:
                return None
            if frames := self._together(rank, now):
                request = Request(blob=frames[0].blob, frames=frames, rank=rank)
                for frame in frames:
                    self._unqueue(frame, self._wanted[frame])
                    self._flying[frame] = request
                self._requests.add(request)
                return request
        return None

    def done(self, frame: Want) -> None:
        """A frame is here."""
        self._held.pop(frame, None)
        if request := self._flying.pop(frame, None):
            request.left.pop(frame, None)
        self._unqueue(frame, self._wanted.pop(frame, 0))

    def end(self, request: Request) -> None:
        """A request is over. What of it is not done and still wanted waits again."""
        self._requests.discard(request)
        for frame in request.left:
            del self._flying[frame]
            if wanted := self._wanted.get(frame):
                self._queues[_first(wanted)][frame] = None

    def hold(self, what: Want | str, until: float) -> None:
        """Make no request for a frame, or for any of a blob (its digest), before that time."""
        self._held[what] = until

    def release(self, what: Want | str | None = None) -> None:
        """What was held is no longer, or all that was."""
        if what is None:
            self._held.clear()
        else:
            self._held.pop(what, None)

    def due(self, now: float) -> float | None:
        """When something that is held becomes free, if anything is."""
        self._held = {what: until for what, until in self._held.items() if until > now}
        return min(self._held.values(), default=None)

    @property
    def urgent(self) -> bool:
        """Whether a request is under way that a guest waits for."""
        return any(request.rank is Rank.FOREGROUND for request in self._requests)

    @property
    def requests(self) -> int:
        """Under way."""
        return len(self._requests)

    def _unqueue(self, frame: Want, wanted: int) -> None:
        if wanted:
            self._queues[_first(wanted)].pop(frame, None)

    def _together(self, rank: Rank, now: float) -> tuple[Want, ...]:
        """The frame that waited longest, and those of its queue's head that lie around it; with what a guest waits for, a little of what it may need next."""
        near = list(islice((frame for frame in self._queues[rank] if self._free(frame, now)), HORIZON))
        if not near:
            return ()
        found = _row(near[:1], near, SPAN[rank])
        if rank is Rank.FOREGROUND:
            ahead = islice((frame for frame in self._queues[Rank.AHEAD] if self._free(frame, now)), HORIZON)
            found = _row(found, ahead, Around.MOST)
        return tuple(found)

    def _free(self, frame: Want, now: float) -> bool:
        return not self._held or (self._held.get(frame, 0.0) <= now and self._held.get(frame.blob, 0.0) <= now)


def backoff(failures: int, chance: float) -> float:
    """Seconds until what failed so often in a row is tried again. chance: 0 … 1, drawn each time, so that those who failed together do not come together."""
    delay: float = min(LONGEST, FIRST * 2 ** min(failures - 1, 16))
    return delay * (0.5 + chance / 2)


def _row(found: list[Want], near: Iterable[Want], span: int) -> list[Want]:
    """Frames of one blob, by offset, and those that lie around them, as long as the row is no longer than so many bytes."""
    ends = (found[0], found[-1])
    row = sorted(
        {*found, *(frame for frame in near if frame.blob == found[0].blob)}, key=lambda frame: (frame.offset, frame.length, frame.mark)
    )
    low, high = map(row.index, ends)
    begin, end = ends[0].offset, max(map(_end, found))
    while high + 1 < len(row) and row[high + 1].offset - end <= GAP and _end(row[high + 1]) - begin <= span:
        high += 1
        end = max(end, _end(row[high]))
    while low and begin - _end(row[low - 1]) <= GAP and end - row[low - 1].offset <= span:
        low -= 1
        begin = row[low].offset
    return row[low : high + 1]


def _first(wanted: int) -> Rank:
    return Rank((wanted & -wanted).bit_length() - 1)


def _end(frame: Want) -> int:
    return frame.offset + frame.length


@dataclass
class _Run:
    """Somebody who reads on and on. asked: how far it was fetched ahead; length: bytes that were read."""

    begin: int
    end: int
    asked: int
    length: int = 0


class Around:
    """How much is fetched around what is read of a memory, whose reads tell little of the next: as long as more of it takes less time than another request.

    length: bytes, before and behind together. A far registry gets few large requests, a slow line no bytes that nobody asked for.
    """

    LEAST, MOST = 32 << 10, 256 << 10

    def __init__(self) -> None:
        self.length = self.LEAST

    def measured(self, waited: float, lasted: float) -> None:
        """A request's seconds until its first bytes came, and from then on until its last."""
        if lasted > waited:
            self.length = max(self.LEAST, self.length // 2)
        elif lasted < waited / 2:
            self.length = min(self.MOST, self.length * 2)


class Readers:
    """Who reads a blob from its begin to its end, by the places at which bytes were missing: what will be read next."""

    NEAR = 512 << 10  # bytes that a run may jump: reads under way at one time come in any order, and some pages lie in other blobs
    ENOUGH = 512 << 10  # bytes that must have been read in a row
    MOST = 8 << 20
    RUNS = 16  # remembered of one blob

    def __init__(self) -> None:
        self._runs: list[_Run] = []

    def touch(self, begin: int, end: int) -> tuple[int, int] | None:
        """Somebody reads begin … end-1; what to fetch ahead now, as (begin, end): as much as was read in a row so far."""
        run = next((run for run in self._runs if run.begin - self.NEAR <= begin <= max(run.end, run.asked) + self.NEAR), None)
        if run:
            self._runs.remove(run)
        else:
            run = _Run(begin=begin, end=begin, asked=end)
        self._runs = [run, *self._runs[: self.RUNS - 1]]
        if (passed := min(begin, run.asked)) > run.end:  # it was fetched ahead, so nobody had to ask for it
            run.length += passed - run.end
            run.end = passed
        run.length += max(0, end - max(begin, run.end)) + max(0, run.begin - begin)  # ten who read the same are one reader
        run.begin, run.end = min(run.begin, begin), max(run.end, end)
        if run.length < self.ENOUGH or run.length * 2 < run.end - run.begin:
            return None
        window = min(self.MOST, run.length)
        start, stop = max(run.asked, run.end), run.end + window
        if stop - start < window // 2:
            return None
        run.asked = stop
        return start, stop
