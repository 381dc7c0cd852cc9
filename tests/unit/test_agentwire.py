"""The agent's protocol as bytes: golden frames, round trips, and a guest that sends whatever it likes."""

from __future__ import annotations

import contextlib
import itertools
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ramet import agentwire as wire
from ramet.agentwire import Decoder, EndKind, Kind, Op, OpenFlag, ProtocolError, Tag
from ramet.errors import GuestError
from ramet.model import FileType

NONCE = bytes(range(1, 17))
HELLO = wire.frame(Kind.SYNC, 0, NONCE + struct.pack("<I", 2) + b"B" * 16 + b"0.1.0")
SLACK = 1 << 16  # what one read brings


def synced() -> Decoder:
    decoder = Decoder(NONCE)
    assert [frame.kind for frame in decoder.feed(HELLO)] == [Kind.SYNC]
    return decoder


# --- golden bytes: agent/PROTOCOL.md is the other end's text, so these change with its version only ---


@pytest.mark.parametrize(
    ("made", "golden"),
    [
        (wire.frame(Kind.SYNC, 0, NONCE), "01000000 00000000 10000000 0102030405060708090a0b0c0d0e0f10"),
        (wire.open_frames(7, Op.PING, 0, ()), "02000000 07000000 04000000 0100 0000"),
        (
            wire.open_frames(1, Op.EXEC, OpenFlag.PTY | OpenFlag.STDIN, [wire.param(Tag.ARG, "sh"), wire.param(Tag.ROWS, 24)]),
            "02000000 01000000 1a000000 0200 0500  0100 0000 02000000 7368  0600 0000 04000000 18000000",
        ),
        (wire.frame(Kind.DATA, 3, b"hi"), "03000000 03000000 02000000 6869"),
        (wire.frame(Kind.DATA, 3, b"hi", 2), "03020000 03000000 02000000 6869"),
        (wire.frame(Kind.EOF, 3), "04000000 03000000 00000000"),
        (wire.credit(3, 1, 65536), "05010000 03000000 04000000 00000100"),
        (wire.frame(Kind.CLOSE, 3), "06000000 03000000 00000000"),
        (wire.param(Tag.TIMEOUT, 1500), "0500 0000 08000000 dc05000000000000"),
        (wire.param(Tag.GRACE, 1), "0d00 0000 08000000 0100000000000000"),
        (wire.open_frames(7, Op.QUIESCE, 0, ()), "02000000 07000000 04000000 0b00 0000"),
        (wire.open_frames(7, Op.RESUME, 0, ()), "02000000 07000000 04000000 0c00 0000"),
        (
            wire.open_frames(1, Op.IDENTIFY, 0, [wire.param(Tag.TIME, 1 << 56), wire.param(Tag.ENTROPY, b"\0\1")]),
            "02000000 01000000 1e000000 0d00 0000  0e00 0000 08000000 0000000000000001  0f00 0000 02000000 0001",
        ),
        (wire.param(Tag.HOSTNAME, "a"), "1000 0000 01000000 61"),
        (wire.param(Tag.MACHINE_ID, "b"), "1100 0000 01000000 62"),
        (wire.param(Tag.GENERATION, "c"), "1200 0000 01000000 63"),
        (wire.param(Tag.PROCESS, 258), "0800 0000 04000000 02010000"),
        (wire.param(Tag.ENV, "A=\udcff"), "0200 0000 03000000 413dff"),
    ],
)
def test_golden_bytes(made: bytes, golden: str) -> None:
    assert made == bytes.fromhex(golden)


def test_golden_answers() -> None:
    assert wire.parse_sync(HELLO[12:]) == (b"B" * 16, "0.1.0")
    assert wire.parse_pair(bytes.fromhex("05000000 39050000")) == (5, 1337)
    assert wire.parse_end(bytes.fromhex("01000000 09000000")) == wire.End(EndKind.SIGNALED, 9, "")
    assert wire.parse_end(bytes.fromhex("02000000 02000000") + b"no such file: /x") == wire.End(EndKind.FAILED, 2, "no such file: /x")
    assert wire.parse_end(bytes.fromhex("00000000 ffffffff")).code == -1
    assert wire.parse_credit(bytes.fromhex("00000100")) == 65536


def test_long_parameters_are_cut_into_frames_with_more() -> None:
    params = [wire.param(Tag.ARG, "x" * 40000), wire.param(Tag.ARG, "y" * 40000)]
    data = wire.open_frames(9, Op.EXEC, 0, params)
    frames = list(parse_host(data))
    assert [(kind, flags, stream) for kind, flags, stream, _ in frames] == [(2, 1, 9), (2, 1, 9), (2, 0, 9)]
    assert b"".join(payload for *_, payload in frames) == struct.pack("<HH", Op.EXEC, 0) + b"".join(params)
    assert max(len(payload) for *_, payload in frames) == wire.MAX_PAYLOAD


def parse_host(data: bytes) -> list[tuple[int, int, int, bytes]]:
    """The frames that the host sent."""
    found = []
    while data:
        kind, flags, zero, stream, length = wire.HEADER.unpack_from(data)
        assert zero == 0
        found.append((kind, flags, stream, data[12 : 12 + length]))
        data = data[12 + length :]
    return found


