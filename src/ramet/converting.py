"""Making an image a template: its disk becomes a layer, which can be pushed, and then started from before it is fetched."""

from __future__ import annotations

import dataclasses
import os
import re
import time

from ramet import images, pushing, saving, snapshot
from ramet import spec as specs
from ramet.errors import ExistsError, SpecError
from ramet.model import Image, Snapshot, SnapshotState, Spec
from ramet.operations import Operations
from ramet.pushing import Say
from ramet.store.layer import BASE_LAYER, Kind
from ramet.store.runs import Runs
from ramet.watch import uncut

_NAMES = re.compile(r"[^a-z0-9._/-]+")


async def convert(ops: Operations, reference: str, name: str, say: Say) -> Snapshot:
    """A template without memory of an image, which is fetched or made first where it is not here. name: by default the image's own.

    Errors as of `images.ensure`; ExistsError when the name is taken.
    """
    title = snapshot.template_name(name or _name(reference))
    if any(each.name == title for each in ops.snapshots.values()):
        raise ExistsError(f"there is a snapshot {title} already", hint="Name this one otherwise, or `ramet delete` that one.")
    image = await images.ensure(ops.state, reference, progress=say)
    async with ops.layers_in_use():
        base = await pushing.base_layer(ops, str(ops.state.image(image.digest).disk.relative_to(ops.state.root)), say)
        say("recording the snapshot", None)
        spec = _spec(image, title)
        layer = await uncut(_over, ops, base, spec.disk)
        made = Snapshot(
            id=os.urandom(6).hex(),
            name=title,
            machine="",  # it never was one
            state=SnapshotState.READY,
            created_at=time.time(),
            memory=False,
            spec=spec,
            image_digest=image.digest,
            disk_layer=layer,
            template=True,
        )
        with saving.stage(ops, made.id) as staged:
            await saving.admit(ops, made, staged)
    return made


def _name(reference: str) -> str:
    """A template's name out of an image's."""
    text = reference.removeprefix("docker://")
    if text.partition(":")[2].startswith("/"):  # oci:/path:tag
        text = text.partition(":")[2].rpartition("/")[2]
    try:
        return snapshot.template_name(text)
    except SpecError:
        return _NAMES.sub("-", text.lower()).strip("-./") or "image"


def _spec(image: Image, title: str) -> Spec:
    """Of machines that are made from it."""
    words = re.sub(r"[^a-z0-9]+", "-", re.split(r"[:@]", title.rpartition("/")[2])[0].lower()).strip("-")[:63].strip("-")
    made = specs.check(Spec(name=words or "image", image=image.reference))
    if image.disk_size > made.disk:
        made = dataclasses.replace(made, disk=image.disk_size)
    return made


def _over(ops: Operations, base: str, size: int) -> str:
    """An empty layer over the image's: of the size that disks have."""
    with ops.store.draft(Kind.DISK, size, base=f"{BASE_LAYER}{base}") as draft:
        fd = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return ops.store.publish_sealed(draft, fd, Runs.build(())).id
        finally:
            os.close(fd)
