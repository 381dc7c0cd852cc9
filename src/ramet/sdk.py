"""The SDK without an event loop: the same methods as `aio`, each run to its end on one background loop.

Nothing is written twice: a method here is the asynchronous one with a `wait` around it, and keeps its signature and its text, as type
checkers and `help()` see them.
"""

from __future__ import annotations

import asyncio
import atexit
import builtins
import functools
import os
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

from ramet import aio, filesystem, streams
from ramet.model import Exit, State
from ramet.model import Machine as Record

P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S")

_lock = threading.Lock()
_running: tuple[int, asyncio.AbstractEventLoop, threading.Thread] | None = None  # the process that began it: a fork has no threads


def _loop() -> asyncio.AbstractEventLoop:
    """The background loop, begun when first needed."""
    global _running
    with _lock:
        if _running is None or _running[0] != os.getpid():
            loop = asyncio.new_event_loop()
            # A daemon: the interpreter would wait for any other thread before it runs `_end`.
            thread = threading.Thread(target=loop.run_forever, name="ramet", daemon=True)
            thread.start()
            _running = os.getpid(), loop, thread
        return _running[1]


@atexit.register
def close() -> None:
    """End what runs on the background loop, with it the processes that are not detached, and the loop. It begins again when needed."""
    global _running
    with _lock:
        ended, _running = _running, None
    if ended is None or ended[0] != os.getpid():
        return
    _, loop, thread = ended

    async def finish() -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=2)
        await aio.disconnect()
        await loop.shutdown_asyncgens()
        loop.stop()

    asyncio.run_coroutine_threadsafe(finish(), loop)
    thread.join(3)
    if not thread.is_alive():
        loop.close()


def wait(work: Coroutine[Any, Any, R]) -> R:
    """Run a coroutine on the background loop to its end; interrupted (Ctrl-C), it is cancelled."""
    future = asyncio.run_coroutine_threadsafe(work, _loop())
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise


