"""State x Verb: what may be done to a machine when. Pure data and pure functions."""

from __future__ import annotations

from enum import StrEnum

from ramet.errors import StateError
from ramet.model import State


class Operation(StrEnum):
    """The verbs that change a machine's state; each holds the machine while it works."""

    CREATE = "create"
    START = "start"
    STOP = "stop"
    DELETE = "delete"


# operation -> the states it may begin in, the state while it works, the state when it is done (None: the machine is gone)
TABLE: dict[Operation, tuple[frozenset[State], State, State | None]] = {
    Operation.CREATE: (frozenset({State.CREATING}), State.CREATING, State.RUNNING),
    Operation.START: (frozenset({State.STOPPED, State.FAILED}), State.STARTING, State.RUNNING),
    Operation.STOP: (frozenset({State.RUNNING, State.FAILED}), State.STOPPING, State.STOPPED),
    Operation.DELETE: (frozenset(State), State.DELETING, None),
}

# What an interrupted operation (the daemon was killed) leaves a machine as, when its process is gone.
INTERRUPTED: dict[State, State | None] = {
    State.CREATING: State.FAILED,
    State.STARTING: State.FAILED,
    State.STOPPING: State.STOPPED,
    State.DELETING: None,
}

_WHAT_NEXT = {
    State.CREATING: "Wait for it, or `ramet delete` it.",
    State.STARTING: "Wait for it, or `ramet delete` it.",
    State.STOPPED: "`ramet start` starts it.",
    State.FAILED: "`ramet logs` shows why; `ramet start` tries again, `ramet delete` removes it.",
    State.STOPPING: "Wait for it.",
    State.DELETING: "It is going away.",
    State.RUNNING: "`ramet stop` stops it.",
}


def require(name: str, state: State, wanted: frozenset[State] | set[State], verb: str) -> None:
    """Raise StateError, naming the actual and the required state, unless `state` is one of `wanted`."""
    if state not in wanted:
        required = " or ".join(sorted(wanted))
        raise StateError(
            f"cannot {verb} {name}: it is {state}, not {required}",
            hint=_WHAT_NEXT[state],
            details={"state": state, "required": sorted(wanted)},
        )


def begin(name: str, state: State, operation: Operation) -> State:
    """The state while `operation` works; StateError when it does not apply in `state`."""
    allowed, during, _ = TABLE[operation]
    require(name, state, allowed, operation)
    return during
