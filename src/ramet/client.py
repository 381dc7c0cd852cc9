"""`Verbs` over HTTP. Never retries: where a request may have been carried out and its answer is lost, OutcomeUnknownError says so."""

from __future__ import annotations

import builtins
import contextlib
import json
import os
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Iterator
from typing import Any, Self
from urllib.parse import quote, urlencode, urlsplit

import httpx2

from ramet.errors import DaemonError, OutcomeUnknownError, RametError, SpecError, from_wire
from ramet.model import (
    Command,
    Event,
    Exit,
    FileInfo,
    ForkOutcome,
    HostInfo,
    Machine,
    Port,
    Process,
    ProcessEvent,
    Reclaim,
    Result,
    Size,
    Snapshot,
    Spec,
    TreeNode,
)
from ramet.paths import StateDir
from ramet.records import dump, load
from ramet.rest import BYTES, HEARTBEAT, HEARTBEAT_EVERY, STREAM, TAR, Decoder, Kind, RunReply, RunRequest, decode, to_json
from ramet.storage import Collected, LayerInfo, Transfer
from ramet.transport import Transport
from ramet.verbs import WRITE_FLAGS

CONNECT = 5.0  # seconds to reach the daemon
SOON = 60.0  # seconds of silence after which a question that starts nothing counts as unanswered
_LONG = httpx2.Timeout(None, connect=CONNECT)
_SHORT = httpx2.Timeout(SOON, connect=CONNECT)


