"""What registries say and what this host's files say about them: parsed, matched, refused. No line to anywhere."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ramet.errors import HostError, ImageError
from ramet.registry import challenge, credentials, line
from ramet.registry.challenge import Challenge
from ramet.registry.config import Config, Endpoint
from ramet.registry.credentials import Credentials
from ramet.registry.tries import Tries

REALM = "https://auth.docker.io/token"


# challenges


def test_challenges_of_real_registries() -> None:
    hub = f'Bearer realm="{REALM}",service="registry.docker.io",scope="repository:library/alpine:pull"'
    assert challenge.choose(hub) == Challenge(
        scheme="bearer", realm=REALM, service="registry.docker.io", scope="repository:library/alpine:pull"
    )
    assert challenge.choose('Basic realm="Registry Realm"') == Challenge(scheme="basic", realm="Registry Realm")
    both = f'Basic realm="a, \\"b\\"" , BEARER Realm={REALM},error="insufficient_scope", service=x'
    assert challenge.parse(both)[0].realm == 'a, "b"'
    assert challenge.choose(both) == Challenge(scheme="bearer", realm=REALM, service="x", error="insufficient_scope")
    assert challenge.choose('Negotiate, Basic realm="x"') == Challenge(scheme="basic", realm="x")


@pytest.mark.parametrize("header", ["", ",", "Digest", "Negotiate abc==", 'realm="x"', "\x00", '"Bearer realm=x'])
def test_what_is_no_challenge_that_we_answer(header: str) -> None:
    assert challenge.choose(header) is None


@given(st.text(alphabet=st.characters(codec="latin-1"), max_size=400))
def test_any_header_is_parsed_to_an_end(header: str) -> None:
    assert len(challenge.parse(header)) <= challenge.LIMIT


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["realm", "service", "scope", "error"]),
            st.text(alphabet=st.characters(min_codepoint=32, max_codepoint=126), max_size=30),
        ),
        unique_by=lambda pair: pair[0],
    )
)
def test_quoted_values_come_back_as_they_were(pairs: list[tuple[str, str]]) -> None:
    quoted = [(key, re.sub(r'(["\\])', r"\\\1", value)) for key, value in pairs]
    written = ", ".join(f'{key}="{value}"' for key, value in quoted)
    assert challenge.parse(f'Bearer {written}, Basic realm="x"') == [
        Challenge(scheme="bearer", **dict(pairs)),
        Challenge(scheme="basic", realm="x"),
    ]


def test_tokens() -> None:
    assert challenge.token({"token": "abc", "expires_in": 300}, "x") == challenge.Token(value="abc", lasts=300.0)
    assert challenge.token({"access_token": "abc"}, "x").lasts == challenge.SHORTEST
    assert challenge.token({"token": "a", "expires_in": 1e12}, "x").lasts == challenge.LONGEST
    assert challenge.token({"token": "a", "expires_in": -5}, "x").lasts == 0
    for bad in (None, [], {}, {"token": 5}, {"token": "a\r\nx: y"}, {"token": ""}):
        with pytest.raises(ImageError, match="without a token"):
            challenge.token(bad, "the token server")


# registries.conf


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Loads a registries.conf with a given content."""

    def load(text: str) -> Config:
        file = tmp_path / "registries.conf"
        file.write_text(text)
        monkeypatch.setenv("CONTAINERS_REGISTRIES_CONF", str(file))
        return Config.load()

    return load


def bases(places: list[Endpoint]) -> list[tuple[str, str]]:
    return [(place.base, place.path) for place in places]


def test_without_configuration(written: Any) -> None:
    config = written("")
    assert bases(config.endpoints("ghcr.io", "acme/shop")) == [("https://ghcr.io", "acme/shop")]
    assert bases(config.endpoints("docker.io", "library/x")) == [("https://registry-1.docker.io", "library/x")]
    assert bases(config.endpoints("127.0.0.1:5000", "x")) == [("http://127.0.0.1:5000", "x")]
    assert bases(config.endpoints("[::1]:5000", "x")) == [("http://[::1]:5000", "x")]
    assert bases(config.endpoints("10.0.0.1:5000", "x")) == [("https://10.0.0.1:5000", "x")]


def test_a_registry_of_this_host_that_has_certificates_speaks_tls(tmp_path: Path) -> None:
    (tmp_path / "localhost:5000").mkdir()
    config = Config(certs=(tmp_path,))
    assert [config.endpoints(host, "x")[0].plain for host in ("localhost:5000", "localhost:5001")] == [False, True]


