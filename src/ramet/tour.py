"""The tour: set-up, and then the main job before the user's eyes, in chapters. A chapter is a function that does one thing and tells it in a few lines.
What is done with one machine is here, what is done with its forks in `colony`.

Everything goes through the SDK, as in a user's own script; what is there already (a daemon, the machine, its server) is used again.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx2
from rich.console import Console
from rich.markup import escape

from ramet import aio, colony, images, kernels, paths, service, setup
from ramet import spec as definition
from ramet.aio import AsyncMachine
from ramet.client import Client
from ramet.colony import Colony
from ramet.errors import GuestError, NotFoundError, RametError, SpecError, TimeoutExpiredError
from ramet.kernels import BuildState, KernelKind
from ramet.model import Machine, State
from ramet.steps import Mark, Step, Steps, seconds
from ramet.units import format_size

SIZE = 4 << 20  # bytes of the file that is copied in and out
# States that end by themselves; an image may have to be fetched meanwhile.
_PASSING = (State.CREATING, State.STARTING, State.STOPPING, State.HIBERNATING, State.RESUMING, State.RESTORING)
_PATIENCE, _NAP = 900.0, 0.2  # seconds
_SERVER = "hello-server"  # label of the process that chapter `web` starts
_COMMANDS = ("whoami", "uname -sr", "free -m | awk '/Mem:/ {print $2, \"MB\"}'", 'echo "$GREETING, born $(cat born)"')


@dataclass(kw_only=True)
class Tour:
    """What chapters share."""

    steps: Steps
    verbs: Client
    machine: AsyncMachine

    @property
    def console(self) -> Console:
        return self.steps.console


def example() -> Path:
    """The definition of the tour's machine."""
    return paths.share_dir("examples") / "hello" / definition.FILE_NAME


def program() -> str:
    """How this user calls Ramet: from a checkout (tools/bootstrap.sh has left its stamp) or installed."""
    return "./ramet" if (Path(sys.prefix) / "ramet-stamp").exists() else "ramet"


# Before the chapters: a daemon, a machine


async def _daemon(steps: Steps) -> Client:
    with steps.step("Daemon") as step:
        state = paths.StateDir.default()
        found = service.status(state)
        client = await aio.connect()
        running = found or service.status(state) or {}
        step.end(Mark.OK, f"{'runs' if found else 'started'}, serving {client.url} (pid {running.get('pid', '?')})")
        return client


@contextlib.asynccontextmanager
async def _shown(verbs: Client, name: str, step: Step) -> AsyncIterator[None]:
    """Show what the daemon says it is doing with a machine."""

    async def follow() -> None:
        with contextlib.suppress(RametError):
            async for event in verbs.events(name):
                if event.activity:
                    step.progress(event.activity.step, event.activity.fraction)

    task = asyncio.create_task(follow())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait({task})


async def _machine(steps: Steps, verbs: Client) -> AsyncMachine:
    """The machine of examples/hello: made, or found again and switched on where it is off."""
    wanted = definition.load(example())
    with steps.step("Machine") as step:
        try:
            machine = await AsyncMachine.get(wanted.name, verbs=verbs)
            how = "is there already, and is used again"
        except NotFoundError:
            async with _shown(verbs, wanted.name, step):
                machine = await AsyncMachine.create(spec=wanted, verbs=verbs)
            how = "made from examples/hello/ramet.toml"
        how = await _awake(machine, verbs, step) or how
        record = await machine.refresh()
        step.end(Mark.OK, f"{record.name} {how}\n{await _engine_words(verbs, record)}")
        return machine


async def _awake(machine: AsyncMachine, verbs: Client, step: Step) -> str:
    """Let it run, whatever was done with it before, and say what it was; nothing when it runs already."""
    async with _shown(verbs, machine.name, step), asyncio.timeout(_PATIENCE):
        while machine.state in _PASSING:  # of a tour that was interrupted; what it does may end without an event
            await asyncio.sleep(_NAP)
            await machine.refresh()
        was = machine.state
        if was in (State.STOPPED, State.FAILED):
            await machine.power_on()
            return f"was {was}, and is switched on again"
        if was in (State.PAUSED, State.HIBERNATED):
            await machine.resume()
            return f"was {was}, and goes on"
    return ""


async def _engine_words(verbs: Client, record: Machine) -> str:
    """What it runs on, and why."""
    info = await verbs.info()
    ours = "Ramet's own kernel" if info.kernel_kind == KernelKind.OWN and info.kernel == record.kernel else "kernel"
    booted = f"booted in {seconds(record.boot_time)}, " if record.boot_time else ""
    accelerator = record.accelerator.words if record.accelerator else "?"
    lines = [f"{booted}on {accelerator}: {info.accelerator_reason}", f"{ours} {record.kernel}"]
    if info.kernel_kind == KernelKind.DEBIAN:
        status = await kernels.build_status()
        if status.state is BuildState.RUNNING:
            lines.append(f"Ramet's own kernel is being built ({status.fraction:.0%}): machines that start later boot it")
    return "\n".join(lines)


# Chapters


async def commands(tour: Tour) -> None:
    """Commands and their answers."""
    with tour.steps.step("Commands") as step:
        shown = []
        for command in _COMMANDS:
            result = await tour.machine.run(command, check=True, timeout=60)
            said = result.stdout.decode(errors="replace").strip()
            shown.append(f"$ {command}  ({seconds(result.duration)})\n  {said}")
        step.end(Mark.OK, "\n".join(shown))


