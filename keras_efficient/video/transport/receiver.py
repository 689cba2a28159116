"""The server's side: many cameras' chunks are decoded, analysed, stored, and only then acknowledged."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from keras_efficient.errors import BadChunk, ConnectionProblem, FileProblem, MissingDependency, WrongArgument
from keras_efficient.video.frames import rgb
from keras_efficient.video.transport import links
from keras_efficient.video.transport.certificates import checked
from keras_efficient.video.transport.chunks import MOST_BYTES, MOST_NUMBER, Chunk, check_camera
from keras_efficient.video.transport.decoding import GroupDecoder
from keras_efficient.video.transport.journal import Journal, Stored
from keras_efficient.video.transport.metrics import Metrics

__all__ = ["Receiver"]

BATCH = 8  # frames that the network sees at once, and that are in memory as pictures
FAILURES = 5  # of the server at one chunk, before it is stored without results
MOST_REASON = 500  # characters of an error that is stored instead
GREETING = 10.0  # seconds in which a connection has to say of which camera it is
SPARE = 8  # threads for those that are not cameras yet: greetings, health checks


class Receiver:
    """Serves cameras.

    ```python
    with transport.Receiver(predict, transport.open_journal("results.sqlite"), insecure=True) as receiver:
        receiver.wait()
    ```

    A camera says its name, hears which chunk of its stream is the last stored one, and sends from the beginning of the
    group that holds the next. One chunk of a camera is worked on at a time, and the next one is read when its answer is
    taken: what a camera sends too fast waits in the camera. A second connection of a camera ends the first.

    A chunk at which `predict` fails, or whose results cannot be stored, comes again when the camera has connected anew.
    At the fifth time it is stored without results, so that its camera goes on: `found` is None, and `error` says why.
    That the journal cannot be reached is no such failure: cameras wait for as long as it takes.

    Args:
        predict: frames (b, h, w, 3) uint8 to b results that JSON can hold.
        journal: where they are stored, each as `{"pts": time stamp of the frame, "found": result}`.
        address: `host:port` to listen at; port 0 takes a free one.
        certificate, key, authority: PEM files; cameras must have a certificate of that authority, and its common name
            is the camera's.
        insecure: without TLS, at a loopback address only.
        cameras: at most so many at once.
        every: one frame in so many is analysed, those whose time stamp is a multiple of it.
        workers: calls of `predict` at the same time.
        idle: seconds after which a camera is cut off that says nothing, or takes no answer.
        on_message: told what happens, in words for people.

    Raises:
        WrongArgument: neither certificates nor `insecure`, or numbers below 1.
        FileProblem: as `certificates.checked`.
        MissingDependency: a package of the extra `video` is not installed.
    """

    def __init__(
        self,
        predict: Callable[[np.ndarray], Sequence[Any]],
        journal: Journal,
        *,
        address: str = "127.0.0.1:50051",
        certificate: str | Path | None = None,
        key: str | Path | None = None,
        authority: str | Path | None = None,
        insecure: bool = False,
        cameras: int = 64,
        every: int = 1,
        workers: int = 1,
        idle: float = 60.0,
        on_message: Callable[[str], None] = lambda text: None,
    ):
        if min(cameras, every, workers) < 1 or idle <= 0:
            raise WrongArgument("`cameras`, `every`, `workers` and `idle` are positive.")
        self.predict, self.journal, self.address = predict, journal, address
        self.cameras, self.every, self.idle, self.on_message = cameras, every, idle, on_message
        self.metrics = Metrics()
        self.is_secure = certificate is not None and key is not None and authority is not None
        if certificate is not None and key is not None and authority is not None:
            own, private, root = checked(certificate, key, authority)
            self._credentials = links.rpc().ssl_server_credentials([(private, own)], root, require_client_auth=True)
        else:
            links.check_plaintext(address, insecure=insecure)
        self._network = threading.BoundedSemaphore(workers)
        self._lock = threading.Lock()
        self._connections: dict[int, _Connection] = {}  # by their identity
        self._failures: dict[str, tuple[tuple[int, int], int]] = {}  # of a camera: at which chunk, and how often
        self._ended = threading.Event()
        self._server: Any = None

    def start(self) -> int:
        """Begins to listen; gives the port.

        Raises:
            ConnectionProblem: the address cannot be listened at.
        """
        grpc = links.rpc()
        try:
            from grpc_health.v1 import health, health_pb2, health_pb2_grpc
        except ImportError as error:
            raise MissingDependency("grpcio-health-checking", "A server for video", "video") from error
        threads = self.cameras + SPARE
        server = grpc.server(
            ThreadPoolExecutor(threads, thread_name_prefix="camera"),
            options=(*links.OPTIONS, ("grpc.so_reuseport", 0)),
            maximum_concurrent_rpcs=threads,
        )
        handler = grpc.stream_stream_rpc_method_handler(self._push)
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(links.SERVICE, {links.METHOD: handler})])
        self._health = health.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        try:
            if self.is_secure:
                port = server.add_secure_port(self.address, self._credentials)
            else:
                port = server.add_insecure_port(self.address)
        except RuntimeError as error:
            problem = f"{self.address} cannot be listened at: is it taken, or no address here?"
            raise ConnectionProblem(problem, hint="Choose another one: --listen HOST:PORT.") from error
        server.start()
        for service in ("", links.SERVICE):
            self._health.set(service, health_pb2.HealthCheckResponse.SERVING)
        self._server = server
        threading.Thread(target=self._watch, name="watch", daemon=True).start()
        return int(port)

    @property
    def is_serving(self) -> bool:
        return self._server is not None and not self._ended.is_set()

    def wait(self) -> None:
        """Until `stop` is called, by another thread."""
        self._ended.wait()

    def stop(self, grace: float = 10.0) -> None:
        """Takes no more cameras, finishes the chunks that are being worked on, and closes the journal.

        Args:
            grace: seconds for that.
        """
        self._ended.set()
        if self._server is not None:
            self._health.enter_graceful_shutdown()
            stopped = self._server.stop(grace)
            self._cut_idle(0)
            stopped.wait()
            self._server = None
        self.journal.close()

    def __enter__(self) -> Receiver:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _push(self, requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
        """One camera's connection, from its greeting to its end, in a thread of its own."""
        status, connection = links.rpc().StatusCode, _Connection(context)
        context.add_callback(lambda: self._forget(connection))
        with self._lock:
            self._connections[id(connection)] = connection
        try:
            yield from self._answers(connection, requests)
        except BadChunk as error:
            context.set_trailing_metadata((("chunk", str(connection.sequence)),))
            self._refuse(connection, status.INVALID_ARGUMENT, str(error))
        except _Refusal as error:
            self._refuse(connection, getattr(status, error.status), str(error))
        except (ConnectionProblem, FileProblem) as error:  # where the journal is, is no camera's business
            self._refuse(connection, status.UNAVAILABLE, str(error), told="The journal cannot be used now.")
        except links.rpc().RpcError:  # the camera has gone
            pass
        except Exception as error:
            if context.is_active():
                self._refuse(connection, status.INTERNAL, f"The server failed: {type(error).__name__}: {error}")
        finally:
            self._forget(connection)

    def _answers(self, connection: _Connection, requests: Iterator[bytes]) -> Iterator[bytes]:
        hello = connection.next(requests)
        if hello is None:
            return
        camera, stream, seen = self._greeted(links.words(hello, limit=links.MOST_WORDS), connection.context)
        self._admit(connection, camera)
        self.on_message(f"Camera {camera} is there.")
        last = self.journal.last(camera, stream)
        yield from connection.give(links.as_words(last=last))
        for stored in self.journal.results(camera, stream, seen) if seen < last else ():
            yield from connection.give(_told(stored))
        decoder = GroupDecoder()
        while (data := connection.next(requests)) is not None:
            connection.sequence = 0
            chunk = Chunk.from_bytes(data)
            connection.sequence = chunk.sequence
            if (chunk.camera, chunk.stream) != (camera, stream):
                raise BadChunk(f"Chunk {chunk.sequence} is of another camera or stream than the greeting.")
            self.metrics.bytes.inc(len(data))
            if chunk.sequence <= last:  # it is here for what follows
                for _ in decoder.frames(chunk):
                    pass
                self.metrics.repeats.inc()
                continue
            try:
                stored = self._stored(decoder, chunk)
            except BadChunk:
                if self.journal.last(camera, stream) < last:  # the chunk is good, and the camera must hear of it
                    raise _Refusal("UNAVAILABLE", f"The journal no longer has chunk {last}.") from None
                raise
            last = chunk.sequence
            yield from connection.give(_told(stored))
            if self._ended.is_set():
                raise _Refusal("UNAVAILABLE", "The server ends.")

    def _greeted(self, hello: dict[str, Any], context: Any) -> tuple[str, int, int]:
        """The camera, its stream, and the last chunk whose results it has seen."""
        camera, stream, seen = (hello.get(name) for name in ("camera", "stream", "seen"))
        numbers = [number for number in (stream, seen) if type(number) is int and 0 <= number < MOST_NUMBER]
        if not isinstance(camera, str) or len(numbers) < 2:
            raise BadChunk("The greeting needs a camera, a stream and what was seen.")
        try:
            check_camera(camera)
        except WrongArgument as error:
            raise BadChunk(error.message) from error
        if self.is_secure:
            owner = [name.decode(errors="replace") for name in context.auth_context().get("x509_common_name", [])]
            if owner != [camera]:
                raise _Refusal(
                    "PERMISSION_DENIED", f"The certificate is of {' '.join(owner)!r}, and not of camera {camera!r}."
                )
        return camera, numbers[0], numbers[1]

    def _admit(self, connection: _Connection, camera: str) -> None:
        with self._lock:
            others = [other for other in self._connections.values() if other.camera]
            for other in others:
                if other.camera == camera:
                    other.cut("Another connection of this camera has come.")
            count = len({other.camera for other in others} - {camera})
            if self._ended.is_set() or count >= self.cameras:
                reason = (
                    "The server ends." if self._ended.is_set() else f"{count} cameras are connected, as many as may."
                )
                raise _Refusal("UNAVAILABLE" if self._ended.is_set() else "RESOURCE_EXHAUSTED", reason)
            connection.camera = camera
            self.metrics.cameras.set(count + 1)

    def _stored(self, decoder: GroupDecoder, chunk: Chunk) -> Stored:
        """Decodes and analyses a chunk, and stores what was found."""
        pts: list[int] = []
        frames = _noted(decoder.frames(chunk), pts)
        try:
            results = self._results(frames)
            stored, analysed = self.journal.store(chunk, results), len(results)
        except (BadChunk, ConnectionProblem):
            raise
        except Exception as error:
            if not self._has_failed_often(chunk):
                raise
            stored, analysed = self._stored_without(error, chunk, frames, pts), 0
        with self._lock:
            self._failures.pop(chunk.camera, None)
        if stored.is_repeat:
            self.metrics.repeats.inc()
        else:
            self.metrics.chunks.inc()
            self.metrics.frames.inc(len(pts))
            self.metrics.analysed.inc(analysed)
            self.metrics.dropped.inc(stored.dropped)
            self.metrics.latency.observe(max(time.time() - chunk.captured, 0))
            if decoder.missing:
                self.metrics.missing.inc(decoder.missing)
                group = f"the group of pictures that ends with chunk {chunk.sequence}"
                self.on_message(f"Camera {chunk.camera}: {decoder.missing} frames of {group} cannot be decoded.")
        return stored

    def _results(self, frames: Iterator[Any]) -> list[dict[str, Any]]:
        results: list[dict[str, Any]] = []
        batch: list[Any] = []
        for frame in frames:
            if frame.pts % self.every == 0:
                batch.append(frame)
            if len(batch) == BATCH:
                results += self._analysed(batch)
                batch = []
        return results + self._analysed(batch)

    def _has_failed_often(self, chunk: Chunk) -> bool:
        """Counts a failure at a chunk."""
        place = (chunk.stream, chunk.sequence)
        with self._lock:
            before, count = self._failures.get(chunk.camera, (place, 0))
            count = count + 1 if before == place else 1
            self._failures[chunk.camera] = (place, count)
        return count >= FAILURES

    def _stored_without(self, error: Exception, chunk: Chunk, frames: Iterator[Any], pts: list[int]) -> Stored:
        """Stores, instead of results, at what the server fails."""
        for _ in frames:  # the group's next chunks need those that were left
            pass
        reason = f"{type(error).__name__}: {error}"[:MOST_REASON]
        wanted: list[int | None] = [number for number in pts if number % self.every == 0]
        marks = [{"pts": number, "found": None, "error": reason} for number in wanted or [None]]
        stored = self.journal.store(chunk, marks)
        self.metrics.failed.inc()
        self.on_message(f"Camera {chunk.camera}: chunk {chunk.sequence} is stored without results: {reason}")
        return stored

    def _analysed(self, batch: list[Any]) -> list[dict[str, Any]]:
        if not batch:
            return []
        pictures = np.stack([rgb(frame) for frame in batch])
        with self.metrics.waiting.track_inprogress():
            self._network.acquire()
        try:
            found = self.predict(pictures)
        finally:
            self._network.release()
        return [{"pts": frame.pts, "found": result} for frame, result in zip(batch, found, strict=True)]

    def _refuse(self, connection: _Connection, status: Any, reason: str, *, told: str | None = None) -> None:
        """Gives a connection's end a reason, and the camera perhaps another."""
        self.metrics.refused.labels(status.name).inc()
        self.on_message(f"Camera {connection.camera or 'of no name yet'}: {reason}")
        connection.context.set_code(status)
        connection.context.set_details(told or " ".join(reason.split()))

    def _forget(self, connection: _Connection) -> None:
        with self._lock:
            if self._connections.pop(id(connection), None) is not None:
                self.metrics.cameras.set(len({c.camera for c in self._connections.values() if c.camera}))

    def _watch(self) -> None:
        """Cuts off who is silent for too long, and when the server ends, whoever it waits for."""
        while not self._ended.wait(min(1.0, self.idle / 4)):
            self._cut_idle(self.idle)

    def _cut_idle(self, seconds: float) -> None:
        with self._lock:
            waiting = [(other, other.waits_since) for other in self._connections.values()]
        for connection, since in waiting:
            limit = seconds if connection.camera else min(seconds, GREETING)
            if since is not None and time.monotonic() - since >= limit:
                connection.cut("It says nothing, or takes no answer.")


