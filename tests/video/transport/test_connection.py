"""Cameras and servers: nothing is lost, doubled or out of order, whatever breaks between them."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import socket
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from keras_efficient.errors import ConnectionProblem, FileProblem, WrongArgument
from keras_efficient.video.transport import Receiver, Sender, Spool, open_journal
from keras_efficient.video.transport import receiver as receiver_module
from keras_efficient.video.transport import sender as sender_module

from .helpers import Proxy, Server, camera, certificates, chunk, files, mean, packet, rows, until, video


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    monkeypatch.setattr(sender_module, "PAUSES", (0.02, 0.5))


@pytest.fixture
def journal(tmp_path):
    return tmp_path / "journal.sqlite"


@pytest.fixture
def serve(journal):
    """Starts servers, and stops them."""
    made = []

    def start(predict=mean, **options):
        options = {"insecure": True, "address": "127.0.0.1:0", "journal": open_journal(journal), **options}
        server = Receiver(predict, options.pop("journal"), **options)
        server.target = f"127.0.0.1:{server.start()}"
        made.append(server)
        return server

    yield start
    for server in made:
        server.stop(1)


def stored(journal, name="cam1"):
    return [row[0] for row in rows(journal, f"SELECT sequence FROM chunks WHERE camera = '{name}' ORDER BY stored")]


def results(journal, name="cam1"):
    found = rows(journal, f"SELECT results FROM chunks WHERE camera = '{name}' ORDER BY sequence")
    return [result for row in found for result in json.loads(row[0])]


def assert_all_there(journal, chunks, name="cam1"):
    assert stored(journal, name) == list(range(1, len(chunks) + 1))
    pts = [result["pts"] for result in results(journal, name)]
    assert pts == list(range(sum(len(one.packets) for one in chunks))), "each frame once, in order"


def said(target, *messages, name="cam1", credentials=None, read=True):
    """A client by hand: the answers; or raises."""
    hello = json.dumps({"camera": name, "stream": 1, "seen": 0}).encode()
    messages = [hello if message is None else message for message in messages]
    with grpc.secure_channel(target, credentials) if credentials else grpc.insecure_channel(target) as channel:
        call = channel.stream_stream("/keras_efficient.Video/Push")(iter(messages), timeout=20)
        return [json.loads(answer) for answer in call]


def refusal(*arguments, **options):
    with pytest.raises(grpc.RpcError) as caught:
        said(*arguments, **options)
    return caught.value.code().name, caught.value.details()


@pytest.mark.parametrize("b_frames", [0, 3])
def test_results_of_each_frame_once(serve, journal, tmp_path, b_frames):
    server = serve()
    chunks = video(b_frames=b_frames)
    with camera(tmp_path, "cam1", server.target) as (sender, told):
        assert [sender.send(one) for one in chunks] == list(range(1, len(chunks) + 1))
        assert sender.close(20) == 0
    assert_all_there(journal, chunks)
    assert [sequence for sequence, _ in told] == stored(journal)
    assert [result for _, found in told for result in found] == results(journal)
    assert all(0 < result["found"] < 255 for result in results(journal))
    assert sum(row[0] for row in rows(journal, "SELECT frames FROM chunks")) == 40
    assert sender.resent == sender.spool.dropped == 0


@pytest.mark.parametrize("needy", [False, True])
def test_frames_of_groups_of_h265(serve, journal, tmp_path, needy):
    """All arrive. Of groups that need those before them, which ours do not, it is told what is missing."""
    said = []
    server = serve(on_message=said.append)
    chunks = video(60, 20, b_frames=3, codec="libx265", open=needy)
    assert sum(one.begins for one in chunks) >= 3
    with camera(tmp_path, "cam1", server.target) as (sender, _):
        for one in chunks:
            sender.send(one)
        assert sender.close(20) == 0
    assert stored(journal) == list(range(1, len(chunks) + 1))
    missing = 60 - len(results(journal))
    assert (
        server.metrics.missing._value.get()
        == missing
        == sum(int(re.search(r"(\d+) frames of the group", text)[1]) for text in said if "cannot be decoded" in text)
    )
    assert (missing > 0) == needy


def test_one_frame_in_so_many(serve, journal, tmp_path):
    with camera(tmp_path, "cam1", serve(every=4).target) as (sender, _):
        for one in video(b_frames=3):
            sender.send(one)
        sender.close(20)
    assert [result["pts"] for result in results(journal)] == list(range(0, 40, 4))


def test_several_cameras_at_once_with_tls(serve, journal, tmp_path):
    names = [f"cam{number}" for number in range(8)]
    folder = certificates(tmp_path / "certificates", *names)
    server = serve(insecure=False, **files(folder, "server"))
    left = {}

    def work(number, name):
        with camera(tmp_path, name, server.target, **files(folder, name)) as (sender, _):
            for one in video(seed=number):
                sender.send(one)
            left[name] = sender.close(40)

    threads = [threading.Thread(target=work, args=pair) for pair in enumerate(names)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert left == dict.fromkeys(names, 0)
    for number, name in enumerate(names):
        assert_all_there(journal, video(seed=number), name)


def test_nothing_is_acknowledged_before_it_is_stored(serve, tmp_path, journal):
    real = open_journal(journal)
    refusing, asked = threading.Event(), threading.Event()
    refusing.set()

    class Slow:
        last, results, close = real.last, real.results, real.close

        def store(self, one, found):
            asked.set()
            if refusing.is_set():
                raise ConnectionProblem("The journal cannot be used now.")
            return real.store(one, found)

    server = serve(journal=Slow())
    with camera(tmp_path, "cam1", server.target) as (sender, told):
        for one in video():
            sender.send(one)
        assert asked.wait(10)
        until(lambda: sender.problem)
        assert "The journal cannot be used now" in sender.problem
        assert (told, sender.spool.acknowledged) == ([], 0)
        refusing.clear()
        assert sender.close(20) == 0
    assert_all_there(journal, video())


def test_a_link_that_is_cut(serve, journal, tmp_path):
    """Again and again, at any moment."""
    server = serve(lambda frames: time.sleep(0.005) or mean(frames))
    proxy = Proxy(int(server.target.rpartition(":")[2]))
    chunks, asked = video(400, 40), 0
    with camera(tmp_path, "cam1", proxy.target) as (sender, told):
        for number, one in enumerate(chunks):
            sender.send(one)
            if number in (20, 40, 60):
                proxy.cut()
                time.sleep(0.2)
                proxy.restore()
                until(lambda: sender.wants_key or not sender.spool.pending)
                asked += sender.wants_key
        assert sender.close(40) == 0
    assert asked > 0, "for a key frame, after a reconnection"
    proxy.close()
    assert_all_there(journal, chunks)
    assert [sequence for sequence, _ in told] == stored(journal)
    assert [result for _, found in told for result in found] == results(journal)
    assert sender.resent > 0


def test_a_server_that_is_killed_and_restarted(journal, tmp_path):
    """Twice, while several cameras send."""
    server = Server(journal)
    cameras = {f"cam{number}": video(400, 40, seed=number) for number in range(4)}
    with contextlib.ExitStack() as stack:
        senders = {name: stack.enter_context(camera(tmp_path, name, f"127.0.0.1:{server.port}"))[0] for name in cameras}
        for name, sender in senders.items():
            for one in cameras[name]:
                sender.send(one)
        for _ in range(2):
            before = [sender.spool.acknowledged for sender in senders.values()]
            until(
                lambda before=before: any(
                    s.spool.acknowledged > n for s, n in zip(senders.values(), before, strict=True)
                )
            )
            server.kill()
            server = Server(journal, server.port)
        assert [sender.close(40) for sender in senders.values()] == [0] * len(cameras)
    server.kill()
    assert sum(sender.resent for sender in senders.values()) > 0
    for name, chunks in cameras.items():
        assert_all_there(journal, chunks, name)
        crcs = rows(journal, f"SELECT crc FROM chunks WHERE camera = '{name}' ORDER BY sequence")
        assert [row[0] for row in crcs] == [one.crc for one in chunks]


def test_a_camera_goes_from_a_killed_server_to_another(postgres, tmp_path):
    """Two processes share a journal in PostgreSQL; a balancer leads to one of them."""
    url = postgres.new("shared")
    servers = [Server(url), Server(url)]
    proxy = Proxy(servers[0].port)
    chunks = video(400, 40)
    with (
        camera(tmp_path, "cam1", proxy.target) as (sender, told),
        camera(tmp_path, "cam2", f"127.0.0.1:{servers[1].port}") as (other, _),
    ):
        for one in chunks:
            sender.send(one)
            other.send(one)
        until(lambda: sender.spool.acknowledged > 5)
        proxy.port = servers[1].port
        servers[0].kill()
        assert sender.close(40) == other.close(40) == 0
    servers[1].kill()
    proxy.close()
    for name in ("cam1", "cam2"):
        found = rows(url, f"SELECT sequence FROM chunks WHERE camera = '{name}' ORDER BY stored")
        assert [row[0] for row in found] == list(range(1, len(chunks) + 1))
        pts = [
            r["pts"]
            for row in rows(url, f"SELECT results FROM chunks WHERE camera = '{name}' ORDER BY sequence")
            for r in json.loads(row[0])
        ]
        assert pts == list(range(400))
    assert [sequence for sequence, _ in told] == list(range(1, len(chunks) + 1))


def test_a_camera_that_was_killed_sends_the_rest_the_next_time(serve, journal, tmp_path):
    spool = Spool(tmp_path / "cam1", "cam1")
    for one in video()[:5]:
        spool.append(one)
    spool.close()
    with camera(tmp_path, "cam1", serve().target) as (sender, told):
        for one in video(seed=1):
            sender.send(one)
        assert sender.close(20) == 0
    assert stored(journal) == list(range(1, 5 + 1 + len(video(seed=1)) + 1)), "the open group got an end"
    assert [sequence for sequence, _ in told] == stored(journal)
    again = [result["pts"] for result in results(journal)].index(0, 1)
    assert again == sum(len(one.packets) for one in video()[:5])


def test_groups_that_a_full_spool_gave_up_are_a_gap_that_is_told(serve, journal, tmp_path):
    chunks = video(400, 40)
    size = sum(len(one.to_bytes()) + 4 for one in chunks) // 2
    spool = Spool(tmp_path / "cam1", "cam1", limit=size)
    for one in chunks:
        spool.append(one)
    assert spool.dropped > 0
    spool.close()
    server = serve()
    with camera(tmp_path, "cam1", server.target, limit=size) as (sender, _):
        assert sender.close(20) == 0
    found = stored(journal)
    assert found == list(range(found[0], len(chunks) + 1))
    assert rows(journal, "SELECT sum(dropped) FROM chunks") == [(spool.dropped,)]
    assert server.metrics.dropped._value.get() == spool.dropped


@pytest.mark.parametrize("had", [0, 5, 11])
def test_a_journal_that_is_lost_or_rolled_back(serve, journal, tmp_path, had):
    """What the camera still has is stored there, in order; what it has no more is counted as lost to that journal."""
    chunks, middle, begins = video(100, 20), 12, 11
    assert [one.begins for one in chunks[begins - 1 : middle + 1]] == [True, False, False]
    heard, other, total = [], tmp_path / "other.sqlite", len(chunks)
    proxy = Proxy(int(serve().target.rpartition(":")[2]))
    with camera(tmp_path, "cam1", proxy.target, insecure=True, on_message=heard.append) as (sender, told):
        for one in chunks[:middle]:
            sender.send(one)
        until(lambda: not sender.spool.pending)
        proxy.cut()
        proxy.port = int(serve(journal=open_journal(other)).target.rpartition(":")[2])
        if had:
            rows(other, f"INSERT INTO streams VALUES ('cam1', {sender.spool.stream}, {had})")
        for one in chunks[middle : middle + 1]:
            sender.send(one)
        proxy.restore()
        until(lambda: not sender.spool.pending)
        for one in chunks[middle + 1 :]:
            sender.send(one)
        assert sender.close(20) == 0
    proxy.close()
    first = max(begins, had + 1)
    assert stored(other) == list(range(first, total + 1))
    dropped = [row[0] for row in rows(other, "SELECT dropped FROM chunks ORDER BY sequence")]
    assert dropped == [first - 1 - had, *[0] * (total - first)]
    pts = [result["pts"] for result in results(other)]
    assert pts == list(range(pts[0], 100))
    assert pts[0] == min(p.pts for p in chunks[begins - 1].packets) or had == begins
    assert [sequence for sequence, _ in told] == list(range(1, total + 1)), "results are told once"
    assert sender.spool.dropped == 0
    assert any(f"no longer has chunks {had + 1} to {middle}: what the spool" in text for text in heard)


def test_a_journal_that_is_rolled_back_under_a_connection(serve, journal, tmp_path):
    server, chunks = serve(), video(100, 20)
    with camera(tmp_path, "cam1", server.target) as (sender, _):
        for one in chunks[:12]:
            sender.send(one)
        until(lambda: not sender.spool.pending)
        rows(journal, "UPDATE streams SET last = 11")
        rows(journal, "DELETE FROM chunks WHERE sequence > 11")
        for one in chunks[12:]:
            sender.send(one)
        assert sender.close(20) == 0
    assert_all_there(journal, chunks)
    assert sender.spool.dropped == server.metrics.dropped._value.get() == 0


def test_garbage_at_the_port(serve, journal, tmp_path):
    folder = certificates(tmp_path / "certificates", "cam1")
    for server, kind in ((serve(), {}), (serve(insecure=False, **files(folder, "server")), files(folder, "cam1"))):
        host, port = server.target.split(":")
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(os.urandom(10_000))
        with camera(tmp_path / str(len(kind)), "cam1", server.target, **kind) as (sender, _):
            for one in video():
                sender.send(one)
            assert sender.close(20) == 0


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([os.urandom(10_000)], "no JSON object"),
        ([b"[" * 4000], "no JSON object"),
        ([b"[1]"], "no JSON object"),
        ([b"{}"], "greeting needs"),
        ([b'{"camera": "../x", "stream": 1, "seen": 0}'], "no name of a camera"),
        ([b'{"camera": "cam1", "stream": 1e3, "seen": 0}'], "greeting needs"),
        ([b'{"camera": "cam1", "stream": 99999999999999999999, "seen": 0}'], "greeting needs"),
        ([None, os.urandom(10_000)], "they begin otherwise"),
        ([None, chunk(True, camera="cam2", stream=1, sequence=1).to_bytes()], "of another camera"),
        ([None, chunk(True, camera="cam1", stream=2, sequence=1).to_bytes()], "of another camera or stream"),
        ([None, chunk(False, camera="cam1", stream=1, sequence=1).to_bytes()], "whose beginning did not come"),
        ([None, chunk(True, camera="cam1", stream=1, sequence=1).to_bytes()], "cannot be decoded"),
    ],
)
def test_messages_that_are_refused(serve, messages, words):
    server = serve()
    status, reason = refusal(server.target, *messages)
    assert status == "INVALID_ARGUMENT"
    assert words in reason
    assert said(server.target, None) == [{"last": 0}]


def test_a_message_that_is_too_large(serve):
    server = serve()
    assert refusal(server.target, None, bytes(9 << 20))[0] == "RESOURCE_EXHAUSTED"
    assert said(server.target, None) == [{"last": 0}]


def test_a_size_that_changes(serve, journal, tmp_path):
    """Within a group it is refused, and the group is given up; with the next group it may."""
    small, large = video(20, 10), video(20, 10, width=96)
    liar = [dataclasses.replace(one, width=96) for one in small[:2]]
    mixed = [small[0], large[1]]
    for name, wrong, words in (
        ("cam1", liar, "has frames of 64×48, and says 96×48"),
        ("cam2", mixed, "within a group"),
    ):
        heard = []
        with camera(tmp_path, name, serve().target, insecure=True, on_message=heard.append) as (sender, _):
            for one in (*wrong, *large, *small):
                sender.send(one)
            assert sender.close(20) == 0
        assert any(words in text for text in heard), heard
        kept = [one for one in wrong if words not in heard[1] or one is small[0]] if name == "cam2" else []
        first = len(wrong) + 1
        assert stored(journal, name) == [*range(1, len(kept[:1]) + 1), *range(first, first + len(large) + len(small))]
        assert sender.spool.dropped == len(wrong) - len(kept[:1])


def test_video_that_cannot_be_decoded_does_not_hold_up_the_rest(serve, journal, tmp_path):
    broken = [chunk(True, packets=[packet(True, data=os.urandom(500))])]
    server = serve()
    with camera(tmp_path, "cam1", server.target) as (sender, _), camera(tmp_path, "cam2", server.target) as (good, _):
        for one in (*video(), *broken, *video(seed=1)):
            sender.send(one)
        for one in video():
            good.send(one)
        assert sender.close(20) == good.close(20) == 0
    missing = len(video()) + 1
    assert stored(journal) == [n for n in range(1, missing + len(video(seed=1)) + 1) if n != missing]
    assert_all_there(journal, video(), "cam2")


def test_a_client_that_never_reads(serve, tmp_path):
    server = serve(lambda frames: ["x" * 300_000] * len(frames), idle=1.0)
    chunks = [
        dataclasses.replace(one, camera="cam1", stream=1, sequence=number).to_bytes()
        for number, one in enumerate(video(200, 40), 1)
    ]
    done = threading.Event()

    def messages():
        yield json.dumps({"camera": "cam1", "stream": 1, "seen": 0}).encode()
        yield from chunks
        done.wait(30)

    with grpc.insecure_channel(server.target) as channel:
        call = channel.stream_stream("/keras_efficient.Video/Push")(messages())
        until(lambda: b"cameras 1.0" in server.metrics.page())
        until(lambda: b"cameras 0.0" in server.metrics.page())
        assert not call.is_active() or call.cancel()
        done.set()
    stored_now = server.metrics.chunks._value.get()
    assert stored_now < len(chunks), "it is not worked for a client that takes nothing"


def test_a_client_that_says_nothing(serve):
    server = serve(idle=0.5)
    done = threading.Event()
    with grpc.insecure_channel(server.target) as channel:
        call = channel.stream_stream("/keras_efficient.Video/Push")(iter(lambda: done.wait(20), None))
        with pytest.raises(grpc.RpcError):
            next(call)
        done.set()


def test_too_many_cameras(serve, tmp_path):
    server = serve(cameras=2)
    with camera(tmp_path, "cam1", server.target) as (one, _), camera(tmp_path, "cam2", server.target) as (two, _):
        for sender in (one, two):
            sender.send(video()[0])
        until(lambda: one.spool.acknowledged and two.spool.acknowledged)
        status, reason = refusal(server.target, None, name="cam3")
        assert (status, reason) == ("RESOURCE_EXHAUSTED", "2 cameras are connected, as many as may.")
        with camera(tmp_path, "cam3", server.target) as (three, _):
            three.send(video()[0])
            until(lambda: three.problem)
            one.close(5)
            until(lambda: three.spool.acknowledged)


def test_the_second_connection_of_a_camera_ends_the_first(serve, tmp_path):
    server = serve()
    with (
        camera(tmp_path / "a", "cam1", server.target) as (first, _),
        camera(tmp_path / "b", "cam1", server.target) as (
            second,
            _,
        ),
    ):
        first.send(video()[0])
        until(lambda: first.spool.acknowledged)
        second.send(video()[0])
        until(lambda: second.spool.acknowledged)
        until(lambda: first.problem)
        assert b"cameras 1.0" in server.metrics.page()
        first.send(video()[1])
        until(lambda: first.spool.acknowledged == 2)


def test_a_network_that_fails_for_a_while(serve, journal, tmp_path):
    failures, heard = iter(range(receiver_module.FAILURES - 1)), []

    def predict(frames):
        if next(failures, None) is not None:
            raise RuntimeError("out of memory")
        return mean(frames)

    server = serve(predict)
    with camera(tmp_path, "cam1", server.target, insecure=True, on_message=heard.append) as (sender, _):
        for one in video():
            sender.send(one)
        assert sender.close(20) == 0
    assert any("The server failed: RuntimeError: out of memory" in text for text in heard)
    assert_all_there(journal, video())
    assert not any("error" in result for result in results(journal))
    assert server.metrics.failed._value.get() == 0


@pytest.mark.parametrize(
    ("fail", "words"),
    [
        (lambda frames: 1 / 0, "ZeroDivisionError: division by zero"),
        (lambda frames: [], r"ValueError: zip\(\)"),
        (lambda frames: [object()] * len(frames), "TypeError: .* not JSON serializable"),
    ],
)
def test_a_chunk_at_which_the_server_always_fails_does_not_hold_up_its_camera(serve, journal, tmp_path, fail, words):
    """It has the error instead of results, and the rest of its group has results."""
    chunks, wrong, tries = video(100, 20), 12, []
    assert (chunks[wrong - 1].begins, chunks[wrong - 1].ends) == (False, False)

    def predict(frames):
        if stored(journal)[-1:] == [wrong - 1]:
            tries.append(len(frames))
            return fail(frames)
        return mean(frames)

    server = serve(predict)
    with camera(tmp_path, "cam1", server.target) as (sender, told):
        for one in chunks:
            sender.send(one)
        assert sender.close(20) == 0
    assert len(tries) == receiver_module.FAILURES
    assert_all_there(journal, chunks)
    marked = [(sequence, result) for sequence, found in told for result in found if "error" in result]
    assert {sequence for sequence, _ in marked} == {wrong}
    assert [result for _, result in marked] == dict(told)[wrong]
    for _, result in marked:
        assert result["found"] is None
        assert re.match(words, result["error"])
    assert all(result["found"] > 0 for result in results(journal) if "error" not in result)
    assert (server.metrics.failed._value.get(), server.metrics.analysed._value.get()) == (1, 100 - len(marked))
    assert sender.spool.dropped == 0


def test_a_journal_that_cannot_be_reached_for_long_costs_no_results(serve, journal, tmp_path):
    real, tries = open_journal(journal), []

    class Away:
        last, results, close = real.last, real.results, real.close

        def store(self, one, found):
            tries.append(one.sequence)
            if len(tries) < 2 * receiver_module.FAILURES:
                raise ConnectionProblem("The journal at 10.0.0.1 cannot be used now.")
            return real.store(one, found)

    said, heard = [], []
    server = serve(journal=Away(), on_message=said.append)
    with camera(tmp_path, "cam1", server.target, insecure=True, on_message=heard.append) as (sender, _):
        for one in video():
            sender.send(one)
        assert sender.close(20) == 0
    assert any("10.0.0.1" in text for text in said), "the server's owner is told where"
    assert any("The journal cannot be used now" in text for text in heard)
    assert not any("10.0.0.1" in text for text in heard), "and the camera is not"
    assert_all_there(journal, video())
    assert not any("error" in result for result in results(journal))


def test_results_that_no_message_can_hold_are_in_the_journal_only(serve, journal, tmp_path):
    with camera(tmp_path, "cam1", serve(lambda frames: ["x" * 3_000_000] * len(frames)).target) as (sender, told):
        for one in video(10, 10):
            sender.send(one)
        assert sender.close(20) == 0
    assert told[0] == (1, [])
    assert len(results(journal)[0]["found"]) == 3_000_000


def test_stopping_finishes_what_is_begun(serve, journal, tmp_path):
    begun, go = threading.Event(), threading.Event()

    def predict(frames):
        begun.set()
        go.wait(10)
        return mean(frames)

    server = serve(predict)
    with camera(tmp_path, "cam1", server.target) as (sender, _), camera(tmp_path, "cam2", server.target):
        for one in video():
            sender.send(one)
        assert begun.wait(10)
        stopping = threading.Thread(target=server.stop)
        start = time.monotonic()
        stopping.start()
        time.sleep(0.3)
        assert not server.is_serving
        go.set()
        stopping.join(10)
        assert time.monotonic() - start < 5
        assert stored(journal) == [1]
        until(lambda: sender.spool.acknowledged == 1)
        until(lambda: sender.problem)


def test_health_and_metrics(serve, tmp_path):
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    server = serve()
    page = server.metrics.listen("127.0.0.1", 0, lambda: server.is_serving)
    place = f"http://127.0.0.1:{page.server_address[1]}"

    def get(path):
        with urllib.request.urlopen(place + path, timeout=5) as answer:
            return answer.read().decode()

    with camera(tmp_path, "cam1", server.target) as (sender, _):
        for one in video():
            sender.send(one)
        sender.close(20)
    with grpc.insecure_channel(server.target) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", "keras_efficient.Video"):
            answer = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=5)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
    values = dict(line.rsplit(" ", 1) for line in get("/metrics").splitlines() if not line.startswith("#"))
    of = {name.removeprefix("keras_efficient_video_"): float(value) for name, value in values.items()}
    assert (of["frames_total"], of["analysed_total"], of["chunks_total"]) == (40, 40, len(video()))
    assert of["bytes_total"] > sum(len(p.data) for one in video() for p in one.packets)
    assert (of["latency_seconds_count"], of["cameras"], of["waiting"]) == (len(video()), 0, 0)
    assert get("/healthz") == "serving\n"
    for path, code in (("/etc/passwd", 404), ("/healthz", 503)):
        if code == 503:
            server.stop()
        with pytest.raises(urllib.error.HTTPError) as caught:
            get(path)
        assert caught.value.code == code
    with pytest.raises(ConnectionProblem, match="Metrics cannot be served"):
        server.metrics.listen("127.0.0.1", page.server_address[1], bool)
    page.shutdown()


def test_tls_is_needed(serve, tmp_path):
    for insecure, address, words in (
        (False, "127.0.0.1:0", "not sent without TLS"),
        (True, "0.0.0.0:0", "0.0.0.0:0 is not this machine"),
        (True, "[::]:0", "is not this machine"),
        (True, "camera.example:0", "is not this machine"),
    ):
        with pytest.raises(WrongArgument, match=words.replace("[", r"\[")):
            Receiver(mean, None, address=address, insecure=insecure)
        with pytest.raises(WrongArgument, match=words):
            Sender(address, Spool(tmp_path / f"{insecure}{address}", "cam1"), insecure=insecure)
    with pytest.raises(WrongArgument, match="are positive"):
        Receiver(mean, None, insecure=True, cameras=0)


def test_who_may_not(serve, journal, tmp_path):
    """Each is told why, and the others go on."""
    folder = certificates(tmp_path / "certificates", "cam1", "cam2")
    foreign = certificates(tmp_path / "foreign", "cam1")
    server = serve(insecure=False, **files(folder, "server"))
    own = files(folder, "cam1")
    spools = iter(range(100))

    def problem(name="cam1", **kind):
        with camera(tmp_path / str(next(spools)), name, server.target, **kind) as (sender, _):
            sender.send(video()[0])
            until(lambda: sender.problem)
            return sender.problem

    with pytest.raises(WrongArgument, match=r"cam2\.pem is of 'cam2', and not of camera 'cam1'"):
        problem("cam1", **files(folder, "cam2"))
    with pytest.raises(FileProblem, match="is not signed by"):
        problem(**{**files(foreign, "cam1"), "authority": folder / "authority.pem"})
    assert "not of the authority that was given" in problem(**files(foreign, "cam1"))
    both = tmp_path / "both.pem"
    both.write_bytes((folder / "authority.pem").read_bytes() + (foreign / "authority.pem").read_bytes())
    assert "closed at once, as TLS does to a camera without a certificate" in problem(
        **{**files(foreign, "cam1"), "authority": both}
    )
    assert "closed at once, as TLS does" in problem(insecure=True)
    root, key, certificate = (own[name].read_bytes() for name in ("authority", "key", "certificate"))
    assert refusal(server.target, None, credentials=grpc.ssl_channel_credentials(root))[0] == "UNAVAILABLE"
    full = grpc.ssl_channel_credentials(root, key, certificate)
    assert refusal(server.target, None, name="cam2", credentials=full) == (
        "PERMISSION_DENIED",
        "The certificate is of 'cam1', and not of camera 'cam2'.",
    )
    with camera(tmp_path / "good", "cam1", server.target, **own) as (sender, _):
        for one in video():
            sender.send(one)
        assert sender.close(20) == 0
    assert_all_there(journal, video())


@pytest.mark.parametrize("secure", [False, True])
@pytest.mark.parametrize("end", ["stop", "cut"])
def test_the_end_of_a_server_that_was_there_is_told_as_such(serve, tmp_path, secure, end):
    folder = certificates(tmp_path / "certificates", "cam1")
    kinds = [files(folder, name) if secure else {"insecure": True} for name in ("server", "cam1")]
    server, heard = serve(**{"insecure": False, **kinds[0]}), []
    proxy = Proxy(int(server.target.rpartition(":")[2]))
    with camera(tmp_path, "cam1", proxy.target, on_message=heard.append, **kinds[1]) as (sender, _):
        sender.send(video()[0])
        until(lambda: sender.spool.acknowledged)
        server.stop(1) if end == "stop" else proxy.cut()
        until(lambda: sender.problem)
    proxy.close()
    assert heard[1] == f"{proxy.target}: the connection ended."


def test_a_server_that_refuses_for_good_ends_the_tries(serve, tmp_path, monkeypatch):
    folder = certificates(tmp_path / "certificates", "cam1", "cam2")
    server = serve(insecure=False, **files(folder, "server"))
    monkeypatch.setattr(sender_module, "common_name", lambda certificate: "cam2")
    with camera(tmp_path, "cam2", server.target, **files(folder, "cam1")) as (sender, _):
        sender.send(video()[0])
        until(lambda: not sender._thread.is_alive())
        with pytest.raises(ConnectionProblem, match="refuses camera cam2: The certificate is of 'cam1'"):
            sender.send(video()[1])
        assert sender.close(5) == 1


def test_an_expired_certificate_is_named_before_dialling(tmp_path, monkeypatch):
    from .test_certificates import shifted

    folder = certificates(tmp_path / "certificates", "cam1")
    shifted(monkeypatch, 400)
    for kind in (
        lambda: Receiver(mean, None, **files(folder, "server")),
        lambda: Sender("x:1", Spool(tmp_path / "s", "cam1"), **files(folder, "cam1")),
    ):
        with pytest.raises(FileProblem, match="expired on"):
            kind()


def test_an_address_that_is_taken(serve):
    server = serve()
    with pytest.raises(ConnectionProblem, match="cannot be listened at"):
        serve(address=server.target)


def test_a_server_that_does_not_answer(tmp_path):
    """A listener that takes connections and says nothing is no server."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        target = f"127.0.0.1:{listener.getsockname()[1]}"
        start = time.monotonic()
        with camera(tmp_path, "cam1", target, insecure=True, patience=1.0) as (sender, _):
            for one in video():
                sender.send(one)
            assert time.monotonic() - start < 5, "sending does not wait for it"
            until(lambda: sender.problem)
            assert sender.close(0.1) == len(video())