def test_too_many_parameters_are_refused_before_they_are_sent() -> None:
    fits = [wire.param(Tag.ARG, "x" * (wire.MAX_PARAMS - 8))]
    assert wire.open_frames(1, Op.EXEC, 0, fits)
    with pytest.raises(GuestError, match=r"the command is too long: 26214\d bytes") as caught:
        wire.open_frames(1, Op.EXEC, 0, [*fits, b"x"])
    assert "file" in caught.value.hint


# --- the decoder ---

frames_of_guests = st.lists(
    st.builds(
        wire.Frame,
        st.sampled_from([Kind.DATA, Kind.EOF, Kind.CREDIT, Kind.STARTED, Kind.END]),
        st.integers(0, 255),
        st.integers(0, 2**32 - 1),
        st.binary(max_size=300) | st.just(b"x" * wire.MAX_PAYLOAD),
    ),
    max_size=12,
)


def cut(data: bytes, at: list[int]) -> list[bytes]:
    edges = [0, *sorted({point % (len(data) + 1) for point in at}), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(edges)]


@given(frames_of_guests, st.lists(st.integers(0, 1 << 20), max_size=20), st.integers(0, 40))
def test_frames_come_out_as_they_went_in_however_they_are_cut(frames: list[wire.Frame], at: list[int], padding: int) -> None:
    data = HELLO + b"".join(bytes(padding) + wire.frame(f.kind, f.stream, f.payload, f.flags) for f in frames)
    decoder = Decoder(NONCE)
    got = [frame for piece in cut(data, at) for frame in decoder.feed(piece)]
    assert [frame.kind for frame in got[:1]] == [Kind.SYNC]
    assert got[1:] == frames


@given(st.binary(max_size=400).filter(lambda data: NONCE not in data), st.lists(st.integers(0, 1000), max_size=8))
def test_whatever_came_before_the_answer_is_dropped(junk: bytes, at: list[int]) -> None:
    decoder = Decoder(NONCE)
    got = [frame for piece in cut(junk + HELLO, at) for frame in decoder.feed(piece)]
    assert [(frame.kind, frame.payload) for frame in got] == [(Kind.SYNC, HELLO[12:])]


@given(st.lists(st.binary(max_size=200), max_size=20))
@settings(max_examples=300)
def test_hostile_bytes_end_in_a_protocol_error_or_in_frames(pieces: list[bytes]) -> None:
    decoder = synced()
    try:
        for piece in pieces:
            for frame in decoder.feed(piece):
                assert len(frame.payload) <= wire.MAX_PAYLOAD
    except ProtocolError:
        pass


headers = st.builds(
    wire.HEADER.pack, st.integers(0, 255), st.integers(0, 255), st.integers(0, 65535), st.integers(0, 9), st.integers(0, 2**32 - 1)
)


@given(headers, st.binary(max_size=64))
def test_only_valid_headers_pass(header: bytes, rest: bytes) -> None:
    kind, _, zero, _, length = wire.HEADER.unpack(header)
    valid = 1 <= kind <= 8 and zero == 0 and length <= wire.MAX_PAYLOAD
    if kind == 0:
        return  # padding: what follows is the header
    decoder = synced()
    if valid:
        assert len(list(decoder.feed(header + rest[:length]))) == (length <= len(rest))
    else:
        with pytest.raises(ProtocolError, match="invalid frame header"):
            list(decoder.feed(header + rest))


@given(st.lists(st.binary(min_size=1, max_size=3000), max_size=60), st.booleans())
def test_it_never_holds_more_than_a_frame(pieces: list[bytes], ready: bool) -> None:
    decoder = synced() if ready else Decoder(NONCE)
    try:
        for piece in pieces:
            list(decoder.feed(piece))
            assert len(decoder._buffer) < wire.MAX_FRAME
    except ProtocolError:
        pass


def test_a_flood_before_the_answer_is_not_kept() -> None:
    decoder = Decoder(NONCE)
    for _ in range(200):
        assert list(decoder.feed(b"\xaa" * SLACK)) == []
        assert len(decoder._buffer) <= 64
    for _ in range(200):
        assert list(decoder.feed(bytes(SLACK))) == []
    assert [frame.kind for frame in decoder.feed(HELLO)] == [Kind.SYNC]


def test_the_longest_frame_passes_and_one_byte_more_does_not() -> None:
    decoder = synced()
    payload = b"z" * wire.MAX_PAYLOAD
    assert [frame.payload for frame in decoder.feed(wire.frame(Kind.DATA, 1, payload, 1))] == [payload]
    with pytest.raises(ProtocolError):
        list(decoder.feed(wire.HEADER.pack(Kind.DATA, 1, 0, 1, wire.MAX_PAYLOAD + 1)))


def test_our_nonce_in_anything_but_a_sync_is_an_error() -> None:
    with pytest.raises(ProtocolError, match="answered SYNC with something else"):
        list(Decoder(NONCE).feed(wire.frame(Kind.DATA, 1, NONCE, 1)))


