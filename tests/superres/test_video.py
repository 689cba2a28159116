"""Video files: pictures upscaled, everything else as it was, and nothing half-written."""

from __future__ import annotations

import sys
from fractions import Fraction

import numpy as np
import pytest

from keras_efficient.errors import FileProblem, MissingDependency, WrongArgument
from keras_efficient.superres import Bicubic, imresize, upscale_folder, upscale_video

av = pytest.importorskip("av", reason="needs the extra video")

LOSSLESS = {"crf": 0, "preset": "ultrafast"}
SRT = b"1\n00:00:00,000 --> 00:00:00,400\nhello\n\n"


@pytest.fixture
def model():
    return Bicubic(2)


def make_video(
    path, *, width=64, height=48, frames=6, pix_fmt="yuv420p", codec="ffv1", rotation=0, sound=True, times=None
):
    with av.open(str(path), "w") as file:
        stream = file.add_stream(
            codec, rate=25, options={"crf": "0", "preset": "ultrafast"} if codec == "libx264" else {}
        )
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        context = stream.codec_context
        context.time_base = Fraction(1, 1000)
        context.colorspace = context.color_primaries = context.color_trc = 1
        context.color_range = 2 if pix_fmt.startswith("yuvj") else 1
        context.sample_aspect_ratio = Fraction(4, 3)
        stream.metadata["language"] = "nor"
        if rotation:
            stream.set_display_rotation(rotation)
        audio = file.add_stream("flac", rate=48_000, layout="mono") if sound else None
        file.metadata["title"] = "a film"
        for index in range(frames):
            frame = picture(width, height, pix_fmt, index)
            frame.pts = (times or [40 * i for i in range(frames)])[index]
            frame.time_base = Fraction(1, 1000)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
        if audio is not None:
            for index in range(3):
                wave = (np.sin(np.arange(4096) / (20 + index)) * 9000).astype(np.int16)[None]
                samples = av.AudioFrame.from_ndarray(wave, "s16", "mono")
                samples.rate, samples.pts = 48_000, 4096 * index
                file.mux(audio.encode(samples))
            file.mux(audio.encode(None))


def picture(width, height, pix_fmt, index):
    """Smooth planes: bicubic interpolation of them is far from every limit."""
    frame = av.VideoFrame(width, height, pix_fmt)
    for number, plane in enumerate(frame.planes):
        dtype = np.dtype("<u2") if "10" in pix_fmt else np.uint8
        samples = np.frombuffer(plane, dtype).reshape(plane.height, -1)
        y, x = np.mgrid[: plane.height, : plane.width]
        values = 110 + 40 * np.sin((x + 3 * index) / 5 + number) * np.cos(y / 7)
        samples[:, : plane.width] = values * (4 if dtype != np.uint8 else 1)
    return frame


def planes(frame):
    dtype = np.dtype("<u2") if "10" in frame.format.name else np.uint8
    return [np.frombuffer(p, dtype).reshape(p.height, -1)[:, : p.width].copy() for p in frame.planes]


def frames_of(path):
    with av.open(str(path)) as file:
        return list(file.decode(video=0))


def packets_of(path, kind):
    with av.open(str(path)) as file:
        streams = [stream for stream in file.streams if stream.type == kind]
        return [(float(p.pts * p.time_base), bytes(p)) for p in file.demux(streams) if p.dts is not None]


@pytest.mark.parametrize(
    ("pix_fmt", "codec", "size"),
    [
        ("yuv420p", "ffv1", (64, 48)),
        ("yuv422p", "ffv1", (30, 22)),
        ("yuv444p", "ffv1", (31, 23)),
        ("yuv420p10le", "ffv1", (64, 48)),
        ("yuvj420p", "mjpeg", (64, 48)),
    ],
)
def test_luma_is_the_models_and_everything_else_is_kept(tmp_path, model, pix_fmt, codec, size):
    source, target = tmp_path / "a.mkv", tmp_path / "b.mkv"
    times = [0, 40, 80, 200, 210, 400]
    make_video(source, width=size[0], height=size[1], pix_fmt=pix_fmt, codec=codec, rotation=90, times=times)
    seen = []
    assert upscale_video(source, target, model, on_progress=lambda *p: seen.append(p), **LOSSLESS) == 6
    assert [done for done, _ in seen] == [1, 2, 3, 4, 5, 6]
    for small, large in zip(frames_of(source), frames_of(target), strict=True):
        assert (large.width, large.height) == (2 * size[0], 2 * size[1])
        assert large.format.name.replace("j", "") == pix_fmt.replace("j", "")
        assert large.time == pytest.approx(small.time, abs=1e-4)
        assert large.rotation == small.rotation == 90
        assert (large.colorspace, large.color_range) == (small.colorspace, small.color_range)
        expected = imresize(planes(small)[0].astype(np.float64), 2)
        assert np.abs(planes(large)[0] - expected).max() <= 0.51, "rounded once, encoded without loss"
    assert packets_of(target, "audio") == packets_of(source, "audio")
    with av.open(str(target)) as file:
        assert file.metadata["title"] == "a film"
        assert file.streams.video[0].metadata["language"] == "nor"
        assert file.streams.video[0].codec_context.name == "h264"


