"""A store without space, and one whose disk fails: saving says so, the machine goes on, nothing is lost, and the next save works."""

from __future__ import annotations

import asyncio
import errno
import os
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from ramet.engine import Engine
from ramet.errors import HostError, NoSpaceError, RametError
from ramet.model import State
from ramet.paths import StateDir
from ramet.store import disk
from tests.fixtures import Artifacts, Box, States
from tests.machine.aftermath import DEADLINE, Trouble, busy, note, notes, settled, sound, swept, went_on
from tests.machine.fullness import fill, mounted

SIZE = 192 << 20
# Where it strikes: the database, the next overlay, the devices' state, the pages, the layers' own files, the compressed pages.
LEFT = [0, 100 << 10, 300 << 10, 600 << 10, 4 << 20, 24 << 20, 44 << 20, 60 << 20]


@pytest.fixture
def small(states: States, tmp_path: Path) -> Iterator[StateDir]:
    """A state directory on a file system of its own."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    with mounted(states, tmp_path / "small", SIZE) as made:
        yield made


@pytest_asyncio.fixture(loop_scope="session")
async def cramped(small: StateDir) -> AsyncIterator[Engine]:
    async with swept(small) as engine:
        yield engine


async def fork(engine: Engine) -> None:
    (outcome,) = await engine.fork("fat", names=("child",))
    if outcome.error:
        raise (NoSpaceError if outcome.error["code"] == NoSpaceError.code else HostError)(outcome.error["message"])


VERBS: dict[str, Callable[[Engine], Awaitable[object]]] = {
    "snapshot": lambda engine: engine.snapshot("fat", "tried"),
    "fork": fork,
    "hibernate": lambda engine: engine.hibernate("fat"),
}


async def tidy(engine: Engine) -> None:
    """Remove what a verb made; let the machine run."""
    await settled(engine)
    for snapshot in await engine.snapshots("fat"):
        if snapshot.name == "fat@tried":
            await engine.delete_snapshot(snapshot.name)
    for machine in await engine.list():
        if machine.name == "child":
            await engine.delete("child")
    if (await engine.get("fat")).state is State.HIBERNATED:
        await engine.resume("fat")


@pytest.mark.parametrize("verb", VERBS)
async def test_no_space_while_saving(cramped: Engine, small: StateDir, artifacts: Artifacts, verb: str) -> None:
    await cramped.create(artifacts.spec("fat"))
    box = Box(cramped, "fat")
    await busy(box)
    trouble, written, count, refused = Trouble(), [], 0, 0
    for number, left in enumerate(LEFT):
        await box.sh("sync")  # what the guest has yet to write would find no room
        ballast = fill(small, left)
        with trouble.at(f"{left >> 10} KiB"):
            try:
                await VERBS[verb](cramped)
            except NoSpaceError as error:
                refused += 1
                assert "no space left" in error.message
                assert (await cramped.get("fat")).state is State.RUNNING
            await settled(cramped)
        with trouble.at(f"{left >> 10} KiB, with the disk still full"):
            if (await cramped.get("fat")).state is State.RUNNING:
                count = await went_on(box, count)
        ballast.unlink()
        with trouble.at(f"{left >> 10} KiB, afterwards"):
            await tidy(cramped)
            count = await went_on(box, count)
            await note(box, f"left{number}")
            written.append(f"left{number}")
            await sound(cramped, unsettled=True)
    with trouble.at("with space again"):
        await VERBS[verb](cramped)
        await sound(cramped)
        await tidy(cramped)
        assert await notes(box) == sorted(written)
        await cramped.stop("fat")
        await cramped.start("fat")
        assert await notes(box) == sorted(written)
    trouble.check()
    assert refused >= 3


class Failing:
    """The disk fails where the store, or the saving of memory, comes to a place for the first time: `wanted`, as `passed` has it."""

    def __init__(self) -> None:
        self.wanted = ""
        self.passed: list[str] = []

    def strike(self) -> None:
        frames = [each for each in traceback.extract_stack() if "/ramet/" in each.filename][-3:]
        place = " > ".join(f"{Path(each.filename).stem}.{each.name}:{each.lineno}" for each in frames)
        if place not in self.passed:
            self.passed.append(place)
            if place == self.wanted:
                raise OSError(errno.EIO, os.strerror(errno.EIO))

    def before(self, work: Callable[..., object]) -> Callable[..., object]:
        def wrapped(*args: object, **options: object) -> object:
            self.strike()
            return work(*args, **options)

        return wrapped


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Failing:
    made = Failing()
    monkeypatch.setattr(disk, "write_all", made.before(disk.write_all))
    monkeypatch.setattr(os, "fsync", made.before(os.fsync))
    monkeypatch.setattr(os, "link", made.before(os.link))
    return made


# Giving memory back takes seconds each time, and writes nothing here.
QUICK = VERBS | {"hibernate": lambda engine: engine.hibernate("fat", slim=False)}


@pytest.mark.parametrize("verb", QUICK)
async def test_the_disk_fails_wherever_a_save_writes(states: States, artifacts: Artifacts, failing: Failing, verb: str) -> None:
    async with swept(states.new()) as engine:
        await engine.create(artifacts.spec("fat"))
        box = Box(engine, "fat")
        await busy(box)
        await note(box, "kept")
        failing.passed = []
        await QUICK[verb](engine)
        await settled(engine)
        places = failing.passed
        await tidy(engine)
        trouble, count = Trouble(), 0
        for place in places:
            failing.passed, failing.wanted = [], place
            with trouble.at(place):
                try:
                    await QUICK[verb](engine)
                except RametError as error:
                    assert os.strerror(errno.EIO) in error.message, error.message
                    assert (await engine.get("fat")).state is State.RUNNING
                await settled(engine)
            failing.wanted = ""
            with trouble.at(f"{place}, afterwards"):
                await tidy(engine)
                count = await went_on(box, count)
                assert await notes(box) == ["kept"]
                await sound(engine, unsettled=True)
        with trouble.at("the end"):
            await engine.stop("fat")
            await engine.start("fat")
            assert await notes(box) == ["kept"]
            await sound(engine)
        trouble.check()
        assert len(places) > 5


async def rewound(box: Box, count: int, error: RametError | None) -> int:
    """All of what it was before, or all of what it is to be; where it has counted to."""
    if error:
        not_begun = "the database" in error.message  # which could not be told of it
        stuck = error.hint.startswith("fat is paused.")  # the guest had something to write, and no room
        assert not_begun or stuck or error.hint.startswith("fat is running, as before."), (error.message, error.hint)
        count = await went_on(box, count)
    assert await notes(box) == ["kept", *(["later"] if error else [])]
    if not error:
        count = await went_on(box, 0)
        await note(box, "later")
    await sound(box.engine)
    return count


async def begin(engine: Engine, artifacts: Artifacts) -> Box:
    """A machine that has something to lose when it goes back to `then`."""
    await engine.create(artifacts.spec("fat"))
    box = Box(engine, "fat")
    await busy(box)
    await note(box, "kept")
    await engine.snapshot("fat", "then", test=False)
    await note(box, "later")
    await settled(engine)
    return box


async def test_no_space_while_rewinding(cramped: Engine, small: StateDir, artifacts: Artifacts) -> None:
    box = await begin(cramped, artifacts)
    trouble, count, refused = Trouble(), 0, 0
    for left in (0, 4 << 10, 16 << 10, 64 << 10, 200 << 10, 300 << 10, 1 << 20):
        ballast, error = fill(small, left), None
        with trouble.at(f"{left >> 10} KiB"):
            try:
                await cramped.restore("fat", "then")
            except RametError as failed:
                error = failed
                refused += 1
        ballast.unlink()
        with trouble.at(f"{left >> 10} KiB, afterwards: {error}"):
            async with asyncio.timeout(DEADLINE):
                while (await cramped.get("fat")).state is State.PAUSED:  # noqa: ASYNC110
                    await asyncio.sleep(0.1)
            count = await rewound(box, count, error)
    trouble.check()
    assert 0 < refused < 7


async def test_the_disk_fails_wherever_a_rewind_writes(states: States, artifacts: Artifacts, failing: Failing) -> None:
    async with swept(states.new()) as engine:
        box = await begin(engine, artifacts)
        failing.passed = []
        await engine.restore("fat", "then")
        places, trouble, count = failing.passed, Trouble(), await rewound(box, 0, None)
        for place in places:
            failing.passed, failing.wanted, error = [], place, None
            with trouble.at(place):
                try:
                    await engine.restore("fat", "then")
                except RametError as failed:
                    error = failed
                failing.wanted = ""
                count = await rewound(box, count, error)
        trouble.check()
        assert len(places) > 2