async def files(tour: Tour) -> None:
    """A file in and out again, and proof that it is the same."""
    data = os.urandom(SIZE)
    there = "/srv/hello/noise"
    with tour.steps.step("Files") as step, tempfile.TemporaryDirectory(prefix="ramet-tour-") as work:
        local, back = Path(work) / "noise", Path(work) / "back"
        local.write_bytes(data)
        step.progress("copying in")
        begun = step.took
        await tour.machine.files.upload(local, there)
        half = step.took
        step.progress("copying out")
        await tour.machine.files.download(there, back)
        done = step.took
        summed = (await tour.machine.run(["sha256sum", there], check=True, timeout=60)).stdout.split()[0].decode()
        if back.read_bytes() != data or summed != hashlib.sha256(data).hexdigest():
            raise GuestError("the file that was copied in and out is not the same", hint="This is a bug of Ramet's: please report it.")
        await tour.machine.files.remove(there)
        rates = f"in ({_rate(half - begun)}), out ({_rate(done - half)})"
        step.end(Mark.OK, f"{format_size(SIZE)} {rates}, SHA-256 equal")


def _rate(took: float) -> str:
    return f"{format_size(int(SIZE / max(took, 1e-6)))}/s"


async def web(tour: Tour) -> None:
    """A server inside that outlives its caller, reached from here through a forwarded port."""
    with tour.steps.step("Web server") as step:
        running = [each for each in await tour.machine.processes() if each.label == _SERVER and each.state == "running"]
        if not running:
            await tour.machine.files.upload(example().with_name("serve.pl"), "/srv/hello/serve.pl")
            async with await tour.machine.start(["perl", "serve.pl"], detach=True, label=_SERVER) as process:
                async with asyncio.timeout(60):
                    if not await anext(process.stdout.lines(), ""):
                        raise GuestError(f"serve.pl does not listen: {(await process.stderr.read()).decode(errors='replace').strip()}")
        port = next(each.host for each in (await tour.machine.refresh()).ports if each.guest == 8080)
        async with httpx2.AsyncClient(trust_env=False, timeout=60) as client:
            answer = await client.get(f"http://127.0.0.1:{port}/")
        what = "still runs from the last time" if running else "copied in and started, to stay"
        step.end(Mark.OK, f"serve.pl {what}\n$ curl http://127.0.0.1:{port}\n  {answer.text.strip()}")


async def cost(tour: Tour) -> None:
    """What the host pays."""
    with tour.steps.step("Costs") as step:
        record = await tour.machine.refresh()
        used = record.usage
        image = images.load(paths.StateDir.default(), record.image_digest)
        shared = f"; {format_size(image.disk_used)} of image, shared by all machines" if image else ""
        if used is None:
            step.end(Mark.LIMITED, "not known: its processes are gone")
            return
        memory = f"{format_size(used.memory)} of memory (of {format_size(record.spec.memory)})"
        disk = f"{format_size(used.disk)} of disk (of {format_size(record.spec.disk)})"
        step.end(Mark.OK, f"{memory}, {disk}{shared}")


CHAPTERS: tuple[Callable[[Tour], Awaitable[None]], ...] = (commands, files, web, cost)


def _next(tour: Tour) -> None:
    """What to try now: the machine stays."""
    call, name = program(), tour.machine.name
    tour.console.print(f"\n[bold]{escape(name)}[/] keeps running. Try:")
    for command, words in (
        (f"{call} shell {name}", "a terminal in it"),
        (f"{call} run {name} -- apt-get update", "any command; you are root"),
        (f"{call} cp README.md {name}:/srv/hello/", "files in, or out the other way round"),
        (f"{call} fork {name} -n 3", "three more, going on by themselves"),
        (f"{call} tree", "who descends from whom, at what cost"),
        (f"{call} snapshot {name} good", "keep this instant"),
        (f"{call} restore {name} good", "go back to it"),
        (f"{call} hibernate {name}", "memory to the disk, until `resume`"),
        (f"{call} delete {name}", "gone, disk and all"),
    ):
        tour.console.print(f"  {command:<40} [dim]{words}[/]", highlight=False, soft_wrap=True)


async def _tour(console: Console) -> None:
    steps = Steps(console)
    console.print("[bold]Ramet[/]: from a definition to a machine that answers, and to four of it\n", highlight=False)
    context = setup.Context(state=paths.StateDir.default())
    # The set-up is told in full when it has something to do, in a line when it has not.
    with steps.step("Set-up") as step:
        first = setup.ready(await setup.perform(setup.Context(state=context.state, change=False), Steps(Console(quiet=True))))
        if first:
            await setup.perform(context, Steps(Console(quiet=True)))
            step.end(Mark.OK, f"everything is there; `{program()} setup --check` lists it")
        else:
            step.end(Mark.BACKGROUND, "some of it is missing, and is brought now; next time this takes a second")
    if not first:
        await setup.perform(context, steps)
    verbs = await _daemon(steps)
    async with verbs:
        machine = await _machine(steps, verbs)
        tour = Tour(steps=steps, verbs=verbs, machine=machine)
        for chapter in CHAPTERS:
            await chapter(tour)
        await colony.show(Colony(steps=steps, verbs=verbs, first=machine, program=example().with_name("count.pl")))
        _next(tour)


def main(argv: Sequence[str]) -> int:
    """`ramet tour`. Raises RametError."""
    if set(argv) & {"-h", "--help"}:
        Console().print(
            "Usage: ramet tour\n\nSet up what is missing, then make a machine, use it, fork it, rewind it, hibernate it. Takes no arguments.",
            highlight=False,
        )
        return 0
    if argv:
        raise SpecError(f"`ramet tour` takes no arguments, and got {' '.join(argv)}")
    try:
        asyncio.run(_tour(Console()))
    except TimeoutError:
        raise TimeoutExpiredError(
            "the tour waited too long for an answer", hint="`ramet list` and `ramet logs hello` may tell why."
        ) from None
    return 0