class _Connection:
    """A camera's connection, and since when it keeps the server waiting."""

    def __init__(self, context: Any):
        self.context, self.camera, self.sequence = context, "", 0
        self.waits_since: float | None = None

    def next(self, requests: Iterator[bytes]) -> bytes | None:
        self.waits_since = time.monotonic()
        try:
            return next(requests, None)
        finally:
            self.waits_since = None

    def give(self, answer: bytes) -> Iterator[bytes]:
        self.waits_since = time.monotonic()
        yield answer
        self.waits_since = None

    def cut(self, reason: str) -> None:
        self.context.set_details(reason)
        self.context.cancel()


def _noted(frames: Iterator[Any], pts: list[int]) -> Iterator[Any]:
    """The frames; their time stamps are put into a list."""
    for frame in frames:
        pts.append(frame.pts)
        yield frame


def _told(stored: Stored) -> bytes:
    """The acknowledgement of a chunk; results that no message can hold are in the journal only."""
    answer = links.as_words(sequence=stored.sequence, results=stored.results)
    return answer if len(answer) <= MOST_BYTES else links.as_words(sequence=stored.sequence, results=[])


class _Refusal(Exception):
    """Ends a connection for a reason that is not in its chunks."""

    def __init__(self, status: str, reason: str):
        super().__init__(reason)
        self.status = status