class Client:
    """A daemon, by its address and token.

    url: http://HOST:PORT, https://HOST:PORT, or unix:///path/of/socket. transport: what carries the requests, instead of our own.
    """

    def __init__(self, url: str, token: str, *, transport: httpx2.AsyncBaseTransport | None = None) -> None:
        self.url = url
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https", "unix"):
            raise SpecError(f"{url!r} is not the address of a daemon", hint="Write http://HOST:PORT or unix:///path/of/socket.")
        socket = parts.path if parts.scheme == "unix" else None
        self._http = httpx2.AsyncClient(
            base_url="http://localhost" if socket else url,
            transport=transport or Transport(socket=socket),
            headers={"authorization": f"Bearer {token}", "user-agent": "ramet"},
            timeout=_LONG,
            trust_env=False,
        )

    @classmethod
    def discover(cls, state: StateDir | None = None) -> Client:
        """The daemon of this user: RAMET_URL and RAMET_TOKEN where set, else the one of the state directory. DaemonError when none has run there."""
        state = state or StateDir.default()
        hint = "`ramet daemon start` starts it; RAMET_URL and RAMET_TOKEN name another."
        url, token = os.environ.get("RAMET_URL", ""), os.environ.get("RAMET_TOKEN", "")
        if url and not token and not _local(url):
            # The token of this computer's daemon is nobody else's business.
            raise DaemonError(f"RAMET_URL names {url}, but RAMET_TOKEN is not set", hint="Set it to that daemon's token.")
        try:
            url = url or str(json.loads(state.daemon.read_text())["url"])
            token = token or state.token.read_text().strip()
        except FileNotFoundError as error:
            raise DaemonError(f"no daemon runs for {state.root}", hint=hint) from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DaemonError(f"cannot tell where the daemon of {state.root} is: {error}", hint=hint) from error
        return cls(url, token)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    # how requests travel

    @contextlib.contextmanager
    def _told(self, what: str, *, effect: bool) -> Iterator[None]:
        """Failures of the line as errors of ours. effect: whether what was asked may have happened when its answer is lost."""
        try:
            yield
        except (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout, httpx2.UnsupportedProtocol) as error:
            raise DaemonError(
                f"cannot reach the daemon at {self.url}: {error}", hint="`ramet daemon status` tells whether it runs."
            ) from error
        except httpx2.ReadTimeout as error:
            raise DaemonError(f"the daemon did not answer {what} in time", hint="Its log may say why.") from error
        except httpx2.TransportError as error:
            if effect:
                raise OutcomeUnknownError(
                    f"the outcome of {what} is unknown: the connection to the daemon broke",
                    hint="It may have been done, in part or whole; `ramet list` and `ramet ps` tell what is.",
                ) from error
            raise DaemonError(
                f"the connection to the daemon broke during {what}", hint="`ramet daemon status` tells whether it runs."
            ) from error

    @contextlib.asynccontextmanager
    async def _open(
        self,
        method: str,
        path: str,
        what: str,
        *,
        query: dict[str, Any] | None = None,
        content: bytes | AsyncIterable[bytes] | None = None,
        kind: str = "application/json",
        accept: str = "*/*",
        timeout: httpx2.Timeout = _LONG,
    ) -> AsyncIterator[httpx2.Response]:
        """A response whose status is a success, its body still to come."""
        headers = {"accept": accept} | ({"content-type": kind} if content is not None else {})
        request = self._http.build_request(method, path + _query(query), content=content, headers=headers, timeout=timeout)
        with self._told(what, effect=method != "GET"):
            response = await self._http.send(request, stream=True)
        try:
            if not response.is_success:
                with self._told(what, effect=False):
                    raise _refusal(response.status_code, await response.aread())
            yield response
        finally:
            await response.aclose()

    async def _call(self, method: str, path: str, what: str, **options: Any) -> bytes:
        """The whole body of the answer."""
        async with self._open(method, path, what, **options) as response:
            with self._told(what, effect=method != "GET"):
                return await response.aread()

    async def _json(self, method: str, path: str, what: str, **options: Any) -> Any:
        body = await self._call(method, path, what, **options)
        try:
            return json.loads(body)
        except ValueError as error:
            raise _not_ours() from error

    async def _frames(self, method: str, path: str, what: str, *, effect: bool, **options: Any) -> AsyncGenerator[tuple[Kind, bytes], None]:
        """The frames of a streamed answer; an error frame is raised. effect: see `_told`."""
        decoder = Decoder()
        async with self._open(method, path, what, accept=STREAM, **options) as response:
            if response.headers.get("content-type") != STREAM:
                raise _not_ours()
            with self._told(what, effect=effect):
                async for chunk in response.aiter_raw():
                    for each in decoder.feed(chunk):
                        yield each

    async def _events(self, method: str, path: str, what: str, content: bytes | None = None) -> AsyncIterator[ProcessEvent]:
        ended = False
        async with contextlib.aclosing(self._frames(method, path, what, effect=True, content=content)) as frames:
            async for kind, payload in frames:
                event = decode(kind, payload)
                yield event
                ended = ended or isinstance(event, Exit)
        if not ended:  # else read on to the body's end, so that the connection serves again
            raise OutcomeUnknownError(
                f"the outcome of {what} is unknown: the daemon ended the stream", hint="`ramet ps` tells what still runs."
            )

    async def _bytes(self, path: str, what: str, query: dict[str, Any] | None = None) -> AsyncIterator[bytes]:
        async with contextlib.aclosing(self._frames("GET", path, what, effect=False, query=query)) as frames:
            async for _, payload in frames:
                yield payload

    # the host, and machines

    async def info(self) -> HostInfo:
        return load(HostInfo, await self._json("GET", "/v1/info", "info", timeout=_SHORT))

    async def create(self, spec: Spec) -> Machine:
        return load(Machine, await self._json("POST", "/v1/machines", f"the creation of {spec.name}", content=to_json(spec)))

    async def list(self) -> list[Machine]:
        return load(list[Machine], await self._json("GET", "/v1/machines", "the list", timeout=_SHORT))

    async def get(self, name: str) -> Machine:
        return load(Machine, await self._json("GET", _machine(name), name, timeout=_SHORT))

    async def start(self, name: str) -> Machine:
        return load(Machine, await self._json("POST", _machine(name, "start"), f"the start of {name}"))

    async def stop(self, name: str, *, force: bool = False) -> Machine:
        return load(Machine, await self._json("POST", _machine(name, "stop"), f"the stop of {name}", query={"force": force}))

    async def update(self, name: str, *, memory: int | None = None, reclaim: Reclaim | None = None) -> Machine:
        wanted = to_json({"memory": memory, "reclaim": reclaim})
        return load(Machine, await self._json("PATCH", _machine(name), f"the update of {name}", content=wanted))

    async def delete(self, name: str) -> None:
        await self._call("DELETE", _machine(name), f"the deletion of {name}")

    async def logs(self, name: str, *, source: str = "console", lines: int = 200) -> bytes:
        return await self._call("GET", _machine(name, "logs"), "the logs", query={"source": source, "lines": lines}, timeout=_SHORT)

    async def metrics(self, name: str) -> dict[str, float]:
        return load(dict[str, float], await self._json("GET", _machine(name, "metrics"), "the metrics", timeout=_SHORT))

    async def open_port(self, name: str, port: Port) -> Port:
        return load(Port, await self._json("POST", _machine(name, "ports"), f"port {port.guest}", content=to_json(port)))

    async def close_port(self, name: str, guest: int) -> None:
        await self._call("DELETE", _machine(name, "ports", guest), f"port {guest}")

    async def events(self, name: str = "") -> AsyncIterator[Event]:
        # A peer that is silent for three heartbeats is gone, whatever TCP thinks.
        alive = httpx2.Timeout(None, connect=CONNECT, read=3 * HEARTBEAT_EVERY)
        async with self._open("GET", "/v1/events", "the events", query={"machine": name}, timeout=alive) as response:
            with self._told("the events", effect=False):
                async for line in response.aiter_lines():
                    value = json.loads(line)
                    if "error" in value:
                        raise from_wire(value["error"])
                    if value.get("kind") != HEARTBEAT:
                        yield load(Event, value)

    # instants: forks, snapshots, layers

    async def fork(self, name: str, *, count: int = 1, names: tuple[str, ...] = ()) -> builtins.list[ForkOutcome]:
        wanted = to_json({"count": count, "names": names})
        return load(list[ForkOutcome], await self._json("POST", _machine(name, "fork"), f"the fork of {name}", content=wanted))

    async def pause(self, name: str) -> Machine:
        return load(Machine, await self._json("POST", _machine(name, "pause"), f"the pause of {name}"))

    async def resume(self, name: str) -> Machine:
        return load(Machine, await self._json("POST", _machine(name, "resume"), f"the resumption of {name}"))

    async def hibernate(self, name: str, *, slim: bool = True) -> Machine:
        return load(Machine, await self._json("POST", _machine(name, "hibernate"), f"the hibernation of {name}", query={"slim": slim}))

    async def compact(self, name: str) -> int:
        return load(int, await self._json("POST", _machine(name, "compact"), f"the compaction of {name}"))

    async def snapshot(self, name: str, label: str = "", *, memory: bool = True, test: bool = True) -> Snapshot:
        wanted = to_json({"label": label, "memory": memory, "test": test})
        return load(Snapshot, await self._json("POST", _machine(name, "snapshots"), f"the snapshot of {name}", content=wanted))

    async def snapshots(self, name: str = "") -> builtins.list[Snapshot]:
        query = {"machine": name}
        return load(list[Snapshot], await self._json("GET", "/v1/snapshots", "the list of snapshots", query=query, timeout=_SHORT))

    async def get_snapshot(self, snapshot: str) -> Snapshot:
        return load(Snapshot, await self._json("GET", _snapshot(snapshot), snapshot, timeout=_SHORT))

    async def restore(self, name: str, snapshot: str = "") -> Machine:
        wanted = to_json({"snapshot": snapshot})
        return load(Machine, await self._json("POST", _machine(name, "restore"), f"the rewinding of {name}", content=wanted))

    async def create_from(self, snapshot: str, name: str, *, disk_only: bool = False) -> Machine:
        wanted = to_json({"name": name, "disk_only": disk_only})
        return load(Machine, await self._json("POST", _snapshot(snapshot, "machines"), f"the creation of {name}", content=wanted))

    async def template(self, snapshot: str, *, label: str = "", pool: int = 0) -> Snapshot:
        wanted = to_json({"label": label, "pool": pool})
        return load(Snapshot, await self._json("POST", _snapshot(snapshot, "template"), f"naming {snapshot}", content=wanted))

    async def delete_snapshot(self, snapshot: str, *, cascade: bool = False, dry_run: bool = False) -> builtins.list[str]:
        query = {"cascade": cascade, "dry_run": dry_run}
        return load(list[str], await self._json("DELETE", _snapshot(snapshot), f"the deletion of {snapshot}", query=query))

    async def tree(self) -> builtins.list[TreeNode]:
        return load(list[TreeNode], await self._json("GET", "/v1/tree", "the tree", timeout=_SHORT))

    async def layers(self) -> builtins.list[LayerInfo]:
        return load(list[LayerInfo], await self._json("GET", "/v1/layers", "the list of layers", timeout=_SHORT))

    async def get_layer(self, layer: str) -> LayerInfo:
        return load(LayerInfo, await self._json("GET", _layer(layer), layer, timeout=_SHORT))

    async def verify_layer(self, layer: str) -> builtins.list[str]:
        return load(list[str], await self._json("GET", _layer(layer, "verify"), f"the check of {layer}"))

    def export_layer(self, layer: str) -> AsyncIterator[bytes]:
        return self._bytes(_layer(layer, "export"), f"the export of {layer}")

    # registries, and what is kept

    async def push(self, snapshot: str, reference: str) -> Transfer:
        wanted = to_json({"reference": reference})
        return load(Transfer, await self._json("POST", _snapshot(snapshot, "push"), f"the push of {snapshot}", content=wanted))

    async def pull(self, reference: str, *, lazy: bool = False) -> Transfer:
        wanted = to_json({"reference": reference, "lazy": lazy})
        return load(Transfer, await self._json("POST", "/v1/pull", f"the pull of {reference}", content=wanted))

    async def convert(self, image: str, name: str = "") -> Snapshot:
        wanted = to_json({"image": image, "name": name})
        return load(Snapshot, await self._json("POST", "/v1/convert", f"the conversion of {image}", content=wanted))

    async def gc(self, *, budget: int | None = None, dry_run: bool = False) -> Collected:
        wanted = to_json({"budget": budget, "dry_run": dry_run})
        return load(Collected, await self._json("POST", "/v1/gc", "the collection", content=wanted))

    async def fsck(self, *, repair: bool = False) -> builtins.list[str]:
        return load(list[str], await self._json("POST", "/v1/fsck", "the check", content=to_json({"repair": repair})))

    def read_blob(self, digest: str, *, offset: int = 0, length: int = -1) -> AsyncIterator[bytes]:
        path = "/v1/blobs/" + quote(digest, safe=":")
        return self._bytes(path, f"reading {digest}", {"offset": offset, "length": length})

    # processes

    async def run(self, name: str, command: Command, stdin: bytes = b"") -> Result:
        what = _what(command)
        reply = await self._json("POST", _machine(name, "run"), what, content=to_json(RunRequest.of(command, stdin)))
        return load(RunReply, reply).result()

    def execute(self, name: str, command: Command) -> AsyncIterator[ProcessEvent]:
        return self._events("POST", _machine(name, "exec"), _what(command), to_json(command))

    def attach(self, name: str, process: int) -> AsyncIterator[ProcessEvent]:
        return self._events("GET", _machine(name, "processes", process, "output"), f"process {process}")

    async def processes(self, name: str) -> builtins.list[Process]:
        return load(list[Process], await self._json("GET", _machine(name, "processes"), "the list of processes", timeout=_SHORT))

    async def send_input(self, name: str, process: int, data: bytes, *, eof: bool = False) -> None:
        path = _machine(name, "processes", process, "stdin")
        await self._call("POST", path, "the input", query={"eof": eof}, content=data, kind=BYTES)

    async def signal(self, name: str, process: int, signal: int) -> None:
        await self._call("POST", _machine(name, "processes", process, "signal"), "the signal", content=to_json({"signal": signal}))

    async def resize(self, name: str, process: int, rows: int, columns: int) -> None:
        size = Size(rows=rows, columns=columns)
        await self._call("POST", _machine(name, "processes", process, "resize"), "the resize", content=to_json(size))

    async def forget(self, name: str, process: int) -> None:
        await self._call("DELETE", _machine(name, "processes", process), f"forgetting process {process}")

    # files

    def read_file(self, name: str, path: str, *, offset: int = 0, length: int = -1, user: str = "") -> AsyncIterator[bytes]:
        return self._bytes(_files(name), f"reading {path}", {"path": path, "offset": offset, "length": length, "user": user})

    async def write_file(
        self,
        name: str,
        path: str,
        data: AsyncIterable[bytes],
        *,
        mode: int = 0o644,
        offset: int = 0,
        flags: str = WRITE_FLAGS,
        user: str = "",
    ) -> None:
        query = {"path": path, "mode": f"{mode:o}", "offset": offset, "flags": flags, "user": user}
        await self._call("PUT", _files(name), f"writing {path}", query=query, content=data, kind=BYTES)

    async def stat_file(self, name: str, path: str, *, user: str = "") -> FileInfo:
        query = {"path": path, "user": user}
        return load(FileInfo, await self._json("GET", _files(name, "stat"), f"stat of {path}", query=query, timeout=_SHORT))

    async def list_files(self, name: str, path: str, *, user: str = "") -> builtins.list[FileInfo]:
        query = {"path": path, "user": user}
        return load(list[FileInfo], await self._json("GET", _files(name, "list"), f"the list of {path}", query=query, timeout=_SHORT))

    async def remove_file(self, name: str, path: str, *, recursive: bool = False, user: str = "") -> None:
        await self._call("DELETE", _files(name), f"removing {path}", query={"path": path, "recursive": recursive, "user": user})

    async def rename_file(self, name: str, path: str, target: str, *, user: str = "") -> None:
        query = {"path": path, "target": target, "user": user}
        await self._call("POST", _files(name, "rename"), f"renaming {path}", query=query)

    async def make_dir(self, name: str, path: str, *, mode: int = 0o755, parents: bool = True, user: str = "") -> None:
        query = {"path": path, "mode": f"{mode:o}", "parents": parents, "user": user}
        await self._call("POST", _files(name, "dir"), f"making {path}", query=query)

    def pack(self, name: str, path: str, *, user: str = "") -> AsyncIterator[bytes]:
        return self._bytes(_files(name, "tree"), f"reading {path}", {"path": path, "user": user})

    async def unpack(self, name: str, path: str, data: AsyncIterable[bytes], *, owners: bool = False, user: str = "") -> None:
        query = {"path": path, "owners": owners, "user": user}
        await self._call("PUT", _files(name, "tree"), f"writing {path}", query=query, content=data, kind=TAR)


