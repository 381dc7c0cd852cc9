"""The SDK's face: machines as objects, over any `Verbs`. Asynchronous; `sdk` is the same for programs without an event loop.

Processes are what people start all day, so `start` is theirs (and `run` when only the result counts); a machine is switched on
with `power_on` and off with `stop`.
"""

from __future__ import annotations

import asyncio
import builtins
import os
import weakref
from collections.abc import AsyncIterator, Mapping, Sequence

from ramet.client import Client
from ramet.errors import GuestError, SpecError, from_wire
from ramet.filesystem import AsyncFiles
from ramet.model import (
    Command,
    ForkOutcome,
    HostInfo,
    Machine,
    Port,
    Process,
    Reclaim,
    Result,
    Size,
    Snapshot,
    Spec,
    State,
    TreeNode,
)
from ramet.storage import Collected, LayerInfo, Transfer
from ramet.streams import AsyncProcess, AsyncTerminal, Listener
from ramet.units import parse_size
from ramet.verbs import Verbs

# A login shell, the best there is. The profile may change PATH, so bash is looked for in the one that the process starts with.
LOGIN_SHELL = ("sh", "-c", "command -v bash >/dev/null 2>&1 && exec bash -l; exec sh -l")

_clients: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Client] = weakref.WeakKeyDictionary()


async def connect() -> Client:
    """A client of this user's daemon (RAMET_URL, else the state directory's), which is started when none runs."""
    if not os.environ.get("RAMET_URL"):
        from ramet.service import ensure_running

        await ensure_running()
    return Client.discover()


async def _verbs() -> Verbs:
    """The client that machines share when they are not given one, one for each event loop."""
    loop = asyncio.get_running_loop()
    if loop not in _clients:
        _clients[loop] = await connect()
    return _clients[loop]


async def disconnect() -> None:
    """Close the connections that machines share in this event loop; they are made again when needed."""
    if client := _clients.pop(asyncio.get_running_loop(), None):
        await client.aclose()


def argv(command: str | Sequence[str]) -> tuple[str, ...]:
    """A string is for the shell, a sequence is taken as it is."""
    return ("sh", "-c", command) if isinstance(command, str) else tuple(command)


class AsyncHost:
    """What is not one machine's: snapshots, templates, layers, registries, and who descends from whom. verbs: instead of this user's daemon."""

    def __init__(self, verbs: Verbs | None = None) -> None:
        self._given = verbs

    async def _verbs(self) -> Verbs:
        return self._given or await _verbs()

    async def info(self) -> HostInfo:
        """Accelerator, kernel, capacity, what cannot be enforced."""
        return await (await self._verbs()).info()

    async def snapshots(self) -> list[Snapshot]:
        """All that have a name, oldest first."""
        return await (await self._verbs()).snapshots()

    async def get_snapshot(self, snapshot: str) -> Snapshot:
        """One, by name or id. NotFoundError when there is none."""
        return await (await self._verbs()).get_snapshot(snapshot)

    async def template(self, snapshot: str, label: str = "", *, pool: int = 0) -> Snapshot:
        """Make a snapshot a template, named `label` (`shop:1.2`). pool: machines to keep restored and parked, for the next that ask."""
        return await (await self._verbs()).template(snapshot, label=label, pool=pool)

    async def delete_snapshot(self, snapshot: str, *, cascade: bool = False, dry_run: bool = False) -> list[str]:
        """Remove a snapshot; the names of what goes, in order. DependentsError when others stand on it, unless they go too (cascade)."""
        return await (await self._verbs()).delete_snapshot(snapshot, cascade=cascade, dry_run=dry_run)

    async def tree(self) -> list[TreeNode]:
        """Who descends from whom, with what each costs; parents before children."""
        return await (await self._verbs()).tree()

    async def layers(self) -> list[LayerInfo]:
        """Oldest first."""
        return await (await self._verbs()).layers()

    async def get_layer(self, layer: str) -> LayerInfo:
        """NotFoundError when there is none."""
        return await (await self._verbs()).get_layer(layer)

    async def verify_layer(self, layer: str) -> list[str]:
        """Read and check every chunk; what is wrong, a sentence each."""
        return await (await self._verbs()).verify_layer(layer)

    async def export_layer(self, layer: str) -> AsyncIterator[bytes]:
        """The layer with all it stands on, as the raw image."""
        async for part in (await self._verbs()).export_layer(layer):
            yield part

    async def push(self, snapshot: str, reference: str) -> Transfer:
        """Send a snapshot to a registry, as REGISTRY/NAME:TAG; what is there already is not sent again. ImageError, HostError."""
        return await (await self._verbs()).push(snapshot, reference)

    async def pull(self, reference: str, *, lazy: bool = False) -> Transfer:
        """Have a snapshot of a registry here, under its name there. lazy: without its content, which comes when it is needed and in the background.

        ImageError for what is not there or not allowed, HostError for a registry that cannot be reached.
        """
        return await (await self._verbs()).pull(reference, lazy=lazy)

    async def convert(self, image: str, name: str = "") -> Snapshot:
        """Make an image a template (without memory), which can be pushed and then started before it is fetched. name: its own where none is given."""
        return await (await self._verbs()).convert(image, name)

    async def gc(self, *, budget: int | str | None = None, dry_run: bool = False) -> Collected:
        """Remove what no snapshot and no machine needs. budget: bytes, or `20G`, that all layers may take: beyond it, chunks that a registry has too go."""
        try:
            limit = None if budget is None else parse_size(budget)
        except ValueError as error:
            raise SpecError(f"budget {error}") from None
        return await (await self._verbs()).gc(budget=limit, dry_run=dry_run)

    async def fsck(self, *, repair: bool = False) -> list[str]:
        """Check all that is kept: what is wrong, a sentence each. repair: remove what can be fetched or made again."""
        return await (await self._verbs()).fsck(repair=repair)

    async def read_blob(self, digest: str, *, offset: int = 0, length: int = -1) -> AsyncIterator[bytes]:
        """Bytes of a blob (zstd seekable). NotFoundError where they are not here."""
        async for part in (await self._verbs()).read_blob(digest, offset=offset, length=length):
            yield part


