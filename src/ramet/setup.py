"""Everything that machines need from this host, step by step: looked at first, made where it is missing, said what is limited and why.

docs/install.md tells the same steps by hand.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import shutil
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from ramet import binaries, images, kernels, network, packages, paths, userns
from ramet.errors import HostError, NoSpaceError, RametError, SpecError
from ramet.host import Host
from ramet.kernels import BuildState, KernelKind, debian, own, record
from ramet.model import Accelerator, Spec
from ramet.packages import Need
from ramet.paths import StateDir
from ramet.steps import Mark, Step, Steps, hang
from ramet.units import format_size

IMAGE = Spec.image
# Free space that a first set-up takes: the image and a machine; the kernel's build, most of it given back when it is done.
SPACE, BUILD_SPACE = 1 << 30, 3 << 30
_POLL = 1.0  # seconds between two looks at another process's build, for its progress


@dataclass(frozen=True, kw_only=True)
class Finding:
    """How a step ended. detail: what there is, in words; hint: what to do about it."""

    mark: Mark
    detail: str
    hint: str = ""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A finding with the step's name and what it took, as `--json` prints it."""

    name: str
    title: str
    mark: Mark
    detail: str
    hint: str
    seconds: float


@dataclass(kw_only=True)
class Context:
    """change: make what is missing; else only look. limits: what will not be as it could be, for the summary."""

    state: StateDir
    change: bool = True
    wait_kernel: bool = False
    tests: bool = False
    limits: list[str] = field(default_factory=list)

    @property
    def root(self) -> bool:
        return os.geteuid() == 0


async def _computer(context: Context, step: Step) -> Finding:
    """What nothing can be done about: the processor, the system, the space."""
    if platform.machine() != "x86_64":
        raise HostError(f"this is a {platform.machine()} computer; machines run on x86_64 (amd64) only")
    try:
        release = platform.freedesktop_os_release()
    except OSError:
        release = {}
    system = release.get("PRETTY_NAME", "Linux")
    free = shutil.disk_usage(_existing(context.state.root)).free
    if free < SPACE and not await _has_image(context):
        raise NoSpaceError(
            f"{format_size(free)} are free for {context.state.root}, and a first set-up takes {format_size(SPACE)}",
            hint="RAMET_HOME names another place for machines and images, RAMET_CACHE for kernels.",
        )
    who = "root" if context.root else "not root"
    detail = f"{system}, {who}, {os.cpu_count()} cpus, {format_size(free)} of disk free"
    if "debian" not in f"{release.get('ID', '')} {release.get('ID_LIKE', '')}":
        return Finding(
            mark=Mark.LIMITED, detail=detail, hint="Not Debian: you will have to bring the programs that are listed below yourself."
        )
    return Finding(mark=Mark.OK, detail=detail)


def _existing(path: Path) -> Path:
    """The nearest directory above that exists already."""
    return path if path.exists() else _existing(path.parent)


async def _packages(context: Context, step: Step) -> Finding:
    needs = (*packages.USERS, Need.TESTS) if context.tests else packages.USERS
    lacking = packages.missing(needs)
    if lacking and context.change and context.root:
        count = len(lacking)
        await packages.install(lacking, step.progress)
        return Finding(mark=Mark.OK, detail=f"{count} installed: {', '.join(package.name for package in lacking)}")
    if not lacking:
        return Finding(mark=Mark.OK, detail="all there")
    detail = packages.explain(lacking)
    hint = f"This brings them; it needs root, for it installs Debian packages:\n  {packages.command(lacking)}"
    if not any(package.need is Need.MACHINES for package in lacking):
        context.limits.append(detail)
        return Finding(mark=Mark.LIMITED, detail=detail, hint=hint)
    if context.change:
        step.end(Mark.MISSING, detail)
        names = [package.name for package in lacking]
        raise HostError(f"{len(names)} Debian packages are missing", hint=hint, details={"packages": names})
    return Finding(mark=Mark.MISSING, detail=detail, hint=hint)


async def _users(context: Context, step: Step) -> Finding:
    await userns.check()
    if context.root:
        return Finding(mark=Mark.OK, detail="root keeps the owners of an image's files by itself")
    return Finding(mark=Mark.OK, detail=f"a user namespace with {userns.IDS} ids keeps the owners of an image's files")


async def _agent(context: Context, step: Step) -> Finding:
    if not context.change:
        built = any((paths.cache_dir() / "agent").glob("*/ramet-agent"))
        return Finding(mark=Mark.OK, detail="compiled") if built else Finding(mark=Mark.MISSING, detail="not compiled yet")
    step.progress("compiling")
    made = await binaries.ensure()
    return Finding(mark=Mark.OK, detail=f"compiled, {format_size(made.agent.stat().st_size)} (version {made.digest[:8]})")


