"""Sending a snapshot to a registry: compressed, without what others on this host have in the same blobs, and only what the registry has not yet."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import TypeVar

from ramet import artifact, images, packing, tables
from ramet import reference as references
from ramet.artifact import Artifact, ImageOrigin, Part
from ramet.errors import BusyError, ImageError, LayerError, RametError, SpecError
from ramet.model import Snapshot, SnapshotState
from ramet.operations import Operations, log
from ramet.packing import Cargo, Packer
from ramet.paths import StateDir
from ramet.registry.client import Registry
from ramet.sealing import Sealer
from ramet.storage import Transfer
from ramet.store import disk, garbage, remote, tracing
from ramet.store.fetching import Fetcher, fetch_now
from ramet.store.layer import PAGE, Kind, Layer
from ramet.store.runs import Runs
from ramet.store.sealing import Progress
from ramet.store.store import Store
from ramet.watch import uncut

S = TypeVar("S")
T = TypeVar("T")
Say = Callable[[str, float | None], None]  # what is done now, and how much of it: 0 to 1, or None

AT_ONCE = 3  # blobs that are sent at the same time
_ASKED = 8  # blobs that are asked for at the same time
_BUSY = 0.5  # seconds until a layer that another seals is looked at again: flock tells nobody
_PATIENCE = 3600.0  # seconds for that
_REMEMBERED = 4096  # blobs of which it is known who has them
_UPLOADS = 64  # that were cut off, and may go on


async def push(ops: Operations, sealer: Sealer, found: Snapshot, reference: str, say: Say) -> Transfer:
    """Send a snapshot under a tag. ImageError, LayerError, HostError: the tag is as it was; what was sent already is not sent again the next time."""
    began = time.monotonic()
    target = _target(reference)
    if found.state is SnapshotState.BROKEN:
        raise LayerError(f"snapshot {found.title} is broken: {found.reason}", hint="`ramet snapshots` shows others.")
    try:
        async with ops.layers_in_use(), Registry.open(target.host) as registry:
            traced = sum(bool(tracing.load(ops.state.store, layer)) for layer in found.layers)
            if known := await _again(ops, found, registry, target, traced):
                made, manifest, moved = *known, 0
            else:
                made, moved = await _sent(ops, sealer, found, registry, target, say)
                manifest = made.manifest()
            say("publishing", None)
            digest = await registry.put_manifest(target.path, target.tag, manifest, artifact.MANIFEST)
            Ledger(ops.state.pushes).pushed(target.name, found.id, traced, digest)
    finally:
        ops.spawn(ops.collect())  # layers that were made for it alone
    size = made.size + len(manifest)
    moved += len(manifest)
    log.info("pushed %s to %s as %s", found.title, reference, digest)
    return Transfer(
        reference=f"{target.name}:{target.tag}",
        digest=digest,
        snapshot=found.title,
        size=size,
        moved=moved,
        shared=max(0, size - moved),
        seconds=time.monotonic() - began,
    )


async def _again(
    ops: Operations, found: Snapshot, registry: Registry, target: references.Registry, traced: int
) -> tuple[Artifact, bytes] | None:
    """What a snapshot was pushed as or pulled by, and its manifest, where that is in the same repository: then the tag is all there is to send.

    None too where some of it is gone from there, and where a start was traced here of which that manifest knows nothing. traced: layers of which one is known.
    """
    pulled = found.origin.partition("@")[2] if found.origin.startswith(f"{target.name}@") else ""
    digest = Ledger(ops.state.pushes).manifest(target.name, found.id, traced)
    if not (digest or pulled):
        return None
    try:
        _, manifest = await registry.manifest(target.path, digest or pulled)
        made = artifact.read_manifest(manifest, target.name)
    except ImageError:
        return None  # removed since
    if traced and not made.of(artifact.TRACE):
        return None
    there = await together(lambda part: registry.has(target.path, part.digest), (made.config, *made.parts), _ASKED)
    return None if None in there else (made, manifest)


async def _sent(
    ops: Operations, sealer: Sealer, found: Snapshot, registry: Registry, target: references.Registry, say: Say
) -> tuple[Artifact, int]:
    """Have the registry have all of it but the manifest; how many bytes went over the line."""
    image = _image(ops.state, found)
    await _compressed(ops, sealer, found, say)
    bases = await _bases(ops, found, say)
    say("packing", None)
    if remote.is_any(ops.state.store):
        await ops.use_layers()  # some of it may have to be fetched first
    with contextlib.ExitStack() as stack:
        packer = Packer(ops.state.store, stack, bases, lambda head, wants: fetch_now(ops.state.store, head, wants, nudge=ops.layers.nudge))
        await uncut(packer.pack, found.layers)
        cargo, made = await asyncio.to_thread(_artifact, ops.state, found, image, packer)
        sending = _Sending(ops, registry, target, say)
        await sending.send(cargo)
    return made, sending.moved


def _target(reference: str) -> references.Registry:
    target = references.parse(reference)
    if not isinstance(target, references.Registry) or target.digest:
        raise SpecError(f"{reference}: a snapshot is pushed to a registry, under a tag", hint="Write registry.example.com/name:tag.")
    return target


def _image(state: StateDir, found: Snapshot) -> ImageOrigin:
    image = images.load(state, found.image_digest)
    if image is None:
        raise ImageError(f"the image {found.image_digest} that {found.title} stands on is gone")
    return ImageOrigin(digest=image.digest, reference=image.reference, config=image.config, disk_size=image.disk_size)


async def together(work: Callable[[S], Awaitable[T]], items: Iterable[S], limit: int) -> list[T]:
    """What the work gives for each, so many at a time; the first error ends the others."""
    gate = asyncio.Semaphore(limit)

    async def one(item: S) -> T:
        async with gate:
            return await work(item)

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(item)) for item in items]
    except BaseExceptionGroup as failed:
        raise failed.exceptions[0] from None
    return [task.result() for task in tasks]


# What must be done before anything can be sent


async def _compressed(ops: Operations, sealer: Sealer, found: Snapshot, say: Say) -> None:
    """All layers that it needs are sealed when this returns."""
    deadline = time.monotonic() + _PATIENCE
    while waiting := await asyncio.to_thread(_unsealed, ops.store, found.layers):
        say("compressing", 0.0)
        try:
            await sealer.compress(waiting, progress=lambda done: say("compressing", done))
        except BusyError:
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(_BUSY)


def _unsealed(store: Store, layers: Iterable[str]) -> list[str]:
    records = garbage.Records(store.files)
    found = [records[name] for name in garbage.needed(records, layers) if name in records]
    return [each.id for each in sorted(found, key=lambda each: (each.created_at, each.id)) if not each.sealed]


async def _bases(ops: Operations, found: Snapshot, say: Say) -> dict[str, str]:
    """A layer for each raw file that is the base of one."""
    records = garbage.Records(ops.state.store)
    names = await asyncio.to_thread(garbage.needed, records, found.layers)
    wanted = {records[name].base for name in names if name in records and not records[name].base_layer} - {""}
    return {base: await base_layer(ops, base, say) for base in sorted(wanted)}


async def base_layer(ops: Operations, base: str, say: Say) -> str:
    """The layer that a raw file is; that of an image is made once. base: relative to the state directory. The caller keeps it from being collected."""
    path = ops.state.root / base
    digest = path.parent.name.replace("-", ":", 1) if path.parent.parent == ops.state.images else ""
    known = images.layer_of(ops.state, digest) if digest else ""
    if known:
        with contextlib.suppress(RametError):
            return (await asyncio.to_thread(ops.store.get, known)).id
    loop = asyncio.get_running_loop()
    made = await uncut(_made, ops.store, path, lambda done: loop.call_soon_threadsafe(say, "compressing the image", done))
    if digest:
        await asyncio.to_thread(images.set_layer, ops.state, digest, made.id)
    return made.id


def _made(store: Store, path: Path, progress: Progress) -> Layer:
    with disk.guard("read", path):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        pages = os.fstat(fd).st_size // PAGE  # a file system has no part of a page
        held = [(begin // PAGE, -(-end // PAGE)) for begin, end in remote.held(fd, 0, pages * PAGE)]
        end = 0
        runs = []
        for first, last in held:
            first = max(first, end)
            end = min(max(last, end), pages)
            runs += [(first, end - first, first)] if end > first else []
        with store.draft(Kind.DISK, pages * PAGE) as draft:
            return store.publish_sealed(draft, fd, Runs.build(runs), progress)
    finally:
        os.close(fd)


def _artifact(state: StateDir, found: Snapshot, image: ImageOrigin, packer: Packer) -> tuple[list[tuple[Part, Cargo]], Artifact]:
    """All that is to be sent, in the manifest's order, the config last."""
    cargo: list[tuple[Part, Cargo]] = []
    for sent in packer.sent.values():
        cargo += [(Part(kind=artifact.BLOB, digest=each.digest, size=each.size), each) for each in sent.blobs]
        cargo.append(_small(artifact.TABLES, sent.data))
    if found.memory:
        path = state.snapshot(found.id).state
        with disk.guard("read", path):
            cargo.append(_small(artifact.STATE, tables.compress(path.read_bytes())))
    touched = {packer.sent[layer].name: chunks for layer in found.layers if (chunks := tracing.load(state.store, layer))}
    if touched:
        cargo.append(_small(artifact.TRACE, artifact.dump_trace(touched)))
    parts = tuple(part for part, _ in cargo)
    names = [packer.sent[layer].name for layer in found.disk_layers]
    memory = packer.sent[found.memory_layer].name if found.memory else ""
    config, content = _small(artifact.CONFIG, artifact.config(found, image, names, memory, parts))
    return [*cargo, (config, content)], Artifact(config=config, parts=parts)


