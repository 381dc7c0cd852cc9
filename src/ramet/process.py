"""The only module that starts programs: a fixed environment, passed file descriptors, a deadline, a kill ladder, and errors that show the log's tail."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import signal
import subprocess  # noqa: TID251
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ramet.errors import CommandError, HostError, NoSpaceError

TAIL_LINES = 30
_TICKS = os.sysconf("SC_CLK_TCK")
KILL_GRACE = 5.0  # seconds between SIGTERM and SIGKILL
_SPACE = ("no space left on device", "disk quota exceeded")

# What host programs may see of our environment. Proxies, certificates and registry credentials are the user's to set; LD_PRELOAD is not.
_PASSED = [
    "PATH",
    "HOME",
    "USER",
    "LOGNAME",
    "TMPDIR",
    "TERM",
    "TZ",
    "XDG_RUNTIME_DIR",
    "XDG_CACHE_HOME",
    "XDG_CONFIG_HOME",
    "XDG_DATA_HOME",
    "REGISTRY_AUTH_FILE",
    "DOCKER_CONFIG",
    "http_proxy",
    "https_proxy",
    "no_proxy",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "RAMET_HOME",
    "RAMET_CACHE",
    "RAMET_KERNEL",
    "RAMET_ACCEL",
    "RAMET_PORT",
    "RAMET_DEBIAN_MIRROR",
    "CONTAINERS_REGISTRIES_CONF",
    "ALL_PROXY",
    "all_proxy",
]

# What only processes of our own see besides: the daemon's settings, credentials of registries, what credential helpers need. No QEMU does.
_CONFIDED = re.compile(r"RAMET_\w+|(AWS|AZURE|GOOGLE|CLOUDSDK|GNUPG|GPG|PASSWORD_STORE|DBUS)_?\w*")
_ADDRESS = {"RAMET_URL", "RAMET_TOKEN"}  # of another daemon


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of every program we start: a passed list, a C.UTF-8 locale (we read messages), sbin in PATH."""
    env = {name: os.environ[name] for name in _PASSED if name in os.environ}
    path = env.get("PATH", "/usr/local/bin:/usr/bin:/bin")
    env["PATH"] = path + "".join(f":{d}" for d in ("/usr/local/sbin", "/usr/sbin", "/sbin") if d not in path.split(":"))
    env["LC_ALL"] = "C.UTF-8"
    return env | dict(extra or {})


def confided() -> dict[str, str]:
    """What the daemon and the fetcher must be started with, beside what every program is."""
    return {name: value for name, value in os.environ.items() if _CONFIDED.fullmatch(name) and name not in _ADDRESS}


def find(program: str) -> str | None:
    """The path of a host program, looked up as it would be when run."""
    return shutil.which(program, path=environment()["PATH"])


@dataclass(frozen=True, kw_only=True)
class Finished:
    """How a program ended. returncode: negative for a signal. output: stdout (and stderr, unless kept apart), errors: stderr."""

    argv: tuple[str, ...]
    returncode: int
    output: str
    errors: str

    def check(self, what: str = "") -> Finished:
        """Raise unless it exited 0."""
        if self.returncode == 0:
            return self
        raise failure(self.argv, self.returncode, self.errors or self.output, what)


def failure(argv: Sequence[str], returncode: int, log: str, what: str = "") -> HostError:
    """The error for a program that failed; a full disk is told apart, for users can do something about that."""
    tail = "\n".join(log.strip().splitlines()[-TAIL_LINES:])
    ended = f"was killed by {signal.Signals(-returncode).name}" if returncode < 0 else f"exited {returncode}"
    last = tail.splitlines()[-1].strip() if tail else "no output"
    details = {"argv": list(argv), "returncode": returncode, "log": tail}
    if any(mark in tail.lower() for mark in _SPACE):
        return NoSpaceError(f"{what or argv[0]}: no space left on the disk", details=details)
    return CommandError(
        f"{what or argv[0]} failed: {argv[0]} {ended}: {last}", hint="The end of its output is in the details.", details=details
    )


@contextlib.asynccontextmanager
async def running(
    argv: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    pass_fds: Sequence[int] = (),
    stdin: int = subprocess.DEVNULL,
    stdout: int = subprocess.PIPE,
    stderr: int = subprocess.STDOUT,
    nice: int = 0,
) -> AsyncIterator[asyncio.subprocess.Process]:
    """A program in a session of its own; whatever happens in the body, its whole group is gone afterwards."""
    full = ["nice", "-n", str(nice), *argv] if nice else list(argv)
    try:
        process = await asyncio.create_subprocess_exec(  # noqa: TID251
            *full,
            env=environment(env),
            cwd=cwd,
            pass_fds=tuple(pass_fds),
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
            limit=1 << 20,
        )
    except FileNotFoundError as error:
        raise HostError(f"the program {argv[0]} is not installed", hint="Run `ramet setup`, which says what is missing.") from error
    try:
        yield process
    finally:
        await _end(process)


