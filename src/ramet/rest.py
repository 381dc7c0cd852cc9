"""What the API's two ends must agree on, apart from the model's records: the process stream's frames, and `run`'s request and reply.

A process stream is Docker's multiplexed stream (https://docs.docker.com/reference/api/engine/#tag/Container/operation/ContainerAttach):
a byte that says what follows, three zero bytes, a big-endian u32 length, the payload. Docker's 1 (stdout) and 2 (stderr) mean what they do
there; 0, 3 and 4 are ours and carry JSON.
Files and trees travel in the same frames, as stdout, when the client's Accept asks for them: only so can an error be told after the response began.
"""

from __future__ import annotations

import base64
import binascii
import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, fields
from enum import IntEnum, StrEnum
from typing import Any

from ramet.errors import DaemonError, RametError, SpecError, from_wire
from ramet.model import Channel, Command, Ending, Exit, Output, ProcessEvent, Result, Started, strict
from ramet.records import dump, load

STREAM = "application/vnd.docker.multiplexed-stream"
TAR = "application/x-tar"
BYTES = "application/octet-stream"
LINES = "application/x-ndjson"

FRAME_LIMIT = 1 << 20  # bytes of one frame's payload: what an end must be ready to hold
HEARTBEAT = "heartbeat"  # the kind of the event that only says that the peer lives
HEARTBEAT_EVERY = 15.0  # seconds
PIECE = 256 << 10  # bytes of one request to a process's stdin

_HEADER = struct.Struct(">B3xI")


class Kind(IntEnum):
    """What a frame carries."""

    STARTED = 0
    STDOUT = 1
    STDERR = 2
    EXIT = 3
    ERROR = 4


def frame(kind: Kind, payload: bytes) -> bytes:
    """One frame, or several where the payload is above the limit."""
    if len(payload) <= FRAME_LIMIT:
        return _HEADER.pack(kind, len(payload)) + payload
    return b"".join(frame(kind, payload[at : at + FRAME_LIMIT]) for at in range(0, len(payload), FRAME_LIMIT))


def to_json(value: Any) -> bytes:
    """Compact JSON of a record. ASCII, so that file names that are not UTF-8 (surrogates) pass."""
    return json.dumps(dump(value), separators=(",", ":")).encode()


def encode(event: ProcessEvent) -> bytes:
    match event:
        case Output(channel=channel, data=data):
            return frame(Kind.STDOUT if channel is Channel.STDOUT else Kind.STDERR, data)
        case Started():
            return frame(Kind.STARTED, to_json(event))
        case Exit():
            return frame(Kind.EXIT, to_json(event))


def encode_error(error: RametError) -> bytes:
    return frame(Kind.ERROR, to_json(error.wire()))


class Decoder:
    """Bytes as they come to whole frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[tuple[Kind, bytes]]:
        """The frames that are complete with `data`. DaemonError for what is no frame; an ERROR frame is raised as the error it carries."""
        self._buffer += data
        while len(self._buffer) >= _HEADER.size:
            number, length = _HEADER.unpack_from(self._buffer)
            if number > max(Kind) or length > FRAME_LIMIT:
                raise DaemonError(
                    "the daemon's stream is not understood", hint="Is a proxy between this client and the daemon, or is one of them older?"
                )
            end = _HEADER.size + length
            if len(self._buffer) < end:
                return
            payload = bytes(self._buffer[_HEADER.size : end])
            del self._buffer[:end]
            if number == Kind.ERROR:
                raise from_wire(json.loads(payload))
            yield Kind(number), payload


def decode(kind: Kind, payload: bytes) -> ProcessEvent:
    """The event that a frame stands for."""
    match kind:
        case Kind.STARTED:
            return load(Started, json.loads(payload), "started")
        case Kind.EXIT:
            return load(Exit, json.loads(payload), "exit")
        case Kind.STDOUT:
            return Output(channel=Channel.STDOUT, data=payload)
        case Kind.STDERR:
            return Output(channel=Channel.STDERR, data=payload)
        case Kind.ERROR:
            raise from_wire(json.loads(payload))


class Encoding(StrEnum):
    """How bytes stand in JSON: as text where they are UTF-8, else in base64."""

    UTF8 = "utf-8"
    BASE64 = "base64"


def pack_bytes(*values: bytes) -> tuple[Encoding, list[str]]:
    try:
        return Encoding.UTF8, [value.decode() for value in values]
    except UnicodeDecodeError:
        return Encoding.BASE64, [base64.b64encode(value).decode() for value in values]


def unpack_bytes(encoding: Encoding, value: str) -> bytes:
    if encoding is Encoding.UTF8:
        return value.encode(errors="surrogateescape")
    try:
        return base64.b64decode(value, validate=True)
    except binascii.Error as error:
        raise SpecError(f"the base64 text is not valid: {error}") from error


@strict
@dataclass(frozen=True, kw_only=True)
class RunRequest(Command):
    """A command and all of its stdin. input: text, or base64 as `encoding` says."""

    input: str = ""
    encoding: Encoding = Encoding.UTF8

    @classmethod
    def of(cls, command: Command, stdin: bytes) -> RunRequest:
        encoding, (text,) = pack_bytes(stdin)
        return cls(**{f.name: getattr(command, f.name) for f in fields(Command)}, input=text, encoding=encoding)

    def split(self) -> tuple[Command, bytes]:
        """The command and its stdin. SpecError for base64 that is none."""
        return Command(**{f.name: getattr(self, f.name) for f in fields(Command)}), unpack_bytes(self.encoding, self.input)


@dataclass(frozen=True, kw_only=True)
class RunReply:
    """A finished command. stdout, stderr: text where both are valid UTF-8, else base64, as `encoding` says. status: as a shell reports it."""

    ending: Ending
    code: int
    status: int
    encoding: Encoding
    stdout: str
    stderr: str
    duration: float
    truncated: int = 0

    @classmethod
    def of(cls, result: Result) -> RunReply:
        encoding, (stdout, stderr) = pack_bytes(result.stdout, result.stderr)
        return cls(
            ending=result.ending,
            code=result.code,
            status=result.status,
            encoding=encoding,
            stdout=stdout,
            stderr=stderr,
            duration=result.duration,
            truncated=result.truncated,
        )

    def result(self) -> Result:
        return Result(
            ending=self.ending,
            code=self.code,
            status=self.status,
            stdout=unpack_bytes(self.encoding, self.stdout),
            stderr=unpack_bytes(self.encoding, self.stderr),
            duration=self.duration,
            truncated=self.truncated,
        )
