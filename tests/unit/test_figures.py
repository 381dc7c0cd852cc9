"""What a bench says, and with which exit status."""

from __future__ import annotations

import json

import pytest

from ramet import bench
from ramet.bench import figures
from ramet.bench.figures import Figure, Report
from ramet.errors import HostError

PLAIN = Figure(figure="rate", value=57.4321, unit="MiB/s")
GOOD = figures.limit("ratio", 1.3, "x", 1.5)
BAD = figures.limit("ratio", 1.6, "x", 1.5)
SPREAD = figures.distribution("round trip", [float(n) for n in range(1, 102)], "ms", 60.0)
KEYS = {"figure", "value", "unit", "goal", "holds"}


def report(*found: Figure) -> Report:
    return Report(header="On software emulation (TCG), 2 cores, guest kernel 6.1, QEMU 7.2. " * 3, figures=found, notes=("a note " * 30,))


def test_status_is_of_the_goals() -> None:
    assert [report(*found).status for found in ((PLAIN,), (PLAIN, GOOD), (GOOD, BAD, GOOD))] == [0, 0, 1]


def test_a_goal_for_other_conditions_may_hold_and_cannot_fail() -> None:
    assert figures.distribution("x", [3.0], "ms", 5.0, applies=False).holds is True
    assert figures.distribution("x", [6.0], "ms", 5.0, applies=False).holds is None
    assert figures.distribution("x", [6.0], "ms", 5.0).holds is False


def test_percentiles() -> None:
    assert (SPREAD.n, SPREAD.p50, SPREAD.p99, SPREAD.value) == (101, 51.0, 100.0, 51.0)
    assert figures.percentile([7.0], 0.99) == figures.percentile([7.0], 0.0) == 7.0


def test_json_has_exactly_these_keys() -> None:
    plain, good, spread = json.loads(figures.as_json(report(PLAIN, GOOD, SPREAD)))
    assert set(plain) == set(good) == KEYS
    assert set(spread) == KEYS | {"n", "p50", "p99"}
    assert (plain["goal"], plain["holds"]) == (None, None)
    assert (good["goal"], good["holds"]) == ("<= 1.5", True)


def test_the_table_fits_80_columns_and_shows_what_fails() -> None:
    text = figures.table(report(Figure(figure="long " * 30, value=123456.0, unit="MiB/s", goal="<= 1000", holds=False), BAD, SPREAD))
    assert max(map(len, text.splitlines())) <= figures.WIDTH
    assert text.count("NO") == 2
    assert "n 101, p50 51, p99 100 ms" in text


def test_what_cannot_run_has_a_status_of_its_own(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    async def refused(_: object) -> Report:
        raise HostError("there is no QEMU", hint="Run `ramet setup`.")

    monkeypatch.setitem(bench.BENCHES, "boot", refused)
    assert bench.main(["boot"]) == bench.COULD_NOT_RUN == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "there is no QEMU" in said.err
    assert "ramet setup" in said.err
    with pytest.raises(SystemExit) as caught:
        bench.main(["no-such-bench"])
    assert caught.value.code == 2
