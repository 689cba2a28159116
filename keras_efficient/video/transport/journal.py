"""The journal: which chunks are stored, with their results, each once and in order, for any number of servers."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from keras_efficient.errors import (
    BadChunk,
    ConnectionProblem,
    FileProblem,
    KerasEfficientError,
    MissingDependency,
    WrongArgument,
)
from keras_efficient.video.transport.chunks import Chunk

__all__ = ["Journal", "Stored", "open_journal"]

PATIENCE = 10  # seconds for a lock or for the database's answer

_TABLES = (
    "CREATE TABLE IF NOT EXISTS streams (camera TEXT, stream BIGINT, last BIGINT NOT NULL,"
    " PRIMARY KEY (camera, stream))",
    "CREATE TABLE IF NOT EXISTS chunks (camera TEXT, stream BIGINT, sequence BIGINT, crc BIGINT NOT NULL,"
    " frames INTEGER NOT NULL, dropped BIGINT NOT NULL, results TEXT NOT NULL, captured DOUBLE PRECISION NOT NULL,"
    " stored DOUBLE PRECISION NOT NULL, PRIMARY KEY (camera, stream, sequence))",
)


@dataclass(frozen=True)
class Stored:
    """What the journal has of a chunk.

    Attributes:
        sequence: its own.
        results: of the frames that came out with it.
        is_repeat: whether they were there before.
        dropped: how many chunks right before it are not in the journal, and will not come.
    """

    sequence: int
    results: list[Any]
    is_repeat: bool = False
    dropped: int = 0


class Journal(Protocol):
    """Where a server stores results, before it acknowledges a chunk."""

    def last(self, camera: str, stream: int) -> int:
        """The last sequence of a camera's stream; 0 before the first."""
        ...

    def results(self, camera: str, stream: int, after: int) -> list[Stored]:
        """What is stored behind a sequence, in order, at most 1000 chunks, the newest."""
        ...

    def store(self, chunk: Chunk, results: Sequence[Any]) -> Stored:
        """Stores what JSON can hold, durably; of a chunk that is there already, nothing changes.

        Numbers that are not finite, which JSON has not, become null.

        Raises:
            BadChunk: it is neither the next one, nor does it begin a group behind chunks that the camera gave up; or
                another chunk is there under its number.
            ConnectionProblem: the database cannot be reached: nothing is known to be stored.
        """
        ...

    def close(self) -> None: ...


def open_journal(url: str | Path) -> Journal:
    """The journal at `postgresql://user:password@host/database`, or in an SQLite file.

    Several processes may use one: those of one machine a file, others PostgreSQL. Rows of the table `chunks` may be
    deleted at any time; what decides is in `streams`.

    Raises:
        FileProblem: the file cannot be used.
        ConnectionProblem: the database cannot be reached.
        MissingDependency: psycopg is not installed.
        WrongArgument: a URL of another kind, or one that cannot be read.
    """
    text = str(url)
    if text.startswith(("postgresql://", "postgres://")):
        return _PostgreSQL(text)
    if "://" in text:
        raise WrongArgument(f"A journal is a file, or postgresql://…, not {text.partition('://')[0]}://….")
    return _SQLite(Path(text))


