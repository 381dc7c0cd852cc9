"""`python -m ramet.kernels`: build (what start_background_build runs), check, status, fetch."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from pathlib import Path

from ramet.errors import RametError
from ramet.kernels import Kernel, build, build_status, config, debian


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _check(fragment: Path, configured: Path) -> int:
    """Name the fragment's lines that did not take effect."""
    dropped = config.dropped(fragment.read_text(), configured.read_text())
    for line in dropped:
        _say(line)
    return 1 if dropped else 0


async def _status() -> None:
    status = await build_status()
    _say(f"{status.state} {status.fraction:.0%} {status.message}".rstrip())


def _describe(kernel: Kernel) -> None:
    _say(f"{kernel.kind} {kernel.version} {kernel.digest[:16]} {kernel.image}")


async def _main(arguments: argparse.Namespace) -> int:
    # A signal cancels the build, so that make is ended and the work directory removed.
    task = asyncio.current_task()
    assert task is not None
    for sig in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(sig, task.cancel)
    if arguments.verb == "build":
        _describe(await build(lambda fraction: _say(f"ramet: {fraction:.0%}"), lock=arguments.lock_fd))
    elif arguments.verb == "fetch":
        _describe(await debian.fetch())
    else:
        await _status()
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="ramet.kernels")
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("build").add_argument("--lock-fd", type=int)
    verbs.add_parser("fetch")
    verbs.add_parser("status")
    check = verbs.add_parser("check")
    check.add_argument("fragment", type=Path)
    check.add_argument("config", type=Path)
    arguments = parser.parse_args()
    if arguments.verb == "check":
        return _check(arguments.fragment, arguments.config)
    try:
        return asyncio.run(_main(arguments))
    except asyncio.CancelledError:
        return 130
    except RametError as error:
        sys.stderr.write(f"{error.message}\n{error.hint}\n{error.details.get('log', '')}\n")
        return error.exit


if __name__ == "__main__":
    sys.exit(main())