class AsyncMachine:
    """A machine. Made by `create`, `create_from`, `get` and `list`. `files` are its files."""

    def __init__(self, verbs: Verbs, record: Machine) -> None:
        self._verbs = verbs
        self._record = record
        self.files = AsyncFiles(verbs, record.name)

    def __repr__(self) -> str:
        return f"<machine {self.name}: {self.state}>"

    @classmethod
    async def create(
        cls,
        name: str = "",
        *,
        image: str | None = None,
        cpus: int | None = None,
        memory: int | str | None = None,
        disk: int | str | None = None,
        env: Mapping[str, str] | None = None,
        workdir: str | None = None,
        user: str | None = None,
        ports: Sequence[int | str] | None = None,
        drives: Sequence[str] | None = None,
        spec: Spec | None = None,
        verbs: Verbs | None = None,
    ) -> AsyncMachine:
        """Make a machine and start it; returns when commands run in it.

        memory, disk: bytes, or `512MiB`. ports: the guest's, or `HOST:GUEST`. drives: `data:20G:/data`. spec: instead of all these (`ramet.spec.load` reads a
        ramet.toml). SpecError for what is not valid, ExistsError when the name is taken, ImageError.
        """
        if spec is None:
            from ramet.spec import build

            given = {
                "name": name,
                "image": image,
                "cpus": cpus,
                "memory": memory,
                "disk": disk,
                "env": env,
                "workdir": workdir,
                "user": user,
                "ports": ports,
                "drives": drives,
            }
            spec = build({key: value for key, value in given.items() if value is not None}, source="create")
        verbs = verbs or await _verbs()
        return cls(verbs, await verbs.create(spec))

    @classmethod
    async def create_from(cls, snapshot: str, name: str, *, disk_only: bool = False, verbs: Verbs | None = None) -> AsyncMachine:
        """Make a machine from a snapshot or template; its programs go on where they were, unless disk_only, which boots its disk.

        One that is not here and is named as in a registry (`ghcr.io/acme/shop:1`) is pulled first, lazily.
        NotFoundError, ExistsError when the name is taken, IncompatibleError when its memory does not fit this host (its disk does).
        """
        verbs = verbs or await _verbs()
        return cls(verbs, await verbs.create_from(snapshot, name, disk_only=disk_only))

    @classmethod
    async def get(cls, name: str, *, verbs: Verbs | None = None) -> AsyncMachine:
        """The machine of this name or id. NotFoundError when there is none."""
        verbs = verbs or await _verbs()
        return cls(verbs, await verbs.get(name))

    @classmethod
    async def list(cls, *, verbs: Verbs | None = None) -> builtins.list[AsyncMachine]:
        """All machines."""
        verbs = verbs or await _verbs()
        return [cls(verbs, record) for record in await verbs.list()]

    @property
    def name(self) -> str:
        return self._record.name

    @property
    def record(self) -> Machine:
        """The machine as it was when last asked for; `refresh` asks."""
        return self._record

    @property
    def state(self) -> State:
        """As it was when last asked for."""
        return self._record.state

    async def refresh(self) -> Machine:
        """The machine as it is now, with what it costs."""
        self._record = await self._verbs.get(self.name)
        return self._record

    # its life

    async def power_on(self) -> Machine:
        """Boot it from its own disk."""
        self._record = await self._verbs.start(self.name)
        return self._record

    async def stop(self, *, force: bool = False) -> Machine:
        """Power it off. force: at once, as a power cut."""
        self._record = await self._verbs.stop(self.name, force=force)
        return self._record

    async def update(self, *, memory: int | str | None = None, reclaim: Reclaim | str | None = None) -> Machine:
        """Change what it may cost, at once where it runs, else from its next start on.

        memory: what it may use, in bytes or as `256MiB`, at most what it was made with; 0: all of it. A guest that needs more keeps it: the
        `memory_granted` of what is returned says what it has. reclaim: `off`, `gentle` or `eager`. SpecError, NoCapacityError.
        """
        try:
            size = None if memory is None else parse_size(memory)
            how = None if reclaim is None else Reclaim(reclaim)
        except ValueError as error:
            raise SpecError(str(error)) from None
        self._record = await self._verbs.update(self.name, memory=size, reclaim=how)
        return self._record

    async def delete(self) -> None:
        """Remove it and its disk, whatever it is doing."""
        await self._verbs.delete(self.name)

    async def pause(self) -> Machine:
        """Stop its cpus; its memory stays where it is."""
        self._record = await self._verbs.pause(self.name)
        return self._record

    async def resume(self) -> Machine:
        """Let it go on, paused or hibernated, with the right time and fresh randomness."""
        self._record = await self._verbs.resume(self.name)
        return self._record

    async def hibernate(self, *, slim: bool = True) -> Machine:
        """Save it to the disk and give its memory back to the host; `resume` goes on from the same instant. slim: without its caches and free memory."""
        self._record = await self._verbs.hibernate(self.name, slim=slim)
        return self._record

    async def compact(self) -> int:
        """Give back what its disk holds and nobody needs; returns how many bytes the host's disk got back."""
        return await self._verbs.compact(self.name)

    async def fork(self, count: int = 1, *, names: Sequence[str] = ()) -> builtins.list[AsyncMachine]:
        """Make `count` machines that go on from this one's present instant: memory, programs, disk. names: theirs; then count is not looked at.

        When one fails, the error of the first that did is raised; those that live are not touched, and its details (`outcomes`) name them.
        `fork_outcomes` gives one outcome for each child instead.
        """
        outcomes = await self.fork_outcomes(count, names=names)
        failed = [each for each in outcomes if each.machine is None]
        if failed:
            first = from_wire(failed[0].error or {})
            raise type(first)(
                f"{len(failed)} of {len(outcomes)} forks of {self.name} failed; {failed[0].name}: {first.message}",
                hint=first.hint,
                details=first.details | {"outcomes": outcomes},
            )
        return [AsyncMachine(self._verbs, each.machine) for each in outcomes if each.machine]

    async def fork_outcomes(self, count: int = 1, *, names: Sequence[str] = ()) -> builtins.list[ForkOutcome]:
        """As `fork`; what became of each child: its machine, or why there is none."""
        return await self._verbs.fork(self.name, count=count, names=tuple(names))

    async def snapshot(self, label: str = "", *, memory: bool = True, test: bool = True) -> Snapshot:
        """Keep this instant as `NAME@label`. memory: the running programs too. test: start it once before it counts as ready (in the background)."""
        return await self._verbs.snapshot(self.name, label, memory=memory, test=test)

    async def snapshots(self) -> builtins.list[Snapshot]:
        """Its own, the automatic ones too; oldest first."""
        return await self._verbs.snapshots(self.name)

    async def restore(self, snapshot: str = "") -> Machine:
        """Rewind it in place: it keeps its name and address, what it did since is gone. Without a name: to the last one."""
        self._record = await self._verbs.restore(self.name, snapshot)
        return self._record

    async def logs(self, *, source: str = "console", lines: int = 200) -> bytes:
        """The tail of the guest's console, or of QEMU's messages (`qemu`)."""
        return await self._verbs.logs(self.name, source=source, lines=lines)

    async def metrics(self) -> dict[str, float]:
        """The guest's own numbers: memory, cpu, pressure, disk."""
        return await self._verbs.metrics(self.name)

    async def open_port(self, guest: int, host: int = 0) -> Port:
        """Make a TCP port of the guest reachable on the host's loopback. host 0: any free one."""
        return await self._verbs.open_port(self.name, Port(guest=guest, host=host))

    async def close_port(self, guest: int) -> None:
        await self._verbs.close_port(self.name, guest)

    # processes

    async def run(
        self,
        command: str | Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str = "",
        user: str = "",
        timeout: float | None = None,
        stdin: bytes | str = b"",
        check: bool = False,
    ) -> Result:
        """Run a command to its end. A string runs through `sh -c`, a sequence as it is.

        timeout: seconds, then it is killed (ending `timeout`). check: GuestError unless its status is 0. OutcomeUnknownError when
        the line broke while it may have run; it is never run twice.
        """
        what = Command(argv=argv(command), env=dict(env or {}), cwd=cwd, user=user, timeout=timeout)
        result = await self._verbs.run(self.name, what, stdin.encode() if isinstance(stdin, str) else stdin)
        if check and result.status:
            said = (result.stderr or result.stdout).decode(errors="replace").strip()
            raise GuestError(
                f"`{command if isinstance(command, str) else ' '.join(command)}` ended with status {result.status}"
                + (f": {said.splitlines()[-1][:200]}" if said else ""),
                details={"status": result.status, "ending": result.ending, "output": said[-4096:]},
            )
        return result

    async def start(
        self,
        command: str | Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str = "",
        user: str = "",
        timeout: float | None = None,
        stdin: bool = False,
        detach: bool = False,
        label: str = "",
        on_stdout: Listener | None = None,
        on_stderr: Listener | None = None,
    ) -> AsyncProcess:
        """Start a command and return while it runs. stdin: it will be sent some. detach: it outlives this program.

        on_stdout, on_stderr: called with what it writes, as it comes (a coroutine is awaited); the stream itself stays empty then.
        """
        what = Command(
            argv=argv(command), env=dict(env or {}), cwd=cwd, user=user, timeout=timeout, stdin=stdin, detach=detach, label=label
        )
        return await AsyncProcess.open(self._verbs, self.name, self._verbs.execute(self.name, what), on_stdout, on_stderr)

    async def terminal(
        self,
        rows: int = 24,
        columns: int = 80,
        *,
        command: str | Sequence[str] = LOGIN_SHELL,
        env: Mapping[str, str] | None = None,
        cwd: str = "",
        user: str = "",
    ) -> AsyncTerminal:
        """A command on a terminal of its own; a login shell unless named."""
        size = Size(rows=rows, columns=columns)
        what = Command(argv=argv(command), env={"TERM": "xterm-256color", **(env or {})}, cwd=cwd, user=user, stdin=True, pty=size)
        return await AsyncTerminal.open(self._verbs, self.name, self._verbs.execute(self.name, what))

    async def processes(self) -> builtins.list[Process]:
        """What the agent started and has not forgotten."""
        return await self._verbs.processes(self.name)

    async def attach(self, process: int, *, on_stdout: Listener | None = None, on_stderr: Listener | None = None) -> AsyncProcess:
        """Follow a process that runs already; the last 64 KiB that nobody read come first. Who followed it before no longer does."""
        return await AsyncProcess.open(self._verbs, self.name, self._verbs.attach(self.name, process), on_stdout, on_stderr)

    async def signal(self, process: int, number: int = 15) -> None:
        """Signal a process's whole group."""
        await self._verbs.signal(self.name, process, number)

    async def forget(self, process: int) -> None:
        """Drop a finished process from the list."""
        await self._verbs.forget(self.name, process)
