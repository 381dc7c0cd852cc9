"""What is asked of this host once, and what an administrator says of it instead."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ramet.errors import HostError
from ramet.kernels import Kernel
from ramet.kernels.record import KernelKind
from ramet.model import Accelerator
from ramet.vm.probe import probe

KERNEL = Kernel(kind=KernelKind.OWN, version="6.12", image=Path("/none"), modules=None, digest="d" * 64)


async def test_what_an_administrator_says_wins_over_an_older_answer_and_is_asked_of_the_host_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cache = tmp_path / "kvm.json"
    monkeypatch.setenv("RAMET_ACCEL", "kvm")
    assert (await probe(cache, KERNEL, "7.2")).accelerator is Accelerator.KVM
    monkeypatch.setenv("RAMET_ACCEL", "tcg")
    first = await probe(cache, KERNEL, "7.2")
    assert (first.accelerator, first.reason) == (Accelerator.TCG, "RAMET_ACCEL says so")
    cache.write_text(json.dumps(json.loads(cache.read_text()) | {"uring": "as the file has it"}))
    assert (await probe(cache, KERNEL, "7.2")).uring == "as the file has it"
    assert (await probe(cache, KERNEL, "8.0")).uring == first.uring


async def test_what_is_no_accelerator(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAMET_ACCEL", "fast")
    with pytest.raises(HostError, match="RAMET_ACCEL is 'fast'"):
        await probe(tmp_path / "kvm.json", KERNEL, "7.2")