def test_mirrors_come_first_and_are_never_written_to(written: Any) -> None:
    config = written("""
        unqualified-search-registries = ["docker.io"]
        [[registry]]
        location = "docker.io"
        [[registry.mirror]]
        location = "mirror.lan:5000/hub"
        insecure = true
        [[registry.mirror]]
        location = "digests.lan"
        pull-from-mirror = "digest-only"
        [[registry.mirror]]
        location = "tags.lan"
        pull-from-mirror = "tag-only"
    """)
    own = ("https://registry-1.docker.io", "acme/x")
    first = ("http://mirror.lan:5000", "hub/acme/x")
    assert bases(config.endpoints("docker.io", "acme/x")) == [first, ("https://digests.lan", "acme/x"), own]
    assert bases(config.endpoints("docker.io", "acme/x", digest=False)) == [first, ("https://tags.lan", "acme/x"), own]
    assert bases(config.endpoints("docker.io", "acme/x", write=True)) == [own]
    assert bases(config.endpoints("ghcr.io", "acme/x")) == [("https://ghcr.io", "acme/x")]


def test_the_longest_prefix_counts(written: Any) -> None:
    config = written("""
        [[registry]]
        location = "example.com"
        insecure = true
        [[registry]]
        prefix = "example.com/acme"
        location = "other.com:8443/x"
        [[registry]]
        prefix = "example.com/acme/secret"
        location = "example.com/acme/secret"
        blocked = true
        [[registry]]
        prefix = "*.lan"
        insecure = true
        [[registry]]
        prefix = "*.corp"
        location = "gate.example.com/corp"
    """)
    assert bases(config.endpoints("example.com", "a")) == [("http://example.com", "a")]
    assert bases(config.endpoints("example.com", "acme/b")) == [("https://other.com:8443", "x/b")]
    assert bases(config.endpoints("example.com", "acmes/b")) == [("http://example.com", "acmes/b")]
    assert bases(config.endpoints("a.b.lan:5000", "c")) == [("http://a.b.lan:5000", "c")]
    assert bases(config.endpoints("a.corp", "c/d")) == [("https://gate.example.com", "corp/c/d")]
    with pytest.raises(ImageError, match="blocks example"):
        config.endpoints("example.com", "acme/secret/x")


@pytest.mark.parametrize(
    "text",
    [
        "[[registry]",
        "registry = 5",
        "[[registry]]\nlocation = 5",
        "[[registry]]\nprefix = 'a.com'",
        "[[registry]]\nlocation = 'a.com'\ninsecure = 'yes'",
        "[[registry]]\nlocation = 'a.com@evil'",
        "[[registry]]\nlocation = 'a.com'\n[[registry.mirror]]\nlocation = 'http://b.com'",
    ],
)
def test_a_broken_configuration_is_named(written: Any, text: str) -> None:
    with pytest.raises(HostError, match=r"registries\.conf cannot be read"):
        written(text)


def test_the_users_configuration_and_what_was_dropped_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CONTAINERS_REGISTRIES_CONF", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    (tmp_path / "containers/registries.conf.d").mkdir(parents=True)
    (tmp_path / "containers/registries.conf").write_text("[[registry]]\nlocation = 'a.test'\n[[registry]]\nlocation = 'b.test'\n")
    (tmp_path / "containers/registries.conf.d/50-b.conf").write_text("[[registry]]\nlocation = 'b.test'\ninsecure = true\n")
    config = Config.load()
    assert [config.endpoints(host, "x")[0].plain for host in ("a.test", "b.test")] == [False, True]


# credentials


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's home without any login."""
    for name in ("REGISTRY_AUTH_FILE", "DOCKER_CONFIG", "RAMET_REGISTRY", "RAMET_REGISTRY_USER", "RAMET_REGISTRY_PASSWORD"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / ".config"))
    return tmp_path


def auth(user: str, password: str) -> dict[str, str]:
    return {"auth": base64.b64encode(f"{user}:{password}".encode()).decode()}


def put(file: Path, document: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(document))


async def test_nobody(home: Path) -> None:
    assert await credentials.find("ghcr.io", "acme/shop") is None


