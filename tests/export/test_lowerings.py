"""The rewrites of quantised graphs: every one keeps every bit, and each refuses what it cannot do."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from keras import layers as L
from keras import ops

from keras_efficient.export import flatbuffer
from keras_efficient.export.fixed_shapes import fix_shapes
from keras_efficient.export.graph import Graph
from keras_efficient.export.lowerings.doubled_convolution import doubled_convolution
from keras_efficient.export.lowerings.idle_clips import without_idle_clips
from keras_efficient.export.lowerings.late_shuffle import shuffle_last
from keras_efficient.export.lowerings.phase_convolution import phase_convolution
from keras_efficient.export.lowerings.row_phases import find_shuffle, group_pixels, phase_methods
from keras_efficient.export.lowerings.tiles import find_image_network, in_tiles, with_row_phases


def enlarger(scale: int, channels: int = 1, *, clip: float | None = None) -> keras.Model:
    """A small super-resolution network with both of SESR's additions, of free height and width."""
    keras.utils.set_random_seed(3)
    image = keras.Input((None, None, channels), name="image")
    x = first = L.Conv2D(8, 5, padding="same", name="first")(image)
    for index in range(2):
        x = L.Conv2D(8, 3, padding="same", activation="relu", name=f"body_{index}")(x)
    x = L.Add(name="feature_residual")([x, first])
    x = L.Conv2D(channels * scale**2, 3, padding="same", name="last")(x)
    under = image if channels == 1 else L.Concatenate(name="under")([image] * scale**2)
    x = L.Add(name="image_residual")([x, under])
    if clip is not None:
        x = L.ReLU(max_value=clip, name="clip")(x)
    return keras.Model(image, ops.depth_to_space(x, scale), name=f"enlarger_{scale}_{channels}")


@pytest.fixture(scope="session")
def quantised(tmp_path_factory):
    """``quantised(model, precision) -> path`` of its file with free height and width, calibrated on random images."""
    from keras_efficient.export.calibration import calibration_from
    from keras_efficient.export.signature import input_specs
    from keras_efficient.export.targets import Request, ethos_u, registry, tflite

    folder = tmp_path_factory.mktemp("quantised")

    def convert(model: keras.Model, precision: str = "int8", size: tuple[int, int] | None = None):
        shape = (2, *(size or (40, 40)), model.inputs[0].shape[-1])
        data = np.random.default_rng(5).random(shape, dtype=np.float32)
        specs = input_specs(model)
        if size is not None:
            specs = tuple(type(s)(s.name, (1, *size, s.shape[-1]), s.dtype) for s in specs)
        request = Request(registry["tflite"], precision, specs, calibration_from(data, specs))
        path = folder / f"{model.name}_{precision}.tflite"
        candidate = list(ethos_u.lower(model, request))[-1]  # the one that keeps its PReLUs
        tflite.convert_plainly(candidate.model, request, path)
        return path

    return convert


@pytest.fixture(scope="session")
def enlargers(quantised):
    """Files by (scale, channels)."""
    return {key: quantised(enlarger(*key)) for key in ((2, 1), (3, 1), (2, 3))}


def fixed(path, height: int, width: int, folder) -> Graph:
    """The graph of a file with free axes, fixed to one size."""
    copy = folder / f"fixed_{path.name}"
    copy.write_bytes(path.read_bytes())
    graph = Graph.from_bytes(copy.read_bytes())
    name = flatbuffer.unpack(copy.read_bytes()).signatureDefs[0].inputs[0].name.decode()
    depth = graph.tensor(graph.inputs[0]).shape[3]
    assert fix_shapes(copy, {name: (1, height, width, depth)})
    return Graph.from_bytes(copy.read_bytes())


def run(graph: Graph, seed: int = 0) -> list[np.ndarray]:
    """The outputs' integers for a seeded random input, by the built-in kernels."""
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    kernels = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    interpreter = Interpreter(model_content=graph.to_bytes(), experimental_op_resolver_type=kernels)
    interpreter.allocate_tensors()
    detail = interpreter.get_input_details()[0]
    limits = np.iinfo(detail["dtype"])
    values = np.random.default_rng(seed).integers(limits.min, limits.max + 1, detail["shape"])
    interpreter.set_tensor(detail["index"], values.astype(detail["dtype"]))
    interpreter.invoke()
    return [interpreter.get_tensor(detail["index"]) for detail in interpreter.get_output_details()]


def assert_same_bits(graph: Graph, rewritten: Graph) -> None:
    for before, after in zip(run(graph), run(rewritten), strict=True):
        np.testing.assert_array_equal(after, before)


