"""Instants that have names: made, gone back to, started from, refused where they do not fit or are damaged, deleted. Templates and their pools."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from ramet.engine import Engine
from ramet.errors import DependentsError, ExistsError, IncompatibleError, NotFoundError, RametError, SpecError, StateError
from ramet.model import SnapshotState, State
from ramet.paths import StateDir
from tests.fixtures import Artifacts, Box, States
from tests.machine import witness
from tests.machine.witness import DEADLINE, HOLD, check, forked, saved


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def root(engine: Engine, artifacts: Artifacts) -> AsyncIterator[Box]:
    """A machine with a program in it, of which each test takes a copy."""
    await engine.create(artifacts.spec("root"))
    box = Box(engine, "root")
    await witness.install(box)
    await witness.start(box, f"hold {HOLD} /srv", HOLD)
    await check(box, HOLD)
    async with witness.cleared(engine):
        await forked(box)
    yield box
    await engine.delete("root")


@pytest_asyncio.fixture(loop_scope="session")
async def box(engine: Engine, root: Box) -> AsyncIterator[Box]:
    """A machine for one test. What the test makes goes with it."""
    async with witness.cleared(engine):
        outcomes = await engine.fork("root", names=("box",))
        assert outcomes[0].error is None
        yield Box(engine, "box")


MARK = "echo {0} > /srv/mark; echo {0} > /dev/shm/mark"
MARKS = "cat /srv/mark /dev/shm/mark 2>/dev/null | tr '\\n' ' '"


# --- going back ---


async def test_a_rewind_loses_what_was_written_since(box: Box) -> None:
    engine = box.engine
    before = await box.get()
    await box.sh(MARK.format("one"))
    one = await engine.snapshot("box", "one", test=False)
    assert (one.name, one.machine, one.memory) == ("box@one", "box", True)
    assert one.pause is not None
    assert one.compatibility
    await box.sh(MARK.format("two") + "; sync")
    await engine.snapshot("box", "two", test=False)
    await box.sh(MARK.format("three") + "; sync")
    for label, marks in (("one", "one one"), ("two", "two two"), ("box@one", "one one")):
        after = await engine.restore("box", label)
        assert (after.state, after.name, after.id) == (State.RUNNING, "box", before.id)
        assert await box.text(MARKS + "; hostname") == f"{marks} box"
        await box.sh("echo 3 > /proc/sys/vm/drop_caches")
        assert await box.text(MARKS) == marks
    await box.sh(MARK.format("lost"))
    await engine.restore("box")  # to what it stands on
    assert await box.text(MARKS) == "one one"
    await check(box, HOLD)
    assert [each.name for each in await engine.snapshots("box")] == ["box@one", "box@two"]


async def test_from_every_state_there_is_a_way_back(box: Box) -> None:
    engine = box.engine
    await box.sh(MARK.format("here"))
    await engine.snapshot("box", "here", test=False)
    for leave in (engine.pause, engine.hibernate, engine.stop):
        await box.sh(MARK.format("there"))
        await leave("box")
        assert (await engine.restore("box", "here")).state is State.RUNNING
        assert await box.text(MARKS) == "here here"
        await check(box, HOLD)


async def test_a_snapshot_without_memory(box: Box) -> None:
    engine = box.engine
    await box.sh(MARK.format("disk") + "; sync")
    found = await engine.snapshot("box", "disk", memory=False)
    assert (found.memory, found.memory_layer, found.compatibility) == (False, "", None)
    assert (await saved(engine, "box@disk")).state is SnapshotState.READY
    await box.sh(MARK.format("later") + "; sync")
    await check(box, HOLD)
    await engine.create_from("box@disk", "booted")
    assert await Box(engine, "booted").text(MARKS + "; hostname; uptime | wc -l") == "disk booted\n1"
    await engine.restore("box", "disk")
    assert await box.text(MARKS) == "disk"
    with pytest.raises(SpecError, match="has no memory"):
        await engine.template("box@disk", pool=1)


async def test_a_snapshot_of_a_stopped_machine(box: Box) -> None:
    engine = box.engine
    await box.sh(MARK.format("stopped") + "; sync")
    await engine.stop("box")
    with pytest.raises(SpecError, match="box is stopped: there is no memory to save"):
        await engine.snapshot("box", "cold")
    found = await engine.snapshot("box", "cold", memory=False)
    assert (found.memory, (await box.get()).state) == (False, State.STOPPED)
    await engine.create_from("box@cold", "warm")
    assert await Box(engine, "warm").text(MARKS) == "stopped"
    await engine.start("box")
    await box.sh(MARK.format("since") + "; sync")
    await engine.restore("box", "cold")
    assert await box.text(MARKS) == "stopped"


async def test_machines_from_a_snapshot(box: Box) -> None:
    engine = box.engine
    await box.sh(MARK.format("base") + "; sync")
    await engine.snapshot("box", "base", test=False)
    with_memory = await engine.create_from("box@base", "with-memory")
    assert (with_memory.state, with_memory.parent, with_memory.snapshot) == (State.RUNNING, "box", "box@base")
    await engine.create_from("box@base", "disk-only", disk_only=True)
    assert await Box(engine, "with-memory").text(MARKS + "; hostname") == "base base with-memory"
    await check(Box(engine, "with-memory"), HOLD)
    assert await Box(engine, "disk-only").text(MARKS + "; hostname; ps | grep -c '[w]itness hold'; true") == "base disk-only\n0"
    for name in ("with-memory", "disk-only", "box"):
        await Box(engine, name).sh(MARK.format(name) + "; sync")
    assert await Box(engine, (await engine.create_from("box@base", "second")).name).text(MARKS) == "base base"
    for name in ("with-memory", "disk-only"):  # one of them saved, gone back to, stopped and started like any other
        await engine.snapshot(name, "own", test=False)
        await Box(engine, name).sh("rm /srv/mark")
        await engine.restore(name, "own")
        assert (await Box(engine, name).text(MARKS)).split() == [name, name]
        await engine.stop(name)
        await engine.start(name)
        assert await Box(engine, name).text(MARKS) == name


async def test_names(box: Box) -> None:
    engine = box.engine
    first = await engine.snapshot("box", test=False)
    assert first.name.startswith("box@2")
    await engine.snapshot("box", "base", test=False)
    with pytest.raises(ExistsError, match="there is a snapshot box@base already"):
        await engine.snapshot("box", "base")
    for label in ("a b", "a/b", "-a", "x" * 65):
        with pytest.raises(SpecError, match="cannot name a snapshot"):
            await engine.snapshot("box", label)
    with pytest.raises(ExistsError, match="there is a machine root already"):
        await engine.create_from("box@base", "root")
    with pytest.raises(SpecError):
        await engine.create_from("box@base", "Not A Name")
    for missing in ("box@nothing", "", "nobody@base"):
        with pytest.raises(NotFoundError):
            await engine.create_from(missing, "child")
    with pytest.raises(NotFoundError):
        await engine.restore("box", "nothing")
    with pytest.raises(SpecError, match=r"box@base is a snapshot of box, not of root.*"):
        await engine.restore("root", "box@base")
    with pytest.raises(NotFoundError):
        await engine.snapshots("nobody")
    found = await engine.get_snapshot("box@base")
    assert (await engine.get_snapshot(found.id)).name == "box@base"
    assert {each.name for each in await engine.snapshots()} == {first.name, "box@base"}
    await engine.hibernate("box")
    with pytest.raises(StateError, match="it is hibernated"):
        await engine.snapshot("box", "asleep")
    assert sorted(each.name for each in await engine.list()) == ["box", "root"]


# --- the test of each ---


async def test_a_snapshot_is_ready_only_after_it_was_started_once(box: Box) -> None:
    engine = box.engine
    made = await engine.snapshot("box", "good")
    assert made.state is SnapshotState.SAVING
    states = set()
    async with asyncio.timeout(DEADLINE):
        while (found := await engine.get_snapshot("box@good")).state is not SnapshotState.READY:
            states.add(found.state)
            assert [each.name for each in await engine.list()] == ["root", "box"]
            await asyncio.sleep(0.002)
    assert states >= {SnapshotState.TESTING}
    assert states <= {SnapshotState.SAVING, SnapshotState.TESTING}
    await witness.put(box, "/etc/ramet/fork.d/10-never", b"#!/bin/sh\necho cannot be copied; exit 7\n")
    await engine.snapshot("box", "bad")
    found = await saved(engine, "box@bad")
    assert found.state is SnapshotState.BROKEN
    assert "10-never" in found.reason
    with pytest.raises(RametError, match="box@bad is broken"):
        await engine.create_from("box@bad", "child")
    await engine.snapshot("box", "untested", test=False)
    assert (await saved(engine, "box@untested")).state is SnapshotState.READY
    with pytest.raises(RametError, match="10-never"):
        await engine.create_from("box@untested", "child")
    assert sorted(each.name for each in await engine.list()) == ["box", "root"]
    await check(box, HOLD)


async def test_what_does_not_fit_or_is_damaged_is_refused(states: States, artifacts: Artifacts) -> None:
    """By the next daemon, which finds another QEMU's snapshot, and two whose blobs somebody overwrote: one is to be tested, one was."""
    state = states.new()
    try:
        async with Engine.open(state) as engine:
            await engine.create(artifacts.spec("box"))
            box = Box(engine, "box")
            await witness.install(box)
            await witness.start(box, f"hold {HOLD} /srv", HOLD)
            await box.sh(MARK.format("old") + "; sync")
            await engine.snapshot("box", "old", test=False)
            await engine.fork("box", names=("sleeper",))
            await engine.hibernate("sleeper")
            for label in ("damaged", "rotten"):
                await box.sh("dd if=/dev/urandom of=/dev/shm/more bs=1M count=4 2>/dev/null")
                await engine.snapshot("box", label, test=False)
            for name in ("box@old", "box@damaged", "box@rotten", (await engine.get("sleeper")).snapshot):
                assert (await saved(engine, name)).state is SnapshotState.READY
            await engine.delete("box")
        change_record(state, "box@old", "qemu", "9.9.9")
        blobs = damage(state, ("box@damaged", "box@rotten"))
        async with Engine.open(state) as engine:
            await refuses_what_does_not_fit(engine)
            await refuses_what_is_damaged(engine, blobs)
            await engine.resume("sleeper")  # what is whole is not in anybody's way
            await check(Box(engine, "sleeper"), HOLD)
    finally:
        async with Engine.open(state) as engine:
            for machine in await engine.list():
                await engine.delete(machine.name)


