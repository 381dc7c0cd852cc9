"""What the tests of images share: images worth testing, and looks into the disks made of them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import select
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from ramet import images, oci
from ramet.errors import ImageError, RametError
from ramet.model import Image
from ramet.paths import StateDir

from .layouts import Entry, directory, file, hardlink, layer, symlink, whiteout

PING = bytes.fromhex("0100000200200000000000000000000000000000")  # cap_net_raw=ep, version 2
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="mounting and device nodes need root")
DISK_NODE = Entry(name="srv/disk", kind=tarfile.BLKTYPE, device=(8, 17), mode=0o660, gid=6)
OTHER = "arm64" if oci.architecture() == "amd64" else "amd64"
STEPS = ["looking up the image", "fetching the image", "unpacking the image", "writing the disk"]


def working_in(place: Path) -> list[int]:
    """Processes, other than us, whose directory or arguments lead into a place."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            names = [str((entry / "cwd").readlink()), (entry / "cmdline").read_text(errors="replace")]
        except OSError:
            continue
        if int(entry.name) != os.getpid() and any(str(place) in name for name in names):
            found.append(int(entry.name))
    return found


def silent(_: str, __: float | None) -> None: ...


def ensure(state: StateDir, name: str) -> Image:
    return asyncio.run(asyncio.wait_for(images.ensure(state, name, progress=silent), 280))


def debugfs(disk: Path, request: str) -> str:
    return subprocess.run(
        ["debugfs", "-R", request, str(disk)], capture_output=True, text=True, timeout=60, env={"PATH": os.environ["PATH"] + ":/sbin"}
    ).stdout


def listing(disk: Path, place: str = "/") -> dict[str, tuple[str, int, int, int]]:
    """name -> octal mode with type, uid, gid, size of a directory on a disk."""
    rows = [line.split("/") for line in debugfs(disk, f"ls -p {place}").splitlines() if line.startswith("/")]
    return {row[5]: (row[2], int(row[3]), int(row[4]), int(row[6] or 0)) for row in rows}


def cat(disk: Path, place: str) -> str:
    return debugfs(disk, f"cat {place}")


def disk_of(state: StateDir, image: Image) -> Path:
    disk = state.image(image.digest).disk
    assert subprocess.run(["e2fsck", "-fn", str(disk)], capture_output=True, timeout=60).returncode == 0
    return disk


RICH = (
    layer(
        directory("bin"),
        file("bin/ping", b"x" * 5000, mode=0o755, xattrs={"security.capability": PING, "user.note": b"a\xff\x00z"}),
        file("bin/su", b"su", mode=0o4755),
        hardlink("bin/su2", "bin/su"),
        file("bin/wall", mode=0o2755, gid=5),
        directory("home/app", 0o700, 1000, 1001),
        file("home/app/secret", b"s", mode=0o600, uid=1000, gid=1001),
        file("home/app/nobody", uid=65534, gid=65534),
        directory("tmp", 0o1777),
        symlink("sh", "/bin/busybox"),
        Entry(name="pipe", kind=tarfile.FIFOTYPE, mode=0o640),
        directory("opaque"),
        file("opaque/old"),
        file("gone"),
        file("kept", b"1"),
    ),
    layer(whiteout("gone"), file("opaque/.wh..wh..opq", b""), file("opaque/new"), file("kept", b"2")),
)
SETTINGS = {"Env": ["A=1"], "User": "app", "WorkingDir": "/srv", "Entrypoint": ["/bin/app"], "Cmd": ["-x"]}


def check_rich(disk: Path) -> None:
    top, programs, home = listing(disk), listing(disk, "/bin"), listing(disk, "/home/app")
    assert "gone" not in top
    assert set(listing(disk, "/opaque")) - {".", ".."} == {"new"}
    assert cat(disk, "/kept") == "2"
    assert (top["tmp"][0], top["pipe"][0], top["sh"][0]) == ("041777", "010640", "120777")
    assert (programs["su"][0], programs["wall"][:3]) == ("104755", ("102755", 0, 5))
    assert home["."][:3] == ("040700", 1000, 1001)
    assert home["secret"][:3] == ("100600", 1000, 1001)
    assert home["nobody"][1:3] == (65534, 65534)
    links = re.findall(r"Inode: (\d+).*?Links: (\d+)", debugfs(disk, "stat /bin/su") + debugfs(disk, "stat /bin/su2"), re.DOTALL)
    assert links[0] == links[1]
    assert links[0][1] == "2"
    xattrs = debugfs(disk, "ea_list /bin/ping")
    assert f"security.capability (20) = {PING.hex(' ')}" in xattrs
    assert "user.note (4) = 61 ff 00 7a" in xattrs


SCRIPT = """
import asyncio, sys
from pathlib import Path
from ramet import images
from ramet.errors import RametError
from ramet.paths import StateDir
def progress(step, part):
    print("step", step, part, flush=True)
    if len(sys.argv) > 3 and step == sys.argv[3]:
        sys.stdin.read()
try:
    print(asyncio.run(images.ensure(StateDir(root=Path(sys.argv[1])), sys.argv[2], progress=progress)).digest, flush=True)
except RametError as error:
    print(type(error).__name__, error.message, error.hint, flush=True)
"""


def start(state: StateDir, name: str, *stop: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(state.root), name, *stop], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def children(pid: int) -> list[int]:
    found = []
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it ended meanwhile
        found += [int(c) for task in Path(f"/proc/{pid}/task").iterdir() for c in (task / "children").read_text().split()]
    return found + [grandchild for child in found for grandchild in children(child)]


def kill_with_children(process: subprocess.Popen[str]) -> int:
    """kill -9, then wait for its children to be gone as well; returns how many there were."""
    fds = []
    for pid in children(process.pid):
        with contextlib.suppress(ProcessLookupError):
            fds.append(os.pidfd_open(pid))
    process.kill()
    process.communicate(timeout=60)
    for fd in fds:
        assert select.select([fd], [], [], 60)[0], "a child outlives its parent"
        os.close(fd)
    return len(fds)


def fails(state: StateDir, name: str, kind: type[RametError] = ImageError) -> RametError:
    """The error that making an image must end with; nothing is left of it."""
    with pytest.raises(kind) as caught:
        ensure(state, name)
    assert type(caught.value) is kind
    assert name in caught.value.message
    assert list(state.images.iterdir()) == []
    return caught.value


def last(result: subprocess.CompletedProcess[str]) -> str:
    assert result.stdout, result.stderr
    return result.stdout.splitlines()[-1]
