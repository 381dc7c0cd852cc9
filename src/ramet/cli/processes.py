"""Commands in machines: run, shell, list, signal, attach."""

from __future__ import annotations

import os
import signal as signals
from typing import TYPE_CHECKING, Annotated

import typer

from ramet.cli import text
from ramet.cli.base import (
    FAILED,
    Directory,
    Env,
    Json,
    Name,
    OptionalName,
    User,
    app,
    client,
    environment,
    machine,
    own_name,
    perform,
)
from ramet.cli.group import Verbatim
from ramet.errors import SpecError
from ramet.model import Command, Process

if TYPE_CHECKING:
    from ramet.aio import AsyncMachine

Argv = Annotated[list[str] | None, typer.Argument(help="The command and its arguments.", show_default=False)]


@app.command(cls=Verbatim)
def run(
    name: Name,
    command: Argv = None,
    env: Env = None,
    workdir: Directory = "",
    user: User = "",
    interactive: Annotated[bool, typer.Option("--interactive", "-i", help="Send stdin also from a terminal.")] = False,
    terminal: Annotated[bool, typer.Option("--tty", "-t", help="Give it a terminal, ours.")] = False,
    timeout: Annotated[float | None, typer.Option(min=0.001, help="Kill it after so many seconds.", show_default=False)] = None,
    detach: Annotated[
        bool, typer.Option("--detach", "-d", help="Leave it running, print its number (`ramet attach`, `ramet kill`).")
    ] = False,
    json: Json = False,
) -> None:
    """Run a command in a machine. Its exit status is ours; 125 when Ramet failed. stdin is sent when it is piped."""
    arguments = tuple(command or ())

    async def work() -> int:
        if not arguments:
            raise SpecError("there is no command to run", hint=f"ramet run {name} -- COMMAND; `ramet shell {name}` opens a shell.")
        async with machine(name) as target:
            what = Command(argv=arguments, env=environment(env), cwd=workdir, user=user, timeout=timeout)
            if detach:
                return await _detached(target, what, json)
            if json:
                return await _whole(target, what)
            if terminal:
                return await _on_terminal(target, what)
            return await _streamed(target, what, interactive)

    raise typer.Exit(perform(work, json=json, failed=FAILED))


async def _streamed(target: AsyncMachine, what: Command, interactive: bool) -> int:
    from ramet.cli import terminal as ours

    stdin = interactive or ours.has_input()
    process = await target.start(
        what.argv, env=what.env, cwd=what.cwd, user=what.user, timeout=what.timeout, stdin=stdin,
        on_stdout=ours.printer(ours.STDOUT), on_stderr=ours.printer(ours.STDERR),
    )  # fmt: skip
    return await ours.follow(process, stdin=stdin)


async def _on_terminal(target: AsyncMachine, what: Command) -> int:
    from ramet.cli import terminal as ours

    if not ours.interactive():
        raise SpecError("-t needs a terminal at this end too", hint="Leave -t out; stdin is sent when it is piped.")
    now = ours.size()
    env = {"TERM": os.environ.get("TERM", "xterm")} | what.env
    return await ours.sit(await target.terminal(now.rows, now.columns, command=what.argv, env=env, cwd=what.cwd, user=what.user))


async def _detached(target: AsyncMachine, what: Command, json: bool) -> int:
    process = await target.start(
        what.argv, env=what.env, cwd=what.cwd, user=what.user, timeout=what.timeout, detach=True, label=what.argv[0][:64]
    )
    await process.close()
    text.as_json({"process": process.id, "pid": process.pid}) if json else text.say(str(process.id))
    return 0


async def _whole(target: AsyncMachine, what: Command) -> int:
    import sys

    from ramet.cli import terminal as ours
    from ramet.rest import RunReply

    stdin = sys.stdin.buffer.read() if ours.has_input() else b""
    result = await target.run(what.argv, env=what.env, cwd=what.cwd, user=what.user, timeout=what.timeout, stdin=stdin)
    text.as_json(RunReply.of(result))
    return result.status


@app.command()
def shell(
    name: OptionalName = "",
    env: Env = None,
    workdir: Directory = "",
    user: User = "",
) -> None:
    """A login shell in a machine, on our terminal. Without one, commands are read from stdin. The shell's status is ours."""

    async def work() -> int:
        from ramet.aio import LOGIN_SHELL
        from ramet.cli import terminal as ours

        async with machine(own_name(name)) as target:
            what = Command(argv=LOGIN_SHELL, env=environment(env), cwd=workdir, user=user)
            return await (_on_terminal(target, what) if ours.interactive() else _streamed(target, what, False))

    raise typer.Exit(perform(work, failed=FAILED))


@app.command()
def ps(name: OptionalName = "", json: Json = False) -> None:
    """What runs in a machine because Ramet started it, and what ended and is still listed."""

    async def work() -> None:
        async with client() as verbs:
            found = await verbs.processes(own_name(name))
        if json:
            text.as_json(found)
        elif found:
            rows = [(str(p.id), _ended(p), str(p.pid), text.age(p.started_at), _flags(p), text.clean(p.command)) for p in found]
            text.say("\n".join(text.table(("ID", "STATE", "PID", "AGE", "FLAGS", "COMMAND"), rows, give=5)))
        else:
            text.note("nothing runs")

    perform(work, json=json)


def _ended(process: Process) -> str:
    return process.state if process.state == "running" else f"{process.state} {process.code}"


def _flags(process: Process) -> str:
    return " ".join(word for word, given in (("detached", process.detached), ("attached", process.attached)) if given)


@app.command()
def kill(
    name: Name,
    process: Annotated[int, typer.Argument(help="Its number in `ramet ps`.")],
    signal: Annotated[str, typer.Option("--signal", "-s", help="A number or a name, such as HUP.")] = "TERM",
    forget: Annotated[bool, typer.Option("--forget", help="Send nothing: drop a finished process from the list.")] = False,
) -> None:
    """Signal a process of `ramet ps` and all its children."""

    async def work() -> None:
        async with client() as verbs:
            if forget:
                await verbs.forget(name, process)
            else:
                await verbs.signal(name, process, _number(signal))

    perform(work)


def _number(signal: str) -> int:
    """SpecError for what is no signal."""
    if signal.isdigit() and 0 < int(signal) <= 64:
        return int(signal)
    try:
        return signals.Signals[f"SIG{signal.upper().removeprefix('SIG')}"]
    except KeyError:
        raise SpecError(f"{signal!r} is not a signal", hint="Write its number, or its name, such as TERM, KILL or HUP.") from None


@app.command()
def attach(
    name: Name,
    process: Annotated[int, typer.Argument(help="Its number in `ramet ps`.")],
    interactive: Annotated[bool, typer.Option("--interactive", "-i", help="Send stdin also from a terminal.")] = False,
) -> None:
    """Follow a process that runs already: what it wrote last, what it writes, its exit status.

    Ctrl-C ends the following; with -i, or when stdin is piped, it is passed on to the process.
    """

    async def work() -> int:
        from ramet.cli import terminal as ours

        async with machine(name) as target:
            followed = await target.attach(process, on_stdout=ours.printer(ours.STDOUT), on_stderr=ours.printer(ours.STDERR))
            stdin = interactive or ours.has_input()
            return await ours.follow(followed, stdin=stdin, signals=stdin)

    raise typer.Exit(perform(work, failed=FAILED))