def operators(graph: Graph) -> list[str]:
    return [op.name for op in graph.ops]


# ---------------------------------------------------------------------------------------------- row phases


@pytest.mark.parametrize("key", [(2, 1), (3, 1), (2, 3)])
@pytest.mark.parametrize("size", [(20, 48), (13, 21)], ids=["groups of 16", "odd width"])
def test_row_phases_keep_every_bit(enlargers, key, size, tmp_path):
    graph = fixed(enlargers[key], *size, tmp_path)
    network = find_image_network(graph)
    assert network is not None
    assert network.shuffle is not None
    assert network.shuffle.block == key[0]
    methods = list(phase_methods(graph, network.shuffle))
    assert len({method.name for method in methods}) == len(methods) >= 2
    for method in methods:
        rewritten = with_row_phases(graph, lambda shuffle, method=method: method)
        assert "DEPTH_TO_SPACE" not in operators(rewritten)
        assert_same_bits(graph, rewritten)


def test_a_wrong_row_phase_is_noticed(enlargers, tmp_path):
    """The oracle of these tests can fail: row phases in the wrong order differ."""
    graph = fixed(enlargers[2, 1], 16, 32, tmp_path)
    method = next(phase_methods(graph, find_image_network(graph).shuffle))
    rewritten = with_row_phases(graph, lambda shuffle: method)
    joined = next(op for op in rewritten.ops if op.name == "CONCATENATION")
    joined.raw.inputs = list(reversed(list(joined.raw.inputs)))
    with pytest.raises(AssertionError):
        assert_same_bits(graph, rewritten)


def test_shuffles_inside_a_network(quantised, tmp_path):
    image = keras.Input((None, None, 4), name="image")
    x = ops.depth_to_space(L.Conv2D(8, 3, padding="same")(image), 2)
    x = ops.depth_to_space(L.Conv2D(12, 3, padding="same")(x), 2)
    path = quantised(keras.Model(image, L.Conv2D(2, 3, padding="same")(x), name="inside"))
    graph = fixed(path, 12, 16, tmp_path)
    rewritten = with_row_phases(graph, lambda shuffle: next(phase_methods(graph, shuffle)))
    assert "DEPTH_TO_SPACE" not in operators(rewritten)
    assert_same_bits(graph, rewritten)
    assert find_image_network(graph) is None


def test_sixteen_bit_activations(quantised, tmp_path):
    """The converter has no 16-bit DEPTH_TO_SPACE; reshape, transpose, reshape is found to be one."""
    path = quantised(enlarger(2), "int16x8", size=(16, 32))
    graph = Graph.from_bytes(path.read_bytes())
    assert "TRANSPOSE" in operators(graph)
    network = find_image_network(graph)
    assert network.shuffle.block == 2
    rewritten = with_row_phases(graph, lambda shuffle: next(phase_methods(graph, shuffle)))
    assert "TRANSPOSE" not in operators(rewritten)
    assert_same_bits(graph, rewritten)


def test_other_transposes_are_no_shuffle(quantised):
    image = keras.Input((4, 6, 4), name="image")
    x = ops.transpose(ops.reshape(L.Conv2D(4, 3, padding="same")(image), (-1, 6, 2, 8)), (0, 1, 3, 2))
    graph = Graph.from_bytes(quantised(keras.Model(image, x, name="turned"), size=(4, 6)).read_bytes())
    assert all(find_shuffle(graph, op) is None for op in graph.ops)


@pytest.mark.parametrize(("run_length", "pixels"), [(2, 8), (3, 16), (4, 4), (6, 8), (16, 1), (32, 1)])
def test_pixels_that_fill_a_group_of_sixteen(run_length, pixels):
    assert group_pixels(run_length) == pixels


