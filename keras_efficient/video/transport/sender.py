"""The camera's side: what is in the spool goes to the server, in order, over however many connections that takes."""

from __future__ import annotations

import dataclasses
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from keras_efficient.errors import BadChunk, ConnectionProblem, KerasEfficientError, WrongArgument
from keras_efficient.video.transport.certificates import checked, common_name
from keras_efficient.video.transport.chunks import Chunk
from keras_efficient.video.transport.links import METHOD, OPTIONS, SERVICE, as_words, check_plaintext, rpc, words
from keras_efficient.video.transport.spool import Spool

__all__ = ["Sender", "check_identity"]

WINDOW = 8  # chunks sent and not acknowledged
PAUSES = (0.1, 10.0)  # seconds before the next try: the first, and the longest
REASONS = {  # from gRPC's words
    "Connection refused": "nothing listens there.",
    "Hostname Verification": "the server's certificate is for other names.",
    "CERTIFICATE_VERIFY_FAILED": "the server's certificate is expired, or not of the authority that was given.",
    "Socket closed": "the connection was closed at once, as TLS does to a camera without a certificate that is taken.",
    "DNS resolution failed": "there is no such host.",
}
ENDED = ("Socket closed", "Cancelling all calls", "Connection reset")  # of a server that was there
HOPELESS = ("PERMISSION_DENIED", "UNAUTHENTICATED", "UNIMPLEMENTED")  # another try would end the same


def check_identity(camera: str, certificate: str | Path, key: str | Path, authority: str | Path) -> None:
    """Refuses a certificate that is not a camera's, before anything else is done.

    Raises:
        WrongArgument: it is of another one.
        FileProblem: as `certificates.checked`.
    """
    name = common_name(checked(certificate, key, authority)[0])
    if name != camera:
        raise WrongArgument(f"{certificate} is of {name!r}, and not of camera {camera!r}.")


