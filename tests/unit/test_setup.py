"""The pure parts of set-up: which packages, what apt-get says, how steps read."""

from __future__ import annotations

import io
import math
import re
from pathlib import Path

import pytest
from rich.console import Console

from ramet import packages, setup, steps, tour, userns
from ramet.errors import HostError, NoSpaceError
from ramet.kernels import own
from ramet.packages import Need
from ramet.paths import StateDir
from ramet.setup import Context, Finding, Outcome
from ramet.steps import Mark, Step, Steps, seconds

ROOT = Path(__file__).parents[2]


def console(*, terminal: bool = False, width: int = 80) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=width, no_color=True, legacy_windows=False)


def text(of: Console) -> str:
    assert isinstance(of.file, io.StringIO)
    return of.file.getvalue()


# packages


def test_every_program_that_a_module_asks_for_is_in_a_package() -> None:
    names = {package.name for package in packages.PACKAGES}
    assert len(names) == len(packages.PACKAGES)
    asked = {*own.PROGRAMS.values(), *own.HEADERS.values(), *userns.PACKAGES.values()}
    assert asked <= names
    for table in (own.PROGRAMS, own.HEADERS):
        shown = {show: package for package in packages.PACKAGES if package.need in packages.USERS for show in package.shows}
        for program, package in table.items():
            assert shown[program].name == package


