"""Which pages a layer holds and where, and which layer of a chain each page comes from: run lengths, and the algebra over them."""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from ramet.errors import LayerError
from ramet.store import columns
from ramet.store.layer import MAX_PAGES

ZERO = (1 << 64) - 1  # in the place of an offset: these pages are zero
_RUNS, _OWNERS = b"RAMETRUN", b"RAMETOWN"
Piece = tuple[int, int, int]  # first page, the page after the last, a value


@dataclass(frozen=True, kw_only=True)
class Runs:
    """Sorted, not overlapping. first, count: pages of the address space. where: the page of the spool at which they lie one after the other, or ZERO."""

    first: array[int]
    count: array[int]
    where: array[int]

    @classmethod
    def build(cls, runs: Iterable[tuple[int, int, int]]) -> Runs:
        """From (first page, count, page of the spool or ZERO) in any order; neighbours that continue each other become one. LayerError when they overlap."""
        firsts, counts, wheres = array("I"), array("I"), array("Q")
        end = 0
        for first, count, where in sorted(runs):
            if count <= 0 or first < end or first + count > MAX_PAGES:
                raise LayerError(f"runs overlap or are none: {count} pages from {first}, when {end} pages are taken")
            follows = counts and first == end and (where == ZERO if wheres[-1] == ZERO else where == wheres[-1] + counts[-1])
            if follows:
                counts[-1] += count
            else:
                firsts.append(first)
                counts.append(count)
                wheres.append(where)
            end = first + count
        return cls(first=firsts, count=counts, where=wheres)

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        return zip(self.first, self.count, self.where, strict=True)

    def __len__(self) -> int:
        return len(self.first)

    @property
    def end(self) -> int:
        """The page after the last."""
        return self.first[-1] + self.count[-1] if self.first else 0

    def pages(self) -> tuple[int, int]:
        """How many hold data, and how many are zero."""
        zero = sum(count for _, count, where in self if where == ZERO)
        return sum(self.count) - zero, zero

    def dump(self) -> bytes:
        """As a file."""
        return columns.dump(_RUNS, [self.first, self.count, self.where])

    @classmethod
    def load(cls, data: bytes, what: str) -> Runs:
        """From a file; LayerError, which begins with `what`, when it is damaged."""
        first, count, where = columns.load(_RUNS, "IIQ", data, what)
        if not len(first) == len(count) == len(where):
            raise LayerError(f"{what} is damaged: its columns are not of one length")
        return cls(first=first, count=count, where=where)


