"""Building templates, in CI too."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ramet.cli import text
from ramet.cli.base import SPEC, Json, app, client, find_spec, perform
from ramet.errors import RametError, SpecError

if TYPE_CHECKING:
    from ramet.verbs import Verbs


@app.command()
def build(
    where: Annotated[
        Path | None, typer.Argument(help="A ramet.toml or its directory; the nearest one upward when left out.", show_default=False)
    ] = None,
    push: Annotated[
        list[str] | None, typer.Option("--push", help="REGISTRY/NAME:TAG to send it to; may be repeated.", show_default=False)
    ] = None,
    cache_from: Annotated[
        list[str] | None,
        typer.Option("--cache-from", help="REGISTRY/NAME of earlier builds, beside those pushed to; may be repeated.", show_default=False),
    ] = None,
    no_memory: Annotated[bool, typer.Option("--no-memory", help="Only the disk: machines made from it boot.")] = False,
    json: Json = False,
) -> None:
    """Make the template that a ramet.toml describes: its machine, saved when its commands have run. What was built before is found again.

    Works without a daemon, in a CI job for example: examples/ci has workflows.

    Example: ramet build --push ghcr.io/acme/shop:main
    """

    async def work() -> None:
        from ramet import building
        from ramet.spec import load

        path = where or find_spec()
        if not path:
            raise SpecError(f"there is no {SPEC} here or above", hint="Write one (docs/spec.md), or name its directory.")
        spec = load(path)
        say = _clock()
        async with _verbs() as verbs, _told(verbs, say):
            made = await building.build(verbs, spec, push=tuple(push or ()), caches=tuple(cache_from or ()), memory=not no_memory, say=say)
        if json:
            text.as_json(made)
            return
        text.say(f"{text.paint(made.snapshot, text.BOLD)} is {f'found in {made.cached}' if made.cached else 'built'}.")
        for each in made.pushed:
            text.say(f"  {each}")
        text.say(f"  ramet create --from {made.snapshot} NAME")

    perform(work, json=json)


@contextlib.asynccontextmanager
async def _verbs() -> AsyncIterator[Verbs]:
    """The daemon where one runs, else this process."""
    from ramet import service
    from ramet.paths import StateDir

    state = StateDir.default()
    if os.environ.get("RAMET_URL") or service.status(state):
        async with client() as verbs:
            yield verbs
    else:
        from ramet.daemon import embedded

        async with embedded(state) as engine:
            yield engine


def _clock() -> Callable[[str], None]:
    """Says lines, each with the seconds since the begin: a log shows what took long."""
    began = time.monotonic()

    def say(line: str) -> None:
        text.note(f"[{time.monotonic() - began:7.1f} s] {text.clean(line)}")

    return say


@contextlib.asynccontextmanager
async def _told(verbs: Verbs, say: Callable[[str], None]) -> AsyncIterator[None]:
    """Each new step that anything takes, while the body goes on. Progress is a courtesy: that it fails must not fail the work."""

    async def follow() -> None:
        last = ""
        with contextlib.suppress(RametError):
            async for event in verbs.events():
                if event.activity and (now := f"{event.machine}: {event.activity.step}") != last:
                    last = now
                    say(now)

    task = asyncio.create_task(follow())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
