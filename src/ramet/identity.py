"""Who a machine is, as its host says it after every restore: a clone must not go on as its parent."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field

from ramet import agentwire
from ramet.agentwire import Tag

ENTROPY = 64  # bytes; the kernel's generator holds 32


@dataclass(frozen=True, kw_only=True)
class Identity:
    """hostname; machine_id: 32 hexadecimal digits; generation: a UUID as text, another one for each start from a snapshot. What is empty is left as it is.

    The clock is always set, to the time of sending.
    """

    hostname: str = ""
    machine_id: str = ""
    generation: str = ""
    entropy: bytes = field(default_factory=lambda: os.urandom(ENTROPY), repr=False)

    @classmethod
    def clock(cls) -> Identity:
        """The time and nothing else: for a machine that stood still."""
        return cls(entropy=b"")

    def params(self) -> list[bytes]:
        """The parameters of IDENTIFY; the time is now's."""
        values = (
            (Tag.ENTROPY, self.entropy),
            (Tag.HOSTNAME, self.hostname),
            (Tag.MACHINE_ID, self.machine_id),
            (Tag.GENERATION, self.generation),
        )
        return [agentwire.param(tag, value) for tag, value in values if value] + [agentwire.param(Tag.TIME, time.time_ns())]
