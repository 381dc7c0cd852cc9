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
    FORK = "fork"
    SNAPSHOT = "snapshot"
    PAUSE = "pause"
    UNPAUSE = "unpause"
    HIBERNATE = "hibernate"
    RESUME = "resume"
    RESTORE = "restore"
    PARK = "park"
    CLAIM = "claim"
    UPDATE = "update"
    COMPACT = "compact"


_LIVE = frozenset({State.RUNNING, State.PAUSED})
_REST = frozenset({State.STOPPED, State.FAILED})

# operation -> the states it may begin in, the state while it works (None: it stays), the state when it is done (None: the machine is gone, or as before)
TABLE: dict[Operation, tuple[frozenset[State], State | None, State | None]] = {
    Operation.CREATE: (frozenset({State.CREATING}), State.CREATING, State.RUNNING),
    Operation.START: (_REST, State.STARTING, State.RUNNING),
    Operation.STOP: (_LIVE | {State.FAILED, State.HIBERNATED}, State.STOPPING, State.STOPPED),
    Operation.DELETE: (frozenset(State), State.DELETING, None),
    Operation.FORK: (_LIVE, None, None),
    Operation.SNAPSHOT: (_LIVE | {State.STOPPED}, None, None),
    Operation.PAUSE: (frozenset({State.RUNNING}), None, State.PAUSED),
    Operation.UNPAUSE: (frozenset({State.PAUSED}), None, State.RUNNING),
    Operation.HIBERNATE: (_LIVE, State.HIBERNATING, State.HIBERNATED),
    Operation.RESUME: (frozenset({State.HIBERNATED}), State.RESUMING, State.RUNNING),
    Operation.RESTORE: (_LIVE | _REST | {State.HIBERNATED}, State.RESTORING, State.RUNNING),
    Operation.PARK: (frozenset({State.CREATING}), State.CREATING, State.PAUSED),
    Operation.CLAIM: (frozenset({State.PAUSED}), State.RESUMING, State.RUNNING),
    Operation.UPDATE: (_LIVE | _REST | {State.HIBERNATED}, None, None),
    Operation.COMPACT: (_LIVE | {State.STOPPED}, None, None),
}

# What an interrupted operation (the daemon was killed) leaves a machine as, when its process is gone.
INTERRUPTED: dict[State, State | None] = {
    State.CREATING: State.FAILED,
    State.STARTING: State.FAILED,
    State.STOPPING: State.STOPPED,
    State.DELETING: None,
    State.HIBERNATING: State.FAILED,
    State.RESUMING: State.HIBERNATED,
    State.RESTORING: State.FAILED,
}

MAKING = frozenset({Operation.CREATE, Operation.PARK})  # their machines are not in the database yet

# What a failed operation leaves a machine as. None: as it was before, its programs running on; nothing is ended for it.
FAILED: dict[Operation, State | None] = {
    Operation.CREATE: State.FAILED,
    Operation.START: State.FAILED,
    Operation.STOP: State.FAILED,
    Operation.DELETE: State.FAILED,
    Operation.FORK: None,
    Operation.SNAPSHOT: None,
    Operation.PAUSE: None,
    Operation.UNPAUSE: None,
    Operation.HIBERNATE: None,
    Operation.RESUME: State.HIBERNATED,
    Operation.RESTORE: State.FAILED,
    Operation.PARK: State.FAILED,
    Operation.CLAIM: State.FAILED,
    Operation.UPDATE: None,
    Operation.COMPACT: None,
}

_WHAT_NEXT = {
    State.CREATING: "Wait for it, or `ramet delete` it.",
    State.STARTING: "Wait for it, or `ramet delete` it.",
    State.STOPPED: "`ramet start` starts it.",
    State.FAILED: "`ramet logs` shows why; `ramet start` tries again, `ramet restore` goes back to its last snapshot, `ramet delete` removes it.",
    State.STOPPING: "Wait for it.",
    State.DELETING: "It is going away.",
    State.RUNNING: "`ramet stop` stops it.",
    State.PAUSED: "`ramet resume` lets it go on.",
    State.HIBERNATING: "Wait for it.",
    State.HIBERNATED: "`ramet resume` lets it go on; `ramet stop` forgets its memory.",
    State.RESUMING: "Wait for it.",
    State.RESTORING: "Wait for it.",
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
    return during or state