class Sender:
    """Sends a spool to a server, from a thread of its own.

    ```python
    spool = transport.Spool("spool", "cam1")
    sender = transport.Sender("server:50051", spool, certificate="cam1.pem", key="cam1.key", authority="authority.pem")
    for chunk in transport.chunked(packets, "libx264", 1280, 720, Fraction(30)):
        sender.send(chunk)
    left = sender.close(10)
    ```

    Args:
        target: `host:port` of the server.
        spool: the camera's.
        certificate, key, authority: PEM files; the common name of the certificate is the camera's.
        insecure: without TLS, to a loopback address only.
        on_results: called with a sequence and the results of its chunk, in order, each once, from the sender's thread;
            after a restart, from what the spool holds on.
        on_message: told what happens, in words for people.
        patience: seconds after which a server that does not answer is left.

    Attributes:
        problem: why the last connection ended, until a chunk is acknowledged again.
        sent, resent: chunks, and how many of them had been sent before.

    Raises:
        WrongArgument: neither certificates nor `insecure`, or a certificate of another camera.
        FileProblem: as `certificates.checked`.
        MissingDependency: grpcio is not installed.
    """

    def __init__(
        self,
        target: str,
        spool: Spool,
        *,
        certificate: str | Path | None = None,
        key: str | Path | None = None,
        authority: str | Path | None = None,
        insecure: bool = False,
        on_results: Callable[[int, list[Any]], None] = lambda sequence, results: None,
        on_message: Callable[[str], None] = lambda text: None,
        patience: float = 60.0,
    ):
        self.target, self.spool, self.patience = target, spool, patience
        self.on_results, self.on_message = on_results, on_message
        self.problem: str | None = None
        self.sent = self.resent = 0
        self._files: tuple[str | Path, str | Path, str | Path] | None = None
        if certificate is not None and key is not None and authority is not None:
            self._files = (certificate, key, authority)
            check_identity(spool.camera, *self._files)
        else:
            check_plaintext(target, insecure=insecure)
            rpc()
        self._end: KerasEfficientError | None = None  # why there is no further try
        self._is_new = False  # a connection whose server has not seen a key frame
        self._closing, self._stopped = threading.Event(), threading.Event()
        # What was stored in an earlier run, before what the spool holds, is not told again.
        self._seen = (spool.after(0) or spool.last + 1) - 1
        self._newest = 0
        self._link = _Link()
        self._thread = threading.Thread(target=self._run, name="sender", daemon=True)
        self._thread.start()

    def send(self, chunk: Chunk) -> int | None:
        """Puts a chunk into the spool, which takes a write to the disk; `None` where there was no room for it.

        Raises:
            ConnectionProblem: the server refuses this camera for good. The spool keeps what it has.
        """
        if self._end is not None:
            raise self._end
        if chunk.begins:
            self._is_new = False
        return self.spool.append(chunk)

    @property
    def wants_key(self) -> bool:
        """Whether the encoder should make a key frame: after a reconnection, or when the spool gave up a group.

        It holds until a chunk that begins a group is sent, so ask for one key frame each time it becomes true.
        """
        return self._is_new or self.spool.needs_key

    def close(self, timeout: float = 10.0) -> int:
        """Waits until all is acknowledged, ends the connection, and says how many chunks stay in the spool."""
        limit = time.monotonic() + timeout
        while self.spool.pending and self._end is None and (left := limit - time.monotonic()) > 0:
            self.spool.wait(min(left, 0.5))
        self._closing.set()
        self.spool.wake()
        self._thread.join(max(limit - time.monotonic(), 1.0))
        self._stopped.set()
        if self._link.call is not None:
            self._link.call.cancel()
        self.spool.wake()
        self._thread.join(5)
        return self.spool.pending

    def _run(self) -> None:
        tries = 0
        while not self._closing.is_set():
            if not self.spool.pending:
                self.spool.wait(1.0)
                continue
            before = self.spool.acknowledged
            try:
                self._connect()
            except KerasEfficientError as error:  # a certificate that has expired meanwhile, a server that is none
                self._note(error.message)
            except Exception as error:
                self._judge(error)
            if self._end is not None:
                self.spool.wake()
                return
            tries = 0 if self.spool.acknowledged > before else tries + 1
            # No two cameras come back at the same moment.
            pause = min(PAUSES[0] * 2 ** min(tries, 10), PAUSES[1]) * random.uniform(0.5, 1)
            self._closing.wait(pause)

    def _connect(self) -> None:
        """One connection, until it ends."""
        grpc = rpc()
        options = (
            *OPTIONS,
            ("grpc.use_local_subchannel_pool", 1),  # else the pauses of an earlier connection go on
            ("grpc.min_reconnect_backoff_ms", 5_000),  # also how long a server has to say its first word
            ("grpc.enable_http_proxy", 0),
        )
        if self._files:
            certificate, key, authority = checked(*self._files)
            credentials = grpc.ssl_channel_credentials(authority, key, certificate)
            channel = grpc.secure_channel(self.target, credentials, options)
        else:
            channel = grpc.insecure_channel(self.target, options)
        with channel:
            link = self._link = _Link()
            call = channel.stream_stream(f"/{SERVICE}/{METHOD}")(self._outgoing(link))
            link.call = call
            try:
                for message in call:
                    self._take(link, words(message))
            except grpc.RpcError:
                if link.problem is None:
                    raise
                raise ConnectionProblem(link.problem) from None
            finally:
                link.is_over = True
                call.cancel()
                self.spool.wake()

    def _take(self, link: _Link, answer: dict[str, Any]) -> None:
        """The server's answer: where it stands, or what is stored."""
        link.heard = time.monotonic()
        last, sequence, results = (answer.get(name) for name in ("last", "sequence", "results"))
        if isinstance(last, int):
            before = self.spool.acknowledged
            self.spool.acknowledge(last, anew=True)
            self._is_new = self._newest > 0
            self.on_message(f"{self.target} is there.")
            if last < before:
                lost = f"{self.target} no longer has chunks {last + 1} to {before}"
                self.on_message(f"{lost}: what the spool still has of them is sent again.")
            link.start = last
        elif isinstance(sequence, int) and isinstance(results, list):
            self.problem = None
            if sequence > self._seen:
                self._seen = sequence
                self.on_results(sequence, results)
            self.spool.acknowledge(sequence)
        else:
            raise BadChunk("The server says what is not understood.")
        self.spool.wake()

    def _outgoing(self, link: _Link) -> Iterator[bytes]:
        """What is sent over one connection; gRPC asks for the next when the one before is on its way."""
        yield as_words(camera=self.spool.camera, stream=self.spool.stream, seen=self._seen)
        while link.start is None:
            if not self._goes_on(link, waits=True):
                return
        # What was looked at, and the last chunk that the server has, or will have by what is on its way to it.
        cursor = reached = link.start
        first = True  # the group of the first new chunk comes as a whole
        while True:
            sequence = self.spool.after(cursor)
            if sequence is not None and first:
                sequence, first = self.spool.beginning(sequence), False
            in_flight = reached - self.spool.acknowledged
            if sequence is None or (in_flight >= WINDOW and sequence > self.spool.acknowledged):
                if not self._goes_on(link, waits=in_flight > 0):
                    return
                continue
            chunk = self.spool.read(sequence)
            cursor = sequence
            if chunk is None:
                continue
            dropped, reached = max(sequence - 1 - reached, 0), max(reached, sequence)
            self.sent += 1
            self.resent += sequence <= self._newest
            self._newest = max(self._newest, sequence)
            if in_flight <= 0:
                link.heard = time.monotonic()
            yield dataclasses.replace(chunk, dropped=dropped).to_bytes()

    def _goes_on(self, link: _Link, *, waits: bool) -> bool:
        """Waits a little; says whether the connection is still of use."""
        self.spool.wait(0.5)
        if waits and time.monotonic() - link.heard > self.patience and link.call is not None:
            link.problem = f"{self.target} does not answer."
            link.call.cancel()
            return False
        return not (link.is_over or self._stopped.is_set() or (self._closing.is_set() and not self.spool.pending))

    def _judge(self, error: Exception) -> None:
        """What the end of a connection means."""
        if not isinstance(error, rpc().RpcError):
            self._note(f"The connection failed: {type(error).__name__}: {error}")
            return
        status, reason = error.code().name, error.details() or ""  # type: ignore[attr-defined]
        trailing = dict(error.trailing_metadata() or ())  # type: ignore[attr-defined]
        number = str(trailing.get("chunk", ""))
        if status == "INVALID_ARGUMENT" and number.isdecimal() and int(number):
            self.spool.refuse(int(number))
        elif status == "INVALID_ARGUMENT" or status in HOPELESS:
            self._end = ConnectionProblem(f"{self.target} refuses camera {self.spool.camera}: {reason}")
        known = [text for word, text in REASONS.items() if status == "UNAVAILABLE" and word in reason]
        if self._link.start is not None and (status == "CANCELLED" or any(word in reason for word in ENDED)):
            known = ["the connection ended."]
        self._note(f"{self.target}: {known[0] if known else f'{reason} ({status})'}")

    def _note(self, problem: str) -> None:
        if problem != self.problem:
            self.problem = problem
            self.on_message(problem)


class _Link:
    """One connection: where it begins to send, and when the server was heard."""

    def __init__(self) -> None:
        self.start: int | None = None
        self.call: Any = None
        self.problem: str | None = None
        self.is_over = False
        self.heard = time.monotonic()