def change_record(state: StateDir, name: str, field: str, value: str) -> None:
    """Make the database say something else of what a snapshot's memory fits."""
    with sqlite3.connect(state.database) as database:
        ((text,),) = database.execute("SELECT compatibility FROM snapshots WHERE name = ?", (name,))
        changed = json.dumps(json.loads(text) | {field: value})
        database.execute("UPDATE snapshots SET compatibility = ? WHERE name = ?", (changed, name))
    database.close()


def damage(state: StateDir, names: tuple[str, ...]) -> set[str]:
    """Overwrite a byte here and there in what only these snapshots have in memory; returns the blobs' names. The first is to be tested again."""
    with sqlite3.connect(state.database) as database:
        layers = {layer for name in names for (layer,) in database.execute("SELECT memory_layer FROM snapshots WHERE name = ?", (name,))}
        database.execute("UPDATE snapshots SET state = 'testing' WHERE name = ?", names[:1])  # as if that had been cut off
    database.close()
    spared = "".join(path.read_text() for path in state.store.layers.glob("*/layer.json") if path.parent.name not in layers)
    doomed = [path for path in state.store.blobs.iterdir() if path.name.removeprefix("sha256-") not in spared]
    assert doomed
    for blob in doomed:
        flip(blob)
    return {blob.name.removeprefix("sha256-")[:12] for blob in doomed}


