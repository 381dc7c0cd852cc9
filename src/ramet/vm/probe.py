"""Whether KVM and io_uring work here: found out by using them, for a device node proves nothing (a paravirtual /dev/kvm opens, and hangs real kernels)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from ramet import kernels, process
from ramet.errors import HostError, RametError
from ramet.kernels import Kernel
from ramet.model import Accelerator
from ramet.vm import argv

DEVICE = Path("/dev/kvm")
DEADLINE = 8.0  # seconds; with KVM the floor prints its line in well under one
_FORCED = "RAMET_ACCEL"
_MEMORY = 256 << 20
_PAGE = 4096
_WHOLE = f"read {_PAGE}/{_PAGE} bytes"  # what QEMU's own tester says when the page that it wrote was read back


@dataclass(frozen=True, kw_only=True)
class Probe:
    """The accelerator to use, and why; uring: why io_uring cannot be used, empty when it can; key: what the answer holds for."""

    accelerator: Accelerator
    reason: str
    uring: str
    key: str


def _key(kernel: Kernel, qemu: str) -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {kernel.digest} {qemu} {os.geteuid()} {os.environ.get(_FORCED, '')}".rstrip()


async def probe(cache: Path, kernel: Kernel, qemu: str) -> Probe:
    """What `kernel` can use on this host. Probed once for each boot of the host, kernel, QEMU version and RAMET_ACCEL; `cache` keeps the answer."""
    key = _key(kernel, qemu)
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        found = json.loads(cache.read_text())
        if found["key"] == key:
            return Probe(accelerator=Accelerator(found["accelerator"]), reason=found["reason"], uring=str(found["uring"]), key=key)
    uring = await why_no_uring(cache.parent)
    if forced := os.environ.get(_FORCED):
        if forced not in list(Accelerator):
            raise HostError(
                f"{_FORCED} is {forced!r}", hint=f"Set it to {' or '.join(Accelerator)}, or unset it (what works is found out)."
            )
        accelerator, reason = Accelerator(forced), f"{_FORCED} says so"
    elif reason := await _why_not(kernel):
        accelerator = Accelerator.TCG
    else:
        accelerator, reason = Accelerator.KVM, "a guest booted with it"
    result = Probe(accelerator=accelerator, reason=reason, uring=uring, key=key)
    temporary = cache.with_suffix(".new")
    temporary.write_text(json.dumps(asdict(result)))
    temporary.rename(cache)
    return result


async def _why_not(kernel: Kernel) -> str:
    """Why KVM cannot be used; empty when it can."""
    if not DEVICE.exists():
        return f"there is no {DEVICE}: the processor's virtualization is off, or not passed on to this (virtual) host"
    if not os.access(DEVICE, os.R_OK | os.W_OK):
        return f"{DEVICE} may not be opened by this user: add it to the group kvm"
    try:
        initrd = await kernels.floor_initramfs(kernel)
    except RametError as error:
        return f"it could not be probed: {error.message}"
    config = argv.Config(
        name="probe",
        accelerator=Accelerator.KVM,
        cpus=1,
        memory=_MEMORY,
        kernel=kernel.image,
        initrd=initrd,
        cmdline=kernels.cmdline(kernel),
    )
    try:
        async with process.running(argv.build(config)) as qemu, asyncio.timeout(DEADLINE):
            assert qemu.stdout
            seen = b""
            while chunk := await qemu.stdout.read(4096):
                seen = (seen + chunk)[-8192:]
                if kernels.FLOOR_LINE.encode() in seen:
                    return ""
    except TimeoutError:
        return f"a guest under KVM did not boot within {DEADLINE:.0f} s: {DEVICE} opens, but is not a whole KVM"
    text = seen.decode(errors="replace").strip()
    if "Assertion" in text:
        return f"QEMU aborts when it starts a guest with it: {DEVICE} opens, but is not a whole KVM"
    return f"a guest under KVM did not boot: {(text.splitlines() or ['it ended'])[-1]}"


async def why_no_uring(directory: Path) -> str:
    """Why io_uring cannot be used for files in a directory; empty when it can: a QEMU, restricted as all are, wrote a page with it and read that back."""
    with tempfile.NamedTemporaryFile(prefix=".probe-", dir=directory) as file:
        file.truncate(1 << 20)
        node = {"driver": "file", "node-name": "probe", "filename": file.name, "aio": str(argv.Aio.URING)}
        command = [argv.QEMU, "-machine", "none", "-nodefaults", "-no-user-config", "-display", "none", "-sandbox", argv.SANDBOX]
        command += ["-blockdev", json.dumps(node), "-qmp", "stdio"]
        tester = [f'qemu-io probe "{words}"' for words in (f"write -P 165 0 {_PAGE}", "flush", f"read -P 165 0 {_PAGE}")]
        asked = [{"execute": "human-monitor-command", "arguments": {"command-line": line}} for line in tester]
        said = "\n".join(json.dumps(each) for each in [{"execute": "qmp_capabilities"}, *asked, {"execute": "quit"}])
        finished = await process.run(command, deadline=DEADLINE, input=said.encode())
    if _WHOLE in finished.output and "verification failed" not in finished.output:
        return ""
    last = (finished.output.strip().splitlines() or ["it said nothing"])[-1]
    return f"QEMU does not work with it: {last.rpartition(': ')[2] if finished.returncode else last}"
