"""What has no business in the repository, and what must be the same in two places."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

from ramet import spec

ROOT = Path(__file__).parents[2]
PROGRAMS = {"subprocess", "pty", "popen2", "commands"}
STARTERS = re.compile(r"os\.(system|popen|spawn\w+|posix_spawn\w*|exec\w+|fork\w*)|create_subprocess_\w+|subprocess_exec|subprocess_shell")
# Notes of work that is not done belong into issues, directories of whoever wrote a file into nobody's file.
NOTES = re.compile(r"\b(" + "|".join(("TO" + "DO", "FIX" + "ME", "X" * 3)) + r")\b")
HOME = re.compile(r"/(root|home/\w+)/[.](cache|local|config)\b")


def tracked() -> list[Path]:
    """The repository's files, those that are about to be added too."""
    names = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    return [path for name in names.decode().split("\0") if name and (path := ROOT / name).is_file()]


def texts() -> dict[str, str]:
    found = {}
    for path in tracked():
        try:
            found[str(path.relative_to(ROOT))] = path.read_text()
        except UnicodeDecodeError:
            continue  # pictures
    return found


@pytest.fixture(scope="module")
def files() -> dict[str, str]:
    return texts()


def found(pattern: re.Pattern[str], files: dict[str, str]) -> list[str]:
    return [
        f"{name}:{at}: {line.strip()[:100]}"
        for name, text in files.items()
        for at, line in enumerate(text.splitlines(), 1)
        if pattern.search(line)
    ]


def test_no_notes_of_unfinished_work(files: dict[str, str]) -> None:
    assert not found(NOTES, {name: text for name, text in files.items() if name != "LICENSE"})


def test_no_paths_of_the_writers_computer(files: dict[str, str]) -> None:
    assert not found(HOME, files)


# Workers share the keeper's memory: no program is started. The fetcher is one, but `process` would take the keeper more memory than all it does.
FORKS = {("keeper.py", "os.fork"), ("keeper.py", "os.execv")}


def test_one_module_starts_programs() -> None:
    offenders = []
    for path in (ROOT / "src").rglob("*.py"):
        if path.name == "process.py" and path.parent.name == "ramet":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            word = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
            started = STARTERS.search(word) and (path.name, word) not in FORKS
            if started or any(name.split(".")[0] in PROGRAMS for name in names):
                offenders.append(f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}")
    assert not offenders


def test_no_spaces_at_the_ends_of_lines(files: dict[str, str]) -> None:
    own = {name: text for name, text in files.items() if not name.startswith("kernel/patches/") and name != "LICENSE"}
    assert not found(re.compile(r"[ \t]$"), own)
    assert not [name for name, text in own.items() if text and not text.endswith("\n")]


def test_the_published_schema_is_the_code_s() -> None:
    assert (ROOT / "schema" / "ramet.schema.json").read_text() == spec.json_schema()


def test_the_protocol_text_has_the_code_s_numbers() -> None:
    from ramet import agentwire

    text = (ROOT / "agent" / "PROTOCOL.md").read_text()
    for kind in agentwire.Kind:
        assert re.search(rf"^\| {kind.value} +\| {kind.name} ", text, re.MULTILINE), kind
    for op in agentwire.Op:
        assert re.search(rf"^\| {op.value} +\| {op.name} ", text, re.MULTILINE), op
    for tag in agentwire.Tag:
        assert re.search(rf"^\| {tag.value} +\| {tag.name} ", text, re.MULTILINE), tag
    assert f"protocol, version {agentwire.VERSION}\n" in text
    assert f"at most {agentwire.MAX_PAYLOAD}" in text
    assert f"{len(agentwire.RESYNC):,} zero bytes" in text
    assert f"starts with {agentwire.WINDOW:,} bytes of credit" in text


def test_the_agent_s_header_has_the_code_s_numbers() -> None:
    from ramet import agentwire

    text = (ROOT / "agent" / "wire.h").read_text()

    def numbers(kind: str, prefix: str) -> dict[str, int]:
        """The members of an enum whose first has a number."""
        (body,) = re.findall(rf"enum {kind} \{{([^}}]*)\}}", text)
        names = [word.strip() for word in body.split(",") if word.strip()]
        first, _, start = names[0].partition(" = ")
        members = [first, *names[1:]]
        assert all(" " not in name and name.startswith(prefix) for name in members)
        return {name.removeprefix(prefix): number for number, name in enumerate(members, int(start or 0)) if not name.endswith("_LAST")}

    for kind, prefix, enum in (
        ("frame_type", "T_", agentwire.Kind),
        ("op", "OP_", agentwire.Op),
        ("tag", "TAG_", agentwire.Tag),
        ("end_kind", "END_", agentwire.EndKind),
    ):
        assert numbers(kind, prefix) == {member.name: member.value for member in enum}
    for flag in agentwire.OpenFlag:
        assert f"OPEN_{flag.name} = {flag.value}" in text
    for line in (
        f"#define PROTOCOL_VERSION {agentwire.VERSION}",
        f"FRAME_PAYLOAD_MAX = {agentwire.MAX_PAYLOAD},",
        f"CREDIT_START = {agentwire.WINDOW},",
        f"NONCE_SIZE = {agentwire.NONCE},",
    ):
        assert line in text