def flip(blob: Path) -> None:
    data = bytearray(blob.read_bytes())
    for at in range(64, len(data) - 4096, 512):
        data[at] ^= 0x55
    blob.chmod(0o600)
    blob.write_bytes(data)


async def refuses_what_does_not_fit(engine: Engine) -> None:
    qemu = (await engine.info()).qemu.split()[0]
    with pytest.raises(IncompatibleError, match=rf"was saved with QEMU 9\.9\.9, here it is {qemu}") as caught:
        await engine.create_from("box@old", "child")
    assert caught.value.details == {"field": "qemu", "saved": "9.9.9", "here": qemu}
    assert "--disk-only" in caught.value.hint
    with pytest.raises(NotFoundError):
        await engine.get("child")
    await engine.create_from("box@old", "booted", disk_only=True)
    assert await Box(engine, "booted").text(MARKS) == "old"
    await engine.delete("booted")


async def refuses_what_is_damaged(engine: Engine, blobs: set[str]) -> None:
    found = await saved(engine, "box@damaged")
    faults = await engine.verify_layer(found.memory_layer)
    assert any(blob in fault for fault in faults for blob in blobs), faults
    assert found.state is SnapshotState.BROKEN
    with pytest.raises(RametError, match="box@damaged is broken"):
        await engine.create_from("box@damaged", "child")
    assert any(blob in found.reason for blob in blobs), found.reason
    with pytest.raises(RametError) as caught:
        await engine.create_from("box@rotten", "child")
    assert [each.name for each in await engine.list()] == ["sleeper"]
    assert any(blob in caught.value.message for blob in blobs), caught.value.message


