"""A `Verbs` in memory, used only to test how HTTP maps to it, and a server for it inside the test's process."""

from __future__ import annotations

import asyncio
import builtins
import contextlib
import dataclasses
import io
import itertools
import os
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import AsyncIterable, AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI

from ramet.client import Client
from ramet.errors import ExistsError, GuestNotFoundError, NoCapacityError, NotFoundError
from ramet.model import (
    Accelerator,
    Channel,
    Command,
    Ending,
    Event,
    Exit,
    FileInfo,
    FileType,
    HostInfo,
    Machine,
    Output,
    Port,
    Process,
    ProcessEvent,
    Reclaim,
    Result,
    Size,
    Spec,
    Started,
    State,
)
from ramet.server.app import create_app
from ramet.verbs import WRITE_FLAGS, Verbs
from tests.unit.lineage import Lineage

TOKEN = "a-token-for-tests"


class Memory(Lineage):
    """Machines that are records, processes that are scripts named by argv[0], files in a dict. `seen` lists the calls, for tests to look at."""

    def __init__(self) -> None:
        super().__init__()
        self.machines: dict[str, Machine] = {}
        self.files: dict[str, tuple[bytes, int]] = {}
        self.seen: builtins.list[tuple[object, ...]] = []
        self.live: dict[int, asyncio.Queue[bytes | None]] = {}
        self.killed: set[int] = set()
        self.advanced = 0  # how often a stream was asked for its next item
        self.stalled = asyncio.Event()  # while clear, `slow` uploads are not read on
        self.listeners: dict[asyncio.Queue[Event], asyncio.AbstractEventLoop] = {}
        self.numbers = itertools.count(1)
        self.signals: builtins.list[int] = [9]

    def stock(self) -> None:
        """A running machine `m`, a failed one, a stopped one; a file and a directory."""
        running = Machine(
            id="id-m", name="m", state=State.RUNNING, spec=Spec(name="m"), created_at=time.time() - 90, accelerator=Accelerator.TCG
        )
        self.machines["m"] = running
        self.machines["bad"] = dataclasses.replace(
            running, id="id-bad", name="bad", state=State.FAILED, reason="QEMU died\x1b[2J: out of memory"
        )
        self.machines["idle"] = dataclasses.replace(running, id="id-idle", name="idle", state=State.STOPPED)
        self.files["/f"] = b"data\n", 0o640
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w") as tar:
            member = tarfile.TarInfo("./inside")
            member.size = 4
            tar.addfile(member, io.BytesIO(b"tree"))
            link = tarfile.TarInfo("./out")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(link)
        self.files["/dir"] = out.getvalue(), 0o40755

    def _machine(self, name: str) -> Machine:
        if name not in self.machines:
            raise NotFoundError(f"there is no machine {name}", hint="`ramet list` shows the names.", details={"name": name})
        return self.machines[name]

    async def info(self) -> HostInfo:
        return HostInfo(
            version="1", accelerator=Accelerator.TCG, accelerator_reason="no /dev/kvm", kernel="6.1", kernel_kind="debian", kernel_build="",
            qemu="7.2", cpus=2, memory=8 << 30, memory_available=4 << 30, disk_available=1 << 40, machines=len(self.machines), running=0,
            network="user", state_dir="/x", limits=("no cgroups",),
        )  # fmt: skip

    async def create(self, spec: Spec) -> Machine:
        if spec.name in self.machines:
            raise ExistsError(f"{spec.name} exists", hint="Choose another name.")
        made = Machine(id=f"id-{spec.name}", name=spec.name, state=State.RUNNING, spec=spec, created_at=1.5, ports=spec.ports)
        self.machines[spec.name] = made
        self.tell(Event(at=2.0, kind="state", machine=spec.name, state=State.RUNNING))
        return made

    async def list(self) -> list[Machine]:
        return list(self.machines.values())

    async def get(self, name: str) -> Machine:
        return self._machine(name)

    async def start(self, name: str) -> Machine:
        self.seen.append(("start", name))
        return self._machine(name)

    async def stop(self, name: str, *, force: bool = False) -> Machine:
        self.seen.append(("stop", name, force))
        return self._machine(name)

    async def update(self, name: str, *, memory: int | None = None, reclaim: Reclaim | None = None) -> Machine:
        self.seen.append(("update", name, memory, reclaim))
        machine = self._machine(name)
        limit = machine.memory_limit if memory is None else memory
        if limit and limit > machine.spec.memory:
            raise NoCapacityError("no capacity", details={"retry_after": 30})
        spec = dataclasses.replace(machine.spec, reclaim=reclaim or machine.spec.reclaim)
        has = max(limit or spec.memory, 128 << 20)  # a guest that needs so much
        self.machines[name] = dataclasses.replace(machine, spec=spec, memory_limit=limit, memory_granted=has)
        return self.machines[name]

    async def delete(self, name: str) -> None:
        del self.machines[self._machine(name).name]

    async def logs(self, name: str, *, source: str = "console", lines: int = 200) -> bytes:
        return f"{name} {source} {lines}\n".encode() + b"\xff"

    async def metrics(self, name: str) -> dict[str, float]:
        return {"mem_total": 1, "load1": 0.5}

    async def run(self, name: str, command: Command, stdin: bytes = b"") -> Result:
        self._machine(name)
        self.seen.append(("run", command, stdin))
        match command.argv[0]:
            case "hang":
                try:
                    await asyncio.sleep(60)
                finally:
                    self.seen.append(("cancelled",))
            case "broken":
                raise RuntimeError("a bug")
            case "cat":
                return Result(ending=Ending.EXITED, code=0, status=0, stdout=stdin, stderr=b"", duration=0.25, truncated=3)
            case "missing":
                raise GuestNotFoundError("missing: not found", details={"errno": "ENOENT"})
        return Result(ending=Ending.EXITED, code=3, status=3, stdout=b"out\n", stderr="é\n".encode(), duration=0.25)

    async def execute(self, name: str, command: Command) -> AsyncIterator[ProcessEvent]:
        self._machine(name)
        number = next(self.numbers)
        self.seen.append(("execute", command))
        if command.argv[0] == "missing":
            raise GuestNotFoundError("missing: not found", details={"errno": "ENOENT"})
        self.live[number] = asyncio.Queue(1)
        ended = False
        try:
            yield Started(process=number, pid=100 + number)
            async for event in self._script(number, command):
                self.advanced += 1
                yield event
            ended = True
        finally:
            if not ended:
                self.killed.add(number)
            del self.live[number]

    async def _script(self, number: int, command: Command) -> AsyncIterator[ProcessEvent]:
        match command.argv[0]:
            case "echo":
                yield Output(channel=Channel.STDOUT, data=" ".join(command.argv[1:]).encode() + b"\n")
                yield Output(channel=Channel.STDERR, data=b"done\n")
            case "cat":
                while (data := await self.live[number].get()) is not None:
                    yield Output(channel=Channel.STDOUT, data=data)
            case "sh":  # a shell of few words: `exit`, `size`, else it says what it heard
                while (data := await self.live[number].get()) is not None:
                    if b"exit" in data:
                        yield Exit(ending=Ending.EXITED, code=7)
                        return
                    yield Output(channel=Channel.STDOUT, data=b"<" + data + b">")
                yield Exit(ending=Ending.SIGNALED, code=1)
                return
            case "deaf":
                await asyncio.sleep(60)
            case "sleep":
                while await self.live[number].get() is not None:
                    pass
                yield Exit(ending=Ending.SIGNALED, code=int(self.signals[-1]))
                return
            case "yes":
                while True:
                    yield Output(channel=Channel.STDOUT, data=b"y\n" * 16384)
            case "dies":
                yield Output(channel=Channel.STDOUT, data=b"so far\n")
                raise GuestNotFoundError("the guest is gone", hint="h", details={"errno": "EIO"})
            case "bug":
                yield Output(channel=Channel.STDOUT, data=b"so far\n")
                raise RuntimeError("a bug")
        yield Exit(ending=Ending.EXITED, code=int(command.env.get("CODE", "0")))

    async def attach(self, name: str, process: int) -> AsyncIterator[ProcessEvent]:
        yield Started(process=process, pid=1)
        yield Output(channel=Channel.STDOUT, data=b"tail\n")
        yield Exit(ending=Ending.SIGNALED, code=9)

    async def processes(self, name: str) -> builtins.list[Process]:
        return [
            Process(id=n, pid=100 + n, state="running", code=0, started_at=1.0, detached=False, attached=True, label="l", command="c")
            for n in self.live
        ]

    async def send_input(self, name: str, process: int, data: bytes, *, eof: bool = False) -> None:
        self.seen.append(("input", process, data, eof))
        if process not in self.live:
            raise GuestNotFoundError(f"there is no process {process}")
        if data:
            await self.live[process].put(data)
        if eof:
            await self.live[process].put(None)

    async def signal(self, name: str, process: int, signal: int) -> None:
        self.seen.append(("signal", process, signal))
        self.signals.append(signal)
        if process in self.live:
            await self.live[process].put(None)

    async def resize(self, name: str, process: int, rows: int, columns: int) -> None:
        self.seen.append(("resize", process, Size(rows=rows, columns=columns)))

    async def forget(self, name: str, process: int) -> None:
        self.seen.append(("forget", process))

    async def read_file(self, name: str, path: str, *, offset: int = 0, length: int = -1, user: str = "") -> AsyncIterator[bytes]:
        self.seen.append(("read", path, offset, length, user))
        if path == "/endless":
            while True:
                self.advanced += 1
                yield bytes(64 << 10)
        if path not in self.files:
            raise GuestNotFoundError(f"{path}: no such file")
        data = self.files[path][0][offset:]
        data = data if length < 0 else data[:length]
        for at in range(0, len(data), 65536):
            yield data[at : at + 65536]
        if path == "/torn":
            raise GuestNotFoundError("the disk is torn", hint="mend it")

    async def write_file(
        self,
        name: str,
        path: str,
        data: AsyncIterable[bytes],
        *,
        mode: int = 0o644,
        offset: int = 0,
        flags: str = WRITE_FLAGS,
        user: str = "",
    ) -> None:
        self.seen.append(("write", path, mode, offset, flags, user))
        parts: builtins.list[bytes] = []
        async for part in data:
            self.advanced += 1
            if path == "/full":
                raise GuestNotFoundError("/full: no space left on device", details={"errno": "ENOSPC"})
            if path == "/slow":
                await self.stalled.wait()
                continue
            parts.append(part)
        self.files[path] = (b"".join(parts), mode)

    async def stat_file(self, name: str, path: str, *, user: str = "") -> FileInfo:
        if path not in self.files:
            raise GuestNotFoundError(f"{path}: no such file")
        data, mode = self.files[path]
        kind = FileType.DIRECTORY if mode & 0o40000 else FileType.FILE
        return FileInfo(
            name=path.rpartition("/")[2], type=kind, mode=mode & 0o7777, uid=0, gid=0, size=len(data), modified_at=1.25, links=1
        )

    async def list_files(self, name: str, path: str, *, user: str = "") -> builtins.list[FileInfo]:
        return [await self.stat_file(name, each) for each in sorted(self.files)]

    async def remove_file(self, name: str, path: str, *, recursive: bool = False, user: str = "") -> None:
        self.seen.append(("remove", path, recursive, user))
        self.files.pop(path, None)

    async def rename_file(self, name: str, path: str, target: str, *, user: str = "") -> None:
        self.files[target] = self.files.pop(path)

    async def make_dir(self, name: str, path: str, *, mode: int = 0o755, parents: bool = True, user: str = "") -> None:
        self.seen.append(("mkdir", path, mode, parents, user))

    async def pack(self, name: str, path: str, *, user: str = "") -> AsyncIterator[bytes]:
        yield self.files[path][0]

    async def unpack(self, name: str, path: str, data: AsyncIterable[bytes], *, owners: bool = False, user: str = "") -> None:
        self.files[path] = (b"".join([part async for part in data]), 0)
        self.seen.append(("unpack", path, owners, user))

    async def open_port(self, name: str, port: Port) -> Port:
        return Port(guest=port.guest, host=port.host or 40000)

    async def close_port(self, name: str, guest: int) -> None:
        self.seen.append(("close_port", guest))

    def tell(self, event: Event) -> None:
        """From any thread."""
        for listener, loop in list(self.listeners.items()):
            loop.call_soon_threadsafe(listener.put_nowait, event)

    async def events(self, name: str = "") -> AsyncIterator[Event]:
        queue: asyncio.Queue[Event] = asyncio.Queue()
        self.listeners[queue] = asyncio.get_running_loop()
        try:
            while True:
                yield await queue.get()
        finally:
            self.listeners.pop(queue, None)


