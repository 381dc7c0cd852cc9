"""A machine in this process: its record, and what lives only as long as the daemon does."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

from ramet import capacity
from ramet.capacity import Claim
from ramet.commands import Forward
from ramet.db import Record
from ramet.guest import Stream
from ramet.lifecycle import Operation
from ramet.model import Activity, ImageConfig
from ramet.vm.machine import Vm


@dataclass(eq=False)
class Entry:
    """One machine. last_used: when somebody last used it; monotonic seconds."""

    record: Record
    image: ImageConfig = field(default_factory=ImageConfig)
    vm: Vm | None = None
    operation: Operation | None = None
    task: asyncio.Task[None] | None = None
    activity: Activity | None = None
    started: float = 0.0  # when its QEMU was; Unix time
    doom: str = ""  # why we are about to end its QEMU, in place of how that will look
    touched: list[tuple[int, int]] = field(default_factory=list)  # what children of earlier forks needed of its memory first
    streams: dict[int, Stream] = field(default_factory=dict)
    forwards: dict[int, Forward] = field(default_factory=dict)
    last_used: float = field(default_factory=time.monotonic)

    def claim(self) -> Claim | None:
        """What it has of the host's memory."""
        return capacity.claim(self.record, self.operation, alive=bool(self.vm), granted=self.vm.granted if self.vm else None)
