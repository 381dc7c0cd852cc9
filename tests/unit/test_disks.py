"""A machine's disks: what is written down of them, and that a save which was cut off is put right, for each of them by itself."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import subprocess
from pathlib import Path

import pytest

from ramet import blank, disks
from ramet.errors import HostError, LayerError
from ramet.model import Drive, Spec
from ramet.paths import MachineDir, StateDir
from ramet.store.chain import Chain
from ramet.store.store import Store
from ramet.vm import argv, disk
from ramet.vm.disk import DiskState

MIB = 1 << 20
IMAGE = f"sha256:{'0' * 64}"
DRIVES = (Drive(name="data", size=64 * MIB, mount="/data"), Drive(name="data-1", size=80 * MIB))
SPEC = Spec(name="web", disk=96 * MIB, drives=DRIVES)


@pytest.fixture
def state(tmp_path: Path) -> StateDir:
    made = StateDir(root=tmp_path)
    made.create()
    made.image(IMAGE).root.mkdir()
    made.image(IMAGE).disk.write_bytes(bytes(MIB))
    return made


@pytest.fixture
def files(state: StateDir) -> MachineDir:
    """Of a machine that was just made."""
    found = state.machine("0123456789ab")
    asyncio.run(disks.make(state, found, SPEC))
    return found


def settle(state: StateDir, files: MachineDir, active: dict[int, int]) -> disk.Disks:
    return asyncio.run(disks.settle(state, Store(state.store), files, IMAGE, active))


def overlays(files: MachineDir) -> set[str]:
    return {path.name for path in files.root.glob("disk-*.qcow2")}


def written(path: Path, pattern: int) -> None:
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", f"write -P {pattern} 1M 64k", path], check=True, capture_output=True)


def content(state: StateDir, layer: str) -> bytes:
    with Chain.open(state.store, layer) as chain:
        return b"".join(chain.read(MIB, 4096))


def test_a_machine_from_before_there_were_drives(state: StateDir) -> None:
    files = state.machine("abcdef012345")
    files.root.mkdir()
    files.disk.write_text('{"number": 3, "layer": "5f0c2a9be1d47763", "size": 1048576}')
    assert disk.read(files) == (DiskState(number=3, layer="5f0c2a9be1d47763", size=MIB),)
    assert disks.layers_of(files) == {"5f0c2a9be1d47763"}
    assert disk.read(state.machine("none")) == ()


def test_the_root_disk_is_written_down_as_ever(files: MachineDir) -> None:
    value = json.loads(files.disk.read_text())
    assert (value["number"], value["layer"], value["size"]) == (0, "", SPEC.disk)
    assert [each["name"] for each in value["drives"]] == ["data", "data-1"]
    found = disk.read(files)
    disk.write(files, found)
    assert disk.read(files) == found


def test_what_a_new_machine_s_disks_stand_on(state: StateDir, files: MachineDir) -> None:
    found = disk.read(files)
    told = disks.arguments(state, files, found, IMAGE, argv.PLAIN)
    assert [each.base for each in told] == [state.image(IMAGE).disk, state.blank("data", 64 * MIB), None]
    assert {each.overlay.name for each in told} == overlays(files) == {"disk-0.qcow2", "disk-data-0.qcow2", "disk-data-1-0.qcow2"}
    # One drive's name is how another's file begins.
    assert [disk.others(files, each) for each in found] == [[], [], []]
    assert disk.allocated(files) == sum(each.overlay.stat().st_blocks * 512 for each in told)


HAPPENED = ("nothing", "made", "used")


@pytest.mark.parametrize("alive", [True, False])
@pytest.mark.parametrize("happened", list(itertools.product(HAPPENED, repeat=3)), ids="-".join)
def test_each_disk_is_put_right_by_itself(state: StateDir, files: MachineDir, happened: tuple[str, ...], alive: bool) -> None:
    """happened: to the overlay that was to follow: not made yet, made, or written to already."""
    before = disk.read(files)
    following = asyncio.run(disks.add(files, before))
    for each, what in zip(following, happened, strict=True):
        if what == "nothing":
            each.overlay.unlink()
    active = {at: int(what == "used") for at, what in enumerate(happened)} if alive else {}
    after = settle(state, files, active)
    moved = [what == "used" or (what == "made" and not alive) for what in happened]
    assert [each.number for each in after] == [int(each) for each in moved]
    assert [bool(each.layer) for each in after] == moved
    assert [(each.name, each.size) for each in after] == [(each.name, each.size) for each in before]
    assert disk.read(files) == after
    assert overlays(files) == {files.overlay(each.number, each.name).name for each in after}
    assert settle(state, files, active and {at: each.number for at, each in enumerate(after)}) == after
    assert {each.id for each in Store(state.store).layers()} == disks.layers_of(files)


def test_what_was_written_is_in_the_layers(state: StateDir, files: MachineDir) -> None:
    for at, each in enumerate(disk.read(files)):
        written(files.overlay(0, each.name), at + 1)
    layers = asyncio.run(disks.freeze(state, Store(state.store), files, IMAGE, {1, 2}))
    assert [layer.size for layer in layers] == [64 * MIB, 80 * MIB]
    assert [layer.base for layer in layers] == [f"blanks/data-{64 * MIB}.raw", ""]
    assert [content(state, layer.id) for layer in layers] == [bytes([2]) * 4096, bytes([3]) * 4096]
    after = disk.read(files)
    assert [(each.number, each.layer) for each in after] == [(0, ""), (1, layers[0].id), (1, layers[1].id)]
    with Chain.open(state.store, layers[0].id) as chain:
        magic = b"".join(chain.read(0, 4096))[1024 + 56 : 1024 + 58]
    assert magic == b"\x53\xef"  # of ext4, from the file below


def test_disks_change_at_once_or_not_at_all(state: StateDir, files: MachineDir, monkeypatch: pytest.MonkeyPatch) -> None:
    before = disk.read(files)
    asyncio.run(disks.add(files, before))

    def full(*_: object) -> None:
        raise HostError("no")

    with monkeypatch.context() as patch:
        patch.setattr(disk, "write", full)
        with pytest.raises(HostError):
            settle(state, files, {0: 1, 1: 1, 2: 1})
    assert disk.read(files) == before
    assert len(overlays(files)) == 6
    assert [each.number for each in settle(state, files, {0: 1, 1: 1, 2: 1})] == [1, 1, 1]


def test_a_running_machine_whose_disk_is_another_is_not_guessed_at(state: StateDir, files: MachineDir) -> None:
    with pytest.raises(LayerError, match="disk 1 of the running machine is in overlay 7"):
        settle(state, files, {0: 0, 1: 7, 2: 0})


def test_disks_of_a_snapshot_take_the_place_of_the_machine_s(state: StateDir, files: MachineDir) -> None:
    asyncio.run(disks.add(files, disk.read(files)))  # a save was cut off
    layers = [layer.id for layer in asyncio.run(disks.freeze(state, Store(state.store), files, IMAGE))]
    again = asyncio.run(disks.make(state, files, SPEC, layers))
    assert [each.layer for each in again] == layers
    assert [each.number for each in again] == [2, 2, 2]
    assert len(overlays(files)) == 3


# --- what a drive with a mount begins with ---


def test_a_blank_is_an_empty_ext4(state: StateDir) -> None:
    path = asyncio.run(blank.ensure(state, DRIVES[0]))
    assert path.stat().st_size == DRIVES[0].size
    assert path.stat().st_blocks * 512 < MIB
    assert path.stat().st_mode & 0o777 == 0o400
    subprocess.run(["e2fsck", "-fn", path], check=True, capture_output=True)
    listing = subprocess.run(["debugfs", "-R", "ls -p /", path], check=True, capture_output=True, text=True).stdout
    assert [line.split("/")[5] for line in listing.split()] == [".", ".."]


def uuid(path: Path) -> str:
    return subprocess.run(["blkid", "-p", "-o", "value", "-s", "UUID", path], check=True, capture_output=True, text=True).stdout


def test_a_blank_is_made_once_for_each_name_and_size(state: StateDir) -> None:
    async def several() -> list[Path]:
        other, larger = Drive(name="other", size=64 * MIB, mount="/x"), Drive(name="data", size=65 * MIB, mount="/x")
        return await asyncio.gather(*(blank.ensure(state, each) for each in (DRIVES[0], DRIVES[0], other, larger)))

    first, second, *others = asyncio.run(several())
    assert first == second
    made = first.stat().st_ino
    assert asyncio.run(blank.ensure(state, DRIVES[0])).stat().st_ino == made
    assert len({uuid(each) for each in (first, *others)}) == 3  # those of one machine must differ
    assert {path.name for path in state.blanks.iterdir()} == {each.name for each in (first, *others)}


def test_what_one_that_was_killed_has_left_of_a_blank(state: StateDir) -> None:
    path = state.blank("data", 64 * MIB)
    path.with_name(f".new-{path.name}").write_bytes(os.urandom(5000))
    asyncio.run(blank.ensure(state, DRIVES[0]))
    assert [each.name for each in state.blanks.iterdir()] == [path.name]
    subprocess.run(["e2fsck", "-fn", path], check=True, capture_output=True)


def test_a_blank_that_cannot_be_made_leaves_nothing(state: StateDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blank.tree, "mke2fs", lambda *args, **options: ["false"])
    with pytest.raises(HostError, match="making drive data"):
        asyncio.run(blank.ensure(state, DRIVES[0]))
    assert list(state.blanks.iterdir()) == []
