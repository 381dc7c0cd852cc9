"""The command line. It goes through the SDK's client only, so whatever it can do the API can."""

from __future__ import annotations

from typing import Annotated

import typer

from ramet import __version__
from ramet.cli import files, host, machines, processes
from ramet.cli.base import app

__all__ = ["app", "files", "host", "machines", "main", "processes"]


def _version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _top(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False) -> None:
    pass


def main() -> None:
    """The program `ramet`."""
    app(prog_name="ramet")


if __name__ == "__main__":
    main()
