"""Images as disks: found by name, made once, kept by the digest of what they were made from.

    STATE/images/sha256-…/disk.raw     sparse ext4; machines have it as the base of their own disk
                          image.json   written last before the directory is published by a rename

An image may be without a disk: that of a snapshot which was pulled lies in layers.

Making one leaves either all of it or nothing: work directories are locked by their makers, and those of dead makers are removed by the next call.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import os
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from ramet import debian, locks, oci, skopeo, tree, userns
from ramet.errors import ImageError, NoSpaceError, NotFoundError
from ramet.model import Image, ImageConfig
from ramet.paths import ImageDir, StateDir
from ramet.reference import Debian, Registry, Source, parse
from ramet.store.disk import guard, replace, sync
from ramet.watch import Progress

_WORK = ".work-"
_LOCK = ".lock-"


@dataclass(frozen=True, kw_only=True)
class _Record:
    """image.json. origin: the digest of the index through which a registry named the image, else the image's own. layer: what its disk is as a layer."""

    image: Image
    origin: str
    layer: str = ""
    version: int = 1


_RECORDS = TypeAdapter(_Record)


async def ensure(state: StateDir, reference: str, *, progress: Progress) -> Image:
    """The image that a reference means, from the cache or made now. `progress` is called with the step and how much of it is done (0 to 1, or None).

    Raises ImageError (its name, its registry, its content), NoSpaceError, HostError (a program or permission is missing).
    """
    source = parse(reference)
    with _disk_errors(reference):
        state.images.mkdir(parents=True, exist_ok=True, mode=0o700)
        await _sweep(state.images)
        progress("looking up the image", None)
        found = await _find(state, source)
        if image := load(state, found.digest, disk=True):
            return dataclasses.replace(image, reference=reference)
        await userns.check()
        userns.require("mke2fs", *(("mmdebstrap",) if isinstance(source, Debian) else ("skopeo", "umoci")))
        lock = state.images / f"{_LOCK}{found.digest.replace(':', '-')}"
        async with locks.exclusive(lock, lambda: progress("waiting for another that makes this image", None)):
            if image := load(state, found.digest, disk=True):
                return dataclasses.replace(image, reference=reference)
            async with _workdir(state.images) as work:
                config = await _make(source, found, work, progress)
                return await asyncio.to_thread(_publish, state, work, source, found, config)


async def resolve(reference: str, state: StateDir | None = None) -> str:
    """The digest of the image that a reference means, without fetching it. With `state`, a digest that is in the cache needs no registry."""
    return (await _find(state, parse(reference))).digest


def list_images(state: StateDir) -> list[Image]:
    """What is in the cache, oldest first."""
    return sorted((record.image for record in _records(state)), key=lambda image: image.created_at)


def load(state: StateDir, digest: str, *, disk: bool = False) -> Image | None:
    """An image of the cache, by digest. disk: only one that has a disk to start new machines with."""
    place = state.image(digest)
    record = _load(place)
    return record.image if record and (not disk or place.disk.is_file()) else None


async def remove_image(state: StateDir, name: str) -> None:
    """Forget an image, by digest or by the reference it was made for. That no machine needs it any more is for the caller to know."""
    digests = [image.digest for image in list_images(state) if name in (image.digest, image.reference)]
    if not digests:
        raise NotFoundError(f"no image {name!r} in the cache")
    for digest in digests:
        async with _workdir(state.images) as work:
            with contextlib.suppress(FileNotFoundError):
                state.image(digest).root.rename(work / "removed")  # at once for everybody else, also when we are killed in the middle


async def _find(state: StateDir | None, source: Source) -> skopeo.Found:
    """What a source is now."""
    if isinstance(source, Debian):
        digest = debian.digest(source, oci.architecture())
        return skopeo.Found(digest=digest, origin=digest)
    if state and isinstance(source, Registry) and source.digest:
        for record in _records(state):
            if source.digest in (record.image.digest, record.origin):
                return skopeo.Found(digest=record.image.digest, origin=record.origin)
    try:
        return await skopeo.find(source)
    except ImageError as error:
        cached = (
            [image for image in list_images(state) if image.reference == source.reference] if state and isinstance(source, Registry) else []
        )
        if cached and isinstance(source, Registry):
            # not used by itself: what a tag means is the registry's to say, and an old answer would go unnoticed
            error.hint += f" An earlier version is in the cache: {source.name}@{cached[-1].digest}."
        raise


