"""ramet.toml -> Spec: parse, default and validate, each on its own. Every error names the file, the line or key, and what would be right."""

from __future__ import annotations

import dataclasses
import difflib
import json
import posixpath
import re
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema

from ramet.errors import SpecError
from ramet.model import Drive, InitMode, Lifecycle, Port, Reclaim, Spec
from ramet.units import SIZE_HELP, format_size, parse_size

FILE_NAME = "ramet.toml"

# Limits. Below 64 MiB neither kernel boots; ext4 below 64 MiB holds no base image; the upper ones catch slips of the keyboard.
MEMORY = (64 << 20, 4 << 40)
DISK = (64 << 20, 64 << 40)
CPUS = (1, 255)
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
DRIVES = 8  # all that each costs: a thread of QEMU's, a place on the bus, up to 120 bytes of the 2048 that the guest's kernel reads of its command line
_DRIVE = re.compile(r"[a-z0-9]([a-z0-9-]{0,18}[a-z0-9])?")  # 20: what fits into a virtio disk's serial
_MOUNT = re.compile(r"/[A-Za-z0-9._/-]{1,79}")
_TAKEN = ("/dev", "/proc", "/sys", "/run")  # the guest's own
NAME_HELP = "1 to 63 of a-z, 0-9 and `-`, not beginning or ending with `-` (it becomes the machine's host name)"


def parse_port(value: str | int) -> Port:
    """`8080` (any free host port), `8000:80` (host port 8000 to the guest's 80)."""
    parts = str(value).split(":")
    if isinstance(value, bool) or len(parts) > 2 or not all(re.fullmatch(r"\d{1,5}", p) and 0 < int(p) < 65536 for p in parts):
        raise ValueError(f"{value!r} is not a port: write the guest's port, as `8080`, or `HOST:GUEST`, as `8000:80`; ports are 1 to 65535")
    return Port(guest=int(parts[-1]), host=int(parts[0]) if len(parts) == 2 else 0)


def _within(value: int, limits: tuple[int, int], what: str) -> int:
    low, high = limits
    if not low <= value <= high:
        raise ValueError(f"{format_size(value)} of {what} is impossible: write {format_size(low)} to {format_size(high)}")
    return value


def _memory(value: Any) -> int:
    return _within(parse_size(value), MEMORY, "memory") & ~0xFFFFF  # QEMU wants whole pages, huge pages even numbers: whole MiB serve both


def _disk(value: Any) -> int:
    return _within(parse_size(value), DISK, "disk") & ~0xFFFFF


def _drive_name(value: Any) -> str:
    if not isinstance(value, str) or not _DRIVE.fullmatch(value):
        raise ValueError(f"{value!r} is not a name of a drive: write 1 to 20 of a-z, 0-9 and `-`, not beginning or ending with `-`")
    return value


def _mount(value: Any) -> str:
    if value == "":
        return ""
    if not isinstance(value, str) or not _MOUNT.fullmatch(value) or posixpath.normpath(value) != value:
        raise ValueError(
            f"{value!r} is not a place to mount a drive on: write an absolute path of at most 80 letters, digits and `._-/`, as `/data`"
        )
    if any(value == each or value.startswith(f"{each}/") for each in _TAKEN):
        raise ValueError(f"{value!r} belongs to the guest's system: write another, as `/data`")
    return value


def _together(drives: Any) -> Any:
    """Drives, as they are, unless they do not go together."""
    if len(drives) > DRIVES:
        raise ValueError(f"a machine has at most {DRIVES} drives beside its root disk, not {len(drives)}")
    for what in ("name", "mount"):
        found = [value for each in drives if (value := getattr(each, what))]
        if twice := sorted({value for value in found if found.count(value) > 1}):
            raise ValueError(f"two drives have the {what} {twice[0]!r}")
    return drives


def _drives(drives: Any) -> Any:
    return _together(tuple(Drive(name=_drive_name(each.name), size=_disk(each.size), mount=_mount(each.mount)) for each in drives))


def _drive(value: Any) -> Any:
    """A table, or in short `NAME:SIZE` or `NAME:SIZE:/MOUNT`."""
    if not isinstance(value, str):
        return value
    name, size, mount = (*value.split(":", 2), "", "")[:3]
    if not size:
        raise ValueError(f"{value!r} is not a drive: write `NAME:SIZE`, or `NAME:SIZE:/MOUNT`, as `data:20G:/data`")
    return {"name": name, "size": size, "mount": mount}


