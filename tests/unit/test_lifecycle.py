"""State x Verb, row by row."""

from __future__ import annotations

import pytest

from ramet import lifecycle
from ramet.errors import StateError
from ramet.lifecycle import INTERRUPTED, TABLE, Operation
from ramet.model import State

LIVE = {State.RUNNING, State.PAUSED}
REST = {State.STOPPED, State.FAILED}
ALLOWED = {
    Operation.CREATE: {State.CREATING},
    Operation.START: REST,
    Operation.STOP: LIVE | {State.FAILED, State.HIBERNATED},
    Operation.DELETE: set(State),
    Operation.FORK: LIVE,
    Operation.SNAPSHOT: LIVE | {State.STOPPED},
    Operation.PAUSE: {State.RUNNING},
    Operation.UNPAUSE: {State.PAUSED},
    Operation.HIBERNATE: LIVE,
    Operation.RESUME: {State.HIBERNATED},
    Operation.RESTORE: LIVE | REST | {State.HIBERNATED},
    Operation.PARK: {State.CREATING},
    Operation.CLAIM: {State.PAUSED},
    Operation.UPDATE: LIVE | REST | {State.HIBERNATED},
    Operation.COMPACT: LIVE | {State.STOPPED},
}


@pytest.mark.parametrize("operation", Operation)
@pytest.mark.parametrize("state", State)
def test_every_pair_of_state_and_operation(state: State, operation: Operation) -> None:
    if state in ALLOWED[operation]:
        assert lifecycle.begin("web", state, operation) is (TABLE[operation][1] or state)
        return
    with pytest.raises(StateError) as caught:
        lifecycle.begin("web", state, operation)
    error = caught.value
    assert error.message.startswith(f"cannot {operation} web: it is {state}, not ")
    assert all(required in error.message for required in ALLOWED[operation])
    assert error.details == {"state": state, "required": sorted(ALLOWED[operation])}
    assert error.hint


def test_operations_end_in_a_state_of_rest() -> None:
    during = {row[1] for row in TABLE.values() if row[1]}
    assert {row[2] for row in TABLE.values()} == {State.RUNNING, State.STOPPED, State.PAUSED, State.HIBERNATED, None}
    assert during == set(INTERRUPTED), "a daemon that was killed leaves machines in these states, so each needs a way out"
    assert during.isdisjoint({after for after in INTERRUPTED.values() if after})


def test_what_does_not_change_the_state_ends_nothing_when_it_fails() -> None:
    assert lifecycle.FAILED.keys() == TABLE.keys()
    for operation, (_, during, _) in TABLE.items():
        if during is None:
            assert lifecycle.FAILED[operation] is None


def test_whatever_happens_a_machine_can_be_deleted() -> None:
    assert TABLE[Operation.DELETE][0] == set(State)


def test_a_failed_machine_can_be_started_again() -> None:
    assert State.FAILED in TABLE[Operation.START][0]