async def test_what_was_logged_in_last_by_place(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(home / ".docker/config.json", {"auths": {"ghcr.io": auth("docker", "a:b")}})
    assert await credentials.find("ghcr.io", "acme/shop") == Credentials(user="docker", password="a:b")
    put(home / ".config/containers/auth.json", {"auths": {"ghcr.io": auth("config", "c")}})
    assert await credentials.find("ghcr.io", "acme/shop") == Credentials(user="config", password="c")
    put(home / "run/containers/auth.json", {"auths": {"ghcr.io": auth("run", "d"), "ghcr.io/acme": auth("acme", "e")}})
    assert await credentials.find("ghcr.io", "acme/shop") == Credentials(user="acme", password="e")
    assert await credentials.find("ghcr.io", "acmes") == Credentials(user="run", password="d")
    put(home / "named.json", {"auths": {"example.com": auth("named", "f")}})
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(home / "named.json"))
    assert await credentials.find("ghcr.io", "acme/shop") is None
    assert await credentials.find("example.com", "x") == Credentials(user="named", password="f")


async def test_docker_hub_goes_by_several_names(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_CONFIG", str(home / "docker"))
    put(home / "docker/config.json", {"auths": {"https://index.docker.io/v1/": auth("me", "x")}})
    assert await credentials.find("docker.io", "library/alpine") == Credentials(user="me", password="x")
    put(home / "docker/config.json", {"auths": {"docker.io": {"identitytoken": "t"}, "https://ghcr.io": {"registrytoken": "r"}}})
    assert await credentials.find("docker.io", "library/alpine") == Credentials(identity="t")
    assert await credentials.find("ghcr.io", "a") == Credentials(bearer="r")
    assert await credentials.find("quay.io", "a") is None


async def test_the_environments_password_goes_to_one_registry_only(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAMET_REGISTRY_USER", "ci")
    monkeypatch.setenv("RAMET_REGISTRY_PASSWORD", "secret")
    with pytest.raises(HostError, match="not which registry"):
        await credentials.find("ghcr.io", "acme/shop")
    monkeypatch.setenv("RAMET_REGISTRY", "ghcr.io")
    assert await credentials.find("ghcr.io", "acme/shop") == Credentials(user="ci", password="secret")
    assert await credentials.find("evil.example", "acme/shop") is None


@pytest.mark.parametrize("text", ["{", '{"auths": {"a.example": {"auth": "###"}}}', '{"auths": {"a.example": {"auth": "/w=="}}}'])
async def test_a_damaged_login_is_named(home: Path, text: str) -> None:
    file = home / ".docker/config.json"
    file.parent.mkdir()
    file.write_text(text)
    with pytest.raises(HostError, match=r"config\.json"):
        await credentials.find("a.example", "x")


@pytest.mark.parametrize("document", [[], {"auths": []}, {"auths": {"a.example": 5}}, {"auths": {"a.example": {}}}, {"credHelpers": 5}])
async def test_a_file_without_logins(home: Path, document: Any) -> None:
    put(home / ".docker/config.json", document)
    assert await credentials.find("a.example", "x") is None


# tries


class Clock:
    def __init__(self) -> None:
        self.time = 100.0
        self.slept: list[float] = []

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.time += seconds


async def test_tries_slow_down_and_end() -> None:
    clock = Clock()
    tries = Tries(60.0, now=lambda: clock.time, sleep=clock.sleep)
    again = HostError("x", details={"retry_after": 0.0})
    with pytest.raises(HostError):
        while True:
            await tries.wait(again)
    assert sum(clock.slept) <= 60 and len(clock.slept) > 7
    for number, slept in enumerate(clock.slept):
        assert min(0.5 * 2**number, 10.0) / 2 <= slept <= min(0.5 * 2**number, 10.0)
    tries.moved()
    await tries.wait(again)
    assert clock.slept[-1] <= 0.5


async def test_tries_wait_as_long_as_was_asked_for_if_there_is_time() -> None:
    clock = Clock()
    tries = Tries(60.0, now=lambda: clock.time, sleep=clock.sleep)
    await tries.wait(HostError("x", details={"retry_after": 42.0}))
    assert clock.slept == [42.0]
    with pytest.raises(HostError):
        await tries.wait(HostError("x", details={"retry_after": 42.0}))
    with pytest.raises(HostError):
        await Tries(0.0).wait(HostError("x", details={"retry_after": 0.0}))
    with pytest.raises(HostError):  # this host's own trouble
        await Tries(60.0).wait(HostError("x"))


def test_retry_after() -> None:
    assert line.retry_after("7") == 7
    assert line.retry_after("99999999999999999999") == line.WAIT
    assert line.retry_after("Wed, 21 Oct 2099 07:28:00 GMT") == line.WAIT
    assert line.retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    for nothing in ("", "-1", "soon", "²"):
        assert line.retry_after(nothing) == 0