@pytest.fixture
def empty_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host without any program; returns the directory on its PATH."""
    monkeypatch.setattr("ramet.process.environment", lambda: {"PATH": str(tmp_path)})
    return tmp_path


def program(directory: Path, *names: str) -> None:
    for name in names:
        (directory / name).write_text("#!/bin/sh\n")
        (directory / name).chmod(0o755)


def test_missing_packages_are_told_by_what_they_bring(empty_host: Path) -> None:
    def names(need: Need, *, root: bool) -> set[str]:
        return {package.name for package in packages.missing([need], root=root) if not package.shows[0].startswith("/")}

    assert names(Need.REGISTRIES, root=True) == {"skopeo", "umoci"}
    program(empty_host, "skopeo")
    assert names(Need.REGISTRIES, root=True) == {"umoci"}
    assert "uidmap" in names(Need.MACHINES, root=False)
    assert "uidmap" not in names(Need.MACHINES, root=True)
    program(empty_host, "newuidmap")
    assert "uidmap" in names(Need.MACHINES, root=False)  # half a package is none


def test_the_administrator_gets_one_command_and_the_reasons(empty_host: Path) -> None:
    lacking = [package for package in packages.missing(root=False) if package.name in ("uidmap", "umoci", "bc")]
    assert packages.command(lacking) == "sudo apt-get install --no-install-recommends bc uidmap umoci"
    lines = packages.explain(lacking).splitlines()
    assert lines[0] == "without uidmap: no machine runs"
    assert len(lines) == 3
    assert packages.explain([]) == ""


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("dlstatus:1:50:Retrieving file 1 of 2", (0.25, "Retrieving file 1 of 2")),
        ("pmstatus:qemu-utils:0.0:Installing", (0.5, "Installing")),
        ("pmstatus:libelf1:amd64:100.0000:Installed libelf1 (amd64)", (1.0, "Installed libelf1 (amd64)")),
        ("pmerror:/var/x.deb:10:failed", None),
        ("nonsense", None),
        ("dlstatus:1", None),
        ("", None),
    ],
)
def test_progress_of_apt_get(line: str, expected: tuple[float, str] | None) -> None:
    assert packages.fraction(line) == expected


@pytest.mark.parametrize(
    ("output", "message", "hint"),
    [
        ("W: x\nE: Unable to locate package qemu-utils\n", "Unable to locate package qemu-utils", "Debian 12"),
        ("E: dpkg was interrupted, you must manually run\n", "dpkg was interrupted", "dpkg --configure -a"),
        ("Err:1 x\n  Temporary failure resolving 'mirror'\nE: Some index files failed\n", "Some index files failed", "network"),
        ("E: Could not get lock /var/lib/dpkg/lock-frontend.\n", "Could not get lock", "Another package manager"),
        ("strange\n", "strange", ""),
    ],
)
def test_failures_of_apt_get_say_what_to_do(output: str, message: str, hint: str) -> None:
    error = packages.failure(["apt-get"], 100, output, "installing")
    assert isinstance(error, HostError)
    assert message in error.message
    assert message in str(error)
    assert hint in error.hint


def test_a_full_disk_is_told_apart() -> None:
    assert isinstance(packages.failure(["apt-get"], 100, "E: write: No space left on device\n", "installing"), NoSpaceError)


# steps


@pytest.mark.parametrize(
    ("value", "words"),
    [(0.0123, "12 ms"), (2.44, "2.4 s"), (59.94, "59.9 s"), (59.97, "1 min 0 s"), (200, "3 min 20 s"), (119.7, "2 min 0 s")],
)
def test_durations(value: float, words: str) -> None:
    assert seconds(value) == words


def test_a_step_is_a_line_that_is_not_wrapped_in_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in ("_QUICK", "_SLOW"):
        monkeypatch.setattr(steps, limit, math.inf)
    out = console(width=40)
    with Steps(out).step("Title") as step:
        step.progress("too quick to tell", 0.5)
        step.end(Mark.LIMITED, f"[b]{'word ' * 20}\nsecond")
        step.end(Mark.OK, "never seen")
    first, second = text(out).splitlines()
    assert first.startswith("! Title          [b]word")
    assert first.count("word") == 20
    assert second == " " * 17 + "second"


def test_a_step_on_a_terminal_is_wrapped_beside_its_title(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "_QUICK", math.inf)
    out = console(terminal=True, width=40)
    with Steps(out).step("Title") as step:
        step.progress("working", 0.25)
        step.end(Mark.OK, "word " * 12)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text(out))
    lines = [line.rstrip() for line in plain.rpartition("✓")[2].splitlines()]
    assert lines[0].startswith(" Title          word word")
    assert all(line.startswith(" " * 17 + "word") for line in lines[1:])


def test_a_slow_step_tells_a_log_what_it_does() -> None:
    out = console()
    step = Step(out, "Image")
    step._began -= 60
    for percent in (0, 1, 2, 26, 27, 100):
        step.progress("fetching", percent / 100)
    assert text(out).splitlines() == ["   Image: fetching", "   Image: fetching 26%", "   Image: fetching 100%"]


# set-up


def outcome(name: str, mark: Mark) -> Outcome:
    return Outcome(name=name, title=name, mark=mark, detail="", hint="", seconds=0.0)


def test_the_summary_says_what_is_limited(tmp_path: Path) -> None:
    context = Context(state=StateDir(root=tmp_path), limits=["speed: slow"])
    fine = [outcome("a", Mark.OK), outcome("b", Mark.LIMITED), outcome("c", Mark.BACKGROUND)]
    assert setup.ready(fine)
    lines = setup.summary(context, fine)
    assert lines[0] == "Machines run here."
    assert "speed: slow" in lines
    assert any("user-mode" in line for line in lines)


def test_the_summary_says_what_is_missing(tmp_path: Path) -> None:
    missing = [outcome("Agent", Mark.MISSING), outcome("b", Mark.OK)]
    assert not setup.ready(missing)
    (line,) = setup.summary(Context(state=StateDir(root=tmp_path), change=False), missing)
    assert "agent" in line
    assert "ramet setup" in line


async def test_looking_goes_on_after_a_step_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fails(context: Context, step: Step) -> Finding:
        raise HostError("no", hint="do this")

    async def works(context: Context, step: Step) -> Finding:
        return Finding(mark=Mark.OK, detail="fine")

    monkeypatch.setattr(setup, "STEPS", (("one", "One", fails), ("two", "Two", works)))
    out = console()
    state = StateDir(root=tmp_path / "state")
    found = await setup.perform(Context(state=state, change=False), Steps(out))
    assert [(each.name, each.mark) for each in found] == [("one", Mark.MISSING), ("two", Mark.OK)]
    assert "do this" in text(out)
    assert not state.root.exists()
    with pytest.raises(HostError):
        await setup.perform(Context(state=state), Steps(out))


# the tour, the example


def test_the_tour_s_machine_is_a_valid_definition() -> None:
    from ramet import spec

    wanted = spec.load(tour.example())
    assert wanted.name == "hello"
    assert 8080 in [port.guest for port in wanted.ports]
    assert tour.example().with_name("serve.pl").exists()


def test_the_reference_tells_every_key() -> None:
    from ramet.spec import LifecycleTable, SpecFile

    text = (ROOT / "docs" / "spec.md").read_text()
    for key in SpecFile.model_fields.keys() - {"lifecycle"}:
        assert f"| `{key}` |" in text
    for key in LifecycleTable.model_fields:
        assert f"| `lifecycle.{key}` |" in text


def test_the_hand_installation_names_every_package() -> None:
    text = (ROOT / "docs" / "install.md").read_text()
    for package in packages.PACKAGES:
        assert package.name in text, package.name
