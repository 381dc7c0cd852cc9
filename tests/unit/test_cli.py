"""The command line against a `Verbs` in memory: what it prints, where, and the status it leaves with."""

from __future__ import annotations

import dataclasses
import json
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ramet.cli import app, text
from ramet.cli.base import find_spec
from ramet.cli.files import split
from ramet.cli.group import Verbatim
from ramet.model import Drive, Event, State
from ramet.units import format_size
from tests.unit.conftest import Run
from tests.unit.memory import ARGV, COMPLETING, Memory, environment, program


@pytest.fixture
def verbs() -> Memory:
    made = Memory()
    made.stock()
    return made


def test_list(cli: Run) -> None:
    status, out, err = cli("list")
    assert status == 0
    assert [line.split() for line in out.splitlines()] == [
        ["NAME", "STATE", "IMAGE", "CPUS", "MEMORY", "DISK", "AGE"],
        ["m", "running", "debian:bookworm", "1", "512", "MiB", "8", "GiB", "2", "min"],
        ["bad", "failed", "debian:bookworm", "1", "512", "MiB", "8", "GiB", "2", "min"],
        ["QEMU", "died�[2J:", "out", "of", "memory"],
        ["idle", "stopped", "debian:bookworm", "1", "512", "MiB", "8", "GiB", "2", "min"],
    ]
    assert "\x1b" not in out + err


def test_json_has_the_apis_keys(cli: Run) -> None:
    listed = json.loads(cli("list", "--json")[1])
    assert [machine["name"] for machine in listed] == ["m", "bad", "idle"]
    assert json.loads(cli("show", "m", "--json")[1]) == listed[0]
    assert json.loads(cli("info", "--json")[1])["limits"] == ["no cgroups"]
    assert json.loads(cli("metrics", "m", "--json")[1]) == {"mem_total": 1, "load1": 0.5}
    assert json.loads(cli("forward", "m", "80", "--json")[1]) == [{"guest": 80, "host": 40000}]
    assert json.loads(cli("delete", "m", "--dry-run", "--json")[1]) == [{"name": "m", "id": "id-m", "deleted": False}]


def test_no_machines(cli: Run, verbs: Memory) -> None:
    verbs.machines.clear()
    assert cli("list")[:2] == (0, "")
    assert cli("list", "--json")[1] == "[]\n"


def test_errors(cli: Run) -> None:
    assert cli("show", "nobody") == (3, "", "error: there is no machine nobody\nhint: `ramet list` shows the names.\n")
    status, out, err = cli("show", "nobody", "--json")
    assert (status, out, json.loads(err)["error"]["code"]) == (3, "", "not_found")
    assert cli("create", "m")[0] == 4
    assert cli("create", "x", "--memory", "lots")[0] == 5
    assert cli("create", "x", "--env", "=1")[0] == 5
    assert cli("cp", "a", "b")[0] == 5
    assert cli("cp", "m:/nowhere", "x")[0] == 7
    assert cli("nonsense")[0] == 2


def test_no_daemon_that_answers(tmp_path: Path) -> None:
    ended = program(f"unix://{tmp_path}/nobody", ["list"])
    assert (ended.returncode, ended.stdout) == (6, b"")
    assert ended.stderr.startswith(b"error: cannot reach the daemon")
    assert program(f"unix://{tmp_path}/nobody", ["run", "m", "true"]).returncode == 125


