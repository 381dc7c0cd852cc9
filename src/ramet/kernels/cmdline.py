"""The guest kernel's command line, each word with its reason."""

from __future__ import annotations

from ramet.kernels.record import Kernel, KernelKind

# (word, reason). Times are of the boot floor under emulation; docs/boot.md has the table.
COMMON: tuple[tuple[str, str], ...] = (
    ("console=ttyS0", "the console is a file on the host"),
    ("quiet", "each character on an emulated port costs; warnings still come"),
    ("panic=-1", "a dead machine reboots at once, and QEMU with -no-reboot ends"),
    ("transparent_hugepage=never", "else the guest seldom frees anything that can be given back whole"),
    ("page_reporting.page_reporting_order=0", "single free pages return to the host too"),
    ("random.trust_cpu=on", "no waiting for entropy at boot; every restore reseeds"),
)
DEBIAN: tuple[tuple[str, str], ...] = (
    ("mitigations=off", "one owner in a machine: no boundary inside to defend; ours is built without"),
    ("nokaslr", "relocating costs boot time, and the layout is the same in every fork anyway"),
    ("cryptomgr.notests", "no self-tests at boot; ours is built without"),
    ("i8042.noaux", "no mouse to probe for"),
    ("i8042.nokbd", "no keyboard either"),
)


def cmdline(kernel: Kernel) -> str:
    """The words for a kernel; callers append those of the agent (`ramet.root=`…)."""
    return " ".join(word for word, _ in COMMON + (DEBIAN if kernel.kind is KernelKind.DEBIAN else ()))