async def _end(process: asyncio.subprocess.Process) -> None:
    """The kill ladder: SIGTERM to the group, a grace, SIGKILL."""
    if process.returncode is None:
        _kill_group(process.pid, signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), KILL_GRACE)
    _kill_group(process.pid, signal.SIGKILL)
    await process.wait()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(KILL_GRACE):
            while _is_group(process.pid):  # noqa: ASYNC110  (nothing tells when those that it started have ended)
                await asyncio.sleep(0.005)


def _is_group(pid: int) -> bool:
    """Whether something of a process group still runs. What has ended does not count, though its parent may never ask for it."""
    try:
        os.killpg(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    stats = (_stat(int(path.name)) for path in Path("/proc").glob("[0-9]*"))
    return any(fields and fields[0] != "Z" and int(fields[2]) == pid for fields in stats)


def _kill_group(pid: int, sig: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, sig)


async def run(
    argv: Sequence[str],
    *,
    deadline: float,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    pass_fds: Sequence[int] = (),
    input: bytes = b"",  # noqa: A002  (the name that the standard library uses)
    apart: bool = False,
    nice: int = 0,
    on_line: Callable[[str], None] | None = None,
) -> Finished:
    """Run a program to its end, within `deadline` seconds.

    apart: keep stderr apart from stdout. on_line: called with each line of the output as it comes (the output is then only the tail).
    Raises HostError when it is not installed or the deadline passes; a non-zero exit is for the caller to `check()`.
    """
    stderr = subprocess.PIPE if apart else subprocess.STDOUT
    stdin = subprocess.PIPE if input else subprocess.DEVNULL
    async with running(argv, env=env, cwd=cwd, pass_fds=pass_fds, stdin=stdin, stderr=stderr, nice=nice) as process:
        try:
            async with asyncio.timeout(deadline):
                if on_line:
                    output, errors = await _lines(process, on_line), b""
                else:
                    output, errors = await process.communicate(input or None)
                    errors = errors or b""
                await process.wait()
        except TimeoutError as error:
            raise HostError(f"{argv[0]} did not end within {deadline:.0f} s", details={"argv": list(argv)}) from error
    assert process.returncode is not None
    return Finished(
        argv=tuple(argv), returncode=process.returncode, output=output.decode(errors="replace"), errors=errors.decode(errors="replace")
    )


async def _lines(process: asyncio.subprocess.Process, on_line: Callable[[str], None]) -> bytes:
    """Read lines (ended by CR or LF, as progress bars print them), keep the last ones."""
    assert process.stdout is not None
    tail: deque[bytes] = deque(maxlen=TAIL_LINES)
    rest = b""
    while chunk := await process.stdout.read(1 << 16):
        *lines, rest = (rest + chunk).replace(b"\r", b"\n").split(b"\n")
        for line in filter(None, lines):
            tail.append(line)
            on_line(line.decode(errors="replace"))
    return b"\n".join([*tail, rest])


async def output(argv: Sequence[str], *, deadline: float, what: str = "", **options: bool) -> str:
    """stdout of a program that must succeed, stripped."""
    return (await run(argv, deadline=deadline, apart=True, **options)).check(what).output.strip()  # type: ignore[arg-type]


def spawn_detached(argv: Sequence[str], *, log: Path, env: Mapping[str, str] | None = None, pass_fds: Sequence[int] = ()) -> int:
    """Start a program that outlives us, in a session of its own, its output appended to `log`; return its pid.

    It is our child until we end, then init's.
    """
    with open(log, "ab") as out:
        child = subprocess.Popen(
            list(argv),
            env=environment(env),
            pass_fds=tuple(pass_fds),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    _detached.append(child)
    return child.pid


_detached: list[subprocess.Popen[bytes]] = []  # kept, for Popen reaps the ended ones of its kind only while somebody holds them


def _stat(pid: int) -> list[str]:
    """What /proc/PID/stat says behind the program's name, from field 3 on; nothing when there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def start_time(pid: int) -> int | None:
    """When a process started, in clock ticks since boot (field 22); None when there is none. With the pid it names a process for good."""
    fields = _stat(pid)
    return int(fields[19]) if fields and fields[0] != "Z" else None


def cpu_time(pid: int) -> float:
    """Seconds of processor time, user and system, that a process has used (fields 14 and 15); 0 when there is none."""
    fields = _stat(pid)
    return (int(fields[11]) + int(fields[12])) / _TICKS if fields else 0.0


async def gone(pidfd: int, deadline: float) -> bool:
    """Wait for a pidfd's process to end, at most `deadline` seconds; whether it did."""
    loop = asyncio.get_running_loop()
    done = asyncio.Event()
    loop.add_reader(pidfd, done.set)
    try:
        await asyncio.wait_for(done.wait(), deadline)
    except TimeoutError:
        return False
    finally:
        loop.remove_reader(pidfd)
    return True