def test_create_and_delete(cli: Run, verbs: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HERE", "2")
    options = "--image debian:trixie --cpus 2 --memory 1G --disk 4G -e A=1 -e HERE -e NOT_HERE -p 8000:80 -p 90 -u me -w /w"
    options += " --drive data:2G:/data --drive raw:64M"
    status, out, _ = cli("create", "new", *options.split())
    assert status == 0
    assert "new is made and runs" in out
    spec = verbs.machines["new"].spec
    assert (spec.image, spec.cpus, spec.memory, spec.disk, spec.env) == ("debian:trixie", 2, 1 << 30, 4 << 30, {"A": "1", "HERE": "2"})
    assert ([(p.host, p.guest) for p in spec.ports], spec.user, spec.workdir) == ([(8000, 80), (0, 90)], "me", "/w")
    assert spec.drives == (Drive(name="data", size=2 << 30, mount="/data"), Drive(name="raw", size=64 << 20))
    assert "drive data   2 GiB at /data\ndrive raw    64 MiB\n" in cli("show", "new")[1]
    assert cli("create", "other", "--drive", "data")[0] == 5
    assert cli("delete", "new", "nobody")[0] == 3
    assert "new" in verbs.machines  # a slip of the keyboard deletes nothing
    assert cli("delete", "--dry-run", "new")[0] == 0
    assert "new" in verbs.machines
    assert cli("delete", "new", "bad")[0] == 0
    assert set(verbs.machines) == {"m", "idle"}


def test_up_and_down(cli: Run, verbs: Memory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "project/deep").mkdir(parents=True)
    (tmp_path / "project/ramet.toml").write_text('name = "shop"\ncpus = 2\n')
    monkeypatch.chdir(tmp_path / "project/deep")
    status, out, err = cli("up")
    assert (status, "shop is made and runs" in out, "ramet shell shop" in out) == (0, True, True)
    assert verbs.machines["shop"].spec.cpus == 2
    assert "was running already" in cli("up")[1]
    assert cli("down")[0] == 0
    assert verbs.seen == [("stop", "shop", False)]
    (tmp_path / "project/ramet.toml").write_text('name = "shop"\ncpus = 3\n')
    assert "`cpus` has changed" in cli("up", "..")[2]
    assert json.loads(cli("up", "../ramet.toml", "--name", "other", "--json")[1])["name"] == "other"
    status, out, err = cli("up", "--name", "idle")
    assert verbs.seen[-1] == ("start", "idle")
    monkeypatch.chdir(tmp_path)
    status, out, err = cli("up")
    assert (status, "no ramet.toml here or above" in err) == (5, True)
    assert cli("down")[0] == 5


def test_logs_are_made_harmless(cli: Run, verbs: Memory) -> None:
    assert cli("logs", "m", "-n", "5", "--source", "qemu") == (0, "m qemu 5\n�\n", "")
    assert cli("logs", "m", "--source", "kernel")[0] == 5


def test_ports(cli: Run, verbs: Memory) -> None:
    assert cli("forward", "m", "80", "9000:90")[1] == "port 80 of m is 127.0.0.1:40000\nport 90 of m is 127.0.0.1:9000\n"
    assert cli("forward", "m", "http")[0] == 5
    assert cli("forward", "m")[1] == "no port of m is open\n"


def test_signals(cli: Run, verbs: Memory) -> None:
    for given, meant in (("TERM", 15), ("sigkill", 9), ("1", 1)):
        assert cli("kill", "m", "7", "-s", given)[0] == 0
        assert verbs.seen[-1] == ("signal", 7, meant)
    assert cli("kill", "m", "7", "-s", "LOUD")[0] == 5
    assert cli("kill", "m", "7", "--forget")[0] == 0
    assert verbs.seen[-1] == ("forget", 7)


def test_ps(cli: Run) -> None:
    assert cli("ps", "m") == (0, "", "nothing runs\n")


# commands


def test_run_passes_on_everything(served: str, verbs: Memory) -> None:
    ended = program(served, ["run", "m", "-e", "CODE=9", "-w", "/w", "-u", "me", "--timeout", "3", "--", "echo", "-e", "a b"])
    assert (ended.returncode, ended.stdout, ended.stderr) == (9, b"-e a b\n", b"done\n")
    command = verbs.seen[-1][1]
    assert (command.argv, command.cwd, command.user, command.timeout, command.stdin) == (("echo", "-e", "a b"), "/w", "me", 3.0, False)  # type: ignore[attr-defined]


def test_run_streams_what_is_piped(served: str) -> None:
    data = bytes(range(256)) * 4000
    ended = program(served, ["run", "m", "cat"], stdin=data)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, data, b"")


