"""The agent's protocol as bytes, pure: frames, parameters, records. agent/PROTOCOL.md is the text.

A guest is hostile, so everything read here is checked.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import IntEnum, IntFlag

from ramet.errors import GuestError
from ramet.model import FileInfo, FileType, Process

VERSION = 2
HEADER = struct.Struct("<BBHII")
MAX_PAYLOAD = 32756
MAX_FRAME = HEADER.size + MAX_PAYLOAD
WINDOW = 65536  # bytes of credit that each channel of a new stream begins with
NONCE = 16
RESYNC = bytes(MAX_FRAME + HEADER.size)
MAX_PARAMS = 256 << 10
HOOKS = "/etc/ramet/fork.d"  # in the guest: programs that are run in each copy of a machine
_MAX_MESSAGE = 4096
_PARAM = struct.Struct("<HHI")
_END = struct.Struct("<B3xi")
_PAIR = struct.Struct("<II")


class ProtocolError(GuestError):
    """The agent said something that the protocol does not allow."""

    code = "guest_protocol"


class Kind(IntEnum):
    SYNC = 1
    OPEN = 2
    DATA = 3
    EOF = 4
    CREDIT = 5
    CLOSE = 6
    STARTED = 7
    END = 8


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
    QUIESCE = 11
    RESUME = 12
    IDENTIFY = 13


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
    TIME = 14
    ENTROPY = 15
    HOSTNAME = 16
    MACHINE_ID = 17
    GENERATION = 18


class EndKind(IntEnum):
    EXITED = 0
    SIGNALED = 1
    FAILED = 2
    TIMEOUT = 3
    DETACHED = 4


@dataclass(frozen=True, slots=True)
class Frame:
    kind: Kind
    flags: int
    stream: int
    payload: bytes


@dataclass(frozen=True, slots=True)
class Eof:
    """Nothing more follows on a channel."""

    channel: int


@dataclass(frozen=True, slots=True)
class End:
    kind: EndKind
    code: int
    message: str


def frame(kind: Kind, stream: int, payload: bytes = b"", flags: int = 0) -> bytes:
    """One frame; payload at most MAX_PAYLOAD bytes."""
    assert len(payload) <= MAX_PAYLOAD
    return HEADER.pack(kind, flags, 0, stream, len(payload)) + payload


def credit(stream: int, channel: int, amount: int) -> bytes:
    return frame(Kind.CREDIT, stream, struct.pack("<I", amount), channel)


def param(tag: Tag, value: bytes | str | int) -> bytes:
    """One parameter of OPEN; integers as u32, or u64 for the times."""
    if isinstance(value, int):
        value = struct.pack("<Q" if tag in (Tag.TIMEOUT, Tag.GRACE, Tag.TIME) else "<I", value)
    elif isinstance(value, str):
        value = value.encode(errors="surrogateescape")
    return _PARAM.pack(tag, 0, len(value)) + value


def open_frames(stream: int, op: Op, flags: int, params: Iterable[bytes]) -> bytes:
    """OPEN, cut into as many frames as its parameters need. GuestError when they are more than the agent takes."""
    body = struct.pack("<HH", op, flags) + b"".join(params)
    if len(body) - 4 > MAX_PARAMS:
        raise GuestError(
            f"the command is too long: {len(body)} bytes of arguments and environment, at most {MAX_PARAMS}",
            hint="Write it to a file in the machine first, and run that.",
        )
    pieces = [body[i : i + MAX_PAYLOAD] for i in range(0, len(body), MAX_PAYLOAD)]
    return b"".join(frame(Kind.OPEN, stream, piece, flags=int(i < len(pieces) - 1)) for i, piece in enumerate(pieces))


class Decoder:
    """Bytes from the agent to frames. Before the answer to our SYNC everything is skipped; afterwards anything odd is a ProtocolError.

    It holds at most one frame and what the last read brought.
    """

    def __init__(self, nonce: bytes) -> None:
        self._nonce = nonce
        self._buffer = bytearray()
        self.synced = False

    def feed(self, data: bytes) -> Iterator[Frame]:
        self._buffer += data
        if not self.synced and not self._find_sync():
            return
        at = 0
        try:
            while True:
                while at < len(self._buffer) and self._buffer[at] == 0:
                    at += 1
                if len(self._buffer) - at < HEADER.size:
                    return
                kind, flags, zero, stream, length = HEADER.unpack_from(self._buffer, at)
                if not Kind.SYNC <= kind <= Kind.END or zero or length > MAX_PAYLOAD:
                    raise ProtocolError(f"the guest's agent sent an invalid frame header: type {kind}, length {length}")
                if len(self._buffer) - at < HEADER.size + length:
                    return
                start = at + HEADER.size
                at = start + length
                yield Frame(Kind(kind), flags, stream, bytes(self._buffer[start:at]))
        finally:
            del self._buffer[:at]

    def _find_sync(self) -> bool:
        """Drop everything before the SYNC frame that carries our nonce; False when it has not come yet."""
        at = self._buffer.find(self._nonce)
        if at < 0:
            keep = HEADER.size + NONCE  # the answer may be cut in two anywhere
            del self._buffer[: max(0, len(self._buffer) - keep)]
            return False
        if at < HEADER.size or self._buffer[at - HEADER.size : at - 4] != HEADER.pack(Kind.SYNC, 0, 0, 0, 0)[:-4]:
            raise ProtocolError("the guest's agent answered SYNC with something else")
        del self._buffer[: at - HEADER.size]
        self.synced = True
        return True


def parse_sync(payload: bytes) -> tuple[bytes, str]:
    """Boot id and agent version of a SYNC answer."""
    if len(payload) < NONCE + 4 + 16 or len(payload) > 256:
        raise ProtocolError("the guest's agent answered SYNC with a wrong length")
    (version,) = struct.unpack_from("<I", payload, NONCE)
    if version != VERSION:
        raise ProtocolError(
            f"the guest's agent speaks protocol {version}, not {VERSION}",
            hint="Stop and start the machine, so that it boots the agent of this Ramet.",
        )
    return payload[NONCE + 4 : NONCE + 20], printable(payload[NONCE + 20 :])


def parse_end(payload: bytes) -> End:
    if not _END.size <= len(payload) <= _END.size + _MAX_MESSAGE:
        raise ProtocolError("the guest's agent sent an END of a wrong length")
    kind, code = _END.unpack_from(payload)
    if kind > EndKind.DETACHED:
        raise ProtocolError(f"the guest's agent sent an END of the unknown kind {kind}")
    return End(EndKind(kind), code, printable(payload[_END.size :]))


def parse_pair(payload: bytes) -> tuple[int, int]:
    """Two u32: STARTED."""
    if len(payload) != _PAIR.size:
        raise ProtocolError("the guest's agent sent a STARTED of a wrong length")
    first, second = _PAIR.unpack(payload)
    return first, second


def parse_credit(payload: bytes) -> int:
    if len(payload) != 4:
        raise ProtocolError("the guest's agent sent a CREDIT of a wrong length")
    return int.from_bytes(payload, "little")


def printable(data: bytes) -> str:
    """Guest text for people: no control characters that could drive their terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in data.decode(errors="replace"))


