"""Machines: make, list, show, start, stop; the host; ports; events."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ramet.cli import text
from ramet.cli.base import (
    SNAPSHOT_MARKS,
    Directory,
    Env,
    Json,
    Name,
    OptionalName,
    User,
    app,
    client,
    environment,
    find_spec,
    own_name,
    perform,
    snapshot_names,
)
from ramet.errors import NotFoundError, SpecError
from ramet.model import Machine, Spec, State, Usage
from ramet.units import format_size

if TYPE_CHECKING:
    from ramet.client import Client


@app.command()
def up(
    where: Annotated[
        Path | None, typer.Argument(help="A ramet.toml or its directory; the nearest one upward when left out.", show_default=False)
    ] = None,
    name: Annotated[str, typer.Option(help="Call the machine this instead.", show_default=False)] = "",
    json: Json = False,
) -> None:
    """Bring up the machine that a ramet.toml describes: make it, start it when it is stopped, let it go on when it is paused or hibernated."""

    async def work() -> None:
        from ramet.spec import load

        path = where or find_spec()
        if not path:
            raise SpecError(
                "there is no ramet.toml here or above", hint="Write one (docs/spec.md), or `ramet create NAME` makes a machine without."
            )
        spec = load(path)
        spec = dataclasses.replace(spec, name=name) if name else spec
        async with client() as verbs:
            machine, was = await _bring_up(verbs, spec)
            if json:
                text.as_json(machine)
                return
            _ready(machine, was)
            for change in _changes(machine.spec, spec):
                text.note(f"note: {change} in {path}: `ramet delete {machine.name}` and `ramet up` apply it to a new disk.")

    perform(work, json=json)


async def _bring_up(verbs: Client, spec: Spec) -> tuple[Machine, State | None]:
    """The running machine, and the state that it was found in."""
    from ramet.cli.progress import steps

    try:
        found = await verbs.get(spec.name)
    except NotFoundError:
        async with steps(verbs, spec.name):
            return await verbs.create(spec), None
    if found.state is State.RUNNING:
        return found, found.state
    async with steps(verbs, spec.name):
        if found.state in (State.PAUSED, State.HIBERNATED):
            return await verbs.resume(spec.name), found.state
        return await verbs.start(spec.name), found.state


def _changes(old: Spec, new: Spec) -> list[str]:
    """What a definition says now that the machine was not made with."""
    return [
        f"`{field.name}` has changed"
        for field in dataclasses.fields(Spec)
        if field.name not in ("name", "ports") and getattr(old, field.name) != getattr(new, field.name)
    ]


def _ready(machine: Machine, was: State | None) -> None:
    """Say that it runs, and how to go on."""
    restored = was is State.HIBERNATED or (was is None and bool(machine.snapshot))
    how = {None: "is made and runs", State.RUNNING: "was running already"}.get(was, "runs again")
    details = [
        machine.accelerator.words if machine.accelerator else "",
        took(machine, booted=not restored) if was not in (State.RUNNING, State.PAUSED) else "",
    ]
    said = ", ".join(filter(None, details))
    text.say(f"{paint_name(machine)} {how}{f' ({said})' if said else ''}.")
    for port in machine.ports:
        text.say(f"  port {port.guest} is http://127.0.0.1:{port.host}" if port.host else f"  port {port.guest}")
    text.say(f"  ramet shell {machine.name}")
    text.say(f"  ramet run {machine.name} -- COMMAND")
    text.say(f"  ramet stop {machine.name}")


def took(machine: Machine, *, booted: bool = True) -> str:
    """How long its start took: a boot, or a start from a snapshot, which is too quick for tenths."""
    if not machine.boot_time:
        return ""
    return f"booted in {machine.boot_time:.1f} s" if booted and not machine.parent else f"ready in {machine.boot_time:.2f} s"


def paint_name(machine: Machine) -> str:
    return text.paint(machine.name, text.BOLD)


@app.command()
def down(name: OptionalName = "", json: Json = False) -> None:
    """Stop the machine of this directory's ramet.toml, or the one named. Its disk stays; a hibernated one is left as it is."""

    async def work() -> None:
        async with client() as verbs:
            which = own_name(name)
            found = await verbs.get(which)
            down = found.state in (State.STOPPED, State.HIBERNATED)  # stopping a hibernated one would forget its memory
            machine = found if down else await verbs.stop(which)
            again = "resume" if machine.state is State.HIBERNATED else "start"
            said = f"{machine.name} is {machine.state if down else State.STOPPED}; `ramet up` or `ramet {again} {machine.name}` starts it again."
            text.as_json(machine) if json else text.say(said)

    perform(work, json=json)


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="Its name.", show_default=False)],
    image: Annotated[str, typer.Option(help="debian:SUITE, an OCI image, oci:DIRECTORY or docker-archive:FILE.", show_default=False)] = "",
    cpus: Annotated[int | None, typer.Option(show_default=False)] = None,
    memory: Annotated[str, typer.Option(help="Such as 512MiB or 2G.", show_default=False)] = "",
    disk: Annotated[str, typer.Option(help="Such as 8G.", show_default=False)] = "",
    drive: Annotated[
        list[str] | None, typer.Option(help="A disk more: NAME:SIZE or NAME:SIZE:/MOUNT; may be repeated.", show_default=False)
    ] = None,
    env: Env = None,
    port: Annotated[
        list[str] | None, typer.Option("--port", "-p", help="GUEST or HOST:GUEST; may be repeated.", show_default=False)
    ] = None,
    user: User = "",
    workdir: Directory = "",
    reclaim: Annotated[
        str, typer.Option(help="How soon memory that it does not use goes back: off, gentle or eager.", show_default=False)
    ] = "",
    origin: Annotated[
        str,
        typer.Option(
            "--from",
            help="A snapshot or template that it goes on from, also one of a registry.",
            autocompletion=snapshot_names,
            show_default=False,
        ),
    ] = "",
    disk_only: Annotated[bool, typer.Option("--disk-only", help="With --from: boot its disk, leave its memory.")] = False,
    json: Json = False,
) -> None:
    """Make a machine and start it, without a ramet.toml, or from a snapshot: its programs go on where they were.

    A snapshot that is not here and is named as in a registry is pulled first, without its content, which comes when it is needed.

    Example: ramet create --from shop@warm shop-2
    """

    async def work() -> None:
        from ramet.cli.progress import steps
        from ramet.spec import build

        given = {
            "name": name, "image": image, "cpus": cpus, "memory": memory, "disk": disk, "env": environment(env),
            "ports": port, "user": user, "workdir": workdir, "reclaim": reclaim, "drives": drive,
        }  # fmt: skip
        given = {key: value for key, value in given.items() if value not in (None, "", {})}
        if origin and len(given) > 1:
            raise SpecError(
                f"--{list(given)[1]} has no place beside --from", hint="What the snapshot was saved with is what it goes on with."
            )
        if disk_only and not origin:
            raise SpecError("--disk-only has no place without --from")
        spec = None if origin else build(given, source="create")
        async with client() as verbs:
            async with steps(verbs, name):
                machine = await (verbs.create(spec) if spec else verbs.create_from(origin, name, disk_only=disk_only))
            text.as_json(machine) if json else _ready(machine, None)

    perform(work, json=json)


