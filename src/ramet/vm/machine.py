"""One QEMU: start it, find it again, end it. It belongs to nobody: a shim of its own keeps its logs and writes down how it ended."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ramet import locks, process, sockets
from ramet.errors import BusyError, GuestError, MachineFailedError, NoSpaceError, RametError
from ramet.guest import Guest
from ramet.identity import Identity
from ramet.model import Reclaim
from ramet.paths import MachineDir
from ramet.qmp import Qmp
from ramet.vm import argv

T = TypeVar("T")

FULL = "the host's disk is full"  # why QEMU stops a machine
LOG_CAP = 1 << 20  # bytes; of each log the shim keeps at most twice this
TAIL = 4096  # bytes of a log that an error shows
SPAWN_DEADLINE = 30.0
BOOT_DEADLINE = 180.0  # an emulated boot takes 2 s; Debian's kernel on a busy host took a minute
LOAD_DEADLINE = 60.0  # for the devices' state of a snapshot: 10 ms, on an idle host
HOOKS_DEADLINE = 300.0  # for /etc/ramet/fork.d
_DYING = 1.0  # seconds, as the next, where it is likely that QEMU lives
_CLOSING = 5.0  # seconds between the end of QEMU's sockets and of QEMU, on a busy host
POWER_OFF_GRACE = 8.0  # seconds the guest's processes get after SIGTERM
POWER_OFF_DEADLINE = 30.0


@dataclass(frozen=True, kw_only=True)
class Death:
    """How a QEMU ended. clean: the guest powered itself off."""

    clean: bool
    reason: str
    log: str


def tail(path: Path, size: int = TAIL) -> str:
    """The end of a log (and of the one before it, when it was just begun)."""
    data = b""
    for each in (path.with_name(path.name + ".1"), path):
        with contextlib.suppress(FileNotFoundError), open(each, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - size))
            data = (data + file.read())[-size:]
    return data.decode(errors="replace")


def is_alive(files: MachineDir) -> bool:
    """Whether a QEMU or its shim lives in this directory: they hold the lock, from before their start to their end."""
    return locks.is_held(files.lock)


def _signal(number: str) -> str:
    try:
        return signal.Signals(int(number)).name
    except ValueError:
        return f"signal {number}"


def postmortem(files: MachineDir) -> Death:
    """How the last QEMU in this directory ended, from what the shim and the guest's kernel wrote."""
    console = tail(files.console)
    try:
        word, number, *_ = files.exit.read_text().split()
    except (FileNotFoundError, ValueError):
        return Death(clean=False, reason="QEMU and its shim were killed, or the host went down", log=console)
    if word == "signaled":
        return Death(clean=False, reason=f"QEMU was killed by {_signal(number)}", log=console)
    if number != "0":
        last = (tail(files.qemu_log).strip().splitlines() or ["no message"])[-1]
        return Death(clean=False, reason=f"QEMU exited with status {number}: {last}", log=tail(files.qemu_log))
    for mark in ("Kernel panic", "ramet-agent: fatal"):
        if mark in console:
            line = next(line for line in console.splitlines() if mark in line)
            return Death(clean=False, reason=f"the guest died: {line.strip()}", log=console)
    return Death(clean=True, reason="the guest powered off", log=console)


def pids(files: MachineDir) -> dict[str, int]:
    """The shim's and QEMU's pids, of those that still are what they were."""
    found = {}
    with contextlib.suppress(FileNotFoundError):
        for line in files.pids.read_text().splitlines():
            name, pid, started = line.split()
            if process.start_time(int(pid)) == int(started):
                found[name] = int(pid)
    return found


async def kill(files: MachineDir) -> None:
    """End whatever lives in the directory, at once; returns when it is gone."""
    found = pids(files)
    # A shim that was just started writes its pids within milliseconds, and tells nobody but its starter, who may be dead.
    for _ in range(100):
        if found or not is_alive(files):
            break
        await asyncio.sleep(0.05)
        found = pids(files)
    for name in ("qemu", "shim"):  # the shim ends by itself, after writing down how QEMU did
        if pid := found.get(name):
            with contextlib.suppress(ProcessLookupError):
                fd = os.pidfd_open(pid)
                try:
                    if name == "qemu":
                        signal.pidfd_send_signal(fd, signal.SIGKILL)
                    if not await process.gone(fd, 10):
                        signal.pidfd_send_signal(fd, signal.SIGKILL)
                        await process.gone(fd, 10)
                finally:
                    os.close(fd)


