"""Layers whose blobs are elsewhere: in a directory that stands for a registry."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from ramet.paths import StoreDir
from ramet.store import remote
from ramet.store.layer import Layer
from ramet.store.remote import Want

SOURCE = remote.Source(host="127.0.0.1:1", path="acme/shop")


def elsewhere(files: StoreDir, digest: str) -> Path:
    """Where a blob is that is not here."""
    return files.state / "elsewhere" / files.blob(digest).name


def give_away(files: StoreDir, *layers: Layer) -> list[str]:
    """Have the blobs of layers only elsewhere: here is a hole of their size. Their digests."""
    digests = sorted({digest for each in layers for digest in each.blobs})
    for digest in digests:
        there = elsewhere(files, digest)
        there.parent.mkdir(exist_ok=True)
        files.blob(digest).rename(there)
        remote.expect(files, digest, there.stat().st_size, SOURCE)
    return digests


def drop(files: StoreDir, digests: Iterable[str]) -> None:
    """Have nothing of blobs here any more."""
    for digest in digests:
        size = files.blob(digest).stat().st_size
        os.truncate(files.blob(digest), 0)
        os.truncate(files.blob(digest), size)


def bring(files: StoreDir, wants: Iterable[Want]) -> None:
    """Have frames here."""
    for want in wants:
        with open(elsewhere(files, want.blob), "rb") as there, open(files.blob(want.blob), "r+b") as here:
            os.pwrite(here.fileno(), os.pread(there.fileno(), want.length, want.offset), want.offset)
