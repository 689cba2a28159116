"""The journal: each chunk once and in order, whoever stores it, in SQLite and in PostgreSQL."""

from __future__ import annotations

import itertools
import multiprocessing
import sqlite3
import threading
import traceback

import pytest

from keras_efficient.errors import BadChunk, ConnectionProblem, FileProblem, WrongArgument
from keras_efficient.video.transport import open_journal
from keras_efficient.video.transport.journal import Stored

from .helpers import chunk, packet, rows

NAMES = (f"journal{number}" for number in itertools.count())


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path):
    if request.param == "sqlite":
        return str(tmp_path / "journal.sqlite")
    return request.getfixturevalue("postgres").new(next(NAMES))


@pytest.fixture
def journal(url):
    opened = open_journal(url)
    yield opened
    opened.close()


def one(sequence, begins=False, data=b"data", **others):
    return chunk(begins, packets=[packet(begins, data=data)], camera="cam1", stream=5, sequence=sequence, **others)


def test_chunks_in_order(journal, url):
    assert journal.last("cam1", 5) == 0
    assert journal.store(one(1, begins=True), [{"a": 1.5}, "é"]) == Stored(1, [{"a": 1.5}, "é"])
    assert journal.store(one(2), []) == Stored(2, [])
    assert (journal.last("cam1", 5), journal.last("cam1", 6), journal.last("cam2", 5)) == (2, 0, 0)
    assert [stored.sequence for stored in journal.results("cam1", 5, 0)] == [1, 2]
    assert journal.results("cam1", 5, 1) == [Stored(2, [], True)]
    assert rows(url, "SELECT camera, stream, sequence, frames, dropped FROM chunks ORDER BY sequence") == [
        ("cam1", 5, 1, 1, 0),
        ("cam1", 5, 2, 1, 0),
    ]


def test_a_repeat_changes_nothing_and_gives_what_is_stored(journal):
    journal.store(one(1, begins=True), ["first"])
    assert journal.store(one(1, begins=True), ["second"]) == Stored(1, ["first"], True)
    assert journal.results("cam1", 5, 0) == [Stored(1, ["first"], True)]
    with pytest.raises(BadChunk, match=r"Another chunk 1 of camera cam1(.|\n)*copy of one spool"):
        journal.store(one(1, begins=True, data=b"other"), [])
    assert journal.store(one(2), []) == Stored(2, []), "after an error it goes on"


def test_out_of_order(journal):
    with pytest.raises(BadChunk, match="Chunk 2 of camera cam1 does not follow chunk 0"):
        journal.store(one(2), [])
    journal.store(one(1, begins=True), [])
    for wrong in (one(3), one(3, dropped=1), one(3, begins=True), one(4, begins=True, dropped=1)):
        with pytest.raises(BadChunk, match="does not follow chunk 1"):
            journal.store(wrong, [])
    assert journal.last("cam1", 5) == 1


def test_what_the_camera_gave_up(journal, url):
    journal.store(one(1, begins=True), [])
    assert journal.store(one(5, begins=True, dropped=4), []).dropped == 3
    assert rows(url, "SELECT sequence, dropped FROM chunks ORDER BY sequence") == [(1, 0), (5, 3)]
    assert journal.store(one(3), []) == Stored(3, [], True), "too late: nobody waits for it"
    assert journal.last("cam1", 5) == 5


def test_results_that_json_cannot_hold_are_not_stored(journal):
    with pytest.raises(TypeError):
        journal.store(one(1, begins=True), [object()])
    assert journal.last("cam1", 5) == 0
    journal.store(one(1, begins=True), [])


def test_numbers_that_are_not_finite_are_null(journal):
    found = [{"scores": [0.5, float("nan"), float("-inf")]}, float("inf"), "NaN"]
    want = [{"scores": [0.5, None, None]}, None, "NaN"]
    assert journal.store(one(1, begins=True), found) == Stored(1, want)
    assert journal.results("cam1", 5, 0) == [Stored(1, want, True)]