def _cpus(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not CPUS[0] <= value <= CPUS[1]:
        raise ValueError(f"{value!r} is not a number of cpus: write a whole number from {CPUS[0]} to {CPUS[1]}")
    return value


def _name(value: Any) -> str:
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise ValueError(f"{value!r} is not a machine name: write {NAME_HELP}")
    return value


def _env(value: Any) -> Any:
    if isinstance(value, dict):
        for key in value:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", key):
                raise ValueError(
                    f"{key!r} is not a name of an environment variable: write letters, digits and `_`, not beginning with a digit"
                )
        return {k: str(v) if isinstance(v, int | float) and not isinstance(v, bool) else v for k, v in value.items()}
    return value


def _absolute(value: Any) -> Any:
    if isinstance(value, str) and value and not value.startswith("/"):
        raise ValueError(f"{value!r} is not an absolute path: write `/{value}`")
    return value


def _init(value: Any) -> Any:
    if value not in list(InitMode):
        raise ValueError(f"{value!r} is not an init: write `agent` (Ramet's own) or `image` (the image's, as systemd)")
    return value


def _reclaim(value: Any) -> Any:
    if value not in list(Reclaim):
        raise ValueError(f"{value!r} says not how memory is given back: write `off`, `gentle` or `eager`")
    return value


def _reads(schema: dict[str, Any]) -> WithJsonSchema:
    return WithJsonSchema(schema)


_size_schema = {"type": ["string", "integer"], "pattern": r"^\s*\d+(\.\d+)?\s*[A-Za-z]*\s*$", "examples": ["512MiB", "2G"]}
_port_schema = {
    "type": ["string", "integer"],
    "pattern": r"^\d{1,5}(:\d{1,5})?$",
    "minimum": 1,
    "maximum": 65535,
    "examples": [8080, "8000:80"],
}


class LifecycleTable(BaseModel):
    """[lifecycle]: shell commands run in the guest."""

    model_config = ConfigDict(extra="forbid", strict=True)
    create: str = Field("", description="Run once, after the first boot; when it fails, creating the machine fails.")
    start: str = Field("", description="Run after every boot.")


class DriveTable(BaseModel):
    """[[drives]]: a disk beside the root disk."""

    model_config = ConfigDict(extra="forbid", strict=True)
    name: Annotated[str, BeforeValidator(_drive_name), _reads({"type": "string", "pattern": f"^{_DRIVE.pattern}$"})] = Field(
        description="What the guest knows it by: /dev/disk/by-id/virtio-NAME."
    )
    size: Annotated[int, BeforeValidator(_disk), _reads(_size_schema)] = Field(description="Its size; only what is used takes space.")
    mount: Annotated[str, BeforeValidator(_mount)] = Field(
        "", description="Where its file system (ext4) is mounted at every boot; without one it is a blank device."
    )


class SpecFile(BaseModel):
    """A Ramet machine, as ramet.toml defines it."""

    model_config = ConfigDict(extra="forbid", strict=True, title="ramet.toml")
    name: Annotated[str, BeforeValidator(_name), _reads({"type": "string", "pattern": f"^{_NAME.pattern}$"})] = Field(
        "", description="Name of the machine and its host name; default: the directory's."
    )
    image: str = Field(
        "debian:bookworm", min_length=1, description="`debian:SUITE`, a registry's image, `oci:PATH`, `docker-archive:PATH`."
    )
    cpus: Annotated[int, BeforeValidator(_cpus), _reads({"type": "integer", "minimum": CPUS[0], "maximum": CPUS[1]})] = Field(
        1, description="Virtual cpus."
    )
    memory: Annotated[int, BeforeValidator(_memory), _reads(_size_schema)] = Field(
        Spec.memory, description="RAM, " + SIZE_HELP + ".", validate_default=False
    )
    disk: Annotated[int, BeforeValidator(_disk), _reads(_size_schema)] = Field(
        Spec.disk, description="Size of the root disk; only what is used takes space."
    )
    env: Annotated[dict[str, str], BeforeValidator(_env)] = Field(default_factory=dict, description="Environment of every command.")
    workdir: Annotated[str, BeforeValidator(_absolute)] = Field("", description="Working directory of commands; default: the image's.")
    user: str = Field("", description="User of commands, `name`, `uid` or `user:group`; default: the image's.")
    ports: list[Annotated[Port, BeforeValidator(parse_port), _reads(_port_schema)]] = Field(
        default_factory=list, description="TCP ports reachable on the host's loopback: `8080` or `HOST:GUEST`."
    )
    lifecycle: LifecycleTable = Field(default_factory=LifecycleTable)
    init: Annotated[InitMode, BeforeValidator(_init)] = Field(
        InitMode.AGENT, strict=False, description="First process: Ramet's agent, or the image's own init."
    )
    entrypoint: bool = Field(True, description="Run the image's entrypoint in the background after every boot.")
    reclaim: Annotated[Reclaim, BeforeValidator(_reclaim)] = Field(
        Reclaim.GENTLE, strict=False, description="How soon the host gets back memory that the guest has not used for a while."
    )
    drives: Annotated[list[Annotated[DriveTable, BeforeValidator(_drive)]], AfterValidator(_together)] = Field(
        default_factory=list, description="Disks beside the root disk, each served by a thread of its own."
    )


def json_schema() -> str:
    """The published schema, as `schema/ramet.schema.json` holds it."""
    schema = SpecFile.model_json_schema()
    return json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}, indent=2) + "\n"


