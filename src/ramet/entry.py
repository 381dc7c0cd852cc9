"""A machine in this process: its record, and what lives only as long as the daemon does."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

from ramet import capacity
from ramet.capacity import Claim
from ramet.commands import Forward
from ramet.db import Record
from ramet.errors import AbsentError, BusyError, RametError, StateError
from ramet.guest import Stream
from ramet.lifecycle import Operation
from ramet.model import Activity, ImageConfig
from ramet.vm.machine import Vm

_HINT = "`ramet resume` tries again at once, `ramet stop --force` ends it."
_NEED_NO_MEMORY = frozenset({Operation.STOP, Operation.DELETE, Operation.RESTORE, Operation.PAUSE, Operation.UNPAUSE})


@dataclass(eq=False)
class Entry:
    """One machine. last_used: when somebody last used it; monotonic seconds. waiting: for what of its memory, which a registry has and does not give.
    was: while it is rewound, its record from before, to which it may have to go back. sought: its QEMU is being looked for, after a restart of the daemon.
    """

    record: Record
    image: ImageConfig = field(default_factory=ImageConfig)
    was: Record | None = None
    vm: Vm | None = None
    operation: Operation | None = None
    task: asyncio.Task[None] | None = None
    activity: Activity | None = None
    started: float = 0.0  # when its QEMU was; Unix time
    sought: bool = False
    waiting: str = ""
    doom: str = ""  # why we are about to end its QEMU, in place of how that will look
    touched: list[tuple[int, int]] = field(default_factory=list)  # what children of earlier forks needed of its memory first
    streams: dict[int, Stream] = field(default_factory=dict)
    forwards: dict[int, Forward] = field(default_factory=dict)
    writing: asyncio.Lock = field(default_factory=asyncio.Lock)  # held while its record is written down
    last_used: float = field(default_factory=time.monotonic)

    @property
    def records(self) -> tuple[Record, ...]:
        """All whose layers and snapshots it needs."""
        return (self.record, self.was) if self.was else (self.record,)

    def claim(self) -> Claim | None:
        """What it has of the host's memory."""
        return capacity.claim(self.record, self.operation, alive=bool(self.vm), granted=self.vm.granted if self.vm else None)

    def require_found(self) -> None:
        """BusyError where nobody knows yet what lives of it."""
        if self.sought:
            raise BusyError(
                f"{self.record.name} is being found again after a restart of the daemon",
                hint="Try again in a moment; `ramet stop --force` and `ramet delete` end it all the same.",
            )

    def require_memory(self, operation: Operation) -> None:
        """StateError where the operation needs what the machine itself waits for."""
        if self.waiting and operation not in _NEED_NO_MEMORY:
            raise self.stalled()

    def stalled(self) -> StateError:
        """Why it cannot be used."""
        return StateError(f"{self.record.name} {self.waiting}", hint=_HINT, details={"state": self.record.state})

    def because(self, error: BaseException) -> BaseException:
        """The error of an operation that failed; where the machine waited meanwhile, that is why it did."""
        if self.waiting and isinstance(error, RametError):
            return AbsentError(f"{self.record.name} {self.waiting}", details=error.details)
        return error
