"""An engine that kills itself, as `kill -9` would, at a chosen moment: `python -m tests.machine.doomed STATE MOMENT VERB ARGUMENTS`.

MOMENT: a name of those below, `never`, or `list` (print the moments passed, as JSON). The same name again is `NAME#2`, `NAME#3`…
  step:WORDS          an activity, before it is done
  state:STATE         a machine's, written to the database, not yet told
  removed             a machine, as above
  db:METHOD           a change of a snapshot's record, before it is written
  disk:write          before a machine has another overlay
  store:WORDS         a step of the layers' store
  test:WORDS          a step of a snapshot's first start
  name:PATH           what of the state directory is whole, before it has that name; ID for each id in it; for the verbs of registries only
VERB and ARGUMENTS (JSON): `create`, `start`, `stop`, `delete` and a spec; or a name of `VERBS` and its arguments; `recover` is doomed from the first moment on.

Without arguments it is a nursery: it reads lines of such words, as JSON, and has a child do each; programs that start anew take a second to import.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import os
import re
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from ramet import operations, recovery, restoring
from ramet.bus import Bus
from ramet.db import Database
from ramet.engine import Engine
from ramet.model import Event, Spec, State
from ramet.paths import MachineDir, StateDir
from ramet.store.store import Store
from ramet.vm import disk

_ID = re.compile(r"(sha256-)?[0-9a-f]{12,64}")
PATIENCE = 240.0  # seconds for what happens in the background


class Fate:
    """What is passed, and at which of it to die. Nothing counts before `armed`."""

    def __init__(self, moment: str) -> None:
        self.moment = moment
        self.armed = False
        self.passed: list[str] = []
        self._seen: collections.Counter[str] = collections.Counter()
        self._last = ""

    def reach(self, name: str) -> None:
        if not self.armed:
            return
        self._seen[name] += 1
        again = self._seen[name]
        self.passed.append(name if again == 1 else f"{name}#{again}")
        if self.passed[-1] == self.moment:
            os.kill(os.getpid(), signal.SIGKILL)

    def told(self, event: Event) -> None:
        """Small steps of one long way are one moment."""
        name = f"step:{event.activity.step}" if event.activity else f"state:{event.state}" if event.state else event.kind
        if event.activity is None or event.activity.fraction is None or name != self._last:
            self.reach(name)
        self._last = name


def watch(fate: Fate) -> None:
    """Have everything that happens pass by."""
    publish, write, launch = Bus.publish, disk.write, restoring.launch

    def published(self: Bus, event: Event) -> None:
        fate.told(event)
        publish(self, event)

    def written(files: MachineDir, state: disk.Disks) -> None:
        fate.reach("disk:write")
        write(files, state)

    async def launched(*args: Any) -> Any:
        is_test = any(isinstance(each, MachineDir) and each.root.name.startswith(".") for each in args)
        if is_test:
            fate.reach("test:starting QEMU")
        made = await launch(*args)
        if is_test:
            fate.reach("test:loading the devices")
        return made

    def recorded(name: str) -> None:
        method = getattr(Database, name)

        async def record(self: Database, *args: Any) -> Any:
            fate.reach(f"db:{name}")
            return await method(self, *args)

        setattr(Database, name, record)

    Bus.publish = published  # type: ignore[method-assign]
    disk.write = written
    restoring.launch = launched  # type: ignore[assignment]
    operations.Store = lambda files: Store(files, step=lambda name: fate.reach(f"store:{name}"))  # type: ignore[misc,assignment,attr-defined]
    for name in ("add_snapshot", "update_snapshot", "delete_snapshot"):
        recorded(name)


def watch_names(fate: Fate, root: Path) -> None:
    """Have every rename within the state directory pass by."""

    def passing(method: Callable[[Path, Any], Path]) -> Callable[[Path, Any], Path]:
        def named(self: Path, target: Any) -> Path:
            if Path(target).is_relative_to(root):
                fate.reach(f"name:{_ID.sub('ID', str(Path(target).relative_to(root)))}")
            return method(self, target)

        return named

    Path.replace = passing(Path.replace)  # type: ignore[method-assign,assignment]
    Path.rename = passing(Path.rename)  # type: ignore[method-assign,assignment]


async def sealed(engine: Engine) -> None:
    """Wait until what is done to snapshots in the background is done."""
    if worker := engine._forks.sealer._worker:
        await asyncio.wait({worker})


async def parked(engine: Engine, count: int) -> None:
    """Wait until so many machines are parked, and none is on its way."""
    events = engine.events()
    async with asyncio.timeout(PATIENCE):
        while True:
            pool = [each for each in engine._ops.entries.values() if each.record.pool]
            if len(pool) == count and all(each.record.state is State.PAUSED and not each.operation for each in pool):
                return
            await anext(events)


async def snapshot(engine: Engine, name: str, label: str, memory: bool = True) -> None:
    await engine.snapshot(name, label, memory=memory)
    await sealed(engine)


async def fork(engine: Engine, name: str, names: list[str]) -> None:
    for outcome in await engine.fork(name, names=tuple(names)):
        assert outcome.machine, outcome
    await sealed(engine)


async def hibernate(engine: Engine, name: str, slim: bool = True) -> None:
    await engine.hibernate(name, slim=slim)
    await sealed(engine)


async def template(engine: Engine, name: str, pool: int) -> None:
    await engine.template(name, pool=pool)
    await parked(engine, pool)


async def claim(engine: Engine, name: str, machine: str, pool: int) -> None:
    await engine.create_from(name, machine)
    await parked(engine, pool)


async def push(engine: Engine, snapshot: str, reference: str) -> None:
    await engine.push(snapshot, reference)


async def pull(engine: Engine, reference: str, lazy: bool = False) -> None:
    await engine.pull(reference, lazy=lazy)


async def create_from(engine: Engine, name: str, machine: str) -> None:
    await engine.create_from(name, machine)


REGISTRIES: dict[str, Callable[..., Awaitable[Any]]] = {"push": push, "pull": pull, "create_from": create_from}
VERBS: dict[str, Callable[..., Awaitable[Any]]] = {
    "snapshot": snapshot,
    "fork": fork,
    "hibernate": hibernate,
    "template": template,
    "claim": claim,
    "recover": lambda engine: sealed(engine),
    "resume": Engine.resume,
    "restore": Engine.restore,
    "pause": Engine.pause,
    "compact": Engine.compact,
    "delete_snapshot": Engine.delete_snapshot,
    **REGISTRIES,
}


async def act(engine: Engine, verb: str, arguments: dict[str, Any]) -> None:
    if verb in VERBS:
        await VERBS[verb](engine, **arguments)
        return
    spec = TypeAdapter(Spec).validate_python(arguments, strict=False)
    await (engine.create(spec) if verb == "create" else getattr(engine, verb)(spec.name))


async def main(root: str, moment: str, verb: str, text: str) -> None:
    recovery._ADOPTING = PATIENCE  # a verb is for machines that have been found again
    fate = Fate(moment)
    watch(fate)
    if verb in REGISTRIES:
        watch_names(fate, Path(root))
    fate.armed = verb == "recover"
    async with Engine.open(StateDir(root=Path(root))) as engine:
        fate.armed = True
        await act(engine, verb, json.loads(text))
        if moment == "list":
            sys.stdout.write(json.dumps(fate.passed) + "\n")
        sys.stdout.write("done\n")
        sys.stdout.flush()
        await asyncio.Event().wait()  # until somebody kills us


def nurse() -> None:
    """Says `pid N` and what the child says, then `ended STATUS`, negative for a signal."""
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            with contextlib.suppress(KeyboardInterrupt):
                asyncio.run(main(*json.loads(line)))
            os._exit(0)
        os.write(1, f"pid {pid}\n".encode())
        os.write(1, f"ended {os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}\n".encode())


if __name__ == "__main__":
    if sys.argv[1:]:
        asyncio.run(main(*sys.argv[1:5]))
    else:
        nurse()
