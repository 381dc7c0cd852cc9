"""Machines go on as others, later, or from an earlier instant, and what runs in them does not notice. Forks, pauses, hibernations, rewinds, new daemons."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from ramet import images
from ramet.engine import Engine
from ramet.errors import ExistsError, NotFoundError, RametError, SpecError, StateError
from ramet.model import Command, Exit, Output, Port, Started, State
from ramet.paths import StateDir
from ramet.store import garbage
from tests.fixtures import Artifacts, Box, States
from tests.machine import witness
from tests.machine.events import listening
from tests.machine.witness import DEADLINE, HOLD, at_rest, check, forked

UP = Command(argv=("true",))


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def stem(engine: Engine, artifacts: Artifacts) -> AsyncIterator[Box]:
    """A machine with a program that holds files, timers, a connection. Tests leave it running: what they break is a child of it."""
    await engine.create(artifacts.spec("stem"))
    box = Box(engine, "stem")
    await prepared(box)
    async with witness.cleared(engine):  # the layers are served from here on, which no test is to be blamed for
        await forked(box)
    yield box
    await engine.delete("stem")


async def prepared(box: Box) -> None:
    await witness.install(box)
    await witness.start(box, f"hold {HOLD} /srv", HOLD)
    await check(box, HOLD)


@pytest_asyncio.fixture(autouse=True, loop_scope="session")
async def cleared(engine: Engine, stem: Box) -> AsyncIterator[None]:
    async with witness.cleared(engine):
        yield


def told(answer: str) -> dict[str, str]:
    """What the program that holds things says of itself."""
    words = answer.split()[1:]
    return dict(zip(words[::2], words[1::2], strict=True))


# --- what runs goes on ---


async def test_programs_go_on_in_forks_and_their_forks(stem: Box) -> None:
    before = told(await check(stem, HOLD))
    (child,) = await forked(stem)
    (grandchild,) = await forked(child)
    for box, said in ((stem, 1), (child, 1), (grandchild, 1), (stem, 2), (grandchild, 2)):
        after = told(await check(box, HOLD))
        assert after["pid"] == before["pid"]
        assert int(after["said"]) == int(before["said"]) + said  # nobody else used its connection
    machine = await child.get()
    assert (machine.state, machine.parent, (await grandchild.get()).parent) == (State.RUNNING, "stem", child.name)
    assert machine.pid != (await stem.get()).pid


async def test_programs_go_on_after_a_pause(stem: Box) -> None:
    (child,) = await forked(stem)
    async with listening(stem.engine) as ear:
        paused = await stem.engine.pause(child.name)
        assert paused.state is State.PAUSED
        assert paused.pid
        with pytest.raises(StateError, match=f"cannot use {child.name}: it is paused, not running"):
            await stem.engine.run(child.name, UP)
        with pytest.raises(StateError, match="it is paused"):
            await stem.engine.pause(child.name)
        assert (await stem.engine.resume(child.name)).state is State.RUNNING
    assert ear.states(child.name) == ["paused", "running"]
    await check(child, HOLD)
    with pytest.raises(StateError, match="it is running"):
        await stem.engine.resume(child.name)


async def test_programs_go_on_after_hibernation(stem: Box) -> None:
    (child,) = await forked(stem)
    before = told(await check(child, HOLD))
    async with listening(stem.engine) as ear:
        asleep = await stem.engine.hibernate(child.name)
        assert (asleep.state, asleep.pid) == (State.HIBERNATED, None)
        assert asleep.usage
        assert asleep.usage.memory == 0
        with pytest.raises(StateError, match="it is hibernated"):
            await stem.engine.run(child.name, UP)
        with pytest.raises(StateError, match="it is hibernated"):
            await stem.engine.start(child.name)
        assert (await stem.engine.resume(child.name)).state is State.RUNNING
    assert ear.states(child.name) == ["hibernating", "hibernated", "resuming", "running"]
    after = told(await check(child, HOLD))
    assert (after["pid"], int(after["said"])) == (before["pid"], int(before["said"]) + 1)
    await stem.engine.pause(child.name)  # a paused machine hibernates too
    await stem.engine.hibernate(child.name)
    await stem.engine.resume(child.name)
    await check(child, HOLD)


async def test_a_hibernated_machine_that_is_stopped_forgets_its_memory(stem: Box) -> None:
    (child,) = await forked(stem)
    await child.sh("echo kept > /srv/kept; sync; echo lost > /dev/shm/lost")
    await stem.engine.hibernate(child.name)
    assert (await stem.engine.stop(child.name)).state is State.STOPPED
    assert (await stem.engine.start(child.name)).state is State.RUNNING
    assert await child.text("cat /srv/kept; ls /dev/shm; ps | grep -c '[w]itness hold'; true") == "kept\n0"


async def test_programs_go_on_after_a_rewind(stem: Box) -> None:
    (child,) = await forked(stem)
    await stem.engine.snapshot(child.name, "here", test=False)
    before = told(await check(child, HOLD))
    await child.sh(f"kill -9 {before['pid']}; rm -rf /srv/open")
    for _ in range(2):
        assert (await stem.engine.restore(child.name, "here")).state is State.RUNNING
        after = told(await check(child, HOLD))
        assert (after["pid"], after["said"]) == (before["pid"], before["said"])


async def test_ports_of_a_fork_are_its_own(stem: Box) -> None:
    await stem.sh("mkdir -p /srv/www; hostname > /srv/www/index.html; httpd -p 8080 -h /srv/www")
    (child,) = await forked(stem)
    await child.sh("echo child > /srv/www/index.html")
    for box, content in ((stem, b"stem\n"), (child, b"child\n")):
        port = await stem.engine.open_port(box.name, Port(guest=8080))
        reader, writer = await asyncio.open_connection("127.0.0.1", port.host)
        writer.write(b"GET / HTTP/1.0\r\n\r\n")
        assert (await asyncio.wait_for(reader.read(), DEADLINE)).partition(b"\r\n\r\n")[2] == content
        writer.close()
        await stem.engine.close_port(box.name, 8080)


async def test_all_of_it_over_restarts_of_the_daemon(states: States, artifacts: Artifacts) -> None:
    """Each step is another engine's on the same state directory. A machine that is paused, one that is hibernated and one that runs are found as they are."""
    state = states.new()
    async with fresh(state) as engine:
        await engine.create(artifacts.spec("old"))
        await prepared(Box(engine, "old"))
        await engine.fork("old", names=("runs", "paused", "sleeps"))
        await engine.pause("paused")
        await engine.hibernate("sleeps")
        await engine.snapshot("old", "here", test=False)
        await engine.delete("old")
    async with fresh(state) as engine:
        found = {each.name: each.state for each in await engine.list()}
        assert found == {"runs": State.RUNNING, "paused": State.PAUSED, "sleeps": State.HIBERNATED}
        await check(Box(engine, "runs"), HOLD)
        for name in ("paused", "sleeps"):
            await engine.resume(name)
            await check(Box(engine, name), HOLD)
        await engine.create_from("old@here", "late")
        await engine.fork("runs", names=("child",))
        await engine.hibernate("paused")
        await engine.pause("runs")
    async with fresh(state) as engine:
        await engine.resume("paused")
        await engine.fork("runs", names=("of-a-paused-one",))
        await engine.resume("runs")
        for machine in await engine.list():
            assert machine.state is State.RUNNING
            await check(Box(engine, machine.name), HOLD)
        for machine in await engine.list():
            await engine.delete(machine.name)
        await engine.delete_snapshot("old@here")
        assert await engine.layers() == []
        assert list(state.snapshots.iterdir()) == []