async def _make(source: Source, found: skopeo.Found, work: Path, progress: Progress) -> ImageConfig:
    """Fill disk.raw in the work directory and leave nothing else there."""
    root = work / skopeo.TREE
    if isinstance(source, Debian):
        root.parent.mkdir()
        config = await debian.build(source, root, progress)
    else:
        layout = await skopeo.pull(source, found, work, progress)
        root, config = await skopeo.unpack(source, layout, work, progress)
        await userns.remove(layout)  # makes room for the disk
    progress("writing the disk", 0.0)
    await tree.make_disk(f"image {source.reference}", root, ImageDir(root=work).disk, progress)
    for path in work.iterdir():
        if path != ImageDir(root=work).disk:
            await userns.remove(path)
    return config


def _publish(state: StateDir, work: Path, source: Source, found: skopeo.Found, config: ImageConfig) -> Image:
    """Write the record and let the directory appear under its name; both are on the disk for good when this returns."""
    made, final = ImageDir(root=work), state.image(found.digest)
    stat = made.disk.stat()
    made.disk.chmod(0o400)  # the base of every machine's disk: a mistake must not change it
    image = Image(
        digest=found.digest,
        reference=source.reference,
        config=config,
        disk_size=stat.st_size,
        disk_used=stat.st_blocks * 512,
        created_at=time.time(),
    )
    with open(made.record, "xb") as file:
        file.write(_RECORDS.dump_json(_Record(image=image, origin=found.origin), indent=2))
        file.flush()
        os.fsync(file.fileno())
    sync(work)
    if final.root.exists():  # not readable, else we would not have made it anew
        aside = Path(tempfile.mkdtemp(prefix=_WORK, dir=state.images))
        final.root.rename(aside)
        shutil.rmtree(aside)
    work.rename(final.root)
    sync(state.images)
    return image


def _load(place: ImageDir) -> _Record | None:
    try:
        record = _RECORDS.validate_json(place.record.read_bytes())
    except (FileNotFoundError, ValidationError):  # of another version of Ramet: made again when it is needed
        return None
    return record if record.version == 1 and (record.layer or place.disk.is_file()) else None


def layer_of(state: StateDir, digest: str) -> str:
    """The layer that an image's disk was made, or empty."""
    record = _load(state.image(digest))
    return record.layer if record else ""


def set_layer(state: StateDir, digest: str, layer: str) -> None:
    """Remember what the image's disk is as a layer. NotFoundError when there is no such image."""
    record = _load(state.image(digest))
    if record is None:
        raise NotFoundError(f"no image {digest} in the cache")
    replace(state.image(digest).record, _RECORDS.dump_json(dataclasses.replace(record, layer=layer), indent=2), durable=True)


def admit(state: StateDir, image: Image, layer: str) -> None:
    """Know an image whose disk is that layer and no file. One of that digest that is known already stays as it is."""
    if load(state, image.digest):
        return
    place = state.image(image.digest)
    with guard("write", place.root):
        place.root.mkdir(mode=0o700, parents=True, exist_ok=True)
    replace(place.record, _RECORDS.dump_json(_Record(image=image, origin=image.digest, layer=layer), indent=2), durable=True)
    sync(state.images)


def layers(state: StateDir) -> set[str]:
    """Those that images with a disk of their own were made, and that are kept as long as those are."""
    records = _records(state)
    return {record.layer for record in records if record.layer and state.image(record.image.digest).disk.is_file()}


def known(state: StateDir) -> list[Image]:
    """All images of this host."""
    return [record.image for record in _records(state)]


def _records(state: StateDir) -> list[_Record]:
    places = sorted(state.images.glob("sha256-*")) if state.images.is_dir() else []
    return [record for place in places if (record := _load(ImageDir(root=place)))]


@contextlib.asynccontextmanager
async def _workdir(images: Path) -> AsyncIterator[Path]:
    """A directory that is ours while we hold its lock; whatever is left of it is removed, also when we are cancelled."""
    while True:
        path = Path(tempfile.mkdtemp(prefix=_WORK, dir=images))
        if (lock := locks.try_lock(path)) is not None:
            break
        with contextlib.suppress(OSError):  # a sweep came between the two, or somebody who only looked
            path.rmdir()
    try:
        yield path
    finally:
        cleaning = asyncio.ensure_future(userns.remove(path))
        try:
            await asyncio.shield(cleaning)
        except asyncio.CancelledError:
            await cleaning
            raise
        finally:
            os.close(lock)


async def _sweep(images: Path) -> None:
    """Remove what makers that are dead have left."""
    for path in [*images.glob(f"{_WORK}*"), *images.glob(f"{_LOCK}*")]:
        if (lock := locks.try_lock(path)) is not None:
            try:
                await userns.remove(path)
            finally:
                os.close(lock)


@contextlib.contextmanager
def _disk_errors(reference: str) -> Iterator[None]:
    """A full disk, where it was not a program that met it."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise NoSpaceError(f"image {reference}: no space left on the disk") from error
