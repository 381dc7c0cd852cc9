"""Drives beside the root disk: they are there at every boot, are saved in the same instant as the root, and give back what is deleted on them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from ramet.engine import Engine
from ramet.errors import MachineFailedError
from ramet.kernels import KernelKind
from ramet.model import Command, Drive, InitMode, Snapshot, SnapshotState, State
from ramet.paths import StateDir
from ramet.store.disk import allocated
from ramet.vm import disk
from ramet.vm.machine import Vm
from tests.fixtures import Artifacts, Box, States
from tests.machine.aftermath import DEADLINE, Nursery, Trouble, busy, goes_on, note, notes, settled, sound, swept, went_on

MIB = 1 << 20
# Not in the order in which they are mounted.
DRIVES = (
    Drive(name="log", size=128 * MIB, mount="/data/log"),
    Drive(name="data", size=256 * MIB, mount="/data"),
    Drive(name="raw", size=64 * MIB),
)
RAW = "/dev/disk/by-id/virtio-raw"
# The same number, first on the root disk and then on the drive, each on the disk before the next step.
WRITER = """
echo $$ > /run/writer; n=0
while :; do
    n=$((n + 1)); printf '%012d' $n > /run/number
    dd if=/run/number of=/srv/first conv=notrunc,fsync; dd if=/run/number of=/data/second conv=notrunc,fsync