class _Database:
    """What both kinds share; one connection, used by one thread at a time."""

    LOCKING = ""
    MARK = "?"
    BEGIN = "BEGIN"
    errors: type[Exception]

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._connection: Any = None
        with self._transaction():  # what is wrong shows at once
            pass

    def last(self, camera: str, stream: int) -> int:
        with self._transaction() as run:
            found = run("SELECT last FROM streams WHERE camera = ? AND stream = ?", camera, stream)
        return int(found[0][0]) if found else 0

    def results(self, camera: str, stream: int, after: int) -> list[Stored]:
        columns = "SELECT sequence, results FROM chunks WHERE camera = ? AND stream = ? AND sequence > ?"
        with self._transaction() as run:
            found = run(f"{columns} ORDER BY sequence DESC LIMIT 1000", camera, stream, after)
        return [Stored(int(sequence), json.loads(results), True) for sequence, results in reversed(found)]

    def store(self, chunk: Chunk, results: Sequence[Any]) -> Stored:
        found = json.loads(json.dumps(list(results)), parse_constant=lambda name: None)
        text = json.dumps(found, separators=(",", ":"))
        key = (chunk.camera, chunk.stream)
        with self._transaction() as run:
            run("INSERT INTO streams VALUES (?, ?, 0) ON CONFLICT DO NOTHING", *key)
            row = f"SELECT last FROM streams WHERE camera = ? AND stream = ?{self.LOCKING}"
            last = int(run(row, *key)[0][0])
            if chunk.sequence <= last:
                return self._repeat(run, chunk, last)
            dropped = chunk.sequence - 1 - last
            if dropped and not (chunk.begins and chunk.dropped >= dropped):
                raise BadChunk(
                    f"Chunk {chunk.sequence} of camera {chunk.camera} does not follow chunk {last}, the last one."
                )
            run(
                "INSERT INTO chunks VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                *(*key, chunk.sequence, chunk.crc, len(chunk.packets), dropped, text, chunk.captured, time.time()),
            )
            run("UPDATE streams SET last = ? WHERE camera = ? AND stream = ?", chunk.sequence, *key)
        return Stored(chunk.sequence, found, dropped=dropped)

    def close(self) -> None:
        with self._turn:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    def _repeat(self, run: Any, chunk: Chunk, last: int) -> Stored:
        found = run(
            "SELECT crc, results FROM chunks WHERE camera = ? AND stream = ? AND sequence = ?",
            *(chunk.camera, chunk.stream, chunk.sequence),
        )
        if not found:  # given up by the camera before, or deleted from the journal
            return Stored(chunk.sequence, [], True)
        if int(found[0][0]) != chunk.crc:
            hint = "Do two cameras have the same name, or a copy of one spool?"
            raise BadChunk(f"Another chunk {chunk.sequence} of camera {chunk.camera} is stored already.", hint=hint)
        return Stored(chunk.sequence, json.loads(found[0][1]), True)

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[Any]:
        """Gives a function that runs a statement and returns its rows; afterwards all is durable, or nothing is."""
        with self._turn:
            try:
                is_new = self._connection is None
                if is_new:
                    self._connection = self._connect()
                connection = self._connection
                connection.execute(self.BEGIN)

                def run(statement: str, *values: Any) -> list[Any]:
                    cursor = connection.execute(statement.replace("?", self.MARK), values)
                    return cursor.fetchall() if cursor.description else []

                if is_new:  # it may lead to another database than before
                    self._make_tables(run)
                yield run
                connection.execute("COMMIT")
            except BaseException as error:
                self._end_early(error)
                if isinstance(error, self.errors):
                    raise self._problem(error) from error
                raise

    def _end_early(self, error: BaseException) -> None:
        """Takes back what was begun. A connection that failed is not used again."""
        connection = self._connection
        if connection is None:
            return
        with contextlib.suppress(Exception):
            connection.execute("ROLLBACK")
        if not isinstance(error, BadChunk):
            self._connection = None
            with contextlib.suppress(Exception):
                connection.close()

    def _make_tables(self, run: Any) -> None:
        for statement in _TABLES:
            run(statement)

    def _connect(self) -> Any:
        raise NotImplementedError("Each database has its own way.")

    def _problem(self, error: Exception) -> KerasEfficientError:
        """One of the database's own errors in words of ours."""
        raise NotImplementedError("Each database has its own way.")


class _SQLite(_Database):
    BEGIN = "BEGIN IMMEDIATE"
    errors = sqlite3.Error

    def __init__(self, path: Path):
        self.path = path
        super().__init__()

    def _connect(self) -> Any:
        connection = sqlite3.connect(self.path, timeout=PATIENCE, isolation_level=None, check_same_thread=False)
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        return connection

    def _problem(self, error: Exception) -> KerasEfficientError:
        if isinstance(error, sqlite3.OperationalError) and self.path.is_file():
            return ConnectionProblem(f"The journal {self.path} cannot be written now: {error}.")
        return FileProblem(self.path, f"cannot be used as a journal: {error}.")


class _PostgreSQL(_Database):
    LOCKING = " FOR UPDATE"
    MARK = "%s"

    def __init__(self, url: str):
        try:
            import psycopg
        except ImportError as error:
            raise MissingDependency("psycopg", "A journal on PostgreSQL", "video") from error
        self.url, self.place, self.errors = url, _place(url), psycopg.Error
        super().__init__()

    def _connect(self) -> Any:
        import psycopg

        waits = f"-c statement_timeout={PATIENCE}s -c idle_in_transaction_session_timeout={PATIENCE}s"
        return psycopg.connect(
            self.url, autocommit=True, connect_timeout=PATIENCE, options=waits, keepalives_idle=PATIENCE
        )

    def _problem(self, error: Exception) -> KerasEfficientError:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return ConnectionProblem(f"The journal at {self.place} cannot be used now: {reason}.")

    def _make_tables(self, run: Any) -> None:
        run("SELECT pg_advisory_xact_lock(7261726)")  # two servers that start at once would make the same tables
        super()._make_tables(run)


def _place(url: str) -> str:
    """Host and database of a URL: what may be told of it, which also may have a password.

    Raises:
        WrongArgument: it is none, or its parts are not what they should be: then a password may be in any of them.
    """
    from psycopg import ProgrammingError, conninfo

    hint = "In a password write %25 for %, %40 for @, %2F for /, %20 for a space."
    problem = WrongArgument("The journal's URL cannot be read as one of PostgreSQL.", hint=hint)
    try:
        parts = conninfo.conninfo_to_dict(url)
    except ProgrammingError:
        raise problem from None  # its words quote the URL
    told = [str(parts.get(name) or "") for name in ("host", "dbname")]
    ports = str(parts.get("port") or "").split(",")
    if "@" in "".join(told) or not all(port.isdecimal() for port in ports if port):
        raise problem
    return "/".join(filter(None, told)) or "PostgreSQL"