def test_many_threads_store_the_same(journal, url):
    """Two connections of a camera in one server: each chunk once, by one of them."""
    new = []

    def work(name):
        for sequence in range(1, 41):
            if not journal.store(one(sequence, begins=sequence == 1), [name]).is_repeat:
                new.append(sequence)

    threads = [threading.Thread(target=work, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(new) == list(range(1, 41))
    assert rows(url, "SELECT count(*) FROM chunks") == [(40,)]


def _store(url, name, barrier):
    journal = open_journal(url)
    barrier.wait()
    for sequence in range(1, 61):
        journal.store(one(sequence, begins=sequence == 1), [name])
    journal.close()


def test_two_processes_store_the_same(url):
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    workers = [context.Process(target=_store, args=(url, name, barrier)) for name in "ab"]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert rows(url, "SELECT sequence FROM chunks ORDER BY sequence") == [(number,) for number in range(1, 61)]


def test_rows_may_be_deleted(journal, url):
    journal.store(one(1, begins=True), ["first"])
    rows(url, "DELETE FROM chunks")
    assert journal.store(one(1, begins=True), ["again"]) == Stored(1, [], True)
    assert journal.store(one(2), []) == Stored(2, [])


def test_a_database_that_goes_and_comes_back(postgres):
    journal = open_journal(postgres.new(next(NAMES)))
    journal.store(one(1, begins=True), [])
    postgres.stop()
    try:
        for _ in range(2):
            with pytest.raises(ConnectionProblem, match=r"The journal at 127\.0\.0\.1") as caught:
                journal.store(one(2), [])
            assert "secret" not in str(caught.value)
    finally:
        postgres.start()
    assert journal.store(one(2), []) == Stored(2, [])
    journal.close()


def test_a_database_that_comes_back_empty(tmp_path, postgres):
    """As after a failover to another: the tables are made there."""
    path = tmp_path / "a.sqlite"
    database = postgres.new(next(NAMES))
    for url, drop in ((path, path.unlink), (database, lambda: rows(database, "DROP TABLE streams, chunks"))):
        journal = open_journal(url)
        journal.store(one(1, begins=True), [])
        drop()
        journal._connection.close()
        with pytest.raises((ConnectionProblem, FileProblem)):
            journal.last("cam1", 5)
        assert journal.last("cam1", 5) == 0
        journal.close()


def test_places_where_no_journal_can_be(tmp_path):
    (tmp_path / "text").write_text("no database" * 100)
    for path in (tmp_path / "text", tmp_path, tmp_path / "none" / "a.sqlite"):
        with pytest.raises(FileProblem, match="cannot be used as a journal"):
            open_journal(path)
    with pytest.raises(WrongArgument, match=r"not mysql://"):
        open_journal("mysql://me:secret@host/a")


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("postgresql://me:secret@127.0.0.1:1/a", r"The journal at 127\.0\.0\.1/a cannot be used now: connection"),
        ("postgresql://127.0.0.1:1/a?user=me&password=secret", r"The journal at 127\.0\.0\.1/a cannot be used now"),
        ("postgresql:///a?host=/nowhere&password=secret", "The journal at /nowhere/a cannot be used now"),
        ("postgresql://127.0.0.1:1?password=secret", r"The journal at 127\.0\.0\.1 cannot be used now"),
        ("postgresql://me:secret%ZZ@127.0.0.1/a", "cannot be read as one of PostgreSQL"),
        ("postgresql://me:a/secret@127.0.0.1/a", "cannot be read as one of PostgreSQL"),
        ("postgresql://me:a@secret@127.0.0.1/a", "cannot be read as one of PostgreSQL"),
    ],
)
def test_passwords_are_not_told(url, words):
    pytest.importorskip("psycopg", reason="needs the extra video")
    with pytest.raises((ConnectionProblem, WrongArgument), match=words) as caught:
        open_journal(url)
    assert "secret" not in "".join(traceback.format_exception(caught.value))


def test_a_locked_file_is_no_acknowledgement(tmp_path, monkeypatch):
    monkeypatch.setattr("keras_efficient.video.transport.journal.PATIENCE", 0.1)
    journal = open_journal(tmp_path / "a.sqlite")
    other = sqlite3.connect(tmp_path / "a.sqlite", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(ConnectionProblem, match="cannot be written now: database is locked"):
        journal.store(one(1, begins=True), [])
    other.execute("ROLLBACK")
    assert journal.store(one(1, begins=True), []) == Stored(1, [])
