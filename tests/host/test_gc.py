"""What a host's disk gets back, and the proof that what is left is whole: real stores, records and databases, no machines."""

from __future__ import annotations

import asyncio
import dataclasses
import fcntl
import os
import shutil
import socket
import sqlite3
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from ramet import checking, collecting, images
from ramet.caretaker import Caretaker, budget
from ramet.db import Database, Record
from ramet.errors import AbsentError, DaemonError
from ramet.forks import Forks
from ramet.host import Host
from ramet.model import Image, ImageConfig, Snapshot, SnapshotState, Spec, State
from ramet.operations import Operations
from ramet.paths import StateDir
from ramet.store import blob, layer, remote
from ramet.store.chain import Chain
from ramet.store.layer import PAGE, Kind, Layer
from ramet.store.remote import Remote, Source
from ramet.store.runs import Runs
from ramet.vm import disk
from ramet.vm.disk import DiskState

PAGES = 64
SOURCE = Source(host="registry.example", path="acme/shop")
IMAGE = f"sha256:{'1' * 64}"


class Place:
    """A state directory as a daemon has it open."""

    def __init__(self, ops: Operations) -> None:
        self.ops = ops
        self.files = ops.store.files

    def layer(self, *, elsewhere: bool = False, kind: Kind = Kind.DISK) -> Layer:
        """64 pages that nobody else has. elsewhere: a registry has them too, from when they were pulled long ago."""
        with self.ops.store.draft(kind, PAGES * PAGE) as draft, open(draft.files.root / "pages", "w+b") as file:
            file.write(os.urandom(PAGES * PAGE))
            file.flush()
            Path(file.name).unlink()
            made = self.ops.store.publish_sealed(draft, file.fileno(), Runs.build([(0, PAGES, 0)]))
        if elsewhere:
            for digest in made.blobs:
                size = self.files.blob(digest).stat().st_size
                remote.save(self.files, Remote(digest=digest, size=size, sources=(SOURCE,), whole=True))
                os.utime(self.files.remote(digest), (1000 + len(self.ops.snapshots), 1000 + len(self.ops.snapshots)))
        return made

    async def snapshot(self, name: str, *, elsewhere: bool = False, memory: bool = False) -> Snapshot:
        made = Snapshot(
            id=os.urandom(6).hex(),
            name=name,
            machine="web",
            state=SnapshotState.READY,
            created_at=1.0,
            memory=memory,
            spec=Spec(name="web"),
            disk_layer=self.layer(elsewhere=elsewhere).id,
            memory_layer=self.layer(elsewhere=elsewhere, kind=Kind.MEMORY).id if memory else "",
        )
        place = self.ops.state.snapshot(made.id)
        place.root.mkdir()
        if memory:
            place.state.write_bytes(b"devices")
        await self.ops.db.add_snapshot(made, None)
        self.ops.snapshots[made.id] = made
        return made

    async def machine(self, name: str, layer_id: str, state: State = State.STOPPED) -> Path:
        """A machine whose disk stands on a layer; its directory."""
        record = Record(id=os.urandom(6).hex(), name=name, state=state, spec=Spec(name=name), created_at=1.0)
        files = self.ops.state.machine(record.id)
        files.root.mkdir()
        disk.write(files, (DiskState(number=0, layer=layer_id, size=PAGES * PAGE),))
        files.overlay(0).write_bytes(b"overlay")
        files.lock.touch()
        await self.ops.db.insert(record)
        self.ops.add(record)
        return files.root

    def digest(self, layer_id: str) -> str:
        return self.ops.store.get(layer_id).blobs[0]

    def blob(self, layer_id: str) -> Path:
        return self.files.blob(self.digest(layer_id))

    def absent(self, layer_id: str) -> int:
        return remote.absent(self.files, self.digest(layer_id))

    async def check(self, *, repair: bool = False) -> list[str]:
        return await checking.check(self.ops, repair=repair)


