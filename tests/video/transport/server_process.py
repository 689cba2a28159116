"""A server whose network is cheap: `python server_process.py JOURNAL PORT`; prints its port, ends with its stdin."""

import sys

from keras_efficient.video import transport

receiver = transport.Receiver(
    lambda frames: [round(float(frame.mean()), 2) for frame in frames],
    transport.open_journal(sys.argv[1]),
    address=f"127.0.0.1:{sys.argv[2]}",
    insecure=True,
)
sys.stdout.write(f"{receiver.start()}\n")
sys.stdout.flush()
sys.stdin.read()