def line_of(text: str, path: tuple[str | int, ...]) -> int | None:
    """The 1-based line on which a key stands; None when it cannot be told (inline tables, arrays over lines)."""
    keys = [str(p) for p in path]
    while keys:
        table: list[str] = []
        tables: dict[str, int] = {}  # how many there were of each array of tables
        for number, line in enumerate(text.splitlines(), 1):
            stripped = line.strip()
            if header := re.match(r"\[\[([^\[\]]+)\]\]", stripped):
                name = header[1].strip().strip("\"'")
                table = [name, str(tables.get(name, 0))]
                tables[name] = tables.get(name, 0) + 1
                if table == keys or [name] == keys:
                    return number
            elif header := re.match(r"\[([^\[\]]+)\]", stripped):
                table = [part.strip().strip("\"'") for part in header[1].split(".")]
                if table == keys:
                    return number
            key = re.match(r"([A-Za-z0-9_.\"' -]+?)\s*=", stripped)
            if key and [*table, *(part.strip().strip("\"'") for part in key[1].split("."))] == keys:
                return number
        keys.pop()
    return None


def _fields_at(path: tuple[str | int, ...]) -> list[str]:
    tables: dict[str | int, type[BaseModel]] = {"lifecycle": LifecycleTable, "drives": DriveTable}
    return list((tables.get(path[0], SpecFile) if len(path) > 1 else SpecFile).model_fields)


_WANTED = {
    "string_type": "a string",
    "int_type": "a whole number",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "a table",
    "model_type": "a table",
}


def _explain(error: Any) -> str:
    path = tuple(error["loc"])
    key = ".".join(str(p) for p in path)
    if error["type"] == "extra_forbidden":
        fields = _fields_at(path)
        close = difflib.get_close_matches(str(path[-1]), fields, n=1)
        return f"unknown key `{key}`: " + (f"did you mean `{close[0]}`?" if close else f"known are {', '.join(fields)}")
    if error["type"] == "value_error":
        return f"`{key}`: {error['ctx']['error']}"
    if error["type"] == "missing":
        return f"`{key}` is missing"
    wanted = _WANTED.get(error["type"])
    return f"`{key}`: {error['input']!r} is not {wanted}" if wanted else f"`{key}`: {error['msg']}"


def build(data: Mapping[str, Any], *, source: str, text: str = "", default_name: str = "") -> Spec:
    """Validate a parsed definition. source and text are for the errors."""
    try:
        table = SpecFile.model_validate({"name": default_name, **data} if default_name or "name" in data else data)
    except ValidationError as error:
        problems = []
        for each in error.errors():
            line = line_of(text, tuple(each["loc"]))
            problems.append(f"{source}{f':{line}' if line else ''}: {_explain(each)}")
        raise SpecError("\n".join(problems), hint="The keys are described in schema/ramet.schema.json and docs/spec.md.") from None
    if not table.name:
        raise SpecError(f"{source}: `name` is missing: write {NAME_HELP}")
    return Spec(
        **{key: getattr(table, key) for key in type(table).model_fields if key not in ("ports", "lifecycle", "drives")},
        ports=tuple(table.ports),
        drives=tuple(Drive(**each.model_dump()) for each in table.drives),
        lifecycle=Lifecycle(**table.lifecycle.model_dump()),
    )


def check(wanted: Spec) -> Spec:
    """A Spec that came over the API, held to the same limits as one from a file. Raises SpecError that names the key."""
    checks: dict[str, Callable[[Any], Any]] = {
        "name": _name, "cpus": _cpus, "memory": _memory, "disk": _disk, "env": _env, "workdir": _absolute, "reclaim": _reclaim, "drives": _drives,
    }  # fmt: skip
    changes = {}
    for key, each in checks.items():
        try:
            changes[key] = each(getattr(wanted, key))
        except ValueError as error:
            raise SpecError(f"`{key}`: {error}") from None
    if not wanted.image:
        raise SpecError("`image` is empty: write `debian:SUITE` or an image's name")
    for port in wanted.ports:
        if not (0 < port.guest < 65536 and 0 <= port.host < 65536):
            raise SpecError(f"`ports`: {port.host}:{port.guest} is not a port: ports are 1 to 65535, a host port of 0 means any free one")
    if len({port.guest for port in wanted.ports}) < len(wanted.ports):
        raise SpecError("`ports`: a guest port is named twice")
    return dataclasses.replace(wanted, **changes)


def default_name(directory: Path) -> str:
    """A machine name made of a directory's name."""
    return re.sub(r"[^a-z0-9]+", "-", directory.resolve().name.lower()).strip("-")[:63].strip("-")


def load(path: Path) -> Spec:
    """The Spec of a ramet.toml (or of the directory that holds one). Raises SpecError."""
    if path.is_dir():
        path = path / FILE_NAME
    try:
        text = path.read_text(encoding="utf-8")
        data = tomllib.loads(text)
    except FileNotFoundError:
        raise SpecError(f"there is no {path}", hint="Write one (docs/spec.md), or name the directory that has it.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{path} cannot be read: {error}") from error
    except (ValueError, RecursionError) as error:  # of tomllib: a number of 5,000 digits and brackets within brackets are not its own error
        raise SpecError(f"{path}: not valid TOML: {error}") from error
    return build(data, source=str(path), text=text, default_name=default_name(path.parent))
