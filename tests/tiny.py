"""A machine's image in two megabytes: a static busybox. It boots in the time of its kernel, and everything that a test of ours needs is in it."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from ramet import paths
from tests.host import layouts

APPLETS = """
[ awk base64 basename cat chmod chown cmp cp cut date dd df dirname dmesg du echo env expr fallocate false find free getty grep groups gunzip gzip
halt head hexdump hostname httpd id init ip kill killall ln logger ls md5sum mkdir mkfifo mknod mktemp mount mv nc netstat nproc od pidof ping
poweroff printf ps pwd readlink realpath reboot rm rmdir sed seq setsid sh sha256sum sleep sort stat stty su sync tail tar tee test timeout touch
tr true truncate tty umount uname uniq uptime usleep wc wget which whoami xargs yes
"""

PASSWD = "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\napp:x:1000:1000:app:/home/app:/bin/sh\n"
GROUP = "root:x:0:\nnogroup:x:65534:\napp:x:1000:\nstaff:x:50:app\n"
INITTAB = "::sysinit:/bin/true\n::respawn:/bin/sleep 100000\n::shutdown:/bin/sync\n"


def busybox() -> Path:
    """A static busybox: the host's, else Debian's package, unpacked into the cache (nothing is installed)."""
    cached = paths.cache_dir() / "tools" / "busybox"
    if not cached.exists():
        cached.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cached.parent) as work:
            user = ["-o", "APT::Sandbox::User=root"] if os.geteuid() == 0 else []
            subprocess.run(["apt-get", "-q", *user, "download", "busybox-static"], cwd=work, check=True, timeout=600)
            subprocess.run(["dpkg-deb", "-x", str(next(Path(work).glob("*.deb"))), f"{work}/tree"], check=True, timeout=60)
            found = next(path for path in Path(work).glob("tree/**/bin/busybox"))
            shutil.copy2(found, f"{work}/busybox")
            (Path(work) / "busybox").rename(cached)
    return cached


def layout(root: Path) -> layouts.Layout:
    """The image as an OCI layout. The same bytes each time, so that its disk is made once for a cache."""
    binary = busybox().read_bytes()
    entries = [layouts.directory(name) for name in ("bin", "sbin", "dev", "etc", "home", "proc", "run", "srv", "sys", "usr", "var")]
    entries += [layouts.directory("tmp", 0o1777), layouts.directory("root", 0o700), layouts.directory("home/app", 0o755, 1000, 1000)]
    entries += [layouts.file("bin/busybox", binary, mode=0o755)]
    entries += [layouts.symlink(f"bin/{name}", "busybox") for name in APPLETS.split()]
    entries += [layouts.symlink("sbin/init", "../bin/busybox")]
    entries += [layouts.file(f"etc/{name}", text.encode()) for name, text in (("passwd", PASSWD), ("group", GROUP), ("inittab", INITTAB))]
    config = {"Env": ["PATH=/bin:/sbin", "IMAGE=tiny"], "Cmd": ["sh"]}
    return layouts.make(root, layouts.layer(*entries), config=config)


def kept() -> layouts.Layout:
    """The same, in the cache: an image is known again by the path it came from. Sessions that make it at once end up with one."""
    tools = paths.cache_dir() / "tools"
    tools.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=tools) as work:
        made = layout(Path(work) / "tiny")
        place = tools / f"tiny-{made.manifest.removeprefix('sha256:')[:16]}"
        with contextlib.suppress(OSError):
            made.path.rename(place)
    return made.at(place)
