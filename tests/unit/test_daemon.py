"""One daemon for one state directory, its token, where it listens, and how it is seen from outside. No machine, no engine."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
from pathlib import Path

import pytest

from ramet import daemon, service
from ramet.errors import DaemonError
from ramet.paths import StateDir


@pytest.fixture
def state(tmp_path: Path) -> StateDir:
    made = StateDir(root=tmp_path / "state")
    made.create()
    return made


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_second_daemon_is_refused(state: StateDir) -> None:
    with daemon._only_one(state):
        with pytest.raises(DaemonError, match=f"another daemon holds {state.root}") as caught, daemon._only_one(state):
            pass
        assert "RAMET_HOME" in caught.value.hint
    with daemon._only_one(state):
        pass


def test_another_state_directory_is_another_matter(state: StateDir, tmp_path: Path) -> None:
    with daemon._only_one(state), daemon._only_one(StateDir(root=tmp_path / "other")):
        pass


def test_the_state_is_for_its_owner_only(state: StateDir) -> None:
    with daemon._only_one(state):
        assert {mode(path) for path in (state.root, state.images, state.machines)} == {0o700}
        assert mode(state.lock) == 0o600


def test_the_token_is_made_once_and_for_the_owner_only(state: StateDir) -> None:
    old = os.umask(0)
    try:
        first = daemon.token(state)
    finally:
        os.umask(old)
    assert len(first) >= 32
    assert daemon.token(state) == first
    assert mode(state.token) == 0o600
    assert [path.name for path in state.root.iterdir() if path.is_file()] == ["token"]
    state.token.write_text("\n")  # a crash came between the making and the writing
    assert len(daemon.token(state)) >= 32


def test_two_states_have_two_tokens(state: StateDir, tmp_path: Path) -> None:
    other = StateDir(root=tmp_path / "other")
    other.create()
    assert daemon.token(state) != daemon.token(other)


def test_it_listens_on_loopback_and_on_its_last_port(state: StateDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAMET_PORT", raising=False)
    with daemon._listen(state) as server:
        address, port = server.getsockname()
        assert address == "127.0.0.1"
        daemon._announce(state, server)
    assert service.status(state) is None  # nobody holds the directory
    with daemon._only_one(state):
        assert service.status(state) == {"pid": os.getpid(), "url": f"http://127.0.0.1:{port}"}
    with daemon._listen(state) as server:
        assert server.getsockname()[1] == port
        with daemon._listen(state) as another:
            assert another.getsockname()[1] != port


def test_a_port_that_is_taken_and_asked_for_is_an_error(state: StateDir, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setenv("RAMET_PORT", str(taken.getsockname()[1]))
        with pytest.raises(DaemonError, match="cannot listen on port"):
            daemon._listen(state)


@pytest.mark.parametrize("port", ["x", "-1", "70000", ""])
def test_a_port_that_is_none(state: StateDir, monkeypatch: pytest.MonkeyPatch, port: str) -> None:
    monkeypatch.setenv("RAMET_PORT", port)
    with pytest.raises(DaemonError, match=f"RAMET_PORT is '{port}'"):
        daemon._listen(state)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"url": "http://127.0.0.1:x"}', '{"url": 7}', '{"url": "http://127.0.0.1:99999999"}'])
def test_a_damaged_announcement_is_no_obstacle(state: StateDir, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.delenv("RAMET_PORT", raising=False)
    state.daemon.write_text(text)
    daemon._listen(state).close()


def test_status(state: StateDir, tmp_path: Path) -> None:
    assert service.status(StateDir(root=tmp_path / "none")) is None
    state.daemon.write_text('{"pid": 1, "url": "http://127.0.0.1:1"}')  # of a daemon that is gone
    assert service.status(state) is None
    with daemon._only_one(state):
        assert service.status(state) == {"pid": 1, "url": "http://127.0.0.1:1"}
        state.daemon.write_text('{"pid": 1, "started": 1, "url": "http://127.0.0.1:1"}')  # pid 1 is another's by now
        assert service.status(state) is None
    assert service.status(state) is None
    assert asyncio.run(service.stop(state)) is False
