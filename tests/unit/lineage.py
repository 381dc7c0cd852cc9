"""The half of the `Verbs` in memory that is about instants: forks, snapshots, layers. As `memory.py`, only to test how HTTP maps to it."""

from __future__ import annotations

import builtins
import dataclasses
import time
from collections.abc import AsyncIterator

from ramet.errors import DependentsError, ExistsError, ImageError, IncompatibleError, LayerError, NotFoundError, RametError
from ramet.lifecycle import Operation, begin
from ramet.model import ForkOutcome, Machine, NodeKind, Snapshot, SnapshotState, State, TreeNode, Usage
from ramet.storage import Collected, LayerInfo, Transfer

MIB = 1 << 20
DIGEST = "sha256:" + "5e" * 32
USAGE = Usage(
    memory=90 * MIB, private=20 * MIB, shared=70 * MIB, overhead=30 * MIB, returned=400 * MIB, reclaimable=5 * MIB, cpu=1.5,
    disk=12 * MIB, disk_unique=14 * MIB, disk_shared=3 * MIB,
)  # fmt: skip


class Lineage:
    """Snapshots that are records, layers that are bytes."""

    machines: dict[str, Machine]
    seen: builtins.list[tuple[object, ...]]

    def __init__(self) -> None:
        self.born = time.time()
        self.kept: dict[str, Snapshot] = {}  # by name, or by id where they have none
        self.gone: dict[str, Machine] = {}  # deleted, but their snapshots live
        self.raw: dict[str, bytes] = {"00000000000000aa": bytes(8192) + b"data" * 1024 + bytes(5 << 20), "00000000000000bb": b"torn"}
        self.blobs = {DIGEST: bytes(range(256)) * 4096}
        self.wrong = {"00000000000000bb": ["chunk 3 of blob sha256-bb is damaged\x1b[2J"]}

    def _machine(self, name: str) -> Machine:
        raise NotImplementedError

    def plant(self) -> None:
        """Of machine `m`: `m@warm` with the child `m-1`, a template with a pool, a broken one, one without a name. `child` of `old`, which is deleted."""
        m = self.machines["m"]
        for name, state in (
            ("m@warm", SnapshotState.READY),
            ("acme/shop@4f2a", SnapshotState.READY),
            ("m@bad", SnapshotState.BROKEN),
            ("", ""),
        ):
            kept = self._keep(m, name, memory=name != "m@bad")
            self.kept[name or kept.id] = dataclasses.replace(kept, state=SnapshotState(state or "ready"))
        self.kept["acme/shop@4f2a"] = dataclasses.replace(self.kept["acme/shop@4f2a"], template=True, pool=3, pooled=2)
        self.kept["m@bad"] = dataclasses.replace(self.kept["m@bad"], reason="it did not\x1b[2J answer")
        self._made(self.kept["m@warm"], "m-1", "m")
        self.gone["old"] = dataclasses.replace(m, id="id-old", name="old")
        self._made(self._keep(self.gone["old"], "old@s", memory=True), "child", "old")
        self.machines["m"] = dataclasses.replace(m, snapshot="m@warm", usage=USAGE)

    def _become(self, name: str, operation: Operation, state: State | None) -> Machine:
        machine = self._machine(name)
        begin(name, machine.state, operation)
        self.seen.append((operation.value, name))
        self.machines[name] = dataclasses.replace(machine, state=state or machine.state)
        return self.machines[name]

    async def pause(self, name: str) -> Machine:
        return self._become(name, Operation.PAUSE, State.PAUSED)

    async def hibernate(self, name: str, *, slim: bool = True) -> Machine:
        became = self._become(name, Operation.HIBERNATE, State.HIBERNATED)
        self.seen[-1] += (slim,)
        return became

    async def compact(self, name: str) -> int:
        self._become(name, Operation.COMPACT, None)
        return 312 * MIB

    async def resume(self, name: str) -> Machine:
        paused = self._machine(name).state is State.PAUSED
        return self._become(name, Operation.UNPAUSE if paused else Operation.RESUME, State.RUNNING)

    async def fork(self, name: str, *, count: int = 1, names: tuple[str, ...] = ()) -> builtins.list[ForkOutcome]:
        parent = self._become(name, Operation.FORK, None)
        wanted = names or tuple(f"{name}-{number}" for number in range(1, count + 1))
        origin = self._keep(parent, "", memory=True)
        return [self._child(origin, each, parent) for each in wanted]

    def _child(self, origin: Snapshot, name: str, parent: Machine) -> ForkOutcome:
        error: RametError | None = None
        if name in self.machines:
            error = ExistsError(f"{name} exists", hint="Choose another name.", details={"name": name})
        elif name.startswith("un"):
            error = IncompatibleError(f"{name} does not fit")
        if error:
            return ForkOutcome(name=name, error={"code": error.code, "message": error.message, "hint": error.hint})
        machine = self._made(origin, name, parent.name)
        return ForkOutcome(name=name, machine=machine)

    def _made(self, origin: Snapshot, name: str, parent: str) -> Machine:
        machine = Machine(
            id=f"id-{name}", name=name, state=State.RUNNING, spec=dataclasses.replace(origin.spec, name=name), created_at=time.time(),
            parent=parent, snapshot=origin.title, boot_time=0.125,
        )  # fmt: skip
        self.machines[name] = machine
        where = origin.title
        self.kept[where] = dataclasses.replace(self.kept[where], dependents=(*self.kept[where].dependents, name))
        return machine

    def _keep(self, machine: Machine, name: str, *, memory: bool) -> Snapshot:
        number = len(self.kept) + 1
        kept = Snapshot(
            id=f"snap-{number}", name=name, machine=machine.name, state=SnapshotState.SAVING, created_at=time.time() - 300 + number,
            memory=memory, spec=machine.spec, pause=0.012, stored=3 * MIB, saved=40 * MIB, slimmed=60 * MIB,
        )  # fmt: skip
        self.kept[name or kept.id] = kept
        return kept

    async def snapshot(self, name: str, label: str = "", *, memory: bool = True, test: bool = True) -> Snapshot:
        self.seen.append(("snapshot", name, label, memory, test))
        machine = self._become(name, Operation.SNAPSHOT, None)
        full = f"{name}@{label or len(self.kept) + 1}"
        if full in self.kept:
            raise ExistsError(f"{full} exists", hint="Choose another label.")
        kept = self._keep(machine, full, memory=memory)
        self.machines[name] = dataclasses.replace(machine, snapshot=full)
        return kept

    async def snapshots(self, name: str = "") -> builtins.list[Snapshot]:
        self.seen.append(("snapshots", name))
        return [each for each in self.kept.values() if (each.machine == name if name else each.name)]

    async def get_snapshot(self, snapshot: str) -> Snapshot:
        return self._found(snapshot)

    def _found(self, snapshot: str) -> Snapshot:
        found = (
            self.kept.get(snapshot)
            or self.kept.get(f"{snapshot}:latest")
            or next((each for each in self.kept.values() if each.id == snapshot), None)
        )
        if not found:
            raise NotFoundError(f"there is no snapshot {snapshot}", hint="`ramet snapshots` shows the names.", details={"name": snapshot})
        return found

    async def restore(self, name: str, snapshot: str = "") -> Machine:
        found = self._found(snapshot or self._machine(name).snapshot)
        self.seen.append(("restore", name, found.title))
        self._become(name, Operation.RESTORE, State.RUNNING)
        self.machines[name] = dataclasses.replace(self.machines[name], snapshot=found.title, boot_time=0.2)
        return self.machines[name]

    async def create_from(self, snapshot: str, name: str, *, disk_only: bool = False) -> Machine:
        found = self._found(snapshot)
        self.seen.append(("create_from", snapshot, name, disk_only))
        if name in self.machines:
            raise ExistsError(f"{name} exists", hint="Choose another name.")
        return self._made(found, name, found.machine)

    async def template(self, snapshot: str, *, label: str = "", pool: int = 0) -> Snapshot:
        found = self._found(snapshot)
        self.seen.append(("template", snapshot, label, pool))
        full = label if ":" in label else f"{label or found.machine}:latest"
        del self.kept[found.title]
        self.kept[full] = dataclasses.replace(found, name=full, template=True, pool=pool, state=SnapshotState.READY)
        return self.kept[full]

    async def delete_snapshot(self, snapshot: str, *, cascade: bool = False, dry_run: bool = False) -> builtins.list[str]:
        found = self._found(snapshot)
        self.seen.append(("delete_snapshot", snapshot, cascade, dry_run))
        standing = [name for name in found.dependents if name in self.machines]
        if standing and not cascade:
            raise DependentsError(
                f"{snapshot} is stood on by {len(standing)} others", hint="`--cascade` deletes them too.", details={"dependents": standing}
            )
        if not dry_run:
            for name in standing:
                del self.machines[name]
            del self.kept[found.title]
        return [*standing, found.title]

    async def tree(self) -> builtins.list[TreeNode]:
        nodes = [TreeNode(id="image", parent="", kind=NodeKind.IMAGE, name="debian:bookworm")]
        for machine in [*self.machines.values(), *self.gone.values()]:
            gone = machine.name in self.gone
            usage = None if gone or machine.state is not State.RUNNING else USAGE
            nodes.append(
                TreeNode(
                    id=machine.id, parent=machine.snapshot if machine.parent else "image", kind=NodeKind.MACHINE, name=machine.name,
                    state="" if gone else machine.state, created_at=machine.created_at, usage=usage, gone=gone,
                )
            )  # fmt: skip
            nodes += [
                TreeNode(
                    id=key,
                    parent=machine.id,
                    kind=NodeKind.SNAPSHOT,
                    name=each.name,
                    state=each.state,
                    stored=each.stored,
                    usage=Usage(disk_unique=each.stored) if each.name else None,
                )
                for key, each in self.kept.items()
                if each.machine == machine.name
            ]
        return nodes

    async def layers(self) -> builtins.list[LayerInfo]:
        return [self._layer(layer) for layer in self.raw]

    async def get_layer(self, layer: str) -> LayerInfo:
        return self._layer(layer)

    def _layer(self, layer: str) -> LayerInfo:
        if layer not in self.raw:
            raise NotFoundError(f"there is no layer {layer}", hint="`ramet layer ls` shows the ids.", details={"name": layer})
        size = len(self.raw[layer])
        return LayerInfo(
            id=layer, kind="memory", size=size, parent="", chain=(layer,), sealed=True, blobs=("sha256:" + layer * 4,), data=4096,
            zero=size - 4096, stored=300, created_at=self.born - 7200, used_by=("m@warm", "m-1"),
        )  # fmt: skip

    async def verify_layer(self, layer: str) -> builtins.list[str]:
        self.seen.append(("verify", layer))
        self._layer(layer)
        return self.wrong.get(layer, [])

    async def export_layer(self, layer: str) -> AsyncIterator[bytes]:
        self._layer(layer)
        data = self.raw[layer]
        for at in range(0, len(data), 300_001):
            yield data[at : at + 300_001]
        if layer in self.wrong:
            raise LayerError(f"layer {layer}: blob sha256-bb is cut short", hint="`ramet layer verify` names all that is wrong.")

    async def push(self, snapshot: str, reference: str) -> Transfer:
        found = self._found(snapshot)
        self.seen.append(("push", snapshot, reference))
        return Transfer(
            reference=reference, digest=DIGEST, snapshot=found.title, size=90 * MIB, moved=40 * MIB, shared=50 * MIB, seconds=1.5
        )  # fmt: skip

    async def pull(self, reference: str, *, lazy: bool = False) -> Transfer:
        self.seen.append(("pull", reference, lazy))
        if "missing" in reference:
            raise ImageError(f"there is no {reference}", hint="Is its name right?")
        name = reference.removeprefix("docker://")
        kept = self._keep(next(iter(self.machines.values())), name, memory=True)
        self.kept[name] = dataclasses.replace(
            kept, machine="", template=True, state=SnapshotState.READY, origin=f"{name.rpartition(':')[0]}@{DIGEST}",
            absent=80 * MIB if lazy else 0,
        )  # fmt: skip
        moved = 10 * MIB if lazy else 90 * MIB
        return Transfer(reference=reference, digest=DIGEST, snapshot=name, size=90 * MIB, moved=moved, shared=0, seconds=2.0)

    async def convert(self, image: str, name: str = "") -> Snapshot:
        self.seen.append(("convert", image, name))
        machine = next(iter(self.machines.values()))
        kept = self._keep(machine, name or image, memory=False)
        self.kept[kept.name] = dataclasses.replace(kept, machine="", template=True, state=SnapshotState.READY)
        return self.kept[kept.name]

    async def gc(self, *, budget: int | None = None, dry_run: bool = False) -> Collected:
        self.seen.append(("gc", budget, dry_run))
        return Collected(
            layers=("00000000000000cc",), blobs=(DIGEST,), evicted=5 * MIB, bytes=7 * MIB, stored=300 * MIB,
            postponed=("layer 00000000000000dd is being pulled",),
        )  # fmt: skip

    async def fsck(self, *, repair: bool = False) -> builtins.list[str]:
        self.seen.append(("fsck", repair))
        return [sentence for wrong in self.wrong.values() for sentence in wrong]

    async def read_blob(self, digest: str, *, offset: int = 0, length: int = -1) -> AsyncIterator[bytes]:
        self.seen.append(("read_blob", digest, offset, length))
        data = self.blobs.get(digest)
        end = len(data or b"") if length < 0 else offset + length
        if data is None or end > len(data):
            raise NotFoundError(f"blob {digest} is not here", details={"digest": digest})
        for at in range(offset, end, 100_003):
            yield data[at : min(end, at + 100_003)]
