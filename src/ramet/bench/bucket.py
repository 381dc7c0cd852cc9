"""`python -P -m ramet.bench.bucket HOST:PORT SECONDS`: a line to a TCP server that is as fast as it is told to be, where the kernel's `tc` is not to be had,
and as far away as a question and its answer take so many seconds more.

Prints the port that it listens on. Then a line of stdin is a question, and a line of stdout its answer: `rate N` (bits a second each way; 0: any), `received`
(bytes that came from the server so far).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import Sequence

_BURST = 0.01  # seconds of silence that are made up for
_PIECE = 64 << 10
_FLYING = 1024  # pieces that are on their way at most


class Bucket:
    """Pure. Times are seconds of any clock. rate: bits a second; 0 for no limit."""

    def __init__(self) -> None:
        self.rate = 0
        self._free = 0.0  # when all that went so far has gone

    def delay(self, size: int, now: float) -> float:
        """Seconds until so many bytes more have gone; they count as gone."""
        if not self.rate:
            return 0.0
        self._free = max(self._free, now - _BURST) + size * 8 / self.rate
        return max(0.0, self._free - now)


class Line:
    """received: bytes that came from the server so far. latency: seconds that they are on their way."""

    def __init__(self, host: str, port: int, latency: float = 0.0) -> None:
        self.received = 0
        self.latency = latency
        self._place = (host, port)
        self._up, self._down = Bucket(), Bucket()

    def limit(self, rate: int) -> None:
        self._up.rate = self._down.rate = rate

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, to its end."""
        try:
            back, forth = await asyncio.open_connection(*self._place)
            try:
                await asyncio.gather(self._pump(reader, forth, self._up), self._pump(back, writer, self._down))
            finally:
                forth.transport.abort()
        except OSError:
            pass  # either end broke it: so does the other now
        finally:
            writer.transport.abort()

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, bucket: Bucket) -> None:
        loop = asyncio.get_running_loop()
        flying: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_FLYING)

        async def land() -> None:
            while True:
                due, data = await flying.get()
                if (left := due - loop.time()) > 0:
                    await asyncio.sleep(left)
                if not data:
                    return sink.write_eof()
                sink.write(data)
                await sink.drain()

        landing = asyncio.ensure_future(land())
        try:
            data = b"."
            while data:
                data = await source.read(_PIECE)
                if (delay := bucket.delay(len(data), loop.time())) > 0:
                    await asyncio.sleep(delay)
                self.received += len(data) if bucket is self._down else 0
                await flying.put((loop.time() + (self.latency if bucket is self._down else 0.0), data))
            await landing
        finally:
            landing.cancel()


async def _serve(host: str, port: int, latency: float) -> None:
    line = Line(host, port, latency)
    server = await asyncio.start_server(line.carry, "127.0.0.1", 0)
    questions = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(questions), sys.stdin)
    async with server:
        _say(server.sockets[0].getsockname()[1])
        while question := await questions.readline():
            word, *numbers = question.decode().split()
            if word == "rate":
                line.limit(int(numbers[0]))
            _say(line.received)


def _say(number: int) -> None:
    os.write(sys.stdout.fileno(), f"{number}\n".encode())


def main(argv: Sequence[str]) -> int:
    host, _, port = argv[0].rpartition(":")
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_serve(host, int(port), float(argv[1])))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
