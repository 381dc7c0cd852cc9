"""One error tree. The API's status, the CLI's exit code and the SDK's exception all come from the class.

Exit codes: 1 unexpected, 2 usage (the CLI library's own), 3 not there, 4 not now (state, busy, exists), 5 bad input, 6 the host lacks
something, 7 the guest, 8 outcome unknown, 9 not allowed. `ramet run` and `ramet shell` pass on the command's own exit code and use 125 for Ramet's failures.
"""

from __future__ import annotations

from typing import Any, ClassVar


class RametError(Exception):
    """Something failed that a user can be told about.

    message: one sentence of what failed. hint: what to do about it (default: what the class advises), or empty. details: machine-readable context.
    """

    code: ClassVar[str] = "internal"
    status: ClassVar[int] = 500
    exit: ClassVar[int] = 1
    advice: ClassVar[str] = ""

    def __init__(self, message: str, *, hint: str = "", details: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint or self.advice
        self.details = details or {}

    def wire(self) -> dict[str, Any]:
        """The error as the API sends it."""
        return {"code": self.code, "message": self.message, "hint": self.hint, "details": self.details}


class NotFoundError(RametError):
    code, status, exit = "not_found", 404, 3


class ExistsError(RametError):
    code, status, exit = "exists", 409, 4


class BusyError(RametError):
    """Another operation holds the machine."""

    code, status, exit = "busy", 409, 4


class StateError(RametError):
    """The verb does not apply in the machine's state."""

    code, status, exit = "wrong_state", 409, 4


class SpecError(RametError):
    """A definition or a parameter is not valid; names the file, line or key and what would be right."""

    code, status, exit = "invalid", 422, 5


class ImageError(RametError):
    """An image could not be found, fetched, verified or converted."""

    code, status, exit = "image", 422, 5


class LayerError(RametError):
    """A layer is damaged or missing; the message names it and the blob."""

    code, status, exit = "layer", 500, 7


class AbsentError(LayerError):
    """Chunks of a layer are in a registry only; when it reaches a user, they could not be fetched. details: blob, offset."""

    code, status = "absent", 503


class IncompatibleError(RametError):
    """A snapshot's memory does not fit this host; the message says in what. Its disk does."""

    code, status, exit = "incompatible", 409, 6


class DependentsError(RametError):
    """Others stand on what was to be deleted. details: dependents."""

    code, status, exit = "dependents", 409, 4


class HostError(RametError):
    """This host lacks something: a program, a permission, a device."""

    code, status, exit = "host", 503, 6


class NoSpaceError(HostError):
    code, status = "no_space", 507
    advice = "Free some space (`df -h`) and try again."


class NoCapacityError(HostError):
    """The host has no memory left for another machine. details: retry_after (seconds), committed, capacity, wanted (bytes)."""

    code = "no_capacity"
    advice = (
        "Stop or hibernate a machine (`ramet hibernate NAME`), lower the memory of one (`ramet update NAME --memory 256M`), or have the daemon "
        "promise more: RAMET_OVERCOMMIT."
    )


class CommandError(HostError):
    """A host program failed. details: argv, returncode, log (the tail of what it printed)."""

    code = "command"


class GuestError(RametError):
    """The guest refused or failed an operation. details may hold errno."""

    code, status, exit = "guest", 422, 7


class GuestNotFoundError(GuestError):
    """A path, program, user or process that is not there in the guest."""

    code, status = "guest_not_found", 404


class MachineFailedError(GuestError):
    """The machine died or could not start. details: log (the console's tail)."""

    code, status = "machine_failed", 500


class OutcomeUnknownError(GuestError):
    """The line to the guest broke or fell silent while a command may have run. Never retried."""

    code, status, exit = "outcome_unknown", 504, 8


class TimeoutExpiredError(GuestError):
    """A deadline passed before the work was done, and nothing is left running."""

    code, status = "timeout", 504


class UnauthorizedError(RametError):
    code, status, exit = "unauthorized", 401, 9


class DaemonError(RametError):
    """The daemon cannot be reached, or another one holds the state directory."""

    code, status, exit = "daemon", 503, 6


def _tree(base: type[RametError]) -> dict[str, type[RametError]]:
    found = {base.code: base}
    for child in base.__subclasses__():
        found |= _tree(child)
    return found


def from_wire(body: dict[str, Any]) -> RametError:
    """The exception that the API's error body stands for."""
    kind = _tree(RametError).get(str(body.get("code")), RametError)
    return kind(str(body.get("message", "unknown error")), hint=str(body.get("hint", "")), details=dict(body.get("details") or {}))
