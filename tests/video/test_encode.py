"""A file to a file: every frame at its time, sound copied, and what cannot be done refused."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from keras_efficient import models, video
from keras_efficient.errors import FileProblem, WrongArgument
from keras_efficient.video.encode import encode_file
from keras_efficient.video.frames import packages

SIZE = (96, 128)


@pytest.fixture(scope="module")
def model():
    return models.AccModel(SIZE, width=0.25, shrink=2)


def clip(path, *, times=None, sound=None, frames=30):
    """Noise that moves; `times` in hundredths of a second; `sound` is a codec."""
    av = packages()
    picture = np.random.default_rng(0).integers(0, 255, (*SIZE, 3)).astype(np.uint8)
    with av.open(str(path), "w") as writer:
        if sound:
            writer.metadata["title"] = "Road"
            track = writer.add_stream(sound, rate=8000, layout="mono")
            track.metadata["language"] = "deu"
        stream = writer.add_stream("libx264", rate=25, options={"qp": "20"})
        stream.width, stream.height, stream.pix_fmt = SIZE[1], SIZE[0], "yuv420p"
        stream.codec_context.time_base = Fraction(1, 100)
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(np.roll(picture, 2 * number, axis=1), format="rgb24")
            frame.pts, frame.time_base = (times or range(0, 4 * frames, 4))[number], Fraction(1, 100)
            writer.mux(stream.encode(frame))
        writer.mux(stream.encode(None))
        if sound:
            samples = np.random.default_rng(1).normal(0, 0.1, (1, 9600)).astype(np.float32)
            if sound != "aac":
                samples = (samples * 2**14).astype(np.int16)
            block = av.AudioFrame.from_ndarray(samples, format="fltp" if sound == "aac" else "s16", layout="mono")
            block.sample_rate, block.pts = 8000, 0
            writer.mux(track.encode(block))
            writer.mux(track.encode(None))
    return path


def shown(path):
    """Times of the frames, in seconds."""
    with packages().open(str(path)) as reader:
        return [float(frame.pts * frame.time_base) for frame in reader.decode(video=0)]


@pytest.mark.parametrize("suffix", [".mkv", ".mp4", ".mov", ".ts"])
def test_every_frame_is_there_at_its_time(tmp_path, model, suffix):
    source = clip(tmp_path / "in.mkv", sound="aac")
    seen = []
    made = encode_file(source, tmp_path / f"out{suffix}", model, base=38, on_progress=lambda *two: seen.append(two))
    assert made.frames == 30
    assert made.seconds == pytest.approx(1.2)
    assert 0 < made.video_bytes < source.stat().st_size
    assert [done for done, _ in seen] == list(range(1, 31))
    times, wanted = np.array(shown(tmp_path / f"out{suffix}")), np.array(shown(source))
    shift = times[0] - wanted[0]  # of a transport stream
    np.testing.assert_allclose(times - shift, wanted, atol=2e-3)
    with packages().open(str(tmp_path / f"out{suffix}")) as reader:
        assert len(reader.streams.audio) == 1
        assert suffix == ".ts" or reader.metadata["title"] == "Road"
        assert suffix == ".mov" or reader.streams.audio[0].metadata["language"] == "deu"
        assert sum(frame.samples for frame in reader.decode(audio=0)) >= 9600
    assert video.Video.open(tmp_path / f"out{suffix}").width == SIZE[1]


def test_variable_frame_rates_stay(tmp_path, model):
    times = np.cumsum(np.random.default_rng(0).integers(1, 12, 30)).tolist()
    source = clip(tmp_path / "in.mkv", times=times)
    encode_file(source, tmp_path / "out.mkv", model)
    np.testing.assert_allclose(shown(tmp_path / "out.mkv"), shown(source), atol=2e-3)


def test_sound_that_a_kind_of_file_does_not_know(tmp_path):
    """FFmpeg puts it into an MPEG-TS as data, which nobody plays."""
    source = clip(tmp_path / "in.mkv", sound="pcm_s16le")
    with pytest.raises(FileProblem, match="cannot take this audio"):
        encode_file(source, tmp_path / "out.ts", None)
    assert not (tmp_path / "out.ts").exists()


def test_libx265(tmp_path, model):
    source = clip(tmp_path / "in.mkv")
    made = encode_file(source, tmp_path / "out.mp4", model, codec="libx265", base=36)
    assert len(shown(tmp_path / "out.mp4")) == made.frames == 30


def test_what_is_refused(tmp_path, model):
    source = clip(tmp_path / "in.mp4")
    with pytest.raises(WrongArgument, match=r"out\.gif cannot be written"):
        encode_file(source, tmp_path / "out.gif", model)
    with pytest.raises(WrongArgument, match="is the input itself"):
        encode_file(source, source, model, overwrite=True)
    with pytest.raises(FileProblem, match="no such file"):
        encode_file(tmp_path / "none.mp4", tmp_path / "out.mp4", model)
    (tmp_path / "out.mp4").write_bytes(b"mine")
    with pytest.raises(FileProblem, match="exists already"):
        encode_file(source, tmp_path / "out.mp4", model)
    data = bytearray(source.read_bytes())
    data[len(data) * 4 // 5 : len(data) * 4 // 5 + 200] = np.random.default_rng(0).bytes(200)
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(data)
    with pytest.raises(FileProblem, match="damaged or cut off"):
        encode_file(cut, tmp_path / "other.mp4", model)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut.mp4", "in.mp4", "out.mp4"]
    assert (tmp_path / "out.mp4").read_bytes() == b"mine"


def test_bytes_that_are_kept(data_dir, tmp_path, model):
    source = data_dir / "video" / "traffic_highway_640x360.mp4"
    made = encode_file(source, tmp_path / "out.mkv", None, size=300_000)
    assert made.video_bytes == pytest.approx(300_000, rel=0.05)


def test_sizes_that_are_refused(tmp_path, model):
    source = clip(tmp_path / "in.mkv")
    with pytest.raises(WrongArgument, match="not both"):
        encode_file(source, tmp_path / "out.mkv", model, size=10_000, bitrate=50_000)
    with pytest.raises(WrongArgument, match="at least 1000 bits a second, 150 bytes"):
        encode_file(source, tmp_path / "out.mkv", model, size=100)
