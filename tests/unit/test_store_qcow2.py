"""Overlays: where QEMU's own tools put clusters, and files that lie."""

from __future__ import annotations

import os
import random
import struct
import subprocess
from pathlib import Path

import pytest

from ramet.errors import HostError, LayerError
from ramet.store import qcow2
from ramet.store.layer import PAGE
from ramet.store.runs import ZERO, Runs

SIZE = 600 << 20  # two tables
MiB = 1 << 20


def created(path: Path, *options: str, size: int = SIZE) -> Path:
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-o", ",".join([qcow2.OPTIONS, *options]), path, str(size)], check=True)
    return path


def written(path: Path, *commands: str) -> None:
    subprocess.run(["qemu-io", "-f", "qcow2", *[word for each in commands for word in ("-c", each)], path], check=True, capture_output=True)


def checked(path: Path) -> str:
    return subprocess.run(["qemu-img", "check", path], capture_output=True, check=True, text=True).stdout


def content(path: Path, size: int, runs: Runs) -> bytes:
    """The overlay's content, put together from its file."""
    data = bytearray(-(-size // PAGE) * PAGE)
    with open(path, "rb") as file:
        for first, count, where in runs:
            if where != ZERO:
                part = os.pread(file.fileno(), count * PAGE, where * PAGE)
                data[first * PAGE : first * PAGE + len(part)] = part
    return bytes(data[:size])


def test_random_writes_read_back(tmp_path: Path) -> None:
    rng = random.Random(7)
    size = (40 << 20) + 512
    disk = created(tmp_path / "disk", size=size)
    commands = []
    for number in range(120):
        offset, length = rng.randrange(0, size - (200 << 10), 512), rng.randrange(512, 150 << 10, 512)
        what = rng.choice([f"write -P {number % 255 + 1}", "write -z", "write -z -u", "discard"])
        commands.append(f"{what} {offset} {length}")
    written(disk, *commands, f"write -P 77 {size - 512} 512")
    subprocess.run(["qemu-img", "convert", "-O", "raw", disk, tmp_path / "raw"], check=True)
    runs = qcow2.runs(disk, size)
    assert content(disk, size, runs) == (tmp_path / "raw").read_bytes()
    assert any(where == ZERO for _, _, where in runs)
    assert runs.end == size // PAGE + 1


def test_what_is_not_there_is_told_from_zeros(tmp_path: Path) -> None:
    disk = created(tmp_path / "disk")
    assert len(qcow2.runs(disk, SIZE)) == 0
    written(disk, "write -P 1 0 64k", "write -z 64k 64k", "write -P 1 520M 64k", "write -P 1 128k 64k", "write -z -u 128k 64k")
    found = {first * PAGE: (count * PAGE, where == ZERO) for first, count, where in qcow2.runs(disk, SIZE)}
    assert found == {0: (64 << 10, False), 64 << 10: (128 << 10, True), 520 * MiB: (64 << 10, False)}


async def test_overlays_are_copies_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    await qcow2.create(tmp_path / "one", SIZE)
    monkeypatch.setenv("PATH", str(tmp_path))  # nothing is run any more
    await qcow2.create(tmp_path / "two", SIZE)
    monkeypatch.undo()
    assert (tmp_path / "two").read_bytes() == (tmp_path / "one").read_bytes() == created(tmp_path / "three").read_bytes()
    assert (tmp_path / "two").stat().st_blocks * 512 >= (tmp_path / "two").stat().st_size // 4096 * 4096, (
        "its space is its own from the begin on"
    )
    written(tmp_path / "two", "write -P 9 300M 1M")
    assert "No errors" in checked(tmp_path / "two")
    with pytest.raises(HostError):
        await qcow2.create(tmp_path / "two", SIZE)
    assert len(qcow2.runs(tmp_path / "two", SIZE)) == 1


def test_other_kinds_are_refused(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_bytes(random.Random(1).randbytes(1 << 20) + b"a" * (1 << 20))
    compressed = tmp_path / "compressed"
    subprocess.run(["qemu-img", "convert", "-c", "-O", "qcow2", plain, compressed], check=True)
    with pytest.raises(LayerError, match="compressed"):
        qcow2.runs(compressed, 2 << 20)
    with pytest.raises(LayerError, match="features"):
        qcow2.runs(created(tmp_path / "extended", "extended_l2=on,cluster_size=64k"), SIZE)
    with pytest.raises(LayerError, match="features"):
        qcow2.runs(created(tmp_path / "outside", f"data_file={tmp_path / 'data'}"), SIZE)
    with pytest.raises(LayerError, match="clusters of 64 KiB"):
        qcow2.runs(created(tmp_path / "small", "cluster_size=4k"), SIZE)
    with pytest.raises(LayerError, match="no qcow2"):
        qcow2.runs(plain, 2 << 20)
    with pytest.raises(LayerError, match="not of"):
        qcow2.runs(created(tmp_path / "size"), SIZE + PAGE)


def test_hostile_numbers(tmp_path: Path) -> None:
    disk = created(tmp_path / "disk")
    written(disk, "write -P 1 0 64k")
    good = disk.read_bytes()
    [l1] = struct.unpack_from(">Q", good, 40)
    l2 = struct.unpack_from(">Q", good, l1)[0] & 0x00FFFFFFFFFFFE00

    def changed(offset: int, value: bytes) -> None:
        disk.write_bytes(good[:offset] + value + good[offset + len(value) :])
        with pytest.raises(LayerError):
            qcow2.runs(disk, SIZE)

    changed(40, struct.pack(">Q", 1 << 60))  # the first table
    changed(36, struct.pack(">I", 0xFFFFFFFF))  # its length
    changed(36, struct.pack(">I", 0))
    changed(24, struct.pack(">Q", 1 << 62))  # the disk's size
    changed(l1, struct.pack(">Q", 1 << 50))
    changed(l1, struct.pack(">Q", 512))
    changed(l2, struct.pack(">Q", 1 << 50))
    changed(l2, struct.pack(">Q", 1 << 62))
    changed(20, struct.pack(">I", 9))  # cluster bits
    disk.write_bytes(good[:50])
    with pytest.raises(LayerError):
        qcow2.runs(disk, SIZE)
    rng = random.Random(3)
    for _ in range(300):  # whatever is in it: an answer, or a LayerError
        data = bytearray(good)
        for _ in range(4):
            data[rng.choice([rng.randrange(104), l1 + rng.randrange(16), l2 + rng.randrange(64)])] = rng.randrange(256)
        disk.write_bytes(data)
        try:
            runs = qcow2.runs(disk, SIZE)
        except LayerError:
            continue
        assert runs.end * PAGE <= SIZE
