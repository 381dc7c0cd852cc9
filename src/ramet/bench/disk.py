"""A machine's disk, measured by fio in the guest, beside the host's file system measured by the same fio in the same run."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import tarfile
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ramet import process
from ramet.bench import bed, members
from ramet.bench.bed import Bed
from ramet.bench.figures import Figure, Report
from ramet.errors import GuestError, HostError
from ramet.model import Command

_NAME = "bench-disk"
_PLACE = "/opt/ramet-bench"
_ALL = ("threads", "io_uring", "threads,direct", "native,direct", "io_uring,direct")  # what RAMET_DISK_IO may say
_MIB = 1 << 20
_PIECE = 1 << 20
_DEADLINE = 600.0  # seconds for fio, on an emulated cpu of a busy host


@dataclass(frozen=True, kw_only=True)
class Job:
    """What fio does. figure, unit: of what is read from its report, by the direction's name in it."""

    name: str
    figure: str
    unit: str
    direction: str
    options: tuple[str, ...]

    def value(self, report: dict[str, dict[str, float]]) -> float:
        found = report[self.direction]
        return found["bw_bytes"] / _MIB if self.unit == "MiB/s" else found["iops"]


JOBS = (
    Job(name="fill", figure="written in a row, 1 MiB each", unit="MiB/s", direction="write", options=("rw=write", "bs=1M", "end_fsync=1")),
    Job(name="again", figure="written over, 1 MiB each", unit="MiB/s", direction="write", options=("rw=write", "bs=1M", "end_fsync=1")),
    Job(name="read", figure="read in a row, 1 MiB each", unit="MiB/s", direction="read", options=("rw=read", "bs=1M")),
    Job(name="reads", figure="read here and there, 4 KiB each, 16 at once", unit="1/s", direction="read", options=("rw=randread", "bs=4k", "iodepth=16")),
    Job(name="writes", figure="written here and there, 4 KiB each, 16 at once", unit="1/s", direction="write", options=("rw=randwrite", "bs=4k", "iodepth=16")),
    Job(name="sync", figure="written and flushed, 4 KiB each", unit="1/s", direction="write", options=("rw=randwrite", "bs=4k", "fsync=1")),
)  # fmt: skip


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=float, default=5.0, help="for each job on each side (default: %(default)s)")
    parser.add_argument("--mebibytes", type=int, default=256, help="of the file (default: %(default)s)")
    parser.add_argument("--all", action="store_true", help="also the other ways of reading and writing that QEMU has")


def jobs(file: str, mebibytes: int, seconds: float, *, direct: bool) -> str:
    """fio's job file: one after the other on one file. The first writes all of it, however long that takes."""
    common = ("ioengine=libaio", f"filename={file}", f"size={mebibytes}m", f"direct={int(direct)}", "thread", "stonewall", "invalidate=1")
    timed = ("time_based", f"runtime={seconds:g}")
    return "".join("\n".join((f"[{job.name}]", *common, *job.options, *(() if job.name == "fill" else timed), "")) for job in JOBS)


def measured(output: str) -> dict[str, float]:
    """Each job's value, from fio's JSON."""
    report = {each["jobname"]: each for each in json.loads(output[output.index("{") :])["jobs"]}
    return {job.name: job.value(report[job.name]) for job in JOBS}


async def closure() -> dict[str, Path]:
    """fio and all that it loads, by the name that the loader asks for. HostError when there is no fio."""
    fio = process.find("fio")
    if not fio:
        raise HostError("fio is not installed", hint="`sudo apt-get install fio`: this bench runs it on both sides.")
    found = {"fio": Path(fio)}
    for line in (await process.output(["ldd", fio], deadline=60, what="asking what fio needs")).splitlines():
        words = [word for word in line.split() if word.startswith("/")]
        if words:
            found[Path(words[0]).name] = Path(words[0])
    return found


def _pack(files: dict[str, Path], out: IO[bytes]) -> None:
    with tarfile.open(fileobj=out, mode="w", dereference=True) as tar:
        for name, path in files.items():
            tar.add(path, arcname=name)
    out.seek(0)


