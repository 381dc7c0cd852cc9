"""What a snapshot is called, and whether its memory fits this host. Pure."""

from __future__ import annotations

import hashlib
import re

from ramet import reference
from ramet.agentwire import VERSION
from ramet.errors import ImageError, IncompatibleError, SpecError
from ramet.model import Compatibility, Snapshot
from ramet.reference import Registry
from ramet.vm import argv

FORMAT = 1  # of what is saved beside the layers: the devices' state as QEMU writes it

_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_TEMPLATE = re.compile(r"[a-z0-9][a-z0-9._-]*(/[a-z0-9][a-z0-9._-]*)*([:@][A-Za-z0-9_][A-Za-z0-9._-]*)")
_LONGEST = 200  # characters of a template's name; those of references that are pulled have limits of their own


def label(machine: str, text: str) -> str:
    """The name of a machine's snapshot: `MACHINE@LABEL`."""
    if not _LABEL.fullmatch(text):
        raise SpecError(f"{text!r} cannot name a snapshot", hint="Letters, digits, `.`, `_`, `-`; at most 64.")
    return f"{machine}@{text}"


def template_name(text: str) -> str:
    """A template's name, with a tag: `shop` is `shop:latest`."""
    full = text if re.search(r"[:@]", text.rpartition("/")[2]) else f"{text}:latest"
    if len(full) > _LONGEST or not (_TEMPLATE.fullmatch(full) or _is_reference(full)):
        raise SpecError(
            f"{text!r} cannot name a template", hint="Write it as an image's name: `debian:12`, `acme/shop:1.2`, `acme/shop@4f2a`."
        )
    return full


def pulled_name(source: Registry) -> str:
    """What a snapshot of a registry is called here."""
    return f"{source.name}@{source.digest}" if source.digest else f"{source.name}:{source.tag}"


def _is_reference(text: str) -> bool:
    """Whether it names something in a registry, whose host is named: a name that a pull gives."""
    try:
        source = reference.parse(text)
    except ImageError:
        return False
    return isinstance(source, Registry) and pulled_name(source) == text


def layout(config: argv.Config) -> str:
    """The devices of a machine, short: what the saved state of its devices fits."""
    devices = hashlib.sha256(argv.machine_type(config).encode()).hexdigest()[:8]
    return f"q35, {config.cpus} cpu, {config.memory >> 20} MiB, devices {devices}"


def compatibility(config: argv.Config, qemu: str, cpu: str, kernel: str) -> Compatibility:
    """qemu: its version, without the distribution's. cpu: the host's model. kernel: the guest's."""
    return Compatibility(
        machine=layout(config), qemu=qemu, cpu=cpu, accelerator=config.accelerator, kernel=kernel, agent=VERSION, format=FORMAT
    )


def require_fit(snapshot: Snapshot, here: Compatibility) -> None:
    """IncompatibleError unless the snapshot's memory can go on here. The kernel is in the memory, so it need not be the one that machines boot here."""
    was = snapshot.compatibility
    if was is None:
        raise IncompatibleError(f"{snapshot.title} has no memory", hint="`--disk-only` boots its disk.")
    for name, title in (
        ("format", "format"),
        ("accelerator", "accelerator"),
        ("qemu", "QEMU"),
        ("machine", "machine type"),
        ("cpu", "cpu"),
        ("agent", "agent's protocol"),
    ):
        saved, now = getattr(was, name), getattr(here, name)
        if saved != now:
            raise IncompatibleError(
                f"the memory of {snapshot.title} does not fit this host: it was saved with {title} {saved}, here it is {now}",
                hint="`ramet create --from SNAPSHOT NAME --disk-only` boots its disk instead.",
                details={"field": name, "saved": str(saved), "here": str(now)},
            )
