"""An engine that kills itself, as `kill -9` would, at a chosen moment: `python -m tests.machine.doomed STATE MOMENT VERB SPEC`.

MOMENT: `step:WORDS` (an activity), `state:STATE` (written to the database, not yet told), `removed`, or `never`. VERB: create, start, stop, delete.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path

from pydantic import TypeAdapter

from ramet.bus import Bus
from ramet.engine import Engine
from ramet.model import Event, Spec
from ramet.paths import StateDir


def doom(moment: str) -> None:
    """From now on, die at the moment."""
    publish = Bus.publish

    def fatal(self: Bus, event: Event) -> None:
        step = event.activity.step if event.activity else ""
        if moment in (f"step:{step}", f"state:{event.state}", event.kind):
            os.kill(os.getpid(), signal.SIGKILL)
        publish(self, event)

    Bus.publish = fatal  # type: ignore[method-assign]


async def main(root: str, moment: str, verb: str, text: str) -> None:
    spec = TypeAdapter(Spec).validate_python(json.loads(text), strict=False)
    async with Engine.open(StateDir(root=Path(root))) as engine:
        doom(moment)
        if verb == "create":
            await engine.create(spec)
        else:
            await getattr(engine, verb)(spec.name)
        sys.stdout.write("done\n")
        sys.stdout.flush()
        await asyncio.Event().wait()  # until somebody kills us


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:5]))
