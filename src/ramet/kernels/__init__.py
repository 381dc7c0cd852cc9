"""Guest kernels: our own (built once on the host), Debian's as the stand-in, the initramfs and the command line they boot with."""

from __future__ import annotations

import os

from ramet.errors import HostError, SpecError
from ramet.kernels import debian, own
from ramet.kernels.cmdline import cmdline
from ramet.kernels.initramfs import FLOOR_LINE, floor_initramfs, initramfs
from ramet.kernels.own import BuildState, BuildStatus, build, build_status, start_background_build
from ramet.kernels.record import Kernel, KernelKind, clean, find

__all__ = [
    "FLOOR_LINE",
    "BuildState",
    "BuildStatus",
    "Kernel",
    "KernelKind",
    "build",
    "build_status",
    "clean",
    "cmdline",
    "current",
    "find",
    "floor_initramfs",
    "initramfs",
    "start_background_build",
]


async def current() -> Kernel:
    """The kernel that new machines boot: our own when it is ready, else Debian's, fetched when missing.

    RAMET_KERNEL=own|debian forces one. Raises HostError when that is not ready or cannot be fetched, SpecError for another value.
    """
    choice = os.environ.get("RAMET_KERNEL", "")
    if choice not in ("", *KernelKind):
        raise SpecError(f"RAMET_KERNEL is {choice!r}", hint=f"Unset it, or set it to {' or '.join(KernelKind)}.")
    kernel = own.newest() if choice != KernelKind.DEBIAN else None
    if kernel is None and choice == KernelKind.OWN:
        raise HostError("RAMET_KERNEL is own, but our own kernel is not built yet", hint="`python -m ramet.kernels build` builds it.")
    return kernel or await debian.ensure()
