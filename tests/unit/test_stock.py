"""What of a blob is here, against files with holes of any kind."""

from __future__ import annotations

import hashlib
import os
import random
from array import array
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ramet.paths import StateDir, StoreDir
from ramet.store import remote, stock
from ramet.store.index import MARK
from ramet.store.remote import Source, Want
from ramet.store.stock import Table


def blob(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def mark(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()[:MARK]


def table(data: bytes, spans: list[tuple[int, int]]) -> Table:
    return Table(
        blob=digest(data),
        offset=array("Q", (begin for begin, _ in spans)),
        length=array("I", (end - begin for begin, end in spans)),
        marks=b"".join(mark(data[begin:end]) for begin, end in spans),
    )


@pytest.fixture
def files(tmp_path: Path) -> StoreDir:
    state = StateDir(root=tmp_path)
    state.create()
    return state.store


def write(files: StoreDir, data: bytes, spans: list[tuple[int, int]]) -> None:
    remote.expect(files, digest(data), len(data), Source(host="localhost", path="x"))
    with open(files.blob(digest(data)), "r+b") as file:
        for begin, end in spans:
            file.seek(begin)
            file.write(data[begin:end])


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    st.lists(st.integers(1, 100_000), min_size=1, max_size=30),
    st.lists(st.booleans(), min_size=30, max_size=30),
    st.lists(st.booleans(), min_size=30, max_size=30),
    st.integers(0, 1 << 30),
)
def test_fetching_what_is_missing_makes_the_blob_whole(
    files: StoreDir, lengths: list[int], framed: list[bool], there: list[bool], seed: int
) -> None:
    data = blob(sum(lengths), seed)
    spans = []
    at = 0
    for length in lengths:
        spans.append((at, at + length))
        at += length
    frames = [span for span, is_frame in zip(spans, framed, strict=False) if is_frame]
    have = [span for span, is_there in zip(spans, there, strict=False) if is_there]
    write(files, data, have)
    known = table(data, frames)
    found = stock.missing(files, len(data), known)
    missing = list(found)
    assert found.size == sum(want.length for want in missing)
    assert not {(want.offset, want.offset + want.length) for want in missing if want.mark}.intersection(have)
    write(files, data, [(want.offset, want.offset + want.length) for want in missing])
    assert files.blob(digest(data)).read_bytes() == data
    assert all(not want.mark for want in stock.missing(files, len(data), known))
    assert stock.settle(files, digest(data))
    files.blob(digest(data)).unlink()


def test_large_parts_without_frames_that_are_here_are_not_fetched_again(files: StoreDir) -> None:
    data = blob(5 << 20)
    write(files, data, [(0, 3 << 20)])
    missing = list(stock.missing(files, len(data), table(data, [])))
    assert sum(want.length for want in missing) == 2 << 20
    assert all(want.length <= 1 << 20 for want in missing)


def test_only_what_matches_is_written(files: StoreDir) -> None:
    data = blob(300_000)
    spans = [(1000, 50_000), (50_000, 90_000), (90_000, 91_000), (200_000, 300_000)]
    known = table(data, spans)
    write(files, data, [])
    wants = [known.want(row) for row in range(4)]
    came = bytearray(data)
    came[50_001] ^= 1
    fd = os.open(files.blob(digest(data)), os.O_RDWR)
    try:
        good = stock.land(fd, wants, 1000, memoryview(came)[1000:])
        assert good == [wants[0], wants[2], wants[3]]
        assert [stock.is_here(fd, want) for want in wants] == [True, False, True, True]
        assert os.pread(fd, 40_000, 50_000) == bytes(40_000)
        assert not stock.is_here(fd, Want(blob=digest(data), offset=299_999, length=10, mark=wants[0].mark))
    finally:
        os.close(fd)


def test_a_blob_with_a_wrong_byte_is_not_whole(files: StoreDir) -> None:
    data = blob(10_000)
    write(files, data, [(0, 10_000)])
    with open(files.blob(digest(data)), "r+b") as file:
        file.write(bytes([data[0] ^ 1]))
    assert not stock.settle(files, digest(data))
    found = remote.load(files, digest(data))
    assert found
    assert not found.whole