@contextlib.asynccontextmanager
async def fresh(state: StateDir) -> AsyncIterator[Engine]:
    """An engine that leaves its machines to the next, once nothing is compressed any more; after an error they are deleted."""
    async with Engine.open(state) as engine:
        try:
            yield engine
            await at_rest(engine)
        except BaseException:
            for machine in await engine.list():
                await engine.delete(machine.name)
            raise


# --- commands that somebody listens to ---


async def test_a_stream_goes_on_unharmed_while_its_machine_is_saved(stem: Box) -> None:
    """Numbered lines: none is lost, none comes twice, through forks, a pause and a snapshot."""
    (parent,) = await forked(stem)
    engine = stem.engine
    script = "i=0; while [ ! -e /tmp/enough ]; do i=$((i+1)); echo $i; usleep 1000; done; echo end $i"
    seen, begun = b"", asyncio.Event()
    ended: list[Exit] = []

    async def listen() -> None:
        nonlocal seen
        async for event in engine.execute(parent.name, Command(argv=("sh", "-c", script), label="counter")):
            if isinstance(event, Output):
                seen += event.data
                begun.set()
            elif isinstance(event, Exit):
                ended.append(event)

    task = asyncio.create_task(listen())
    await asyncio.wait_for(begun.wait(), DEADLINE)
    children = await forked(parent, 2)
    await engine.pause(parent.name)
    held = len(seen)
    await engine.resume(parent.name)
    await engine.snapshot(parent.name, "meanwhile", test=False)
    children += await forked(parent)
    async with asyncio.timeout(DEADLINE):
        while len(seen) <= held:  # noqa: ASYNC110  (it comes by itself)
            await asyncio.sleep(0.01)
    await parent.sh("touch /tmp/enough")
    await asyncio.wait_for(task, DEADLINE)
    lines = seen.decode().split()
    assert lines[-2] == "end"
    assert lines[:-2] == [str(number) for number in range(1, int(lines[-1]) + 1)]
    assert [(each.ending, each.code) for each in ended] == [("exited", 0)]
    for child in children:  # there nobody listens to it, but it lives
        (process,) = [each for each in await engine.processes(child.name) if each.label == "counter"]
        assert (process.state, process.attached, process.detached) == ("running", False, True)
        await child.sh("touch /tmp/enough")
        output = b""
        async for event in engine.attach(child.name, process.id):
            output += event.data if isinstance(event, Output) else b""
        assert output.split()[-2] == b"end"


