"""Video from cameras to a server: chunks, a spool at the camera, a journal at the server, TLS between them.

::

    from keras_efficient.video import transport

    transport.make_authority("certificates", ["localhost"], ["cam1"])
    receiver = transport.Receiver(predict, transport.open_journal("results.sqlite"), …)     # at the server
    sender = transport.Sender("server:50051", transport.Spool("spool", "cam1"), …)          # at a camera
"""

from keras_efficient.video.transport.certificates import checked, make_authority
from keras_efficient.video.transport.chunks import Chunk, chunked
from keras_efficient.video.transport.journal import Journal, open_journal
from keras_efficient.video.transport.receiver import Receiver
from keras_efficient.video.transport.results import plain
from keras_efficient.video.transport.sender import Sender
from keras_efficient.video.transport.spool import Spool

__all__ = [
    "Chunk",
    "Journal",
    "Receiver",
    "Sender",
    "Spool",
    "checked",
    "chunked",
    "make_authority",
    "open_journal",
    "plain",
]