# --- deleting ---


async def test_what_others_stand_on_is_not_deleted(box: Box) -> None:
    engine = box.engine
    await engine.snapshot("box", "base", test=False)
    await engine.create_from("box@base", "child")
    await engine.snapshot("child", "own", test=False)
    await engine.create_from("child@own", "grandchild")
    await engine.snapshot("box", "free", test=False)
    with pytest.raises(DependentsError, match=r"box@base is needed by") as caught:
        await engine.delete_snapshot("box@base")
    everything = {"child", "child@own", "grandchild"}
    assert set(caught.value.details["dependents"]) == everything
    assert (caught.value.status, "--cascade" in caught.value.hint) == (409, True)
    planned = await engine.delete_snapshot("box@base", cascade=True, dry_run=True)
    assert set(planned) == everything | {"box@base"}
    assert planned[-1] == "box@base"
    assert planned.index("grandchild") < planned.index("child@own") < planned.index("box@base")
    assert "child" in (await engine.get_snapshot("box@base")).dependents
    assert {each.name for each in await engine.list()} == {"root", "box", "child", "grandchild"}
    assert await engine.delete_snapshot("box@free") == ["box@free"]
    assert await engine.delete_snapshot("box@base", cascade=True) == planned
    assert {each.name for each in await engine.list()} == {"root", "box"}
    assert await engine.snapshots() == []
    await check(box, HOLD)
    with pytest.raises(NotFoundError):
        await engine.delete_snapshot("box@base")