@app.command(name="list")
def list_machines(json: Json = False) -> None:
    """All machines."""

    async def work() -> None:
        async with client() as verbs:
            machines = await verbs.list()
        if json:
            text.as_json(machines)
        elif machines:
            _table(machines)
        else:
            text.note("There are no machines. `ramet up` makes the one that a ramet.toml describes, `ramet create NAME` one without.")

    perform(work, json=json)


def _table(machines: list[Machine]) -> None:
    heads = ["NAME", "STATE", "IMAGE", "CPUS", "MEMORY", "DISK", "AGE"]
    rows = [
        [m.name, _state(m), m.spec.image, str(m.spec.cpus), format_size(m.spec.memory), format_size(m.spec.disk), text.age(m.created_at)]
        for m in machines
    ]
    if descended := any(m.parent for m in machines):
        heads.append("FROM")
        rows = [[*row, _origin(m)] for row, m in zip(rows, machines, strict=True)]
    lines = text.table(heads, rows, give=(2, 7, 0) if descended else (2, 0), paints=[text.colour_of(m.state) for m in machines])
    text.say(lines[0])
    for machine, line in zip(machines, lines[1:], strict=True):
        text.say(line)
        if machine.reason and machine.state in (State.FAILED, State.PAUSED, State.HIBERNATED):
            text.say(text.paint(f"  {text.clean(machine.reason)}"[: text.width()], text.colour_of(machine.state)))


def _origin(machine: Machine) -> str:
    """The snapshot that it came from where that has a name, else the machine."""
    return machine.snapshot if machine.parent and any(mark in machine.snapshot for mark in SNAPSHOT_MARKS) else machine.parent


