"""What both ends of a connection agree on: the method, the words, limits, life signs, and who may do without TLS."""

from __future__ import annotations

import ipaddress
import json
from typing import Any

from keras_efficient.errors import BadChunk, MissingDependency, WrongArgument
from keras_efficient.video.transport.chunks import MOST_BYTES

__all__ = ["METHOD", "OPTIONS", "SERVICE", "as_words", "check_plaintext", "rpc", "words"]

SERVICE, METHOD = "keras_efficient.Video", "Push"
MOST_WORDS = 4 << 10  # bytes of what a camera says before its chunks

OPTIONS = (
    ("grpc.max_receive_message_length", MOST_BYTES + 1024),
    ("grpc.max_send_message_length", MOST_BYTES + 1024),
    # A link that was cut is noticed after 15 seconds instead of many minutes.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
)


def words(message: bytes, *, limit: int = MOST_BYTES) -> dict[str, Any]:
    """The JSON object in a message.

    Raises:
        BadChunk: it is none.
    """
    try:
        found = json.loads(message) if len(message) <= limit else None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise BadChunk("The message is no JSON object that was expected here.")
    return found


def as_words(**values: Any) -> bytes:
    """A message with a JSON object."""
    return json.dumps(values, separators=(",", ":")).encode()


def check_plaintext(address: str, *, insecure: bool) -> None:
    """Lets go without TLS only who asked for it, and only inside one machine.

    Raises:
        WrongArgument: anybody else.
    """
    if not insecure:
        hint = "Give certificate, key and authority, or say insecure (--insecure) to try it on one machine."
        raise WrongArgument("Video is not sent without TLS.", hint=hint)
    host = address.rpartition(":")[0].strip("[]")
    try:
        is_near = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_near = False
    if not is_near:
        raise WrongArgument(f"{address} is not this machine: insecure is for 127.0.0.1, ::1 and localhost only.")


def rpc() -> Any:
    """The module `grpc`.

    Raises:
        MissingDependency: it is not installed.
    """
    try:
        import grpc
    except ImportError as error:
        raise MissingDependency("grpcio", "Sending video to a server", "video") from error
    return grpc
