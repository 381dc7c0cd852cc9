"""ramet.toml: what is accepted, and that every refusal names the file, the line, the key and what would be right."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ramet import spec
from ramet.errors import SpecError
from ramet.model import Drive, InitMode, Lifecycle, Port, Reclaim, Spec
from ramet.units import format_size, parse_size

FULL = """
name = "web-1"
image = "ghcr.io/acme/shop:2"
cpus = 4
memory = "2G"
disk = "20GB"
env = { DEBUG = "1", LEVEL = 3 }
workdir = "/srv/app"
user = "app:staff"
ports = [8080, "8000:80"]
init = "image"
entrypoint = false
reclaim = "eager"

[lifecycle]
create = "make setup"
start = "make serve &"

[[drives]]
name = "data"
size = "20GiB"
mount = "/data"

[[drives]]
name = "scratch-2"
size = "1500MB"
"""


def write(directory: Path, text: str) -> Path:
    path = directory / "ramet.toml"
    path.write_text(text)
    return path


def refusal(directory: Path, text: str) -> str:
    with pytest.raises(SpecError) as caught:
        spec.load(write(directory, text))
    assert caught.value.hint
    return caught.value.message


def test_everything(tmp_path: Path) -> None:
    assert spec.load(write(tmp_path, FULL)) == Spec(
        name="web-1",
        image="ghcr.io/acme/shop:2",
        cpus=4,
        memory=2 << 30,
        disk=20 * 10**9 >> 20 << 20,  # whole MiB
        env={"DEBUG": "1", "LEVEL": "3"},
        workdir="/srv/app",
        user="app:staff",
        ports=(Port(guest=8080), Port(guest=80, host=8000)),
        lifecycle=Lifecycle(create="make setup", start="make serve &"),
        init=InitMode.IMAGE,
        entrypoint=False,
        reclaim=Reclaim.EAGER,
        drives=(Drive(name="data", size=20 << 30, mount="/data"), Drive(name="scratch-2", size=1430 << 20)),
    )


def test_nothing(tmp_path: Path) -> None:
    home = tmp_path / "My Project_2"
    home.mkdir()
    write(home, "")
    assert spec.load(home) == Spec(name="my-project-2")


@pytest.mark.parametrize(
    ("text", "line", "wanted"),
    [
        ("\n\nmemry = '1G'", 3, ["unknown key `memry`", "did you mean `memory`?"]),
        ("zzz = 1", 1, ["unknown key `zzz`", "known are name, image"]),
        ("cpus = 1\n\n[lifecycle]\nstrat = 'x'", 4, ["unknown key `lifecycle.strat`", "did you mean `start`?"]),
        ("name = 'a'\nmemory = '512XB'", 2, ["`memory`", "unknown unit 'XB'", "512MiB"]),
        ("memory = '512mb'", 1, ["`memory`", "unknown unit 'mb'", "`512MB`"]),
        ("memory = 'lots'", 1, ["`memory`", "'lots' is not a size", "512MiB"]),
        ("memory = '-1G'", 1, ["`memory`", "is not a size"]),
        ("memory = true", 1, ["`memory`", "is not a size", "512MiB"]),
        ("memory = 1.5", 1, ["`memory`", "is not a size"]),
        ("memory = [1]", 1, ["`memory`", "is not a size"]),
        ("memory = '1K'", 1, ["`memory`", "1 KiB of memory is impossible", "64 MiB to 4 TiB"]),
        ("memory = '5T'", 1, ["`memory`", "5 TiB of memory is impossible", "64 MiB to 4 TiB"]),
        ("disk = 5", 1, ["`disk`", "5 B of disk is impossible", "64 MiB to 64 TiB"]),
        ("disk = '100T'", 1, ["`disk`", "impossible"]),
        (f"memory = '{'9' * 400}'", 1, ["`memory`", "is not a size"]),
        (f"memory = {'9' * 400}", 1, ["`memory`", "is not a size"]),
        ("cpus = 0", 1, ["`cpus`", "0 is not a number of cpus", "1 to 255"]),
        ("cpus = 256", 1, ["`cpus`", "1 to 255"]),
        ("cpus = 1.5", 1, ["`cpus`", "1.5 is not a number of cpus"]),
        ("cpus = '2'", 1, ["`cpus`", "'2' is not a number of cpus"]),
        ("cpus = true", 1, ["`cpus`", "True is not a number of cpus"]),
        ("name = 'Web'", 1, ["`name`", "'Web' is not a machine name", "a-z"]),
        ("name = '-web'", 1, ["`name`", "not beginning or ending"]),
        ("name = ''", 1, ["`name`", "'' is not a machine name"]),
        (f"name = '{'a' * 64}'", 1, ["`name`", "1 to 63"]),
        ("name = 7", 1, ["`name`", "7 is not a machine name"]),
        ("image = ''", 1, ["`image`", "at least 1 character"]),
        ("image = 7", 1, ["`image`", "7 is not a string"]),
        ("env = 'A=1'", 1, ["`env`", "'A=1' is not a table"]),
        ("[env]\n'1A' = 'x'", 1, ["`env`", "'1A' is not a name of an environment variable"]),
        ("[env]\nA = 'x'\nB = ['y']", 3, ["`env.B`", "is not a string"]),
        ("[env]\nB = true", 2, ["`env.B`", "True is not a string"]),
        ("workdir = 'srv'", 1, ["`workdir`", "'srv' is not an absolute path", "`/srv`"]),
        ("workdir = 1", 1, ["`workdir`", "1 is not a string"]),
        ("user = 0", 1, ["`user`", "0 is not a string"]),
        ("ports = 80", 1, ["`ports`", "80 is not a list"]),
        ("ports = ['80/tcp']", 1, ["`ports.0`", "'80/tcp' is not a port", "HOST:GUEST"]),
        ("ports = [80, 70000]", 1, ["`ports.1`", "70000 is not a port", "1 to 65535"]),
        ("ports = [0]", 1, ["`ports.0`", "0 is not a port"]),
        ("ports = [true]", 1, ["`ports.0`", "True is not a port"]),
        ("init = 'systemd'", 1, ["`init`", "'systemd' is not an init", "`agent`", "`image`"]),
        ("reclaim = 'hard'", 1, ["`reclaim`", "'hard'", "`off`, `gentle` or `eager`"]),
        ("entrypoint = 'no'", 1, ["`entrypoint`", "'no' is not true or false"]),
        ("lifecycle = 'make'", 1, ["`lifecycle`", "'make' is not a table"]),
        ("[lifecycle]\ncreate = ['make']", 2, ["`lifecycle.create`", "is not a string"]),
        ("[[drives]]\nname = 'a'\nsize = '1G'\n[[drives]]\nname = 'b'\nsize = 'x'", 6, ["`drives.1.size`", "'x' is not a size"]),
        ("[lifecycle]\nstart = ''\n[[drives]]\nname = 'a'", 3, ["`drives.0.size` is missing"]),
        ("[[drives]]\nname = 'a'\nsize = '1G'\nmout = '/a'", 4, ["unknown key `drives.0.mout`", "did you mean `mount`?"]),
        ("[[drives]]\nname = 'A'\nsize = '1G'", 2, ["`drives.0.name`", "'A' is not a name of a drive", "1 to 20 of a-z"]),
        (f"[[drives]]\nname = '{'a' * 21}'\nsize = '1G'", 2, ["`drives.0.name`", "1 to 20"]),
        ("[[drives]]\nname = 'a'\nsize = '1M'", 3, ["`drives.0.size`", "1 MiB of disk is impossible"]),
        ("[[drives]]\nname = 'a'\nsize = '1G'\nmount = 'data'", 4, ["`drives.0.mount`", "absolute path", "`/data`"]),
        ("[[drives]]\nname = 'a'\nsize = '1G'\nmount = '/'", 4, ["`drives.0.mount`", "'/' is not a place"]),
        ("[[drives]]\nname = 'a'\nsize = '1G'\nmount = '/a/../proc'", 4, ["`drives.0.mount`", "is not a place"]),
        ("[[drives]]\nname = 'a'\nsize = '1G'\nmount = '/a ramet.init=/x'", 4, ["`drives.0.mount`", "is not a place"]),
        ("[[drives]]\nname = 'a'\nsize = '1G'\nmount = '/proc/x'", 4, ["`drives.0.mount`", "belongs to the guest's system"]),
        ("drives = ['a:1G:/x', 'b:1G:/x']", 1, ["`drives`", "two drives have the mount '/x'"]),
        ("drives = ['a:1G', 'a:2G']", 1, ["`drives`", "two drives have the name 'a'"]),
        ("drives = ['a']", 1, ["`drives.0`", "NAME:SIZE", "`data:20G:/data`"]),
        (f"drives = {[f'd{n}:1G' for n in range(9)]}", 1, ["`drives`", "at most 8 drives"]),
        ("drives = 'a:1G'", 1, ["`drives`", "is not a list"]),
    ],
)
def test_refusals_name_file_line_key_and_what_is_right(tmp_path: Path, text: str, line: int, wanted: list[str]) -> None:
    message = refusal(tmp_path, text)
    assert message.startswith(f"{tmp_path}/ramet.toml:{line}: "), message
    for words in wanted:
        assert words in message
    assert "Traceback" not in message
    assert "pydantic" not in message


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    message = refusal(tmp_path, "cpus = 0\nmemory = 'x'\n\ncolour = 'red'\n")
    assert [line.split(": ")[0].rpartition(":")[2] for line in message.splitlines()] == ["1", "2", "4"]


def test_a_directory_without_a_name_to_make_of(tmp_path: Path) -> None:
    home = tmp_path / "___"
    home.mkdir()
    write(home, "")
    with pytest.raises(SpecError, match="`name` is missing: write 1 to 63 of a-z"):
        spec.load(home)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"there is no .*ramet\.toml"):
        spec.load(tmp_path)
    with pytest.raises(SpecError, match=r"not valid TOML: .*line 2"):
        spec.load(write(tmp_path, "name = 'a'\nname = 'b'\n"))
    for text in (f"cpus = {'9' * 5000}", "cpus = " + "[" * 5000):
        with pytest.raises(SpecError, match="not valid TOML"):
            spec.load(write(tmp_path, text))
    (tmp_path / "ramet.toml").write_bytes(b"name = '\xff'\n")
    with pytest.raises(SpecError, match="cannot be read"):
        spec.load(tmp_path)


# --- sizes ---

UNITS = {"K": 2**10, "KiB": 2**10, "M": 2**20, "MiB": 2**20, "G": 2**30, "GiB": 2**30, "T": 2**40, "TiB": 2**40}
UNITS |= {"": 1, "B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


@given(st.integers(0, 10**6), st.sampled_from(sorted(UNITS)), st.sampled_from(["", " "]))
def test_sizes(number: int, unit: str, space: str) -> None:
    assert parse_size(f"{number}{space}{unit}") == number * UNITS[unit]


@given(st.integers(0, 2**53))
def test_plain_numbers_are_bytes(number: int) -> None:
    assert parse_size(number) == parse_size(str(number)) == number


@given(st.text(max_size=12))
def test_no_text_gives_anything_but_a_size_or_a_refusal(text: str) -> None:
    try:
        assert parse_size(text) >= 0
    except ValueError as error:
        assert "512MiB" in str(error) or "`" in str(error)


@given(st.integers(0, 60 << 40))
def test_written_sizes_are_read_back_within_three_digits(size: int) -> None:
    again = parse_size(format_size(size))
    assert abs(again - size) <= size * 0.006


def test_fractions() -> None:
    assert parse_size("1.5GiB") == 3 << 29
    assert format_size(3 << 29) == "1.5 GiB"
    assert [format_size(n) for n in (0, 999, 1000, 1 << 20, 1023 << 20, 1 << 45)] == [
        "0 B",
        "999 B",
        "0.977 KiB",
        "1 MiB",
        "0.999 GiB",
        "32 TiB",
    ]


def test_memory_is_whole_mebibytes(tmp_path: Path) -> None:
    assert spec.load(write(tmp_path, "name = 'a'\nmemory = '500MB'\n")).memory == 476 << 20


# --- the schema ---


def test_the_schema_names_every_key_with_a_description() -> None:
    schema = json.loads(spec.json_schema())
    assert schema["additionalProperties"] is False
    assert set(schema["properties"]) == set(tomllib.loads(FULL))
    for name, each in schema["properties"].items():
        assert each.get("description") or "$ref" in each, name


@given(st.dictionaries(st.sampled_from(["name", "memory", "cpus", "ports", "env", "lifecycle", "x"]), st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2), max_leaves=4)))  # fmt: skip
def test_no_table_gives_anything_but_a_spec_or_a_refusal(data: dict[str, object]) -> None:
    try:
        assert isinstance(spec.build(data, source="x", default_name="web"), Spec)
    except SpecError as error:
        assert error.message.startswith("x")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"name": "a b ramet.init=/x"}, "`name`"),
        ({"cpus": 0}, "`cpus`"),
        ({"memory": 1}, "`memory`"),
        ({"disk": 1 << 60}, "`disk`"),
        ({"env": {"1x": ""}}, "`env`"),
        ({"workdir": "srv"}, "`workdir`"),
        ({"image": ""}, "`image`"),
        ({"ports": (Port(guest=0),)}, "`ports`"),
        ({"ports": (Port(guest=80), Port(guest=80, host=8000))}, "twice"),
        ({"drives": (Drive(name="a b", size=1 << 30),)}, "`drives`.*name of a drive"),
        ({"drives": (Drive(name="a", size=1),)}, "`drives`.*impossible"),
        ({"drives": (Drive(name="a", size=1 << 30, mount="/a ramet.init=/x"),)}, "`drives`.*mount"),
        ({"drives": (Drive(name="a", size=1 << 30), Drive(name="a", size=1 << 30))}, "`drives`.*the name 'a'"),
    ],
)
def test_a_spec_over_the_api_is_held_to_the_same_limits(change: dict[str, Any], says: str) -> None:
    with pytest.raises(SpecError, match=says):
        spec.check(Spec(**{"name": "fine", **change}))
    assert spec.check(Spec(name="fine")) == Spec(name="fine")
