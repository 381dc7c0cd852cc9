"""QEMU's command line, word for word. A change here changes what a memory snapshot fits: make it on purpose (RAMET_GOLDEN=write pytest …)."""

from __future__ import annotations

import dataclasses
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
    disk=argv.Disk(overlay=Path('/state/a "b"/disk-0.qcow2'), base=Path("/state/disk.raw")),
    network=network.USER,
)
CASES = {
    "tcg": FULL,
    "tcg-4-cpus": dataclasses.replace(FULL, cpus=4, memory=2 << 30),
    "kvm": dataclasses.replace(FULL, accelerator=Accelerator.KVM),
    "restored": dataclasses.replace(FULL, memory_file=Path("/state/store/mnt/0123456789abcdef")),
    "bare": dataclasses.replace(FULL, initrd=None, qmp_fd=None, agent_fd=None, disk=None, network=None),
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


def test_a_comma_in_a_path_is_not_qemu_s_to_read() -> None:
    """`-blockdev` takes JSON, so that a path may hold what separates QEMU's options."""
    words = argv.build(dataclasses.replace(FULL, disk=argv.Disk(overlay=Path("/state/a,b=c/o"), base=Path("/state/d,e/b"), number=7)))
    for path in ("/state/a,b=c/o", "/state/d,e/b"):
        assert any(f'"filename": "{path}"' in word for word in words)


def test_the_devices_are_the_same_before_and_after_a_save() -> None:
    """Else the saved state of the devices would not fit."""
    saved, restored = (argv.build(CASES[name]) for name in ("tcg", "restored"))
    devices = [[words[at + 1] for at, word in enumerate(words) if word == "-device"] for words in (saved, restored)]
    assert devices[0] == devices[1]
    assert "-kernel" not in restored
    assert argv.machine_type(CASES["tcg"]) == argv.machine_type(CASES["restored"])
