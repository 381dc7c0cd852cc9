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
FAILED = 125  # the status of `run` and `shell` when Ramet fails, as docker's: the command's own is passed on
INTERRUPTED = 130
SPEC = "ramet.toml"

app = typer.Typer(
    name="ramet",
    cls=Group,
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Virtual development environments and sandboxes on this computer.",
)


def names(incomplete: str) -> list[str]:
    """Machines' names for the shell's completion; none where no daemon answers."""
    from ramet.client import Client

    async def ask() -> list[str]:
        async with Client.discover() as client, asyncio.timeout(1):
            return [machine.name for machine in await client.list()]

    with contextlib.suppress(RametError, TimeoutError, OSError):
        return [name for name in asyncio.run(ask()) if name.startswith(incomplete)]
    return []


Name = Annotated[str, typer.Argument(help="A machine's name.", autocompletion=names, show_default=False)]
OptionalName = Annotated[
    str, typer.Argument(help=f"A machine's name; the one of the nearest {SPEC} when left out.", autocompletion=names, show_default=False)
]
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

    async with client() as verbs:
        yield await AsyncMachine.get(name, verbs=verbs)


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