def _local(url: str) -> bool:
    parts = urlsplit(url)
    return parts.scheme == "unix" or parts.hostname in ("localhost", "127.0.0.1", "::1")


def _machine(name: str, *more: str | int) -> str:
    if not name or "/" in name or name in (".", ".."):
        raise SpecError(f"{name!r} is not a machine's name", hint="`ramet list` shows the names.")
    return "/".join(["/v1/machines", quote(name, safe=""), *map(str, more)])


def _snapshot(name: str, *more: str) -> str:
    """The slashes of a name are sent encoded: as they are, a path of dots could be resolved on its way."""
    if not name or any(part in ("", ".", "..") for part in name.split("/")):
        raise SpecError(f"{name!r} is not a snapshot's name", hint="`ramet snapshots` shows the names.")
    return "/".join(["/v1/snapshots", quote(name, safe=""), *more])


def _layer(layer: str, *more: str) -> str:
    if not layer or "/" in layer or layer in (".", ".."):
        raise SpecError(f"{layer!r} is not a layer's id", hint="`ramet layer ls` shows the ids.")
    return "/".join(["/v1/layers", quote(layer, safe=""), *more])


def _files(name: str, *more: str) -> str:
    return _machine(name, "files", *more)


def _what(command: Command) -> str:
    return f"`{' '.join(command.argv)[:60]}`"


def _query(query: dict[str, Any] | None) -> str:
    """Bytes of file names that are not UTF-8 (surrogates) are sent as they are."""
    return "?" + urlencode({key: dump(_flag(value)) for key, value in query.items()}, errors="surrogateescape") if query else ""


def _flag(value: Any) -> Any:
    return ("1" if value else "0") if isinstance(value, bool) else value


def _not_ours() -> DaemonError:
    return DaemonError(
        "what answered is no Ramet daemon, or one of another version",
        hint="Check RAMET_URL, and compare `ramet --version` with `ramet info`.",
    )


def _refusal(status: int, body: bytes) -> RametError:
    """The error that a refused request was answered with."""
    try:
        return from_wire(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return DaemonError(
            f"the daemon answered with status {status} and no reason", hint="Is there a proxy between?", details={"status": status}
        )