async def test_a_machine_s_own_snapshots_do_not_hold_each_other(box: Box) -> None:
    """The one that it stands on may go too: what the machine needs of it stays until the machine goes."""
    engine = box.engine
    for label in ("one", "two", "three"):
        await box.sh(MARK.format(label) + "; sync")
        await engine.snapshot("box", label, test=False)
    await engine.restore("box", "two")
    for label in ("two", "one"):
        assert await engine.delete_snapshot(f"box@{label}") == [f"box@{label}"]
    await box.sh("echo 3 > /proc/sys/vm/drop_caches")
    assert await box.text(MARKS) == "two two"
    await check(box, HOLD)
    await engine.restore("box", "three")
    assert await box.text(MARKS) == "three three"


# --- templates ---


async def pooled(engine: Engine, name: str, wanted: int) -> None:
    async with asyncio.timeout(DEADLINE):
        while (await engine.get_snapshot(name)).pooled != wanted:  # noqa: ASYNC110  (parked machines make no events for users)
            await asyncio.sleep(0.05)


async def test_a_template_and_its_pool(box: Box) -> None:
    engine = box.engine
    await box.sh(MARK.format("warm") + "; sync")
    await engine.snapshot("box", "warm")
    made = await engine.template("box@warm", label="shop:1.0", pool=2)
    assert (made.name, made.template, made.pool) == ("shop:1.0", True, 2)
    await pooled(engine, "shop:1.0", 2)  # not before its test
    assert (await engine.get_snapshot("shop:1.0")).state is SnapshotState.READY
    assert {each.name for each in await engine.list()} == {"root", "box"}
    info = await engine.info()
    assert (info.machines, info.parked) == (2, 2)
    assert not [each for each in await engine.tree() if each.name.startswith("pool-")]
    for name in ("one", "two"):
        machine = await engine.create_from("shop:1.0", name)
        assert (machine.state, machine.name, machine.spec.name, machine.parent) == (State.RUNNING, name, name, "box")
    await engine.create_from("shop:1.0", "three")  # the pool may be empty by now: then it is started
    for name in ("one", "two", "three"):
        each = Box(engine, name)
        assert await each.text(MARKS + "; hostname") == f"warm warm {name}"
        await check(each, HOLD)
        await each.sh(MARK.format(name) + "; sync")
    await pooled(engine, "shop:1.0", 2)
    for size in (3, 1, 0):
        await engine.template("shop:1.0", pool=size)
        await pooled(engine, "shop:1.0", size)
        async with asyncio.timeout(DEADLINE):
            while (await engine.info()).parked != size:  # noqa: ASYNC110  (one that is being deleted counts until it is gone)
                await asyncio.sleep(0.05)
    late = await engine.create_from("shop:1.0", "late")
    assert await Box(engine, late.name).text(MARKS) == "warm warm"
    await engine.template("shop:1.0", pool=1)
    await pooled(engine, "shop:1.0", 1)
    assert set(await engine.delete_snapshot("shop:1.0", cascade=True)) == {"one", "two", "three", "late", "shop:1.0"}
    assert (await engine.info()).parked == 0
    assert {each.name for each in await engine.list()} == {"root", "box"}


async def test_names_of_templates(box: Box) -> None:
    engine = box.engine
    await engine.snapshot("box", "one", test=False)
    await engine.snapshot("box", "two", test=False)
    assert (await engine.template("box@one", label="shop")).name == "shop:latest"
    assert (await engine.get_snapshot("shop")).name == "shop:latest"
    with pytest.raises(ExistsError, match="there is a snapshot shop:latest already"):
        await engine.template("box@two", label="shop:latest")
    assert (await engine.template("box@two", label="acme/shop@4f2a")).name == "acme/shop@4f2a"
    for label in ("Shop:1", "a b", "/shop", "shop:"):
        with pytest.raises(SpecError, match="cannot name a template"):
            await engine.template("shop", label=label)
    for size in (-1, 1001):
        with pytest.raises(SpecError, match="0 to 1000"):
            await engine.template("shop", pool=size)
    automatic = (await engine.get("root")).snapshot
    with pytest.raises(SpecError, match="needs a name"):
        await engine.template(automatic)
