"""What to do when the host runs low on memory: pure. A ladder, from what nobody notices to what somebody might, one rung at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from ramet.model import State


@dataclass(frozen=True, kw_only=True)
class HostSample:
    """The host at an instant. at: seconds, monotonic. total, available: bytes (MemTotal, MemAvailable). stalled: per cent of the last ten seconds in which
    some program waited for memory (`some avg10` of /proc/pressure/memory, https://docs.kernel.org/accounting/psi.html); 0 where the kernel does not tell."""

    at: float
    total: int
    available: int
    stalled: float = 0.0


@dataclass(frozen=True, kw_only=True)
class MachineSample:
    """A machine at the same instant. busy: somebody is connected to it, or an operation is under way. last_used: seconds, on the host sample's clock.
    cpu: of one processor, the part that it used since the last sample. parked: it waits in a pool, and is nobody's yet."""

    id: str
    state: State
    last_used: float
    busy: bool = False
    cpu: float = 0.0
    parked: bool = False


@dataclass(frozen=True, kw_only=True)
class Limits:
    """low, enough: parts of the host's memory. Trouble begins when less than `low` is available, and is over when `enough` is. stalling: per cent of stalled
    time, with which trouble begins below `enough` already; above it, those who stall do so at limits of their own. idle: seconds without use. working: of one
    processor; above it a machine has something to do. patience: seconds that a rung gets to help. again: seconds until guests that gave all they had are
    asked once more."""

    low: float = 0.08
    enough: float = 0.16
    stalling: float = 20.0
    idle: float = 60.0
    working: float = 0.10
    patience: float = 10.0
    again: float = 60.0


LIMITS = Limits()


class Kind(StrEnum):
    RECLAIM = "reclaim"
    END = "end"
    PAUSE = "pause"
    HIBERNATE = "hibernate"


@dataclass(frozen=True, kw_only=True)
class Action:
    """machine: its id."""

    kind: Kind
    machine: str


@dataclass(frozen=True, kw_only=True)
class Trouble:
    """A time in which the host is low, from its begin until it has enough. step: when a rung was last taken, reclaimed: when guests were last asked."""

    step: float
    reclaimed: float


@dataclass(frozen=True, kw_only=True)
class Decision:
    """actions: in this order. trouble: to be given back with the next samples; None: there is none."""

    actions: tuple[Action, ...] = ()
    trouble: Trouble | None = None


def is_low(host: HostSample, limits: Limits) -> bool:
    return host.available < limits.low * host.total or (host.stalled >= limits.stalling and not has_enough(host, limits))


def has_enough(host: HostSample, limits: Limits) -> bool:
    return host.available >= limits.enough * host.total


def is_idle(machine: MachineSample, now: float, limits: Limits) -> bool:
    """Nobody would notice at once that it stands still."""
    return not machine.busy and not machine.parked and machine.cpu < limits.working and now - machine.last_used >= limits.idle


def decide(host: HostSample, machines: Sequence[MachineSample], trouble: Trouble | None, limits: Limits = LIMITS) -> Decision:
    """The next rung, or nothing.

    First all running guests give back what they can, for that stops nobody; then parked machines are ended, for they are nobody's yet; then all idle machines
    stand still, for that is undone in a moment; then idle ones are hibernated, the one that was used least recently first and one at a time, for each costs a
    write to the disk and the time to read it back. A rung is taken when the last did not help within `patience` and the host is low still. Between low and
    enough nothing is done, and nothing forgotten: a host that is low again goes on where it was. Nothing is undone here: a machine that stands still goes on
    when its user says so.
    """
    now = host.at
    if has_enough(host, limits):
        return Decision()
    if not is_low(host, limits):
        return Decision(trouble=trouble)
    running = [each for each in machines if each.state is State.RUNNING]
    if trouble is None:
        return Decision(actions=_each(Kind.RECLAIM, running), trouble=Trouble(step=now, reclaimed=now))
    if now - trouble.step < limits.patience:
        return Decision(trouble=trouble)
    after = Trouble(step=now, reclaimed=trouble.reclaimed)
    if parked := [each for each in machines if each.parked and not each.busy]:
        return Decision(actions=_each(Kind.END, parked), trouble=after)
    idle = sorted((each for each in machines if is_idle(each, now, limits)), key=lambda each: each.last_used)
    if still := [each for each in idle if each.state is State.RUNNING]:
        return Decision(actions=_each(Kind.PAUSE, still), trouble=after)
    if paused := [each for each in idle if each.state is State.PAUSED]:
        return Decision(actions=_each(Kind.HIBERNATE, paused[:1]), trouble=after)
    if now - trouble.reclaimed >= limits.again and running:
        return Decision(actions=_each(Kind.RECLAIM, running), trouble=Trouble(step=now, reclaimed=now))
    return Decision(trouble=trouble)


def _each(kind: Kind, machines: Sequence[MachineSample]) -> tuple[Action, ...]:
    return tuple(Action(kind=kind, machine=each.id) for each in machines)