async def test_input_goes_on_too(stem: Box) -> None:
    engine = stem.engine
    events = engine.execute("stem", Command(argv=("cat",), stdin=True))
    started = await anext(events)
    assert isinstance(started, Started)
    sent = [b"%d\n" % number for number in range(60)]

    async def write() -> None:
        for line in sent:
            await engine.send_input("stem", started.process, line * 500)
        await engine.send_input("stem", started.process, b"", eof=True)

    async def read() -> bytes:
        return b"".join([event.data async for event in events if isinstance(event, Output)])

    reading, writing = asyncio.create_task(read()), asyncio.create_task(write())
    await forked(stem, 2)
    await asyncio.wait_for(writing, DEADLINE)
    assert await asyncio.wait_for(reading, DEADLINE) == b"".join(line * 500 for line in sent)


# --- generations ---


async def test_forks_of_forks_to_depth_20(stem: Box) -> None:
    """Each generation writes something; those in the middle are deleted while their descendants live."""
    engine, box, depth = stem.engine, stem, 20
    for number in range(1, depth + 1):
        name = f"deep-{number}"
        (outcome,) = await engine.fork(box.name, names=(name,))
        assert outcome.error is None, outcome.error
        if box is not stem and number % 4:
            await engine.delete(box.name)
        box = Box(engine, name)
        await box.sh(f"echo {number} >> /srv/line; echo {number} >> /dev/shm/line; sync")
    expected = "\n".join(str(number) for number in range(1, depth + 1))
    assert await box.text("cat /srv/line") == expected
    assert await box.text("cat /dev/shm/line") == expected
    await box.sh("echo 3 > /proc/sys/vm/drop_caches")
    assert await box.text("cat /srv/line") == expected
    await check(box, HOLD)
    assert [each.name for each in await engine.list() if each.name.startswith("deep-")] == [
        f"deep-{number}" for number in (3, 7, 11, 15, 19, 20)
    ]
    assert (await Box(engine, "deep-7").text("cat /srv/line")).split() == [str(number) for number in range(1, 8)]
    await check(Box(engine, "deep-7"), HOLD)
    await at_rest(engine)
    assert max(len(each.chain) for each in await engine.layers()) <= 2 * depth
    machine = {each.name: each for each in await engine.tree() if each.kind == "machine"}
    assert machine["deep-18"].gone
    assert not machine["deep-19"].gone
    await box.engine.hibernate(box.name)
    await box.engine.resume(box.name)
    await check(box, HOLD)


