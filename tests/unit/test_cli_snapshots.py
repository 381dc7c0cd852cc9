"""The commands about instants, against a `Verbs` in memory: what they print at 80 columns, what as JSON, the status they leave with."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ramet.cli import app
from ramet.cli.completion import joined
from ramet.cli.layers import BLOCK, data_runs, save
from ramet.cli.lineage import draw
from ramet.errors import HostError, LayerError, NoSpaceError
from ramet.model import NodeKind, State, TreeNode, Usage
from tests.unit.conftest import Run
from tests.unit.memory import ARGV, COMPLETING, Memory, environment, program
from tests.unit.test_shell import Terminal

MIB = 1 << 20
GOOD, TORN = "00000000000000aa", "00000000000000bb"


# forks


def test_fork(cli: Run, verbs: Memory) -> None:
    assert cli("fork", "m", "a", "bcd") == (0, "a    running  ready in 0.12 s\nbcd  running  ready in 0.12 s\n", "")
    assert cli("fork", "a", "-n", "2")[1].splitlines() == ["a-1  running  ready in 0.12 s", "a-2  running  ready in 0.12 s"]
    assert verbs.machines["a-2"].parent == "a"


def test_a_fork_of_which_some_fail(cli: Run, verbs: Memory) -> None:
    status, out, err = cli("fork", "m", "-n", "2")
    assert (status, out) == (4, "m-2  running  ready in 0.12 s\n")
    assert err == "m-1  failed  m-1 exists. Choose another name.\n"
    status, out, err = cli("fork", "m", "x", "unfit", "--json")
    assert (status, err) == (6, "")
    first, second = json.loads(out)
    assert (first["machine"]["name"], first["error"]) == ("x", None)
    assert (second["machine"], second["error"]["code"]) == (None, "incompatible")


def test_forks_that_cannot_be(cli: Run, verbs: Memory) -> None:
    assert cli("fork", "idle") == (
        4,
        "",
        "error: cannot fork idle: it is stopped, not paused or running\nhint: `ramet start` starts it.\n",
    )
    assert cli("fork", "nobody")[0] == 3
    assert cli("fork", "m", "-n", "3", "a", "b")[0] == 5
    assert cli("fork", "m", "-n", "0")[0] == 2
    assert json.loads(cli("fork", "idle", "--json")[2])["error"]["code"] == "wrong_state"


# pause, hibernate, resume


def test_pause_hibernate_resume(cli: Run, verbs: Memory) -> None:
    assert cli("pause", "m") == (0, "m is paused; `ramet resume m` lets it go on.\n", "")
    assert cli("list")[1].splitlines()[1].split()[:2] == ["m", "paused"]
    status, out, err = cli("hibernate", "m")
    kept = "3 MiB on disk (60 MiB of 100 MiB were caches and free memory)"
    assert (status, err) == (0, "")
    assert re.fullmatch(rf"m is hibernated: {re.escape(kept)}, \d+\.\d s; `ramet resume m` lets it go on\.\n", out)
    assert cli("down", "m") == (0, "m is hibernated; `ramet up` or `ramet resume m` starts it again.\n", "")
    assert cli("pause", "m")[0] == 4
    assert cli("resume", "m") == (0, "m runs again.\n", "")
    for verb, state in (("pause", "paused"), ("hibernate", "hibernated"), ("resume", "running")):
        assert json.loads(cli(verb, "m", "--json")[1])["state"] == state
    verbs.kept["m@warm"] = dataclasses.replace(verbs.kept["m@warm"], slimmed=0)
    assert cli("hibernate", "m", "--no-slim")[1].startswith("m is hibernated: 3 MiB on disk, ")
    assert [call[2] for call in verbs.seen if call[0] == "hibernate"] == [True, True, False]


@pytest.mark.parametrize("state", [State.PAUSED, State.HIBERNATED])
def test_up_lets_it_go_on(cli: Run, verbs: Memory, tmp_path: Path, state: State) -> None:
    (tmp_path / "ramet.toml").write_text('name = "m"\n')
    verbs.machines["m"] = dataclasses.replace(verbs.machines["m"], state=state, boot_time=0.3)
    status, out, _ = cli("up", str(tmp_path))
    time = ", ready in 0.30 s" if state is State.HIBERNATED else ""
    assert (status, out.splitlines()[0]) == (0, f"m runs again (software emulation (TCG){time}).")
    assert verbs.machines["m"].state is State.RUNNING


# snapshots


def test_snapshots(cli: Run) -> None:
    assert [line.split() for line in cli("snapshots")[1].splitlines()] == [
        ["NAME", "STATE", "MEMORY", "STORED", "AGE", "POOL"],
        ["m@warm", "ready", "yes", "3", "MiB", "5", "min"],
        ["acme/shop@4f2a", "ready", "yes", "3", "MiB", "5", "min", "2", "of", "3"],
        ["m@bad", "broken", "no", "3", "MiB", "5", "min"],
        ["it", "did", "not�[2J", "answer"],
        ["old@s", "saving", "yes", "3", "MiB", "5", "min"],
    ]
    assert "\nsnap-4          ready " in cli("snapshots", "m")[1]
    assert [each["id"] for each in json.loads(cli("snapshots", "m", "--json")[1])] == ["snap-1", "snap-2", "snap-3", "snap-4"]
    assert cli("snapshots", "idle") == (0, "", "There are no snapshots of idle. `ramet snapshot idle` makes one.\n")


def test_snapshot(cli: Run, verbs: Memory) -> None:
    out = cli("snapshot", "m", "x", "--no-memory", "--no-test")[1]
    assert out == "m@x is kept. It stood still for 12 ms.\n  ramet restore m m@x\n  ramet create --from m@x NAME\n"
    assert ("snapshot", "m", "x", False, False) in verbs.seen
    assert "in the background" in cli("snapshot", "m", "y")[1]
    assert ("snapshot", "m", "y", True, True) in verbs.seen
    assert cli("snapshot", "m", "y")[0] == 4
    assert json.loads(cli("snapshot", "m", "--json")[1])["pause"] == 0.012


def test_restore(cli: Run, verbs: Memory) -> None:
    lost = "m goes back to m@warm, 5 min ago: what it did since is lost (12 MiB on its disk since it was last saved)"
    assert lost + "." == " ".join(cli("restore", "m", "--dry-run")[1].split())
    status, out, err = cli("restore", "m", "warm")
    assert (status, out, err) == (5, "", f"error: {lost}\nhint: --yes does it; there is no terminal here to ask on.\n")
    assert not [call for call in verbs.seen if call[0] == "restore"]
    for given, meant in (("warm", "m@warm"), ("m@warm", "m@warm"), ("snap-4", "snap-4"), ("acme/shop@4f2a", "acme/shop@4f2a")):
        assert cli("restore", "m", given, "--yes")[:2] == (0, f"m is as it was at {meant} (ready in 0.20 s).\n")
        assert ("restore", "m", meant) in verbs.seen
    assert "so it boots" in cli("restore", "m", "bad", "--dry-run")[1]
    assert json.loads(cli("restore", "m", "warm", "--dry-run", "--json")[1])["snapshot"] == "m@warm"
    assert json.loads(cli("restore", "m", "-y", "--json")[1])["name"] == "m"
    assert cli("restore", "m", "nothing", "--yes")[0] == 3
    assert cli("restore", "idle", "--yes") == (
        3,
        "",
        "error: idle has no snapshot to go back to\nhint: `ramet snapshot idle` makes one.\n",
    )


@pytest.mark.parametrize(("answer", "status"), [(b"y\r", 0), (b"n\r", 1), (b"\r", 1)])
def test_restore_asks_on_a_terminal(served: str, verbs: Memory, answer: bytes, status: int) -> None:
    terminal = Terminal(served, "restore", "m", "warm")
    try:
        terminal.expect(b"Go back? [y/N]")
        terminal.type(answer)
        assert terminal.ended() == status
        assert (("restore", "m", "m@warm") in verbs.seen) is (status == 0)
    finally:
        terminal.close()


def test_create_from(cli: Run, verbs: Memory) -> None:
    status, out, _ = cli("create", "--from", "acme/shop@4f2a", "new", "--disk-only")
    assert (status, out.splitlines()[0]) == (0, "new is made and runs (ready in 0.12 s).")
    assert verbs.seen[-1] == ("create_from", "acme/shop@4f2a", "new", True)
    assert json.loads(cli("create", "--from", "m@warm", "other", "--json")[1])["parent"] == "m"
    assert cli("create", "--from", "m@warm", "x", "--cpus", "2")[0] == 5
    assert cli("create", "x", "--disk-only")[0] == 5
    assert cli("create", "--from", "m@nothing", "x")[0] == 3
    assert cli("create", "--from", "m@warm", "m")[0] == 4
    assert "x" not in verbs.machines


def test_template(cli: Run, verbs: Memory) -> None:
    assert cli("template", "acme/shop@4f2a", "acme/shop:1.2", "--pool", "2") == (
        0,
        "acme/shop:1.2 is a template, and 2 machines are kept ready.\n  ramet create --from acme/shop:1.2 NAME\n",
        "",
    )
    assert verbs.seen[-1] == ("template", "acme/shop@4f2a", "acme/shop:1.2", 2)
    assert json.loads(cli("template", "m@warm", "--json")[1])["name"] == "m:latest"
    assert cli("template", "m@warm", "--pool", "-1")[0] == 2


# where a machine comes from


def test_list_and_show_tell_the_origin(cli: Run, verbs: Memory) -> None:
    lines = [line.split() for line in cli("list")[1].splitlines()]
    assert lines[0][-1] == "FROM"
    assert [line[-1] for line in lines if line[0] in ("m-1", "child")] == ["m@warm", "old@s"]
    assert lines[1][-1] == "min"  # `m` has a snapshot, and comes from none
    long = dataclasses.replace(verbs.machines["m-1"], name="a-machine-with-a-very-long-name-indeed", snapshot="acme/" + "x" * 60 + "@1")
    verbs.machines[long.name] = long
    assert "a-machine-with" in cli("list")[1]
    out = cli("show", "m-1")[1]
    assert "parent    m\nsnapshot  m@warm\n" in out
    assert "ready in  0.12 s" in out


def test_show_tells_the_costs(cli: Run, verbs: Memory) -> None:
    block = """\