@pytest.mark.parametrize(("pix_fmt", "white"), [("yuv420p", 235), ("yuv420p10le", 940)])
def test_white_is_the_same_to_the_model_in_eight_and_ten_bits(tmp_path, pix_fmt, white):
    frame = av.VideoFrame(32, 32, pix_fmt)
    for plane in frame.planes:
        np.frombuffer(plane, np.dtype("<u2") if "10" in pix_fmt else np.uint8)[:] = white
    with av.open(str(tmp_path / "a.mkv"), "w") as file:
        stream = file.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = 32, 32, pix_fmt
        file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    seen = []

    def model(y):
        seen.append(y)
        return Bicubic(2)(y)

    upscale_video(tmp_path / "a.mkv", tmp_path / "b.mkv", model, scale=2, **LOSSLESS)
    np.testing.assert_allclose(seen[-1], 235 / 255, rtol=1e-6)


def test_the_aspect_ratio_of_the_pixels_is_kept(tmp_path, model):
    make_video(tmp_path / "a.mp4", codec="libx264")
    upscale_video(tmp_path / "a.mp4", tmp_path / "b.mkv", model, **LOSSLESS)
    for name in ("a.mp4", "b.mkv"):
        with av.open(str(tmp_path / name)) as file:
            assert file.streams.video[0].sample_aspect_ratio == Fraction(4, 3)


@pytest.mark.parametrize(("codec", "pix_fmt"), [("ffv1", "yuv420p"), ("mjpeg", "yuvj420p")])
def test_chroma_stays_where_it_was(tmp_path, model, codec, pix_fmt):
    """A chroma sample lies under the left one of its two luma columns; in JPEG between them. Measured by a ramp."""
    source, target = tmp_path / "a.mkv", tmp_path / "b.mkv"
    frame = av.VideoFrame(64, 32, pix_fmt)
    for number, plane in enumerate(frame.planes):
        samples = np.frombuffer(plane, np.uint8).reshape(plane.height, -1)
        samples[:] = 128
        if number == 1:
            samples[:, : plane.width] = 30 + 7 * np.arange(plane.width)
    with av.open(str(source), "w") as file:
        stream = file.add_stream(codec, rate=25, options={"qmin": "1", "qmax": "1"} if codec == "mjpeg" else {})
        stream.width, stream.height, stream.pix_fmt = 64, 32, pix_fmt
        file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    upscale_video(source, target, model, **LOSSLESS)
    stored, chroma = (planes(frames_of(path)[0])[1].astype(float) for path in (source, target))
    if codec == "mjpeg":
        expected = imresize(stored, 2)[16]
    else:
        column = 2 * np.arange(64)  # of the large luma, where chroma sample j lies
        place = (column + 0.5) / 2 - 0.5  # the same place in the small luma
        expected = 30 + 7 * place / 2
    np.testing.assert_allclose(chroma[16, 6:-6], expected[6:-6], atol=0.51)  # rounding


def test_a_size_without_whole_chroma_samples_keeps_all_of_its_colour(tmp_path):
    make_video(tmp_path / "a.mkv", width=31, height=23, pix_fmt="yuv420p", frames=2)
    upscale_video(tmp_path / "a.mkv", tmp_path / "b.mp4", Bicubic(3), **LOSSLESS)
    frame = frames_of(tmp_path / "b.mp4")[0]
    assert (frame.width, frame.height, frame.format.name) == (93, 69, "yuv444p")


@pytest.mark.parametrize("pix_fmt", ["bgr0", "gray"])
def test_rgb_and_gray_sources(tmp_path, model, pix_fmt):
    make_video(tmp_path / "a.mkv", pix_fmt=pix_fmt, frames=2, sound=False)
    upscale_video(tmp_path / "a.mkv", tmp_path / "b.mkv", model, **LOSSLESS)
    small, large = (
        frames_of(tmp_path / name)[0].to_ndarray(format="rgb24").astype(float) for name in ("a.mkv", "b.mkv")
    )
    assert np.abs(imresize(small, 2)[4:-4, 4:-4] - large[4:-4, 4:-4]).mean() < 3


