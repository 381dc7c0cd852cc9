"""Who may begin to take the host's memory, as sums."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ramet import capacity
from ramet.capacity import BOOTING, GOING_ON, OVERHEAD, Claim, Room, check, claim, limit, overcommit, wanted
from ramet.db import Record
from ramet.errors import DaemonError, NoCapacityError, SpecError
from ramet.lifecycle import TABLE, Operation
from ramet.model import Spec, State

GIB, MIB = 1 << 30, 1 << 20
SPEC = Spec(name="web", memory=512 * MIB)
WEB = Record(id="1", name="web", state=State.RUNNING, spec=SPEC, created_at=1.0)
ROOM = Room(total=8 * GIB, available=4 * GIB, overcommit=2.0)
HOLDING = set(State) - {State.STOPPED, State.FAILED, State.HIBERNATED, State.DELETING}


def of(state: State, **changes: object) -> Record:
    return dataclasses.replace(WEB, state=state, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("state", State)
def test_who_holds_memory(state: State) -> None:
    held = claim(of(state), None, alive=state in HOLDING)
    assert held == (Claim(memory=512 * MIB + OVERHEAD) if state in HOLDING else None)


def test_a_failed_machine_whose_qemu_lives_holds_its_memory() -> None:
    assert claim(of(State.FAILED), None, alive=True) == Claim(memory=512 * MIB + OVERHEAD)


def test_a_limit_counts_and_so_does_what_a_guest_took_beyond_it() -> None:
    limited = of(State.RUNNING, memory_limit=128 * MIB)
    assert claim(limited, None, alive=True) == Claim(memory=128 * MIB + OVERHEAD)
    assert claim(limited, None, alive=True, granted=200 * MIB) == Claim(memory=200 * MIB + OVERHEAD)
    assert claim(limited, None, alive=True, granted=128 * MIB) == Claim(memory=128 * MIB + OVERHEAD)


@pytest.mark.parametrize(
    ("state", "operation", "at_once"),
    [
        (State.CREATING, Operation.CREATE, BOOTING),
        (State.STOPPED, Operation.START, BOOTING),
        (State.FAILED, Operation.START, BOOTING),
        (State.HIBERNATED, Operation.RESUME, GOING_ON),
        (State.STOPPED, Operation.RESTORE, GOING_ON),
        (State.CREATING, Operation.PARK, GOING_ON),
    ],
)
def test_what_starts_takes(state: State, operation: Operation, at_once: int) -> None:
    expected = Claim(memory=512 * MIB + OVERHEAD, at_once=at_once)
    assert wanted(of(state), operation, alive=False) == expected
    assert claim(of(state), operation, alive=False) == expected, "one that is under way holds it already"


def test_a_child_takes_less_at_once_than_a_boot() -> None:
    child = wanted(of(State.CREATING, memory_layer="00000000000000aa"), Operation.CREATE, alive=False)
    assert child
    assert child.at_once == GOING_ON


def test_what_has_its_memory_asks_for_none() -> None:
    starting = {Operation.CREATE, Operation.START, Operation.RESUME, Operation.RESTORE, Operation.PARK}
    for operation, (states, _, _) in TABLE.items():
        for state in states:
            new = wanted(of(state), operation, alive=state in HOLDING)
            assert bool(new) is (operation in starting and state not in (State.RUNNING, State.PAUSED)), (operation, state)


def test_the_promise_is_refused_beyond_the_ratio() -> None:
    one = Claim(memory=2 * GIB)
    assert ROOM.promisable == 16 * GIB - 256 * MIB
    check("web", one, [one] * 6, ROOM)
    with pytest.raises(NoCapacityError) as caught:
        check("web", one, [one] * 7, ROOM)
    error = caught.value
    assert (error.status, error.code) == (503, "no_capacity")
    assert error.details == {"retry_after": 30, "committed": 14 * GIB, "capacity": ROOM.promisable, "wanted": 2 * GIB}
    assert "ramet hibernate" in error.hint
    assert "RAMET_OVERCOMMIT" in error.hint


def test_starts_under_way_count_against_what_is_available_now() -> None:
    room = Room(total=8 * GIB, available=256 * MIB + 2 * BOOTING, overcommit=100.0)
    booting = Claim(memory=GIB, at_once=BOOTING)
    settled = Claim(memory=GIB)
    check("web", booting, [settled] * 20 + [booting], room)
    with pytest.raises(NoCapacityError, match="its start takes 160 MiB at once, and 0 B of the host's memory is free"):
        check("web", booting, [settled, booting, booting], room)


@given(
    st.lists(st.integers(0, 8 * GIB), max_size=50), st.integers(1, 64 * GIB), st.floats(0.01, 100, allow_nan=False), st.integers(1, 8 * GIB)
)
def test_never_more_is_promised_than_there_is(asked: list[int], total: int, ratio: float, size: int) -> None:
    room = Room(total=total, available=total, overcommit=ratio)
    admitted: list[Claim] = []
    for memory in [*asked, size]:
        try:
            check("m", Claim(memory=memory), admitted, room)
        except NoCapacityError:
            assert sum(each.memory for each in admitted) + memory > room.promisable
        else:
            admitted.append(Claim(memory=memory))
    assert sum(each.memory for each in admitted) <= room.promisable


def test_the_ratio_is_set_from_outside() -> None:
    assert overcommit({}) == overcommit({"RAMET_OVERCOMMIT": ""}) == capacity.OVERCOMMIT
    assert overcommit({"RAMET_OVERCOMMIT": "1.5"}) == 1.5
    for wrong in ("zero", "0", "-1", "nan", "inf", "1e9"):
        with pytest.raises(DaemonError, match="RAMET_OVERCOMMIT"):
            overcommit({"RAMET_OVERCOMMIT": wrong})


def test_limits_are_whole_mebibytes_within_what_there_is() -> None:
    assert limit(SPEC, 0) == limit(SPEC, 512 * MIB) == 0
    assert limit(SPEC, 64 * MIB) == 64 * MIB
    assert limit(SPEC, 128 * MIB + 5) == 128 * MIB
    for wrong in (1, 64 * MIB - 1, 512 * MIB + 1, GIB, -1):
        with pytest.raises(SpecError, match=r"is not within 64 MiB and 512 MiB"):
            limit(SPEC, wrong)
