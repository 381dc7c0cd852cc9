"""The daemon is killed with -9 in the middle of a whole push, a whole pull and a start from a registry. What was whole is not sent or fetched again."""

from __future__ import annotations

import asyncio
import collections
import json
import re
import shutil
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import pytest_asyncio

from ramet import artifact, images, process, restoring
from ramet.engine import Engine
from ramet.model import State
from ramet.paths import StateDir
from ramet.registry.upload import PIECE
from ramet.store import remote
from tests.fixtures import Artifacts, Box, States
from tests.host.conftest import Registry, registries
from tests.host.oddregistry import serving
from tests.leaks import Scratch
from tests.machine.aftermath import Nursery, Trouble, busy, goes_on, settled, sound, swept, went_on
from tests.machine.test_build import RAMET, built, definition
from tests.machine.witness import saved

__all__ = ["registries"]
DEADLINE = 120.0
NOISE = 20 << 20  # bytes in the memory, in a blob that takes more than one request to send
_READ = 64 << 10


@dataclass(frozen=True)
class Trap:
    """Where a request stops on its way: of a method, to what the pattern is found in, after so many bytes of its body; answer: of the answer's body, -1:
    before any of it; nth: not before so many of them came so far."""

    method: str
    target: str
    sent: int | None = None
    answer: int | None = None
    nth: int = 1

    def __str__(self) -> str:
        where = f"answer {self.answer}" if self.sent is None else f"sent {self.sent}"
        return f"{self.method} {self.target} {self.nth}, {where}"


