"""Kernels of every template against double precision, on the CPU, at odd sizes; broken ones are found out."""

from __future__ import annotations

import re

import numpy as np
import pytest

from keras_efficient.errors import MissingDependency, UnsupportedLayer, VerificationError
from keras_efficient.export.bolt import build
from keras_efficient.export.bolt.architectures import ARCHITECTURES
from keras_efficient.export.bolt.checking import compare
from keras_efficient.export.bolt.region import ACTIVATIONS, Activate, Add, Layer, Region
from keras_efficient.export.bolt.search import candidates
from keras_efficient.export.bolt.templates import TEMPLATES, packing, strip, tile, warpgroup
from keras_efficient.export.bolt.templates.depthwise import Depthwise
from keras_efficient.export.bolt.templates.strip import Plan, Strip
from keras_efficient.export.bolt.templates.tile import Tile
from keras_efficient.export.bolt.templates.warpgroup import Warpgroup

from . import kernels
from .kernels import bias, conv, prelu, sesr, weights

RELU = Activate("relu")
FSRCNN = Region(
    (
        conv(0, 5, 1, 56, prelu(56)),
        conv(1, 1, 56, 12, prelu(12)),
        conv(2, 3, 12, 12, prelu(12)),
        conv(3, 1, 12, 56, prelu(56)),
        conv(4, 5, 56, 4),
    ),
    (1,),
    shuffle=2,
)
STRIPS = {
    "whole network": (sesr(5), Strip(2, 1, 4), (1, 21, 37)),
    "two images, weights kept": (sesr(3), Strip(2, 2, 2, keep=True), (2, 13, 50)),
    "four times larger": (sesr(3, scale=4), Strip(3, 1, 3), (1, 14, 33)),
    "smaller than the halo": (sesr(5), Strip(2, 1, 2), (1, 3, 2)),
    "one place": (sesr(3), Strip(2, 1, 1), (1, 1, 1)),
    "wide and narrow": (FSRCNN, Strip(3, 1, 2), (1, 9, 41)),
    "many channels in, skips": (
        Region((conv(0, 3, 16, 32, Activate("gelu")), conv(2, 3, 32, 32, Activate("silu"), Add(1), Add(2))), (16, 32)),
        Strip(3, 1, 2),
        (1, 9, 40),
    ),
    "colours": (
        Region((conv(0, 3, 3, 10, RELU), conv(1, 7, 10, 3, Activate("softplus"))), (3,)),
        Strip(2, 2, 3),
        (1, 8, 41),
    ),
    "one layer, 24 channels": (
        Region((conv(0, 3, 24, 20, Activate("clip", low=0.0, high=6.0), Add(1)),), (24, 20)),
        Strip(2, 1, 1),
        (2, 7, 33),
    ),
}
PAIR = Region((conv(0, 3, 16, 48, RELU), conv(1, 1, 48, 40, RELU)), (16,))
ROWS = Region((Layer(0, weights(1, 1, 96, 32), bias(32), steps=(RELU,)), conv(1, 1, 32, 96, RELU)), (96,), rows=True)
TILES = {
    "less than a tile": (Region((conv(0, 3, 16, 24),), (16,)), Tile(2, 3, 2, 1, 32, 3), (1, 2, 3)),
    "with a skip": (Region((conv(0, 3, 16, 24, prelu(24), Add(1)),), (16, 24)), Tile(2, 3, 2, 1, 32, 3), (2, 7, 9)),
    "stride, uneven padding": (
        Region((conv(0, 3, 24, 40, Activate("gelu"), stride=(2, 2), padding=(0, 0, 1, 1)),), (24,)),
        Tile(1, 3, 2, 2, 64, 2),
        (1, 11, 13),
    ),
    "three channels": (
        Region((conv(0, 7, 3, 20, RELU, stride=(2, 2), padding=(2, 2, 3, 3)),), (3,)),
        Tile(1, 4, 1, 1, 32, 2),
        (1, 17, 20),
    ),
    "dilation": (
        Region((conv(0, 3, 8, 12, padding=(2,) * 4, dilation=(2, 2)),), (8,)),
        Tile(1, 2, 1, 1, 16, 2),
        (1, 6, 9),
    ),
    "rows": (
        Region((Layer(0, weights(1, 1, 72, 100), bias(100), steps=(Activate("gelu_tanh"),)),), (72,), rows=True),
        Tile(2, 4, 2, 2, 32, 4),
        (77,),
    ),
    "odd filters, one channel added": (
        Region((conv(0, 1, 8, 7, Add(1)),), (8, 1)),
        Tile(1, 1, 1, 1, 16, 2),
        (1, 5, 7),
    ),
    "pair in registers": (PAIR, Tile(1, 6, 2, 1, 32, 3), (1, 9, 10)),
    "pair in shared memory": (PAIR, Tile(1, 3, 2, 2, 32, 3, 1, "shared"), (1, 9, 10)),
    "pair of rows": (ROWS, Tile(1, 2, 2, 2, 32, 3, 1, "shared"), (50,)),
    "shuffled": (Region((conv(0, 3, 16, 12),), (16,), shuffle=2), Tile(1, 2, 1, 1, 32, 2), (1, 6, 7)),
}
DEPTHWISE = {
    "with a skip": (
        Region((kernels.depthwise(16, 3, Activate("clip", low=0.0, high=6.0), Add(1)),), (16, 16)),
        Depthwise(4, 64),
        (2, 7, 9),
    ),
    "stride, 12 channels": (
        Region((kernels.depthwise(12, 5, prelu(12), stride=(2, 2), padding=(1, 1, 2, 2)),), (12,)),
        Depthwise(2, 32),
        (1, 8, 11),
    ),
    "3 channels": (Region((kernels.depthwise(3, 3, Activate("silu"), Add(1)),), (3, 1)), Depthwise(1, 32), (1, 5, 6)),
    "2 channels": (Region((kernels.depthwise(2, 3, prelu(2)),), (2,)), Depthwise(3, 32), (1, 5, 7)),
}
WARPGROUPS = {
    "less than a tile": (Region((conv(0, 3, 16, 24),), (16,)), Warpgroup(1, 4, 2, 4), (1, 2, 3)),
    "rows, a skip": (
        Region((conv(0, 1, 200, 136, Activate("gelu"), Add(1)),), (200, 136), rows=True),
        Warpgroup(1, 16, 2, 4),
        (150,),
    ),
    "rows in clusters": (
        Region((conv(0, 1, 328, 96, Activate("silu")),), (328,), rows=True),
        Warpgroup(1, 12, 1, 3, together=2),
        (150,),
    ),
    "a convolution in clusters": (
        Region((conv(0, 3, 64, 64, prelu(64), Add(1)),), (64, 1)),
        Warpgroup(2, 8, 2, 4, together=4),
        (1, 12, 17),
    ),
    "two images, 24 channels": (Region((conv(0, 3, 24, 40, prelu(40)),), (24,)), Warpgroup(2, 4, 1, 4), (2, 11, 13)),
    "stride, dilation": (
        Region((conv(0, 3, 16, 20, RELU, stride=(2, 1), dilation=(1, 2), padding=(0, 0, 1, 1)),), (16,)),
        Warpgroup(1, 4, 1, 3),
        (1, 12, 17),
    ),
    "shuffled": (Region((conv(0, 3, 64, 12, Add(1)),), (64, 12), shuffle=2), Warpgroup(1, 2, 1, 6), (1, 9, 15)),
    "a pair with skips": (
        Region((conv(0, 3, 16, 48, prelu(48), Add(1)), conv(3, 1, 48, 40, Activate("gelu"), Add(2))), (16, 48, 40)),
        Warpgroup(2, 6, 1, 4),
        (2, 9, 17),
    ),
    "a pair of rows in clusters": (
        Region((conv(0, 1, 96, 80, RELU), conv(1, 1, 80, 136, Activate("silu"))), (96,), rows=True),
        Warpgroup(1, 12, 1, 3, together=2),
        (150,),
    ),
    "a pair, shuffled": (
        Region((conv(0, 3, 64, 64, RELU), conv(1, 1, 64, 12)), (64,), shuffle=2),
        Warpgroup(1, 8, 2, 4),
        (1, 9, 17),
    ),
}
CASES = [
    pytest.param(name, *case, id=f"{name}: {label}")
    for name, cases in (("strip", STRIPS), ("tile", TILES), ("warpgroup", WARPGROUPS), ("depthwise", DEPTHWISE))
    for label, case in cases.items()
]


