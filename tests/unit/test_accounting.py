"""Who pays for which file: each once, divided by those who stand on it, so that the sum is what the disk has. A process's memory, by what it is for."""

from __future__ import annotations

import dataclasses
import json
import mmap
import os
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ramet.accounting import Disk, Member, Share, measure, members, reclaimable
from ramet.db import Record
from ramet.model import Drive, Snapshot, SnapshotState, Spec, State
from ramet.paths import StateDir
from ramet.store import layer
from ramet.store.layer import Kind, Layer
from ramet.vm import disk, memory
from ramet.vm.disk import DiskState

SIZE = 1 << 20
IMAGE = "sha256:" + "1" * 64
NAMES = [f"{number:016x}" for number in range(16, 24)]


@pytest.fixture
def state(tmp_path: Path) -> StateDir:
    made = StateDir(root=tmp_path)
    made.create()
    made.image(IMAGE).root.mkdir()
    made.image(IMAGE).disk.write_bytes(os.urandom(300_000))
    return made


def put(state: StateDir, name: str, *, chain: tuple[str, ...] = (), blobs: tuple[str, ...] = (), size: int = 50_000) -> None:
    """A sealed layer, whose record need not be true to its files: only they are counted."""
    files = state.store.layer(name)
    files.root.mkdir(exist_ok=True)
    files.index.write_bytes(os.urandom(size))
    record = Layer(id=name, kind=Kind.DISK, size=SIZE, created_at=1.0, chain=(*chain, name), sealed=True, blobs=blobs)
    layer.save(files, record, durable=False)


def blob(state: StateDir, number: int, size: int = 100_000) -> str:
    digest = f"sha256:{number:064x}"
    state.store.blob(digest).write_bytes(os.urandom(size))
    return digest


def taken(*places: Path) -> int:
    """As `du` counts."""
    found = {}
    for place in places:
        for path in [place, *place.rglob("*")]:
            stat = path.lstat()
            found[stat.st_ino] = stat.st_blocks * 512
    return sum(found.values())


def member(*layers: str, places: tuple[Path, ...] = ()) -> Member:
    return Member(layers=frozenset(layers), places=frozenset(places))


def total(shares: Mapping[str, Share]) -> int:
    return sum(each.unique + each.shared for each in shares.values())


def test_a_file_is_divided_by_those_who_stand_on_it(state: StateDir) -> None:
    common, own = blob(state, 1), blob(state, 2)
    put(state, NAMES[0], blobs=(common,))
    put(state, NAMES[1], chain=(NAMES[0],), blobs=(common, own))
    below, above = (taken(state.store.layer(name).root) for name in NAMES[:2])
    shares = Disk(state.store).shares({"a": member(NAMES[0]), "b": member(NAMES[1]), "c": member(NAMES[1])})
    shared = (below + taken(state.store.blob(common))) // 3
    assert (shares["a"].unique, shares["a"].shared) == (0, pytest.approx(shared, abs=1))
    assert shares["b"] == shares["c"]
    assert shares["b"].shared == pytest.approx(shared + (above + taken(state.store.blob(own))) // 2, abs=1)
    alone = Disk(state.store).shares({"b": member(NAMES[1])})["b"]
    assert (alone.unique, alone.shared) == (below + above + taken(state.store.blob(common)) + taken(state.store.blob(own)), 0)


def test_a_file_with_two_names_is_one(state: StateDir) -> None:
    """While a machine is saved, its overlay is a layer's spool too."""
    put(state, NAMES[0])
    (state.machines / "m").mkdir()
    overlay = state.machines / "m" / "disk-0.qcow2"
    overlay.write_bytes(os.urandom(200_000))
    os.link(overlay, state.store.layer(NAMES[0]).spool)
    shares = Disk(state.store).shares({"m": member(places=(overlay.parent,)), "s": member(NAMES[0])})
    assert total(shares) == pytest.approx(taken(overlay.parent, state.store.layer(NAMES[0]).root), abs=2)
    assert shares["m"].shared == shares["s"].shared == taken(overlay) // 2


def test_a_layer_that_was_sealed_anew_is_read_again(state: StateDir) -> None:
    put(state, NAMES[0])
    put(state, NAMES[1], chain=(NAMES[0],))
    disk = Disk(state.store)
    both = disk.shares({"m": member(NAMES[1])})["m"].unique
    put(state, NAMES[1], size=60_000)  # it does without the other now
    assert disk.shares({"m": member(NAMES[1])})["m"].unique == taken(state.store.layer(NAMES[1]).root) < both


def test_what_is_missing_or_damaged_costs_what_is_there(state: StateDir) -> None:
    put(state, NAMES[0])
    record = json.loads(state.store.layer(NAMES[0]).record.read_text())
    state.store.layer(NAMES[0]).record.write_text(json.dumps(record | {"size": 1}))
    shares = Disk(state.store).shares({"m": member(NAMES[0], NAMES[1], places=(state.machines / "gone",))})
    assert shares == {"m": Share(unique=taken(state.store.layer(NAMES[0]).root))}


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    chains=st.lists(st.sets(st.integers(0, 6)), min_size=1, max_size=8),
    refers=st.lists(st.sets(st.integers(1, 4)), min_size=8, max_size=8),
    owned=st.dictionaries(st.sampled_from("abcde"), st.sets(st.integers(0, 7), min_size=1), min_size=1),
)
def test_the_sum_is_what_is_there(
    tmp_path_factory: pytest.TempPathFactory, chains: list[set[int]], refers: list[set[int]], owned: dict[str, set[int]]
) -> None:
    state = StateDir(root=tmp_path_factory.mktemp("sum"))
    state.create()
    blobs = {number: blob(state, number, size=1000 * number) for number in range(1, 5)}
    for number, below in enumerate(chains):
        chain = tuple(NAMES[each] for each in sorted(below) if each < number)
        put(state, NAMES[number], chain=chain, blobs=tuple(blobs[each] for each in refers[number]), size=1 + 9000 * number)
    them = {name: member(*(NAMES[each] for each in wanted if each < len(chains)), places=(state.images,)) for name, wanted in owned.items()}
    needed = {each for wanted in owned.values() for each in wanted if each < len(chains)}
    needed |= {each for top in needed for each in chains[top] if each < top}
    places = [state.store.layer(NAMES[each]).root for each in needed]
    places += [state.store.blob(blobs[each]) for top in needed for each in refers[top]]
    assert total(Disk(state.store).shares(them)) == pytest.approx(taken(state.images, *places), abs=len(them))


