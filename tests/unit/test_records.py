"""Our reader of records against pydantic, which the server uses: both must mean the same by the same JSON."""

from __future__ import annotations

import json
from dataclasses import is_dataclass
from typing import Any, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from ramet import model, rest
from ramet.errors import DaemonError, GuestError
from ramet.model import Activity, Event, FileInfo, Machine, Spec, State
from ramet.records import dump, load

RECORDS = [kind for module in (model, rest) for kind in vars(module).values() if is_dataclass(kind) and kind is not model.Output]
RECORDS = [kind for kind in dict.fromkeys(RECORDS) if bytes not in get_type_hints(kind).values()]


@pytest.mark.parametrize("kind", RECORDS, ids=lambda kind: kind.__name__)
def test_what_is_written_is_read_the_same_by_both(kind: Any) -> None:
    @settings(max_examples=25, deadline=None)
    @given(st.from_type(kind))
    def holds(record: Any) -> None:
        wire = json.loads(json.dumps(dump(record)))
        assert repr(load(kind, wire)) == repr(record)
        assert wire == json.loads(json.dumps(TypeAdapter(kind).dump_python(record, mode="json")))
        assert repr(TypeAdapter(kind).validate_python(wire)) == repr(record)

    holds()


def test_keys_of_a_newer_daemon_are_skipped() -> None:
    assert load(Activity, {"verb": "create", "step": "image", "colour": "red"}) == Activity(verb="create", step="image")


@pytest.mark.parametrize(
    ("value", "where"),
    [
        ({"step": "x"}, "answer.verb"),
        ({"verb": 3, "step": "x"}, "answer.verb"),
        ({"verb": "x", "step": "x", "fraction": "half"}, "answer.fraction"),
        ({"verb": "x", "step": "x", "fraction": True}, "answer.fraction"),
        ([], "answer"),
        (None, "answer"),
    ],
)
def test_what_is_wrong_is_named(value: object, where: str) -> None:
    with pytest.raises(DaemonError, match=f"{where} should be"):
        load(Activity, value)


def test_places_inside_are_named() -> None:
    machine: Any = dump(Machine(id="i", name="n", state=State.RUNNING, spec=Spec(name="n"), created_at=1))
    machine["spec"]["ports"] = [{"guest": 1, "host": 2}, {"guest": "http"}]
    with pytest.raises(DaemonError, match=r"answer\.spec\.ports\[1\]\.guest should be int"):
        load(Machine, machine)
    with pytest.raises(DaemonError, match="one of creating, "):
        load(Event, {"at": 1, "kind": "state", "machine": "m", "state": "floating"})


def test_names_that_are_not_utf8_travel() -> None:
    info = FileInfo(name="caf\udce9", type=model.FileType.FILE, mode=0, uid=0, gid=0, size=0, modified_at=0, links=1)
    assert load(FileInfo, json.loads(rest.to_json(info))) == info


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from([rest.Kind.STDOUT, rest.Kind.STDERR]), st.binary(max_size=50))), st.integers(1, 60))
def test_frames_in_pieces(frames: list[tuple[rest.Kind, bytes]], size: int) -> None:
    data = b"".join(rest.frame(kind, payload) for kind, payload in frames)
    decoder = rest.Decoder()
    assert [frame for at in range(0, len(data), size) for frame in decoder.feed(data[at : at + size])] == frames


def test_large_output_is_cut_into_frames() -> None:
    data = bytes(range(256)) * 10_000
    frames = list(rest.Decoder().feed(rest.frame(rest.Kind.STDOUT, data)))
    assert b"".join(payload for _, payload in frames) == data
    assert max(len(payload) for _, payload in frames) == rest.FRAME_LIMIT


@settings(deadline=None)
@given(st.binary(max_size=100))
def test_rubbish_is_no_stream(data: bytes) -> None:
    decoder = rest.Decoder()
    try:
        for kind, payload in decoder.feed(data):
            assert kind in rest.Kind
            rest.decode(kind, payload)
    except (DaemonError, ValueError):
        pass


def test_an_error_frame_is_raised() -> None:
    with pytest.raises(GuestError, match="gone"):
        list(rest.Decoder().feed(rest.encode_error(GuestError("gone"))))
