"""A server whose network is cheap: `python server_process.py JOURNAL PORT`; prints its port, ends with its stdin."""

import sys
import time

from keras_efficient.video import transport


def predict(frames):
    time.sleep(0.02)  # else all may be stored before a test has killed it
    return [round(float(frame.mean()), 2) for frame in frames]


receiver = transport.Receiver(
    predict,
    transport.open_journal(sys.argv[1]),
    address=f"127.0.0.1:{sys.argv[2]}",
    insecure=True,
)
sys.stdout.write(f"{receiver.start()}\n")
sys.stdout.flush()
sys.stdin.read()
