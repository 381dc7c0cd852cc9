"""Having a snapshot of a registry here. The small documents first, each verified; then it exists, and its chunks come when they are needed, or now."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from weakref import WeakValueDictionary

from ramet import artifact, images, restoring, saving, snapshot, tables
from ramet import reference as references
from ramet.artifact import Artifact, ImageOrigin, Part
from ramet.errors import ExistsError, ImageError, LayerError, RametError
from ramet.model import Image, Snapshot
from ramet.operations import Operations, log
from ramet.pushing import Say, together
from ramet.records import dump
from ramet.reference import sha256
from ramet.registry.client import Registry
from ramet.storage import Transfer
from ramet.store import admission, chain, garbage, index, remote, tracing
from ramet.store.fetching import Fetcher
from ramet.store.remote import Source
from ramet.tables import Tables
from ramet.watch import uncut

_AT_ONCE = 4  # tables that are fetched at the same time
_turns: WeakValueDictionary[tuple[int, str], asyncio.Lock] = WeakValueDictionary()


@dataclass(frozen=True, kw_only=True)
class _Found:
    """What a reference means now. digest: of the manifest, which is `size` bytes long."""

    artifact: Artifact
    snapshot: Snapshot
    image: ImageOrigin
    digest: str
    size: int


async def pull(ops: Operations, reference: str, *, lazy: bool, say: Say) -> Transfer:
    """Have a snapshot here, as a template of its name in the registry. lazy: what is not needed at once comes later.

    ImageError: it is not there, or not as it should be. HostError: the registry cannot be reached. Cut off after the snapshot exists, it can be used, and
    the next pull goes on.
    """
    began = time.monotonic()
    source = references.parse(reference)
    if not isinstance(source, references.Registry):
        raise ImageError(f"{reference}: snapshots come from registries", hint="Write registry.example.com/name:tag.")
    pulling = _Pulling(ops, source, say)
    try:
        async with ops.layers_in_use(), Registry.open(source.host) as registry:
            found = await pulling.look(registry)
            with contextlib.suppress(RametError):  # nothing serves layers yet, or it is said where it is needed
                ops.layers.nudge()  # the fetcher starts while the tables come
            async with ops.collecting:
                pass  # one that runs now may be about to remove what this would find to be here
            async with _turn(ops, pulling.name):
                made = await pulling.keep(registry, found)
    except BaseException:
        ops.spawn(ops.collect())  # layers that nobody named
        raise
    try:
        await pulling.fetch(made, lazy=lazy)
    except RametError as error:
        error.hint += f" {made.title} is here all the same: what is missing is fetched when it is needed, or by the next pull."
        raise
    size = found.artifact.size + found.size
    return Transfer(
        reference=pulling.name,
        digest=found.digest,
        snapshot=made.title,
        size=size,
        moved=pulling.moved,
        shared=max(0, size - pulling.moved - pulling.later),
        seconds=time.monotonic() - began,
    )


def _turn(ops: Operations, name: str) -> asyncio.Lock:
    """One after the other: two who pull the same would both find it missing. name: of the snapshot; empty: for the layers of any."""
    return _turns.setdefault((id(ops), name), asyncio.Lock())


class _Pulling:
    """One pull. name: what the snapshot is called here. moved: bytes that came; later: those that are still to come."""

    def __init__(self, ops: Operations, source: references.Registry, say: Say) -> None:
        self._ops = ops
        self._files = ops.state.store
        self._source = source
        self._say = say
        self.name = snapshot.pulled_name(source)
        self.moved = 0
        self.later = 0

    async def look(self, registry: Registry) -> _Found:
        """The manifest and the config."""
        self._say("looking up the snapshot", None)
        digest, data = await registry.manifest(self._source.path, self._source.digest or self._source.tag)
        self.moved += len(data)
        made = artifact.read_manifest(data, self.name)
        config = await self._small(registry, made.config, artifact.DOCUMENT_LIMIT)
        found, image = artifact.read_config(config, self.name)
        return _Found(artifact=made, snapshot=found, image=image, digest=digest, size=len(data))

    async def _small(self, registry: Registry, part: Part, limit: int) -> bytes:
        data = await registry.blob(self._source.path, part.digest, limit)
        if len(data) != part.size:
            raise ImageError(f"{self.name}: {part.digest} has {len(data)} bytes instead of {part.size}")
        self.moved += len(data)
        return data

    async def keep(self, registry: Registry, found: _Found) -> Snapshot:
        """From its end on the snapshot exists. Layers that are here already are not fetched."""
        origin = f"{self._source.name}@{found.digest}"
        old = next((each for each in self._ops.snapshots.values() if each.name == self.name), None)
        if old and not old.origin:
            raise ExistsError(f"there is a snapshot {self.name} that was made here", hint="Name that one otherwise with `ramet template`.")
        layers = await self._layers(registry, found.artifact)
        sizes = {part.digest: part.size for part in found.artifact.of(artifact.BLOB)}
        await asyncio.to_thread(artifact.agree, found.snapshot, layers, sizes)
        async with _turn(self._ops, ""):
            await uncut(self._admit, layers, sizes)
        if old and old.origin == origin:
            return old
        await self._trace(registry, found.artifact, layers)
        self._say("recording the snapshot", None)
        made = self._named(found, origin, await asyncio.to_thread(self._image, found, layers))
        with saving.stage(self._ops, made.id) as staged:
            if made.memory:
                await self._state(registry, found.artifact, staged.state)
            if old:
                await self._retire(old)
            await saving.admit(self._ops, made, staged)
        log.info("pulled %s as %s", origin, made.id)
        return made

    async def _retire(self, old: Snapshot) -> None:
        """The tag means something else now. What stands on the old one keeps it, without a name."""
        await self._ops.snapshots.change(old.id, name="", template=False, pool=0)
        for entry in [each for each in self._ops.entries.values() if each.record.pool == old.id]:
            await self._ops.drop(entry)

    async def _layers(self, registry: Registry, made: Artifact) -> dict[str, Tables]:
        """The tables of all layers by their digests, in the manifest's order."""
        parts = list({part.digest: part for part in made.of(artifact.TABLES)}.values())
        done = 0

        async def one(part: Part) -> Tables:
            nonlocal done
            found = await asyncio.to_thread(self._known, part.digest)
            if found is None:
                data = await self._small(registry, part, tables.LIMIT)
                found = await asyncio.to_thread(tables.unpack, data, part.digest)
            done += 1
            self._say("fetching the tables", done / len(parts))
            return found

        found = await together(one, parts, _AT_ONCE)
        return {part.digest: each for part, each in zip(parts, found, strict=True)}

    def _known(self, digest: str) -> Tables | None:
        """The tables of a layer that is here."""
        record = admission.here(self._files, tables.local_id(digest), digest)
        if record is None:
            return None
        records = garbage.Records(self._files)

        def name(layer_id: str) -> str:
            return tables.SELF if layer_id == record.id else records[layer_id].origin

        with contextlib.suppress(LayerError, KeyError):  # what is damaged is fetched, and found to be there
            return Tables(
                kind=record.kind,
                size=record.size,
                data=record.data_bytes,
                zero=record.zero_bytes,
                blobs=record.blobs,
                chain=tuple(map(name, record.chain)),
                beneath=tuple(map(name, record.beneath)),
                base=name(record.base_layer) if record.base else "",
                owners=chain.published_owners(self._files, record.id)[1],
                index=index.read(self._files.layer(record.id), record),
            )
        return None

    def _admit(self, layers: Mapping[str, Tables], sizes: Mapping[str, int]) -> None:
        source = Source(host=self._source.host, path=self._source.path)
        for digest, each in layers.items():
            admission.admit(self._ops.store, each.record(digest), each.owners, each.index, sizes, source)

    async def _trace(self, registry: Registry, made: Artifact, layers: Mapping[str, Tables]) -> None:
        """What a start touches, for layers of which nothing of the kind is known. A hint: none that is wrong keeps anybody from anything."""
        for part in made.of(artifact.TRACE)[:1]:
            try:
                touched = artifact.read_trace(await self._small(registry, part, artifact.TRACE_LIMIT), layers, self.name)
            except ImageError as error:
                log.warning("%s", error.message)
                return
            for digest, chunks in touched.items():
                layer = tables.local_id(digest)
                if chunks and not tracing.load(self._files, layer):
                    await asyncio.to_thread(tracing.save, self._files, layer, chunks)

    async def _state(self, registry: Registry, made: Artifact, place: os.PathLike[str]) -> None:
        """QEMU's devices."""
        parts = made.of(artifact.STATE)
        if len(parts) != 1:
            raise ImageError(f"{self.name}: it has memory, and {len(parts)} device states")
        data = await self._small(registry, parts[0], artifact.STATE_LIMIT)
        content = await asyncio.to_thread(tables.decompress, data, artifact.STATE_LIMIT, f"{self.name}: device state")
        with open(place, "xb") as file:
            file.write(content)

    def _image(self, found: _Found, layers: Mapping[str, Tables]) -> str:
        """The digest of the image that the snapshot stands on here: the one of that digest where that says the same, else one of its own, so that
        nobody who pushes a snapshot says what an image of this host is."""
        image = found.image
        here = images.load(self._ops.state, image.digest)
        if here and (here.reference, here.config) == (image.reference, image.config):
            return image.digest
        base = layers[found.snapshot.disk_layer].base
        value = dump(dataclasses.replace(image, digest="")) | {"base": base}
        made = Image(
            digest=sha256(tables.canonical(value)),
            reference=image.reference,
            config=image.config,
            disk_size=image.disk_size,
            disk_used=0,
            created_at=time.time(),
        )
        images.admit(self._ops.state, made, tables.local_id(base or found.snapshot.disk_layer))
        return made.digest

    def _named(self, found: _Found, origin: str, image: str) -> Snapshot:
        return dataclasses.replace(
            found.snapshot,
            id=os.urandom(6).hex(),
            name=self.name,
            machine="",  # it is no machine of this host
            template=True,
            origin=origin,
            image_digest=image,
            disk_layer=tables.local_id(found.snapshot.disk_layer),
            drive_layers=tuple(map(tables.local_id, found.snapshot.drive_layers)),
            memory_layer=tables.local_id(found.snapshot.memory_layer) if found.snapshot.memory else "",
        )

    async def fetch(self, made: Snapshot, *, lazy: bool) -> None:
        """Have its chunks come: all now, or in the background."""
        before = await asyncio.to_thread(absent, self._ops, made.layers)
        if not before:
            return
        await self._ops.use_layers()
        if lazy:  # a machine that is made from the snapshot starts meanwhile
            self.later = before
            restoring.fetch_later(self._ops, f"what {self.name} lacks", Fetcher.background)
        else:
            async with Fetcher.connect(self._files, self._ops.layers.nudge) as fetcher:
                await fetcher.bring(made.layers, self._fetched)
            self.moved += max(0, before - await asyncio.to_thread(absent, self._ops, made.layers))

    def _fetched(self, done: int, total: int) -> None:
        self._say("fetching the snapshot", done / total if total else None)


def absent(ops: Operations, layers: Sequence[str]) -> int:
    """Bytes of the blobs that these layers need, and all they need, that are not here."""
    records = garbage.Records(ops.state.store)
    names = garbage.needed(records, layers)
    blobs = {digest for name in names if name in records for digest in records[name].blobs}
    return sum(remote.absent(ops.state.store, digest) for digest in blobs)
