"""Machines whose memory or disk is in a registry that does not give it: they stand still with the reason, and go on by themselves when it does again.

The fetcher tells which layer's readers wait; which machine is one of them, its QEMU tells: a cpu that waits for a page can not be stopped before it has it, so
that a QEMU that does stop waits for nothing, and goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any, Protocol

from ramet import disks, lifecycle
from ramet.entry import Entry
from ramet.errors import RametError
from ramet.lifecycle import Operation
from ramet.model import State
from ramet.operations import Operations, log
from ramet.store import remote
from ramet.store.fetching import Fetcher, Notice, Status, Waiting
from ramet.vm.machine import Vm

WAITS = "waits for a part of its memory"  # how such a machine's reason begins
_SLOW, _FAILED = "its disk waits for a part", "its disk could not be read"
STOPPING = 1.0  # seconds in which a QEMU stops that waits for nothing: 1 ms, on an idle host
SOON = 5.0  # seconds that `ramet resume` gives a registry
# Where a thread sleeps that waits for a file system of ours (fs/fuse/dev.c); the kernel may not tell.
_ASKING = (b"request_wait_answer", b"0")
_ASIDE = 5.0  # seconds for which a QEMU that did stop is not asked again: it was busy with something else
_LOOK = 0.5  # seconds between two looks at the machines of a memory that does not come
_AGAIN = 2.0  # seconds until a line that broke is tried again
_ASK = 10.0  # seconds between two questions after all that waits: what a line that broke has swallowed


class Line(Protocol):
    """What is used of a `Fetcher`."""

    def watch(self) -> AsyncIterator[Notice]: ...

    async def status(self) -> Status: ...

    async def retry(self) -> None: ...


class Fetchwatch:
    """One host's. resume: lets a paused machine go on. line: for tests, instead of the store's fetcher."""

    def __init__(self, ops: Operations, resume: Callable[[Entry], Awaitable[None]], line: Line | None = None) -> None:
        self._ops = ops
        self._resume = resume
        self._line = line or Fetcher(ops.state.store, ops.layers.nudge)
        self._heads: dict[str, str] = {}  # memories that somebody waits for, and what for
        self._telling = asyncio.Lock()
        self._heard = 0  # notices
        self._changed = asyncio.Event()
        self._following: asyncio.Task[None] | None = None
        self._looking: asyncio.Task[None] | None = None
        self._stopped: dict[str, Vm] = {}  # machines whose QEMUs did stop, and so wait for nothing
        self._aside: dict[str, float] = {}  # machines that wait for nothing, and until when that is believed; monotonic
        self._handled: set[str] = set()  # machines that something is being done to

    def begin(self) -> None:
        """After a restart of the daemon: those that waited before wait until they do not."""
        for entry in self._ops.entries.values():
            if entry.record.state is State.PAUSED and entry.record.reason.startswith(WAITS):
                entry.waiting = entry.record.reason
        self._ops.on_layers = self.look
        self.look()

    def look(self) -> None:
        """Listen, from when there is something that may not come."""
        idle = self._following is None or self._following.done()
        if idle and hasattr(self._ops.layers, "dead") and remote.is_any(self._ops.state.store):
            self._following = self._ops.spawn(self._follow())

    async def hurry(self, entry: Entry) -> None:
        """Try again at once. StateError, with the reason, where the machine does not go on soon."""
        told = self._ops.bus.subscribe(entry.record.name)
        with contextlib.suppress(RametError, OSError, TimeoutError):
            await self._line.retry()
        self._changed.set()
        try:
            async with asyncio.timeout(SOON):
                while entry.waiting or entry.record.state is State.PAUSED:
                    await anext(told)
        except TimeoutError:
            raise entry.stalled() from None
        lifecycle.require(entry.record.name, entry.record.state, {State.RUNNING}, "resume")

    # what the fetcher tells

    async def _follow(self) -> None:
        """Until the image file system ends; what reads no layers waits for none."""
        dead = self._ops.layers.dead
        while not dead.done():
            asking = self._ops.spawn(self._ask())
            try:
                with contextlib.suppress(RametError, OSError, TimeoutError):
                    async for notice in self._line.watch():
                        self._take(notice)
            finally:
                asking.cancel()
            self._heads.clear()
            self._see()
            await asyncio.wait({dead}, timeout=_AGAIN)

    async def _ask(self) -> None:
        """What waits since before we listened."""
        while True:
            with contextlib.suppress(RametError, OSError, TimeoutError):
                before = self._heard
                status = await self._line.status()
                if self._heard == before:  # else the answer may be the older news
                    self._heads = {each.head: _reason(each) for each in status.waiting if each.memory}
                    self._see()
            await asyncio.sleep(_ASK)

    def _take(self, notice: Notice) -> None:
        self._heard += 1
        if notice.event == "served":
            if self._heads.pop(notice.head, None) is None:
                self._ops.spawn(self._tell(notice.head, ""))
        elif notice.memory:
            self._heads[notice.head] = _reason(notice)
        else:
            what = _FAILED if notice.event == "failed" else _SLOW
            self._ops.spawn(self._tell(notice.head, f"{what} {_where(notice)}"))
        self._see()

    async def _tell(self, head: str, reason: str) -> None:
        """That a read failed stays the reason until the next start: what the guest made of it is not known here."""
        async with self._telling:  # in the order in which it was heard
            for entry in list(self._ops.entries.values()):
                on_it = head in await asyncio.to_thread(disks.layers_of, self._ops.state.machine(entry.record.id))
                known = entry.record.reason
                news = not known.startswith(_FAILED) if reason else known.startswith(_SLOW)
                if on_it and news and entry.vm and entry.record.state is State.RUNNING and not entry.waiting:
                    await self._ops.set(entry, reason=reason)

    # what machines do

    def _see(self) -> None:
        self._changed.set()
        if self._looking is None or self._looking.done():
            self._looking = self._ops.spawn(self._watch_over())

    async def _watch_over(self) -> None:
        """As long as anybody waits: who that is."""
        while True:
            self._changed.clear()
            entries = list(self._ops.entries.values())
            for entry in entries:
                self._attend(entry)
            if not self._heads and not any(entry.waiting for entry in entries):
                self._aside.clear()
                self._stopped.clear()
                return
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), _LOOK)

    def _attend(self, entry: Entry) -> None:
        """Begin what is to be done about one machine."""
        if entry.record.id in self._handled:
            return
        reason = self._heads.get(entry.record.memory_layer, "")
        stuck = bool(entry.vm and (reason or entry.waiting) and _blocked(entry.vm.pid))
        if entry.operation:
            told, entry.waiting = entry.waiting, reason if stuck or entry.waiting else ""
            if entry.waiting not in ("", told):
                self._ops.doing(entry, entry.waiting)
        elif entry.record.state is not State.PAUSED:
            entry.waiting = ""
            if stuck and entry.vm and entry.record.state is State.RUNNING and time.monotonic() >= self._aside.get(entry.record.id, 0.0):
                self._handle(entry, self._hold(entry, entry.vm, reason))
        elif entry.waiting and entry.vm:
            if reason not in ("", entry.waiting):
                entry.waiting = reason
                self._handle(entry, self._ops.set(entry, reason=reason))
            elif self._stopped.get(entry.record.id) is entry.vm or not (reason or stuck):
                # The second, where QEMU's answer was lost. A fetcher that died says that all is served: its successor knows of nobody yet.
                self._handle(entry, self._let_go(entry, entry.vm))

    def _handle(self, entry: Entry, work: Coroutine[Any, Any, None]) -> None:
        async def handled() -> None:
            try:
                await work
            except RametError as error:  # the next look may be luckier
                log.info("%s: %s", entry.record.name, error.message)
            finally:
                self._handled.discard(entry.record.id)
                self._see()

        self._handled.add(entry.record.id)
        self._ops.spawn(handled())

    async def _hold(self, entry: Entry, machine: Vm, reason: str) -> None:
        """Have it stand still, if it is one of those that wait."""
        guest = machine.guest
        guest.hold()  # first: its silence is no fault of its own
        try:
            stop = self._ops.spawn(self._stop(entry, machine))
            await asyncio.wait({stop, machine.dead}, timeout=STOPPING)
            if stop.done() or machine.dead.done() or entry.operation:
                self._stopped.pop(entry.record.id, None)
                self._aside[entry.record.id] = time.monotonic() + _ASIDE
                await machine.monitor("cont")
                return

            async def work(held: Entry) -> None:
                held.waiting, machine.still = reason, True
                self._ops.note(held, reason=reason)

            await self._ops.perform(entry, Operation.PAUSE, work)
            log.warning("%s %s", entry.record.name, reason)
        finally:
            if not machine.still:
                guest.release()

    async def _stop(self, entry: Entry, machine: Vm) -> None:
        """QEMU answers when all cpus stand still, which takes as long as the pages do that they wait for, on a busy host also without any."""
        with contextlib.suppress(RametError):
            await machine.monitor("stop")
            self._stopped[entry.record.id] = machine
            self._changed.set()

    async def _let_go(self, entry: Entry, machine: Vm) -> None:
        if not machine.still:  # it waited again before its agent had answered
            machine.guest.hold()
            machine.still = True
        self._stopped.pop(entry.record.id, None)
        was, entry.waiting = entry.waiting, ""
        try:
            await self._resume(entry)
        except BaseException:
            entry.waiting = was if entry.vm and entry.record.state is State.PAUSED else ""
            raise
        log.info("%s has what it waited for, and goes on", entry.record.name)


def _where(of: Notice | Waiting) -> str:
    return f"(layer {of.head}, blob {of.blob[:19]} at {of.offset}): {of.reason}"


def _reason(of: Notice | Waiting) -> str:
    return f"{WAITS} {_where(of)}; it goes on when that can be had"


def _blocked(pid: int) -> bool:
    """Whether a thread of a process may be waiting for a page: one that the kernel fetches ahead, or one that the file system was asked for itself."""
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):
                state = (task / "stat").read_bytes().rpartition(b")")[2].split()[0]
                if state == b"D" or (state == b"S" and (task / "wchan").read_bytes() in _ASKING):
                    return True
    return False
