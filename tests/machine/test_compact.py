"""Compacting: the host gets back what a disk holds needlessly, nothing changes for the guest, and being killed in the middle costs nothing."""

from __future__ import annotations

import pytest

from ramet import disks
from ramet.engine import Engine
from ramet.errors import StateError
from ramet.model import State
from ramet.paths import StateDir
from ramet.storage import LayerInfo
from tests.fixtures import Artifacts, Box, States, opened
from tests.machine.aftermath import Nursery, Trouble, busy, note, notes, settled, sound, swept, went_on

MIB = 1 << 20
SIZE = 24  # MiB of a file, and more than a layer may have to be taken over by its heirs without being asked
FILL = "dd if=/dev/urandom bs=1M count={0} of={1} 2>/dev/null; md5sum {1} | cut -c-32 > {1}.md5; sync"
SAME = 'echo 3 > /proc/sys/vm/drop_caches; cd {0}; for f in *.md5; do [ "$(cat $f)" = "$(md5sum ${{f%.md5}} | cut -c-32)" ] || exit 1; done'


def used(state: StateDir) -> int:
    """Bytes that machines and layers take, as `du` has it."""
    roots = (state.machines, state.store.layers, state.store.blobs)
    found = {(each.st_dev, each.st_ino): each.st_blocks * 512 for root in roots for path in root.rglob("*") if (each := path.lstat())}
    return sum(found.values())


async def below(box: Box) -> LayerInfo:
    """The layer that the machine's disk stands on."""
    ops = box.engine._ops
    return await box.engine.get_layer(*disks.layers_of(ops.state.machine(box.engine._entry(box.name).record.id)))


@pytest.mark.parametrize("how", ["running", "paused", "stopped"])
async def test_what_is_held_needlessly_goes_back(states: States, artifacts: Artifacts, how: str) -> None:
    state = states.new()
    async with opened(state) as engine:
        await engine.create(artifacts.spec("fat", disk=1 << 30))
        box = Box(engine, "fat")
        await busy(box)
        await box.sh(
            f"mkdir /srv/d; {FILL.format(4, '/srv/d/kept')}; tr '\\0' x < /dev/zero | dd bs=1M count=64 iflag=fullblock of=/srv/d/text; sync"
        )
        await {"running": box.get, "paused": lambda: engine.pause("fat"), "stopped": lambda: engine.stop("fat")}[how]()
        before = used(state)
        given = await engine.compact("fat")
        assert given >= 60 * MIB
        await settled(engine)
        assert abs(before - used(state) - given) <= 2 * MIB
        assert (await box.get()).state == how
        assert (await below(box)).sealed
        if how == "paused":
            await engine.resume("fat")
        if how == "stopped":
            await engine.start("fat")
        else:
            await went_on(box, 0)
        await box.sh(SAME.format("/srv/d"))
        assert int(await box.text("tr -d x < /srv/d/text | wc -c; ")) == 0
        assert await box.text("wc -c < /srv/d/text") == str(64 * MIB)


async def test_a_layer_that_is_mostly_written_over_goes(states: States, artifacts: Artifacts) -> None:
    state = states.new()
    async with opened(state) as engine:
        await engine.create(artifacts.spec("fat", disk=1 << 30))
        box = Box(engine, "fat")
        await box.sh(f"mkdir /srv/d; {FILL.format(SIZE, '/srv/d/a')}; {FILL.format(SIZE, '/srv/d/b')}")
        await engine.compact("fat")
        old = await below(box)
        assert old.data >= 2 * SIZE * MIB
        await box.sh(f"rm /srv/d/a; {FILL.format(SIZE, '/srv/d/c')}; rm -f /srv/d/a.md5; sync")
        given = await engine.compact("fat")
        new = await below(box)
        assert new.chain == (new.id,), "it took over what is left of the old one"
        assert old.id not in [each.id for each in await engine.layers()]
        assert given >= SIZE * MIB * 9 // 10
        await box.sh(SAME.format("/srv/d"))
        await engine.stop("fat")
        await engine.start("fat")
        await box.sh(SAME.format("/srv/d"))
        assert await engine.compact("fat") <= 4 * MIB, "there is nothing left to give"
        assert await engine.verify_layer((await below(box)).id) == []


async def test_forks_and_snapshots_keep_what_they_stand_on(states: States, artifacts: Artifacts) -> None:
    async with swept(states.new()) as engine:
        await engine.create(artifacts.spec("parent", disk=1 << 30))
        parent = Box(engine, "parent")
        await parent.sh(f"mkdir /srv/d; {FILL.format(SIZE, '/srv/d/a')}")
        await engine.snapshot("parent", "kept", test=False)
        (outcome,) = await engine.fork("parent", names=("child",))
        assert outcome.machine, outcome
        child = Box(engine, "child")
        await child.sh(f"rm /srv/d/a /srv/d/a.md5; {FILL.format(2, '/srv/d/mine')}")
        await settled(engine)
        for name in ("child", "parent", "child"):
            await engine.compact(name)
            await sound(engine)
        await parent.sh(SAME.format("/srv/d"))
        await child.sh(SAME.format("/srv/d"))
        assert await child.text("ls /srv/d") == "mine\nmine.md5"
        await engine.create_from("parent@kept", "other")
        other = Box(engine, "other")
        await other.sh(SAME.format("/srv/d"))
        assert await other.text("ls /srv/d") == "a\na.md5"
        for name in ("child", "parent", "other"):
            await engine.stop(name)
            await engine.start(name)
            await Box(engine, name).sh(SAME.format("/srv/d"))


async def test_a_hibernated_machine_is_refused(states: States, artifacts: Artifacts) -> None:
    async with swept(states.new()) as engine:
        await engine.create(artifacts.spec("asleep"))
        await engine.hibernate("asleep")
        with pytest.raises(StateError, match="cannot compact asleep: it is hibernated"):
            await engine.compact("asleep")


@pytest.mark.parametrize("how", ["running", "stopped"])
async def test_killed_while_compacting(states: States, artifacts: Artifacts, nursery: Nursery, how: str) -> None:
    state = states.new()
    async with Engine.open(state) as engine:
        await engine.create(artifacts.spec("victim"))
        box = Box(engine, "victim")
        await note(box, "first")
        if how == "running":
            await busy(box)
        else:
            await engine.stop("victim")
    moments = await nursery.moments(state, "compact", name="victim")
    assert any(moment.startswith("store:seal") for moment in moments) or "step:compressing the disk" in moments
    trouble, written, count = Trouble(), ["first"], 0
    for number, moment in enumerate(moments):
        with trouble.at(moment):
            await nursery.die(state, moment, "compact", name="victim")
            async with Engine.open(state) as engine:
                await sound(engine)
                box = Box(engine, "victim")
                if how == "stopped":
                    assert (await box.get()).state is State.STOPPED
                    await engine.start("victim")
                else:
                    count = await went_on(box, count)
                await note(box, f"at{number}")
                written.append(f"at{number}")
                assert await notes(box) == sorted(written)
                assert all(each.sealed for each in await engine.layers())
                if how == "stopped":
                    await engine.stop("victim")
    with trouble.at("the end"):
        async with swept(state) as engine:
            await engine.compact("victim")
            if how == "running":
                await went_on(Box(engine, "victim"), count)
                await engine.stop("victim")
            await engine.start("victim")
            assert await notes(Box(engine, "victim")) == sorted(written)
            await sound(engine)
    trouble.check()
