"""The daemon is killed with -9 at every moment of saving and of starting from a snapshot. The moments are those that a good run tells."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from ramet.engine import Engine
from ramet.errors import NotFoundError
from ramet.model import State
from ramet.paths import StateDir
from tests.fixtures import Artifacts, Box, States
from tests.machine.aftermath import Nursery, Trouble, busy, goes_on, note, notes, settled, sound, swept, went_on
from tests.machine.doomed import parked


@pytest_asyncio.fixture(loop_scope="session")
async def state(states: States) -> AsyncIterator[StateDir]:
    """A state directory; at its end, all that is in it can be removed, and then nothing is left."""
    made = states.new()
    yield made
    async with swept(made):
        pass


async def begin(state: StateDir, artifacts: Artifacts) -> None:
    """A machine that counts."""
    async with Engine.open(state) as engine:
        await engine.create(artifacts.spec("victim"))
        await busy(Box(engine, "victim"))


async def test_killed_while_saving_a_snapshot(state: StateDir, artifacts: Artifacts, nursery: Nursery) -> None:
    await begin(state, artifacts)
    moments = await nursery.moments(state, "snapshot", name="victim", label="good")
    trouble, written, count = Trouble(), [], 0
    for number, moment in enumerate(moments):
        with trouble.at(moment):
            await nursery.die(state, moment, "snapshot", name="victim", label=f"at{number}")
            async with Engine.open(state) as engine:
                machines = await sound(engine)
                box = Box(engine, "victim")
                assert machines["victim"].state is State.RUNNING
                count = await went_on(box, count)
                await note(box, f"at{number}")
                written.append(f"at{number}")
                for snapshot in await engine.snapshots("victim"):
                    if snapshot.name == f"victim@at{number}":
                        await engine.create_from(snapshot.name, "copy")
                        assert await goes_on(Box(engine, "copy")) > 0
                        await engine.delete("copy")
                        await engine.delete_snapshot(snapshot.name)
                assert await notes(box) == sorted(written)
    with trouble.at("the end"):
        async with Engine.open(state) as engine:
            await engine.stop("victim")
            await engine.start("victim")
            assert await notes(Box(engine, "victim")) == sorted(written)
    trouble.check()


@pytest.mark.parametrize("first", ["step:copying memory", "disk:write"])
async def test_killed_again_while_it_recovers(state: StateDir, artifacts: Artifacts, nursery: Nursery, first: str) -> None:
    await begin(state, artifacts)
    await nursery.die(state, first, "snapshot", name="victim", label="first")
    moments = await nursery.moments(state, "recover")
    assert moments
    trouble, written, count = Trouble(), [], 0
    for number, moment in enumerate(moments):
        with trouble.at(moment):
            await nursery.die(state, first, "snapshot", name="victim", label=f"at{number}")
            await nursery.die(state, moment, "recover")
            async with Engine.open(state) as engine:
                assert (await sound(engine))["victim"].state is State.RUNNING
                box = Box(engine, "victim")
                count = await went_on(box, count)
                await note(box, f"at{number}")
                written.append(f"at{number}")
                assert await notes(box) == sorted(written)
    trouble.check()


async def test_killed_while_forking(state: StateDir, artifacts: Artifacts, nursery: Nursery) -> None:
    await begin(state, artifacts)
    async with Engine.open(state) as engine:
        await note(Box(engine, "victim"), "before")
    moments = await nursery.moments(state, "fork", name="victim", names=["child"])
    trouble, written, count = Trouble(), ["before"], 0
    async with Engine.open(state) as engine:
        await engine.delete("child")
    for number, moment in enumerate(moments):
        with trouble.at(moment):
            await nursery.die(state, moment, "fork", name="victim", names=["child"])
            async with Engine.open(state) as engine:
                machines = await sound(engine)
                box = Box(engine, "victim")
                assert machines.pop("victim").state is State.RUNNING
                count = await went_on(box, count)
                for name, child in machines.items():
                    if child.state is State.FAILED:
                        assert child.reason == "the daemon ended while it was creating"
                        await engine.start(name)  # what was begun can be finished
                    else:
                        assert await goes_on(Box(engine, name)) > 0
                    assert await notes(Box(engine, name)) == sorted(written), f"{name}, {child.state}"
                await note(box, f"at{number}")
                written.append(f"at{number}")
        with trouble.at(f"{moment}, afterwards"):
            async with Engine.open(state) as engine:
                for name in {machine.name for machine in await engine.list()} - {"victim"}:
                    await engine.delete(name)
                await sound(engine)
                assert await notes(Box(engine, "victim")) == sorted(written)
    with trouble.at("the end"):
        async with Engine.open(state) as engine:
            await engine.stop("victim")
            await engine.start("victim")
            assert await notes(Box(engine, "victim")) == sorted(written)
    trouble.check()


async def test_killed_while_hibernating(state: StateDir, artifacts: Artifacts, nursery: Nursery) -> None:
    await begin(state, artifacts)
    moments = await nursery.moments(state, "hibernate", name="victim")
    slimmed = moments.index("step:giving memory back")  # which takes seconds each time, and is over when it is saved
    trouble, written, count = Trouble(), [], 0
    for number, moment in enumerate(moments):
        async with Engine.open(state) as engine:
            if (await engine.get("victim")).state is State.HIBERNATED:
                await engine.resume("victim")
        with trouble.at(moment):
            await nursery.die(state, moment, "hibernate", name="victim", slim=number <= slimmed)
            async with Engine.open(state) as engine:
                found = (await sound(engine))["victim"]
                if found.state is not State.RUNNING:
                    assert found.state is State.HIBERNATED, found
                    await engine.resume("victim")
                box = Box(engine, "victim")
                count = await went_on(box, count)
                await note(box, f"at{number}")
                written.append(f"at{number}")
                assert await notes(box) == sorted(written)
    with trouble.at("the end"):
        async with Engine.open(state) as engine:
            await engine.stop("victim")
            await engine.start("victim")
            assert await notes(Box(engine, "victim")) == sorted(written)
    trouble.check()


async def test_killed_while_resuming(state: StateDir, artifacts: Artifacts, nursery: Nursery) -> None:
    await begin(state, artifacts)
    await nursery.survive(state, "hibernate", name="victim")
    moments = await nursery.moments(state, "resume", name="victim")
    trouble, written, count = Trouble(), [], 0
    for number, moment in enumerate(moments):
        async with Engine.open(state) as engine:
            await engine.hibernate("victim", slim=False)
            await settled(engine)
        with trouble.at(moment):
            await nursery.die(state, moment, "resume", name="victim")
            async with Engine.open(state) as engine:
                found = (await sound(engine))["victim"]
                if found.state is not State.RUNNING:
                    assert found.state is State.HIBERNATED, found
                    await engine.resume("victim")
                box = Box(engine, "victim")
                count = await went_on(box, count)
                await note(box, f"at{number}")
                written.append(f"at{number}")
                assert await notes(box) == sorted(written)
    trouble.check()


async def test_killed_while_rewinding(state: StateDir, artifacts: Artifacts, nursery: Nursery) -> None:
    await begin(state, artifacts)
    async with Engine.open(state) as engine:
        await note(Box(engine, "victim"), "kept")
        await engine.snapshot("victim", "good", test=False)
        await note(Box(engine, "victim"), "undone")
        await settled(engine)  # else what compresses the snapshot is among the moments, once
    moments = await nursery.moments(state, "restore", name="victim", snapshot="good")
    trouble, rewound = Trouble(), list[bool]()
    for moment in moments:
        with trouble.at(moment):
            await nursery.die(state, moment, "restore", name="victim", snapshot="good")
            async with Engine.open(state) as engine:
                assert (await sound(engine))["victim"].state is State.RUNNING
                box = Box(engine, "victim")
                assert await goes_on(box) > 0
                there = await notes(box)
                rewound.append(there == ["kept"])
                if not rewound[-1]:
                    assert there == ["kept", "undone"], "it is what it was"
                await note(box, "undone")
    with trouble.at("the end"):
        async with Engine.open(state) as engine:
            await engine.stop("victim")
            await engine.start("victim")
            assert await notes(Box(engine, "victim")) == ["kept", "undone"]
    trouble.check()
    assert any(rewound) and not all(rewound)


async def test_killed_while_pausing_and_going_on(state: StateDir, artifacts: Artifacts, nursery: Nursery) -> None:
    await begin(state, artifacts)
    trouble, count = Trouble(), 0
    passed = {verb: await nursery.moments(state, verb, name="victim") for verb in ("pause", "resume")}
    for verb, moments in passed.items():
        for moment in moments:
            async with Engine.open(state) as engine:
                if verb == "resume":
                    await engine.pause("victim")
            with trouble.at(f"{verb}: {moment}"):
                await nursery.die(state, moment, verb, name="victim")
                async with Engine.open(state) as engine:
                    if (await sound(engine))["victim"].state is State.PAUSED:
                        await engine.resume("victim")
                    count = await went_on(Box(engine, "victim"), count)
    trouble.check()


async def test_killed_while_parking_and_claiming(state: StateDir, artifacts: Artifacts, nursery: Nursery) -> None:
    await begin(state, artifacts)
    async with Engine.open(state) as engine:
        await note(Box(engine, "victim"), "kept")
        await engine.snapshot("victim", "good", test=False)
        await settled(engine)
    trouble = Trouble()
    for moment in await nursery.moments(state, "template", name="victim@good", pool=1):
        async with Engine.open(state) as engine:
            await engine.template("victim@good", pool=0)
            await parked(engine, 0)
        with trouble.at(f"park: {moment}"):
            await nursery.die(state, moment, "template", name="victim@good", pool=1)
            async with Engine.open(state) as engine:
                wanted = (await engine.get_snapshot("victim@good")).pool
                assert wanted or moment == "db:update_snapshot"
                await parked(engine, wanted)
                assert set(await sound(engine)) == {"victim"}
    async with Engine.open(state) as engine:
        await engine.template("victim@good", pool=1)
        await parked(engine, 1)
    for moment in await nursery.moments(state, "claim", name="victim@good", machine="copy", pool=1):
        async with Engine.open(state) as engine:
            with contextlib.suppress(NotFoundError):
                await engine.delete("copy")
            await parked(engine, 1)
        with trouble.at(f"claim: {moment}"):
            await nursery.die(state, moment, "claim", name="victim@good", machine="copy", pool=1)
            async with Engine.open(state) as engine:
                await parked(engine, 1)
                machines = await sound(engine)
                if copy := machines.get("copy"):
                    if copy.state is not State.RUNNING:
                        assert copy.state is State.HIBERNATED, copy
                        await engine.resume("copy")
                    assert await goes_on(Box(engine, "copy")) > 0
                    assert await notes(Box(engine, "copy")) == ["kept"]
                    await sound(engine)
    trouble.check()
