"""Commands around the machines: the daemon, and programs that live in modules of their own and are imported only when called."""

from __future__ import annotations

import importlib
from typing import Annotated

import typer

from ramet.cli import text
from ramet.cli.base import Json, app, perform
from ramet.cli.group import Group
from ramet.errors import RametError

daemon = typer.Typer(cls=Group, no_args_is_help=True, help="The daemon, which every command starts when it is needed.")
app.add_typer(daemon, name="daemon")

_PASS = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def _module(name: str, arguments: list[str]) -> None:
    """Run `ramet.NAME.main(arguments)`, whose result is the exit status."""
    try:
        status = importlib.import_module(f"ramet.{name}").main(arguments)
    except RametError as error:
        text.fail(error, machine_readable="--json" in arguments)
        raise typer.Exit(error.exit) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    raise typer.Exit(status or 0)


@app.command()
def setup(
    check: Annotated[bool, typer.Option("--check", help="Only look; exit status 1 when something is missing.")] = False,
    wait_kernel: Annotated[
        bool, typer.Option("--wait-kernel", help="Wait for our own kernel's build, which else goes on in the background.")
    ] = False,
    json: Json = False,
) -> None:
    """Prepare this computer: packages, guest agent, kernel, a first image. Quick when repeated."""
    given = (("--check", check), ("--wait-kernel", wait_kernel), ("--json", json))
    _module("setup", [option for option, chosen in given if chosen])


@app.command(context_settings=_PASS)
def tour(context: typer.Context) -> None:
    """Set up, then show a machine being made, used, forked, rewound and hibernated."""
    _module("tour", context.args)


@app.command(context_settings=_PASS)
def bench(context: typer.Context) -> None:
    """Measure, and compare with what is promised."""
    _module("bench", context.args)


@daemon.command(name="start")
def daemon_start(foreground: Annotated[bool, typer.Option("--foreground", help="Serve here, until Ctrl-C.")] = False) -> None:
    """Start the daemon, if none runs."""
    from ramet.paths import StateDir

    if foreground:
        from ramet.daemon import run

        run(StateDir.default().root)
        return

    async def work() -> None:
        from ramet.service import ensure_running, status

        await ensure_running()
        _say(status(StateDir.default()))

    perform(work)


@daemon.command(name="stop")
def daemon_stop() -> None:
    """End the daemon. Machines run on."""

    async def work() -> None:
        from ramet.paths import StateDir
        from ramet.service import stop

        text.say("The daemon has ended; machines run on." if await stop(StateDir.default()) else "No daemon ran.")

    perform(work)


@daemon.command(name="status")
def daemon_status(json: Json = False) -> None:
    """Whether the daemon runs. Exit status 3 when it does not."""
    from ramet.paths import StateDir
    from ramet.service import status

    found = status(StateDir.default())
    if json:
        text.as_json({"running": bool(found), "state_dir": str(StateDir.default().root), **(found or {})})
    else:
        _say(found)
    raise typer.Exit(0 if found else 3)


def _say(found: dict[str, object] | None) -> None:
    text.say(f"The daemon runs: pid {found['pid']}, {found['url']}" if found else "No daemon runs.")
