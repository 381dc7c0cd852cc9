"""The command line. It goes through the SDK's client only, so whatever it can do the API can."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from ramet import __version__
from ramet.cli import build, disk, files, host, layers, lineage, machines, processes, registry, snapshots, update
from ramet.cli.base import app

__all__ = ["app", "build", "disk", "files", "host", "layers", "lineage", "machines", "main", "processes", "registry", "snapshots", "update"]


def _version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _top(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False) -> None:
    pass


def _only(word: str) -> None:
    """Forget the commands that are not asked for: making them all takes longer than `ramet list` does."""
    commands = [command for command in app.registered_commands if (command.name or getattr(command.callback, "__name__", "")) == word]
    groups = [group for group in app.registered_groups if group.name == word]
    if commands or groups:
        app.registered_commands, app.registered_groups = commands, groups


def main() -> None:
    """The program `ramet`."""
    if os.environ.get("_RAMET_COMPLETE") == "complete_bash":
        from ramet.cli.completion import in_bash

        in_bash(lambda: app(prog_name="ramet"))
        return
    _only(sys.argv[1] if len(sys.argv) > 1 else "")
    app(prog_name="ramet")


if __name__ == "__main__":
    main()
