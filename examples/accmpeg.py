"""A camera that spends its bits where a server's network looks: trained, exported, compared with the encoder alone.

    python examples/accmpeg.py [--frames 150] [--minutes 2]
    python examples/accmpeg.py --network yolox_nano.onnx --train road.mp4 --test other-road.mp4 --minutes 10

Without a network of yours the server is made here: it tells stripes across from stripes upright, and heeds neither the
foliage that moves behind them, which takes most bits, nor plain surfaces. Writes to out/.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import av
import keras
import numpy as np
from keras import ops

from keras_efficient import export, video
from keras_efficient.models import AccModel
from keras_efficient.video.interpolation import resized

HEIGHT, WIDTH, SIGN = 192, 320, 40


def write_clip(path: Path, frames: int, seed: int) -> Path:
    """Signs with faint stripes, across or upright, drift over foliage and plain surfaces."""
    random = np.random.default_rng(seed)
    foliage = np.zeros((HEIGHT // 16, WIDTH // 8))
    plain = np.linspace(95, 125, WIDTH)[None].repeat(HEIGHT, axis=0)
    places = random.uniform([0, 0], [HEIGHT - SIGN, WIDTH - SIGN], (5, 2))
    speeds = random.uniform(-1.5, 1.5, (5, 2))
    upright = random.integers(2, size=5).astype(bool)
    stripes = 18 * np.sign(np.sin(np.arange(SIGN) * np.pi / 3 + 0.1))
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=25, options={"qp": "12", "preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for number in range(frames):
            picture = plain.copy()
            foliage = 0.6 * foliage + random.normal(0, 32, foliage.shape)  # in the wind: no frame tells of the next
            picture[HEIGHT // 2 :] += resized(foliage, (HEIGHT // 2, WIDTH))
            for (y, x), straight in zip(places + number * speeds, upright, strict=True):
                top = int(abs((y + HEIGHT) % (2 * (HEIGHT - SIGN)) - (HEIGHT - SIGN)))
                left = int(abs((x + WIDTH) % (2 * (WIDTH - SIGN)) - (WIDTH - SIGN)))
                sign = 110 + (stripes[None, :] if straight else stripes[:, None]).repeat(
                    SIGN, axis=0 if straight else 1
                )
                picture[top : top + SIGN, left : left + SIGN] = sign
            grey = picture.clip(0, 255).astype(np.uint8)
            image = np.stack([grey] * 3, axis=-1)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        file.mux(stream.encode(None))
    return path


def server_of_stripes() -> video.Server:
    """A segmenter of three classes without any training: nothing, stripes across, stripes upright."""
    wave = np.cos(np.arange(-6, 7) * np.pi / 3) * np.hanning(15)[1:-1]
    blur = np.hanning(15)[1:-1]
    wave, blur = (wave - wave.mean()) / np.abs(wave).sum(), blur / blur.sum()
    filters = np.stack([np.outer(wave, blur), np.outer(blur, wave)], axis=-1)[:, :, None].astype("float32")

    def network(x: keras.KerasTensor) -> keras.KerasTensor:
        grey = ops.mean(x, axis=-1, keepdims=True) - 110.0
        waves = ops.conv(grey, filters, padding="same")
        power = ops.average_pool(ops.square(waves), 13, strides=1, padding="same")
        across, upright = power[..., :1], power[..., 1:]
        # Foliage has both alike, a sign one of them.
        logits = [ops.zeros_like(across), across - 4 * upright - 10.0, upright - 4 * across - 10.0]
        return ops.concatenate(logits, axis=-1)

    return video.SegmentationServer(network, video.Preprocessing((HEIGHT, WIDTH)))


def main(
    out: Path, frames: int = 150, minutes: float = 2, steps: int | None = None, step: int = 3, **yours: str
) -> dict[str, float]:
    """Trains a camera model, exports it, and compares; returns the bytes at equal accuracy by name."""
    out.mkdir(parents=True, exist_ok=True)
    if yours:
        server, name = video.onnx_server(yours["network"], "detection", "yolox"), Path(yours["network"]).name
        train, test = Path(yours["train"]), Path(yours["test"])
        first = video.Video.open(next(iter(sorted(train.glob("*.mp4"))), train))
        model = None
    else:
        server, name = server_of_stripes(), "stripes"
        train, test = (write_clip(out / f"signs-{seed}.mp4", frames, seed) for seed in (1, 2))
        first = video.Video.open(train)
        model = AccModel((HEIGHT, WIDTH), shrink=2, width=0.5)
    found = video.train_accmodel(
        server,
        train,
        model=model,
        frame_size=(first.height, first.width),
        coding=video.Coding(every=2),
        minutes=minutes,
        steps=steps,
        on_progress=lambda line: print(f"  {line}"),
    )
    report = export.save(found.model, out / "camera.tflite")
    print(f"camera model: {report.bytes:,} bytes, rank correlation {found.correlation:.2f} on frames it did not see")

    clip = video.Clip(video.Video.open(test))
    ways = video.coding_schemes(("uniform", "defaults", "camera"), server, out / "camera.tflite", step=step)
    result = video.evaluate(server, clip, ways, every=2, name=name)
    curves = {way.name: result.curve(way.name) for way in ways}
    accuracy = min(curve.accuracies().max() for curve in curves.values()) - 0.05
    bytes_at = {name: curve.bytes_at(accuracy) for name, curve in curves.items()}
    for way, count in bytes_at.items():
        print(f"{way:9s} {count:9,.0f} bytes for {len(result.points[way][0].sizes)} frames at {accuracy:.3f}")
    return bytes_at


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--frames", type=int, default=150)
    parser.add_argument("--minutes", type=float, default=2)
    parser.add_argument("--network", help="an .onnx file of YOLOX")
    parser.add_argument("--train", help="a video, or a folder of .mp4 files of one size")
    parser.add_argument("--test", help="another video")
    arguments = vars(parser.parse_args())
    yours = {key: arguments.pop(key) for key in ("network", "train", "test")}
    given = {key: value for key, value in yours.items() if value}
    if given and len(given) < len(yours):
        parser.error("--network, --train and --test belong together")
    main(**arguments, **given)
