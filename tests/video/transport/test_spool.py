"""The camera's spool: bounded, in whole groups, and there after a crash."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from keras_efficient.errors import FileProblem
from keras_efficient.video.transport import Spool
from keras_efficient.video.transport import spool as module

from .helpers import chunk, packet

SIZE = len(chunk(begins=True, packets=[packet(True, data=bytes(1000))], camera="cam1").to_bytes())


def one(begins=False, **others):
    return chunk(begins, packets=[packet(begins, data=bytes(1000))], **others)


def group(spool, length=3):
    return [spool.append(one(begins=index == 0)) for index in range(length)]


def held(spool):
    found, last = [], 0
    while (last := spool.after(last)) is not None:
        found.append(last)
    return found


@pytest.fixture
def spool(tmp_path):
    opened = Spool(tmp_path / "spool", "cam1", limit=10 * SIZE)
    yield opened
    opened.close()


def test_chunks_stay_until_their_group_is_stored_and_the_next_has_begun(spool):
    assert group(spool) + group(spool) == [1, 2, 3, 4, 5, 6]
    spool.acknowledge(2)
    assert (held(spool), spool.pending) == ([1, 2, 3, 4, 5, 6], 4)
    spool.acknowledge(3)
    assert held(spool) == [4, 5, 6]
    spool.acknowledge(6)
    assert (held(spool), spool.pending) == ([4, 5, 6], 0)
    assert [spool.beginning(sequence) for sequence in (4, 6, 7)] == [4, 4, 7]
    assert spool.append(one()) == 7
    assert spool.beginning(7) == 4
    assert group(spool, 1) == [8]
    assert held(spool) == [4, 5, 6, 7, 8]
    spool.acknowledge(7)
    assert held(spool) == [8]
    assert spool.dropped == 0
    assert spool.size == SIZE == sum(path.stat().st_size for path in spool.folder.glob("*.chunk"))


def test_what_has_ended_and_is_stored_does_not_stay(spool, tmp_path):
    group(spool)
    spool.append(chunk(packets=[], ends=True))
    spool.acknowledge(3)
    assert held(spool) == [1, 2, 3, 4]
    spool.acknowledge(4)
    assert (held(spool), spool.size, spool.last) == ([], 0, 4)
    spool.close()
    again = Spool(tmp_path / "spool", "cam1", limit=10 * SIZE)
    assert (held(again), again.last, again.needs_key) == ([], 4, True)
    assert again.append(one(begins=True)) == 5
    spool._lock = again._lock  # which the fixture closes


def test_a_server_that_no_longer_has_what_it_had(spool):
    for _ in range(3):
        group(spool)
    spool.acknowledge(8)
    spool.acknowledge(5)
    assert (spool.acknowledged, spool.pending, held(spool)) == (8, 1, [7, 8, 9])
    spool.acknowledge(0, anew=True)
    assert (spool.acknowledged, spool.pending, spool.last) == (0, 3, 9)
    group(spool)
    assert held(spool) == [7, 8, 9, 10, 11, 12], "they stay until they are stored again"


def test_the_oldest_groups_are_given_up_as_a_whole_and_counted(spool):
    for _ in range(4):
        group(spool)
    assert (held(spool), spool.dropped) == ([4, 5, 6, 7, 8, 9, 10, 11, 12], 3)
    spool.acknowledge(4)
    group(spool)
    assert (held(spool), spool.dropped) == ([7, 8, 9, 10, 11, 12, 13, 14, 15], 5)
    assert spool.read(4) is None
    assert spool.size <= spool.limit


def test_a_group_alone_is_given_up_and_a_new_one_must_begin(spool):
    assert group(spool, 10)[-1] == 10
    assert (spool.append(one()), spool.needs_key, spool.pending) == (None, True, 0)
    assert (spool.append(one()), spool.dropped) == (None, 12)
    assert group(spool, 2) == [11, 12]
    assert not spool.needs_key


def test_a_chunk_that_is_larger_than_the_spool(tmp_path):
    spool = Spool(tmp_path, "cam1", limit=100)
    assert (spool.append(one(True)), spool.append(one(True)), spool.dropped, spool.size) == (None, None, 2, 0)
    spool.close()


def test_a_group_alone_may_be_replaced_by_the_next(spool):
    group(spool, 10)
    assert spool.append(one(True)) == 11
    assert held(spool) == [11]


def test_opened_again_it_goes_on_and_ends_the_open_group(spool):
    group(spool)
    stream = spool.stream
    spool.close()
    again = Spool(spool.folder, "cam1", limit=10 * SIZE)
    assert (again.stream, held(again), again.needs_key) == (stream, [1, 2, 3, 4], True)
    assert (again.read(4).ends, again.read(4).packets) == (True, ())
    assert again.append(one()) is None, "an encoder begins anew with a key frame"
    assert again.append(one(True)) == 5
    again.close()
    spool.__init__(spool.folder, "cam1", limit=10 * SIZE)
    assert held(spool) == [1, 2, 3, 4, 5, 6], "5 has an end"


def test_numbers_never_come_again_even_if_all_was_given_up(spool):
    group(spool, 10)
    spool.append(one())
    assert held(spool) == []
    spool.close()
    spool.__init__(spool.folder, "cam1", limit=10 * SIZE)
    assert group(spool, 1) == [11]


def test_another_process_another_camera(spool, tmp_path):
    with pytest.raises(FileProblem, match="in use by another process"):
        Spool(spool.folder, "cam1")
    spool.close()
    with pytest.raises(FileProblem, match="is no spool of camera 'cam2'"):
        Spool(spool.folder, "cam2")
    (tmp_path / "file").write_text("")
    with pytest.raises(FileProblem, match="cannot be used as a spool"):
        Spool(tmp_path / "file", "cam1")
    spool.__init__(spool.folder, "cam1")


@pytest.mark.parametrize("damage", [lambda data: data[:50], lambda data: data[:-1] + b"x", lambda data: b"?"])
def test_a_damaged_last_file_is_removed(spool, damage):
    group(spool)
    spool.close()
    last = spool.folder / f"{3:020}.chunk"
    last.write_bytes(damage(last.read_bytes()))
    (spool.folder / ".00000.partial.chunk").write_bytes(b"half")
    spool.__init__(spool.folder, "cam1")
    assert held(spool) == [1, 2, 3]
    assert (spool.read(3).ends, spool.read(3).packets) == (True, ())
    assert not list(spool.folder.glob(".*"))


def test_a_file_that_is_damaged_in_the_middle_takes_the_rest_of_its_group_along(spool):
    group(spool)
    group(spool)
    (spool.folder / f"{2:020}.chunk").write_bytes(b"?" * 100)
    assert spool.read(2) is None
    assert (held(spool), spool.dropped, spool.needs_key) == ([1, 4, 5, 6], 2, False)
    spool.refuse(5)
    assert (held(spool), spool.needs_key) == ([1, 4], True)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_a_full_spool(spool, monkeypatch, code):
    group(spool)
    group(spool, 2)
    room = [0]
    real = Path.write_bytes

    def write(path, data):
        if len(list(spool.folder.glob("0*.chunk"))) > room[0]:
            raise OSError(code, os.strerror(code))
        return real(path, data)

    monkeypatch.setattr(Path, "write_bytes", write)
    room[0] = 4
    assert spool.append(one()) == 6, "the first group makes room"
    assert held(spool) == [4, 5, 6]
    room[0] = -1
    assert spool.append(one()) is None
    assert (held(spool), spool.needs_key, spool.dropped) == ([], True, 7)
    assert spool.append(one(True)) is None
    room[0] = 100
    assert group(spool, 2) == [7, 8]
    assert not list(spool.folder.glob(".*"))


def test_a_broken_disk_is_an_error(spool, monkeypatch):
    group(spool)

    def fail(path, data):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(FileProblem, match="Input/output error"):
        spool.append(one())
    assert held(spool) == [1, 2, 3]


def test_many_chunks_take_no_time_each(spool, monkeypatch):
    monkeypatch.setattr(module, "_sync", lambda folder: None)
    spool.limit = 10**9
    visited = [0]
    real = module._Entry.__getattribute__

    def counted(entry, name):
        visited[0] += 1
        return real(entry, name)

    group(spool, 300)
    monkeypatch.setattr(module._Entry, "__getattribute__", counted)
    group(spool, 1)
    spool.after(150), spool.read(150), spool.pending
    assert visited[0] < 2000


def test_kill_9_in_the_middle_of_writing(tmp_path):
    """Whatever was there when it was killed is whole; numbers go on."""
    program = """
        import sys
        from helpers import chunk, packet
        from keras_efficient.video.transport import Spool
        spool = Spool(sys.argv[1], "cam1")
        for index in range(10**6):
            begins = index % 5 == 0
            print(spool.append(chunk(begins, packets=[packet(begins, data=bytes(20_000))])), flush=True)
    """
    command = [sys.executable, "-c", textwrap.dedent(program), tmp_path]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    told = [int(process.stdout.readline()) for _ in range(60)]
    process.send_signal(signal.SIGKILL)
    told += [int(line) for line in process.stdout.read().split()]
    process.wait()
    spool = Spool(tmp_path, "cam1")
    found = held(spool)
    assert found == list(range(1, len(found) + 1)), "none is missing"
    assert len(found) >= len(told)
    assert all(spool.read(sequence) is not None for sequence in found)
    assert spool.read(found[-1]).ends
    assert spool.append(one(True)) == found[-1] + 1
    spool.close()
