"""A PostgreSQL server of our own, where Debian's programs are; else its tests are skipped, with the reason."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path

import pytest


def _programs():
    """Folder of `initdb` and `postgres`: the newest of Debian's, or the one in PATH."""
    for found in (*sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), reverse=True), shutil.which("initdb")):
        if found and (Path(found).parent / "postgres").exists():
            return Path(found).parent
    return None


class Postgres:
    """A server that can be stopped and started."""

    def __init__(self, folder, user):
        self.programs, self.folder = _programs(), folder
        self.port = socket.create_server(("127.0.0.1", 0)).getsockname()[1]
        self.as_user = {"user": user, "cwd": folder} if user else {"cwd": folder}
        self._run("initdb", "-D", folder / "data", "-U", "postgres", "--auth=trust", "--no-sync")

    def _run(self, program, *arguments):
        command = [self.programs / program, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False, **self.as_user)
        assert done.returncode == 0, done.stdout + done.stderr

    def start(self):
        options = f"-p {self.port} -h 127.0.0.1 -k {self.folder} -c fsync=off"
        self._run("pg_ctl", "-D", self.folder / "data", "-o", options, "-l", self.folder / "log", "-w", "start")

    def stop(self):
        self._run("pg_ctl", "-D", self.folder / "data", "-m", "immediate", "-w", "stop")

    def url(self, database="postgres"):
        return f"postgresql://postgres:secret@127.0.0.1:{self.port}/{database}"

    def new(self, name):
        """A database of its own for a test."""
        import psycopg

        with psycopg.connect(self.url(), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return self.url(name)


@pytest.fixture(scope="session")
def postgres():
    if _programs() is None:
        pytest.skip("needs PostgreSQL (Debian: apt install postgresql)")
    user = None
    if os.geteuid() == 0:  # it refuses to run as root
        names = [name for name in ("postgres", "nobody") if name in {entry.pw_name for entry in pwd.getpwall()}]
        if not names:
            pytest.skip("needs a user other than root to run PostgreSQL as")
        user = names[0]
    # Not in pytest's folders, nor in a TMPDIR, which other users may not enter.
    with tempfile.TemporaryDirectory(dir="/tmp" if user else None) as name:
        folder = Path(name)
        if user:
            os.chown(folder, pwd.getpwnam(user).pw_uid, -1)
        server = Postgres(folder, user)
        server.start()
        yield server
        server.stop()
