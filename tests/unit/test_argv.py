"""QEMU's command line, word for word. A change here changes what a memory snapshot fits: make it on purpose (RAMET_GOLDEN=write pytest …)."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest

from ramet import network
from ramet.model import Accelerator
from ramet.vm import argv

GOLDEN = Path(__file__).parent / "golden"
FULL = argv.Config(
    name="web",
    accelerator=Accelerator.TCG,
    cpus=1,
    memory=512 << 20,
    kernel=Path("/cache/vmlinux"),
    initrd=Path("/cache/initramfs"),
    cmdline="console=ttyS0 ramet.root=/dev/vda",
    qmp_fd=5,
    agent_fd=6,
    disks=(argv.Disk(overlay=Path('/state/a "b"/disk-0.qcow2'), base=Path("/state/disk.raw")),),
    network=network.USER,
)
CASES = {
    "tcg": FULL,
    "tcg-4-cpus": dataclasses.replace(FULL, cpus=4, memory=2 << 30),
    "kvm": dataclasses.replace(FULL, accelerator=Accelerator.KVM),
    "restored": dataclasses.replace(FULL, memory_file=Path("/state/store/mnt/0123456789abcdef")),
    "bare": dataclasses.replace(FULL, initrd=None, qmp_fd=None, agent_fd=None, disks=(), network=None),
    "drives": dataclasses.replace(
        FULL,
        disks=(
            *FULL.disks,
            argv.Disk(
                name="data",
                overlay=Path("/state/disk-data-3.qcow2"),
                base=Path("/state/data.raw"),
                number=3,
                io=argv.DiskIo(aio=argv.Aio.URING),
            ),
            argv.Disk(name="log-2", overlay=Path("/state/disk-log-2-0.qcow2")),
        ),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_golden(name: str) -> None:
    made = "\n".join(argv.build(CASES[name])) + "\n"
    path = GOLDEN / f"qemu-{name}.txt"
    if os.environ.get("RAMET_GOLDEN") == "write":
        path.write_text(made)
    assert made == path.read_text()


def test_what_every_command_line_has() -> None:
    for config in CASES.values():
        words = argv.build(config)
        assert words[0] == argv.QEMU
        assert "-nodefaults" in words
        assert words[words.index("-sandbox") + 1].startswith("on,")
        assert not any("/dev/kvm" in word for word in words)
    assert argv.build(FULL) == argv.build(FULL)
    assert argv.build(CASES["kvm"])[argv.build(CASES["kvm"]).index("-accel") + 1] == "kvm"


def test_an_overlay_s_node_tells_its_number() -> None:
    for place, number in ((0, 0), (0, 12), (1, 0), (8, 99_999_999)):
        assert argv.overlay_number(argv.overlay_name(place, number)) == (place, number)
        assert argv.overlay_number(argv.base_name(place, number)) is None
    strange = ("", "disk", "disk3-file", "base3", "disk-3", "disk\u0663", "drive0-1", "drive1-2-file", "drive1-base2", "drive-1", "drive1")
    assert not any(map(argv.overlay_number, strange))


def test_a_node_s_name_fits_into_what_qemu_has_for_it() -> None:
    disks = (*FULL.disks, *(argv.Disk(name="a" * 20, number=99_999_999) for _ in range(8)))
    words = argv.build(dataclasses.replace(FULL, disks=disks))
    nodes = [json.loads(words[at + 1]) for at, word in enumerate(words) if word == "-blockdev"]
    names = [name for node in nodes for name in (node["node-name"], node["file"].get("node-name", ""))]
    assert max(map(len, names)) <= 31  # of BlockDriverState.node_name
    assert len(nodes) == 2 + 8


def test_a_comma_in_a_path_is_not_qemu_s_to_read() -> None:
    """`-blockdev` takes JSON, so that a path may hold what separates QEMU's options."""
    words = argv.build(dataclasses.replace(FULL, disks=(argv.Disk(overlay=Path("/state/a,b=c/o"), base=Path("/state/d,e/b"), number=7),)))
    for path in ("/state/a,b=c/o", "/state/d,e/b"):
        assert any(f'"filename": "{path}"' in word for word in words)


def test_the_devices_are_the_same_before_and_after_a_save() -> None:
    """Else the saved state of the devices would not fit."""
    saved, restored = (argv.build(CASES[name]) for name in ("tcg", "restored"))
    devices = [[words[at + 1] for at, word in enumerate(words) if word == "-device"] for words in (saved, restored)]
    assert devices[0] == devices[1]
    assert "-kernel" not in restored
    assert argv.machine_type(CASES["tcg"]) == argv.machine_type(CASES["restored"])


def test_drives_are_devices_that_a_save_has_to_fit() -> None:
    with_drives = CASES["drives"]
    later = dataclasses.replace(with_drives, disks=tuple(dataclasses.replace(each, number=each.number + 1) for each in with_drives.disks))
    fewer = dataclasses.replace(with_drives, disks=with_drives.disks[:2])
    renamed = dataclasses.replace(with_drives, disks=(*with_drives.disks[:2], argv.Disk(name="other")))
    assert argv.machine_type(later) == argv.machine_type(with_drives)
    assert len({argv.machine_type(each) for each in (FULL, with_drives, fewer, renamed)}) == 4


def test_each_disk_has_a_thread_of_its_own() -> None:
    words = argv.build(CASES["drives"])
    threads = [word.removeprefix("iothread,id=") for word in words if word.startswith("iothread,id=")]
    used = [word.partition("iothread=")[2].partition(",")[0] for word in words if word.startswith("virtio-blk-pci")]
    assert threads == used == ["io", "io-data", "io-log-2"]


@pytest.mark.parametrize("text", ["threads", "io_uring", "threads,direct", "io_uring,direct", "native,direct"])
def test_a_way_of_reading_and_writing_is_said_as_it_is_read(text: str) -> None:
    assert str(argv.DiskIo.parse(text)) == text


@pytest.mark.parametrize("text", ["", "uring", "threads,", "threads,fast", "direct", ",direct"])
def test_other_words_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r".*"):
        argv.DiskIo.parse(text)


def test_native_is_direct() -> None:
    assert argv.DiskIo.parse("native") == argv.DiskIo(aio=argv.Aio.NATIVE, direct=True)


@pytest.mark.parametrize("io", [argv.DiskIo(aio=aio, direct=direct) for aio in argv.Aio for direct in (False, True)])
def test_a_disk_s_options(io: argv.DiskIo) -> None:
    """Flushes are always passed on, and the base, which others read too, is read through the page cache."""
    disk = argv.Disk(overlay=Path("/o"), base=Path("/b"), io=io)
    overlay, base = argv.overlay_node(0, disk, "below"), argv.base_node(0, disk, Path("/b"))
    own, shared = overlay["file"], base["file"]
    assert isinstance(own, dict)
    assert isinstance(shared, dict)
    assert own.get("aio", "threads") == io.aio
    assert own.get("cache", {}) == ({"direct": True} if io.direct else {})
    assert "cache" not in shared
    assert shared.get("aio", "threads") != "native"
    assert "no-flush" not in json.dumps([overlay, base])


def test_merging_memory_changes_nothing_that_a_snapshot_must_fit() -> None:
    merged = dataclasses.replace(FULL, mergeable=True)
    assert [a for a, b in zip(argv.build(FULL), argv.build(merged), strict=True) if a != b] == [f"{argv._CHIPSET},mem-merge=off"]
    assert argv.machine_type(merged) == argv.machine_type(FULL)