_: type[Verbs] = Memory


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers."""

    @contextlib.contextmanager
    def capture_signals(self):  # type: ignore[no-untyped-def]
        yield


_idle: list[FastAPI] = []


@contextlib.contextmanager
def _app(verbs: Verbs, heartbeat: float) -> Iterator[FastAPI]:
    """An application over `verbs`. Those that served are used again: FastAPI takes half a second to look at all routes, at the first request."""
    app = _idle.pop() if _idle else create_app(verbs, TOKEN)
    app.state.verbs, app.state.heartbeat = verbs, heartbeat
    yield app
    _idle.append(app)


@contextlib.asynccontextmanager
async def serving(verbs: Verbs, path: Path, heartbeat: float = 15.0) -> AsyncIterator[str]:
    """A server on a Unix socket; its URL."""
    with socket.socket(socket.AF_UNIX) as listener, _app(verbs, heartbeat) as app:
        listener.bind(str(path))
        listener.listen(200)
        config = uvicorn.Config(app, log_config=None, lifespan="off", ws="none", http="httptools", timeout_graceful_shutdown=2)
        server = _Server(config)
        task = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            yield f"unix://{path}"
        finally:
            server.should_exit = True
            await task


@contextlib.asynccontextmanager
async def pair(verbs: Verbs, path: Path, heartbeat: float = 15.0) -> AsyncIterator[Client]:
    """A server and a client of it."""
    async with serving(verbs, path, heartbeat) as url, Client(url, TOKEN) as client:
        yield client


@contextlib.contextmanager
def beside(verbs: Verbs, path: Path) -> Iterator[str]:
    """A server in a thread of its own, for clients that bring their own loop, or none; its URL."""
    loop = asyncio.new_event_loop()
    ready, over = threading.Event(), asyncio.Event()

    async def work() -> None:
        async with serving(verbs, path):
            ready.set()
            await over.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(work()))
    thread.start()
    assert ready.wait(60)
    try:
        yield f"unix://{path}"
    finally:
        loop.call_soon_threadsafe(over.set)
        thread.join(60)
        loop.close()


ARGV = [sys.executable, "-c", "from ramet.cli import main; main()"]
COMPLETING = [sys.executable, "-c", "from ramet.cli import base, main; base.COMPLETION = 60; main()"]  # on a busy host


def environment(url: str, **more: str) -> dict[str, str]:
    """For the command line, so that it finds the server."""
    return {**os.environ, "RAMET_URL": url, "RAMET_TOKEN": TOKEN, "COLUMNS": "80", **more}


def program(
    url: str, arguments: builtins.list[str], *, stdin: bytes | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[bytes]:
    """Run the command line to its end."""
    given: Any = {"input": stdin} if stdin is not None else {"stdin": subprocess.DEVNULL}
    return subprocess.run([*ARGV, *arguments], capture_output=True, env=environment(url), cwd=cwd, timeout=60, **given)


async def until(condition, seconds: float = 60.0) -> float:  # type: ignore[no-untyped-def]
    """Wait for what another task does; the seconds it took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, "it did not happen"
        await asyncio.sleep(0.005)
    return time.monotonic() - began