async def _kernel(context: Context, step: Step) -> Finding:
    """A kernel to boot now; and our own, built in the background or (wait_kernel) here."""
    if not context.change:
        found = own.newest() or next(iter(record.cached(KernelKind.DEBIAN, debian.RECIPE)), None)
        if not found:
            return Finding(mark=Mark.MISSING, detail="none yet")
        return Finding(mark=Mark.OK, detail=f"{_KINDS[found.kind]} {found.version}")
    if context.wait_kernel and os.environ.get("RAMET_KERNEL") != KernelKind.DEBIAN:
        await _build_here(step)
    step.progress("looking for one")
    kernel = await _fetched(context, step)
    return Finding(mark=Mark.OK, detail=f"{_KINDS[kernel.kind]} {kernel.version}")


_KINDS = {KernelKind.OWN: "Ramet's own", KernelKind.DEBIAN: "Debian's"}


async def _fetched(context: Context, step: Step) -> kernels.Kernel:
    """The current kernel; with package lists that are missing or too old (a fresh container has none), after updating them."""
    try:
        return await kernels.current()
    except SpecError:
        raise
    except HostError:
        if not context.root:
            raise
    await packages.update(step.progress)
    step.progress("fetching Debian's kernel")
    return await kernels.current()


async def _build_here(step: Step) -> None:
    """Build our own kernel, or wait for the process that does."""
    what = "building Ramet's own"
    while (status := await kernels.build_status()).state is BuildState.RUNNING:
        step.progress(what, status.fraction)
        await asyncio.sleep(_POLL)
    if status.state is not BuildState.READY:
        await kernels.build(lambda fraction: step.progress(what, fraction))


async def _image(context: Context, step: Step) -> Finding:
    if not context.change and not await _has_image(context):
        return Finding(mark=Mark.MISSING, detail=f"{IMAGE} is not made yet")
    image = await images.ensure(context.state, IMAGE, progress=step.progress)
    return Finding(mark=Mark.OK, detail=f"{IMAGE}, {format_size(image.disk_used)} on disk")


async def _has_image(context: Context) -> bool:
    return images.load(context.state, await images.resolve(IMAGE), disk=True) is not None


async def _accelerator(context: Context, step: Step) -> Finding:
    """KVM, or why not. Found out by booting, so only where something may be changed."""
    if not context.change:
        try:
            found = json.loads(context.state.kvm.read_text())
        except (OSError, ValueError):
            return Finding(mark=Mark.OK, detail="not tried yet")
        accelerator, reason = Accelerator(found["accelerator"]), str(found["reason"])
    else:
        step.progress("booting something with KVM")
        host = Host(context.state)
        await host.open()
        if host.cgroups.reason:
            context.limits.append(f"cgroup limits: none, {host.cgroups.reason}")
        probe = (await host.boot()).probe
        accelerator, reason = probe.accelerator, probe.reason
    if accelerator is Accelerator.KVM:
        return Finding(mark=Mark.OK, detail=f"KVM: {reason}")
    context.limits.append(f"speed: machines run on {accelerator.words}, several times slower than on KVM")
    return Finding(mark=Mark.LIMITED, detail=f"{accelerator.words}\n{reason}")


async def _own_kernel(context: Context, step: Step) -> Finding:
    """Our own kernel's build: begun here, never waited for."""
    if os.environ.get("RAMET_KERNEL") == KernelKind.DEBIAN:
        return Finding(mark=Mark.OK, detail="not wanted: RAMET_KERNEL is debian")
    status = await kernels.build_status()
    if status.state is BuildState.READY:
        return Finding(mark=Mark.OK, detail="built")
    missing_words = "machines boot Debian's: a slower boot, memory that is given back later"
    if status.state is BuildState.NONE and not context.change:
        context.limits.append(f"kernel: {missing_words}")
        return Finding(mark=Mark.LIMITED, detail="not built yet", hint="`ramet setup` builds it in the background.")
    free = shutil.disk_usage(_existing(paths.cache_dir())).free
    if status.state is not BuildState.RUNNING and (lacking := own.missing_tools()):
        reason = f"not built: {', '.join(sorted(set(lacking.values())))} missing"
    elif status.state is not BuildState.RUNNING and free < BUILD_SPACE:
        reason = f"not built: that takes {format_size(BUILD_SPACE)} of disk for a while, and {format_size(free)} are free"
    elif status.state is BuildState.FAILED and not context.change:
        reason = f"its build failed: {status.message}"
    else:
        if context.change:
            status = await kernels.start_background_build()
        done = f" ({status.fraction:.0%} done)" if status.fraction else ""
        return Finding(mark=Mark.BACKGROUND, detail=f"is being built in the background{done}; until then {missing_words}")
    context.limits.append(f"kernel: {missing_words}")
    return Finding(mark=Mark.LIMITED, detail=f"{reason}; {missing_words}")