@pytest_asyncio.fixture
async def place(tmp_path: Path) -> AsyncIterator[Place]:
    state = StateDir(root=tmp_path / "state")
    state.create()
    async with Database.open(state.database) as database:
        yield Place(Operations(state, database, Host(state)))


def everything(root: Path) -> set[str]:
    """The names of all that is kept; the database's own files come and go."""
    return {str(path.relative_to(root)) for path in root.rglob("*") if not path.name.startswith("ramet.db-")}


# the budget


async def test_layers_take_no_more_than_they_may(place: Place) -> None:
    mine = await place.snapshot("mine")
    old, new = await place.snapshot("old", elsewhere=True), await place.snapshot("new", elsewhere=True)
    loose = place.layer(elsewhere=True)
    all_of_it = await collecting.collect(place.ops, budget=None, dry_run=True)
    assert (all_of_it.layers, all_of_it.blobs, all_of_it.evicted) == ((loose.id,), (place.digest(loose.id),), 0)
    assert place.ops.store.get(loose.id) == loose
    plan = await collecting.collect(place.ops, budget=all_of_it.stored - 1, dry_run=True)
    assert place.absent(old.disk_layer) == 0
    done = await collecting.collect(place.ops, budget=all_of_it.stored - 1, dry_run=False)
    assert (done.layers, done.blobs) == (plan.layers, plan.blobs) == ((loose.id,), all_of_it.blobs)
    assert done.bytes == all_of_it.bytes + done.evicted
    assert done.stored == all_of_it.stored - done.evicted < all_of_it.stored
    assert done.evicted >= PAGES * PAGE
    assert done.postponed == ()
    assert place.absent(old.disk_layer) >= PAGES * PAGE
    assert place.absent(new.disk_layer) == 0
    none = await collecting.collect(place.ops, budget=0, dry_run=False)
    assert place.absent(new.disk_layer) >= PAGES * PAGE
    assert none.postponed == ("layers take more than 0 B: machines use the rest, or it can be had nowhere else",)
    assert place.ops.store.verify(mine.disk_layer, old.disk_layer, new.disk_layer) == []
    with Chain.open(place.files, mine.disk_layer) as chain:
        chain.read(0, chain.size)
    blob.frames = blob.Frames()
    with pytest.raises(AbsentError), Chain.open(place.files, old.disk_layer) as chain:
        chain.read(0, chain.size)


async def test_nothing_goes_while_something_is_saved_or_pulled(place: Place) -> None:
    found = await place.snapshot("old", elsewhere=True)
    loose = place.layer()
    async with place.ops.layers_in_use():
        done = await collecting.collect(place.ops, budget=0, dry_run=False)
        assert (done.layers, done.evicted) == ((), 0)
        assert len(done.postponed) == 3
        assert place.absent(found.disk_layer) == 0
    while place.ops._background:  # what was left for afterwards
        await asyncio.wait(place.ops._background, timeout=60)
    assert not place.files.layer(loose.id).root.exists()


async def test_machines_that_live_keep_their_chunks(place: Place) -> None:
    runs, tested, hibernates = [await place.snapshot(name, elsewhere=True) for name in ("runs", "tested", "hibernates")]
    root = await place.machine("web", runs.disk_layer)
    await place.machine("sleeps", hibernates.disk_layer, State.HIBERNATED)
    await place.ops.snapshots.change(tested.id, state=SnapshotState.TESTING)
    lock = os.open(root / "lock", os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX)  # as its QEMU does
    try:
        await collecting.collect(place.ops, budget=0, dry_run=False)
        assert [bool(place.absent(each.disk_layer)) for each in (runs, tested, hibernates)] == [False, False, True]
    finally:
        os.close(lock)
    await collecting.collect(place.ops, budget=0, dry_run=False)
    assert place.absent(runs.disk_layer)