# who stands on what


def machine(number: int, **changes: object) -> Record:
    record = Record(
        id=f"m{number}", name=f"n{number}", state=State.RUNNING, spec=Spec(name=f"n{number}"), created_at=1.0, image_digest=IMAGE
    )
    return dataclasses.replace(record, **changes)  # type: ignore[arg-type]


def point(number: int, name: str = "") -> Snapshot:
    return Snapshot(
        id=f"s{number}", name=name, machine="n1", state=SnapshotState.READY, created_at=1.0, memory=True, spec=Spec(name="n1"),
        image_digest=IMAGE, disk_layer=NAMES[0], memory_layer=NAMES[1],
    )  # fmt: skip


def test_an_automatic_snapshot_is_its_machines_own(state: StateDir) -> None:
    parent, child = machine(1, snapshot_id="s1"), machine(2, source_id="s1", snapshot_id="s1", memory_layer=NAMES[1])
    found = members(state, [parent, child, machine(3)], [point(1), point(2, "n1@kept")])
    assert found.keys() == {"m1", "m2", "m3", "s2"}
    image, directory = state.image(IMAGE).root, state.snapshot("s1").root
    assert found["m1"] == member(*NAMES[:2], places=(state.machine("m1").root, image, directory))
    assert found["m2"].layers == {*NAMES[:2]}
    assert found["m3"] == member(places=(state.machine("m3").root, image))
    assert found["s2"].places == {state.snapshot("s2").root, image}
    assert members(state, [], [point(1)]).keys() == {"s1"}  # nobody's, until it is swept


def test_drives_have_layers_and_begin_with_what_others_begin_with_too(state: StateDir) -> None:
    drives = (Drive(name="data", size=1 << 30, mount="/data"), Drive(name="raw", size=1 << 30))
    with_drives = Spec(name="n1", drives=drives)
    kept = dataclasses.replace(point(1, "n1@kept"), spec=with_drives, drive_layers=(NAMES[2], NAMES[3]))
    own = dataclasses.replace(machine(1), spec=with_drives)
    files = state.machine(own.id)
    files.root.mkdir()
    disk.write(
        files, tuple(DiskState(number=1, layer=NAMES[at], size=1 << 30, name=name) for at, name in ((0, ""), (2, "data"), (3, "raw")))
    )
    found = members(state, [own], [kept])
    assert found["m1"].layers == {NAMES[0], NAMES[2], NAMES[3]}
    assert found["s1"].layers == {*NAMES[:4]}
    assert all(state.blank("data", 1 << 30) in each.places for each in found.values())
    assert not any(state.blank("raw", 1 << 30) in each.places for each in found.values())


def test_what_waits_in_a_pool_is_the_template_s(state: StateDir) -> None:
    found = members(state, [machine(1, pool="s1", source_id="s1")], [point(1, "tpl:latest")])
    assert found.keys() == {"s1"}
    assert state.machine("m1").root in found["s1"].places


# memory


def test_memory_of_this_process_and_of_none(tmp_path: Path) -> None:
    here = measure(os.getpid(), 1 << 40, tmp_path)
    assert here.memory == here.private + here.shared > 1 << 20
    assert here.overhead == here.memory
    assert here.returned == 1 << 40
    assert here.cpu > 0
    assert measure(4_000_000, 1 << 20, tmp_path).memory == 0


def test_memory_of_a_guest_is_the_mapping_of_a_layer_or_of_its_size(tmp_path: Path) -> None:
    size = 256 << 20  # more than any other mapping of this process
    pages = size // mmap.PAGESIZE
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as guest:
        for page in range(0, pages, pages // 64):
            guest[page * mmap.PAGESIZE] = 1
        found = memory.held(os.getpid(), size, tmp_path)
        assert found.own >= 64 * mmap.PAGESIZE
        assert found.own == found.guest  # huge pages where the host has them on
        assert measure(os.getpid(), size, tmp_path).returned == size - found.guest
    (tmp_path / "layer").write_bytes(bytes(range(256)) * 16 * 64)
    with open(tmp_path / "layer", "r+b") as file, mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE) as guest:
        for page in range(40):
            guest[page * mmap.PAGESIZE]
        for page in range(8):
            guest[page * mmap.PAGESIZE] = 1
        found = memory.held(os.getpid(), size, tmp_path)
    assert found.own == 8 * mmap.PAGESIZE
    assert 32 * mmap.PAGESIZE <= found.common <= 56 * mmap.PAGESIZE  # the kernel maps pages around those that were asked for
    assert found.guest == found.own + found.common
    assert min(found.heap, found.program) > 0
    assert found.total == found.own + found.common + found.cache + found.heap + found.program >= found.private


def test_an_older_agent_does_not_tell_what_is_reclaimable() -> None:
    assert reclaimable({"mem_free": 1.0}) is None
    assert reclaimable({"mem_reclaimable": 4096.0}) == 4096
