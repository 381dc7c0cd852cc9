"""The benches run and say what they should. That their goals hold is theirs to tell, on an idle host: `ramet bench`."""

from __future__ import annotations

import json
import mmap
import os
import tempfile
from pathlib import Path

import pytest

from ramet import bench
from ramet.bench import giveback, members, picture, plot
from tests.fixtures import Artifacts

KEYS = {"figure", "value", "unit", "goal", "holds"}
FEW = {
    "boot": ["--pairs", "1"],
    "exec": ["--count", "5", "--row", "20", "--mebibytes", "1"],
    "fork": ["--count", "2", "--cold", "1", "--pauses", "1", "--large", "0", "--depth", "2", "--generations", "2"],
    "hibernate": ["--memory", "256", "--mebibytes", "16", "--rounds", "2"],
    "density": ["--forks", "2", "--cold", "1", "--mebibytes", "8"],
    "giveback": ["--quick", "--memory", "256", *(word for part in giveback.PARTS if part != "picture" for word in ("--only", part))],
    "idle": ["--seconds", "2", "--settle", "0"],
}
WORDS = {  # of figures that must be there
    "fork": (
        "child's agent answered",
        "first command (a new process)",
        "warm pool",
        "pause of a restored",
        "pause of a cold-booted",
        "depth 2",
        "more layers",
    ),
    "hibernate": ("as a multiple of a fork's", "stored for the memory", "stored for the disk", "gave back"),
    "giveback": (
        "MiB freed, fork of a fork",
        "reclaim eager",
        "work beside cold page cache",
        "deleted in the fork",
        "hibernated",
        "idle, a fork",
    ),
    "density": ("shares with nobody", "as a share of", "a fork: translation cache", "a cold boot: translation cache"),
}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", FEW)
def test_a_bench_prints_its_figures(
    artifacts: Artifacts, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("RAMET_HOME", str(artifacts.store.root))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    status = bench.main([name, "--json", "--image", artifacts.tiny, *FEW[name]])
    said = capsys.readouterr()
    assert status != bench.COULD_NOT_RUN, said.err
    found = json.loads(said.out)
    assert status == (1 if any(each["holds"] is False for each in found) else 0), said.err
    for each in found:
        assert set(each) in (KEYS, KEYS | {"n", "p50", "p99"})
        assert (each["goal"] is None) <= (each["holds"] is None)
    assert sum(each["goal"] is not None for each in found) >= (0 if name == "idle" else 1)
    assert all(each["value"] > 0 for each in found if each["unit"] in ("s", "ms", "x", "MiB/s", "1/s"))
    assert "QEMU" in said.err
    for words in WORDS.get(name, ()):
        assert any(words in each["figure"] for each in found), words
    assert not list(tmp_path.iterdir())
    assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()


def test_a_build_is_drawn(
    artifacts: Artifacts, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("RAMET_HOME", str(artifacts.store.root))
    words = ["--quick", "--memory", "256", "--only", "picture", "--out", str(tmp_path)]
    assert bench.main(["giveback", "--json", "--image", artifacts.tiny, *words]) == 0, capsys.readouterr().err
    runs = plot.machines(plot.parse((tmp_path / "giveback.csv").read_text()))
    assert list(runs) == [picture.OFF, picture.ON, picture.FORK]
    for points in runs.values():
        assert [name for name, _, _ in plot.phases(points)] == [picture.IDLE, picture.FILL, picture.WORK, picture.FREE, picture.REST]
        assert max(point.memory for point in points) > points[0].memory + (picture.QUICK.mebibytes << 20)
    off, on = (runs[name][-1] for name in (picture.OFF, picture.ON))
    assert on.memory < off.memory - (picture.QUICK.mebibytes << 20)
    assert on.disk < off.disk
    assert (tmp_path / "giveback.png").read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in (tmp_path / "giveback.svg").read_bytes()


def test_a_picture_needs_a_place(
    artifacts: Artifacts, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("RAMET_HOME", str(artifacts.store.root))
    assert bench.main(["giveback", "--out", str(tmp_path / "nowhere")]) == bench.COULD_NOT_RUN
    assert "is no directory" in capsys.readouterr().err


def test_memory_is_told_apart_by_what_it_is_for(tmp_path: Path) -> None:
    """Of this process: a private mapping of a layer's file, some pages read and some written."""
    served = tmp_path / "served"
    served.mkdir()
    (served / "layer").write_bytes(bytes(range(256)) * 16 * 64)
    with open(served / "layer", "r+b") as file, mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE) as mapped:
        for page in range(40):
            mapped[page * 4096]
        for page in range(8):
            mapped[page * 4096] = 1
        found = members.memory(os.getpid(), 1 << 40, served)
    assert found[members.OWN] == 8 * 4096
    assert 32 * 4096 <= found[members.SHARED] <= 56 * 4096  # the kernel maps pages around those that were asked for
    assert found[members.PROGRAM] > 0
    assert found[members.HEAP] > 0
    assert found.total() < _resident() + 4096


def _resident() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmRSS:"))


def test_an_image_that_is_not_there_cannot_be_measured(
    artifacts: Artifacts, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAMET_HOME", str(artifacts.store.root))
    assert bench.main(["exec", "--image", "oci:/nowhere:latest"]) == 2
    assert "could not measure" in capsys.readouterr().err
