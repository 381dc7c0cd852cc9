"""What makes a build another one, and where builds are kept."""

from __future__ import annotations

import dataclasses

import pytest

from ramet import images
from ramet.building import build, key, repository
from ramet.errors import SpecError
from ramet.model import Lifecycle, Port, Snapshot, Spec
from ramet.storage import Transfer
from tests.unit.lineage import DIGEST
from tests.unit.memory import Memory

SPEC = Spec(name="shop", image="alpine:3", ports=(Port(guest=80, host=8080),), lifecycle=Lifecycle(create="make"))


@pytest.mark.parametrize("change", [
    {"cpus": 2},
    {"memory": 1 << 30},
    {"lifecycle": Lifecycle(create="make all")},
    {"env": {"A": "b"}},
    {"ports": (Port(guest=81, host=8080),)},
])  # fmt: skip
def test_a_change_makes_another_key(change: dict[str, object]) -> None:
    assert key(dataclasses.replace(SPEC, **change), "sha256:1", memory=True) != key(SPEC, "sha256:1", memory=True)  # type: ignore[arg-type]


def test_the_image_s_content_and_the_memory_count_and_names_of_the_host_do_not() -> None:
    first = key(SPEC, "sha256:1", memory=True)
    assert len(first) == 12
    assert key(SPEC, "sha256:2", memory=True) != first
    assert key(SPEC, "sha256:1", memory=False) != first
    assert key(dataclasses.replace(SPEC, name="other", ports=(Port(guest=80),)), "sha256:1", memory=True) == first


def test_repositories() -> None:
    assert repository("ghcr.io/acme/shop:main") == "ghcr.io/acme/shop"
    assert repository("127.0.0.1:5000/shop") == "127.0.0.1:5000/shop"
    for wrong in ("debian:12", "oci:/tmp/x", f"ghcr.io/acme/shop@sha256:{'0' * 64}"):
        with pytest.raises(SpecError, match="is no place in a registry"):
            repository(wrong)


class Host(Memory):
    """Has every build already. pushed: where to."""

    def __init__(self) -> None:
        super().__init__()
        self.stock()
        self.plant()
        self.pushed: list[str] = []

    async def get_snapshot(self, snapshot: str) -> Snapshot:
        return await super().get_snapshot("m@warm")

    async def push(self, snapshot: str, reference: str) -> Transfer:
        self.pushed.append(reference)
        return await super().push("m@warm", reference)


async def test_each_reference_is_pushed_and_each_repository_has_the_build_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async def resolve(reference: str) -> str:
        return "sha256:1"

    monkeypatch.setattr(images, "resolve", resolve)
    host, (one, other) = Host(), ("ghcr.io/acme/shop", "ghcr.io/acme/other")
    made = await build(host, SPEC, push=(f"{one}:main", f"{other}:main", f"{one}:1.0"))
    assert host.pushed == [f"{one}:main", f"{other}:main", f"{one}:1.0", f"{one}:build-{made.key}", f"{other}:build-{made.key}"]
    assert made.pushed == (f"{one}@{DIGEST}", f"{other}@{DIGEST}", f"{one}@{DIGEST}")
