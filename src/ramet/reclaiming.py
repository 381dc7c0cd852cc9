"""Has each running machine give back what it does not use, as its spec says, and keep to its limit: what `reclaim` decides, said to the guests."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

from ramet import reclaim
from ramet.entry import Entry
from ramet.errors import RametError
from ramet.guest import Guest
from ramet.model import Reclaim
from ramet.reclaim import Sample
from ramet.vm import balloon
from ramet.vm.machine import Vm

DEADLINE = 30.0  # seconds for one word to a guest
# Seconds that a machine which came from a snapshot is left in peace. Its memory has the policy that it was saved with, so the word is only for the rare
# one that was saved before it was told; and it costs a fresh fork, which holds 0.6 MiB of its own, 0.4 more and 50 ms (under emulation).
INHERITED = 60.0
AGAIN = 60.0  # seconds after which a guest that did not do what it was told is told again
_SPARE = 8  # of its limit, this part must be left to a guest that is held to it again: it would take it back at once


@dataclass(eq=False)
class _Known:
    """What is known of one QEMU's guest. since: when it was first seen; first: the policy that it had then; tuned: what it was told, or None; alone: its kernel
    does the rest; due: when it is to be asked next; failed: until when it is left alone, after an error; held: when it is next held to its limit."""

    since: float
    first: Reclaim
    tuned: Reclaim | None = None
    alone: bool = False
    due: float = 0.0
    failed: float = 0.0
    held: float = 0.0
    samples: list[Sample] = field(default_factory=list)


class Reclaimer:
    """Call `tick` for each running machine every few seconds: most calls do nothing, and none costs an idle guest more than its policy allows."""

    def __init__(self, clock: Callable[[], float] | None = None) -> None:
        self._clock = clock or asyncio.get_running_loop().time
        self._known: weakref.WeakKeyDictionary[Vm, _Known] = weakref.WeakKeyDictionary()

    async def tick(self, entry: Entry, *, eager: bool = False) -> None:
        """Tell a guest its policy when it does not have it, and ask it for memory when its kernel does not give it by itself.

        eager: the host is short of memory now, so ask for all there is, unless the policy is `off`. After an error of the guest (RametError) calls
        do nothing for a while.
        """
        if not entry.vm:
            return
        now, policy = self._clock(), entry.record.spec.reclaim
        known = self._known.setdefault(entry.vm, _Known(since=now, first=entry.vm.reclaim or policy))
        inherits = entry.record.memory_layer and known.tuned is None and policy is known.first and now < known.since + INHERITED
        if now < known.failed or (inherits and not eager):
            return
        try:
            await self._tell(entry.vm.guest, known, policy, eager)
            await self._hold(entry.vm, known, entry.record.memory_limit)
        except RametError:
            known.failed = self._clock() + AGAIN
            raise

    async def _tell(self, guest: Guest, known: _Known, policy: Reclaim, eager: bool) -> None:
        if known.tuned is not policy:
            known.alone = await guest.tune(reclaim.damon(policy), DEADLINE)
            known.tuned = policy
            known.samples.clear()
        if policy is not Reclaim.OFF and (eager or (not known.alone and self._clock() >= known.due)):
            await self._steer(guest, known, Reclaim.EAGER if eager else policy, eager)

    async def _hold(self, machine: Vm, known: _Known, limit: int) -> None:
        """Have a guest that took more than its limit, for it needed that, give it up again when the need is over. limit: bytes, 0 for none."""
        over, now = (machine.granted or 0) - limit, self._clock()
        if not limit or over <= 0 or now < known.held:
            return
        known.held = now + AGAIN
        if (await machine.guest.metrics()).get("mem_available", 0.0) >= over + limit // _SPARE:
            await balloon.resize(machine, limit)

    async def _steer(self, guest: Guest, known: _Known, policy: Reclaim, eager: bool) -> None:
        now = self._clock()
        known.due = now + reclaim.STEERING[policy].every
        known.samples = [each for each in known.samples if each.at >= now - reclaim.horizon(policy)]
        known.samples.append(sample(await guest.metrics(), now))
        if size := reclaim.decide(known.samples, policy, pressed=eager):
            await guest.reclaim(size, DEADLINE)


def sample(metrics: dict[str, float], at: float) -> Sample:
    """What METRICS says of memory. An agent of an older snapshot says nothing of what is reclaimable: then nothing is."""
    return Sample(
        at=at,
        reclaimable=metrics.get("mem_reclaimable", 0.0),
        stalled=metrics.get("psi_mem_some_us", 0.0) / 1e6,
        refaulted=metrics.get("mem_refaulted", 0.0),
    )
