"""What snapshots are called, what their memory fits, and who descends from whom."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from ramet import lineage, snapshot
from ramet.db import Record
from ramet.errors import IncompatibleError, NotFoundError, SpecError
from ramet.model import Accelerator, NodeKind, Snapshot, SnapshotState, Spec, State
from ramet.vm import argv

CONFIG = argv.Config(
    name="web", accelerator=Accelerator.TCG, cpus=1, memory=512 << 20, kernel=Path("/k"), initrd=None, cmdline="", memory_file=Path("/m")
)
HERE = snapshot.compatibility(CONFIG, "7.2.22", "A processor", "6.1")


def saved(number: int, machine: str, *, name: str = "", parent: str = "") -> Snapshot:
    return Snapshot(
        id=f"s{number}",
        name=name,
        machine=machine,
        state=SnapshotState.READY,
        created_at=100.0 + number,
        memory=True,
        spec=Spec(name=machine),
        parent=parent,
        image_digest="sha256:1",
        compatibility=HERE,
    )


def machine(name: str, *, at: float = 0.0, source: str = "", point: str = "", pool: str = "", state: State = State.RUNNING) -> Record:
    return Record(
        id=f"id-{name}",
        name=name,
        state=state,
        spec=Spec(name=name),
        created_at=at,
        image_digest="sha256:1",
        source_id=source,
        snapshot_id=point or source,
        pool=pool,
    )


# names


@pytest.mark.parametrize("text", ["warm", "2026-11-22", "v1.2_rc", "A" * 64])
def test_labels(text: str) -> None:
    assert snapshot.label("web", text) == f"web@{text}"


@pytest.mark.parametrize("text", ["", "a b", "a/b", "a:b", "../x", "é", "-x", "a" * 65])
def test_what_is_no_label(text: str) -> None:
    with pytest.raises(SpecError):
        snapshot.label("web", text)


@pytest.mark.parametrize(
    ("text", "full"),
    [("shop", "shop:latest"), ("debian:12", "debian:12"), ("acme/shop@4f2a", "acme/shop@4f2a"), ("acme/shop", "acme/shop:latest")],
)
def test_template_names(text: str, full: str) -> None:
    assert snapshot.template_name(text) == full


@pytest.mark.parametrize("text", ["", "Shop", "a b", "/x", "x/", "a:", "a:b:c", "a//b", "x" * 250])
def test_what_names_no_template(text: str) -> None:
    with pytest.raises(SpecError):
        snapshot.template_name(text)


# compatibility


def test_what_was_saved_here_fits_here() -> None:
    snapshot.require_fit(saved(1, "web"), HERE)
    snapshot.require_fit(saved(1, "web"), dataclasses.replace(HERE, kernel="another"))  # the kernel is in the memory


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("machine", "another"),
        ("qemu", "9.0.0"),
        ("cpu", "Another processor"),
        ("accelerator", Accelerator.KVM),
        ("agent", 99),
        ("format", 99),
    ],
)
def test_a_misfit_is_refused_with_its_reason(field: str, value: object) -> None:
    with pytest.raises(IncompatibleError) as caught:
        snapshot.require_fit(saved(1, "web"), dataclasses.replace(HERE, **{field: value}))
    assert str(value) in caught.value.message
    assert str(getattr(HERE, field)) in caught.value.message
    assert caught.value.details["field"] == field
    assert "--disk-only" in caught.value.hint


def test_a_disk_alone_has_no_memory_to_fit() -> None:
    with pytest.raises(IncompatibleError):
        snapshot.require_fit(dataclasses.replace(saved(1, "web"), compatibility=None), HERE)


@pytest.mark.parametrize("changes", [{"cpus": 2}, {"memory": 1 << 30}])
def test_other_hardware_is_another_layout(changes: dict[str, int]) -> None:
    assert snapshot.layout(dataclasses.replace(CONFIG, **changes)) != snapshot.layout(CONFIG)  # type: ignore[arg-type]
    assert snapshot.layout(dataclasses.replace(CONFIG, memory_file=None, name="x", cmdline="y")) == snapshot.layout(CONFIG)


# lineage


def test_found_by_name_id_and_without_the_tag() -> None:
    known = {"s1": saved(1, "web", name="shop:latest"), "s2": saved(2, "web")}
    assert lineage.find(known, "shop:latest").id == lineage.find(known, "shop").id == "s1"
    assert lineage.find(known, "s2").id == "s2"
    for name in ("", "other", "shop:1"):
        with pytest.raises(NotFoundError):
            lineage.find(known, name)


def test_dependents_are_what_came_from_it() -> None:
    point = saved(1, "web", name="web@a")
    machines = [
        machine("web", point="s1"),  # its own machine runs on without it
        machine("child", source="s1"),
        machine("pool-1", source="s1", pool="s1"),
        machine("other"),
    ]
    later = [
        point,
        saved(2, "child", name="child@b", parent="s1"),
        saved(3, "child", parent="s1"),
        saved(4, "web", name="web@c", parent="s1"),
    ]
    assert lineage.dependents(point, machines, later) == ("child", "child@b")
    asleep = [machine("web", point="s1", state=State.HIBERNATED)]
    assert lineage.dependents(point, asleep, [point]) == ("web",)


def test_automatic_snapshots_go_when_nobody_stands_on_them() -> None:
    points = [saved(1, "web"), saved(2, "web"), saved(3, "web", name="web@kept"), saved(4, "web")]
    machines = [machine("web", point="s2"), machine("child", source="s4", point="s9")]
    assert [each.id for each in lineage.unneeded(machines, points)] == ["s1"]


def test_the_tree() -> None:
    machines = [
        machine("web", point="s2"),
        machine("web-1", at=110, source="s1"),
        machine("grandchild", at=120, source="s5"),
        machine("pool-1", source="s2", pool="s2"),
    ]
    points = [saved(1, "web"), saved(2, "web", name="web@kept"), saved(5, "gone", parent="s2"), saved(6, "web")]
    nodes = lineage.tree({each.id: each for each in machines}, {each.id: each for each in points}, {}, {"sha256:1": "debian:bookworm"})
    drawn = {
        node.name or node.id: (node.kind, next((above.name or above.id for above in nodes if above.id == node.parent), ""))
        for node in nodes
    }
    assert drawn == {
        "debian:bookworm": (NodeKind.IMAGE, ""),
        "web": (NodeKind.MACHINE, "debian:bookworm"),
        "s1": (NodeKind.SNAPSHOT, "web"),
        "web-1": (NodeKind.MACHINE, "s1"),
        "web@kept": (NodeKind.SNAPSHOT, "web"),
        "gone": (NodeKind.MACHINE, "web@kept"),
        "s5": (NodeKind.SNAPSHOT, "gone"),
        "grandchild": (NodeKind.MACHINE, "s5"),
    }
    order = [node.id for node in nodes]
    assert all(not node.parent or order.index(node.parent) < order.index(node.id) for node in nodes)
    assert [node.name for node in nodes if node.gone] == ["gone"]


def test_a_new_machine_of_an_old_name_is_not_the_old_one() -> None:
    """Its snapshots are not drawn under it."""
    machines = [machine("web", at=500), machine("child", at=600, source="s1")]
    nodes = lineage.tree({each.id: each for each in machines}, {"s1": saved(1, "web")}, {}, {})
    point = next(node for node in nodes if node.id == "s1")
    above = next(node for node in nodes if node.id == point.parent)
    assert above.gone
