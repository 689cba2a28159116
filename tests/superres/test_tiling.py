"""Tiles give the pixels of one pass: for any size, tile and halo that is large enough, and for no smaller one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_efficient.errors import WrongArgument
from keras_efficient.superres.tiling import tiled, tiles


class SmallNet:
    """Three 3×3 SAME convolutions in integers (exact, as int8 models are), then a shuffle to `scale`. Radius 3."""

    radius = 3

    def __init__(self, scale, *, seed=0, size=None):
        generator = np.random.default_rng(seed)
        self.kernels = [generator.integers(1, 9, (3, 3)) * generator.choice([-1, 1], (3, 3)) for _ in range(3)]
        self.scale, self.sizes = scale, set()
        if size is not None:
            self.input_shape = (1, *size, 1)

    def __call__(self, x):
        assert x.ndim == 4
        if hasattr(self, "input_shape"):
            assert x.shape == self.input_shape
        self.sizes.add(x.shape[1:3])
        x = x[..., 0].astype(np.int64)
        for kernel in self.kernels:
            padded = np.pad(x + 1, ((0, 0), (1, 1), (1, 1)))  # a bias, so that the zeros of the border matter
            height, width = x.shape[1:]
            x = sum(kernel[i, j] * padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3))
        large = np.repeat(np.repeat(x, self.scale, 1), self.scale, 2)
        rows = np.arange(large.shape[1])[:, None] % self.scale
        columns = np.arange(large.shape[2]) % self.scale
        return (large * (1 + rows + 2 * columns))[..., None]


class StridedNet:
    """A 4×4 convolution of stride 2, a 3×3 one at half the resolution, and back to twice the size. Works at 1/2."""

    def __call__(self, x):
        x = x[..., 0].astype(np.int64)
        padded = np.pad(x + 1, ((0, 0), (1, 1), (1, 1)))
        height, width = x.shape[1] // 2, x.shape[2] // 2
        half = sum(
            (1 + i + 5 * j) * padded[:, i : i + 2 * height : 2, j : j + 2 * width : 2]
            for i in range(4)
            for j in range(4)
        )
        padded = np.pad(half + 1, ((0, 0), (1, 1), (1, 1)))
        half = sum((1 + i + 3 * j) * padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3))
        return np.repeat(np.repeat(half, 4, 1), 4, 2)[..., None]


def picture(height, width, count=1, seed=0):
    return np.random.default_rng(seed).integers(-100, 100, (count, height, width, 1))


@settings(max_examples=150, deadline=None)
@given(
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    tile=st.tuples(st.integers(7, 24), st.integers(7, 24)),
    halo=st.integers(3, 6),
    scale=st.integers(1, 4),
    batch=st.integers(1, 4),
    count=st.integers(1, 2),
)
def test_equals_one_pass(height, width, tile, halo, scale, batch, count):
    tile = tuple(max(n, 2 * halo + 1) for n in tile)
    net, image = SmallNet(scale), picture(height, width, count)
    result = tiled(net, image, tile=tile, halo=halo, scale=scale, batch=batch)
    np.testing.assert_array_equal(result, net(image))


@settings(max_examples=60, deadline=None)
@given(height=st.integers(9, 40), width=st.integers(9, 40), batch=st.integers(1, 3))
def test_fixed_tiles_equal_one_pass_where_the_picture_is_large_enough(height, width, batch):
    fixed = SmallNet(2, size=(9, 9))
    fixed.input_shape = (batch, 9, 9, 1)
    image = picture(height, width)
    result = tiled(fixed, image, tile=9, halo=3, scale=2, batch=batch)
    np.testing.assert_array_equal(result, SmallNet(2)(image))


@settings(max_examples=60, deadline=None)
@given(height=st.integers(1, 30), width=st.integers(1, 30), tile=st.sampled_from([10, 12, 14]))
def test_models_at_half_resolution_equal_one_pass(height, width, tile):
    net, image = StridedNet(), picture(height, width)
    even = np.pad(image, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    expected = net(even)[:, : 2 * height, : 2 * width]
    # 4×4 of stride 2 reaches 2 pixels, 3×3 at half resolution 2 more: at most 4.
    result = tiled(net, image, tile=tile, halo=4, scale=2, multiple=2)
    np.testing.assert_array_equal(result, expected)


def test_a_halo_one_too_small_shows():
    net, image = SmallNet(2), picture(30, 31)
    expected = net(image)
    assert (tiled(net, image, tile=12, halo=3, scale=2) == expected).all()
    assert (tiled(net, image, tile=12, halo=2, scale=2) != expected).any()


@settings(max_examples=60, deadline=None)
@given(height=st.integers(1, 30), width=st.integers(1, 30), wanted=st.integers(7, 20))
def test_fixed_tiles_pad_a_smaller_picture_by_its_edge(height, width, wanted):
    net, image = SmallNet(3, size=(wanted, wanted)), picture(height, width)
    result = tiled(net, image, tile=wanted, halo=3, scale=3)
    padded = np.pad(image, ((0, 0), (0, max(wanted - height, 0)), (0, max(wanted - width, 0)), (0, 0)), mode="edge")
    np.testing.assert_array_equal(result, SmallNet(3)(padded)[:, : 3 * height, : 3 * width])


@settings(max_examples=100, deadline=None)
@given(height=st.integers(1, 200), width=st.integers(1, 200), tile=st.integers(1, 64), halo=st.integers(0, 31))
def test_tiles_cover_every_pixel_once_and_keep_the_halo(height, width, tile, halo):
    if tile <= 2 * halo:
        tile = 2 * halo + 1
    covered = np.zeros((height, width), int)
    for rows, columns in tiles(height, width, tile=tile, halo=halo):
        covered[rows[2] : rows[3], columns[2] : columns[3]] += 1
        for (start, stop, keep_from, keep_to), length in ((rows, height), (columns, width)):
            assert stop - start == min(tile, length)
            assert start == 0 or keep_from - start >= halo
            assert stop == length or stop - keep_to >= halo
    assert (covered == 1).all()


@pytest.mark.parametrize("size", [(1, 1), (20_000, 3), (3, 20_000)])
def test_extreme_shapes(size):
    net, image = SmallNet(2), picture(*size)
    np.testing.assert_array_equal(tiled(net, image, tile=64, halo=3, scale=2), SmallNet(2)(image))
    assert net.sizes == {(min(64, size[0]), min(64, size[1]))}, "one dimension is cut, and all tiles have one shape"


def test_progress_counts_tiles():
    seen = []
    tiled(SmallNet(2), picture(30, 12), tile=12, halo=3, scale=2, on_progress=lambda *p: seen.append(p))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_bad_input_is_refused():
    net = SmallNet(2)
    with pytest.raises(WrongArgument, match="no room"):
        tiled(net, picture(30, 30), tile=6, halo=3, scale=2)
    with pytest.raises(WrongArgument, match="returned"):
        tiled(net, picture(30, 30), tile=12, halo=3, scale=3)
    with pytest.raises(WrongArgument, match="N×H×W×C"):
        tiled(net, np.zeros((4, 4)), tile=12, halo=3, scale=2)
    with pytest.raises(WrongArgument, match="multiple"):
        tiled(net, picture(30, 30), tile=9, halo=3, scale=2, multiple=2)