async def _obituary(files: MachineDir, hint: str = "") -> MachineFailedError:
    """The error for a QEMU that has ended; its shim may still be writing down how."""
    await kill(files)
    death = postmortem(files)
    return MachineFailedError(death.reason, hint=hint, details={"log": death.log})


class Vm:
    """A running QEMU with its monitor and its guest's agent. on_change is called when the agent comes or goes."""

    def __init__(self, files: MachineDir, pid: int, pidfd: int) -> None:
        self.files = files
        self.pid = pid
        self._pidfd = pidfd
        self._qmp: Qmp | None = None
        self._loaded: asyncio.Future[str] | None = None
        self._stuck: asyncio.Future[RametError] = asyncio.get_running_loop().create_future()  # QEMU paused it for an error of the host
        self._guest: Guest | None = None
        self.dead: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().add_reader(pidfd, self._ended)
        self.on_agent_lost: Callable[[], None] = lambda: None
        self.on_stuck: Callable[[], None] = lambda: self.lose(FULL)
        self.agent_closed = False
        self.lost_because = ""
        self.still = False  # paused by us, or by QEMU for want of room
        self.reclaim: Reclaim | None = None  # the policy that its memory was saved with, where that is known
        self.granted: int | None = None  # bytes that the balloon leaves the guest, where that is known
        self.balloon_target = 0
        self.balloon_changed = asyncio.Event()

    @classmethod
    async def launch(cls, files: MachineDir, config: argv.Config, shim: Path) -> Vm:
        """Start QEMU in `files.root` and connect to its monitor. Nothing is left when it fails."""
        fds: list[int] = []
        try:
            lock = locks.take(files.lock)
            if lock is None:
                raise BusyError(f"a process of {config.name} still lives in {files.root}")
            fds.append(lock)
            for stale in (files.exit, files.pids):
                stale.unlink(missing_ok=True)
            fds += [sockets.listen(files.qmp).detach(), sockets.listen(files.agent).detach()]
            config = dataclasses.replace(config, qmp_fd=fds[1], agent_fd=fds[2])
            command = [str(shim), "--lock", str(lock), *argv.shim_words(config.accelerator), str(files.root), str(LOG_CAP)]
            command += ["--", *argv.build(config)]
            (await process.run(command, deadline=SPAWN_DEADLINE, pass_fds=fds)).check("starting QEMU")
            while fds:
                os.close(fds.pop())  # from here on QEMU's end alone keeps its sockets and the lock
            return await cls.adopt(files)
        except BaseException:
            await kill(files)
            raise
        finally:
            for fd in fds:
                os.close(fd)

    @classmethod
    async def adopt(cls, files: MachineDir, *, deadline: float = SPAWN_DEADLINE) -> Vm:
        """Take over a QEMU that runs already. MachineFailedError, with the reason, when it does not, or does not answer within so many seconds."""
        pid = pids(files).get("qemu")
        try:
            fd = os.pidfd_open(pid) if pid else None
        except ProcessLookupError:
            fd = None
        if pid is None or fd is None:
            raise await _obituary(files)
        vm = cls(files, pid, fd)
        try:
            vm._qmp = await Qmp.connect(files.qmp, deadline=deadline, on_event=vm._event)
        except MachineFailedError as error:
            dead = await vm._dies_within(_CLOSING)  # a QEMU that ends closes its sockets first
            await vm.release()
            if dead:
                raise await _obituary(files) from error
            raise
        except BaseException:
            await vm.release()
            raise
        return vm

    @property
    def guest(self) -> Guest:
        """The agent's connection; MachineFailedError when there is none."""
        if self._guest is None or self._guest.closed.done():
            why = f": {self._guest.closed.result()}" if self._guest else ""
            raise MachineFailedError(
                f"the guest's agent is not connected{why}",
                hint="`ramet show` and `ramet logs` say more; `ramet stop` and `start` boot it anew.",
            )
        return self._guest

    @property
    def monitor(self) -> Qmp:
        """QEMU's monitor."""
        assert self._qmp
        return self._qmp

    async def load(self, state: Path) -> None:
        """Load the devices' state of a snapshot into a QEMU that was started for it; its cpus do not run yet. MachineFailedError when it does not fit."""
        loaded = self._loaded = asyncio.get_running_loop().create_future()
        await self.monitor("migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}])
        try:
            with open(state, "rb") as file:
                await self.monitor.send_file("state", file.fileno())
                await self.monitor("migrate-incoming", uri="fd:state")
        except OSError as error:
            raise MachineFailedError(f"the snapshot's device state cannot be read: {error.strerror}") from error
        both: set[asyncio.Future[Any]] = {loaded, self.dead}
        await asyncio.wait(both, timeout=LOAD_DEADLINE, return_when=asyncio.FIRST_COMPLETED)
        if not loaded.done() or loaded.result() != "completed":
            if await self._dies_within(_CLOSING):
                await kill(self.files)
            last = (tail(self.files.qemu_log).strip().splitlines() or ["no message"])[-1]
            raise MachineFailedError(f"QEMU could not load the snapshot's device state: {last}", details={"log": tail(self.files.qemu_log)})

    @property
    def stuck(self) -> bool:
        """Whether QEMU stopped the cpus, for the host's disk is full."""
        return self._stuck.done()

    async def running(self) -> bool:
        """Whether the cpus run."""
        return await self.status() == "running"

    async def status(self) -> str:
        """QEMU's `RunState` (https://qemu.org/docs/master/interop/qemu-qmp-ref.html): `running`, `paused`, `io-error`: the disk was full."""
        return str((await self.monitor("query-status"))["status"])

    async def connect_agent(self, *, deadline: float, resync: bool) -> None:
        """Connect to the agent, waiting for the guest to boot; fails at once when QEMU dies meanwhile."""
        self._take(await self._while_alive(Guest.connect(self.files.agent, deadline=deadline, resync=resync)))

    async def go_on(self, state: Path, who: Identity, *, deadline: float) -> None:
        """Let a QEMU that was started for a snapshot go on from it: devices, identity, and only then the cpus. Fails closed."""
        guest: Guest | None = None
        try:
            guest = await Guest.reach(self.files.agent)  # before the devices are loaded: else the guest sees its port closed
            await self.load(state)
            guest.greet(resync=False, identity=who)
            await self.monitor("cont")
            await self._while_alive(guest.answered(deadline))
        except BaseException as error:
            if guest:
                guest.abort("given up")
            # A QEMU that ends closes its sockets first.
            if isinstance(error, MachineFailedError | OSError) and await self._dies_within(_DYING):
                raise await _obituary(self.files, getattr(error, "hint", "")) from error
            if isinstance(error, OSError):
                raise MachineFailedError(f"QEMU's agent port does not answer: {error.strerror}") from error
            raise
        self._take(guest)
        await self._hooks(who)

    async def _hooks(self, who: Identity) -> None:
        if self.guest.hooks_due:
            await self.guest.run_hooks(who.generation, who.hostname, HOOKS_DEADLINE)

    async def pause(self) -> None:
        """Stand still, the agent between two frames."""
        await self.guest.quiesce()
        try:
            await self.monitor("stop")
        except BaseException:
            await self.guest.resume()
            raise
        self.still = True

    async def unpause(self, who: Identity | None = None) -> None:
        """Go on with the time that it is now. who: under a new identity, for a machine that was parked."""
        if self._stuck.done():
            self._stuck = asyncio.get_running_loop().create_future()
        self.still = False  # first: it may be stopped again before we hear that it went on
        try:
            await self.monitor("cont")
        except BaseException:
            self.still = True
            raise
        if self._guest is None or self._guest.closed.done():  # another daemon paused it
            await self.connect_agent(deadline=BOOT_DEADLINE / 3, resync=True)
        else:
            await self.guest.resume()
        await self.guest.identify(who or Identity.clock())
        if who:
            await self._hooks(who)

    async def _while_alive(self, talk: Awaitable[T]) -> T:
        """Its result; MachineFailedError, with the console's end, when that fails or QEMU dies first."""
        talking: asyncio.Future[T] = asyncio.ensure_future(talk)
        ends: set[asyncio.Future[Any]] = {talking, self.dead, self._stuck}
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            failed = talking.done() and not talking.cancelled() and talking.exception() is not None
            if failed:
                await self._dies_within(_DYING)  # a QEMU that ends closes its sockets first, and how it ended says more
            if self.dead.cancelled():
                raise MachineFailedError("the machine was let go")
            if self.dead.done() and (failed or not talking.done()):
                raise await _obituary(self.files)
            if self._stuck.done() and not talking.done():
                raise self._stuck.result()
            return await talking
        except (MachineFailedError, OSError) as error:
            log = tail(self.files.console)
            hint = getattr(error, "hint", "") or "`ramet logs` shows the guest's console."
            raise MachineFailedError(getattr(error, "message", str(error)), hint=hint, details={"log": log}) from error
        finally:
            talking.cancel()

    def _take(self, guest: Guest) -> None:
        self._guest = guest
        guest.closed.add_done_callback(self._agent_lost)

    def _agent_lost(self, closed: asyncio.Future[str]) -> None:
        if self._pidfd >= 0:  # else we let go ourselves
            self.lost_because = closed.result()
            self.on_agent_lost()

    def _event(self, name: str, data: dict[str, Any]) -> None:
        if name == "VSERPORT_CHANGE" and data.get("id") == "agent" and not data.get("open"):
            self.agent_closed = True
            self.lose("it closed its port")
        elif name == "MIGRATION" and data.get("status") in ("completed", "failed"):
            if self._loaded and not self._loaded.done():
                self._loaded.set_result(str(data["status"]))
        elif name == "BALLOON_CHANGE":
            self.granted = int(data["actual"])
            self.balloon_changed.set()
        elif name == "BLOCK_IO_ERROR" and data.get("action") == "stop":
            # QEMU's default for a full disk: the guest stands still instead of being told of an error that it would answer with a read-only disk.
            if not self._stuck.done():
                self._stuck.set_result(NoSpaceError("QEMU paused the machine: no space left on the host's disk for what it writes"))
            self.on_stuck()

    def lose(self, reason: str) -> None:
        """The agent does not answer any more; all that is under way has failed."""
        if self._guest:
            self._guest.abort(reason)

    def _ended(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        self.dead.set_result(None)
        if self._guest:
            self._guest.abort("the machine ended")

    async def power_off(self, *, deadline: float | None = None) -> str:
        """The ladder: ask the agent, then ACPI's power button, then QEMU, then SIGKILL. Always ends; returns how, when it had to be impolite."""
        deadline = POWER_OFF_DEADLINE if deadline is None else deadline
        rude = ""
        if self.still:  # a guest that stands still cannot power off
            with contextlib.suppress(RametError):
                await self.unpause()
        try:
            await self.guest.power_off(POWER_OFF_GRACE)
        except GuestError as error:
            rude = f"the agent could not be asked ({error.message}); the power button was pressed"
            if not await self._tell_qemu("system_powerdown"):
                deadline = 0  # QEMU itself does not answer: there is nobody to wait for
        ends: set[asyncio.Future[None] | asyncio.Future[RametError]] = {self.dead, self._stuck}
        await asyncio.wait(ends, timeout=deadline, return_when=asyncio.FIRST_COMPLETED)
        if not self.dead.done():
            rude = (
                f"{FULL}, so the guest could not power off; it was cut off"
                if self.stuck
                else f"the guest did not power off within {deadline:.0f} s; it was cut off"
                if deadline
                else "QEMU did not answer; it was cut off"
            )
            if self.stuck or not deadline or not await self._tell_qemu("quit") or not await self._dies_within(5):
                rude += " with SIGKILL"
        await kill(self.files)
        return rude

    async def _tell_qemu(self, command: str) -> bool:
        """Whether QEMU's monitor took a command."""
        with contextlib.suppress(RametError):
            await self.monitor(command)
            return True
        return False

    async def _dies_within(self, seconds: float) -> bool:
        await asyncio.wait({self.dead}, timeout=seconds)
        return self.dead.done()

    async def kill(self) -> None:
        """A power cut."""
        await kill(self.files)
        await self.release()

    async def release(self) -> None:
        """Let go of the machine without touching it."""
        if self._pidfd >= 0:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1
            self.dead.cancel()  # whoever waits for the end would wait for ever
        if self._guest:
            self._guest.abort("released")
        if self._qmp:
            await self._qmp.close()
