"""Frozen records and enums that every row shares. Sizes are bytes, times seconds (wall clock: Unix time). The wire carries these same records as JSON."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeVar

T = TypeVar("T")


class State(StrEnum):
    """Where a machine is in its life; `lifecycle` says what may follow."""

    CREATING = "creating"
    STARTING = "starting"
    RUNNING = "running"
    STOPPING = "stopping"
    STOPPED = "stopped"
    FAILED = "failed"
    DELETING = "deleting"
    PAUSED = "paused"
    HIBERNATING = "hibernating"
    HIBERNATED = "hibernated"
    RESUMING = "resuming"
    RESTORING = "restoring"


class Accelerator(StrEnum):
    KVM = "kvm"
    TCG = "tcg"

    @property
    def words(self) -> str:
        """As users read it."""
        return "KVM" if self is Accelerator.KVM else "software emulation (TCG)"


class InitMode(StrEnum):
    """What runs as the guest's first process: our agent, or the image's own init with the agent beside it."""

    AGENT = "agent"
    IMAGE = "image"


class Reclaim(StrEnum):
    """How soon the host gets back what a guest has not used for a while. EAGER: within a minute; GENTLE: within minutes, at hardly any cost."""

    OFF = "off"
    GENTLE = "gentle"
    EAGER = "eager"


def strict(kind: type[T]) -> type[T]:
    """Where pydantic reads this record, unknown keys are errors (its `with_config`, without importing pydantic: the CLI would wait 50 ms for it)."""
    kind.__pydantic_config__ = {"extra": "forbid"}  # type: ignore[attr-defined]
    return kind


@strict
@dataclass(frozen=True, kw_only=True)
class Port:
    """A TCP port of the guest that is reachable on the host's loopback. host 0: any free one."""

    guest: int
    host: int = 0


@strict
@dataclass(frozen=True, kw_only=True)
class Lifecycle:
    """Shell commands run in the guest: create once after the first boot, start after every boot."""

    create: str = ""
    start: str = ""


@strict
@dataclass(frozen=True, kw_only=True)
class Drive:
    """A disk beside the root. name: its serial in the guest; size in bytes; mount: where its file system is there, empty: a blank device."""

    name: str
    size: int
    mount: str = ""


