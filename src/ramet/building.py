"""`ramet build`: what a ramet.toml describes, as a template that others start from, here and from a registry. Needs no daemon.

A build is known by its key: the definition, the image's digest, Ramet's version. Where this host or a cache in a registry has a template of that
key, nothing is built.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ramet import __version__, images
from ramet.errors import ImageError, LayerError, NotFoundError, SpecError, TimeoutExpiredError
from ramet.model import Snapshot, SnapshotState, Spec
from ramet.records import dump
from ramet.reference import Registry, parse
from ramet.verbs import Verbs

_PREFIX = "build-"
_PROVED = 3600.0  # seconds for a snapshot to be compressed and started once
_GLANCE = 0.25

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Built:
    """snapshot: the template's name here. cached: where it came from, empty when it was built now. pushed: REGISTRY/NAME@DIGEST of each."""

    snapshot: str
    key: str
    cached: str
    pushed: tuple[str, ...] = ()


def key(spec: Spec, digest: str, *, memory: bool) -> str:
    """12 hex digits. digest: of the image that the spec names now. The machine's name and the ports of this host are no part of it."""
    plain = dataclasses.replace(spec, name="", ports=tuple(dataclasses.replace(each, host=0) for each in spec.ports))
    text = json.dumps([__version__, digest, memory, dump(plain)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def repository(reference: str) -> str:
    """REGISTRY/NAME of a reference, for tags of our own. SpecError when it is in no registry."""
    source = parse(reference)
    if not isinstance(source, Registry) or source.digest:
        raise SpecError(f"{reference!r} is no place in a registry", hint="Write REGISTRY/NAME or REGISTRY/NAME:TAG.")
    return source.name


async def build(
    verbs: Verbs, spec: Spec, *, push: Sequence[str] = (), caches: Sequence[str] = (), memory: bool = True, say: Say = lambda text: None
) -> Built:
    """Build, or find, the template of a spec, and push it. push, caches: references; a push also leaves its repository as a cache for the next build."""
    places = [repository(each) for each in push]
    found = key(spec, await images.resolve(spec.image), memory=memory)
    name = f"{spec.name}:{_PREFIX}{found}"
    cached = "this host" if await _known(verbs, name) else ""
    if not cached:
        for place in dict.fromkeys([*map(repository, caches), *places]):
            tag = f"{place}:{_PREFIX}{found}"
            if await _pulled(verbs, tag, say):
                cached, name = tag, tag
                break
    if not cached:
        await _make(verbs, spec, name, memory=memory, say=say)
    sent = []
    for reference, place in zip(push, places, strict=True):
        say(f"pushing {reference}")
        sent.append(f"{place}@{(await verbs.push(name, reference)).digest}")
    for place in dict.fromkeys(places):
        await verbs.push(name, f"{place}:{_PREFIX}{found}")
    return Built(snapshot=name, key=found, cached=cached, pushed=tuple(sent))


async def _known(verbs: Verbs, name: str) -> bool:
    try:
        return (await verbs.get_snapshot(name)).state is not SnapshotState.BROKEN
    except NotFoundError:
        return False


async def _pulled(verbs: Verbs, tag: str, say: Say) -> bool:
    """Whether a registry has it. That a cache cannot be asked must not fail a build."""
    try:
        await verbs.pull(tag, lazy=True)
    except ImageError as error:
        say(f"not in the cache: {error.message}")
        return False
    return True


async def _make(verbs: Verbs, spec: Spec, name: str, *, memory: bool, say: Say) -> None:
    """A machine of the spec, saved when its commands have run, and removed."""
    builder = f"{_PREFIX}{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    await _remove(verbs, builder)  # of a build that was cut off
    say(f"building {name}")
    try:
        await verbs.create(dataclasses.replace(spec, name=builder, ports=tuple(dataclasses.replace(each, host=0) for each in spec.ports)))
        made = await verbs.snapshot(builder, "built", memory=memory)
        say("proving that it starts")
        proved = await _ready(verbs, made)
        await verbs.template(proved.id, label=name)
    finally:
        await _remove(verbs, builder)


async def _remove(verbs: Verbs, builder: str) -> None:
    with contextlib.suppress(NotFoundError):
        await verbs.delete(builder)


async def _ready(verbs: Verbs, made: Snapshot) -> Snapshot:
    """When it is compressed and was started once. There is no event for this."""
    try:
        async with asyncio.timeout(_PROVED):
            while True:
                found = await verbs.get_snapshot(made.id)
                if found.state not in (SnapshotState.SAVING, SnapshotState.TESTING):
                    break
                await asyncio.sleep(_GLANCE)
    except TimeoutError:
        raise TimeoutExpiredError(f"{made.title} was not ready within {_PROVED:.0f} s") from None
    if found.state is SnapshotState.BROKEN:
        raise LayerError(f"what was built does not start: {found.reason}")
    return found