# --- payloads ---


@given(st.binary(max_size=400))
def test_payloads_are_parsed_or_refused(data: bytes) -> None:
    for parse in (
        wire.parse_sync,
        wire.parse_end,
        wire.parse_pair,
        wire.parse_credit,
        wire.parse_files,
        wire.parse_processes,
        wire.parse_metrics,
        wire.parse_hook,
    ):
        with contextlib.suppress(ProtocolError):
            parse(data)


FIELDS = st.one_of(
    st.integers(-(10**30), 10**30).map(str), st.sampled_from(["f", "d", "running", "0", "1e400", "nan", "-", "٣"]), st.text(max_size=6)
)


@given(st.lists(st.lists(FIELDS, min_size=7, max_size=9).map(" ".join), max_size=6))
def test_records_that_nearly_are_ones(records: list[str]) -> None:
    data = "".join(f"{record}\0second\0" for record in records).encode(errors="surrogatepass")
    for parse in (wire.parse_files, wire.parse_processes):
        with contextlib.suppress(ProtocolError):
            parse(data)


@given(st.text(max_size=100))
def test_what_people_read_drives_no_terminal(text: str) -> None:
    shown = wire.printable(text.encode(errors="surrogatepass"))
    assert all(character.isprintable() or character in "\n\t" for character in shown)


names = st.binary(min_size=1, max_size=40).filter(lambda name: b"\0" not in name)


@given(names, st.integers(0, 0o7777), st.integers(0, 2**63 - 1), st.binary(max_size=40).filter(lambda data: b"\0" not in data))
def test_file_records_round_trip(name: bytes, mode: int, size: int, target: bytes) -> None:
    (found,) = wire.parse_files(b"l %o 1 2 %d 1500000000 3 %s\0%s\0" % (mode, size, name, target))
    assert (found.name.encode(errors="surrogateescape"), found.mode, found.uid, found.gid, found.size) == (name, mode, 1, 2, size)
    assert (found.type, found.modified_at, found.links, found.target.encode(errors="surrogateescape")) == (FileType.LINK, 1.5, 3, target)


def test_process_records() -> None:
    first, second = wire.parse_processes(b"1 40 running 0 1700000000123 1 0 my label\0sleep 60\0" + b"2 41 signaled 9 0 0 1 \0\x1b[31mrm\0")
    assert (first.id, first.pid, first.state, first.started_at, first.detached, first.attached) == (
        1,
        40,
        "running",
        1700000000.123,
        True,
        False,
    )
    assert (first.label, first.command) == ("my label", "sleep 60")
    assert (second.code, second.label, second.attached, second.command) == (9, "", True, "\ufffd[31mrm")
    with pytest.raises(ProtocolError):
        wire.parse_processes(b"1 40 dancing 0 0 1 0 x\0y\0")
    with pytest.raises(ProtocolError, match="unfinished"):
        wire.parse_processes(b"1 40 running 0 0 1 0 x\0y")


def test_metrics() -> None:
    assert wire.parse_metrics(b"uptime_ms 5\nload1 0.25\n") == {"uptime_ms": 5.0, "load1": 0.25}
    for value in (b"five", b"nan", b"inf", b"-inf", b"1e999", b""):  # JSON has no words for the ones that Python reads as numbers
        with pytest.raises(ProtocolError):
            wire.parse_metrics(b"uptime_ms %s\n" % value)


def test_another_protocol_version_says_what_to_do() -> None:
    with pytest.raises(ProtocolError, match="speaks protocol 1, not 2") as caught:
        wire.parse_sync(NONCE + struct.pack("<I", 1) + b"B" * 16)
    assert "Stop and start" in caught.value.hint


def test_a_failed_hook() -> None:
    assert wire.parse_hook(b"3 ended with status 3: /etc/ramet/fork.d/10-keys\n") == ("10-keys", "ended with status 3", "")
    said = b"first\nno newline at its end137 was killed by signal 9: /etc/ramet/fork.d/b: c\n"
    _, what, before = wire.parse_hook(said)
    assert (what, before.splitlines()[0]) == ("was killed by signal 9", "first")
    for nonsense in (b"", b"3 ended: /etc/passwd\n", b"ended: /etc/ramet/fork.d/x\n", b"3 ended: /etc/ramet/fork.d/x"):
        with pytest.raises(ProtocolError, match="which hook"):
            wire.parse_hook(nonsense)


outputs = st.binary(max_size=200)


@given(
    outputs,
    st.integers(1, 255),
    st.text(st.characters(codec="ascii", exclude_characters="\0\n/:"), min_size=1, max_size=30).filter(str.isprintable),
)
def test_a_failed_hook_is_found_behind_whatever_it_wrote(output: bytes, status: int, name: str) -> None:
    line = f"{status} ended with status {status}: {wire.HOOKS}/{name}\n".encode()
    found, what, before = wire.parse_hook(output + line)
    assert (found, what) == (name, f"ended with status {status}")
    assert wire.printable(output).startswith(before.rstrip("0123456789"))
