"""Frozen records of what is kept: layers, and what goes to registries, comes from them, and is given up again. Sizes are bytes, times seconds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LayerInfo:
    """An immutable difference of a disk or a memory against its parent. size: of the whole in bytes; data, zero: what this layer itself holds;
    stored: bytes on the host's disk, compressed once sealed; chain: the layers that its pages come from, itself last. used_by: machines and snapshots.
    absent: bytes of its blobs that are still only in a registry."""

    id: str
    kind: str
    size: int
    parent: str
    chain: tuple[str, ...]
    sealed: bool
    blobs: tuple[str, ...]
    data: int
    zero: int
    stored: int
    created_at: float
    used_by: tuple[str, ...] = ()
    absent: int = 0


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """What a push or a pull did. digest: of the manifest; snapshot: the name of the one here. size: of all that the artifact is made of;
    moved: of that, what went over the line now; shared: what was there already. The rest of a lazy pull comes when it is needed, and in the background."""

    reference: str
    digest: str
    snapshot: str
    size: int
    moved: int
    shared: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Collected:
    """What a collection removed, or would. layers, blobs: those that nothing needed; evicted: bytes of chunks that a registry has too; bytes: all together.

    stored: bytes that layers take afterwards. postponed: why something stays that perhaps need not, a sentence each.
    """

    layers: tuple[str, ...] = ()
    blobs: tuple[str, ...] = ()
    evicted: int = 0
    bytes: int = 0
    stored: int = 0
    postponed: tuple[str, ...] = ()