async def test_the_layer_of_an_image_is_kept_with_it(place: Place) -> None:
    made = place.layer()
    _image(place, made.id)
    assert (await collecting.collect(place.ops, budget=0, dry_run=False)).layers == ()
    shutil.rmtree(place.ops.state.image(IMAGE).root)
    assert (await collecting.collect(place.ops, budget=0, dry_run=False)).layers == (made.id,)


async def test_the_daemon_keeps_to_the_budget(place: Place) -> None:
    found = await place.snapshot("old", elsewhere=True)
    caretaker = Caretaker(place.ops, Forks(place.ops), sample=None, budget=0)
    caretaker.tick()
    assert caretaker._collection is None
    caretaker._collect_at = 0.0
    caretaker.tick()
    assert caretaker._collection
    await caretaker._collection
    assert place.absent(found.disk_layer)


def test_a_budget_is_a_size() -> None:
    assert budget({}) is None
    assert budget({"RAMET_STORE_BUDGET": "2GiB"}) == 2 << 30
    with pytest.raises(DaemonError, match="RAMET_STORE_BUDGET: 'lots' is not a size"):
        budget({"RAMET_STORE_BUDGET": "lots"})


# the check


def _image(place: Place, layer_id: str = "") -> Path:
    files = place.ops.state.image(IMAGE)
    image = Image(digest=IMAGE, reference="acme/one", config=ImageConfig(), disk_size=PAGE, disk_used=PAGE, created_at=1.0)
    images.admit(place.ops.state, image, layer_id or place.layer().id)
    files.disk.write_bytes(bytes(PAGE))
    return files.disk


async def test_a_sound_host_has_no_problems(place: Place) -> None:
    await place.snapshot("mine", memory=True)
    pulled = await place.snapshot("pulled", elsewhere=True, memory=True)
    await place.machine("web", pulled.disk_layer)
    _image(place, place.layer().id)
    await collecting.collect(place.ops, budget=0, dry_run=False)
    assert place.absent(pulled.disk_layer)
    assert await place.check() == []
    assert await place.check(repair=True) == []


async def test_what_a_save_makes_is_no_problem(place: Place) -> None:
    """A draft that somebody fills, a blob that no record names yet."""
    with place.ops.store.draft(Kind.DISK, PAGES * PAGE) as draft, place.ops.store.referring():
        draft.spool.write_bytes(bytes(PAGE))
        (place.files.blobs / ".new-0123456789abcdef").write_bytes(b"frames")
        assert await place.check() == []
    assert len(await place.check()) == 1


async def test_what_a_registry_has_is_fetched_again(place: Place) -> None:
    """Damage of three kinds, none of which costs anything."""
    found = await place.snapshot("pulled", elsewhere=True, memory=True)
    damaged, lost = place.blob(found.disk_layer), place.blob(found.memory_layer)
    with open(damaged, "r+b") as file:
        file.seek(5 * PAGE)
        file.write(b"wrong")
    lost.unlink()
    short = await place.snapshot("short", elsewhere=True)
    os.truncate(place.blob(short.disk_layer), 100)
    before = everything(place.ops.state.root)
    problems = await place.check()
    for wanted in (
        f"layer {found.disk_layer}, chunk 0: blob {place.digest(found.disk_layer)} is damaged at",
        f"blob {place.digest(found.memory_layer)}, which can be fetched again, has no file for that",
        f"blob {place.digest(short.disk_layer)} has 100 bytes, and should have",
    ):
        assert any(wanted in each for each in problems), (wanted, problems)
    assert everything(place.ops.state.root) == before
    assert await place.check(repair=True) == []
    assert await place.check() == []
    assert everything(place.ops.state.root) == before | {str(lost.relative_to(place.ops.state.root))}
    for name in (found.disk_layer, found.memory_layer, short.disk_layer):
        record = remote.load(place.files, place.digest(name))
        assert record
        assert not record.whole
        blob.frames = blob.Frames()
        with pytest.raises(AbsentError), Chain.open(place.files, name) as chain:
            chain.read(0, chain.size)
    blob.frames = blob.Frames()
    with Chain.open(place.files, found.disk_layer) as chain:
        assert len(b"".join(chain.read(32 * PAGE, PAGE))) == PAGE  # what was right is still here


