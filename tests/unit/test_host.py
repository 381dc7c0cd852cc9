"""What a host says of itself where an administrator has chosen something."""

from __future__ import annotations

from pathlib import Path

import pytest

from ramet import host
from ramet.errors import HostError
from ramet.model import Accelerator
from ramet.vm.argv import Aio, DiskIo
from ramet.vm.probe import Probe


def probe(uring: str = "") -> Probe:
    return Probe(accelerator=Accelerator.TCG, reason="", uring=uring, key="")


@pytest.fixture(autouse=True)
def nothing_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (host.MERGE, "RAMET_DISK_IO"):
        monkeypatch.delenv(name, raising=False)


def test_io_uring_is_used_where_it_works(monkeypatch: pytest.MonkeyPatch) -> None:
    assert host._disk_io(probe()) == DiskIo(aio=Aio.URING)
    assert host._disk_io(probe("it is forbidden")) == DiskIo(aio=Aio.THREADS)
    monkeypatch.setenv("RAMET_DISK_IO", "threads,direct")
    assert host._disk_io(probe()) == DiskIo(aio=Aio.THREADS, direct=True)
    monkeypatch.setenv("RAMET_DISK_IO", "faster")
    with pytest.raises(HostError, match="RAMET_DISK_IO is 'faster'"):
        host._disk_io(probe())


def test_nothing_is_said_of_merging_that_nobody_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert host._merging() == []
    monkeypatch.setenv(host.MERGE, "0")
    assert host._merging() == []


@pytest.mark.parametrize(("run", "missing"), [("1", ""), ("0", "KSM does not run"), (None, "has no KSM")])
def test_merging_is_warned_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, run: str | None, missing: str) -> None:
    monkeypatch.setenv(host.MERGE, "1")
    monkeypatch.setattr(host, "_KSM", tmp_path / "run")
    if run is not None:
        (tmp_path / "run").write_text(f"{run}\n")
    said = host._merging()
    assert "whether another machine's memory holds a page" in said[0]
    assert len(said) == (2 if missing else 1)
    assert missing in said[-1]
