"""Who descends from whom, and what stands on what. Pure, over records."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ramet.db import Record
from ramet.errors import NotFoundError
from ramet.model import NodeKind, Snapshot, State, TreeNode, Usage


def find(snapshots: Mapping[str, Snapshot], name: str) -> Snapshot:
    """By name or id. NotFoundError when there is none."""
    for each in snapshots.values():
        if (name and each.name in (name, f"{name}:latest")) or name == each.id:
            return each
    raise NotFoundError(f"there is no snapshot {name!r}", hint="`ramet snapshots` shows the snapshots there are.")


def machines_on(snapshot: Snapshot, machines: Iterable[Record]) -> list[Record]:
    """Machines that came from it, and its own machine where that needs it to go on. Parked ones are the snapshot's own."""

    def stands(each: Record) -> bool:
        if each.name == snapshot.machine and each.source_id != snapshot.id:
            return each.snapshot_id == snapshot.id and each.state is State.HIBERNATED
        return snapshot.id in (each.snapshot_id, each.source_id)

    return [each for each in machines if not each.pool and stands(each)]


def snapshots_on(snapshot: Snapshot, snapshots: Iterable[Snapshot]) -> list[Snapshot]:
    """Named snapshots of machines that came from it."""
    return [each for each in snapshots if each.parent == snapshot.id and each.name and each.machine != snapshot.machine]


def dependents(snapshot: Snapshot, machines: Iterable[Record], snapshots: Iterable[Snapshot]) -> tuple[str, ...]:
    """Names of what stands on it."""
    names = [each.name for each in machines_on(snapshot, machines)]
    return tuple(names + [each.name for each in snapshots_on(snapshot, snapshots)])


def unneeded(machines: Iterable[Record], snapshots: Iterable[Snapshot]) -> list[Snapshot]:
    """Automatic snapshots on which no machine stands."""
    used = {name for each in machines for name in (each.snapshot_id, each.source_id, each.pool)}
    return [each for each in snapshots if not each.name and each.id not in used]


class _Tree:
    """Nodes in the order in which they were first needed: parents before children."""

    def __init__(
        self,
        machines: Mapping[str, Record],
        snapshots: Mapping[str, Snapshot],
        usage: Mapping[str, Usage],
        image_names: Mapping[str, str],
    ) -> None:
        self.nodes: dict[str, TreeNode] = {}
        self._usage = usage
        self._by_name = {each.name: each for each in machines.values()}
        self._snapshots = snapshots
        self._image_names = image_names

    def _add(self, node: TreeNode) -> str:
        self.nodes.setdefault(node.id, node)
        return node.id

    def image(self, digest: str) -> str:
        return self._add(TreeNode(id=f"image {digest}", parent="", kind=NodeKind.IMAGE, name=self._image_names.get(digest, digest[:19])))

    def origin(self, snapshot: Snapshot) -> str:
        """The machine that a snapshot is of; one that was deleted is drawn, for its descendants. Its image, where it is of none: it was pulled, say."""
        if not snapshot.machine:
            return self.image(snapshot.image_digest)
        alive = self._by_name.get(snapshot.machine)
        if alive and alive.created_at <= snapshot.created_at:
            return self.machine(alive)
        above = self._snapshots.get(snapshot.parent)
        parent = self.point(above) if above and above.machine != snapshot.machine else self.image(snapshot.image_digest)
        return self._add(TreeNode(id=f"gone {snapshot.machine}", parent=parent, kind=NodeKind.MACHINE, name=snapshot.machine, gone=True))

    def point(self, found: Snapshot) -> str:
        if found.id in self.nodes:
            return found.id
        return self._add(
            TreeNode(
                id=found.id,
                parent=self.origin(found),
                kind=NodeKind.SNAPSHOT,
                name=found.name,
                state=found.state,
                created_at=found.created_at,
                usage=self._usage.get(found.id),
                stored=found.stored,
            )
        )

    def machine(self, record: Record) -> str:
        source = self._snapshots.get(record.source_id)
        parent = self.point(source) if source else self.image(record.image_digest)
        node = TreeNode(
            id=record.id,
            parent=parent,
            kind=NodeKind.MACHINE,
            name=record.name,
            state=record.state,
            created_at=record.created_at,
            usage=self._usage.get(record.id),
        )
        self.nodes[record.id] = node
        return record.id


def tree(
    machines: Mapping[str, Record], snapshots: Mapping[str, Snapshot], usage: Mapping[str, Usage], image_names: Mapping[str, str]
) -> list[TreeNode]:
    """Images, under them machines, under those their snapshots, under those the machines that came from them.

    usage: by a machine's or snapshot's id. image_names: by digest. Automatic snapshots are drawn where machines came from them.
    """
    drawn = _Tree(machines, snapshots, usage, image_names)
    sources = {each.source_id for each in machines.values() if not each.pool}
    for each in machines.values():
        if not each.pool:
            drawn.machine(each)
    for found in snapshots.values():
        if found.name or found.id in sources:
            drawn.point(found)
    return list(drawn.nodes.values())
