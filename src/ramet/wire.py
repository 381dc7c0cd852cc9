# NOTE TO THE LEAD: this file is a reconstruction. The API helper overwrote the original by accident (02:34) with a module of the same name
# and rebuilt it from mypy's cache of its interface, its users and PROTOCOL.md. If you have the original, put it back; nothing of the API imports this.
"""The agent's protocol as bytes: frames, parameters, records. Pure functions; see agent/PROTOCOL.md."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import IntEnum, IntFlag

from ramet.errors import GuestError
from ramet.model import FileInfo, FileType, Process

VERSION = 1
NONCE = 16  # bytes
MAX_FRAME = 32 << 10
HEADER = struct.Struct("<BBHII")
MAX_PAYLOAD = MAX_FRAME - HEADER.size
MAX_PARAMS = 256 << 10  # bytes of an OPEN's parameters together
WINDOW = 64 << 10  # bytes of credit that a new stream's channel starts with
RESYNC = bytes(MAX_FRAME + HEADER.size)  # ends whatever half a frame the agent is in

_PARAM = struct.Struct("<HHI")
_PAIR = struct.Struct("<II")
_END = struct.Struct("<B3xi")
_MAX_MESSAGE = 4096
_MORE = 1


class ProtocolError(GuestError):
    """The guest's agent sent what the protocol does not allow."""

    code = "protocol"


class Kind(IntEnum):
    SYNC = 1
    OPEN = 2
    DATA = 3
    EOF = 4
    CREDIT = 5
    CLOSE = 6
    STARTED = 7
    END = 8


class EndKind(IntEnum):
    EXITED = 0
    SIGNALED = 1
    FAILED = 2
    TIMEOUT = 3
    DETACHED = 4


class Op(IntEnum):
    PING = 1
    EXEC = 2
    ATTACH = 3
    LIST = 4
    SIGNAL = 5
    RESIZE = 6
    FORGET = 7
    METRICS = 8
    DIAL = 9
    POWEROFF = 10


class OpenFlag(IntFlag):
    PTY = 1
    DETACH = 2
    STDIN = 4
    BUILTIN = 8


class Tag(IntEnum):
    ARG = 1
    ENV = 2
    CWD = 3
    USER = 4
    TIMEOUT = 5
    ROWS = 6
    COLS = 7
    PROCESS = 8
    SIGNAL = 9
    NAME = 10
    HOST = 11
    PORT = 12
    GRACE = 13


@dataclass(frozen=True, slots=True)
class Frame:
    kind: Kind
    flags: int
    stream: int
    payload: bytes


@dataclass(frozen=True, slots=True)
class End:
    """How a stream ended. code: exit status, signal or errno, by kind."""

    kind: EndKind
    code: int
    message: str


@dataclass(frozen=True, slots=True)
class Eof:
    """Nothing more follows on the channel."""

    channel: int


# to the guest


def frame(kind: Kind, stream: int, payload: bytes = b"", flags: int = 0) -> bytes:
    return HEADER.pack(kind, flags, 0, stream, len(payload)) + payload


def credit(stream: int, channel: int, amount: int) -> bytes:
    return frame(Kind.CREDIT, stream, amount.to_bytes(4, "little"), channel)


def param(tag: Tag, value: bytes | str | int) -> bytes:
    """One parameter of OPEN; milliseconds are u64, other integers u32."""
    if isinstance(value, int):
        value = value.to_bytes(8 if tag in (Tag.TIMEOUT, Tag.GRACE) else 4, "little")
    elif isinstance(value, str):
        value = value.encode(errors="surrogateescape")
    return _PARAM.pack(tag, 0, len(value)) + value


def open_frames(stream: int, op: Op, flags: int, params: Iterable[bytes]) -> bytes:
    """An OPEN, in as many frames as it takes. GuestError when the parameters are too long."""
    body = struct.pack("<HH", op, flags) + b"".join(params)
    if len(body) > MAX_PARAMS:
        raise GuestError(
            f"the command's arguments and environment are {len(body)} bytes, more than {MAX_PARAMS}",
            hint="Send the data through stdin or a file.",
            details={"errno": "E2BIG"},
        )
    pieces = [body[at : at + MAX_PAYLOAD] for at in range(0, len(body), MAX_PAYLOAD)]
    return b"".join(frame(Kind.OPEN, stream, piece, _MORE if at + 1 < len(pieces) else 0) for at, piece in enumerate(pieces))


# from the guest


