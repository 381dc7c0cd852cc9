"""The bench of lazy starts runs, small, behind both kinds of line, and leaves nothing."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import pytest

from ramet import bench
from ramet.bench import lazy
from tests.fixtures import Artifacts
from tests.host.conftest import need

WORDS = {
    "image": (
        "100 Mbit/s, first command: fetched before, of the artifact",
        "first compilation: as a multiple of that after a full pull",
        "first compilation: with a trace, as a multiple of without",
    ),
    "memory": ("what was saved of it", "1000 Mbit/s, first command: fetched before, of the artifact"),
    "reading": ("as a share of curl's", "curl of the same blobs", "cpu of fetching"),
    "machines": ("3 machines at once: bytes fetched",),
}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("line", ["tc", "bucket"])
def test_every_figure_is_printed(
    artifacts: Artifacts, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    need("docker-registry", "curl", *(["ip", "tc"] if line == "tc" else []))
    if line == "tc" and os.geteuid() != 0:
        pytest.skip("tc needs root")
    monkeypatch.setenv("RAMET_HOME", str(artifacts.store.root))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    devices = {path.name for path in Path("/sys/class/net").iterdir()}
    parts = list(lazy.PARTS) if line == "tc" else ["reading"]
    words = [word for part in parts for word in ("--only", part)]
    status = bench.main(["lazy", "--json", "--quick", "--image", artifacts.tiny, "--link", line, *words])
    said = capsys.readouterr()
    assert status != bench.COULD_NOT_RUN, said.err
    found = json.loads(said.out)
    assert all(each["value"] > 0 for each in found)
    for part in parts:
        for each in WORDS[part]:
            assert any(each in figure["figure"] for figure in found), each
    assert not list(tmp_path.iterdir())
    assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()
    assert {path.name for path in Path("/sys/class/net").iterdir()} <= devices
