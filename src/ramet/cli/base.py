"""What all commands share: the application, the connection, errors as exit codes, options that recur."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from ramet.cli import text
from ramet.cli.group import Group
from ramet.errors import RametError, SpecError

if TYPE_CHECKING:
    from ramet.aio import AsyncMachine
    from ramet.client import Client

T = TypeVar("T")
COMPLETION = 1.0  # seconds that a shell's completion may wait for the daemon
FAILED = 125  # the status of `run` and `shell` when Ramet fails, as docker's: the command's own is passed on
INTERRUPTED = 130
SPEC = "ramet.toml"
SNAPSHOT_MARKS = "@:/"  # a snapshot's name always holds one of these, a machine's none

app = typer.Typer(
    name="ramet",
    cls=Group,
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Virtual development environments and sandboxes on this computer.",
)


def _completed(incomplete: str, ask: Callable[[Client], Coroutine[Any, Any, list[str]]]) -> list[str]:
    """What the daemon has that begins so, for the shell's completion; nothing where no daemon answers soon."""
    from ramet.client import Client

    async def work() -> list[str]:
        async with Client.discover() as client, asyncio.timeout(COMPLETION):
            return await ask(client)

    with contextlib.suppress(RametError, TimeoutError, OSError):
        return [name for name in asyncio.run(work()) if name.startswith(incomplete)]
    return []


async def _machines(client: Client) -> list[str]:
    return [machine.name for machine in await client.list()]


async def _snapshots(client: Client) -> list[str]:
    return [snapshot.name for snapshot in await client.snapshots()]


async def _members(client: Client) -> list[str]:
    return await _machines(client) + await _snapshots(client)


async def _layers(client: Client) -> list[str]:
    return [layer.id for layer in await client.layers()]


def names(incomplete: str) -> list[str]:
    """Machines' names, for completion."""
    return _completed(incomplete, _machines)


def snapshot_names(incomplete: str) -> list[str]:
    return _completed(incomplete, _snapshots)


def member_names(incomplete: str) -> list[str]:
    """Machines' and snapshots'."""
    return _completed(incomplete, _members)


def layer_ids(incomplete: str) -> list[str]:
    return _completed(incomplete, _layers)


Name = Annotated[str, typer.Argument(help="A machine's name.", autocompletion=names, show_default=False)]
OptionalName = Annotated[
    str, typer.Argument(help=f"A machine's name; the one of the nearest {SPEC} when left out.", autocompletion=names, show_default=False)
]
SnapshotName = Annotated[str, typer.Argument(help="A snapshot's name or id.", autocompletion=snapshot_names, show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, with the API's keys.")]
Env = Annotated[
    list[str] | None, typer.Option("--env", "-e", help="NAME=VALUE, or NAME for its value here; may be repeated.", show_default=False)
]
User = Annotated[str, typer.Option("--user", "-u", help="Who, in the guest: name, uid, name:group or uid:gid.", show_default=False)]
Directory = Annotated[str, typer.Option("--workdir", "-w", help="Where, in the guest.", show_default=False)]


@contextlib.asynccontextmanager
async def client() -> AsyncIterator[Client]:
    """The daemon, started when none runs."""
    from ramet.aio import connect

    async with await connect() as connected:
        yield connected


@contextlib.asynccontextmanager
async def machine(name: str) -> AsyncIterator[AsyncMachine]:
    """A machine of the daemon's."""
    from ramet.aio import AsyncMachine
    from ramet.cli.progress import standing

    async with client() as verbs:
        target = await AsyncMachine.get(name, verbs=verbs)
        async with standing(verbs, target.name):
            yield target


def perform(work: Callable[[], Coroutine[Any, Any, T]], *, json: bool = False, failed: int | None = None) -> T:
    """Run a command's work. A RametError is printed, and its class's exit code (or `failed`) ends the program."""
    try:
        return asyncio.run(work())
    except RametError as error:
        text.fail(error, machine_readable=json)
        raise typer.Exit(failed or error.exit) from None
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    except BrokenPipeError:
        # Whoever read our output has gone; say nothing more, neither now nor when the interpreter flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(141) from None


def environment(values: list[str] | None) -> dict[str, str]:
    """--env as a dict. SpecError for what has no name."""
    found = {}
    for value in values or []:
        name, given, content = value.partition("=")
        if not name:
            raise SpecError(f"--env {value!r} has no name", hint="Write NAME=VALUE, or NAME for its value here.")
        if given or name in os.environ:
            found[name] = content if given else os.environ[name]
    return found


def find_spec(start: Path | None = None) -> Path | None:
    """The nearest ramet.toml, from a directory upward."""
    here = (start or Path.cwd()).resolve()
    return next((directory / SPEC for directory in (here, *here.parents) if (directory / SPEC).is_file()), None)


def own_name(name: str) -> str:
    """The name given, else the one of the nearest ramet.toml."""
    if name:
        return name
    from ramet.spec import load

    path = find_spec()
    if not path:
        raise SpecError(f"which machine? No name is given, and there is no {SPEC} here or above", hint="`ramet list` shows the names.")
    return load(path).name