@dataclass(frozen=True, kw_only=True)
class Owners:
    """Segment k is the pages starts[k] … starts[k+1]-1, and comes from owner[k]: 0 is nobody (the base, or zeros), i the chain's i-th layer."""

    starts: array[int]
    owner: array[int]

    @classmethod
    def nobody(cls, pages: int) -> Owners:
        """What lies below the first layer."""
        return cls(starts=array("I", [0, pages]), owner=array("H", [0]))

    @property
    def pages(self) -> int:
        return self.starts[-1]

    def segments(self, first: int, end: int) -> Iterator[Piece]:
        """The parts of the pages first … end-1, in order, each with its owner."""
        starts, owner = self.starts, self.owner
        at = bisect_right(starts, first) - 1
        while first < end:
            stop = starts[at + 1]
            if stop > end:
                stop = end
            yield first, stop, owner[at]
            first = stop
            at += 1

    def overlay(self, runs: Runs, ordinal: int, *, based: bool) -> Owners:
        """After a layer was put on top. based: there is an image below, so that zeros over nobody's pages count."""

        def rule(old: int, where: int) -> int:
            return ordinal if where != ZERO or old or based else 0

        return self._paint(((first, first + count, where) for first, count, where in runs), rule)

    def redirect(self, ordinal: int, moves: Iterable[Piece]) -> Owners:
        """Of the pages of one layer those that `moves` names, in order, come from elsewhere: each piece's value is the new owner."""
        return self._paint(moves, lambda old, target: target if old == ordinal else old)

    def _paint(self, pieces: Iterable[Piece], rule: Callable[[int, int], int]) -> Owners:
        """Change the owner in the pieces, sorted and not overlapping, to rule(old owner, the piece's value)."""
        starts, owner = self.starts, self.owner
        made, owns = array("I"), array("H")
        last = -1  # the owner of what was written last
        at = segment = 0  # all before this page is written; the segment that holds it
        for first, end, value in pieces:
            if at < first:
                # As it was, up to the piece: the rest of this segment, then whole ones, copied in one go, for there may be very many.
                if owner[segment] != last:
                    made.append(at)
                    owns.append(owner[segment])
                begin = segment + 1
                segment = bisect_left(starts, first, begin) - 1
                made.extend(starts[begin : segment + 1])
                owns.extend(owner[begin : segment + 1])
                last, at = owner[segment], first
                if starts[segment + 1] == first:
                    segment += 1
            while at < end:
                now = rule(owner[segment], value)
                if now != last:
                    made.append(at)
                    owns.append(now)
                    last = now
                at = starts[segment + 1]
                if at > end:
                    at = end
                else:
                    segment += 1
        if at < self.pages:
            if owner[segment] != last:
                made.append(at)
                owns.append(owner[segment])
            made.extend(starts[segment + 1 : -1])
            owns.extend(owner[segment + 1 :])
        made.append(self.pages)
        return Owners(starts=made, owner=owns)

    def compact(self, chain: list[str]) -> tuple[Owners, tuple[str, ...]]:
        """Without the layers of the chain that own nothing any more; the last one stays, it is the layer itself."""
        used = set(self.owner) | {len(chain)}
        kept = [number for number in range(1, len(chain) + 1) if number in used]
        if len(kept) == len(chain):
            return self, tuple(chain)
        renamed = {0: 0} | {old: new for new, old in enumerate(kept, 1)}
        owner = array("H", (renamed[old] for old in self.owner))
        return Owners(starts=self.starts, owner=owner), tuple(chain[number - 1] for number in kept)

    def adopt(self, chain: list[str], head: int, adopted: set[int]) -> tuple[Owners, tuple[str, ...]]:
        """After the chain's layer number `head` has taken over what the layers of these numbers own: without them, and with it last."""
        used = set(self.owner) - adopted - {0, head}
        kept = [number for number in range(1, len(chain) + 1) if number in used] + [head]
        renamed = {0: 0} | dict.fromkeys(adopted, len(kept)) | {old: new for new, old in enumerate(kept, 1)}
        starts, owner = array("I"), array("H")
        last = -1
        for start, old in zip(self.starts, self.owner, strict=False):  # the last start is the end
            now = renamed[old]
            if now != last:
                starts.append(start)
                owner.append(now)
                last = now
        starts.append(self.pages)
        return Owners(starts=starts, owner=owner), tuple(chain[number - 1] for number in kept)

    def dump(self) -> bytes:
        """As a file."""
        return columns.dump(_OWNERS, [self.starts, self.owner])

    @classmethod
    def load(cls, data: bytes, what: str, *, pages: int, layers: int) -> Owners:
        """From a file; LayerError, which begins with `what`, when it is damaged or not about so many pages and layers."""
        starts, owner = columns.load(_OWNERS, "IH", data, what)
        if len(starts) != len(owner) + 1 or starts[0] != 0 or starts[-1] != pages or max(owner, default=0) > layers:
            raise LayerError(f"{what} is damaged: it is about {starts[-1] if starts else 0} pages, not {pages}")
        return cls(starts=starts, owner=owner)


def find(runs: Runs, page: int) -> int:
    """The number of the run that holds a page, else of the first one behind it."""
    at = bisect_right(runs.first, page) - 1
    return at if at >= 0 and page < runs.first[at] + runs.count[at] else bisect_left(runs.first, page)
