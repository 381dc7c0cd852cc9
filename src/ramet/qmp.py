"""QMP, QEMU's control protocol, by QEMU's own library; its errors become ours."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qemu.qmp import EventListener, QMPClient
from qemu.qmp.error import QMPError
from qemu.qmp.message import Message
from qemu.qmp.qmp_client import ExecuteError

from ramet import sockets
from ramet.errors import MachineFailedError

logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)  # it logs each broken connection as an error; ours say what that means

DEADLINE = 30.0  # seconds for one command; none that we send does slow work


class Qmp:
    """A connection to one QEMU. events: the ones asked for by `on_event`, as they come."""

    def __init__(self, client: QMPClient) -> None:
        self._client = client

    @classmethod
    async def connect(cls, path: Path, *, deadline: float, on_event: Callable[[str, dict[str, Any]], None]) -> Qmp:
        """Connect to QEMU's monitor at `path` and wait for its greeting. MachineFailedError when QEMU is gone or silent."""
        client = QMPClient("ramet")

        def accept(message: Message) -> bool:
            on_event(str(message["event"]), dict(message.get("data", {})))  # type: ignore[call-overload]
            return False  # seen; nothing is queued

        client.register_listener(EventListener(event_filter=accept))
        try:
            with sockets.address(path) as short:
                await asyncio.wait_for(client.connect(short), deadline)
        except (QMPError, OSError, EOFError, TimeoutError) as error:
            with contextlib.suppress(Exception):
                await client.disconnect()
            raise MachineFailedError(f"QEMU's monitor does not answer: {error or type(error).__name__}") from error
        return cls(client)

    async def __call__(self, command: str, **arguments: Any) -> Any:
        """Execute a command and return what it returns."""
        try:
            return await asyncio.wait_for(self._client.execute(command, arguments), DEADLINE)
        except ExecuteError as error:
            raise MachineFailedError(f"QEMU refused {command}: {error}") from error
        except (QMPError, OSError, EOFError, TimeoutError) as error:
            raise MachineFailedError(f"QEMU's monitor broke off at {command}: {error or type(error).__name__}") from error

    async def send_file(self, name: str, fd: int) -> None:
        """Give QEMU an open file, which commands then know as `name`."""
        self._client.send_fd_scm(fd)
        await self("getfd", fdname=name)

    async def close(self) -> None:
        with contextlib.suppress(Exception):
            await asyncio.wait_for(self._client.disconnect(), 5)
