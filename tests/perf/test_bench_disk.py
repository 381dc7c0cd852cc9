"""The bench of disks runs the same fio on both sides."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest

from ramet import bench
from ramet.bench import disk
from tests.fixtures import Artifacts
from tests.host.conftest import need


def test_the_disk_is_measured_on_both_sides(
    artifacts: Artifacts, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    need("fio")
    monkeypatch.setenv("RAMET_HOME", str(artifacts.store.root))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    status = bench.main(["disk", "--json", "--image", artifacts.tiny, "--seconds", "0.5", "--mebibytes", "8"])
    said = capsys.readouterr()
    assert status == 0, said.err
    found = json.loads(said.out)
    for job in disk.JOBS:
        assert sum(each["figure"].endswith(f": {job.figure}") for each in found) == 1
    assert len(found) == 2 * len(disk.JOBS)
    assert all(each["value"] > 0 for each in found)
    assert not list(tmp_path.iterdir())
