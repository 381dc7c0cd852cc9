"""What other hosts may read of a blob: all of one that was made here, of another what is here; and which snapshots may be asked of a registry."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ramet.bus import Bus
from ramet.engine import _in_registry
from ramet.errors import NotFoundError, SpecError
from ramet.paths import StateDir, StoreDir
from ramet.store import remote
from ramet.store.remote import Source

DIGEST = "sha256:" + "ab" * 32
BLOCK = 1 << 16  # bytes: a multiple of what any file system's holes are of


@pytest.fixture
def files(tmp_path: Path) -> StoreDir:
    state = StateDir(root=tmp_path)
    state.create()
    return state.store


def lent(files: StoreDir, offset: int = 0, length: int = -1, digest: str = DIGEST) -> bytes:
    fd, end = remote.lend(files, digest, offset, length)
    try:
        return os.pread(fd, end - offset, offset)
    finally:
        os.close(fd)


def refused(files: StoreDir, offset: int, length: int) -> bool:
    open_before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(NotFoundError, match="not here"):
        lent(files, offset, length)
    return len(list(Path("/proc/self/fd").iterdir())) == open_before


def test_a_blob_that_was_made_here(files: StoreDir) -> None:
    files.blob(DIGEST).write_bytes(b"0123456789")
    assert (lent(files), lent(files, 3, 4), lent(files, 10), lent(files, 4, 0)) == (b"0123456789", b"3456", b"", b"")
    for offset, length in ((0, 11), (11, 0), (11, -1), (9, 2)):
        assert refused(files, offset, length)


def test_of_a_blob_from_elsewhere_what_is_here(files: StoreDir) -> None:
    remote.expect(files, DIGEST, 8 * BLOCK, Source(host="ghcr.io", path="acme/shop"))
    assert refused(files, 0, -1)
    assert refused(files, 0, 1)
    data = os.urandom(2 * BLOCK)
    with open(files.blob(DIGEST), "r+b") as file:
        file.seek(3 * BLOCK)
        file.write(data)
    assert lent(files, 3 * BLOCK, 2 * BLOCK) == data
    assert lent(files, 4 * BLOCK + 5, 10) == data[BLOCK + 5 : BLOCK + 15]
    for offset, length in ((3 * BLOCK - 1, 2), (5 * BLOCK - 1, 2), (0, 8 * BLOCK), (6 * BLOCK, 1)):
        assert refused(files, offset, length)


def test_one_that_is_not_known(files: StoreDir) -> None:
    assert refused(files, 0, 1)
    (files.root / "secret").write_text("secret")
    for name in ("", "sha256:..", "../secret", "sha256:" + "AB" * 32, DIGEST + "\n", "sha512:" + "ab" * 32):
        with pytest.raises(SpecError, match="no blob's digest"):
            lent(files, digest=name)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("ghcr.io/acme/shop:1", True),
        ("127.0.0.1:5000/shop", True),
        ("docker://localhost/shop:1", True),
        ("acme/shop:1", True),
        (f"ghcr.io/shop@{DIGEST}", True),
        ("shop:1", False),
        ("shop@warm", False),
        ("acme/shop@4f2a", False),
        ("oci:/images/shop:1", False),
        ("debian:bookworm", False),
        ("../shop", False),
    ],
)
def test_what_may_be_asked_of_a_registry(name: str, wanted: bool) -> None:
    assert _in_registry(name) is wanted


async def test_small_steps_are_not_told() -> None:
    bus = Bus()
    events = bus.subscribe("ghcr.io/acme/shop:1")
    say = bus.teller("push", "ghcr.io/acme/shop:1")
    for step, fraction in (("packing", None), ("packing", None), ("sending", 0.0), ("sending", 0.005), ("sending", 0.02), ("sending", 1.0)):
        say(step, fraction)
    told = [(await anext(events)).activity for _ in range(5)]
    assert [(each.verb, each.step, each.fraction) for each in told if each] == [
        ("push", "packing", None),
        ("push", "packing", None),
        ("push", "sending", 0.0),
        ("push", "sending", 0.02),
        ("push", "sending", 1.0),
    ]
