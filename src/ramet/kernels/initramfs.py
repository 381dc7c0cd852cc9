"""The initramfs: the agent as /init, a console, and the modules of a kernel that needs some. Uncompressed: copying is cheaper than unpacking."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from stat import S_IFCHR, S_IFDIR, S_IFREG

from ramet import process
from ramet.kernels.record import MODULE_ORDER, Kernel, key, module_names, publish_path
from ramet.paths import cache_dir, share_dir

RECIPE = "initramfs-1"
FLOOR_LINE = "ramet-floor"  # what the floor's init prints


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A file of a cpio archive. name: relative, no leading slash. mode: type and permissions. device: major and minor of a node."""

    name: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


def newc(entries: Iterable[Entry]) -> bytes:
    """A cpio archive in the kernel's format ("newc"), owned by root, without times: the same entries give the same bytes."""
    archive = bytearray()
    trailer = Entry(name="TRAILER!!!", mode=0)
    for inode, entry in enumerate([*entries, trailer], start=1):
        name = entry.name.encode() + b"\0"
        links = 2 if entry.mode & 0o170000 == S_IFDIR else 1
        # inode, mode, uid, gid, links, mtime, size, device (2), node's device (2), length of the name, checksum
        fields = (0 if entry is trailer else inode, entry.mode, 0, 0, links, 0, len(entry.data), 0, 0, *entry.device, len(name), 0)
        archive += b"070701" + b"".join(b"%08X" % field for field in fields) + name
        archive += bytes(-len(archive) % 4)
        archive += entry.data
        archive += bytes(-len(archive) % 4)
    return bytes(archive)


def entries(init: bytes, modules: Path | None) -> Iterator[Entry]:
    """What is in the initramfs. Each file comes after its directory, as the kernel unpacks in order."""
    for name in ("dev", "proc", "sys", "run"):
        yield Entry(name=name, mode=S_IFDIR | 0o755)
    yield Entry(name="dev/console", mode=S_IFCHR | 0o600, device=(5, 1))
    yield Entry(name="dev/null", mode=S_IFCHR | 0o666, device=(1, 3))
    yield Entry(name="init", mode=S_IFREG | 0o755, data=init)
    if modules:
        yield Entry(name="modules", mode=S_IFDIR | 0o755)
        for name in [*module_names(modules), MODULE_ORDER]:
            yield Entry(name=f"modules/{name}", mode=S_IFREG | 0o644, data=(modules / name).read_bytes())


def initramfs(kernel: Kernel, init: Path) -> Path:
    """The initramfs that boots `init` (the agent) under a kernel, from the cache when it is there."""
    program = init.read_bytes()
    path = cache_dir() / "initramfs" / key(RECIPE, kernel.digest, hashlib.sha256(program).hexdigest())
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".work-", delete=False) as staged:
            staged.write(newc(entries(program, kernel.modules)))
        publish_path(Path(staged.name), path)
    return path


async def floor_initramfs(kernel: Kernel) -> Path:
    """An initramfs whose init prints FLOOR_LINE and waits: the time until then is the least that any boot can take. Needs a C compiler."""
    source = share_dir("kernel") / "floor.c"
    with tempfile.TemporaryDirectory(prefix="ramet-floor-") as directory:
        program = Path(directory) / "floor"
        options = ["-Os", "-static", "-nostdlib", "-ffreestanding", "-fno-stack-protector", "-fno-pie", "-no-pie"]
        await process.output(["gcc", *options, "-o", str(program), str(source)], deadline=60, what="compiling the boot floor")
        await process.output(["strip", str(program)], deadline=60, what="stripping the boot floor")
        return initramfs(kernel, program)
