"""What a guest is to give back, and when: pure.

What a guest frees goes back to the host by itself (free page reporting, a page at a time). This is about what it holds and has not used for a
while, which is mostly files that it read. There is no swap in a guest, so a program's own memory always stays.

Two ways to the same end. Linux with DAMON (our kernel) does it alone, once it was told how (`damon`): the guest needs no further word from
us. Any other kernel (Debian's) is asked for some bytes now and then (`decide`) by memory.reclaim, less the more its programs wait for memory:
the kernel's own order of pages, from those that were read once, decides which.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ramet.model import Reclaim

_SECOND = 1_000_000  # DAMON counts in microseconds


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A guest's memory at an instant. at: seconds of any clock that only goes on. reclaimable: bytes of files that it could drop at once; stalled:
    seconds that a program waited for memory, refaulted: bytes that it had to read again soon after they were dropped; both since it booted."""

    at: float
    reclaimable: float
    stalled: float = 0.0
    refaulted: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Steering:
    """How `decide` goes about it.

    every: seconds between samples. rate: the part of what is above `keep` bytes that is asked for in a second. most: the largest part in one go.
    stall: the part of time that programs may wait for memory. refault: bytes in a second that may be read again. calm: seconds after either
    was exceeded in which nothing is asked for.
    """

    every: float
    rate: float
    most: float
    keep: int
    stall: float
    refault: int
    calm: float


STEERING: Mapping[Reclaim, Steering] = {
    # e^(-0.005 * 600): 95 % of cold files in ten minutes, one question a minute.
    Reclaim.GENTLE: Steering(every=60.0, rate=0.005, most=0.25, keep=32 << 20, stall=0.001, refault=64 << 10, calm=300.0),
    # e^(-0.06 * 60): 97 % in a minute, by arithmetic; the kernel works in batches and takes up to twice what it is asked for. 300 MiB, measured: 66 % after
    # 10 s, 90 % after 30 s. Less than a third at a time, so that what turns out to be needed stops it early.
    Reclaim.EAGER: Steering(every=5.0, rate=0.06, most=0.3, keep=16 << 20, stall=0.01, refault=1 << 20, calm=30.0),
}
LEAST = 1 << 20  # bytes: below that the process in the guest costs more than it brings


def decide(samples: Sequence[Sample], policy: Reclaim, *, pressed: bool = False) -> int:
    """How many bytes to ask for now. samples: the recent ones of one guest since it booted, in order, the newest last.

    pressed: the host is short of memory, and a guest that reads some files again is the least that can come of it: all above `keep`, at once.
    """
    if policy is Reclaim.OFF or not samples:
        return 0
    how = STEERING[policy]
    newest = samples[-1]
    part = 1.0 if pressed else _part(samples, how)
    wanted = int(part * (newest.reclaimable - how.keep)) if part > 0 else 0
    return wanted if wanted >= LEAST else 0


def _part(samples: Sequence[Sample], how: Steering) -> float:
    """0 to `most`, of what is there."""
    if len(samples) < 2:
        return 0.0
    newest = samples[-1]
    recent = [each for each in samples[:-2] if each.at >= newest.at - how.calm - how.every]
    strain = max(_strain(a, b, how) for a, b in itertools.pairwise([*recent, *samples[-2:]]))
    since = newest.at - samples[-2].at
    return min(how.most, how.rate * since) * (1.0 - strain)


def _strain(before: Sample, after: Sample, how: Steering) -> float:
    """0: nobody missed anything between the two; 1: as much as is allowed, or more."""
    elapsed = after.at - before.at
    if elapsed <= 0 or after.stalled < before.stalled or after.refaulted < before.refaulted:
        return 1.0  # not samples of one life of one machine: wait for better ones
    stall = (after.stalled - before.stalled) / elapsed / how.stall
    refault = (after.refaulted - before.refaulted) / elapsed / how.refault
    return min(1.0, max(stall, refault))


def horizon(policy: Reclaim) -> float:
    """For how many seconds `decide` looks back."""
    return 0.0 if policy is Reclaim.OFF else STEERING[policy].calm + 2 * STEERING[policy].every


def damon(policy: Reclaim) -> dict[str, int]:
    """The parameters of damon_reclaim (Linux 6.1, mm/damon/reclaim.c)."""
    if policy is Reclaim.OFF:
        return {"enabled": 0}
    return {**_DAMON[policy], **_ALWAYS, "enabled": 1}


# Active whatever is free, which says nothing in a guest whose free memory is the host's; asked of it only while inactive. No quota: what is not
# taken has its age set back, so that all that is cold is looked at once in each min_age, and a quota would be used up by the oldest of it, free
# pages and programs' own, that never go.
_ALWAYS = {
    "wmarks_interval": 60 * _SECOND,
    "wmarks_high": 1000,
    "wmarks_mid": 999,
    "wmarks_low": 0,
    "quota_sz": 0,
    "quota_ms": 0,
    "min_nr_regions": 10,
}
# Measured with 1 GiB, of which 300 MiB were a file that was read once and 150 MiB a program's own, under emulation, on a busy host. QEMU's processor time
# in 60 idle seconds: off 0.14 to 0.20 s, gentle 0.16 to 0.24, eager 0.38; eager with a sample each 250 ms 0.68; with the kernel's defaults (each 5 ms) 6.0.
# The file was back on the host after 280 s (gentle) and 35 s (eager). A loop that hashed, sorted and started programs did as much per second of
# processor time as without, within 2 %, which is what two runs without it differ by.
_DAMON: Mapping[Reclaim, Mapping[str, int]] = {
    Reclaim.GENTLE: {
        "sample_interval": 2 * _SECOND,
        "aggr_interval": 40 * _SECOND,
        "min_age": 240 * _SECOND,
        "max_nr_regions": 100,
    },
    Reclaim.EAGER: {
        "sample_interval": _SECOND // 2,
        "aggr_interval": 5 * _SECOND,
        "min_age": 20 * _SECOND,
        "max_nr_regions": 200,
    },
}