_HOOK = re.compile(rf"(\d{{1,5}}) ([^\n]*): {re.escape(HOOKS)}/([^\n]*)\n\Z")


def parse_hook(stderr: bytes) -> tuple[str, str, str]:
    """What a failed `hooks` says at its end: the hook's name, what happened to it, and the text before that."""
    text = printable(stderr)
    found = _HOOK.search(text)
    if not found:
        raise ProtocolError("the guest's agent does not say which hook failed")
    return found[3], found[2], text[: found.start()]


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
    """Records `f1 … f8\\0second\\0`, as ([f1 … f8], second); only f8 may hold spaces."""
    parts = data.split(b"\0")
    if parts.pop() or len(parts) % 2:
        raise ProtocolError("the guest's agent sent an unfinished record")
    for head, second in zip(parts[::2], parts[1::2], strict=True):
        yield head.decode(errors="surrogateescape").split(" ", 7), second.decode(errors="surrogateescape")


def parse_files(data: bytes) -> list[FileInfo]:
    """Records of `stat` and `list`."""
    found = []
    for fields, target in _records(data):
        try:
            kind, mode, uid, gid, size, modified, links, name = fields
            found.append(
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
            )
        except (ValueError, KeyError, OverflowError) as error:
            raise ProtocolError("the guest's agent sent a file record that is not one") from error
    return found


def parse_processes(data: bytes) -> list[Process]:
    """Records of LIST."""
    found = []
    for fields, command in _records(data):
        try:
            number, pid, state, code, started, detached, attached, label = fields
            if state not in ("running", "exited", "signaled", "timeout"):
                raise ValueError(state)
            found.append(
                Process(
                    id=int(number),
                    pid=int(pid),
                    state=state,
                    code=int(code),
                    started_at=int(started) / 1000,
                    detached=detached == "1",
                    attached=attached == "1",
                    label=printable(label.encode(errors="surrogateescape")),
                    command=printable(command.encode(errors="surrogateescape")),
                )
            )
        except (ValueError, OverflowError) as error:
            raise ProtocolError("the guest's agent sent a process record that is not one") from error
    return found


def parse_metrics(data: bytes) -> dict[str, float]:
    """Lines `name value` of METRICS."""
    found: dict[str, float] = {}
    for line in data.decode(errors="replace").splitlines()[:256]:
        name, _, value = line.partition(" ")
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise ProtocolError("the guest's agent sent a metric that is not a number")
        found[printable(name.encode())] = number
    return found
