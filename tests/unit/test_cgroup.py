"""What a machine's processes may take, and which version of cgroups says so."""

from __future__ import annotations

from pathlib import Path

from ramet import cgroup
from ramet.cgroup import OVERHEAD, Support
from ramet.model import Spec

SPEC = Spec(name="a", cpus=2, memory=1 << 30)


def test_limits_of_version_2() -> None:
    assert cgroup.limits(SPEC, True) == {
        "memory.max": ("all", str((1 << 30) + OVERHEAD)),
        "cpu.max": ("all", "300000 100000"),
        "pids.max": ("all", str(cgroup.PIDS)),
        "memory.oom.group": ("all", "1"),
    }


def test_limits_of_version_1() -> None:
    assert cgroup.limits(SPEC, False) == {
        "memory.limit_in_bytes": ("memory", str((1 << 30) + OVERHEAD)),
        "cpu.cfs_quota_us": ("cpu", "300000"),
        "pids.max": ("pids", str(cgroup.PIDS)),
    }


def test_version_2_is_found(tmp_path: Path) -> None:
    (tmp_path / "cgroup.controllers").write_text("cpuset cpu io memory pids\n")
    (tmp_path / "cgroup.subtree_control").touch()
    support = cgroup.detect(tmp_path)
    assert support == Support(directories={"all": tmp_path / "ramet"}, unified=True)
    assert (tmp_path / "cgroup.subtree_control").read_text() == "+memory +cpu +pids"


def test_version_1_is_found_beside_an_empty_version_2(tmp_path: Path) -> None:
    (tmp_path / "unified").mkdir()
    (tmp_path / "cgroup.controllers").write_text("\n")
    for name in ("memory", "pids"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tasks").touch()
    support = cgroup.detect(tmp_path)
    assert support == Support(directories={name: tmp_path / name / "ramet" for name in ("memory", "pids")}, unified=False)


def test_no_cgroups_are_a_reason_not_an_error(tmp_path: Path) -> None:
    support = cgroup.detect(tmp_path / "none")
    assert not support.directories
    assert support.reason == "this host has no memory cgroup"


def test_a_refusal_is_a_reason_not_an_error(tmp_path: Path) -> None:
    (tmp_path / "cgroup.controllers").write_text("memory")
    (tmp_path / "ramet").touch()  # no directory can be made here
    support = cgroup.detect(tmp_path)
    assert not support.directories
    assert support.reason.startswith("cgroups cannot be made (")


def test_entering_and_leaving(tmp_path: Path) -> None:
    support = Support(directories={"memory": tmp_path / "m", "pids": tmp_path / "p"}, unified=False)
    for directory in support.directories.values():
        directory.mkdir()
    cgroup.enter(support, "abc", SPEC, [10])
    assert (tmp_path / "m" / "abc" / "memory.limit_in_bytes").read_text() == str((1 << 30) + OVERHEAD)
    assert (tmp_path / "p" / "abc" / "cgroup.procs").read_text() == "10"
    assert not (tmp_path / "p" / "abc" / "cpu.cfs_quota_us").exists()
    cgroup.remove(support, "never was")


def test_more_cpus_may_take_more() -> None:
    quota = [int(cgroup.limits(Spec(name="a", cpus=cpus), False)["cpu.cfs_quota_us"][1]) for cpus in (1, 2, 8)]
    assert quota == sorted(set(quota))
