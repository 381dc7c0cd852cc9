"""A registry behind a line of a known speed, for benches: in a network namespace behind `tc`, else on loopback behind a token bucket of ours.

Nothing of it outlives this process, however that ends: the registry is killed with it, the namespace is nobody's but the registry's, and with a
namespace goes the device that leads there.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import sys
import tempfile
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Protocol

from ramet import process, userns
from ramet.errors import HostError

KINDS = ("auto", "tc", "bucket")
_DEADLINE = 30.0  # seconds for a program that ends at once, and for the registry to listen
_PORT = 5000
_LATENCY = "50ms"  # that a packet may wait in tc's bucket before it is dropped
_LISTENS = re.compile(rb"listening on ([0-9.]+:\d+)")
_HINT = "Run `sudo apt-get install docker-registry iproute2`."


class Link(Protocol):
    """address: HOST:PORT of the registry. words: what the line is made of. data: where the registry keeps its blobs."""

    address: str
    words: str

    async def shape(self, rate: int) -> None:
        """So many bits a second each way from now on; 0: as many as it can."""

    async def received(self) -> int:
        """Bytes that came from the registry so far."""


@contextlib.asynccontextmanager
async def opened(kind: str = "auto", latency: float = 0.0) -> AsyncIterator[Link]:
    """An empty registry behind a line. kind: of KINDS; latency: seconds that its answers take longer, by a bucket only. HostError: it cannot be had here."""
    if not process.find("docker-registry"):
        raise HostError("the program docker-registry is not installed", hint=_HINT)
    with tempfile.TemporaryDirectory(prefix="ramet-bench-registry-") as directory:
        async with contextlib.AsyncExitStack() as stack:
            if kind == "tc" or (kind == "auto" and not latency and os.geteuid() == 0 and process.find("tc") and process.find("ip")):
                try:
                    link: Link = await stack.enter_async_context(_behind_tc(Path(directory)))
                except HostError:
                    if kind == "tc":
                        raise
                    link = await stack.enter_async_context(_behind_bucket(Path(directory), latency))
            else:
                link = await stack.enter_async_context(_behind_bucket(Path(directory), latency))
            with _allowed(link.address, Path(directory)):
                yield link


@contextlib.contextmanager
def _allowed(address: str, directory: Path) -> Iterator[None]:
    """Have it reached without TLS and without a proxy, in this process and those that it starts."""
    settings = directory / "config" / "containers"
    settings.mkdir(parents=True)
    (settings / "registries.conf").write_text(f'[[registry]]\nlocation = "{address}"\ninsecure = true\n')
    host = address.rpartition(":")[0]
    around = ",".join(filter(None, (os.environ.get("no_proxy") or os.environ.get("NO_PROXY"), host)))
    with _environment({"XDG_CONFIG_HOME": str(settings.parent), "no_proxy": around, "NO_PROXY": around}):
        yield


@contextlib.contextmanager
def _environment(changed: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in (*changed, "CONTAINERS_REGISTRIES_CONF")}
    os.environ.pop("CONTAINERS_REGISTRIES_CONF", None)  # it would win
    os.environ.update(changed)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            os.environ.update({name: value} if value is not None else {})


# By tc


class _Wire:
    """A pair of devices. The outer one's name is `device`; the other is in the namespace of a process."""

    INNER = "registry"

    def __init__(self, device: str, pid: int, address: str) -> None:
        self.address = address
        self.words = "a network namespace behind tc's tbf on both ends"
        self._device = device
        self._inside = ("nsenter", f"--net=/proc/{pid}/ns/net", "--")

    async def shape(self, rate: int) -> None:
        burst = max(64 << 10, rate // 8 // 400)  # bytes: of 2.5 ms
        for within, device in (((), self._device), (self._inside, self.INNER)):
            limit = ("tbf", "rate", f"{rate}bit", "burst", f"{burst}b", "latency", _LATENCY) if rate else ("noqueue",)
            await _run(*within, "tc", "qdisc", "replace", "dev", device, "root", *limit)

    async def received(self) -> int:
        return int(Path(f"/sys/class/net/{self._device}/statistics/rx_bytes").read_text())

    async def connect(self, outer: str, inner: str) -> None:
        """Make the devices. outer, inner: their addresses."""
        pid = self._inside[1].split("/")[2]
        await _run("ip", "link", "add", self._device, "type", "veth", "peer", "name", self.INNER, "netns", pid)
        await _run("ip", "address", "add", f"{outer}/30", "dev", self._device)
        await _run("ip", "link", "set", self._device, "up")
        for words in (("address", "add", f"{inner}/30", "dev", self.INNER), ("link", "set", self.INNER, "up")):
            await _run(*self._inside, "ip", *words)

    async def cut(self) -> None:
        await process.run(("ip", "link", "delete", self._device), deadline=_DEADLINE)  # it may have gone with its namespace


@contextlib.asynccontextmanager
async def _behind_tc(directory: Path) -> AsyncIterator[Link]:
    pid = os.getpid()
    base = (198 << 24 | 18 << 16) + (pid % (1 << 15)) * 4  # 198.18.0.0/15 is for measurements (RFC 2544)
    outer, inner = (".".join(map(str, (base + host).to_bytes(4, "big"))) for host in (1, 2))
    script = 'echo there && read -r go && exec docker-registry serve "$1"'
    command = userns.dying("unshare", "--net", "--", "sh", "-c", script, "sh", str(_settings(directory, f"{inner}:{_PORT}")))
    async with process.running(command, stdin=PIPE) as registry:
        assert registry.stdout and registry.stdin
        async with asyncio.timeout(_DEADLINE):
            if await registry.stdout.readline() != b"there\n":
                raise HostError("a network namespace cannot be made here")
        wire = _Wire(f"rametb{pid}", registry.pid, f"{inner}:{_PORT}")
        try:
            await wire.connect(outer, inner)
            await wire.shape(10**9)  # to see that it can be done, before anything is
            await wire.shape(0)
            registry.stdin.write(b"go\n")
            async with _listening(registry):
                yield wire
        finally:
            await wire.cut()


# By a bucket


class _Tap:
    """The bucket's process."""

    def __init__(self, bucket: Process, port: int, latency: float) -> None:
        self.address = f"127.0.0.1:{port}"
        far = f", whose answers come {latency * 1000:g} ms late" if latency else ""
        self.words = f"loopback behind a token bucket in a process of its own{far}"
        self._bucket = bucket

    async def shape(self, rate: int) -> None:
        await self._ask(f"rate {rate}")

    async def received(self) -> int:
        return await self._ask("received")

    async def _ask(self, question: str) -> int:
        assert self._bucket.stdin and self._bucket.stdout
        self._bucket.stdin.write(f"{question}\n".encode())
        async with asyncio.timeout(_DEADLINE):
            return int(await self._bucket.stdout.readline())


@contextlib.asynccontextmanager
async def _behind_bucket(directory: Path, latency: float) -> AsyncIterator[Link]:
    command = userns.dying("docker-registry", "serve", str(_settings(directory, "127.0.0.1:0")))
    async with process.running(command) as registry, _listening(registry) as address:
        tap = userns.dying(sys.executable, "-P", "-m", "ramet.bench.bucket", address, f"{latency}")
        async with process.running(tap, stdin=PIPE) as bucket:
            assert bucket.stdout
            async with asyncio.timeout(_DEADLINE):
                line = await bucket.stdout.readline()
            if not line.strip().isdigit():
                raise HostError(f"the token bucket did not start: {line.decode(errors='replace').strip()}")
            yield _Tap(bucket, int(line), latency)


# The registry


def _settings(directory: Path, address: str) -> Path:
    """The registry's configuration."""
    data = directory / "data"
    data.mkdir()
    written = directory / "registry.yml"
    written.write_text(
        json.dumps(  # JSON is YAML
            {
                "version": "0.1",
                "log": {"level": "info", "accesslog": {"disabled": True}},
                "storage": {"filesystem": {"rootdirectory": str(data)}},
                "http": {"addr": address, "secret": "bench"},
            }
        )
    )
    return written


@contextlib.asynccontextmanager
async def _listening(registry: Process) -> AsyncIterator[str]:
    """The address that it says it listens on. Its log is read all the while, so that it never waits for that."""
    loop = asyncio.get_running_loop()
    address: asyncio.Future[str] = loop.create_future()
    reading = loop.create_task(_read(registry, address))
    try:
        async with asyncio.timeout(_DEADLINE):
            found = await address
        yield found
    finally:
        reading.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await reading


async def _read(registry: Process, address: asyncio.Future[str]) -> None:
    assert registry.stdout
    seen = []
    while line := await registry.stdout.readline():
        if not address.done():
            seen.append(line.decode(errors="replace"))
            if found := _LISTENS.search(line):
                address.set_result(found[1].decode())
    if not address.done():
        address.set_exception(HostError(f"the registry did not start: {''.join(seen[-3:]).strip()}", hint=_HINT))


async def _run(*argv: str) -> None:
    (await process.run(argv, deadline=_DEADLINE)).check()