@dataclass
class Front:
    """A way to a registry on which what comes to `trap` stops until `open` is called. sent, came: bytes of blobs, by upload and digest."""

    registry: Registry
    address: str = ""
    trap: Trap | None = None
    seen: int = 0
    sprung: asyncio.Event = field(default_factory=asyncio.Event)
    sent: collections.Counter[str] = field(default_factory=collections.Counter)
    came: collections.Counter[str] = field(default_factory=collections.Counter)
    _opened: asyncio.Event = field(default_factory=asyncio.Event)
    _lose: bool = True

    @property
    def name(self) -> str:
        return f"{self.address}/acme/shop:1"

    def set(self, trap: Trap | None) -> None:
        self.trap, self.seen, self.sprung, self._opened = trap, 0, asyncio.Event(), asyncio.Event()
        self.sent.clear()
        self.came.clear()

    def open(self, *, lost: bool = True) -> None:
        """What has stopped is lost, or goes on."""
        self.trap, self._lose = None, lost
        self._opened.set()

    def fetched(self, digests: Iterable[str]) -> int:
        """Bytes of these blobs that came."""
        return sum(self.came[digest] for digest in digests)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, which has one request."""
        host, _, port = self.registry.address.rpartition(":")
        try:
            back, forth = await asyncio.open_connection(host, int(port))
            try:
                await self._carry(reader, writer, back, forth)
            finally:
                forth.transport.abort()
        except (OSError, asyncio.IncompleteReadError):
            pass  # either end broke it
        finally:
            writer.close()

    async def _carry(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, back: asyncio.StreamReader, forth: asyncio.StreamWriter
    ) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        method, target, _ = head.split(b"\r\n")[0].decode().split(" ")
        length = int(found[1]) if (found := re.search(rb"(?i)content-length: *(\d+)", head)) else 0
        lines = [line for line in head.split(b"\r\n") if not line.lower().startswith(b"connection:")]
        self.seen += bool(self.trap and self.trap.method == method and re.search(self.trap.target, target))
        await self._pass(method, target, sent=-1)
        forth.write(b"\r\n".join([*lines[:-2], b"Connection: close", b"", b""]))
        done = 0
        while done < length:
            piece = await reader.read(min(_READ, length - done))
            if not piece:
                return
            done += len(piece)
            await self._pass(method, target, sent=done)
            self.sent[target] += len(piece) if "/blobs/" in target else 0
            forth.write(piece)
            await forth.drain()
        answer = await back.readuntil(b"\r\n\r\n")
        await self._pass(method, target, answer=-1)
        writer.write(answer)
        done = 0
        while piece := await back.read(_READ):
            done += len(piece)
            await self._pass(method, target, answer=done)
            if method == "GET" and "/blobs/sha256" in target:
                self.came[target.rpartition("/")[2]] += len(piece)
            writer.write(piece)
            await writer.drain()

    async def _pass(self, method: str, target: str, *, sent: int | None = None, answer: int | None = None) -> None:
        trap = self.trap
        if not trap or self.seen < trap.nth or method != trap.method or not re.search(trap.target, target):
            return
        for count, at in ((sent, trap.sent), (answer, trap.answer)):
            if count is not None and at is not None and (count >= at >= 0 or count == at):
                self.sprung.set()
                await self._opened.wait()
                if self._lose:
                    raise ConnectionResetError


@dataclass(frozen=True)
class Shop:
    """A machine that counts, and a snapshot of it that has its memory."""

    state: StateDir
    snapshot: str = "victim@good"


def alone(state: StateDir) -> StateDir:
    """Have the records of images to itself: which layer one is is written down in them."""
    shared = state.images.readlink()
    state.images.unlink()
    for path in shared.glob("sha256-*"):
        place = state.images / path.name
        place.mkdir(parents=True)
        shutil.copy(path / "image.json", place)
        (place / "disk.raw").symlink_to(path / "disk.raw")
    forget(state)
    return state


def forget(state: StateDir) -> None:
    """As if nothing had ever been pushed from it."""
    state.pushes.unlink(missing_ok=True)
    for path in state.images.glob("sha256-*"):
        images.set_layer(state, path.name.replace("-", ":", 1), "")


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def shop(artifacts: Artifacts, scratch: Scratch, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Shop]:
    made = Shop(alone(States(artifacts, scratch, tmp_path_factory.mktemp("shop")).new()))
    async with Engine.open(made.state) as engine:
        await engine.create(artifacts.spec("victim"))
        box = Box(engine, "victim")
        await box.sh(
            f"dd if=/dev/urandom of=/run/noise bs=1M count={NOISE >> 20}; sha256sum /run/noise > /run/sum; echo kept > /srv/word; sync"
        )
        await busy(box)
        await engine.snapshot("victim", "good")
        await saved(engine, made.snapshot)
    yield made
    forget(made.state)
    async with swept(made.state):
        pass


@pytest_asyncio.fixture(loop_scope="session")
async def front(registries: Callable[..., Registry]) -> AsyncIterator[Front]:
    made = Front(registries())
    async with serving(made.serve) as made.address:
        yield made


@pytest_asyncio.fixture(loop_scope="session")
async def nursery(artifacts: Artifacts, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Nursery]:
    """Its engines fetch only what somebody waits for; what a start touches is soon known here."""
    monkeypatch.setattr(restoring, "_TRACED", 0.1)
    monkeypatch.setenv("RAMET_FETCH_RATE", "0")
    async with Nursery.open() as made:
        yield made


async def killed(
    front: Front, nursery: Nursery, state: StateDir, moment: str | Trap, verb: str, *, lost: bool = True, **arguments: str | bool
) -> None:
    """An engine is killed at a moment, its own or one of its line to the registry. lost: what was held up there does not come any more."""
    if isinstance(moment, str):
        front.set(None)
        await nursery.die(state, moment, verb, **arguments)
        return
    front.set(moment)
    pid = await nursery.begin(state, "never", verb, **arguments)
    async with asyncio.timeout(DEADLINE):
        await front.sprung.wait()
    await nursery.end(pid)
    front.open(lost=lost)


def stray(state: StateDir) -> list[str]:
    """What is half-made: no operation is under way."""
    places = [state.root, state.images, state.snapshots, state.store.root, state.store.blobs, state.store.remotes]
    places += [*state.images.glob("sha256-*"), *state.store.layers.iterdir()]
    return [str(path) for place in places for path in place.iterdir() if ".new" in path.name]


async def clean(engine: Engine) -> None:
    """Nothing is wrong, and nothing is there that nobody needs."""
    await sound(engine)
    wrong = [*await engine.fsck(), *stray(engine._ops.state)]
    assert not wrong, wrong
    gone = await engine.gc()
    assert not gone.layers + gone.blobs + gone.postponed, gone


# What a registry has, by its own files


def blobs(registry: Registry) -> dict[str, int]:
    """Those that a repository has: their sizes."""
    found = (registry.data / "docker/registry/v2/repositories/acme/shop/_layers/sha256").glob("*/link")
    return {digest: registry.blob(digest).stat().st_size for digest in (path.read_text() for path in found)}


def tagged(registry: Registry, kind: str = "") -> dict[str, int]:
    """The blobs that the tag names, perhaps only those of a kind, with their sizes; empty when there is no tag."""
    link = registry.data / "docker/registry/v2/repositories/acme/shop/_manifests/tags/1/current/link"
    if not link.exists():
        return {}
    manifest = json.loads(registry.blob(link.read_text()).read_bytes())
    return {each["digest"]: each["size"] for each in [manifest["config"], *manifest["layers"]] if kind in ("", each["mediaType"])}


def few(moments: list[str]) -> list[str]:
    """Of what is done again and again only the first time and the last. How a layer is made is tested where machines are saved."""
    moments = [each for each in moments if not each.startswith(("store:seal", "store:publish", "name:store/layers/.new-"))]
    names = [each.partition("#")[0] for each in moments]
    last = {name: at for at, name in enumerate(names)}
    return [each for at, each in enumerate(moments) if "#" not in each or at == last[names[at]]]


# Pushes


BETWEEN = Trap("PATCH", "/uploads/", nth=2, sent=-1)  # two pieces
LINE = (
    Trap("HEAD", "/blobs/sha256", answer=-1),
    Trap("POST", "/uploads/$", answer=-1),  # an upload has begun, and nobody knows of it
    Trap("PATCH", "/uploads/", sent=1 << 20),
    Trap("PATCH", "/uploads/", answer=-1),  # a piece is there, and nobody knows of it
    BETWEEN,
    Trap("PUT", "/uploads/", sent=1),
    Trap("PUT", "/uploads/", answer=-1),  # a blob is there, and nobody knows of it
    Trap("PUT", "/manifests/", sent=-1),
    Trap("PUT", "/manifests/", answer=-1),  # the tag is there, and nobody knows of it
)


async def test_killed_while_pushing(shop: Shop, front: Front, nursery: Nursery) -> None:
    words = {"snapshot": shop.snapshot, "reference": front.name}
    moments: list[str | Trap] = [*few(await nursery.moments(shop.state, "push", **words)), *LINE]
    trouble, count = Trouble(), 0
    for moment in moments:
        with trouble.at(str(moment)):
            forget(shop.state)
            shutil.rmtree(front.registry.data / "docker", ignore_errors=True)
            await killed(front, nursery, shop.state, moment, "push", **words)
            had = blobs(front.registry)
            assert tagged(front.registry).items() <= had.items()
            async with Engine.open(shop.state) as engine:
                await clean(engine)
                count = await went_on(Box(engine, "victim"), count)
                front.set(None)
                await engine.push(**words)
                wanted = tagged(front.registry)
                lacked = sum(size for digest, size in wanted.items() if digest not in had)
                spared = PIECE if moment == BETWEEN else 0
                assert front.sent.total() <= lacked - spared, f"of {lacked} bytes that it had not, {front.sent.total()} were sent"
                assert wanted and wanted.items() <= blobs(front.registry).items()
                await settled(engine)
                assert not stray(shop.state)
    trouble.check()


# Pulls


@dataclass(frozen=True)
class Hosts:
    """Makes state directories of hosts that have never seen a machine."""

    artifacts: Artifacts
    scratch: Scratch
    directory: Path

    def new(self) -> StateDir:
        state = StateDir(root=self.directory / f"host{len(list(self.directory.glob('host*')))}")
        state.root.mkdir()
        shutil.copy(self.artifacts.store.kvm, state.kvm)
        state.create()
        self.scratch.add(state)
        return state


@pytest.fixture
def hosts(artifacts: Artifacts, scratch: Scratch, tmp_path: Path) -> Hosts:
    return Hosts(artifacts, scratch, tmp_path)


@pytest_asyncio.fixture(loop_scope="session")
async def chunks(shop: Shop, front: Front) -> dict[str, int]:
    """The snapshot is in the registry: the blobs that hold its chunks, and their bytes."""
    async with Engine.open(shop.state) as engine:
        await engine.push(shop.snapshot, front.name)
    return tagged(front.registry, artifact.BLOB)


def largest(chunks: dict[str, int]) -> str:
    return max(chunks, key=lambda digest: chunks[digest])


def absent(engine: Engine) -> int:
    """Bytes of all blobs that are still only in the registry."""
    files = engine._ops.state.store
    return sum(remote.absent(files, path.name.replace("-", ":", 1)) for path in files.remotes.iterdir())


PULL = (
    Trap("GET", "/manifests/", answer=-1),
    Trap("GET", "/blobs/sha256", answer=-1),  # the config
    Trap("GET", "/blobs/sha256", nth=3, answer=-1),  # a table
)
FETCHING = (Trap("GET", "/blobs/sha256", answer=1 << 20), Trap("GET", "/blobs/sha256", answer=12 << 20))


async def listed(hosts: Hosts, nursery: Nursery, verb: str, **words: str) -> list[str]:
    """The moments of a good run on a host that nothing is on."""
    state = hosts.new()
    moments = await nursery.moments(state, verb, **words)
    async with swept(state):
        pass
    return few(moments)


async def known(engine: Engine, name: str) -> bool:
    """Whether the snapshot is there; it is whole then, and there is nothing else, or else nothing at all."""
    await clean(engine)
    found = [each.name for each in await engine.snapshots()]
    assert found in ([], [name]), found
    return bool(found)


async def test_killed_while_pulling(hosts: Hosts, chunks: dict[str, int], front: Front, nursery: Nursery) -> None:
    """What is not told after a kill, whether it was to be lazy, is turn and turn about. A lazy pull fetches no chunks."""
    moments = await listed(hosts, nursery, "pull", reference=front.name)
    trouble = Trouble()
    for number, moment in enumerate([*moments, *PULL, *FETCHING]):
        with trouble.at(str(moment)):
            state, lazy = hosts.new(), number % 2 == 0 and moment not in FETCHING and moment != "step:fetching the snapshot"
            await killed(front, nursery, state, moment, "pull", reference=front.name, lazy=lazy)
            async with swept(state) as engine:
                assert await known(engine, front.name) or moment not in FETCHING
                if number % 4 < 2:
                    await engine.gc()
                if lazy:
                    await engine.pull(front.name, lazy=True)
                    assert not front.fetched(chunks) and absent(engine) > NOISE
                await engine.pull(front.name)
                assert await known(engine, front.name) and not absent(engine)
                allowed = sum(chunks.values()) * (1.1 if moment in FETCHING else 1.01)  # what was in flight; what no frame covers
                assert front.fetched(chunks) <= allowed, f"{front.fetched(chunks)} bytes were fetched of {chunks}"
    trouble.check()


async def test_a_download_outlives_the_daemon(hosts: Hosts, chunks: dict[str, int], front: Front, nursery: Nursery) -> None:
    """What is under way when the daemon dies comes all the same. Nobody waits for the rest any more: the next pull fetches it."""
    state = hosts.new()
    memory = largest(chunks)
    await killed(front, nursery, state, Trap("GET", memory, answer=1 << 20), "pull", lost=False, reference=front.name)
    async with asyncio.timeout(DEADLINE):
        while remote.absent(state.store, memory):  # noqa: ASYNC110  (nobody is there to tell)
            await asyncio.sleep(0.05)
    async with swept(state) as engine:
        assert await known(engine, front.name)
        front.set(None)
        await engine.pull(front.name)
        assert front.came[memory] < NOISE / 100 and not absent(engine)  # its own table: only the whole blob's digest vouches for that
        await engine.create_from(front.name, "twin")
        assert await goes_on(Box(engine, "twin")) > 0


async def test_killed_while_starting(hosts: Hosts, chunks: dict[str, int], front: Front, nursery: Nursery) -> None:
    """A machine that is made from a registry's snapshot goes on, or is not there and can be made, or has what is on the snapshot's disk."""
    moments = await listed(hosts, nursery, "create_from", name=front.name, machine="twin")
    begun = moments[moments.index("db:add_snapshot") :]
    trouble = Trouble()
    for moment in [
        *(each for each in begun if not each.startswith("name:") and each not in ("step:starting QEMU", "disk:write")),
        Trap("GET", largest(chunks), answer=1),
    ]:
        with trouble.at(str(moment)):
            state = hosts.new()
            await killed(front, nursery, state, moment, "create_from", name=front.name, machine="twin")
            async with swept(state) as engine:
                box, twin = Box(engine, "twin"), (await sound(engine)).get("twin")
                if twin and twin.state is not State.RUNNING:
                    assert (twin.state, twin.reason) == (State.FAILED, "the daemon ended while it was creating"), twin
                    await engine.start("twin")
                    assert await box.text("cat /srv/word") == "kept"
                    await engine.restore("twin")
                elif not twin:
                    await engine.create_from(front.name, "twin")
                assert await goes_on(box) > 0
                await box.sh("sha256sum -c /run/sum")
                await clean(engine)
    trouble.check()


async def test_killed_before_it_has_a_disk(shop: Shop, nursery: Nursery) -> None:
    """The same from a snapshot that was made here: a start does not take the image's disk for the snapshot's."""
    await nursery.die(shop.state, "state:creating", "create_from", name=shop.snapshot, machine="twin")
    async with Engine.open(shop.state) as engine:
        assert (await sound(engine))["twin"].state is State.FAILED
        await engine.start("twin")
        assert await Box(engine, "twin").text("cat /srv/word") == "kept"
        await engine.delete("twin")
        await clean(engine)


# Builds


async def test_killed_while_a_build_is_pushed(states: States, artifacts: Artifacts, front: Front, tmp_path: Path) -> None:
    state = alone(states.new())
    words = ["build", str(definition(tmp_path / "source", artifacts, "echo made > /srv/word")), "--no-memory", "--push", front.name]
    front.set(Trap("PUT", "/uploads/", nth=2, sent=1))
    async with process.running([*RAMET, *words], env={"RAMET_HOME": str(state.root), "RAMET_URL": ""}) as program:
        async with asyncio.timeout(DEADLINE):
            await front.sprung.wait()
        program.kill()
        await program.wait()
    front.open()
    made, _ = await built(state, *words[1:])
    assert made["cached"] == "this host"
    assert tagged(front.registry).items() <= blobs(front.registry).items()
    async with swept(state) as engine:
        await clean(engine)
        assert await engine.list() == []
        assert [each.name for each in await engine.snapshots()] == [made["snapshot"]]
        forget(state)