@pytest.mark.parametrize(("name", "region", "parameters", "shape"), CASES)
def test_kernels_compute_what_regions_mean(name, region, parameters, shape):
    error, counted = kernels.run(region, TEMPLATES[name].emit(region, parameters), *shape)
    assert error < 1e-3
    assert counted.conflicts == 1


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activations(kind):
    step = prelu(8) if kind == "prelu" else Activate(kind, low=-0.5, high=0.7) if kind == "clip" else Activate(kind)
    region = Region((conv(0, 1, 8, 8, step),), (8,))
    error, _ = kernels.run(region, tile.emit(region, Tile(1, 1, 1, 1, 16, 2)), 1, 4, 5)
    assert error < 6e-4


def test_gelu_far_out():
    """Of large numbers of either sign, of zero, and where it bends."""
    x = np.array([-60000, -30, -5, -3, -0.75, -1e-3, 0, 1e-3, 0.5, 3, 9, 60000], np.float16)
    identity = np.eye(8, dtype=np.float32)[None, None]
    for kind in ("gelu", "gelu_tanh", "silu", "sigmoid"):
        region = Region((Layer(0, identity, np.zeros(8, np.float32), steps=(Activate(kind),)),), (8,), rows=True)
        source = tile.emit(region, Tile(1, 1, 2, 1, 16, 2))
        rows = np.repeat(x[:, None], 8, 1)
        error, _ = compare(region, source, [rows], rounded=np.float16)
        assert error < 5e-4
        small = np.abs(x) < 10  # whose results the large ones would hide
        error, _ = compare(region, source, [rows[small]], rounded=np.float16)
        assert error < 5e-4


