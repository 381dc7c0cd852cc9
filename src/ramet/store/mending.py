"""What is damaged and can be fetched again, given up: then it is not here, which is no damage."""

from __future__ import annotations

import contextlib
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator

from ramet.errors import RametError
from ramet.paths import StoreDir
from ramet.store import blob, disk, eviction, garbage, index, remote, verify
from ramet.store.garbage import Records
from ramet.store.layer import PAGE, Layer
from ramet.store.remote import Remote, Want


def misplaced(files: StoreDir) -> Iterator[tuple[str, Remote | None]]:
    """Blobs that can be fetched and whose files could not hold them: a sentence each, and the record; none where that is what is damaged."""
    for path in sorted(files.remotes.glob("sha256-*")):
        digest = path.name.replace("-", ":", 1)
        try:
            found = remote.load(files, digest)
        except RametError as error:
            yield f"{error.message}. {error.hint}", None
            continue
        if found is None:  # removed meanwhile
            continue
        try:
            size = files.blob(digest).stat().st_size
        except FileNotFoundError:
            yield f"blob {digest}, which can be fetched again, has no file for that", found
        else:
            if size != found.size:
                yield f"blob {digest} has {size} bytes, and should have {found.size}; it can be fetched again", found


def place(files: StoreDir, found: Remote) -> None:
    """Have a file for a blob again, for what is fetched of it."""
    remote.change(files, found.digest, whole=False)
    remote.place(files, found.digest, found.size)


def mend(files: StoreDir, layers: Iterable[str]) -> int:
    """Give up what is damaged of the blobs that these layers need and that can be fetched again: how many frames, and seek tables."""
    records = Records(files)
    wants: dict[str, list[Want]] = defaultdict(list)
    for name in sorted(garbage.needed(records, layers)):
        if name in records and records[name].sealed:
            with contextlib.suppress(RametError):  # a table that is damaged says nothing of blobs
                for want in _frames(files, records[name]):
                    wants[want.blob].append(want)
    count = 0
    for digest in sorted(wants):
        with contextlib.suppress(RametError):  # where it is to be had is not known, or the disk fails: it stays damaged, and is named again
            count += _mend(files, digest, wants[digest])
    return count


def _frames(files: StoreDir, record: Layer) -> Iterator[Want]:
    rows = index.read(files.layer(record.id), record)
    elsewhere = {which for which, digest in enumerate(record.blobs) if remote.is_remote(files, digest)}
    for row in range(len(rows)):
        if rows.length[row] and rows.blob[row] in elsewhere:
            yield rows.want(row, record.blobs)


def _mend(files: StoreDir, digest: str, frames: list[Want]) -> int:
    path = files.blob(digest)
    found = remote.load(files, digest)
    if found is None or not path.exists():
        return 0
    spoilt = [(want.offset, want.offset + want.length) for want in frames if verify.is_spoilt(files, want)]
    if found.whole and blob.digest(path) != digest:
        remote.change(files, found.digest, whole=False)
        # What is wrong may lie where no frame is that we know: in the seek table, or in frames of layers that are not here.
        known = sorted({(want.offset, want.offset + want.length) for want in frames})
        spoilt += remote.gaps(known, found.size)
    with disk.guard("free a part of", path):
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            for begin, end in spoilt:
                eviction.punch(fd, begin, -(-end // PAGE) * PAGE if end == found.size else end)
        finally:
            os.close(fd)
    blob.files.forget(str(path))
    return len(spoilt)