async def test_a_parent_is_rewound_and_deleted_while_its_children_live(stem: Box) -> None:
    engine = stem.engine
    (parent,) = await forked(stem)
    await parent.sh("echo first > /srv/when; echo first > /dev/shm/when")
    await engine.snapshot(parent.name, "first", test=False)
    (one,) = await forked(parent)
    await parent.sh("echo second > /srv/when; echo second > /dev/shm/when")
    (two,) = await forked(parent)
    await engine.restore(parent.name, "first")
    (three,) = await forked(parent)
    for box, when in ((parent, "first"), (one, "first"), (two, "second"), (three, "first")):
        assert await box.text("cat /srv/when /dev/shm/when") == f"{when}\n{when}", box.name
    await engine.delete(parent.name)
    for box, when in ((one, "first"), (two, "second"), (three, "first")):
        await check(box, HOLD)
        assert await box.text("cat /srv/when /dev/shm/when") == f"{when}\n{when}", box.name
    (four,) = await forked(two)
    assert await four.text("cat /srv/when") == "second"
    await at_rest(engine)
    await check(four, HOLD)
    gone = next(each for each in await engine.tree() if each.name == parent.name and each.kind == "machine")
    assert gone.gone


async def test_what_nobody_stands_on_is_removed(engine: Engine, stem: Box, state: StateDir) -> None:
    """However often a machine was forked: only what it stands on itself is left."""
    for _ in range(3):
        children = await forked(stem, 2)
        await at_rest(engine)
        for box in children:
            await engine.delete(box.name)
    point = await engine.get_snapshot((await stem.get()).snapshot)
    async with asyncio.timeout(DEADLINE):  # it is swept in the background
        while {each.name for each in state.snapshots.iterdir()} != {point.id}:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        while (left := {each.id for each in await engine.layers()}) - standing_on(state, *point.layers, *images.layers(state)):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    assert standing_on(state, *point.layers) <= left


def standing_on(state: StateDir, *layers: str) -> set[str]:
    """Every layer that these take, also where an image's is another store's."""
    return garbage.needed(garbage.Records(state.store), layers)


# --- names, and the wrong states ---


async def test_names_of_children(stem: Box) -> None:
    engine = stem.engine
    assert [each.name for each in await engine.fork("stem", count=2)] == ["stem-1", "stem-2"]
    await engine.delete("stem-1")
    assert [each.name for each in await engine.fork("stem", count=2)] == ["stem-1", "stem-3"]
    for names in (("stem-2",), ("twin", "twin"), ("stem",)):
        with pytest.raises(ExistsError, match=f"there is a machine {names[0]} already"):
            await engine.fork("stem", names=names)
    with pytest.raises(SpecError):
        await engine.fork("stem", names=("No Name",))
    for count in (0, -1, 1001):
        with pytest.raises(SpecError, match="1 to 1000 children"):
            await engine.fork("stem", count=count)
    with pytest.raises(NotFoundError):
        await engine.fork("nobody")
    assert sorted(each.name for each in await engine.list() if each.name.startswith(("stem-", "twin"))) == ["stem-1", "stem-2", "stem-3"]


async def test_one_child_that_fails_does_not_keep_the_others_from_living(stem: Box) -> None:
    """A hook of the image refuses one name."""
    (parent,) = await forked(stem)
    await witness.put(parent, "/etc/ramet/fork.d/50-refuse", b'#!/bin/sh\n[ "$RAMET_NAME" != bad ] || { echo not this one >&2; exit 3; }\n')
    outcomes = {each.name: each for each in await stem.engine.fork(parent.name, names=("good", "bad", "fine"))}
    assert outcomes["good"].machine
    assert outcomes["fine"].machine
    error = outcomes["bad"].error
    assert error
    assert "50-refuse" in error["message"]
    with pytest.raises(NotFoundError):
        await stem.engine.get("bad")
    await check(Box(stem.engine, "good"), HOLD)
    await check(Box(stem.engine, "fine"), HOLD)
    await check(parent, HOLD)


async def test_wrong_states(stem: Box) -> None:
    engine = stem.engine
    (child,) = await forked(stem)
    await engine.pause(child.name)
    (grandchild,) = await forked(child)  # of a paused machine; it runs
    await check(grandchild, HOLD)
    assert (await child.get()).state is State.PAUSED
    await engine.resume(child.name)
    await check(child, HOLD)
    await engine.stop(child.name, force=True)
    for verb in (engine.fork, engine.pause, engine.resume, engine.hibernate):
        with pytest.raises(StateError, match=f"{child.name}: it is stopped"):
            await verb(child.name)
    await engine.start(child.name)
    await engine.hibernate(child.name)
    for verb in (engine.fork, engine.pause, engine.hibernate):
        with pytest.raises(RametError, match="it is hibernated"):
            await verb(child.name)
    await engine.delete(child.name)
    await check(grandchild, HOLD)
