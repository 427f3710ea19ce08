"""Workspaces on SQLite and on a private PostgreSQL server, and real second processes."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import sys
import tempfile
import textwrap
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from rlhf_nb.store import Store

ROOT = Path(__file__).resolve().parents[2]


def _missing(what: str) -> None:
    """Skip, and say why; under CI=true fail, so that a green run means it ran."""
    pytest.fail(what) if os.environ.get("CI") == "true" else pytest.skip(what)


def _binaries() -> Path | None:
    found = shutil.which("initdb")
    places = [Path(found).parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((place for place in places if (place / "initdb").exists() and (place / "pg_ctl").exists()), None)


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Callable[[], str]]:
    """A server of our own on a Unix socket; calling the fixture makes a database and gives its URL."""
    binaries = _binaries()
    if binaries is None:
        _missing("no PostgreSQL server here (initdb, pg_ctl): apt-get install postgresql")
    import psycopg

    # Not under pytest's own folder: the server refuses to run as root, and the user it runs as cannot enter that.
    home = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))
    become: list[str] = []
    user = pwd.getpwuid(os.getuid()).pw_name
    if os.getuid() == 0:
        user = next((name for name in ("postgres", "nobody") if _has_user(name)), "nobody")
        shutil.chown(home, user)
        become = ["runuser", "-u", user, "--"]
    data, sockets = home / "data", home
    try:
        _run(
            [
                *become,
                binaries / "initdb",
                "-D",
                data,
                "-U",
                "rlhf",
                "-A",
                "trust",
                "-E",
                "UTF8",
                "--locale=C",
                "--no-sync",
            ]
        )
        options = f"-k {sockets} -c listen_addresses='' -c fsync=off -c max_connections=60"
        _run([*become, binaries / "pg_ctl", "-D", data, "-l", home / "log", "-w", "-o", options, "start"])
    except (subprocess.CalledProcessError, OSError) as error:
        log = (home / "log").read_text() if (home / "log").exists() else getattr(error, "stderr", "")
        shutil.rmtree(home, ignore_errors=True)
        _missing(f"a PostgreSQL server could not be started: {log or error}")

    def database() -> str:
        name = f"w{uuid.uuid4().hex[:12]}"
        with psycopg.connect(host=str(sockets), user="rlhf", dbname="postgres", autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return f"postgresql://rlhf:secret@/{name}?host={quote(str(sockets))}"

    yield database
    _run([*become, binaries / "pg_ctl", "-D", data, "-m", "immediate", "-w", "stop"])
    shutil.rmtree(home, ignore_errors=True)


def _has_user(name: str) -> bool:
    try:
        pwd.getpwnam(name)
    except KeyError:
        return False
    return True


def _run(command: list) -> None:
    # The server inherits stdout: a pipe would never see its end.
    subprocess.run(
        [str(part) for part in command], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/"
    )


@pytest.fixture(params=["sqlite", "postgresql"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where a new workspace can be: a directory, or an empty database."""
    if request.param == "sqlite":
        return str(tmp_path / "workspace")
    return request.getfixturevalue("postgres_server")()


@pytest.fixture
def store(target: str) -> Iterator[Store]:
    with Store.open(target) as opened:
        yield opened


@pytest.fixture
def directory_store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "workspace", lock_timeout_s=0.3) as opened:
        yield opened


@pytest.fixture
def start_python() -> Iterator[Callable[..., subprocess.Popen]]:
    """Start a second Python process on some code; it is ended with the test."""
    started: list[subprocess.Popen] = []

    def start(code: str, *arguments: str) -> subprocess.Popen:
        command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
        process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stdin.close()
