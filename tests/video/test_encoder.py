"""Offsets of macroblocks: heeded, read back, refused where the encoder would drop them."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from keras_efficient.errors import ConversionError, WrongArgument
from keras_efficient.video import encoder as encoding
from keras_efficient.video.encoder import RoiEncoder, decoded, is_as_asked, qp_map, rectangles
from keras_efficient.video.frames import Video, packages

RNG = np.random.default_rng(0)


def pictures(number=8, height=144, width=176):
    small = RNG.integers(0, 256, (number, height // 8 + 1, width // 8 + 1, 3)).astype(np.uint8)
    return small.repeat(8, axis=1).repeat(8, axis=2)[:, :height, :width].copy()


def encoded(frames, offsets=None, **options):
    encoder = RoiEncoder(frames.shape[2], frames.shape[1], 25, threads=1, **options)
    packets = [
        packet
        for index, frame in enumerate(frames)
        for packet in encoder.encode(frame, None if offsets is None else offsets[index])
    ]
    return packets + encoder.flush()


@pytest.mark.parametrize("preset", ["ultrafast", "veryfast", "medium", "slower"])
@pytest.mark.parametrize("height", [144, 138])
def test_the_map_is_as_asked(preset, height):
    frames = pictures(height=height)
    maps = [RNG.choice([-10, -4, 0, 6], size=(9, 11)) for _ in frames]
    found = list(decoded(encoded(frames, maps, mode="exact", base=36, preset=preset), quality=True))
    assert len(found) == len(frames)
    for frame, offsets in zip(found, maps, strict=True):
        assert is_as_asked(qp_map(frame), 36 + offsets).all()
        assert (qp_map(frame) == 36 + offsets).mean() > 0.2
    kinds = {frame.pict_type for frame in found}
    assert len(kinds) > 1 or preset == "ultrafast"


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
def test_worse_than_the_worst(codec):
    """Beyond 51 it is the macroblocks with an offset that become worse."""
    frames = pictures()
    maps = [RNG.choice([-10, 0], size=(9, 11)) for _ in frames]
    sizes = [
        sum(len(packet.data) for packet in encoded(frames, maps, codec=codec, base=base, b_frames=0))
        for base in (51, 54, 57.5, 61)
    ]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < 0.9 * sizes[0]
    assert len(encoded(frames, codec=codec, base=58)) == len(frames), "without offsets as well"
    kept = encoded(frames, maps, codec=codec, base=58, bitrate=200_000)
    assert sum(len(packet.data) for packet in kept) > sizes[0], "a bitrate raises nothing"
    if codec == "libx264":
        found = list(decoded(encoded(frames, maps, mode="exact", base=55), quality=True))
        for frame, offsets in zip(found, maps, strict=True):
            assert is_as_asked(qp_map(frame), np.minimum(55 + offsets, 51)).all()
        RoiEncoder(208, 144, 25, mode="exact", base=57).self_check()


def test_both_ways_of_attaching_give_the_same_bits(monkeypatch):
    frames = pictures(4)
    maps = [RNG.choice([-10, 0, 6], size=(9, 11)) for _ in frames]
    first = encoded(frames, maps, b_frames=0)  # with them x264 is not quite the same from one run to the next
    monkeypatch.setattr(encoding, "_attach", lambda picture, regions: None)
    assert [packet.data for packet in encoded(frames, maps, b_frames=0)] == [packet.data for packet in first]
    assert [packet.data for packet in encoded(frames, b_frames=0)] != [packet.data for packet in first]


@pytest.mark.parametrize("preset", encoding.PRESETS)
@pytest.mark.parametrize("codec", ["libx264", "libx265"])
@pytest.mark.parametrize("mode", ["offset", "exact"])
def test_it_checks_itself(codec, mode, preset):
    """The fastest presets have no adaptive quantisation of their own, without which offsets are dropped."""
    refused = (codec, mode) == ("libx264", "exact") and preset in encoding.PRESETS[-2:]
    if refused or (codec == "libx265" and encoding.PRESETS.index(preset) > 5):
        return  # the slow ones of H.265 take half a minute
    encoder = RoiEncoder(208, 144, 25, codec=codec, mode=mode, preset=preset)
    assert encoder.self_check() == ("read back" if (codec, mode) == ("libx264", "exact") else "indirect")


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
@pytest.mark.parametrize("mode", ["offset", "exact"])
def test_the_check_sees_what_is_dropped(monkeypatch, codec, mode):
    monkeypatch.setattr(encoding, "_regions", lambda offsets: None)
    with pytest.raises(ConversionError, match=r"another QP than asked for|did not heed the offsets"):
        RoiEncoder(208, 144, 25, codec=codec, mode=mode).self_check()


@pytest.mark.parametrize("attach", [encoding._attach, lambda picture, regions: None])
@pytest.mark.parametrize("offset", [-4, 0])
def test_the_callers_frames_stay_as_they_are(monkeypatch, attach, offset):
    monkeypatch.setattr(encoding, "_attach", attach)
    frame = packages().VideoFrame.from_ndarray(pictures(1)[0], format="rgb24").reformat(format="yuv420p")
    frame.pts, frame.time_base = 7, Fraction(1, 90000)
    before = frame.to_ndarray().copy()
    encoder = RoiEncoder(176, 144, 25)
    encoder.encode(frame, np.full((9, 11), offset), key=True)
    assert len(frame.side_data) == 0
    assert (frame.pts, frame.time_base, frame.pict_type) == (7, Fraction(1, 90000), 0)
    np.testing.assert_array_equal(frame.to_ndarray(), before)


def test_key_frames_where_they_are_asked_for():
    frames = pictures(9)
    encoder = RoiEncoder(176, 144, 25, b_frames=0, options={"rc-lookahead": 0})
    packets = [p for index, frame in enumerate(frames) for p in encoder.encode(frame, key=index == 5)] + encoder.flush()
    assert [packet.is_key for packet in packets] == [index in (0, 5) for index in range(9)]
    rest = list(decoded(packets[5:]))
    assert len(rest) == 4
    still = frames[:1].repeat(9, axis=0)
    keys = [packet.pts for packet in encoded(still, key_every=4) if packet.is_key]
    assert keys == [0, 4, 8]


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
def test_a_bitrate_is_kept(data_dir, codec):
    video = Video.open(data_dir / "video" / "traffic_highway_640x360.mp4")
    encoder = RoiEncoder(video.width, video.height, video.rate, codec=codec, bitrate=400_000, preset="ultrafast")
    frames = list(itertools.islice(video, 240))
    size = sum(len(packet.data) for frame in frames for packet in encoder.encode(frame))
    size += sum(len(packet.data) for packet in encoder.flush())
    assert 8 * size * video.rate / len(frames) == pytest.approx(400_000, rel=0.05)


@settings(max_examples=200, deadline=None)
@given(st_numpy.arrays(int, st.tuples(st.integers(1, 9), st.integers(1, 9)), elements=st.sampled_from([-4, 0, 2])))
def test_rectangles_are_the_map_and_do_not_overlap(offsets):
    drawn, times = np.zeros_like(offsets), np.zeros_like(offsets)
    for top, bottom, left, right, value in rectangles(offsets):
        drawn[top:bottom, left:right] = value
        times[top:bottom, left:right] += 1
    np.testing.assert_array_equal(drawn, offsets)
    np.testing.assert_array_equal(times, offsets != 0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"codec": "libsvtav1"}, "drops them"),
        ({"options": {"qp": 30}}, "Constant QP drops offsets silently"),
        ({"options": {"aq-mode": 0}}, "Without adaptive quantisation"),
        ({"options": {"aq-strength": 0.0}}, "Without adaptive quantisation"),
        ({"options": {"aq_mode": 0}}, "Without adaptive quantisation"),
        ({"options": {"aq_strength": "0"}}, "Without adaptive quantisation"),
        ({"options": {"aq-mode": "none"}}, "aq-mode is a number"),
        ({"options": {"subme": "x"}}, "subme is a number"),
        ({"mode": "exact", "base": 34.5}, "QPs are whole numbers"),
        ({"mode": "exact", "preset": "veryslow"}, "subme 10"),
        ({"mode": "exact", "options": {"subme": 10}}, "subme 10"),
        ({"mode": "best"}, "`mode` must be"),
        ({"preset": "fastest"}, "`preset` must be"),
        ({"base": 62}, "`base` must be"),
        ({"mode": "exact", "bitrate": 10_000}, "`bitrate` is"),
    ],
)
def test_what_would_drop_offsets_is_refused(options, words):
    with pytest.raises(WrongArgument, match=words):
        RoiEncoder(176, 144, 25, **options)


def test_frames_and_maps_that_do_not_fit():
    with pytest.raises(WrongArgument, match="even sides from 16 on, not 175×144"):
        RoiEncoder(175, 144, 25)
    encoder = RoiEncoder(176, 144, 25)
    with pytest.raises(WrongArgument, match="A frame is 160×144, the encoder's 176×144"):
        encoder.encode(pictures(1, 144, 160)[0])
    with pytest.raises(WrongArgument, match=r"must be integers \(9, 11\), got float64 \(9, 11\)"):
        encoder.encode(pictures(1)[0], np.zeros((9, 11)))
    with pytest.raises(WrongArgument, match="from −51 to 51, got 60"):
        encoder.encode(pictures(1)[0], np.full((9, 11), 60))
    (frame,) = list(decoded(encoded(pictures(1))))
    with pytest.raises(WrongArgument, match="does not say its QPs"):
        qp_map(frame)