@strict
@dataclass(frozen=True, kw_only=True)
class Spec:
    """What a machine should be. memory and disk in bytes."""

    name: str
    image: str = "debian:bookworm"
    cpus: int = 1
    memory: int = 512 << 20
    disk: int = 8 << 30
    env: dict[str, str] = field(default_factory=dict)
    workdir: str = ""
    user: str = ""
    ports: tuple[Port, ...] = ()
    lifecycle: Lifecycle = Lifecycle()
    init: InitMode = InitMode.AGENT
    entrypoint: bool = True
    reclaim: Reclaim = Reclaim.GENTLE
    drives: tuple[Drive, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ImageConfig:
    """What an OCI image's config asks for (https://github.com/opencontainers/image-spec/blob/main/config.md)."""

    env: dict[str, str] = field(default_factory=dict)
    user: str = ""
    workdir: str = ""
    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()

    @property
    def service(self) -> tuple[str, ...]:
        """The program the image exists to run, or nothing where that is only an interactive shell."""
        argv = self.entrypoint + self.cmd
        shells = {"sh", "bash", "ash", "dash", "zsh", "fish"}
        return () if not argv or (len(argv) == 1 and argv[0].rpartition("/")[2] in shells) else argv


@dataclass(frozen=True, kw_only=True)
class Image:
    """An image as a disk. digest: `sha256:…` of what it was made from; disk_size: bytes of the ext4 file (sparse)."""

    digest: str
    reference: str
    config: ImageConfig
    disk_size: int
    disk_used: int
    created_at: float


@dataclass(frozen=True, kw_only=True)
class Activity:
    """What an operation is doing now. fraction: 0 to 1, or None where it cannot be known."""

    verb: str
    step: str
    fraction: float | None = None

    def goes_on_from(self, told: Activity | None) -> bool:
        """Whether it is so small a step from what was told last that nobody need hear of it."""
        if told is None or told.step != self.step or told.fraction is None or self.fraction is None:
            return False
        return 0 <= self.fraction - told.fraction < 0.01 and self.fraction < 1


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What a member of the tree costs the host now, in bytes; what several share is divided among them, so that sums are what the host really uses.

    memory: PSS of QEMU, of which private is what nobody else maps, shared its part of the rest, overhead what is not the guest's memory: QEMU's
    program, heap and translated code. returned: of the guest's memory, what the host does not hold for it; reclaimable: of what it holds, what the guest
    could give back (its clean page cache), None where it was not asked. disk: what its own overlay takes; disk_unique: that, and
    all else that nobody else stands on; disk_shared: its part of the layers and the image that others stand on too. cpu: seconds since its start.
    """

    memory: int = 0
    disk: int = 0
    cpu: float = 0.0
    private: int = 0
    shared: int = 0
    overhead: int = 0
    returned: int = 0
    reclaimable: int | None = None
    disk_unique: int = 0
    disk_shared: int = 0


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A machine as users see it.

    reason: why it failed or stopped; pid: QEMU's. parent: the machine that it was forked from, or whose snapshot it was made from; snapshot: name or
    id of the one it last came from or was saved as. boot_time: seconds from its start, or from its snapshot, until commands ran in it. usage: None in
    the answers to a fork and a start from a snapshot, which do not wait for it to be counted. memory_limit: bytes of memory that it may use, 0: the spec's.
    memory_granted: bytes that the guest has, more than the limit where it needed more; None where that is not known.
    """

    id: str
    name: str
    state: State
    spec: Spec
    created_at: float
    image_digest: str = ""
    reason: str = ""
    started_at: float | None = None
    pid: int | None = None
    accelerator: Accelerator | None = None
    kernel: str = ""
    network: str = ""
    ports: tuple[Port, ...] = ()
    activity: Activity | None = None
    usage: Usage | None = None
    boot_time: float | None = None
    parent: str = ""
    snapshot: str = ""
    memory_limit: int = 0
    memory_granted: int | None = None


class SnapshotState(StrEnum):
    """SAVING: its pages are being compressed, it can be used. TESTING: it is being started once. READY: it was, and answered (or that was not wanted)."""

    SAVING = "saving"
    TESTING = "testing"
    READY = "ready"
    BROKEN = "broken"


@dataclass(frozen=True, kw_only=True)
class Compatibility:
    """What a snapshot's memory was saved under; a start under anything else is refused. agent: the protocol's version; format: of the snapshot itself."""

    machine: str
    qemu: str
    cpu: str
    accelerator: Accelerator
    kernel: str
    agent: int
    format: int


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A point in a machine's life.

    name: empty for the automatic ones (a fork's, a hibernation's), which go when no machine stands on them. machine: whose it is. memory: whether it
    holds the running programs too, else only the disk. parent: id of the snapshot that the machine stood on. pool: how many machines
    are to be kept restored and parked; pooled: how many are. pause: seconds that the machine stood still. saved: bytes of memory that it holds beyond its
    parent's; slimmed: those that the machine gave back just before, caches and free memory. stored: bytes on the host's disk of the
    layers that it added. memory_limit: the machine's. drive_layers: of the spec's drives, in their order. origin: REGISTRY/NAME@DIGEST that it was pulled from.
    absent: bytes of it that are still only there. dependents: machines and snapshots that stand on it.
    """

    id: str
    name: str
    machine: str
    state: SnapshotState
    created_at: float
    memory: bool
    spec: Spec
    reason: str = ""
    parent: str = ""
    image_digest: str = ""
    disk_layer: str = ""
    memory_layer: str = ""
    template: bool = False
    pool: int = 0
    pooled: int = 0
    pause: float | None = None
    saved: int = 0
    slimmed: int = 0
    stored: int = 0
    compatibility: Compatibility | None = None
    memory_limit: int = 0
    drive_layers: tuple[str, ...] = ()
    origin: str = ""
    absent: int = 0
    dependents: tuple[str, ...] = ()

    @property
    def disk_layers(self) -> tuple[str, ...]:
        """Of the root disk and of the drives, in the spec's order."""
        return (self.disk_layer, *self.drive_layers)

    @property
    def layers(self) -> tuple[str, ...]:
        """All that it names."""
        return tuple(filter(None, (*self.disk_layers, self.memory_layer)))

    @property
    def title(self) -> str:
        """What users call it: its name, or its id where it has none."""
        return self.name or self.id


@dataclass(frozen=True, kw_only=True)
class ForkOutcome:
    """What became of one child of a fork: the machine, or why there is none (code, message, hint as in the API's errors)."""

    name: str
    machine: Machine | None = None
    error: dict[str, str] | None = None


class NodeKind(StrEnum):
    IMAGE = "image"
    MACHINE = "machine"
    SNAPSHOT = "snapshot"


@dataclass(frozen=True, kw_only=True)
class TreeNode:
    """One member of the tree of who descends from whom. parent: id of another node, or empty. gone: a deleted machine whose descendants live.

    usage: what it costs; the machines that are parked for a template count as its own. stored: bytes that a snapshot's own layers take on the host's disk.
    """

    id: str
    parent: str
    kind: NodeKind
    name: str
    state: str = ""
    created_at: float = 0.0
    usage: Usage | None = None
    stored: int = 0
    gone: bool = False


@strict
@dataclass(frozen=True, kw_only=True)
class Size:
    """Of a terminal, in characters."""

    rows: int = 24
    columns: int = 80


@strict
@dataclass(frozen=True, kw_only=True)
class Command:
    """A program to run in a guest. user and cwd default to the machine's; timeout in seconds, None: no limit.

    stdin: whether the caller will send any. pty: give it a terminal of this size. detach: it outlives its caller. label: shown in lists.
    """

    argv: tuple[str, ...]
    env: dict[str, str] = field(default_factory=dict)
    cwd: str = ""
    user: str = ""
    timeout: float | None = None
    stdin: bool = False
    pty: Size | None = None
    detach: bool = False
    label: str = ""


class Ending(StrEnum):
    EXITED = "exited"
    SIGNALED = "signaled"
    TIMEOUT = "timeout"
    DETACHED = "detached"


class Channel(StrEnum):
    STDOUT = "stdout"
    STDERR = "stderr"


@dataclass(frozen=True, kw_only=True)
class Started:
    """process: the agent's number for it; pid: in the guest."""

    process: int
    pid: int


@dataclass(frozen=True, kw_only=True)
class Output:
    channel: Channel
    data: bytes


@dataclass(frozen=True, kw_only=True)
class Exit:
    """How a process ended. code: exit status, or the signal's number."""

    ending: Ending
    code: int

    @property
    def status(self) -> int:
        """As a shell reports it: 128 + signal; 124 for a deadline (as timeout(1))."""
        if self.ending is Ending.TIMEOUT:
            return 124
        return 128 + self.code if self.ending is Ending.SIGNALED else self.code


ProcessEvent = Started | Output | Exit


@dataclass(frozen=True, kw_only=True)
class Result:
    """A finished command.

    duration: seconds from the request to its end, measured by the daemon. truncated: bytes of output beyond the limit that were dropped.
    """

    ending: Ending
    code: int
    status: int
    stdout: bytes
    stderr: bytes
    duration: float
    truncated: int = 0

    @property
    def text(self) -> str:
        """stdout as text; bytes that are not UTF-8 are replaced."""
        return self.stdout.decode(errors="replace")


@dataclass(frozen=True, kw_only=True)
class Process:
    """A process that the agent started. state: running, exited, signaled or timeout; code as in Exit."""

    id: int
    pid: int
    state: str
    code: int
    started_at: float
    detached: bool
    attached: bool
    label: str
    command: str


class FileType(StrEnum):
    FILE = "file"
    DIRECTORY = "directory"
    LINK = "link"
    CHARACTER = "character"
    BLOCK = "block"
    FIFO = "fifo"
    SOCKET = "socket"


@dataclass(frozen=True, kw_only=True)
class FileInfo:
    """A file of the guest. mode: permission bits with setuid, setgid, sticky; target: of a symbolic link."""

    name: str
    type: FileType
    mode: int
    uid: int
    gid: int
    size: int
    modified_at: float
    links: int
    target: str = ""


@dataclass(frozen=True, kw_only=True)
class HostInfo:
    """The host as Ramet sees it.

    parked: machines that wait in pools, beyond `machines`. memory_committed: bytes that the machines may come to use, of memory_capacity that they may at most:
    the host's memory times overcommit, less what is kept for the host. limits: what this host cannot enforce, with the reason, for people to read.
    """

    version: str
    accelerator: Accelerator
    accelerator_reason: str
    kernel: str
    kernel_kind: str
    kernel_build: str
    qemu: str
    cpus: int
    memory: int
    memory_available: int
    disk_available: int
    machines: int
    running: int
    network: str
    state_dir: str
    parked: int = 0
    memory_committed: int = 0
    memory_capacity: int = 0
    overcommit: float = 1.0
    limits: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something happened to a machine. kind: state, activity, removed."""

    at: float
    kind: str
    machine: str
    state: State | None = None
    activity: Activity | None = None
    reason: str = ""
