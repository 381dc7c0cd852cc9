"""A machine's disks: each one qcow2 overlay of its own over one raw file that others may share.

`disk.json` says which overlays are the machine's and which layers they stand on (none: an image, or what a drive begins with). It is replaced by a rename,
which is the moment at which a freeze counts, for all disks at once. A freeze is: QEMU is given overlay N+1 over N; N becomes a layer; `disk.json` says N+1
over that layer; N is removed. A crash in between leaves N+1 beside what `disk.json` names: then the guest wrote to N+1, or did not; either way N+1 over a
layer of N is right, unless QEMU lives and still writes to N, which it can be asked. Each disk counts for itself, so their numbers may differ.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

from ramet.errors import DaemonError, LayerError
from ramet.paths import MachineDir
from ramet.records import dump, load
from ramet.store.disk import allocated as taken
from ramet.store.disk import replace


@dataclass(frozen=True, kw_only=True)
class DiskState:
    """One disk. number: of the machine's own overlay; layer: id of the layer it stands on, or empty where it stands on none; size: of the disk in bytes.

    name: of the drive, empty for the root. base: of a drive that stands on no layer: the raw file that it begins with, relative to the state directory;
    empty: it begins with zeros.
    """

    number: int
    layer: str
    size: int
    name: str = ""
    base: str = ""


Disks = tuple[DiskState, ...]  # the root first, then the drives in the spec's order; none: the machine has no disk yet


@dataclass(frozen=True, kw_only=True)
class _File(DiskState):
    """disk.json: the root disk as it has always been, and the drives."""

    drives: tuple[DiskState, ...] = ()


def read(files: MachineDir) -> Disks:
    """What the machine has. LayerError when that is damaged."""
    try:
        text = files.disk.read_text()
    except FileNotFoundError:
        return ()
    try:
        found = load(_File, json.loads(text), str(files.disk))
    except (ValueError, DaemonError) as error:
        raise LayerError(f"{files.disk}, which says what the machine's disks stand on, is damaged", hint="Delete the machine.") from error
    root = DiskState(**{field.name: getattr(found, field.name) for field in dataclasses.fields(DiskState)})
    return (root, *found.drives)


def write(files: MachineDir, state: Disks) -> None:
    """From now on these are the machine's disks."""
    root, *drives = state
    value = dump(_File(**dump(root), drives=tuple(drives)))
    replace(files.disk, json.dumps(value).encode(), durable=True)


def others(files: MachineDir, state: DiskState) -> list[int]:
    """Numbers of overlays of a disk that are not the one it is in, oldest first."""
    begin = f"disk-{state.name}-" if state.name else "disk-"
    numbers = (path.stem.removeprefix(begin) for path in files.root.glob(f"{begin}*.qcow2"))
    return sorted(int(number) for number in numbers if number.isdecimal() and int(number) != state.number)


def allocated(files: MachineDir) -> int:
    """Bytes that the machine's own overlays take on the host's disk."""
    return sum(taken(path) for path in files.root.glob("disk-*.qcow2"))
