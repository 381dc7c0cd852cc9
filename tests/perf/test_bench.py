"""The benches run and say what they should. That their goals hold is theirs to tell, on an idle host: `ramet bench`."""

from __future__ import annotations

import json

import pytest

from ramet import bench
from tests.fixtures import Artifacts

KEYS = {"figure", "value", "unit", "goal", "holds"}
FEW = {"boot": ["--pairs", "1"], "exec": ["--count", "5", "--row", "20", "--mebibytes", "1"]}


@pytest.mark.parametrize("name", FEW)
def test_a_bench_prints_its_figures(
    artifacts: Artifacts, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAMET_HOME", str(artifacts.store.root))
    status = bench.main([name, "--json", "--image", artifacts.tiny, *FEW[name]])
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert status == (1 if any(each["holds"] is False for each in found) else 0), said.err
    for each in found:
        assert set(each) in (KEYS, KEYS | {"n", "p50", "p99"})
        assert (each["goal"] is None) <= (each["holds"] is None)
    assert sum(each["goal"] is not None for each in found) >= 1
    assert all(each["value"] > 0 for each in found if each["unit"] in ("s", "ms", "x", "MiB/s", "1/s"))
    assert "QEMU" in said.err


def test_an_image_that_is_not_there_cannot_be_measured(
    artifacts: Artifacts, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAMET_HOME", str(artifacts.store.root))
    assert bench.main(["exec", "--image", "oci:/nowhere:latest"]) == 2
    assert "could not measure" in capsys.readouterr().err
