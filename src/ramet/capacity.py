"""Whether the host has room for another machine: sums and comparisons, pure. What is summed is what machines may come to use, not what they use now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ramet.db import Record
from ramet.errors import DaemonError, NoCapacityError, SpecError
from ramet.lifecycle import Operation
from ramet.model import Spec, State
from ramet.units import format_size

# Of the host's memory, how much machines may be promised. An idle machine that booted holds 103 MiB of the 608 that it is promised (512 and QEMU's own),
# a fork after its first command 37 (`ramet bench density`): siblings share, and guests give back what they do not use. At 4 a host whose machines are like
# that is a third full when it refuses the next one, which leaves some of them room to work. `pressure` is for the hour in which more than some do.
OVERCOMMIT = 4.0
OVERHEAD = 96 << 20  # bytes of QEMU itself: its heap and its translation cache, 40 to 110 MiB measured under emulation
BOOTING = 160 << 20  # bytes that a boot takes at once: 103 to 116 MiB measured, and some for what it caches
GOING_ON = 64 << 20  # the same of a start from a snapshot, whose pages are its siblings', too: 37 to 41 MiB
LEAST = 64 << 20  # bytes that a guest of ours cannot be pressed below: the spec's own minimum
RETRY_AFTER = 30  # seconds after which asking again is worth it
_RESERVE = 32  # one part in so many of the host's memory is for the host itself
_RATIO = "RAMET_OVERCOMMIT"

_TAKING = frozenset({Operation.CREATE, Operation.START, Operation.RESUME, Operation.RESTORE, Operation.PARK})
_AT_REST = frozenset({State.STOPPED, State.FAILED, State.HIBERNATED, State.DELETING})


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What one machine has of the host's memory, in bytes. memory: what it may come to use. at_once: what its start, which is under way, takes soon."""

    memory: int
    at_once: int = 0


@dataclass(frozen=True, kw_only=True)
class Room:
    """The host's memory in bytes, all of it and what is available now, and how often it may be promised."""

    total: int
    available: int
    overcommit: float = OVERCOMMIT

    @property
    def promisable(self) -> int:
        """What all machines together may be promised."""
        return max(0, int(self.total * self.overcommit) - self._reserve)

    @property
    def free(self) -> int:
        """What starts may take now."""
        return max(0, self.available - self._reserve)

    @property
    def _reserve(self) -> int:
        return self.total // _RESERVE


def overcommit(environment: Mapping[str, str]) -> float:
    """The ratio that the daemon was told, or the default. DaemonError when it is none."""
    text = environment.get(_RATIO, "")
    try:
        ratio = float(text) if text else OVERCOMMIT
    except ValueError:
        ratio = 0.0
    if not 0 < ratio < 1000:
        raise DaemonError(
            f"{_RATIO} is {text!r}", hint=f"Set it to how often the host's memory may be promised, as `1.5`, or unset it ({OVERCOMMIT})."
        )
    return ratio


def claim(record: Record, operation: Operation | None, *, alive: bool, granted: int | None = None) -> Claim | None:
    """What a machine has, or nothing where it is at rest. alive: it has a QEMU. granted: what its balloon leaves it, where that is known.

    Paused and parked machines hold their memory; hibernated, stopped and failed ones do not.
    """
    starting = operation in _TAKING
    if record.state in _AT_REST and not starting and not (alive and record.state is State.FAILED):
        return None
    may = max(record.memory_limit or record.spec.memory, granted or 0)
    at_once = (BOOTING if _boots(record, operation) else GOING_ON) if starting else 0
    return Claim(memory=may + OVERHEAD, at_once=at_once)


def wanted(record: Record, operation: Operation, *, alive: bool) -> Claim | None:
    """What an operation would take that the machine does not have yet."""
    new = record.state is State.CREATING or claim(record, None, alive=alive) is None
    return claim(record, operation, alive=alive) if new and operation in _TAKING else None


def _boots(record: Record, operation: Operation | None) -> bool:
    """Whether its start is one of a kernel, not of a snapshot's memory."""
    return operation is Operation.START or (operation is Operation.CREATE and not record.memory_layer)


def check(name: str, asked: Claim, others: Sequence[Claim], room: Room) -> None:
    """Nothing, where there is room for one more; NoCapacityError says which of the two kinds of room is missing."""
    committed = sum(each.memory for each in others)
    details = {"retry_after": RETRY_AFTER, "committed": committed, "capacity": room.promisable, "wanted": asked.memory}
    if committed + asked.memory > room.promisable:
        raise NoCapacityError(
            f"no capacity for {name}: it may use {format_size(asked.memory)}, and {format_size(committed)} of the {format_size(room.promisable)} that "
            f"machines may have here are taken",
            details=details,
        )
    under_way = sum(each.at_once for each in others)
    if under_way + asked.at_once > room.free:
        raise NoCapacityError(
            f"no capacity for {name}: its start takes {format_size(asked.at_once)} at once, and {format_size(max(0, room.free - under_way))} of the "
            f"host's memory is free for that",
            hint="Stop or hibernate a machine (`ramet hibernate NAME`), or end other programs, and try again.",
            details=details | {"available": room.available},
        )


def limit(spec: Spec, memory: int) -> int:
    """What to write down for a wish of so many bytes: the wish, or 0 for all of it. SpecError says what could be wished for."""
    if memory in (0, spec.memory):
        return 0
    if not LEAST <= memory < spec.memory:
        raise SpecError(
            f"memory: {format_size(memory)} is not within {format_size(LEAST)} and {format_size(spec.memory)}, with which {spec.name} was made",
            hint="0 gives it all back. More than it was made with needs another machine.",
        )
    return memory & ~0xFFFFF or 0