class Decoder:
    """Bytes from the port to frames. Everything before the SYNC with our nonce is ignored. Holds at most one frame and what one read brought."""

    def __init__(self, nonce: bytes) -> None:
        self._nonce = nonce
        self._mark = HEADER.pack(Kind.SYNC, 0, 0, 0, 0)[:8]  # a SYNC's header up to its length
        self._buffer = bytearray()
        self.synced = False

    def feed(self, data: bytes) -> Iterator[Frame]:
        """The frames that are complete with `data`. ProtocolError for what is none."""
        self._buffer += data
        if not self.synced:
            self._find_sync()
        while self.synced:
            padding = len(self._buffer) - len(self._buffer.lstrip(b"\0"))
            del self._buffer[:padding]
            if len(self._buffer) < HEADER.size:
                return
            kind, flags, zero, stream, length = HEADER.unpack_from(self._buffer)
            if zero or length > MAX_PAYLOAD or kind not in (Kind.SYNC, Kind.DATA, Kind.EOF, Kind.CREDIT, Kind.STARTED, Kind.END):
                raise ProtocolError("the guest's agent sent what is no frame")
            end = HEADER.size + length
            if len(self._buffer) < end:
                return
            payload = bytes(self._buffer[HEADER.size : end])
            del self._buffer[:end]
            yield Frame(Kind(kind), flags, stream, payload)

    def _find_sync(self) -> None:
        """Drop what precedes the answer to our SYNC; keep what may be its beginning."""
        at = self._buffer.find(self._nonce)
        while at >= 0:
            start = at - HEADER.size
            if start >= 0 and self._buffer[start : start + len(self._mark)] == self._mark:
                del self._buffer[:start]
                self.synced = True
                return
            at = self._buffer.find(self._nonce, at + 1)
        del self._buffer[: max(0, len(self._buffer) - HEADER.size - NONCE)]


def printable(data: bytes) -> str:
    """Text of the guest as it may be shown: no control characters, for terminals obey them."""
    return "".join(c if c.isprintable() or c == "\n" else "�" for c in data[:_MAX_MESSAGE].decode(errors="replace"))


def parse_sync(payload: bytes) -> tuple[bytes, str]:
    """Boot id and the agent's version. ProtocolError when it speaks another protocol."""
    if len(payload) < NONCE + 20:
        raise ProtocolError("the guest's agent sent a SYNC that is too short")
    spoken = int.from_bytes(payload[NONCE : NONCE + 4], "little")
    if spoken != VERSION:
        raise ProtocolError(f"the guest's agent speaks version {spoken} of the protocol, not {VERSION}")
    return payload[NONCE + 4 : NONCE + 20], printable(payload[NONCE + 20 :])


def parse_pair(payload: bytes) -> tuple[int, int]:
    """STARTED: process and pid."""
    if len(payload) != _PAIR.size:
        raise ProtocolError("the guest's agent sent a STARTED of a wrong length")
    first, second = _PAIR.unpack(payload)
    return first, second


def parse_credit(payload: bytes) -> int:
    if len(payload) != 4:
        raise ProtocolError("the guest's agent sent a CREDIT of a wrong length")
    return int.from_bytes(payload, "little")


def parse_end(payload: bytes) -> End:
    if len(payload) < _END.size or len(payload) > _END.size + _MAX_MESSAGE:
        raise ProtocolError("the guest's agent sent an END of a wrong length")
    kind, code = _END.unpack_from(payload)
    try:
        return End(EndKind(kind), code, printable(payload[_END.size :]))
    except ValueError:
        raise ProtocolError(f"the guest's agent sent an END of kind {kind}") from None


_TYPES = {
    "f": FileType.FILE,
    "d": FileType.DIRECTORY,
    "l": FileType.LINK,
    "c": FileType.CHARACTER,
    "b": FileType.BLOCK,
    "p": FileType.FIFO,
    "s": FileType.SOCKET,
}


def _records(data: bytes) -> Iterator[tuple[list[str], str]]:
    """`seven fields and a name\\0text\\0` each: the eight, and the text."""
    parts = data.split(b"\0")
    if parts.pop() or len(parts) % 2:
        raise ProtocolError("the guest's agent sent records that are cut off")
    for head, text in zip(parts[::2], parts[1::2], strict=True):
        fields = head.decode(errors="surrogateescape").split(" ", 7)
        if len(fields) != 8:
            raise ProtocolError("the guest's agent sent a record with too few fields")
        yield fields, text.decode(errors="surrogateescape")


def parse_processes(data: bytes) -> list[Process]:
    try:
        return [
            Process(
                id=int(number),
                pid=int(pid),
                state=printable(state.encode(errors="surrogateescape")),
                code=int(code),
                started_at=int(started) / 1000,
                detached=detached == "1",
                attached=attached == "1",
                label=label,
                command=command,
            )
            for (number, pid, state, code, started, detached, attached, label), command in _records(data)
        ]
    except ValueError:
        raise ProtocolError("the guest's agent sent a process that is none") from None


def parse_files(data: bytes) -> list[FileInfo]:
    try:
        return [
            FileInfo(
                name=name,
                type=_TYPES[kind],
                mode=int(mode, 8),
                uid=int(uid),
                gid=int(gid),
                size=int(size),
                modified_at=int(modified) / 1e9,
                links=int(links),
                target=target,
            )
            for (kind, mode, uid, gid, size, modified, links, name), target in _records(data)
        ]
    except (KeyError, ValueError):
        raise ProtocolError("the guest's agent sent a file that is none") from None


def parse_metrics(data: bytes) -> dict[str, float]:
    try:
        return {name.decode("ascii"): float(value) for name, value in (line.split(b" ", 1) for line in data.splitlines())}
    except ValueError:
        raise ProtocolError("the guest's agent sent a metric that is none") from None