async def test_a_wrong_seek_table_is_fetched_again(place: Place) -> None:
    found = await place.snapshot("pulled", elsewhere=True)
    path = place.blob(found.disk_layer)
    with open(path, "r+b") as file:
        file.seek(-3, os.SEEK_END)
        file.write(b"abc")
    assert [f"blob {path.name}, of layer {found.disk_layer}, is damaged" in each for each in await place.check()] == [True]
    assert await place.check(repair=True) == []
    assert await place.check() == []
    blob.frames = blob.Frames()
    with Chain.open(place.files, found.disk_layer) as chain:
        chain.read(0, chain.size)
    assert path.read_bytes()[-3:] == bytes(3)


async def test_a_snapshot_whose_layers_are_gone_is_broken(place: Place) -> None:
    lost, devices, files = await place.snapshot("lost"), await place.snapshot("devices", memory=True), await place.snapshot("files")
    shutil.rmtree(place.files.layer(lost.disk_layer).root)
    place.ops.state.snapshot(devices.id).state.unlink()
    shutil.rmtree(place.ops.state.snapshot(files.id).root)
    problems = await place.check()
    for name, why in (("lost", f"layer {lost.disk_layer} is missing"), ("devices", "the state of its devices"), ("files", "its directory")):
        assert any(f"snapshot {name} cannot be used: " in each and why in each for each in problems), problems
    await place.check(repair=True)
    known = await place.ops.db.snapshots()
    assert {each.name: each.state for each in known} == dict.fromkeys(("lost", "devices", "files"), SnapshotState.BROKEN)
    assert all(each.reason for each in known)
    assert all(place.ops.snapshots[each.id] == each for each in known)
    assert place.files.layer(devices.memory_layer).root.exists()  # what there is of it stays
    assert [each for each in await place.check() if "cannot be used" in each] == []


def _damaged_layer(place: Place, found: Snapshot) -> None:
    path = place.blob(found.disk_layer)
    data = bytearray(path.read_bytes())
    data[5 * PAGE] ^= 1
    path.chmod(0o600)
    path.write_bytes(data)


def _damaged_index(place: Place, found: Snapshot) -> None:
    place.files.layer(found.disk_layer).index.write_bytes(b"RAMETIDX")


def _damaged_owners(place: Place, found: Snapshot) -> None:
    place.files.layer(found.disk_layer).owners.unlink()


def _damaged_record(place: Place, found: Snapshot) -> None:
    [entry] = place.ops.entries.values()
    [state] = disk.read(place.ops.state.machine(entry.record.id))
    place.files.layer(state.layer).record.write_bytes(b"{}")


def _damaged_remote(place: Place, found: Snapshot) -> None:
    place.files.remote(place.digest(found.disk_layer)).write_bytes(b"{}")


def _strange_snapshot(place: Place, found: Snapshot) -> None:
    place.ops.state.snapshot("stranger").root.mkdir()


def _strange_machine(place: Place, found: Snapshot) -> None:
    place.ops.state.machine("stranger").root.mkdir()


def _half_removed(place: Place, found: Snapshot) -> None:
    (place.ops.state.machines / ".deleting-old").mkdir()


def _no_overlay(place: Place, found: Snapshot) -> None:
    [entry] = place.ops.entries.values()
    place.ops.state.machine(entry.record.id).overlay(0).unlink()


def _no_machine(place: Place, found: Snapshot) -> None:
    [entry] = place.ops.entries.values()
    shutil.rmtree(place.ops.state.machine(entry.record.id).root)


def _no_disk_record(place: Place, found: Snapshot) -> None:
    [entry] = place.ops.entries.values()
    place.ops.state.machine(entry.record.id).disk.write_bytes(b"{")


def _short_image(place: Place, found: Snapshot) -> None:
    os.truncate(place.ops.state.image(IMAGE).disk, 5)


