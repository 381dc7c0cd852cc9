"""`ramet bench`: what the README promises, measured here and now, both sides of a ratio in the same run."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from ramet.bench import boot, density, disk, execute, figures, fork, giveback, hibernate, idle, imagefs, lazy
from ramet.bench.figures import Report
from ramet.errors import RametError

__all__ = ["BENCHES", "COULD_NOT_RUN", "main"]

COULD_NOT_RUN = 2
INTERRUPTED = 130  # 128 and SIGINT, as shells say it
BENCHES: dict[str, Callable[[argparse.Namespace], Coroutine[Any, Any, Report]]] = {
    "boot": boot.run,
    "exec": execute.run,
    "fork": fork.run,
    "hibernate": hibernate.run,
    "density": density.run,
    "disk": disk.run,
    "giveback": giveback.run,
    "idle": idle.run,
    "imagefs": imagefs.run,
    "lazy": lazy.run,
}


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="ramet bench",
        description="Measure, and compare with what is promised. Exit status: 0 all goals hold, 1 one does not, 2 it could not be measured.",
    )
    benches = parser.add_subparsers(dest="bench", required=True, metavar="BENCH")
    plain = argparse.ArgumentParser(add_help=False)
    plain.add_argument("--json", action="store_true", help="the figures as a JSON list; what they were measured on goes to stderr")
    common = argparse.ArgumentParser(add_help=False, parents=[plain])
    common.add_argument("--image", default="debian:bookworm", help="what the measured machine boots (default: %(default)s)")
    boot.options(
        benches.add_parser("boot", parents=[common], help="the first command answered after a cold boot, against the least possible")
    )
    execute.options(benches.add_parser("exec", parents=[common], help="commands and file copies in a running machine"))
    fork.options(
        benches.add_parser("fork", parents=[common], help="forks: the parent's pause, the child's first command, a pool, depth, leaks")
    )
    hibernate.options(benches.add_parser("hibernate", parents=[common], help="a machine saved to the disk, and back, against a fork"))
    density.options(
        benches.add_parser("density", parents=[common], help="the memory of forks, against that of machines booted each on its own")
    )
    giveback.options(
        benches.add_parser(
            "giveback", parents=[common], help="memory and disk that guests no longer need, back on the host; with a picture"
        )
    )
    idle.options(benches.add_parser("idle", parents=[common], help="what a machine costs that does nothing"))
    disk.options(benches.add_parser("disk", parents=[common], help="fio in a machine, against fio on the host's file system"))
    imagefs.options(
        benches.add_parser("imagefs", parents=[plain], help="a memory read through the image file system, against a copy from tmpfs")
    )
    lazy.options(
        benches.add_parser("lazy", parents=[common], help="what is in a registry, started before it is here, against fetching it first")
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    """Run a bench; returns the exit status."""
    arguments = _arguments(argv)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.raise_signal(signal.SIGINT))  # which asyncio.run takes for "clean up"
    try:
        report = asyncio.run(BENCHES[arguments.bench](arguments))
    except KeyboardInterrupt:
        return INTERRUPTED
    except (RametError, OSError) as error:
        hint = getattr(error, "hint", "")
        sys.stderr.write(f"error: could not measure: {getattr(error, 'message', error)}\n" + (f"hint: {hint}\n" if hint else ""))
        return COULD_NOT_RUN
    sys.stderr.write(report.header + "\n" if arguments.json else "")
    sys.stdout.write(figures.as_json(report) if arguments.json else figures.table(report))
    return report.status