async def _pieces(file: IO[bytes]) -> AsyncIterator[bytes]:
    while piece := await asyncio.to_thread(file.read, _PIECE):
        yield piece


@contextlib.contextmanager
def _told(setting: str) -> Iterator[None]:
    """Engines that are opened in the body use disks so; empty: as they choose."""
    old = os.environ.pop("RAMET_DISK_IO", None)
    if setting:
        os.environ["RAMET_DISK_IO"] = setting
    try:
        yield
    finally:
        os.environ.pop("RAMET_DISK_IO", None)
        if old is not None:
            os.environ["RAMET_DISK_IO"] = old


async def _inside(found: Bed, arguments: argparse.Namespace, packed: IO[bytes]) -> dict[str, float]:
    """In the guest, past its own page cache: what is measured is the way to the host's file."""
    await found.engine.create(bed.spec(_NAME, arguments.image))
    try:
        packed.seek(0)
        await members.shell(found.engine, _NAME, f"mkdir -p {_PLACE}")
        await found.engine.unpack(_NAME, _PLACE, _pieces(packed))
        text = jobs(f"{_PLACE}/data", arguments.mebibytes, arguments.seconds, direct=True)
        loader = f"{_PLACE}/ld-linux-x86-64.so.2"
        words = (loader, "--library-path", _PLACE, f"{_PLACE}/fio", "--output-format=json", "-")
        result = await found.engine.run(_NAME, Command(argv=words, user="root", timeout=_DEADLINE), text.encode())
        if result.status:
            raise GuestError(f"fio ended with status {result.status} in the guest: {result.stderr.decode(errors='replace').strip()[-300:]}")
        return measured(result.text)
    finally:
        await found.engine.delete(_NAME)


async def _outside(found: Bed, arguments: argparse.Namespace, *, direct: bool) -> dict[str, float]:
    """On the host, in a file beside the machines'. direct: past the page cache, where the machine's disk is, too."""
    file = found.state.machines / ".bench-fio"
    try:
        text = jobs(str(file), arguments.mebibytes, arguments.seconds, direct=direct)
        finished = await process.run(["fio", "--output-format=json", "-"], deadline=_DEADLINE, input=text.encode(), apart=True)
        return measured(finished.check("fio").output)
    finally:
        file.unlink(missing_ok=True)


async def run(arguments: argparse.Namespace) -> Report:
    figures: list[Figure] = []
    used = ""
    with tempfile.TemporaryFile() as packed:
        await asyncio.to_thread(_pack, await closure(), packed)
        async with bed.place() as state:
            for setting in ("", *_ALL) if arguments.all else ("",):
                with _told(setting):
                    async with bed.opened(state) as found:
                        io = found.boot.disk_io
                        if setting == (used or str(io)):
                            continue  # measured already, as what is chosen here
                        used, header = used or str(io), found.header
                        others = bed.Others(())
                        outside = await _outside(found, arguments, direct=io.direct)
                        figures += _figures(str(io), await _inside(found, arguments, packed), outside)
                        share = others.share()
    notes = [
        f"Machines here use {used}. fio in the guest goes past the guest's page cache (direct=1); fio on the host goes through the page cache, as QEMU does, "
        "except where the setting says direct. Each ratio is of two runs on one host, one after the other.",
    ]
    return Report(header=header, figures=tuple(figures), notes=tuple(filter(None, [*notes, "" if arguments.all else bed.idleness(share)])))


def _figures(setting: str, inside: dict[str, float], outside: dict[str, float]) -> list[Figure]:
    made = []
    for job in JOBS:
        made.append(Figure(figure=f"{setting}: {job.figure}", value=inside[job.name], unit=job.unit))
        made.append(
            Figure(
                figure=f"{setting}: as a share of the host's {outside[job.name]:.0f}", value=inside[job.name] / outside[job.name], unit="x"
            )
        )
    return made