memory         512 MiB
  in use       90 MiB: 20 MiB unique, 70 MiB its part of what is shared
  overhead     30 MiB of that, QEMU itself
  reclaimable  5 MiB, which its guest could give back
  returned     400 MiB, which the host does not hold
disk           8 GiB
  in use       17 MiB: 14 MiB unique, 3 MiB its part of what is shared
  written      12 MiB of that, since it was last saved
"""
    assert block in cli("show", "m")[1]
    asleep = Usage(disk_unique=60 * MIB)
    verbs.machines["m"] = dataclasses.replace(verbs.machines["m"], state=State.HIBERNATED, usage=asleep)
    out = cli("show", "m")[1]
    assert "memory    512 MiB\n  in use  0 B\ndisk      8 GiB\n  in use  60 MiB\n" in out


# the tree


def test_tree(cli: Run) -> None:
    assert cli("tree")[1] == (
        "NAME                  STATE    OWN MEM  MEMORY   OWN DISK  DISK\n"
        "debian:bookworm\n"
        "├─ m                  running  20 MiB   90 MiB   14 MiB    17 MiB\n"
        "│  ├─ m@warm          ready                      3 MiB     3 MiB\n"
        "│  │  └─ m-1          running  20 MiB   90 MiB   14 MiB    17 MiB\n"
        "│  ├─ acme/shop@4f2a  ready                      3 MiB     3 MiB\n"
        "│  ├─ m@bad           broken                     3 MiB     3 MiB\n"
        "│  └─ snap-4          ready\n"
        "├─ bad                failed\n"
        "├─ idle               stopped\n"
        "└─ old (deleted)\n"
        "   └─ old@s           saving                     3 MiB     3 MiB\n"
        "      └─ child        running  20 MiB   90 MiB   14 MiB    17 MiB\n"
        "together                       60 MiB   270 MiB  54 MiB    63 MiB\n"
    )
    assert {"id": "image", "parent": "", "kind": "image", "name": "debian:bookworm"}.items() <= json.loads(cli("tree", "--json")[1])[
        0
    ].items()


def test_the_deleted_are_dimmed(served: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    terminal = Terminal(served, "tree")
    try:
        terminal.expect(b"together")
        assert b"\x1b[2m\xe2\x94\x94\xe2\x94\x80 old (deleted)\x1b[0m" in terminal.seen
        assert b"\x1b[32mrunning\x1b[0m" in terminal.seen
    finally:
        terminal.close()


def test_a_deep_tree_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    usage = Usage(memory=999 << 20, private=999 << 20, disk_unique=999 << 20, disk_shared=1 << 19)
    nodes = [
        TreeNode(id=str(n), parent=str(n - 1), kind=NodeKind.MACHINE, name=f"machine-{n}", state="hibernated", usage=usage)
        for n in range(3000)
    ]
    lines = draw(nodes)
    assert len(lines) == 3002
    assert max(map(len, lines)) <= 80
    assert all(f"machine-{n}" in line for n, line in enumerate(lines[1:-1]))


def test_members_whose_parent_is_not_there_are_roots() -> None:
    lines = draw(
        [TreeNode(id="a", parent="gone", kind=NodeKind.SNAPSHOT, name="x@1"), TreeNode(id="b", parent="a", kind=NodeKind.MACHINE, name="y")]
    )
    assert [line.split()[:2] for line in lines[1:]] == [["x@1"], ["└─", "y"]]


# delete


def test_delete_with_dependents(cli: Run, verbs: Memory) -> None:
    assert cli("delete", "m@warm") == (4, "", "error: m@warm is stood on by 1 others\n  m-1\nhint: `--cascade` deletes them too.\n")
    assert json.loads(cli("delete", "m@warm", "--json")[2])["error"]["details"]["dependents"] == ["m-1"]
    assert cli("delete", "m@warm", "--dry-run")[0] == 4
    assert cli("delete", "m@warm", "m-1", "--dry-run")[1] == "m-1 would be deleted (running).\nm@warm would be deleted.\n"
    assert cli("delete", "m@warm", "--cascade", "--dry-run")[1] == "m-1 would be deleted.\nm@warm would be deleted.\n"
    assert {"m@warm", "m-1"} <= verbs.kept.keys() | verbs.machines.keys()
    assert cli("delete", "m@warm", "--cascade")[1] == "m-1 is deleted.\nm@warm is deleted.\n"
    assert {"m@warm", "m-1"}.isdisjoint(verbs.kept.keys() | verbs.machines.keys())


def test_delete_takes_machines_before_what_they_stand_on(cli: Run, verbs: Memory) -> None:
    assert cli("delete", "old@s", "child", "child")[1] == "child is deleted (running).\nold@s is deleted.\n"
    out = json.loads(cli("delete", "snap-4", "acme/shop@4f2a", "--json")[1])
    assert out == [{"name": "snap-4", "id": "snap-4", "deleted": True}, {"name": "acme/shop@4f2a", "id": "snap-2", "deleted": True}]


def test_a_slip_of_the_keyboard_deletes_nothing(cli: Run, verbs: Memory) -> None:
    assert cli("delete", "m", "m@warn") == (3, "", "error: there is no snapshot m@warn\nhint: `ramet snapshots` shows the names.\n")
    assert cli("delete", "m", "mm")[2].startswith("error: there is no machine mm\n")
    assert "m" in verbs.machines
    assert cli("template", "m@warm", "shop")[0] == 0
    assert cli("delete", "shop")[2].startswith("error: there is no machine shop\n")
    assert "shop:latest" in verbs.kept


# layers


def test_layers(cli: Run, verbs: Memory) -> None:
    assert [line.split() for line in cli("layer", "ls")[1].splitlines()][:2] == [
        ["ID", "KIND", "SIZE", "DATA", "STORED", "CHAIN", "AGE", "USED", "BY"],
        [GOOD, "memory", "5.01", "MiB", "4", "KiB", "300", "B", "1", "2", "h", "m@warm,", "m-1"],
    ]
    out = cli("layer", "show", GOOD, "--json")[1]
    assert (json.loads(out)["chain"], json.loads(cli("layer", "ls", "--json")[1])[0]) == ([GOOD], json.loads(out))
    assert "used by     m@warm\n            m-1\n" in cli("layer", "show", TORN)[1]
    assert cli("layer", "show", "00")[0] == 3
    verbs.raw.clear()
    assert cli("layer", "ls")[:2] == (0, "")


def test_verify(cli: Run, verbs: Memory) -> None:
    assert cli("layer", "verify", GOOD) == (0, f"{GOOD}  good\n", "")
    status, out, _ = cli("layer", "verify", "--all")
    assert (status, out) == (1, f"{GOOD}  good\n{TORN}  wrong  chunk 3 of blob sha256-bb is damaged�[2J\n")
    status, out, _ = cli("layer", "verify", TORN, "--json")
    assert (status, json.loads(out)[0]["problems"]) == (1, verbs.wrong[TORN])
    assert cli("layer", "verify")[0] == cli("layer", "verify", GOOD, "--all")[0] == 5
    assert cli("layer", "verify", "00")[0] == 3


def test_export(cli: Run, verbs: Memory, tmp_path: Path) -> None:
    file = tmp_path / "raw"
    status, out, _ = cli("layer", "export", GOOD, str(file), "--json")
    assert (status, json.loads(out)["written"]) == (0, 4096)
    assert file.read_bytes() == verbs.raw[GOOD]
    assert file.stat().st_blocks * 512 <= 16 << 10
    assert file.stat().st_mode & 0o777 == 0o666 & ~umask()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["raw", "s"]


def umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def test_export_to_stdout(served: str, verbs: Memory) -> None:
    assert program(served, ["layer", "export", GOOD, "-"]).stdout == verbs.raw[GOOD]
    ended = program(served, ["layer", "export", TORN, "-"])
    assert (ended.returncode, ended.stdout) == (7, b"torn")


def test_an_export_that_fails_leaves_what_was_there(cli: Run, tmp_path: Path) -> None:
    (tmp_path / "raw").write_text("old")
    status, _, err = cli("layer", "export", TORN, str(tmp_path / "raw"))
    assert (status, "cut short" in err) == (7, True)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir() if path.is_file()] == [("raw", "old")]
    assert cli("layer", "export", GOOD, str(tmp_path / "nowhere/raw"))[0] == 6
    assert cli("layer", "export", GOOD, str(tmp_path))[0] == 6


async def pieces(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


async def test_an_image_that_is_too_short(tmp_path: Path) -> None:
    with pytest.raises(LayerError, match="after 3 of 4 bytes"):
        await save(pieces(b"abc"), tmp_path / "raw", 4, lambda done, total: None)
    assert not list(tmp_path.iterdir())


async def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, data: object, offset: int) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(NoSpaceError, match="No space left on device"):
        await save(pieces(b"abc"), tmp_path / "raw", 3, lambda done, total: None)
    assert not list(tmp_path.iterdir())


async def test_devices_are_left_alone() -> None:
    with pytest.raises(HostError, match="not an ordinary file"):
        await save(pieces(b"abc"), Path("/dev/null"), 3, lambda done, total: None)


@pytest.mark.parametrize("sizes", [[20 * BLOCK], [1000] * 82, [BLOCK - 1, 5, 3 * BLOCK, 16 * BLOCK - 4], [7 * BLOCK, 13 * BLOCK]])
async def test_holes_are_found_wherever_the_stream_is_cut(tmp_path: Path, sizes: list[int]) -> None:
    data = b"".join(bytes(BLOCK) if n % 3 else bytes([n + 1]) * BLOCK for n in range(20))[: sum(sizes)]
    data = data[:-1] + b"x"
    parts = [data[sum(sizes[:n]) : sum(sizes[: n + 1])] for n in range(len(sizes))]
    done: list[int] = []
    written = await save(pieces(*parts), tmp_path / "raw", len(data), lambda now, total: done.append(now))
    assert (tmp_path / "raw").read_bytes() == data
    assert done[-1] == len(data)
    assert written <= 10 * BLOCK
    assert (tmp_path / "raw").stat().st_blocks * 512 <= 9 * BLOCK


def test_runs_of_data() -> None:
    part = bytes(BLOCK) + b"a" * BLOCK * 2 + bytes(BLOCK * 2) + b"b"
    assert list(data_runs(part, 0)) == [(BLOCK, 3 * BLOCK), (5 * BLOCK, 5 * BLOCK + 1)]
    assert list(data_runs(bytes(100), 50)) == list(data_runs(b"", 0)) == []


# completion


@pytest.mark.parametrize(
    ("typed", "at", "offered"),
    [
        ("ramet restore m ", 3, ["m@warm", "acme/shop@4f2a", "m@bad", "old@s"]),
        ("ramet restore m m @ w", 5, ["warm"]),  # as bash tells `m@w`
        ("ramet restore m m @", 4, ["warm", "bad"]),
        ("ramet restore m ac", 3, ["acme/shop@4f2a"]),
        ("ramet create --from acme/shop @ 4", 5, ["4f2a"]),
        ("ramet delete m @ warm m @ b", 7, ["bad"]),
        ("ramet delete ", 2, ["m", "bad", "idle", "m-1", "child", "m@warm", "acme/shop@4f2a", "m@bad", "old@s"]),
        ("ramet fork ch", 2, ["child"]),
        ("ramet layer verify ", 3, [GOOD, TORN]),
        ("ramet hib", 1, ["hibernate"]),
        ("ramet cp chi", 2, ["child:"]),
    ],
)
def test_completion_in_bash(served: str, typed: str, at: int, offered: list[str]) -> None:
    env = environment(served, _RAMET_COMPLETE="complete_bash", COMP_WORDS=typed, COMP_CWORD=str(at))
    ended = subprocess.run(COMPLETING, env=env, capture_output=True, timeout=60, stdin=subprocess.DEVNULL)
    assert ended.stdout.decode().split() == offered
    assert ended.stderr == b""


def test_completion_is_silent_without_a_daemon(tmp_path: Path) -> None:
    env = environment(f"unix://{tmp_path}/nobody", _RAMET_COMPLETE="complete_bash", COMP_WORDS="ramet restore m m @", COMP_CWORD="4")
    ended = subprocess.run(ARGV, env=env, capture_output=True, timeout=60, stdin=subprocess.DEVNULL)
    assert (ended.stdout, ended.stderr) == (b"", b"")


@pytest.mark.parametrize(
    ("words", "at", "found"),
    [
        (["r", "x", "a", ":", "b"], 4, (["r", "x", "a:b"], 2, "a:")),
        (["r", "x", "a", ":", "b"], 2, (["r", "x", "a:b"], 2, "a:")),
        (["r", "x", "a", "@", "b", ":", "c"], 6, (["r", "x", "a@b:c"], 2, "a@b:")),
        (["r", "x", "a", "b"], 3, (["r", "x", "a", "b"], 3, "")),
        (["r", "x", "a", "@", "b"], 5, (["r", "x", "a@b"], 3, "")),
    ],
)
def test_words_are_put_together(words: list[str], at: int, found: object) -> None:
    assert joined(words, at) == found


# all of them


COMMANDS = ["fork", "pause", "resume", "hibernate", "snapshot", "snapshots", "restore", "template", "tree", "delete", "create"]


@pytest.mark.parametrize("line", [*COMMANDS, "layer ls", "layer show", "layer verify", "layer export"])
def test_help_has_an_example(line: str) -> None:
    out = CliRunner().invoke(app, [*line.split(), "--help"], env={"COLUMNS": "80"}).stdout
    assert f"Example: ramet {line}" in " ".join(out.split())


@pytest.mark.parametrize("line", ["snapshots", "tree", "fork m x", "resume m", "layer ls", "restore m --dry-run"])
def test_starting_is_quick(served: str, line: str) -> None:
    """None of these is imported, which cost more than all the rest."""
    code = f"import atexit, sys; sys.argv[1:] = {line.split()}\n"
    code += "slow = 'pydantic', 'fastapi', 'rich', 'sqlalchemy', 'tarfile'\n"
    code += "atexit.register(lambda: print([m for m in slow if m in sys.modules], file=sys.stderr))\n"
    code += "from ramet.cli import main; main()"
    ended = subprocess.run([ARGV[0], "-c", code], capture_output=True, timeout=60, stdin=subprocess.DEVNULL)
    assert ended.stderr.splitlines()[-1] == b"[]"