def _waits(method: Callable[Concatenate[Any, P], Coroutine[Any, Any, R]]) -> Callable[Concatenate[Any, P], R]:
    """The method, waited for."""

    @functools.wraps(method)
    def call(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return wait(method(self.inner, *args, **kwargs))

    return call


def _gives(method: Callable[Concatenate[Any, P], Coroutine[Any, Any, R]], face: Callable[[R], S]) -> Callable[Concatenate[Any, P], S]:
    """The method, waited for, its result in a face of ours."""

    @functools.wraps(method)
    def call(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> S:
        return face(wait(method(self.inner, *args, **kwargs)))

    return call


def _makes(maker: Callable[P, Coroutine[Any, Any, R]], face: Callable[[R], S]) -> Callable[P, S]:
    """A class method, waited for, its result in a face of ours."""

    @functools.wraps(maker)
    def call(*args: P.args, **kwargs: P.kwargs) -> S:
        return face(wait(maker(*args, **kwargs)))

    return call


async def _next(source: AsyncIterator[R]) -> R:
    return await source.__anext__()


async def _close(source: AsyncIterator[Any]) -> None:
    if ending := getattr(source, "aclose", None):
        await ending()


def _iterate(source: AsyncIterator[R]) -> Iterator[R]:
    try:
        while True:
            try:
                item = wait(_next(source))
            except StopAsyncIteration:
                return
            yield item
    finally:
        wait(_close(source))


class Output:
    """stdout or stderr of a process: iterate over it, `read()` it, or take its `lines()`. What nobody reads is kept up to 1 MiB."""

    def __init__(self, inner: streams.AsyncOutput) -> None:
        self.inner = inner

    def __iter__(self) -> Iterator[bytes]:
        return _iterate(aiter(self.inner))

    def lines(self) -> Iterator[str]:
        """Lines as text, without their ends."""
        return _iterate(self.inner.lines())

    @property
    def dropped(self) -> int:
        """Bytes that nobody read in time."""
        return self.inner.dropped

    read = _waits(streams.AsyncOutput.read)


class Input:
    """stdin of a process."""

    def __init__(self, inner: streams.AsyncInput) -> None:
        self.inner = inner

    write = _waits(streams.AsyncInput.write)
    close = _waits(streams.AsyncInput.close)


class Process:
    """A running process. Leaving its `with`, or `close()`, kills it unless it was started detached; so does the end of the program."""

    def __init__(self, inner: streams.AsyncProcess) -> None:
        self.inner = inner
        self.stdin = Input(inner.stdin)
        self.stdout = Output(inner.stdout)
        self.stderr = Output(inner.stderr)

    @property
    def id(self) -> int:
        """The agent's number for it."""
        return self.inner.id

    @property
    def pid(self) -> int:
        """In the guest."""
        return self.inner.pid

    @property
    def exit(self) -> Exit | None:
        """How it ended, None while it runs."""
        return self.inner.exit

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        wait(self.inner.close())

    wait = _waits(streams.AsyncProcess.wait)
    signal = _waits(streams.AsyncProcess.signal)
    kill = _waits(streams.AsyncProcess.kill)
    close = _waits(streams.AsyncProcess.close)


class Terminal(Process):
    """A process on a terminal of its own; its output is `stdout`."""

    write = _waits(streams.AsyncTerminal.write)
    resize = _waits(streams.AsyncTerminal.resize)


class Files:
    """Paths are the guest's, absolute. user: who does it in the guest; empty: root."""

    def __init__(self, inner: filesystem.AsyncFiles) -> None:
        self.inner = inner

    def stream(self, path: str, *, offset: int = 0, length: int = -1, user: str = "") -> Iterator[bytes]:
        """The bytes of a file as they come. length -1: to its end."""
        return _iterate(self.inner.stream(path, offset=offset, length=length, user=user))

    read = _waits(filesystem.AsyncFiles.read)
    read_text = _waits(filesystem.AsyncFiles.read_text)
    write = _waits(filesystem.AsyncFiles.write)
    list = _waits(filesystem.AsyncFiles.list)
    stat = _waits(filesystem.AsyncFiles.stat)
    exists = _waits(filesystem.AsyncFiles.exists)
    is_dir = _waits(filesystem.AsyncFiles.is_dir)
    remove = _waits(filesystem.AsyncFiles.remove)
    rename = _waits(filesystem.AsyncFiles.rename)
    make_dir = _waits(filesystem.AsyncFiles.make_dir)
    upload = _waits(filesystem.AsyncFiles.upload)
    download = _waits(filesystem.AsyncFiles.download)


def _machine(inner: aio.AsyncMachine) -> Machine:
    return Machine(inner)


def _machines(inner: builtins.list[aio.AsyncMachine]) -> builtins.list[Machine]:
    return [Machine(each) for each in inner]


class Host:
    """What is not one machine's: snapshots, templates, layers, registries, and who descends from whom.

    >>> host = Host()
    >>> host.template("demo@warm", "demo:1", pool=2)
    >>> Machine.create_from("demo:1", "quick")
    """

    def __init__(self, inner: aio.AsyncHost | None = None) -> None:
        self.inner = inner or aio.AsyncHost()

    def export_layer(self, layer: str) -> Iterator[bytes]:
        """The layer with all it stands on, as the raw image."""
        return _iterate(self.inner.export_layer(layer))

    def read_blob(self, digest: str, *, offset: int = 0, length: int = -1) -> Iterator[bytes]:
        """Bytes of a blob (zstd seekable). NotFoundError where they are not here."""
        return _iterate(self.inner.read_blob(digest, offset=offset, length=length))

    info = _waits(aio.AsyncHost.info)
    snapshots = _waits(aio.AsyncHost.snapshots)
    get_snapshot = _waits(aio.AsyncHost.get_snapshot)
    template = _waits(aio.AsyncHost.template)
    delete_snapshot = _waits(aio.AsyncHost.delete_snapshot)
    tree = _waits(aio.AsyncHost.tree)
    layers = _waits(aio.AsyncHost.layers)
    get_layer = _waits(aio.AsyncHost.get_layer)
    verify_layer = _waits(aio.AsyncHost.verify_layer)
    push = _waits(aio.AsyncHost.push)
    pull = _waits(aio.AsyncHost.pull)
    convert = _waits(aio.AsyncHost.convert)
    gc = _waits(aio.AsyncHost.gc)
    fsck = _waits(aio.AsyncHost.fsck)


class Machine:
    """A machine. Made by `create`, `create_from`, `get` and `list`. `files` are its files.

    >>> machine = Machine.create("demo", memory="512MiB")
    >>> machine.run("uname -r").text
    """

    def __init__(self, inner: aio.AsyncMachine) -> None:
        self.inner = inner
        self.files = Files(inner.files)

    def __repr__(self) -> str:
        return repr(self.inner)

    @property
    def name(self) -> str:
        return self.inner.name

    @property
    def record(self) -> Record:
        """The machine as it was when last asked for; `refresh` asks."""
        return self.inner.record

    @property
    def state(self) -> State:
        """As it was when last asked for."""
        return self.inner.state

    create = staticmethod(_makes(aio.AsyncMachine.create, _machine))
    create_from = staticmethod(_makes(aio.AsyncMachine.create_from, _machine))
    get = staticmethod(_makes(aio.AsyncMachine.get, _machine))
    list = staticmethod(_makes(aio.AsyncMachine.list, _machines))

    refresh = _waits(aio.AsyncMachine.refresh)
    power_on = _waits(aio.AsyncMachine.power_on)
    stop = _waits(aio.AsyncMachine.stop)
    update = _waits(aio.AsyncMachine.update)
    delete = _waits(aio.AsyncMachine.delete)
    pause = _waits(aio.AsyncMachine.pause)
    resume = _waits(aio.AsyncMachine.resume)
    hibernate = _waits(aio.AsyncMachine.hibernate)
    compact = _waits(aio.AsyncMachine.compact)
    fork = _gives(aio.AsyncMachine.fork, _machines)
    fork_outcomes = _waits(aio.AsyncMachine.fork_outcomes)
    snapshot = _waits(aio.AsyncMachine.snapshot)
    snapshots = _waits(aio.AsyncMachine.snapshots)
    restore = _waits(aio.AsyncMachine.restore)
    logs = _waits(aio.AsyncMachine.logs)
    metrics = _waits(aio.AsyncMachine.metrics)
    open_port = _waits(aio.AsyncMachine.open_port)
    close_port = _waits(aio.AsyncMachine.close_port)
    run = _waits(aio.AsyncMachine.run)
    start = _gives(aio.AsyncMachine.start, Process)
    terminal = _gives(aio.AsyncMachine.terminal, Terminal)
    attach = _gives(aio.AsyncMachine.attach, Process)
    processes = _waits(aio.AsyncMachine.processes)
    signal = _waits(aio.AsyncMachine.signal)
    forget = _waits(aio.AsyncMachine.forget)
