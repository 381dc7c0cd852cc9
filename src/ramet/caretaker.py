"""The daemon's one background loop: guests give back what they do not use, a host that runs low gets help, layers take no more than they may."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Self

from ramet import capacity, collecting, pressure, process
from ramet.entry import Entry
from ramet.errors import DaemonError, MachineFailedError, RametError
from ramet.forks import Forks
from ramet.host import sample as sample_host
from ramet.model import State
from ramet.operations import Operations, log
from ramet.pressure import Action, HostSample, Kind, Limits, MachineSample, Trouble
from ramet.reclaiming import Reclaimer
from ramet.units import format_size, parse_size

EVERY = 5.0  # seconds; with five machines a look takes 0.2 ms, and a minute with all that it begins 16 ms of cpu (3 without machines)
_CARING = 60.0  # seconds that a guest gets for what it is asked to do meanwhile
# Seconds. What is deleted is collected at once, so this finds what was left for later, and what is above the budget.
_COLLECT_EVERY = 3600.0
_COLLECT_AGAIN = 600.0  # where something was in the way
_SWITCH, _BUDGET = "RAMET_PRESSURE", "RAMET_STORE_BUDGET"


def wanted(environment: Mapping[str, str]) -> bool:
    """Whether machines may be paused and hibernated when the host runs low. DaemonError for what is neither on nor off."""
    value = environment.get(_SWITCH, "") or "on"
    if value not in ("on", "off"):
        raise DaemonError(f"{_SWITCH} is {value!r}", hint="Set it to `on` or `off`, or unset it (on).")
    return value == "on"


def budget(environment: Mapping[str, str]) -> int | None:
    """Bytes that layers may take before chunks that a registry has too are given up; None: any number. DaemonError for what is no size."""
    value = environment.get(_BUDGET, "")
    try:
        return parse_size(value) if value else None
    except ValueError as error:
        raise DaemonError(f"{_BUDGET}: {error}", hint="Unset it for no limit.") from error


class Caretaker:
    """One host's. sample: where its samples of the host come from; None: machines are left alone however low the host is.

    budget: bytes that layers may take, None: any number; looked at every hour.
    """

    def __init__(
        self,
        ops: Operations,
        forks: Forks,
        *,
        sample: Callable[[], HostSample] | None = sample_host,
        limits: Limits = pressure.LIMITS,
        every: float = EVERY,
        budget: int | None = None,
    ) -> None:
        self._ops = ops
        self._forks = forks
        self._sample = sample
        self._limits = limits
        self._every = every
        self._reclaimer = Reclaimer()
        self._live: set[str] = set()
        self._caring: dict[str, asyncio.Task[None]] = {}
        self._acting: asyncio.Task[None] | None = None
        self._trouble: Trouble | None = None
        self._eager: set[str] = set()
        self._unable: set[str] = set()  # machines that could not be paused or hibernated: they keep nobody else from it
        self._cpu: dict[str, tuple[int, float, float]] = {}  # machine -> pid, when, seconds of cpu until then
        self._told: dict[str, str] = {}  # machine -> the error that the log has
        self._replenished = 0.0
        self._budget = budget
        self._collection: asyncio.Task[None] | None = None
        self._collect_at = time.monotonic() + _COLLECT_EVERY

    @contextlib.asynccontextmanager
    async def working(self) -> AsyncIterator[Self]:
        """It works in the body; afterwards nothing of it goes on."""
        loop = asyncio.create_task(self._run())
        try:
            yield self
        finally:
            tasks = [loop, *self._caring.values(), *filter(None, [self._acting, self._collection])]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            try:
                self.tick()
            except Exception as error:  # the next look may be luckier, and nobody else will look
                self._tell("", repr(error), error)
            await asyncio.sleep(self._every)

    def tick(self) -> None:
        """One look. What it begins goes on by itself."""
        now = time.monotonic()
        if not self._trouble and now - self._replenished >= capacity.RETRY_AFTER:
            self._replenished = now
            self._forks.replenish()
        if now >= self._collect_at:
            self._collect_at = now + _COLLECT_EVERY
            self._collection = asyncio.create_task(self._collect())
        live = [each for each in self._ops.entries.values() if each.vm and each.record.state in (State.RUNNING, State.PAUSED)]
        self._forget({each.record.id for each in live})
        if not live:
            self._trouble, self._forks.scarce = None, False
            return
        if self._sample and not (self._acting and not self._acting.done()):
            self._help(self._sample(), [self._look(each) for each in live])
        for each in live:
            if each.record.state is State.RUNNING and not each.operation and each.record.id not in self._caring:
                self._care(each)

    def _forget(self, live: set[str]) -> None:
        for gone in self._live - live:
            self._cpu.pop(gone, None)
            self._told.pop(gone, None)
        self._live = live
        self._eager &= live
        self._unable &= live

    # one machine

    def _look(self, entry: Entry) -> MachineSample:
        machine = entry.vm
        assert machine
        now, used = time.monotonic(), process.cpu_time(machine.pid)
        pid, then, before = self._cpu.get(entry.record.id, (0, 0.0, 0.0))
        self._cpu[entry.record.id] = machine.pid, now, used
        cpu = (used - before) / max(now - then, 0.1) if pid == machine.pid else 0.0
        busy = self._busy(entry)
        if busy or cpu >= self._limits.working or pid != machine.pid:
            entry.last_used = now
        left = busy or entry.record.id in self._unable
        return MachineSample(
            id=entry.record.id, state=entry.record.state, last_used=entry.last_used, busy=left, cpu=cpu, parked=bool(entry.record.pool)
        )

    def _busy(self, entry: Entry) -> bool:
        """Whether something is being done to it, or somebody is connected to it. What we ask of it ourselves does not count."""
        under_way = 0
        if entry.vm:
            with contextlib.suppress(MachineFailedError):
                under_way = entry.vm.guest.under_way
        return bool(entry.operation or entry.streams or under_way > (entry.record.id in self._caring))

    def _care(self, entry: Entry) -> None:
        """Have its guest told what it should do by itself, and asked for what it does not; beside the loop, for it may hang."""
        name = entry.record.id
        task = self._caring[name] = asyncio.create_task(self._cared(entry, eager=name in self._eager))
        task.add_done_callback(lambda _: self._caring.pop(name, None))

    async def _cared(self, entry: Entry, *, eager: bool) -> None:
        try:
            async with asyncio.timeout(_CARING):
                await self._reclaimer.tick(entry, eager=eager)
        except TimeoutError:
            self._tell(entry.record.id, f"{entry.record.name} did not do in {_CARING:.0f} s what it was asked")
        except RametError as error:
            if entry.record.state is State.RUNNING and not entry.operation:  # else it is ended, and of course its guest answers no more
                self._tell(entry.record.id, f"{entry.record.name} gives nothing back: {error.message}")
        except Exception as error:
            self._tell(entry.record.id, f"{entry.record.name} gives nothing back: {error!r}", error)

    def _tell(self, machine: str, text: str, error: Exception | None = None) -> None:
        """In the log, once for as long as the machine lives."""
        if self._told.get(machine) != text:
            self._told[machine] = text
            log.warning("%s", text, exc_info=error)

    # the host

    def _help(self, now: HostSample, machines: Sequence[MachineSample]) -> None:
        if self._acting and self._trouble:  # the last rung has only now been taken
            self._trouble = dataclasses.replace(self._trouble, step=now.at)
        self._acting = None
        decision = pressure.decide(now, machines, self._trouble, self._limits)
        if bool(decision.trouble) is not bool(self._trouble):
            what = "runs low on" if decision.trouble else "has enough"
            log.warning("the host %s memory: %s of %s is available", what, format_size(now.available), format_size(now.total))
        self._trouble = decision.trouble
        self._forks.scarce = bool(decision.trouble)
        asked = {each.machine for each in decision.actions if each.kind is Kind.RECLAIM}
        self._eager = self._eager | asked if decision.trouble else set()
        self._unable = self._unable if decision.trouble else set()
        if todo := [each for each in decision.actions if each.kind is not Kind.RECLAIM]:
            self._acting = asyncio.create_task(self._act(todo))

    async def _act(self, actions: Sequence[Action]) -> None:
        """One after the other. A machine that somebody has begun to use meanwhile is left alone."""
        decided = time.monotonic()
        for action in actions:
            entry = self._ops.entries.get(action.machine)
            if entry is None or entry.last_used > decided:
                continue
            await self._let_be(entry)
            if self._busy(entry) or entry.last_used > decided:
                continue
            try:
                await self._take(entry, action.kind)
            except Exception as error:
                self._unable.add(action.machine)
                why = error.message if isinstance(error, RametError) else repr(error)
                self._tell(action.machine, f"{action.kind} of {entry.record.name}: {why}", None if isinstance(error, RametError) else error)

    async def _take(self, entry: Entry, kind: Kind) -> None:
        name, used = entry.record.name, entry.last_used
        if kind is Kind.END:
            await self._forks.give_up(entry)
            return
        log.warning("%s: %s, for the host runs low on memory and nobody uses it", name, kind)
        if kind is Kind.PAUSE:
            await self._forks.pause(entry, reason=f"paused, for the host ran low on memory; `ramet resume {name}` lets it go on")
        else:
            await self._forks.hibernate(entry, reason=f"hibernated, for the host ran low on memory; `ramet resume {name}` lets it go on")
        entry.last_used = used  # what we did ourselves is no use of it

    async def _let_be(self, entry: Entry) -> None:
        """End what we ask of its guest: between two frames there must be silence."""
        if task := self._caring.get(entry.record.id):
            task.cancel()
            await asyncio.wait({task})

    # the disk

    async def _collect(self) -> None:
        """Beside the loop: it reads tables of all layers."""
        try:
            found = await collecting.collect(self._ops, budget=self._budget, dry_run=False)
        except Exception as error:  # a full disk, a damaged table: the next time may be luckier
            self._tell("", f"nothing was collected: {error.message if isinstance(error, RametError) else repr(error)}")
            return
        if found.evicted:
            log.info("gave up %s that can be fetched again; layers take %s", format_size(found.evicted), format_size(found.stored))
        if found.postponed:
            self._tell("", "; ".join(found.postponed))
            self._collect_at = time.monotonic() + _COLLECT_AGAIN