done 2>/dev/null
"""


@pytest_asyncio.fixture(loop_scope="session")
async def fresh(states: States) -> AsyncIterator[StateDir]:
    """A state directory; at its end, all that is in it can be removed, and then nothing is left."""
    made = states.new()
    yield made
    async with swept(made):
        pass


@pytest_asyncio.fixture(loop_scope="session")
async def driven(fresh: StateDir, artifacts: Artifacts) -> AsyncIterator[Box]:
    """A machine with drives."""
    async with Engine.open(fresh) as engine:
        await engine.create(artifacts.spec("driven", drives=DRIVES))
        yield Box(engine, "driven")
        await settled(engine)


def machine(box: Box) -> Vm:
    found = box.engine._entry(box.name).vm
    assert found
    return found


def overlay(box: Box, drive: str) -> Path:
    """The file that the machine writes to."""
    (found,) = (each for each in disk.read(machine(box).files) if each.name == drive)
    return machine(box).files.overlay(found.number, drive)


async def write_numbers(box: Box) -> None:
    """Start the program that does, and wait until it is under way."""
    command = Command(argv=("sh", "-c", WRITER), detach=True, label="writer")
    async with contextlib.aclosing(box.engine.execute(box.name, command)) as events:
        await anext(events)
    await box.sh("while ! [ -s /data/second ] || [ $(cat /data/second) -lt 20 ]; do usleep 20000; done", timeout=DEADLINE)


async def same_instant(box: Box, *, stop: bool = True) -> int:
    """How far the program came, by the disks and not by the page cache. stop: it runs, and is ended first."""
    if stop:
        await box.sh("kill -9 $(cat /run/writer)")
    await box.sh("echo 3 > /proc/sys/vm/drop_caches")
    first, second = map(int, (await box.text("cat /srv/first; echo; cat /data/second")).split())
    assert first - 1 <= second <= first, "root disk and drive are not of the same instant"
    assert second >= 20
    return first


async def test_they_are_there_with_debian_s_kernel(fresh: StateDir, artifacts: Artifacts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAMET_KERNEL", KernelKind.DEBIAN)
    async with Engine.open(fresh) as engine:
        await engine.create(artifacts.spec("driven", drives=DRIVES))
        box = Box(engine, "driven")
        assert "cloud" in await box.text("uname -r")
        await box.sh(f"echo kept > /data/kept; echo kept > /data/log/kept; echo raw > {RAW}; sync")
        (outcome,) = await engine.fork("driven", names=("child",))
        assert outcome.machine
        await engine.hibernate("child")
        await engine.resume("child")
        for name in ("driven", "child"):
            await Box(engine, name).sh("echo 3 > /proc/sys/vm/drop_caches")
            assert await Box(engine, name).text(f"cat /data/kept /data/log/kept; head -c 4 {RAW}") == "kept\nkept\nraw"
        await settled(engine)


async def test_they_are_there_at_every_boot(driven: Box) -> None:
    engine = driven.engine
    for boot in range(3):
        table = [line.split() for line in (await driven.text("cat /proc/mounts")).splitlines()]
        mounted = {line[1]: line for line in table if line[1].startswith("/data")}
        assert set(mounted) == {"/data", "/data/log"}
        for place, name in (("/data", "data"), ("/data/log", "log")):
            device, _, kind, options = mounted[place][:4]
            assert kind == "ext4"
            assert "discard" in options.split(",")
            assert await driven.text(f"readlink -f /dev/disk/by-id/virtio-{name}") == device
        for drive in DRIVES:
            device = await driven.text(f"basename $(readlink -f /dev/disk/by-id/virtio-{drive.name})")
            assert int(await driven.text(f"cat /sys/block/{device}/size")) * 512 == drive.size
        number = f"{boot:04}"
        if boot:
            before = f"{boot - 1:04}"
            assert (await driven.text(f"cat /srv/x /data/x /data/log/x; dd if={RAW} bs=4 count=1 2>/dev/null")).split() == [before] * 4
        else:
            assert await driven.text("ls -A /data") == "log"  # no lost+found, on which some programs choke
            assert await driven.text(f"tr -d '\\0' < {RAW} | wc -c") == "0"
        await driven.sh(
            f"for f in /srv/x /data/x /data/log/x; do echo {number} > $f; done; printf {number} | dd of={RAW} conv=fsync 2>/dev/null; sync"
        )
        await engine.stop("driven", force=boot == 1)
        await engine.start("driven")


async def test_each_is_served_by_a_thread_of_its_own(driven: Box) -> None:
    threads = {each["id"]: each["thread-id"] for each in await machine(driven).monitor("query-iothreads")}
    assert set(threads) == {"io", "io-log", "io-data", "io-raw"}
    assert len(set(threads.values())) == 4

    def woken(name: str) -> int:
        status = Path(f"/proc/{machine(driven).pid}/task/{threads[name]}/status").read_text()
        return int(status.partition("\nvoluntary_ctxt_switches:")[2].split()[0])

    before = {name: woken(name) for name in threads}
    await driven.sh(
        "for n in $(seq 50); do dd if=/dev/zero of=/data/little bs=512 count=1 conv=notrunc,fsync 2>/dev/null; done; rm /data/little"
    )
    spent = {name: woken(name) - before[name] for name in threads}
    assert spent["io-data"] >= 50, spent
    assert spent["io-raw"] < 10, spent


async def test_what_is_deleted_goes_back_to_the_host(driven: Box) -> None:
    path = overlay(driven, "data")
    await driven.sh("dd if=/dev/zero bs=1M count=64 2>/dev/null | tr '\\0' x > /data/big; sync", timeout=DEADLINE)
    full = allocated(path)
    assert full >= 64 * MIB
    await driven.sh("rm /data/big; sync")
    async with asyncio.timeout(DEADLINE):
        while allocated(path) > full - 61 * MIB:  # noqa: ASYNC110  (a file that shrinks tells nobody)
            await asyncio.sleep(0.1)


async def test_a_save_is_one_instant_of_all_disks(driven: Box) -> None:
    engine = driven.engine
    await write_numbers(driven)
    (outcome,) = await engine.fork("driven", names=("forked",))
    assert outcome.machine, outcome
    saved = await engine.snapshot("driven", "all", test=False)
    files_only = await engine.snapshot("driven", "files", memory=False)
    numbers = {}
    try:
        await same_instant(Box(engine, "forked"))
        for name, snapshot in (("booted", saved), ("written", files_only)):
            await engine.create_from(snapshot.name, name, disk_only=snapshot.memory)
            numbers[name] = await same_instant(Box(engine, name), stop=False)
        await engine.create_from(saved.name, "went-on")
        assert await same_instant(Box(engine, "went-on")) >= numbers["booted"]
        # Further on, and back: the program goes on from where the snapshot is.
        await driven.sh("echo later > /data/later; sync")
        await engine.restore("driven", "all")
        assert await driven.text("ls /data") == "log\nsecond"
        assert await same_instant(driven) >= numbers["booted"]
        assert numbers["booted"] <= numbers["written"]
    finally:
        for name in {each.name for each in await engine.list()} - {"driven"}:
            await engine.delete(name)
        for snapshot in (saved, files_only):
            await engine.delete_snapshot(snapshot.name)
        await settled(engine)


async def test_what_a_snapshot_has_of_a_drive(driven: Box) -> None:
    """Of each drive a layer, whole, compressed, known as the machine's and the snapshot's, and tested with them."""
    engine = driven.engine
    saved = await engine.snapshot("driven", "layers")
    await settled(engine)
    found: Snapshot = await engine.get_snapshot(saved.name)
    try:
        assert (found.state, found.reason) == (SnapshotState.READY, "")
        assert len(set(found.disk_layers)) == 1 + len(DRIVES)
        assert len(found.layers) == 2 + len(DRIVES)
        for layer, size in zip(found.drive_layers, (each.size for each in DRIVES), strict=True):
            info = await engine.get_layer(layer)
            assert (info.size, info.sealed, set(info.used_by)) == (size, True, {"driven", "driven@layers"})
            assert await engine.verify_layer(layer) == []
        assert found.stored == sum([(await engine.get_layer(each)).stored for each in found.layers])
        await sound(engine)
    finally:
        await engine.delete_snapshot(saved.name)
        await settled(engine)


async def test_hibernation(driven: Box) -> None:
    engine = driven.engine
    await busy(driven)
    await driven.sh(f"echo kept > /data/kept; echo kept > /data/log/kept; printf kept | dd of={RAW} conv=fsync")
    count = await goes_on(driven)
    await engine.hibernate("driven")
    await settled(engine)
    await engine.resume("driven")
    await went_on(driven, count)
    await driven.sh("echo 3 > /proc/sys/vm/drop_caches")
    assert await driven.text(f"cat /data/kept /data/log/kept; dd if={RAW} bs=4 count=1 2>/dev/null") == "kept\nkept\nkept"


async def test_compaction_gives_back_what_a_drive_holds_for_nothing(driven: Box) -> None:
    engine = driven.engine
    await driven.sh("dd if=/dev/urandom of=/data/big bs=1M count=32 2>/dev/null; sync; sha256sum /data/big > /data/sum")
    await engine.snapshot("driven", "full", test=False)
    await driven.sh(
        "rm /data/big /data/sum; dd if=/dev/urandom of=/data/log/big bs=1M count=8 2>/dev/null; cd /data/log; sha256sum big > sum; sync",
        timeout=DEADLINE,
    )
    await settled(engine)
    await engine.delete_snapshot("driven@full")
    given = await engine.compact("driven")
    await settled(engine)
    assert given > 24 * MIB
    await driven.sh("echo 3 > /proc/sys/vm/drop_caches; cd /data/log; sha256sum -c sum; rm big sum")
    await sound(engine)


async def test_a_machine_with_the_image_s_own_init(engine: Engine, artifacts: Artifacts) -> None:
    await engine.create(artifacts.spec("inited", drives=DRIVES[1:2], init=InitMode.IMAGE))
    try:
        box = Box(engine, "inited")
        assert await box.text("grep -c ' /data ext4 ' /proc/mounts") == "1"
        await note(box, "here")
        await box.sh("cp /srv/here /data/")
        await engine.stop("inited")
        assert (await engine.start("inited")).state is State.RUNNING
        assert await box.text("cat /data/here") == "here"
    finally:
        await engine.delete("inited")


async def test_a_drive_that_cannot_be_mounted_is_no_silent_loss(engine: Engine, artifacts: Artifacts) -> None:
    await engine.create(artifacts.spec("spoiled", drives=DRIVES[1:2]))
    try:
        await Box(engine, "spoiled").sh("dd if=/dev/urandom of=/dev/disk/by-id/virtio-data bs=1M count=1 conv=fsync 2>/dev/null")
        await engine.stop("spoiled", force=True)
        with pytest.raises(MachineFailedError, match="cannot mount drive data on /data"):
            await engine.start("spoiled")
        assert (await engine.get("spoiled")).state is State.FAILED
    finally:
        await engine.delete("spoiled")


async def drive_notes(box: Box) -> list[str]:
    """Those on the drive, by the disk."""
    await box.sh("echo 3 > /proc/sys/vm/drop_caches; cd /data; for f in at*; do [ $f = $(cat $f) ] || exit 1; done")
    return (await box.text("cd /data; ls at*")).split()


@pytest.mark.parametrize("verb", ["snapshot", "hibernate"])
async def test_killed_while_saving(fresh: StateDir, artifacts: Artifacts, nursery: Nursery, verb: str) -> None:
    """At the moments at which the disks are neither here nor there."""
    async with Engine.open(fresh) as engine:
        await engine.create(artifacts.spec("victim", drives=DRIVES))
        await busy(Box(engine, "victim"))
    moments = ["step:freezing the disk", "step:copying memory", "disk:write", "db:add_snapshot", "state:hibernated"]
    unlikely = {"snapshot": {"state:hibernated"}, "hibernate": {"step:copying memory"}}[verb]
    trouble, written, count = Trouble(), [], 0
    for number, moment in enumerate(each for each in moments if each not in unlikely):
        with trouble.at(moment):
            arguments: dict[str, object] = {"label": f"at{number}"} if verb == "snapshot" else {"slim": False}
            await nursery.die(fresh, moment, verb, name="victim", **arguments)
            async with Engine.open(fresh) as engine:
                if (await sound(engine))["victim"].state is State.HIBERNATED:
                    await engine.resume("victim")
                box = Box(engine, "victim")
                count = await went_on(box, count)
                await note(box, f"at{number}")
                await box.sh(f"cp /srv/at{number} /data/; sync")
                written.append(f"at{number}")
                assert await notes(box) == await drive_notes(box) == written
                for snapshot in await engine.snapshots("victim"):
                    if snapshot.name:
                        await engine.delete_snapshot(snapshot.name)
    with trouble.at("the end"):
        async with Engine.open(fresh) as engine:
            await engine.stop("victim")
            await engine.start("victim")
            assert await notes(Box(engine, "victim")) == await drive_notes(Box(engine, "victim")) == written
    trouble.check()