def _no_image(place: Place, found: Snapshot) -> None:
    place.ops.state.image(IMAGE).record.unlink()


@pytest.mark.parametrize(
    ("harm", "wanted"),
    [
        (_damaged_layer, "is damaged"),
        (_damaged_index, "the index of layer"),
        (_damaged_owners, "the table of owners of layer"),
        (_damaged_record, "the record of layer"),
        (_damaged_remote, "is to be had is not known"),
        (_strange_snapshot, "belongs to no snapshot of the database"),
        (_strange_machine, "belongs to no machine of the database"),
        (_half_removed, "a restart of the daemon removes it"),
        (_no_overlay, "machine web: its disk"),
        (_no_machine, "machine web: its directory"),
        (_no_disk_record, "which says what the machine's disks stand on, is damaged"),
        (_short_image, "image acme/one: "),
        (_no_image, "is not whole"),
    ],
    ids=lambda value: value.__name__.lstrip("_") if callable(value) else "",
)
async def test_what_cannot_be_made_again_is_named_and_left(place: Place, harm: Callable[[Place, Snapshot], None], wanted: str) -> None:
    """By a check and by a repair, which removes nothing."""
    found = await place.snapshot("pulled", elsewhere=harm is _damaged_remote)
    await place.machine("web", place.layer().id if harm is _damaged_record else found.disk_layer)
    _image(place)
    images.set_layer(place.ops.state, IMAGE, "")
    assert len(await place.check(repair=True)) == 0
    harm(place, found)
    before = everything(place.ops.state.root)
    problems = await place.check()
    assert any(wanted in each for each in problems), problems
    assert await place.check(repair=True) == problems
    assert everything(place.ops.state.root) == before


async def test_what_nothing_needs_is_named_and_removed(place: Place) -> None:
    found = await place.snapshot("mine")
    loose = place.layer()
    (place.files.blobs / f"sha256-{'a' * 64}").write_bytes(b"nobody's")
    place.files.draft(layer.new_id()).root.mkdir()
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(place.files.fetch))
    root = await place.machine("web", found.disk_layer)
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(root / "qmp.sock"))
    problems = await place.check()
    for wanted in (
        f"layer {loose.id} belongs",
        f"blob sha256:{'a' * 64} belongs",
        "1 layers were never finished",
        "fetch.sock is left",
        "qmp.sock is left",
    ):
        assert any(wanted in each for each in problems), (wanted, problems)
    assert await place.check(repair=True) == []
    assert await place.check() == []
    assert not place.files.layer(loose.id).root.exists()
    assert place.files.layer(found.disk_layer).root.exists()


async def test_a_damaged_database_is_named(tmp_path: Path) -> None:
    """One whose index does not match its table: it opens all the same."""
    state = StateDir(root=tmp_path / "state")
    state.create()
    async with Database.open(state.database) as database:
        await Place(Operations(state, database, Host(state))).snapshot("mine")
    with sqlite3.connect(state.database) as connection:
        connection.execute("PRAGMA writable_schema=ON")
        connection.execute("UPDATE sqlite_master SET sql = replace(sql, 'name != ''''', 'name = ''''') WHERE name = 'snapshots_name'")
    connection.close()
    async with Database.open(state.database) as database:
        problems = await database.problems()
    assert problems
    assert all(each.startswith("the database is damaged: ") for each in problems)


async def test_a_snapshot_that_was_never_whole_here_is_named_by_its_digest_only(place: Place) -> None:
    """Records stay as they are when nothing is wrong: a check writes nothing."""
    found = await place.snapshot("pulled", elsewhere=True)
    before = {path: path.stat().st_mtime_ns for path in place.files.root.rglob("*") if path.is_file()}
    assert await place.check() == []
    assert {path: path.stat().st_mtime_ns for path in place.files.root.rglob("*") if path.is_file()} == before
    assert place.ops.snapshots[found.id] == dataclasses.replace(found)