def _small(kind: str, data: bytes) -> tuple[Part, Cargo]:
    part = Part.of(kind, data)
    return part, Cargo(digest=part.digest, size=part.size, layer="", read=lambda offset, length: data[offset : offset + length])


# Sending


class Ledger:
    """What is known of registries: who has which blobs, what snapshots are there, where uploads that were cut off can go on.

    A hint: what is wrong in it costs a question.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._blobs: dict[str, list[str]] = {}  # digest -> repositories
        self._uploads: dict[str, str] = {}  # repository@digest -> location
        self._manifests: dict[str, str] = {}  # repository@snapshot+traced layers -> digest
        with contextlib.suppress(OSError, ValueError, AttributeError, TypeError):
            value = json.loads(path.read_bytes())
            self._blobs = {str(key): [str(each) for each in found] for key, found in value["blobs"].items()}
            self._uploads = {str(key): str(found) for key, found in value["uploads"].items()}
            self._manifests = {str(key): str(found) for key, found in value.get("manifests", {}).items()}

    def repositories(self, digest: str) -> list[str]:
        """HOST/PATH of those that have a blob."""
        return list(self._blobs.get(digest, ()))

    def manifest(self, repository: str, snapshot: str, traced: int) -> str:
        """The digest that a snapshot was pushed as, when traces of so many of its layers were known."""
        return self._manifests.get(f"{repository}@{snapshot}+{traced}", "")

    def upload(self, repository: str, digest: str) -> str:
        return self._uploads.get(f"{repository}@{digest}", "")

    def began(self, repository: str, digest: str, location: str) -> None:
        self._uploads[f"{repository}@{digest}"] = location
        self._save()

    def has(self, repository: str, digest: str) -> None:
        known = self._blobs.pop(digest, [])
        self._blobs[digest] = [repository, *(each for each in known if each != repository)][:4]
        self._uploads.pop(f"{repository}@{digest}", None)
        self._save()

    def pushed(self, repository: str, snapshot: str, traced: int, digest: str) -> None:
        self._manifests[f"{repository}@{snapshot}+{traced}"] = digest
        self._save()

    def _save(self) -> None:
        value = {
            "blobs": dict(list(self._blobs.items())[-_REMEMBERED:]),
            "uploads": dict(list(self._uploads.items())[-_UPLOADS:]),
            "manifests": dict(list(self._manifests.items())[-_REMEMBERED:]),
        }
        disk.replace(self._path, json.dumps(value).encode(), durable=False)


class _Sending:
    """One push. moved: bytes that went over the line."""

    def __init__(self, ops: Operations, registry: Registry, target: references.Registry, say: Say) -> None:
        self._ops = ops
        self._files = ops.state.store
        self._registry = registry
        self._target = target
        self._say = say
        self._ledger = Ledger(ops.state.pushes)  # as it was at the begin; what is written down now is added to what others write
        self._done: dict[str, int] = {}
        self._total = 0
        self.moved = 0

    async def send(self, cargo: Iterable[tuple[Part, Cargo]]) -> None:
        """Have all of it there."""
        wanted = {part.digest: each for part, each in cargo}
        self._say("asking what is there", None)
        missing = [each for each in await together(self._lacks, wanted.values(), _ASKED) if each]
        await self._bring(missing)
        self._total = sum(each.size for each in missing)
        self._tell()
        await together(self._upload, missing, AT_ONCE)

    async def _lacks(self, each: Cargo) -> Cargo | None:
        """Itself when it must be sent."""
        path = self._target.path
        if await self._registry.has(path, each.digest) is not None:
            if self._ledger.upload(self._target.name, each.digest):  # cut off once it was through
                Ledger(self._ops.state.pushes).has(self._target.name, each.digest)
            return None
        known = await asyncio.to_thread(remote.load, self._files, each.digest) if each.layer else None
        sources = [source.path for source in (known.sources if known else ()) if source.host == self._target.host]
        begin = f"{self._target.host}/"
        sources += [name.removeprefix(begin) for name in self._ledger.repositories(each.digest) if name.startswith(begin)]
        for source in dict.fromkeys(sources):
            if source != path and await self._registry.mount(path, each.digest, source):
                return None
        return each

    async def _bring(self, missing: Iterable[Cargo]) -> None:
        """What is elsewhere only has to come here first."""
        gone = await asyncio.to_thread(packing.absent, self._files, missing)
        if not gone:
            return
        say = self._say
        async with Fetcher.connect(self._files, self._ops.layers.nudge) as fetcher:
            await fetcher.bring(gone, lambda done, total: say("fetching what is not here", done / total if total else None))

    async def _upload(self, each: Cargo) -> None:
        name, digest, path = self._target.name, each.digest, self._ops.state.pushes

        def progress(done: int) -> None:
            self._done[digest] = done
            self._tell()

        await self._registry.upload(
            self._target.path,
            digest,
            each.size,
            each.read,
            progress,
            resume=self._ledger.upload(name, digest),
            at=lambda location: Ledger(path).began(name, digest, location),
        )
        Ledger(path).has(name, digest)
        self.moved += each.size
        progress(each.size)

    def _tell(self) -> None:
        self._say("sending", sum(self._done.values()) / self._total if self._total else 1.0)
