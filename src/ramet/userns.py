"""Programs that make file trees with owners other than us: as root directly, else as the root of a user namespace with subordinate ids."""

from __future__ import annotations

import dataclasses
import os
import pwd
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ramet import process
from ramet.errors import CommandError, HostError

IDS = 65536  # what an image may use: nobody is 65534

# The Debian package of each program.
PACKAGES = {
    "skopeo": "skopeo",
    "umoci": "umoci",
    "mmdebstrap": "mmdebstrap",
    "mke2fs": "e2fsprogs",
    "debugfs": "e2fsprogs",
    "unshare": "util-linux",
    "setpriv": "util-linux",
    "zstd": "zstd",
    "newuidmap": "uidmap",
    "newgidmap": "uidmap",
}


def require(*programs: str) -> None:
    """Raise HostError, naming the Debian packages, unless all are installed."""
    missing = [name for name in programs if not process.find(name)]
    if missing:
        packages = sorted({PACKAGES.get(name, name) for name in missing})
        raise HostError(
            f"not installed: {', '.join(missing)}",
            hint=f"Run `sudo apt-get install {' '.join(packages)}`, or `ramet setup`.",
            details={"packages": packages},
        )


def rootless() -> bool:
    """Whether we need a namespace to own files as others."""
    return os.geteuid() != 0


def argv(*command: str, mounts: bool = False) -> list[str]:
    """The command line that runs a command as (the namespace's) root, and that dies with us, even by SIGKILL.

    mounts: give it its own mounts and processes too: what it mounts is gone when it ends, and so is what it left running.
    """
    flags = ["--map-root-user", "--map-auto"] if rootless() else []
    if mounts:
        flags += ["--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    return [*dying(), *(["unshare", *flags, "--"] if flags else []), *command]


def dying(*command: str) -> list[str]:
    """A command that is killed when the process that started it dies: what it makes would have no owner."""
    return ["setpriv", "--pdeathsig", "KILL", "--", *command]


def subordinate(text: str, user: str, uid: int) -> int:
    """How many ids a subuid(5) file gives a user in its first range (the one that `unshare --map-auto` takes)."""
    for line in text.splitlines():
        name, _, rest = line.strip().partition(":")
        first, _, count = rest.partition(":")
        if name in (user, str(uid)) and first.isdigit() and count.isdigit():
            return int(count)
    return 0


async def check() -> None:
    """Raise HostError, saying what to do, unless we can make trees with owners here."""
    require("setpriv", "unshare")
    if not rootless():
        return
    require("newuidmap", "newgidmap")
    uid = os.getuid()
    try:
        user = pwd.getpwuid(uid).pw_name
    except KeyError:
        user = str(uid)
    short = [name for name in ("/etc/subuid", "/etc/subgid") if subordinate(_read(name), user, uid) < IDS]
    if short:
        raise HostError(
            f"user {user} has fewer than {IDS} subordinate ids in {' and '.join(short)}, and without them files keep no owners",
            hint=f"Run `sudo usermod --add-subuids 100000-{100000 + IDS - 1} --add-subgids 100000-{100000 + IDS - 1} {user}` (a range that no other user has), "
            "or run Ramet as root.",
        )
    try:
        (await run(("true",), deadline=30)).check("making a user namespace")
    except CommandError as error:
        raise HostError(
            f"this host does not let user {user} make user namespaces: {error.details['log'] or error.message}",
            hint="Run Ramet as root, or look at `sysctl user.max_user_namespaces kernel.unprivileged_userns_clone` "
            "and `kernel.apparmor_restrict_unprivileged_userns`.",
        ) from error


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


async def run(
    command: Sequence[str],
    *,
    deadline: float,
    root: bool = True,
    mounts: bool = False,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    apart: bool = False,
    on_line: Callable[[str], None] | None = None,
) -> process.Finished:
    """`process.run` of a command that dies with us and, with `root`, may own files as anybody. Errors name the command, not what wraps it."""
    full = argv(*command, mounts=mounts) if root else dying(*command)
    finished = await process.run(full, deadline=deadline, env=env, cwd=cwd, apart=apart, on_line=on_line)
    return dataclasses.replace(finished, argv=tuple(command))


async def remove(path: Path) -> None:
    """Remove a tree, also what belongs to subordinate ids. Never leaves the file system it is on, never follows a link."""
    if not os.path.lexists(path):
        return
    command: Sequence[str] = ("rm", "-rf", "--one-file-system", "--", str(path))
    result = await process.run(command, deadline=600)
    if rootless() and os.path.lexists(path):
        result = await run(command, deadline=600)
    result.check(f"removing {path}")
