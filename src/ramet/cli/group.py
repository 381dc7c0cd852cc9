"""How typer's commands become ours: their order, where a remote command begins, and a quick start."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from typer.core import TyperCommand, TyperGroup

# As `ramet --help` lists them: what one does first comes first.
ORDER = (
    *("tour", "setup", "up", "down", "shell", "run", "cp", "list", "show", "info", "logs", "create", "start", "stop", "update", "delete"),
    *("fork", "pause", "resume", "hibernate", "snapshot", "snapshots", "restore", "template", "tree", "layer", "compact"),
    *("build", "push", "pull", "convert", "gc", "fsck"),
    *("ps", "attach", "kill", "files", "forward", "metrics", "events", "bench", "daemon"),
)


PLAIN = (str, bool, list[str])


class AsGiven:
    """What typer does to a parameter's value, where that is nothing. Its own way is a pydantic adapter, even for a string or for no value:
    importing pydantic takes as long as all that `ramet list` does. A typer that works otherwise never asks, and is only slower."""

    @staticmethod
    def coerce(value: Any, param: Any, ctx: Any) -> Any:
        if param.multiple or param.nargs == -1:
            value = value or ()
        if value in (None, ()):
            return value
        if param.type_descriptor.annotation in PLAIN:
            return list(value) if isinstance(value, tuple) else value
        param._runtime_param = None
        return param.get_runtime_param().coerce(value, param=param, ctx=ctx)


def hasten(params: Iterable[Any]) -> None:
    """Spare parameters the adapter where they are plain."""
    for param in params:
        param._runtime_param = AsGiven


class Group(TyperGroup):
    """Commands in the order above, that start quickly."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        hasten(self.get_params(ctx))
        return super().parse_args(ctx, args)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if command := super().get_command(ctx, cmd_name):
            # `--help` is made when first asked for, with the names of the context that asks: ours, unless the command has its own.
            own = "help_option_names" in command.context_settings
            hasten(command.params if own else command.get_params(ctx))
        return command

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(self.commands, key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))


class Verbatim(TyperCommand):
    """`[OPTIONS] NAME [OPTIONS] [--] COMMAND...`: where the command begins, what follows is its own, also what looks like an option of ours."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, self._marked(args))

    def _marked(self, args: list[str]) -> list[str]:
        """The arguments with `--` before the second that is no option, nor an option's value."""
        taking = {opt for param in self.params for opt in param.opts if opt.startswith("-") and not getattr(param, "is_flag", False)}
        seen = at = 0
        while at < len(args):
            arg = args[at]
            if arg == "--":
                break
            if arg.startswith("-") and arg != "-":
                # of -it all but the last letter are flags; -eA=B and --env=A=B bring their values along
                last = arg if arg.startswith("--") else next((f"-{c}" for c in arg[1:] if f"-{c}" in taking), "")
                at += 1 if last not in taking or (not arg.startswith("--") and not arg.endswith(last[1])) else 2
                continue
            seen += 1
            if seen == 2:
                return [*args[:at], "--", *args[at:]]
            at += 1
        return args
