"""The product's interface. The engine (this host) and the client (over HTTP) implement it; REST, SDK and CLI are held to it by a test."""

from __future__ import annotations

import builtins
from collections.abc import AsyncIterable, AsyncIterator
from typing import Protocol

from ramet.model import (
    Command,
    Event,
    FileInfo,
    ForkOutcome,
    HostInfo,
    Machine,
    Port,
    Process,
    ProcessEvent,
    Reclaim,
    Result,
    Snapshot,
    Spec,
    TreeNode,
)
from ramet.storage import Collected, LayerInfo, Transfer

OUTPUT_LIMIT = 16 << 20  # bytes of each of stdout and stderr that `run` keeps; more belongs in `execute`
WRITE_FLAGS = "ctp"  # create, truncate, parents: how `write_file` treats the file, in the agent's letters


class Verbs(Protocol):
    """Machines by name. Every method may raise RametError; the ones that return an iterator raise from its first step."""

    async def info(self) -> HostInfo:
        """This host: accelerator, kernel, capacity, what it cannot enforce."""
        ...

    async def create(self, spec: Spec) -> Machine:
        """Make a machine and start it; returns when commands run in it. ExistsError when the name is taken."""
        ...

    async def list(self) -> list[Machine]: ...

    async def get(self, name: str) -> Machine:
        """One machine, with what it costs now. `name` may be its id."""
        ...

    async def start(self, name: str) -> Machine:
        """Boot a stopped or failed machine from its own disk."""
        ...

    async def stop(self, name: str, *, force: bool = False) -> Machine:
        """Power off: the guest is asked, then made to. force: at once, as a power cut."""
        ...

    async def update(self, name: str, *, memory: int | None = None, reclaim: Reclaim | None = None) -> Machine:
        """Change what a machine may cost, at once where it runs, else from its next start on.

        memory: bytes that it may use, at most what it was made with; 0: all of it. A guest that needs more keeps it: `memory_granted` says what it has.
        reclaim: how hard it gives back what it does not use.
        """
        ...

    async def delete(self, name: str) -> None:
        """Remove a machine, its disk and its processes, whatever it is doing."""
        ...

    async def fork(self, name: str, *, count: int = 1, names: tuple[str, ...] = ()) -> builtins.list[ForkOutcome]:
        """Make `count` machines that go on from this one's present instant: memory, programs, disk. It stands still for some milliseconds.

        names: theirs, instead of `NAME-1`, `NAME-2`…; then count is not looked at. One that fails does not keep the others from living.
        """
        ...

    async def pause(self, name: str) -> Machine:
        """Stop its cpus; its memory stays where it is."""
        ...

    async def resume(self, name: str) -> Machine:
        """Let a paused or hibernated machine go on, with the right time and fresh randomness."""
        ...

    async def hibernate(self, name: str, *, slim: bool = True) -> Machine:
        """Save a machine to the disk and give its memory back to the host. `resume` goes on from the same instant.

        slim: its caches and free memory are dropped before; without, its programs find their files in memory again.
        """
        ...

    async def compact(self, name: str) -> int:
        """Give back what a machine's disk holds and nobody needs; returns how many bytes the host's disk got back. The machine may go on meanwhile."""
        ...

    async def snapshot(self, name: str, label: str = "", *, memory: bool = True, test: bool = True) -> Snapshot:
        """Keep this instant as `NAME@label`. memory: the running programs too. test: start it once before it counts as ready (in the background)."""
        ...

    async def snapshots(self, name: str = "") -> builtins.list[Snapshot]:
        """All that have a name, or those of one machine, the automatic ones too; oldest first."""
        ...

    async def get_snapshot(self, snapshot: str) -> Snapshot:
        """One, by name or id."""
        ...

    async def restore(self, name: str, snapshot: str = "") -> Machine:
        """Rewind a machine in place: it keeps its name and address, what it did since is gone. Without a name: to the last one."""
        ...

    async def create_from(self, snapshot: str, name: str, *, disk_only: bool = False) -> Machine:
        """Make a machine from a snapshot or template. disk_only: boot its disk, whatever its memory."""
        ...

    async def template(self, snapshot: str, *, label: str = "", pool: int = 0) -> Snapshot:
        """Make a snapshot a template, named `label` (`shop:1.2`; a plain name gets `:latest`). pool: machines to keep restored and parked."""
        ...

    async def delete_snapshot(self, snapshot: str, *, cascade: bool = False, dry_run: bool = False) -> builtins.list[str]:
        """Remove a snapshot; returns what goes, in order. DependentsError when others stand on it. cascade: they go too. dry_run: only tell."""
        ...

    async def tree(self) -> builtins.list[TreeNode]:
        """Who descends from whom: images, machines, snapshots; parents before children."""
        ...

    async def layers(self) -> builtins.list[LayerInfo]:
        """The layers of this host, oldest first."""
        ...

    async def get_layer(self, layer: str) -> LayerInfo: ...

    async def verify_layer(self, layer: str) -> builtins.list[str]:
        """Read and check every chunk; what is wrong, a sentence each."""
        ...

    def export_layer(self, layer: str) -> AsyncIterator[bytes]:
        """The layer with all it stands on, as the raw image."""
        ...

    async def push(self, snapshot: str, reference: str) -> Transfer:
        """Send a snapshot to a registry, as REGISTRY/NAME:TAG; what is there already is not sent again. Events tell how far it is, under that name."""
        ...

    async def pull(self, reference: str, *, lazy: bool = False) -> Transfer:
        """Have a snapshot of a registry here, under its name there. lazy: without its content, which comes when it is needed and in the background."""
        ...

    async def convert(self, image: str, name: str = "") -> Snapshot:
        """Make an image a template (without memory), which can be pushed and then started before it is fetched. name: its own where none is given."""
        ...

    async def gc(self, *, budget: int | None = None, dry_run: bool = False) -> Collected:
        """Remove what no snapshot and no machine needs. budget: bytes that all layers may take: beyond it, chunks that a registry has too go."""
        ...

    async def fsck(self, *, repair: bool = False) -> builtins.list[str]:
        """Check all that is kept: what is wrong, a sentence each. repair: remove what can be fetched or made again."""
        ...

    def read_blob(self, digest: str, *, offset: int = 0, length: int = -1) -> AsyncIterator[bytes]:
        """Bytes of a blob (zstd seekable), for other hosts. NotFoundError where they are not here."""
        ...

    async def logs(self, name: str, *, source: str = "console", lines: int = 200) -> bytes:
        """The tail of the guest's console, or of QEMU's messages (source `qemu`)."""
        ...

    async def metrics(self, name: str) -> dict[str, float]:
        """The guest's own numbers: memory, cpu, pressure, disk."""
        ...

    async def run(self, name: str, command: Command, stdin: bytes = b"") -> Result:
        """Run a command to its end. OutcomeUnknownError when the guest fell silent while it may have run."""
        ...

    def execute(self, name: str, command: Command) -> AsyncIterator[ProcessEvent]:
        """Start a command and stream it: Started, Output…, Exit. Ending the iteration kills it, unless it is detached."""
        ...

    def attach(self, name: str, process: int) -> AsyncIterator[ProcessEvent]:
        """As `execute`, for a process that runs already; what it wrote while nobody looked (its last 64 KiB) comes first."""
        ...

    async def processes(self, name: str) -> builtins.list[Process]: ...

    async def send_input(self, name: str, process: int, data: bytes, *, eof: bool = False) -> None:
        """Write to the stdin of a process that this daemon streams; waits while the process does not read."""
        ...

    async def signal(self, name: str, process: int, signal: int) -> None:
        """Signal a process's whole group."""
        ...

    async def resize(self, name: str, process: int, rows: int, columns: int) -> None: ...

    async def forget(self, name: str, process: int) -> None:
        """Drop a finished process from the list."""
        ...

    def read_file(self, name: str, path: str, *, offset: int = 0, length: int = -1, user: str = "") -> AsyncIterator[bytes]: ...

    async def write_file(
        self,
        name: str,
        path: str,
        data: AsyncIterable[bytes],
        *,
        mode: int = 0o644,
        offset: int = 0,
        flags: str = WRITE_FLAGS,
        user: str = "",
    ) -> None:
        """flags: letters of `c`reate, e`x`clusive, `t`runcate, `a`ppend, `p`arents, `r`eplace (atomically, by rename)."""
        ...

    async def stat_file(self, name: str, path: str, *, user: str = "") -> FileInfo: ...

    async def list_files(self, name: str, path: str, *, user: str = "") -> builtins.list[FileInfo]: ...

    async def remove_file(self, name: str, path: str, *, recursive: bool = False, user: str = "") -> None: ...

    async def rename_file(self, name: str, path: str, target: str, *, user: str = "") -> None: ...

    async def make_dir(self, name: str, path: str, *, mode: int = 0o755, parents: bool = True, user: str = "") -> None: ...

    def pack(self, name: str, path: str, *, user: str = "") -> AsyncIterator[bytes]:
        """A tar stream of a directory's contents, or of one file."""
        ...

    async def unpack(self, name: str, path: str, data: AsyncIterable[bytes], *, owners: bool = False, user: str = "") -> None:
        """Write a tar stream into a directory. owners: keep those of the archive (as root)."""
        ...

    async def open_port(self, name: str, port: Port) -> Port:
        """Make a TCP port of the guest reachable on the host's loopback; returns the host port chosen."""
        ...

    async def close_port(self, name: str, guest: int) -> None: ...

    def events(self, name: str = "") -> AsyncIterator[Event]:
        """What happens from now on, to one machine or to all."""
        ...
