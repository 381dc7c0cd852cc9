"""The error tree: one code each, and over the wire and back without loss."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ramet import agentwire, errors
from ramet.errors import RametError

assert agentwire.ProtocolError  # one more of the tree


def tree(kind: type[RametError]) -> list[type[RametError]]:
    return [kind, *(each for child in kind.__subclasses__() for each in tree(child))]


KINDS = sorted(set(tree(RametError)), key=lambda kind: kind.__name__)


def test_codes_are_unique() -> None:
    codes = [kind.code for kind in KINDS if kind.__module__.startswith("ramet")]
    assert sorted(codes) == sorted(set(codes))


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back(kind: type[RametError]) -> None:
    error = kind("it failed", hint="mend it", details={"errno": "ENOENT", "n": [1]})
    again = errors.from_wire(json.loads(json.dumps(error.wire())))
    assert type(again) is kind
    assert (again.message, again.hint, again.details) == (error.message, error.hint, error.details)
    assert str(again) == "it failed"


@pytest.mark.parametrize("kind", KINDS)
def test_status_and_exit_mean_what_the_table_says(kind: type[RametError]) -> None:
    assert kind.status in (401, 404, 409, 422, 500, 503, 504, 507)
    assert kind.exit in range(1, 10)
    assert kind.exit != 2, "the CLI library's own"
    assert len({(each.status, each.exit) for each in (errors.NotFoundError, errors.ExistsError, errors.SpecError)}) == 3


@given(
    st.dictionaries(
        st.sampled_from(["code", "message", "hint", "details"]), st.none() | st.text(max_size=5) | st.integers() | st.just({"a": 1})
    )
)
def test_a_body_that_nearly_is_one(body: dict[str, Any]) -> None:
    if not isinstance(body.get("details") or {}, dict):
        body["details"] = {}
    assert isinstance(errors.from_wire(body), RametError)