Work = Callable[[Context, Step], Awaitable[Finding]]
STEPS: tuple[tuple[str, str, Work], ...] = (
    ("computer", "This computer", _computer),
    ("packages", "Packages", _packages),
    ("users", "File owners", _users),
    ("agent", "Guest agent", _agent),
    ("kernel", "Guest kernel", _kernel),
    ("image", "Base image", _image),
    ("accelerator", "Accelerator", _accelerator),
    ("own-kernel", "Own kernel", _own_kernel),
)


async def perform(context: Context, steps: Steps) -> list[Outcome]:
    """Do the steps in order. When only looking, go on after one that is missing; else raise its error (HostError, ImageError, NoSpaceError)."""
    outcomes = []
    if context.change:
        context.state.create()
    for name, title, work in STEPS:
        with steps.step(title) as step:
            try:
                finding = await work(context, step)
            except RametError as error:
                step.end(Mark.MISSING, "failed: see below" if context.change else error.message)
                if context.change:
                    raise
                finding = Finding(mark=Mark.MISSING, detail=error.message, hint=error.hint)
            else:
                step.end(finding.mark, finding.detail)
            if finding.hint:
                steps.note(finding.hint)
            outcomes.append(
                Outcome(name=name, title=title, mark=finding.mark, detail=finding.detail, hint=finding.hint, seconds=round(step.took, 3))
            )
    return outcomes


def ready(outcomes: Sequence[Outcome]) -> bool:
    """Whether machines run here."""
    return all(outcome.mark is not Mark.MISSING for outcome in outcomes)


def summary(context: Context, outcomes: Sequence[Outcome]) -> list[str]:
    """What works here and what is limited, a line each; the first says whether machines run."""
    if gone := [outcome.title.lower() for outcome in outcomes if outcome.mark is Mark.MISSING]:
        verb = "`ramet setup`, or what is said above, brings" if not context.change else "What is said above brings"
        return [f"Machines do not run yet: {', '.join(gone)}. {verb} the rest."]
    lines = ["Machines run here."]
    limits = [*context.limits, *network.USER.limits]
    if not context.root:
        limits.append("without root: no cgroup limits, unless the system delegates them to you; the rest is the same")
    return [*lines, *limits]


def run(
    *, check: bool = False, as_json: bool = False, wait_kernel: bool = False, tests: bool = False, console: Console | None = None
) -> int:
    """`ramet setup`. Returns the exit code: with `check`, 1 when something is missing. Raises RametError when a step fails."""
    console = console or Console(quiet=as_json)
    context = Context(state=StateDir.default(), change=not check, wait_kernel=wait_kernel, tests=tests)
    outcomes = asyncio.run(perform(context, Steps(console)))
    lines = summary(context, outcomes)
    if as_json:
        report = {
            "ready": ready(outcomes),
            "steps": [asdict(outcome) for outcome in outcomes],
            "limits": context.limits + list(network.USER.limits),
        }
        Console(soft_wrap=True).print(json.dumps(report, indent=2), markup=False, highlight=False)
    else:
        console.print()
        hang_list(console, lines)
    return 0 if ready(outcomes) else 1


def hang_list(console: Console, lines: Sequence[str]) -> None:
    """Print a line and the list below it."""
    console.print(lines[0], markup=False, highlight=False)
    for line in lines[1:]:
        hang(console, "- ", 2, escape(line))


def main(argv: Sequence[str]) -> int:
    """`python -m ramet.setup`, for ./test: as the CLI's, and --tests for what only tests need."""
    known = {"--check", "--json", "--wait-kernel", "--tests"}
    if unknown := set(argv) - known:
        raise SpecError(f"unknown: {' '.join(sorted(unknown))}; known are {' '.join(sorted(known))}")
    return run(check="--check" in argv, as_json="--json" in argv, wait_kernel="--wait-kernel" in argv, tests="--tests" in argv)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except RametError as error:
        sys.stderr.write("\n".join(filter(None, [f"error: {error.message}", error.hint, str(error.details.get("log", ""))])) + "\n")
        sys.exit(error.exit)