def without(text, pattern, number):
    """The text without the n-th match behind the headers."""
    start = text.index("using namespace bolt;\n\nBOLT_KERNEL")
    found = list(re.finditer(pattern, text[start:]))[number]
    return text[: start + found.start()] + ";" + text[start + found.end() :]


def is_found_out(region, source, shape, text):
    for seed in range(4):
        try:
            error, _ = kernels.run(region, source, *shape, seed=seed, text=text)
        except VerificationError:
            return True
        if not error < 5e-3:
            return True
    return False


@pytest.mark.parametrize("number", range(4))
def test_a_strip_without_a_barrier_is_found_out(number):
    region, parameters, shape = STRIPS["two images, weights kept"]
    source = strip.emit(region, parameters)
    assert is_found_out(region, source, shape, without(source.text, r"barrier\(\);", number))


@pytest.mark.parametrize("pattern", [r"barrier\(\);", r"copy_wait<\d>\(\);"])
def test_a_tile_without_its_rendezvous_is_found_out(pattern):
    region, parameters, shape = TILES["with a skip"]
    source = tile.emit(region, parameters)
    assert is_found_out(region, source, shape, without(source.text, pattern, 0))


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("two images, 24 channels", r"publish_copies\(\);"),
        ("two images, 24 channels", r"barrier\(\);"),
        ("two images, 24 channels", r"copy_wait<\d>\(\);"),
        ("two images, 24 channels", r"group_wait<0>\(\);"),
        ("a convolution in clusters", r"late = late \|\| !arrival_wait\(filled[^;]*;"),
        ("a convolution in clusters", r"group_wait<1>\(\);"),
        ("a convolution in clusters", r"arrival_begin\([^;]*;"),
        ("a pair with skips", r"copy_async\(second [^;]*;"),
        ("a convolution in clusters", r"cluster_barrier\(\);(?=  // stages)"),
        ("a convolution in clusters", r"arrival_signal<4>\([^;]*;"),
    ],
)
def test_a_warpgroup_without_its_rendezvous_is_found_out(name, pattern):
    region, parameters, shape = WARPGROUPS[name]
    source = warpgroup.emit(region, parameters)
    assert is_found_out(region, source, shape, without(source.text, pattern, 0))


def test_a_warpgroup_of_another_layout_is_found_out():
    region, parameters, shape = WARPGROUPS["two images, 24 channels"]
    source = warpgroup.emit(region, parameters)
    pair, own, size = WARPGROUPS["a pair with skips"]
    other = warpgroup.emit(pair, own)
    for right, wrong in (("group_wait<0>();\n    settle(sums)", "settle(sums)"), ("step % 4 * 32", "step % 4 * 16")):
        assert right in other.text
        assert is_found_out(pair, other, size, other.text.replace(right, wrong))
    for right, wrong in (("after(32 * step)", "after(16 * step)"), ("uint64_t(1024 / 16) << 32", "uint64_t(32) << 32")):
        assert right in source.text
        assert is_found_out(region, source, shape, source.text.replace(right, wrong))