def test_run_reads_files_too(served: str, tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(b"from a file")
    with (tmp_path / "in").open("rb") as file:
        assert subprocess.run([*ARGV, "run", "m", "cat"], stdin=file, capture_output=True, timeout=60).stdout == b"from a file"


def test_run_failures_are_125(served: str) -> None:
    for arguments in (["run", "m", "missing"], ["run", "nobody", "x"], ["run", "m"], ["run", "m", "dies"], ["run", "-t", "m", "x"]):
        ended = program(served, arguments)
        assert ended.returncode == 125, arguments
        assert ended.stderr.startswith(b"error: ")


def test_run_as_json(served: str) -> None:
    ended = program(served, ["run", "m", "--json", "--", "x"])
    assert (ended.returncode, json.loads(ended.stdout)["stdout"], json.loads(ended.stdout)["encoding"]) == (3, "out\n", "utf-8")


def test_run_detached(served: str, verbs: Memory) -> None:
    ended = program(served, ["run", "m", "--detach", "sleep", "9"])
    assert (ended.returncode, ended.stdout) == (0, b"1\n")
    assert verbs.seen[-1][1].detach  # type: ignore[attr-defined]
    assert verbs.seen[-1][1].label == "sleep"  # type: ignore[attr-defined]


def test_attach(served: str) -> None:
    ended = program(served, ["attach", "m", "4"])
    assert (ended.returncode, ended.stdout) == (137, b"tail\n")


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def catches(pid: int, number: signal.Signals) -> bool:
    """Whether a program has a handler for a signal (SigCgt of /proc/PID/status)."""
    (mask,) = re.findall(r"^SigCgt:\s+(\w+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return bool(int(mask, 16) >> (number - 1) & 1)


@pytest.mark.parametrize(("sent", "status"), [([signal.SIGINT], 130), ([signal.SIGTERM], 143)])
def test_interrupting_run_signals_the_command(served: str, verbs: Memory, sent: list[signal.Signals], status: int) -> None:
    running = subprocess.Popen([*ARGV, "run", "m", "sleep"], stdin=subprocess.DEVNULL)
    wait_for(lambda: verbs.live)
    wait_for(lambda: catches(running.pid, signal.SIGHUP))  # the last one that it asks for
    for number in sent:
        running.send_signal(number)
    assert running.wait(60) in (status, 130)
    wait_for(lambda: verbs.signals[-1:] == sent)


def test_a_machine_that_stands_still_is_told_to_who_works_in_it(served: str, verbs: Memory) -> None:
    running = subprocess.Popen([*ARGV, "run", "m", "sleep"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert running.stderr
    wait_for(lambda: verbs.live)
    verbs.machines["m"] = dataclasses.replace(verbs.machines["m"], state=State.PAUSED, reason="the host's disk is full")
    assert running.stderr.readline() == b"m: the host's disk is full\n"
    wait_for(lambda: verbs.listeners)
    for state, reason in ((State.PAUSED, "the host's disk is full"), (State.RUNNING, ""), (State.RUNNING, "else"), (State.PAUSED, "")):
        verbs.tell(Event(at=1.0, kind="state", machine="m", state=state, reason=reason))
    assert [running.stderr.readline() for _ in range(2)] == [b"m: it goes on\n", b"m: it is paused\n"]
    running.terminate()
    assert running.communicate(timeout=60) == (b"", b"")


def test_killing_the_client_kills_the_command(served: str, verbs: Memory) -> None:
    running = subprocess.Popen([*ARGV, "run", "m", "sleep"], stdin=subprocess.DEVNULL)
    wait_for(lambda: verbs.live)
    running.kill()
    running.wait(60)
    wait_for(lambda: verbs.killed == {1})


def test_a_reader_that_leaves(served: str, verbs: Memory) -> None:
    """`ramet run m yes | head`: whoever reads us goes, and so do we and the command."""
    running = subprocess.Popen([*ARGV, "run", "m", "yes"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert running.stdout
    assert running.stdout.read(4) == b"y\ny\n"
    running.stdout.close()
    assert running.wait(60) == 141
    assert running.stderr
    assert running.stderr.read() == b""
    running.stderr.close()
    wait_for(lambda: verbs.killed == {1})


@pytest.mark.parametrize(
    ("line", "marked"),
    [
        ("m ls -l", "m -- ls -l"),
        ("m -- ls -l", "m -- ls -l"),
        ("-e A=B m -u root ls -u", "-e A=B m -u root -- ls -u"),
        ("-eA=B m ls", "-eA=B m -- ls"),
        ("--env=A=B m ls --env x", "--env=A=B m -- ls --env x"),
        ("-it m sh -i", "-it m -- sh -i"),
        ("-ie A=B m sh", "-ie A=B m -- sh"),
        ("--detach m sleep 1", "--detach m -- sleep 1"),
        ("m", "m"),
        ("--timeout 3 m", "--timeout 3 m"),
        ("m - x", "m -- - x"),
    ],
)
def test_where_the_command_begins(line: str, marked: str) -> None:
    import typer.main

    command = typer.main.get_command(app).commands["run"]  # type: ignore[attr-defined]
    assert isinstance(command, Verbatim)
    assert command._marked(line.split()) == marked.split()


# files


def test_cp_files(served: str, verbs: Memory, tmp_path: Path) -> None:
    (tmp_path / "local").write_bytes(b"x" * 300_000)
    (tmp_path / "local").chmod(0o750)
    assert program(served, ["cp", "local", "m:/g"], cwd=tmp_path).returncode == 0
    assert verbs.files["/g"] == (b"x" * 300_000, 0o750)
    assert program(served, ["cp", "local", "m:/dir/"], cwd=tmp_path).returncode == 0
    assert "/dir/local" in verbs.files
    assert program(served, ["cp", "local", "m:/dir"], cwd=tmp_path).returncode == 0
    assert program(served, ["cp", "m:/g", "back"], cwd=tmp_path).returncode == 0
    assert (tmp_path / "back").read_bytes() == b"x" * 300_000
    (tmp_path / "d").mkdir()
    assert program(served, ["cp", "m:/f", "d"], cwd=tmp_path).returncode == 0
    assert program(served, ["cp", "m:/f", "./e/"], cwd=tmp_path).returncode == 0
    assert (tmp_path / "d/f").read_bytes() == (tmp_path / "e/f").read_bytes() == b"data\n"
    assert program(served, ["cp", "m:/f", "nowhere/deep"], cwd=tmp_path).returncode == 6
    assert program(served, ["cp", "nothing", "m:/f"], cwd=tmp_path).returncode == 6


def test_cp_streams(served: str, verbs: Memory) -> None:
    assert program(served, ["cp", "-", "m:/s"], stdin=b"piped").returncode == 0
    assert program(served, ["cp", "m:/s", "-"]).stdout == b"piped"


def test_cp_trees(served: str, verbs: Memory, tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    (tmp_path / "t/f").write_text("x")
    assert program(served, ["cp", "t", "m:/new"], cwd=tmp_path).returncode == 0
    assert program(served, ["cp", "t", "m:/dir"], cwd=tmp_path).returncode == 0
    assert [call for call in verbs.seen if call[0] == "unpack"] == [("unpack", "/new", False, ""), ("unpack", "/dir/t", False, "")]
    ended = program(served, ["cp", "m:/dir", "copy", "--json"], cwd=tmp_path)
    assert (tmp_path / "copy/inside").read_bytes() == b"tree"
    assert b"left out: ./out" in ended.stderr
    assert json.loads(ended.stdout)["files"] == 1


def test_files(cli: Run, verbs: Memory) -> None:
    out = cli("files", "ls", "m:/")[1]
    assert re.search(r"^d 0755  0:0 .* dir$", out, re.MULTILINE)
    assert re.search(r"^- 0640  0:0 +5 B .* f$", out, re.MULTILINE)
    assert json.loads(cli("files", "stat", "m:/f", "--json")[1])["mode"] == 0o640
    assert cli("files", "mv", "m:/f", "m:/g")[0] == 0
    assert cli("files", "mv", "m:/g", "other:/g")[0] == 5
    assert cli("files", "rm", "-r", "m:/g")[0] == 0
    assert cli("files", "mkdir", "m:/n", "--mode", "0700")[0] == 0
    assert verbs.seen[-2:] == [("remove", "/g", True, ""), ("mkdir", "/n", 0o700, True, "")]
    assert cli("files", "ls", "here")[0] == 5


@pytest.mark.parametrize(
    ("place", "meant"),
    [
        ("m:/x", ("m", "/x")),
        ("m:", ("m", ".")),
        ("m:a:b", ("m", "a:b")),
        ("./m:x", None),
        ("/m:x", None),
        ("x", None),
        (":x", None),
        ("-", None),
    ],
)
def test_places(place: str, meant: object) -> None:
    assert split(place) == meant


# text


def test_tables_fit() -> None:
    lines = text.table(("NAME", "IMAGE", "AGE"), [("m", "registry.example.org/" + "x" * 100, "3 d")], give=1, room=40)
    assert max(map(len, lines)) <= 40
    assert lines[1].endswith("…  3 d")


@pytest.mark.parametrize(
    ("value", "said"),
    [(0, "0 B"), (1023, "0.999 KiB"), (1 << 20, "1 MiB"), (1536 << 20, "1.5 GiB"), (999 << 30, "999 GiB"), (3 << 40, "3 TiB")],
)
def test_sizes(value: int, said: str) -> None:
    assert format_size(value) == said


def test_help_names_every_command() -> None:
    out = CliRunner().invoke(app, ["--help"]).stdout
    for name in ("tour", "up", "run", "shell", "cp", "daemon", "bench"):
        assert re.search(rf"^\W+{name} ", out, re.MULTILINE)


def test_completion_of_names(served: str) -> None:
    env = environment(served, _RAMET_COMPLETE="complete_bash", COMP_WORDS="ramet show ", COMP_CWORD="2")
    ended = subprocess.run(COMPLETING, env=env, capture_output=True, timeout=60, stdin=subprocess.DEVNULL)
    assert ended.stdout.split() == [b"m", b"bad", b"idle"]


def test_the_nearest_definition(tmp_path: Path) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "ramet.toml").touch()
    assert find_spec(tmp_path / "a/b") == tmp_path / "ramet.toml"
    (tmp_path / "a/ramet.toml").touch()
    assert find_spec(tmp_path / "a/b") == tmp_path / "a/ramet.toml"


@pytest.mark.parametrize("line", ["list", "show m --json", "run m -e A=1 -- echo x", "stop m --force", "files ls m:/", "daemon status"])
def test_starting_is_quick(served: str, line: str) -> None:
    """None of these is imported, which cost more than all the rest."""
    code = f"import atexit, sys; sys.argv[1:] = {line.split()}\n"
    code += "slow = 'pydantic', 'fastapi', 'rich', 'sqlalchemy', 'tarfile'\n"
    code += "atexit.register(lambda: print([m for m in slow if m in sys.modules], file=sys.stderr))\n"
    code += "from ramet.cli import main; main()"
    ended = subprocess.run([ARGV[0], "-c", code], capture_output=True, timeout=60, stdin=subprocess.DEVNULL)
    assert ended.stderr.splitlines()[-1] == b"[]"