def test_subtitles_and_a_second_sound_are_copied(tmp_path, model):
    (tmp_path / "a.srt").write_bytes(SRT)
    make_video(tmp_path / "video.mkv")
    with (
        av.open(str(tmp_path / "video.mkv")) as one,
        av.open(str(tmp_path / "a.srt")) as two,
        av.open(str(tmp_path / "a.mkv"), "w") as file,
    ):
        originals = [*((one, s) for s in one.streams), (one, one.streams.audio[0]), (two, two.streams[0])]
        copies = [(reader, stream, file.add_stream_from_template(stream)) for reader, stream in originals]
        copies[-1][2].metadata["language"] = "swe"
        for reader, stream, copy in copies:
            reader.seek(0)
            for packet in reader.demux(stream):
                if packet.dts is not None:
                    packet.stream = copy
                    file.mux(packet)
    upscale_video(tmp_path / "a.mkv", tmp_path / "b.mkv", model, **LOSSLESS)
    assert packets_of(tmp_path / "b.mkv", "subtitle") == packets_of(tmp_path / "a.mkv", "subtitle") != []
    assert packets_of(tmp_path / "b.mkv", "audio") == packets_of(tmp_path / "a.mkv", "audio")
    with av.open(str(tmp_path / "b.mkv")) as file:
        assert [stream.type for stream in file.streams].count("audio") == 2
        assert file.streams.subtitles[0].metadata["language"] == "swe"
    with pytest.raises(FileProblem, match="mkv"):
        upscale_video(tmp_path / "a.mkv", tmp_path / "c.mp4", model, **LOSSLESS)
    assert not list(tmp_path.glob(".*"))
    assert not (tmp_path / "c.mp4").exists()


def test_ctrl_c_and_errors_leave_nothing_half_written(tmp_path, model):
    make_video(tmp_path / "a.mkv")

    def stop(done, total):
        if done == 3:
            raise KeyboardInterrupt

    before = sorted(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        upscale_video(tmp_path / "a.mkv", tmp_path / "b.mp4", model, on_progress=stop)
    assert sorted(tmp_path.iterdir()) == before
    with pytest.raises(WrongArgument, match="nosuchpreset"):
        upscale_video(tmp_path / "a.mkv", tmp_path / "b.mp4", model, preset="nosuchpreset")
    assert sorted(tmp_path.iterdir()) == before
    (tmp_path / "there.mkv").touch()
    with pytest.raises(FileProblem, match="exists"):
        upscale_video(tmp_path / "a.mkv", tmp_path / "there.mkv", model)
    with pytest.raises(WrongArgument, match="input itself"):
        upscale_video(tmp_path / "a.mkv", tmp_path / "a.mkv", model, overwrite=True)


def test_videos_of_a_folder_are_upscaled_with_its_pictures(tmp_path, model):
    (tmp_path / "in").mkdir()
    make_video(tmp_path / "in" / "a.MKV", frames=2)
    (tmp_path / "in" / "b.mp4").write_bytes(b"no video at all" * 9)
    report = upscale_folder(tmp_path / "in", tmp_path / "out", model, suffix=".png")
    assert report.done == (tmp_path / "out" / "a.MKV",)
    assert frames_of(report.done[0])[0].width == 128
    assert [path.name for path, _ in report.failed] == ["b.mp4"]


def test_unreadable_videos_say_why(tmp_path, model):
    make_video(tmp_path / "good.mp4", codec="libx264")
    whole = (tmp_path / "good.mp4").read_bytes()
    for name, content, reason in [
        ("empty.mp4", b"", "0 bytes"),
        ("text.mp4", b"no video at all" * 9, "no video|damaged"),
        ("cut.mp4", whole[: len(whole) // 2], "damaged"),
        ("missing.mp4", None, "no such file"),
    ]:
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(FileProblem, match=reason) as caught:
            upscale_video(tmp_path / name, tmp_path / "b.mp4", model)
        assert name in str(caught.value)
    with av.open(str(tmp_path / "sound.mkv"), "w") as file:
        stream = file.add_stream("flac", rate=48_000, layout="mono")
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.int16), "s16", "mono")
        samples.rate = 48_000
        file.mux(stream.encode(samples))
        file.mux(stream.encode(None))
    with pytest.raises(FileProblem, match="no video"):
        upscale_video(tmp_path / "sound.mkv", tmp_path / "b.mp4", model)
    with pytest.raises(WrongArgument, match=r"\.txt"):
        upscale_video(tmp_path / "good.mp4", tmp_path / "b.txt", model)
    assert not (tmp_path / "b.mp4").exists()


def test_without_pyav_the_extra_is_named(tmp_path, model, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingDependency, match=r"keras-efficient\[video\]"):
        upscale_video(tmp_path / "a.mp4", tmp_path / "b.mp4", model)