def test_a_server_that_takes_chunks_and_never_answers(tmp_path):
    grpc_server = grpc.server(ThreadPoolExecutor(4))
    end = threading.Event()
    handler = grpc.stream_stream_rpc_method_handler(lambda requests, context: iter(lambda: end.wait(20) and b"", b""))
    grpc_server.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler("keras_efficient.Video", {"Push": handler})]
    )
    target = f"127.0.0.1:{grpc_server.add_insecure_port('127.0.0.1:0')}"
    grpc_server.start()
    with camera(tmp_path, "cam1", target, insecure=True, patience=0.5) as (sender, _):
        sender.send(video()[0])
        until(lambda: sender.problem)
        assert sender.problem == f"{target} does not answer."
    end.set()
    grpc_server.stop(0)


def test_the_server_works_on_one_chunk_of_a_camera_at_a_time(serve, tmp_path):
    """What is sent faster stays with the camera: at most the window is under way."""
    gate = threading.Semaphore(0)
    server = serve(lambda frames: gate.acquire(timeout=10) and mean(frames))
    with camera(tmp_path, "cam1", server.target) as (sender, _):
        for one in video(200, 40):
            sender.send(one)
        until(lambda: sender.sent == sender_module.WINDOW)
        time.sleep(0.3)
        assert sender.sent == sender_module.WINDOW
        for _ in range(1000):
            gate.release()
        assert sender.close(20) == 0
    assert receiver_module.BATCH >= 5


def test_a_second_run_is_not_told_what_the_first_one_heard(serve, tmp_path):
    server = serve()
    chunks = video(40, 10)
    for run in range(2):
        with camera(tmp_path, "cam1", server.target) as (sender, told):
            for one in chunks:
                sender.send(one)
            assert sender.close(20) == 0
        if run:
            assert [sequence for sequence, _ in told] == list(range(len(chunks) + 1, 2 * len(chunks) + 1))