def test_rows_in_chunks():
    """As shared memory has them: chunk c of filter f at c ^ (f % 8)."""
    matrix = kernels.RNG.normal(size=(70, 20)).astype(np.float16)
    packed = np.frombuffer(packing.rows_in_chunks(matrix, 64, 16), np.float16).reshape(2, 2, 16, 8, 8)
    for inner, filter in ((0, 0), (9, 3), (69, 19), (63, 15), (64, 16)):
        part, chunk = divmod(inner, 64)[0], inner % 64 // 8
        found = packed[filter // 16, part, filter % 16, chunk ^ filter % 8, inner % 8]
        assert found == matrix[inner, filter]
    assert np.count_nonzero(packed) == np.count_nonzero(matrix)


def test_only_hopper_has_products_of_warpgroups():
    region = Region((conv(0, 3, 64, 64),), (64,))
    found = {name: list(warpgroup.candidates(region, arch)) for name, arch in ARCHITECTURES.items()}
    assert found.pop("sm_90a")
    assert not any(found.values())


@pytest.mark.parametrize("parameters", [Warpgroup(1, 32, 2, 4, 2), Warpgroup(2, 16, 2, 3), Warpgroup(4, 8, 2, 4, 4)])
def test_warpgroups_stay_in_registers(parameters):
    region = Region((conv(0, 3, 256, 256, Activate("gelu"), Add(1)),), (256, 256))
    source = warpgroup.emit(region, parameters)
    try:
        built = build.compiled(source.text, [source.kernel], "sm_90a")
    except MissingDependency as err:
        pytest.skip(str(err))
    info = built.kernels[source.kernel]
    assert (info.spill_loads, info.spill_stores, info.stack_bytes) == (0, 0, 0)
    assert "serializ" not in built.log  # which ptxas says where products wait for each other


def test_a_strip_without_the_border_s_zeros_is_found_out():
    region, parameters, shape = STRIPS["whole network"]
    source = strip.emit(region, parameters)
    wrong = source.text.replace("there ? pack(a, b) : 0u", "pack(a, b)")
    assert wrong != source.text
    assert is_found_out(region, source, shape, wrong)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
@pytest.mark.parametrize(
    ("name", "region", "parameters"),
    [
        ("strip", sesr(5), Strip(4, 2, 6)),
        ("strip", FSRCNN, Strip(4, 1, 2)),
        ("tile", Region((conv(0, 3, 64, 64, RELU),), (64,)), Tile(2, 8, 4, 1, 32, 3)),
        ("tile", PAIR, Tile(2, 6, 4, 1, 32, 3)),
        ("depthwise", Region((kernels.depthwise(64, 3, RELU),), (64,)), Depthwise()),
    ],
    ids=["sesr", "fsrcnn", "convolution", "pair", "depthwise"],
)
def test_kernels_stay_in_registers(arch, name, region, parameters):
    source = TEMPLATES[name].emit(region, parameters)
    try:
        info = build.compiled(source.text, [source.kernel], arch).kernels[source.kernel]
    except MissingDependency as err:
        pytest.skip(str(err))
    assert (info.spill_loads, info.spill_stores, info.stack_bytes) == (0, 0, 0)
    assert info.registers * source.threads * source.blocks <= 65536


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
@pytest.mark.parametrize(
    ("region", "shape"),
    [
        (Region((conv(0, 3, 128, 128, Activate("gelu"), Add(1)),), (128, 128)), (1, 96, 96)),
        (Region((conv(0, 1, 256, 512, Activate("silu")),), (256,)), (1, 96, 96)),
        (Region((conv(0, 3, 256, 256, prelu(256)),), (256,)), (8, 56, 56)),
        (Region((conv(0, 3, 64, 64, RELU), conv(1, 1, 64, 64, RELU)), (64,)), (32, 56, 56)),
        (sesr(5), (1, 1080, 1920)),
    ],
    ids=["residual", "1×1", "256 channels", "pair", "sesr"],
)
def test_what_ranks_first_stays_in_registers(arch, region, shape):
    """Else nothing is left of a region without tuning."""
    for candidate in candidates(region, ARCHITECTURES[arch], *shape)[:2]:
        source = candidate.emit(region)
        try:
            info = build.compiled_source(source, arch).kernels[source.kernel]
        except MissingDependency as err:
            pytest.skip(str(err))
        assert (info.spill_loads, info.spill_stores, info.stack_bytes) == (0, 0, 0), candidate


def test_a_plan_of_the_paper_s_network():
    """Multiply-accumulates and halo of SESR-M5, ×2."""
    region = sesr(5)
    assert region.macs == 400 + 5 * 2304 + 1600
    plan = Plan(region, Strip(8, 1, 4))
    assert plan.halo == 7  # of the 9, the first layer's 2 are read, not computed
    assert plan.extra == 14


@pytest.mark.parametrize(
    ("name", "region", "words"),
    [
        ("strip", Region((conv(0, 3, 8, 8, stride=(2, 2)),), (8,)), "strides"),
        ("strip", Region((conv(0, 3, 12, 8),), (12,)), "no multiple of 8"),
        ("strip", ROWS, "rows of a matrix"),
        ("strip", Region((conv(0, 3, 8, 5), conv(1, 3, 5, 4), conv(1, 3, 5, 8)), (8,)), "read by nothing"),
        ("tile", sesr(3), "more than two layers"),
        ("tile", Region((kernels.depthwise(8, 3),), (8,)), "depthwise"),
        ("tile", Region((conv(0, 3, 8, 8), conv(1, 3, 8, 8)), (8,)), "not a 1×1"),
        ("warpgroup", Region((conv(0, 1, 8, 8), conv(1, 1, 8, 8), conv(2, 1, 8, 8)), (8,)), "more than two layers"),
        ("warpgroup", Region((conv(0, 3, 12, 8),), (12,)), "no multiple of 8"),
        ("depthwise", PAIR, "not one depthwise"),
    ],
)
def test_regions_that_a_template_does_not_serve(name, region, words):
    assert words in TEMPLATES[name].refusal(region)
    parameters = {"strip": Strip(), "tile": Tile(), "warpgroup": Warpgroup(), "depthwise": Depthwise()}[name]
    with pytest.raises(UnsupportedLayer, match=words):
        TEMPLATES[name].emit(region, parameters)


def test_parameters_that_do_not_fit():
    with pytest.raises(UnsupportedLayer, match="halo of 7"):
        strip.emit(sesr(5), Strip(1, 1, 2))
    with pytest.raises(UnsupportedLayer, match="does not hold all 48"):
        tile.emit(PAIR, Tile(1, 2, 2, 1, 32, 3))
    with pytest.raises(UnsupportedLayer, match="no products of"):
        warpgroup.emit(Region((conv(0, 3, 8, 8),), (8,)), Warpgroup(stages=2))
    with pytest.raises(UnsupportedLayer, match="do not hold all 48"):
        warpgroup.emit(PAIR, Warpgroup(1, 4, 1, 4))
    with pytest.raises(UnsupportedLayer, match="more than 256 filters"):
        warpgroup.emit(Region((conv(0, 1, 8, 8), conv(1, 1, 8, 264)), (8,)), Warpgroup(1, 2, 1, 4))
    with pytest.raises(UnsupportedLayer, match="whole stages"):
        tile.emit(PAIR, Tile(1, 6, 2, 1, 24, 3))


def test_equal_regions_and_parameters_give_equal_sources():
    one, other = (strip.emit(sesr(3), Strip(2, 1, 2)) for _ in range(2))
    assert one.text == other.text  # weights differ, which are no part of it
    assert one.packed != other.packed
    assert np.frombuffer(one.packed, np.uint8).size == np.frombuffer(other.packed, np.uint8).size


def test_one_number_for_all_filters():
    """An inner value of one channel that is added to all of a later layer."""
    region = Region((conv(0, 3, 8, 1), conv(1, 1, 1, 16, Add(1)), conv(2, 3, 16, 8)), (8,))
    error, _ = kernels.run(region, strip.emit(region, Strip(2, 1, 2)), 1, 7, 31)
    assert error < 1e-3