def _state(machine: Machine) -> str:
    fraction = machine.activity.fraction if machine.activity else None
    return machine.state if fraction is None else f"{machine.state} {fraction:.0%}"


@app.command()
def show(name: OptionalName = "", json: Json = False) -> None:
    """One machine in detail, with what it costs now."""

    async def work() -> None:
        async with client() as verbs:
            machine = await verbs.get(own_name(name))
        if json:
            text.as_json(machine)
        else:
            text.say("\n".join(text.facts(_facts(machine))))

    perform(work, json=json)


def _facts(machine: Machine) -> list[tuple[str, str]]:
    spec, usage, activity = machine.spec, machine.usage, machine.activity
    ports = [f"{p.guest} → 127.0.0.1:{p.host}" if p.host else str(p.guest) for p in machine.ports]
    return [
        ("name", machine.name),
        ("id", machine.id),
        ("state", text.paint(machine.state, text.colour_of(machine.state))),
        ("doing", f"{activity.verb}: {activity.step}" if activity else ""),
        ("reason", text.clean(machine.reason)),
        ("parent", machine.parent),
        ("snapshot", machine.snapshot),
        ("image", f"{spec.image} ({machine.image_digest[:19]})" if machine.image_digest else spec.image),
        ("cpus", str(spec.cpus)),
        ("memory", format_size(spec.memory) + _limit(machine)),
        *(_memory(usage) if usage else []),
        ("disk", format_size(spec.disk)),
        *(_disk(usage) if usage else []),
        *((f"drive {each.name}", format_size(each.size) + (f" at {each.mount}" if each.mount else "")) for each in spec.drives),
        ("cpu time", f"{usage.cpu:.1f} s" if usage and machine.pid else ""),
        ("user", spec.user),
        ("workdir", spec.workdir),
        ("environment", " ".join(f"{key}={text.clean(value)}" for key, value in spec.env.items())),
        ("ports", ", ".join(ports)),
        ("runs on", machine.accelerator.words if machine.accelerator else ""),
        ("kernel", machine.kernel),
        ("network", machine.network),
        ("pid", str(machine.pid or "")),
        ("made", f"{text.age(machine.created_at)} ago"),
        ("started", f"{text.age(machine.started_at)} ago" if machine.started_at else ""),
        ("ready in" if machine.parent else "booted in", f"{machine.boot_time:.2f} s" if machine.boot_time else ""),
    ]


def _limit(machine: Machine) -> str:
    """What it may use of its memory, and what the guest has where that is another thing."""
    limit, has = machine.memory_limit or machine.spec.memory, machine.memory_granted
    said = f", limited to {format_size(limit)}" if machine.memory_limit else ""
    return said + (f", the guest has {format_size(has)}" if has not in (None, limit) else "")


def _memory(usage: Usage) -> list[tuple[str, str]]:
    """What of its memory the host holds."""
    given = "" if usage.reclaimable is None else f"{format_size(usage.reclaimable)}, which its guest could give back"
    return [
        ("  in use", _parts(usage.private, usage.shared)),
        ("  overhead", f"{format_size(usage.overhead)} of that, QEMU itself" if usage.overhead else ""),
        ("  reclaimable", given),
        ("  returned", f"{format_size(usage.returned)}, which the host does not hold" if usage.memory else ""),
    ]


def _disk(usage: Usage) -> list[tuple[str, str]]:
    """What of its disk, and of the memory that was saved, is on the host's."""
    return [
        ("  in use", _parts(usage.disk_unique, usage.disk_shared)),
        ("  written", f"{format_size(usage.disk)} of that, since it was last saved" if usage.disk else ""),
    ]


def _parts(unique: int, shared: int) -> str:
    """shared: its part of what several have."""
    split = f": {format_size(unique)} unique, {format_size(shared)} its part of what is shared" if shared else ""
    return f"{format_size(unique + shared)}{split}"


@app.command()
def start(name: OptionalName = "", json: Json = False) -> None:
    """Start a stopped or failed machine from its own disk."""

    async def work() -> None:
        from ramet.cli.progress import steps

        which = own_name(name)
        async with client() as verbs:
            async with steps(verbs, which):
                machine = await verbs.start(which)
            text.as_json(machine) if json else _ready(machine, State.STOPPED)

    perform(work, json=json)


@app.command()
def stop(
    name: OptionalName = "", force: Annotated[bool, typer.Option("--force", help="At once, as a power cut.")] = False, json: Json = False
) -> None:
    """Power a machine off. Its disk stays."""

    async def work() -> None:
        async with client() as verbs:
            machine = await verbs.stop(own_name(name), force=force)
            text.as_json(machine) if json else text.say(f"{machine.name} is stopped.")

    perform(work, json=json)