# ---------------------------------------------------------------------------------------------- tiles


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_tiles_equal_one_pass(enlargers, tmp_path, data):
    key = data.draw(st.sampled_from(sorted(enlargers)))
    height, width = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 72))
    if data.draw(st.booleans()):
        width = 16 * max(1, width // 16)
    tile = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 72))
    graph = fixed(enlargers[key], height, width, tmp_path)
    network = find_image_network(graph)
    method = data.draw(st.sampled_from(list(phase_methods(graph, network.shuffle))))
    step = group_pixels(network.shuffle.run) if width % group_pixels(network.shuffle.run) == 0 else 1
    tile = tile[0], -(-tile[1] // step) * step
    assert_same_bits(graph, in_tiles(graph, network, tile, method))


def test_too_narrow_a_margin_is_noticed(enlargers, tmp_path):
    """What the network sees is not overestimated: one pixel less and the seams show."""
    from dataclasses import replace

    graph = fixed(enlargers[2, 1], 24, 64, tmp_path)
    network = find_image_network(graph)
    assert network.reach == (5, 5, 5, 5)  # 5×5, two 3×3, 3×3
    method = next(method for method in phase_methods(graph, network.shuffle) if method.pixels == 4)
    less = replace(network, reach=(4, 5, 5, 5))
    with pytest.raises(AssertionError):
        assert_same_bits(graph, in_tiles(graph, less, (8, 64), method))


def test_tiles_without_a_shuffle(quantised, tmp_path):
    image = keras.Input((None, None, 3), name="image")
    x = L.DepthwiseConv2D((3, 4), padding="same", activation="relu")(image)
    x = L.MaxPooling2D(3, strides=1, padding="same")(x)
    x = L.Concatenate()([x, image])
    graph = fixed(quantised(keras.Model(image, L.Conv2D(3, 2, padding="same")(x), name="filter")), 20, 30, tmp_path)
    network = find_image_network(graph)
    assert network is not None
    assert network.shuffle is None
    for tile in ((20, 10), (7, 11), (1, 30)):
        assert_same_bits(graph, in_tiles(graph, network, tile, None))


@pytest.mark.parametrize("kind", ["stride", "valid"])
def test_other_networks_are_not_cut(quantised, kind):
    image = keras.Input((16, 16, 3), name="image")
    x = {
        "stride": lambda: L.Conv2D(4, 3, strides=2, padding="same")(image),
        "valid": lambda: L.Conv2D(4, 3)(image),
    }[kind]()
    graph = Graph.from_bytes(quantised(keras.Model(image, x, name=f"whole_{kind}"), size=(16, 16)).read_bytes())
    assert find_image_network(graph) is None


# ---------------------------------------------------------------------------------------------- clips, order, phases


def with_op(graph: Graph, name: str) -> int:
    return operators(graph).count(name)


def test_idle_clips_are_left_out(quantised, tmp_path):
    """The output's range is the clip's own, so that the clip can change nothing."""
    path = quantised(enlarger(2, clip=1.0))
    graph = Graph.from_bytes(path.read_bytes())
    graph = fixed(path, 16, 32, tmp_path)
    rewritten = without_idle_clips(graph) or graph
    assert with_op(rewritten, "MINIMUM") == with_op(rewritten, "RELU") == 0
    assert_same_bits(graph, rewritten)
    assert without_idle_clips(rewritten) is None


def test_clips_that_do_something_stay(quantised, tmp_path):
    image = keras.Input((None, None, 2), name="image")
    x = L.Conv2D(4, 3, padding="same", name="before")(image)
    both = L.Add()([L.ReLU()(x), x])  # the sum reads x too, so its range must reach below zero
    graph = fixed(quantised(keras.Model(image, both, name="clipped")), 8, 8, tmp_path)
    clips = with_op(graph, "RELU")
    rewritten = without_idle_clips(graph) or graph
    assert clips
    assert with_op(rewritten, "RELU") == clips
    assert_same_bits(graph, rewritten)


def test_a_prelu_becomes_two_convolutions_and_rounds_once(quantised, tmp_path):
    """Against PReLU in float on the convolution's own integers: never more than half a step off, PRELU is more."""
    keras.utils.set_random_seed(2)
    image = keras.Input((None, None, 3), name="image")
    convolution, act = L.Conv2D(8, 3, padding="same"), L.PReLU(shared_axes=[1, 2])
    model = keras.Model(image, act(convolution(image)), name="prelu")
    act.set_weights([np.array([-0.9, -0.2, 0, 0, 0.1, 0.5, 0.9, 1], "float32").reshape(1, 1, 8)])
    convolution.bias.assign(np.linspace(-0.3, 0.3, 8))
    graph = fixed(quantised(model), 16, 16, tmp_path)
    doubled = doubled_convolution(graph)
    assert operators(doubled) == ["CONV_2D", "CONV_2D", "MAXIMUM"]

    (old,), (new,) = run(graph, seed=0), run(doubled, seed=0)
    pixels = np.random.default_rng(0).integers(-128, 128, (1, 16, 16, 3))
    source, result = graph.tensor(graph.inputs[0]), graph.tensor(graph.outputs[0])
    conv, prelu = graph.ops
    weights, slopes = graph.tensor(conv.inputs[1]), graph.tensor(prelu.inputs[1])
    convolution.set_weights(
        [
            (weights.data * np.reshape(weights.scales, (-1, 1, 1, 1))).transpose(1, 2, 3, 0),
            graph.tensor(conv.inputs[2]).data * np.array(graph.tensor(conv.inputs[2]).scales),
        ]
    )
    act.set_weights([((slopes.data.astype(float) - slopes.zero_points[0]) * slopes.scales[0]).reshape(1, 1, 8)])
    whole = np.asarray(model((pixels.astype(float) - source.zero_points[0]) * source.scales[0]))
    expected = np.clip(whole / result.scales[0] + result.zero_points[0], -128, 127)
    assert np.abs(new - expected).max() < 0.51  # the runtime's fixed-point multiplier is off by some 2⁻³¹
    assert np.abs(old - expected).max() > 0.51
    assert doubled_convolution(doubled) is None


def test_elementwise_operators_wait_for_the_shuffle(quantised, tmp_path):
    image = keras.Input((None, None, 2), name="image")
    x = ops.depth_to_space(L.Conv2D(8, 3, padding="same")(image), 2)
    x = ops.tanh(L.LeakyReLU(negative_slope=0.25)(x))
    graph = fixed(quantised(keras.Model(image, x, name="late")), 8, 16, tmp_path)
    assert operators(graph)[-1] != "DEPTH_TO_SPACE"
    rewritten = shuffle_last(graph)
    assert operators(rewritten)[-1] == "DEPTH_TO_SPACE"
    assert with_op(rewritten, "DEPTH_TO_SPACE") == 1
    assert_same_bits(graph, rewritten)
    assert shuffle_last(rewritten) is None


def test_transposed_convolutions_by_phases(quantised):
    """The sums are equal; the runtime's two kernels round a tie to different sides now and then."""
    image = keras.Input((7, 9, 3), name="image")
    cases = [(9, 2), (4, 2), (2, 2), (5, 3), (3, 4), ((3, 6), 2)]
    outputs = [
        L.Conv2DTranspose(2, kernel, strides=stride, padding="same", bias_initializer="random_normal")(image)
        for kernel, stride in cases
    ]
    graph = Graph.from_bytes(quantised(keras.Model(image, outputs, name="transposed"), size=(7, 9)).read_bytes())
    rewritten = phase_convolution(graph)
    assert operators(graph).count("TRANSPOSE_CONV") == operators(rewritten).count("CONV_2D") == len(cases)
    assert "TRANSPOSE_CONV" not in operators(rewritten)
    for before, after in zip(run(graph), run(rewritten), strict=True):
        difference = np.abs(before.astype(int) - after)
        assert difference.max() <= 1
        assert np.mean(difference != 0) < 0.01


# ---------------------------------------------------------------------------------------------- fixed shapes


def test_computed_shapes_become_constants(quantised, tmp_path):
    """A transposed convolution of free size computes its output's size; fixed, nothing of that is left."""
    image = keras.Input((None, None, 1), name="image")
    x = L.Conv2D(4, 3, padding="same", activation="relu")(image)
    model = keras.Model(image, L.Conv2DTranspose(1, 5, strides=2, padding="same")(x), name="free")
    path = quantised(model)
    assert "SHAPE" in operators(Graph.from_bytes(path.read_bytes()))
    graph = fixed(path, 11, 18, tmp_path)
    assert set(operators(graph)) == {"CONV_2D", "TRANSPOSE_CONV"}
    assert graph.tensor(graph.outputs[0]).shape == (1, 22, 36, 1)
    assert run(graph)[0].shape == (1, 22, 36, 1)


def test_the_interface_survives(enlargers, tmp_path):
    """Names, scales, signature and our metadata stay through a rewrite."""
    graph = fixed(enlargers[2, 1], 16, 32, tmp_path)
    network = find_image_network(graph)
    method = next(phase_methods(graph, network.shuffle))
    rewritten = Graph.from_bytes(in_tiles(graph, network, (16, 16), method).to_bytes())
    for before, after in zip((*graph.inputs, *graph.outputs), (*rewritten.inputs, *rewritten.outputs), strict=True):
        old, new = graph.tensor(before), rewritten.tensor(after)
        assert (old.name, old.shape, old.grid) == (new.name, new.shape, new.grid)
    signature = rewritten.model.signatureDefs[0]
    assert int(signature.inputs[0].tensorIndex) == rewritten.inputs[0]
    assert int(signature.outputs[0].tensorIndex) == rewritten.outputs[0]
    layers = {operator.layer.split("/")[-1] for operator in flatbuffer.operators(rewritten.model)}
    assert {"first", "body_0", "feature_residual"} <= {name.removesuffix("_1") for name in layers}
