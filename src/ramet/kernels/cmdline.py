"""The guest kernel's command line, each word with its reason.

Not here: page_reporting.page_reporting_order=0. In 6.1 the balloon's driver overwrites it with 9 when it registers; it must be written to
/sys/module/page_reporting/parameters/page_reporting_order in the running guest. Nor damon_reclaim: it follows a policy that each machine has, and that
changes while it runs (`ramet.reclaiming`).
"""

from __future__ import annotations

from ramet.kernels.record import Kernel, KernelKind

# (word, reason). Milliseconds are CPU time of a boot under emulation; kernel/README.md says how they were measured.
COMMON: tuple[tuple[str, str], ...] = (
    ("console=ttyS0", "the console is a file on the host"),
    ("quiet", "each character on an emulated port costs; warnings still come"),
    ("panic=-1", "a dead machine reboots at once, and QEMU with -no-reboot ends"),
    ("transparent_hugepage=never", "else the guest seldom frees anything that can be given back whole"),
    ("random.trust_cpu=on", "no waiting for entropy at boot; every restore reseeds"),
    ("no_timer_check", "50 ms: the timer of an emulated chipset is wired right (KVM guests skip the test anyway)"),
    ("noreplace-smp", "70 ms: a machine with one cpu would patch thousands of lock prefixes away, and back when it gets another"),
    ("tsc=reliable", "with several cpus, the kernel distrusts an emulated TSC and reads the clock from the HPET, six times slower"),
    ("rcupdate.rcu_expedited=1", "moving a process into a cgroup, as every container start does, takes 2 ms instead of 30"),
    ("dummy.numdummies=0", "no dummy0 that nobody asked for"),
    # The two that woke an idle guest. Without both, it cost 0.3 % of a cpu instead of 0.1 (40 s under emulation, nothing reclaimed), and its QEMU made
    # 56 system calls a second instead of 14.
    ("sysctl.vm.stat_interval=10", "counters of free pages and the like, of each cpu, are summed up every second otherwise"),
    ("sysctl.vm.compaction_proactiveness=0", "kcompactd would look twice a second for huge pages to make, which nothing here wants"),
)
OWN: tuple[tuple[str, str], ...] = (
    ("lapic_timer_hz=1000000000", "100 ms: QEMU's local timer always runs at 1 GHz; a word of our patch"),
    (
        "acpi_mask_gpe=0x05",
        "30 ms of each start from a snapshot: the generation id's event would be taken through AML; our patch of random.c looks at the id itself",
    ),
    ("lpj=30000000", "200 to 400 ms for each further cpu, which would measure it: 3 GHz at 100 Hz. Only busy-waits for devices use it"),
)
DEBIAN: tuple[tuple[str, str], ...] = (
    ("mitigations=off", "one owner in a machine: no boundary inside to defend; ours is built without"),
    ("nokaslr", "relocating costs time, and the layout is the same in every fork anyway; ours is built without"),
    ("lpj=12000000", "as above, at 250 Hz"),
    ("cryptomgr.notests", "200 ms of self-tests; ours is built without"),
)


def cmdline(kernel: Kernel) -> str:
    """The words for a kernel; callers append those of the agent (`ramet.root=`…)."""
    return " ".join(word for word, _ in COMMON + (OWN if kernel.kind is KernelKind.OWN else DEBIAN))
