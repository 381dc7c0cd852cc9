"""A machine's disk: one qcow2 overlay of its own over one raw file that others may share.

`disk.json` says which overlay is the machine's and which layer it stands on (none: the image). It is replaced by a rename, which is the moment at which a
freeze counts. A freeze is: QEMU is given overlay N+1 over N; N becomes a layer; `disk.json` says N+1 over that layer; N is removed.
A crash in between leaves N+1 beside what `disk.json` names: then the guest wrote to N+1, or did not; either way N+1 over a layer of N is right,
unless QEMU lives and still writes to N, which it can be asked.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from ramet.paths import MachineDir
from ramet.records import dump, load
from ramet.store.disk import allocated as taken
from ramet.store.disk import replace


@dataclass(frozen=True, kw_only=True)
class DiskState:
    """number: of the machine's own overlay; layer: id of the layer it stands on, or empty for the image; size: of the disk in bytes."""

    number: int
    layer: str
    size: int


def read(files: MachineDir) -> DiskState | None:
    """None where the machine has no disk yet."""
    try:
        text = files.disk.read_text()
    except FileNotFoundError:
        return None
    return load(DiskState, json.loads(text), str(files.disk))


def write(files: MachineDir, state: DiskState) -> None:
    """From now on this is the machine's disk."""
    replace(files.disk, json.dumps(dump(state)).encode(), durable=True)


def others(files: MachineDir, state: DiskState) -> list[int]:
    """Numbers of overlays that `disk.json` does not name, oldest first."""
    numbers = (path.stem.removeprefix("disk-") for path in files.root.glob("disk-*.qcow2"))
    return sorted(int(number) for number in numbers if number.isdecimal() and int(number) != state.number)


def allocated(files: MachineDir) -> int:
    """Bytes that the machine's own overlay takes on the host's disk."""
    return sum(taken(path) for path in files.root.glob("disk-*.qcow2"))