@app.command()
def logs(
    name: OptionalName = "",
    source: Annotated[str, typer.Option(help="console: what the guest prints; qemu: the hypervisor's messages.")] = "console",
    lines: Annotated[int, typer.Option("--lines", "-n", min=1, help="How many at most.")] = 200,
    json: Json = False,
) -> None:
    """The end of what the guest printed on its console."""

    async def work() -> None:
        async with client() as verbs:
            data = await verbs.logs(own_name(name), source=source, lines=lines)
        said = data.decode(errors="replace")
        if json:
            text.as_json({"source": source, "text": said})
        else:
            text.say("\n".join(text.clean(line) for line in said.replace("\r\n", "\n").rstrip("\n").split("\n")))

    perform(work, json=json)


@app.command()
def metrics(name: OptionalName = "", json: Json = False) -> None:
    """The guest's own numbers: memory, cpu, pressure, disk."""

    async def work() -> None:
        async with client() as verbs:
            found = await verbs.metrics(own_name(name))
        if json:
            text.as_json(found)
        else:
            text.say("\n".join(text.facts([(text.clean(key), f"{value:.12g}") for key, value in found.items()])))

    perform(work, json=json)


@app.command()
def info(json: Json = False) -> None:
    """This host: what machines run on, and what it cannot enforce."""

    async def work() -> None:
        async with client() as verbs:
            host = await verbs.info()
        if json:
            text.as_json(host)
            return
        pairs = [
            ("ramet", host.version),
            ("machines", f"{host.machines}, {host.running} running{f', {host.parked} parked in pools' if host.parked else ''}"),
            ("run on", f"{host.accelerator.words}{f': {host.accelerator_reason}' if host.accelerator_reason else ''}"),
            ("kernel", f"{host.kernel} ({host.kernel_kind})"),
            ("kernel build", host.kernel_build),
            ("qemu", host.qemu),
            ("cpus", str(host.cpus)),
            ("memory", f"{format_size(host.memory)}, {format_size(host.memory_available)} available"),
            (
                "capacity",
                f"{format_size(host.memory_capacity)} for machines ({host.overcommit:g} times), {format_size(host.memory_committed)} taken",
            ),
            ("disk", f"{format_size(host.disk_available)} available"),
            ("network", host.network),
            ("state", host.state_dir),
        ]
        text.say("\n".join(text.facts(pairs)))
        for limit in host.limits:
            text.say(f"{text.paint('limit', text.YELLOW)}  {limit}")

    perform(work, json=json)


@app.command()
def forward(
    name: Name,
    ports: Annotated[list[str] | None, typer.Argument(help="GUEST, or HOST:GUEST; none: show what is open.", show_default=False)] = None,
    close: Annotated[bool, typer.Option("--close", help="Take these ports of the guest back.")] = False,
    json: Json = False,
) -> None:
    """Make TCP ports of a machine reachable on this computer's loopback."""

    async def work() -> None:
        from ramet.spec import parse_port

        try:
            wanted = [parse_port(port) for port in ports or []]
        except ValueError as error:
            raise SpecError(str(error)) from None
        async with client() as verbs:
            opened = []
            for port in wanted:
                if close:
                    await verbs.close_port(name, port.guest)
                else:
                    opened.append(await verbs.open_port(name, port))
            shown = opened if wanted and not close else list((await verbs.get(name)).ports)
            if json:
                text.as_json(shown)
            else:
                text.say(
                    "\n".join(f"port {port.guest} of {name} is 127.0.0.1:{port.host}" for port in shown) or f"no port of {name} is open"
                )

    perform(work, json=json)


@app.command()
def events(name: Annotated[str, typer.Argument(help="Only this machine's.", show_default=False)] = "", json: Json = False) -> None:
    """What happens, from now on, until Ctrl-C."""

    async def work() -> None:
        import sys
        from time import localtime, strftime

        from ramet.rest import to_json

        async with client() as verbs:
            async for event in verbs.events(name):
                if json:
                    text.say(to_json(event).decode())
                else:
                    what = event.state or (f"{event.activity.verb}: {event.activity.step}" if event.activity else event.kind)
                    reason = f" ({event.reason})" if event.reason else ""
                    text.say(text.clean(f"{strftime('%H:%M:%S', localtime(event.at))}  {event.machine}  {what}{reason}"))
                sys.stdout.flush()

    perform(work, json=json)
