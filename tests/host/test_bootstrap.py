"""./ramet and tools/bootstrap.sh: from a fresh checkout to a Python environment, quick afterwards, clear when it cannot."""

from __future__ import annotations

import hashlib
import os
import resource
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.host.conftest import User

ROOT = Path(__file__).parents[2]
OVERHEAD = 0.05  # seconds of a processor that ./ramet may take before Python starts
PARTS = ("ramet", "uv.lock", "pyproject.toml", "tools", "src/ramet")


@dataclass(kw_only=True)
class Checkout:
    """A copy of what the bootstrap needs, with a home and a PATH of its own in front of the system's."""

    root: Path
    home: Path
    bin: Path
    env: dict[str, str] = field(default_factory=dict)

    def run(self, *argv: str, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
        base = {"HOME": str(self.home), "PATH": f"{self.bin}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
        return subprocess.run(argv, env=base | self.env | env, cwd=cwd or self.root, capture_output=True, text=True, timeout=240)

    def ramet(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        return self.run(str(self.root / "ramet"), *arguments, **env)

    def program(self, name: str, script: str) -> Path:
        """A program of ours on the PATH."""
        file = self.bin / name
        file.write_text(f"#!/bin/sh\n{script}\n")
        file.chmod(0o755)
        return file

    @property
    def lock(self) -> str:
        return hashlib.sha256((self.root / "uv.lock").read_bytes()).hexdigest()

    def fake_venv(self, venv: Path) -> None:
        """An environment that counts as healthy, whose Python tells how it was called and exits 7."""
        (venv / "bin").mkdir(parents=True)
        python = venv / "bin" / "python"
        python.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\nexit 7\n")
        python.chmod(0o755)
        (venv / "ramet-stamp").write_text(f"{self.lock} \n{self.root}\n")


def copy(to: Path) -> None:
    for part in PARTS:
        (to / part).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, to / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / part, to / part)


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    made = Checkout(root=tmp_path / "check out", home=tmp_path / "home", bin=tmp_path / "bin")
    copy(made.root)
    made.home.mkdir()
    made.bin.mkdir()
    return made


def test_arguments_and_the_exit_code_pass_through(checkout: Checkout, tmp_path: Path) -> None:
    venv = checkout.root / ".venv"
    checkout.fake_venv(venv)
    ended = checkout.ramet("run", "two words", "", "*")
    assert ended.stdout.split("\n")[:-1] == ["-P", f"{venv}/bin/ramet", "run", "two words", "", "*"]
    assert ended.returncode == 7
    link = tmp_path / "link"
    link.symlink_to(checkout.root / "ramet")
    assert checkout.run(str(link), "x", cwd=tmp_path).returncode == 7


def test_an_environment_that_is_there_costs_nothing(checkout: Checkout) -> None:
    checkout.fake_venv(checkout.root / ".venv")
    took = []
    for _ in range(7):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert checkout.ramet().returncode == 7
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        took.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(took) < OVERHEAD


def test_a_checkout_that_is_not_ours_to_write(user: User) -> None:
    made = Checkout(root=user.home / "checkout", home=user.home / "home", bin=user.home / "bin")
    copy(made.root)
    name = hashlib.sha256(str(made.root).encode()).hexdigest()[:12]
    made.fake_venv(made.home / ".cache" / "ramet" / f"venv-{name}")
    become = ["setpriv", f"--reuid={user.uid}", f"--regid={user.gid}", "--clear-groups"]
    ended = made.run(*become, str(made.root / "ramet"))
    assert ended.returncode == 7, ended.stderr
    assert not (made.root / ".venv").exists()


def test_a_directory_that_is_no_environment_is_not_touched(checkout: Checkout, tmp_path: Path) -> None:
    checkout.program("uv", "exit 0")
    python = checkout.program("python3", 'case "$*" in *pip*) exit 1 ;; esac; exec /usr/bin/python3 "$@"')
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "precious").write_text("data")
    ended = checkout.ramet(RAMET_VENV=str(mine), RAMET_PYTHON=str(python))
    assert ended.returncode == 6
    assert "not touching it" in ended.stderr
    assert (mine / "precious").read_text() == "data"


def test_an_old_python_is_named(checkout: Checkout) -> None:
    old = checkout.program("python3.9", "echo 3.9 False")
    ended = checkout.ramet(RAMET_PYTHON=str(old))
    assert ended.returncode == 6
    assert "Python 3.11 or newer" in ended.stderr
    assert "(3.9)" in ended.stderr


@pytest.mark.parametrize("uid", ["1000", "0"])
def test_without_pip(checkout: Checkout, uid: str) -> None:
    """Root has it installed, others are told the one command that installs all that is missing."""
    python = checkout.program("python3", 'case "$*" in *pip*) exit 1 ;; esac; exec /usr/bin/python3 "$@"')
    checkout.program("id", f"echo {uid}")
    checkout.program("apt-get", f'echo "$@" >> "{checkout.home}/apt"; echo "E: dpkg was interrupted"; exit 100')
    ended = checkout.ramet(RAMET_PYTHON=str(python))
    assert ended.returncode == 6
    if uid == "0":
        assert "installing Debian's package python3-pip" in ended.stderr
        assert "dpkg was interrupted" in ended.stderr
        assert (checkout.home / "apt").read_text() == "-q update\n"
    else:
        assert "sudo apt-get install --no-install-recommends" in ended.stderr
        assert "python3-pip" in ended.stderr
        assert not (checkout.home / "apt").exists()


def test_root_gets_pip_and_goes_on(checkout: Checkout) -> None:
    marker = checkout.home / "pip-is-there"
    fake_uv = 'mkdir -p "$target/bin"; printf "#!/bin/sh\\necho uv was called; exit 1\\n" > "$target/bin/uv"; chmod +x "$target/bin/uv"'
    pip = f'[ -e "{marker}" ] || exit 1; for target; do :; done; case "$*" in *"pip install"*) {fake_uv} ;; esac; exit 0'
    python = checkout.program("python3", f'case "$*" in *pip*) {pip} ;; esac; exec /usr/bin/python3 "$@"')
    checkout.program("id", "echo 0")
    checkout.program("apt-get", f'case "$*" in *install*) touch "{marker}" ;; esac')
    ended = checkout.ramet(RAMET_PYTHON=str(python))
    assert "uv was called" in ended.stderr
    assert ended.returncode == 6


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("Failed to establish a new connection: Temporary failure in name resolution", "cannot be reached"),
        ("SSLError(SSLCertVerificationError(1, CERTIFICATE_VERIFY_FAILED)); No matching distribution found", "certificate"),
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", "the disk is full"),
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE.", "its hash differs"),
        ("OSError: [Errno 30] Read-only file system", "not allowed to write"),
        ("strange", "failed (status 1)"),
    ],
)
def test_failures_say_what_to_do(checkout: Checkout, said: str, told: str) -> None:
    python = checkout.program(
        "python3", f'case "$*" in *"pip install"*) echo "{said}"; exit 1 ;; *pip*) exit 0 ;; esac; exec /usr/bin/python3 "$@"'
    )
    ended = checkout.ramet(RAMET_PYTHON=str(python))
    assert ended.returncode == 6
    assert said in ended.stderr
    assert told in ended.stderr
    assert not (checkout.root / ".venv").exists()


@pytest.mark.timeout(900)
def test_from_nothing_and_again(checkout: Checkout) -> None:
    """With the real package index: needs a network."""
    if "PIP_CERT" in os.environ:
        checkout.env["PIP_CERT"] = os.environ["PIP_CERT"]
    first = checkout.ramet("--version")
    assert "Python environment ready" in first.stderr, first.stderr
    venv = checkout.root / ".venv"
    where = checkout.run(str(venv / "bin/python"), "-P", "-c", "import ramet, rich, sqlalchemy; print(ramet.__file__)")
    assert where.stdout.strip() == str(checkout.root / "src/ramet/__init__.py")
    assert "Python environment" not in checkout.ramet("--version").stderr
    # A lock file that changed makes it anew, in what is there; what failed in between leaves no stamp.
    with open(checkout.root / "uv.lock", "a") as file:
        file.write("# changed\n")
    assert "Python environment ready" in checkout.ramet("--version").stderr
    (venv / "bin/python").unlink()
    assert "Python environment ready" in checkout.ramet("--version").stderr
    assert (venv / "ramet-stamp").read_text().splitlines() == [f"{checkout.lock} ", str(checkout.root)]
