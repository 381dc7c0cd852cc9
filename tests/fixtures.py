"""What the tiers `machine` and `perf` share: artifacts that are made once, state directories, an engine, machines, a daemon."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import pytest_asyncio

from ramet import images, service
from ramet.engine import Engine
from ramet.errors import RametError
from ramet.host import Host
from ramet.model import Command, Machine, Result, Spec
from ramet.paths import StateDir, cache_dir
from tests import tiny
from tests.leaks import Scratch

DEBIAN = "debian:bookworm"
MEMORY = 256 << 20
DISK = 256 << 20


@dataclass(frozen=True)
class Artifacts:
    """store: the state directory (of no daemon) that keeps the images of all test sessions; tiny: the reference of an image."""

    store: StateDir
    tiny: str

    def spec(self, name: str, **changes: object) -> Spec:
        """A small machine."""
        return Spec(**{"name": name, "image": self.tiny, "memory": MEMORY, "disk": DISK} | changes)  # type: ignore[arg-type]


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def artifacts(scratch: Scratch) -> AsyncIterator[Artifacts]:
    """Agent, kernel, accelerator and images: from RAMET_TEST_CACHE (or Ramet's own cache), made where they are missing."""
    cache = Path(os.environ.get("RAMET_TEST_CACHE") or cache_dir()).absolute()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAMET_CACHE", str(cache))
        patch.setenv("RAMET_PRESSURE", "off")  # a host that is busy with something else must not have our machines paused
        for name in ("RAMET_HOME", "RAMET_URL", "RAMET_TOKEN"):
            patch.delenv(name, raising=False)
        store = StateDir(root=cache / "images")
        store.create()
        made = tiny.kept()
        try:
            await Host(store).boot()
            await images.ensure(store, made.reference, progress=lambda step, fraction: None)
        except RametError as error:
            (pytest.fail if os.environ.get("CI") else pytest.skip)(f"no machine can boot here: {error.message} {error.hint}")
        yield Artifacts(store=store, tiny=made.reference)


@dataclass
class States:
    """Makes state directories that share the store's images and know its accelerator."""

    artifacts: Artifacts
    scratch: Scratch
    directory: Path
    made: list[StateDir] = field(default_factory=list)

    def new(self, root: Path | None = None) -> StateDir:
        state = StateDir(root=root or self.directory / f"state{len(self.made)}")
        state.root.mkdir(mode=0o700, exist_ok=True)
        state.images.symlink_to(self.artifacts.store.images)
        with contextlib.suppress(FileNotFoundError):
            shutil.copy(self.artifacts.store.kvm, state.kvm)
        state.create()
        self.made.append(state)
        self.scratch.add(state)
        return state


@pytest.fixture
def states(artifacts: Artifacts, scratch: Scratch, tmp_path: Path) -> Iterator[States]:
    """State directories for one test."""
    made = States(artifacts, scratch, tmp_path)
    yield made


@pytest.fixture(scope="session")
def state(artifacts: Artifacts, scratch: Scratch, tmp_path_factory: pytest.TempPathFactory) -> StateDir:
    """The state directory that `engine` works on."""
    return States(artifacts, scratch, tmp_path_factory.mktemp("state")).new()


@contextlib.asynccontextmanager
async def opened(state: StateDir) -> AsyncIterator[Engine]:
    """An engine whose machines are gone at the end."""
    async with Engine.open(state) as engine:
        try:
            yield engine
        finally:
            for machine in await engine.list():
                await engine.delete(machine.name)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def engine(state: StateDir) -> AsyncIterator[Engine]:
    async with opened(state) as engine:
        yield engine


@dataclass
class Box:
    """A running machine, and what tests say to it all the time."""

    engine: Engine
    name: str

    async def sh(self, script: str, *, check: bool = True, **options: object) -> Result:
        """Run a shell script in it."""
        stdin = options.pop("stdin", b"")
        result = await self.engine.run(self.name, Command(argv=("sh", "-c", script), **options), stdin)  # type: ignore[arg-type]
        assert not check or result.status == 0, result
        return result

    async def text(self, script: str, **options: object) -> str:
        return (await self.sh(script, **options)).stdout.decode().strip()  # type: ignore[arg-type]

    async def get(self) -> Machine:
        return await self.engine.get(self.name)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def box(engine: Engine, artifacts: Artifacts, request: pytest.FixtureRequest) -> AsyncIterator[Box]:
    """A running machine of the tiny image, for the tests of one module."""
    name = request.module.__name__.rpartition("test_")[2].replace("_", "-")
    await engine.create(artifacts.spec(name))
    yield Box(engine, name)
    await engine.delete(name)


@pytest_asyncio.fixture
async def daemon(states: States) -> AsyncIterator[StateDir]:
    """A daemon process on a fresh state directory; its machines go with it."""
    state = states.new()
    await service.ensure_running(state)
    yield state
    await retire(state)


async def retire(state: StateDir) -> None:
    """End a daemon, if one runs, and every machine of its state directory."""
    await service.stop(state)
    async with opened(state):
        pass


Spawner = Callable[[], StateDir]
