"""Architectures: parameter counts of the papers, shapes, and the identity that a network starts from."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_efficient import models
from keras_efficient.layers import CollapsibleLinearBlock

# (weights without biases and slopes at x2, x3, x4; slopes; biases at x2), by the paper and by hand
SESR_TABLE = {
    "m3": ((8_912, 10_912, 13_712), 48, 68),
    "m5": ((13_520, 15_520, 18_320), 80, 100),
    "m7": ((18_128, 20_128, 22_928), 112, 132),
    "m11": ((27_344, 29_344, 32_144), 176, 196),
    "xl": ((105_376, 109_376, 114_976), 352, 388),
}


def deployed_kernels(model):
    return [ops.convert_to_numpy(layer.kernel) for layer in model.layers if isinstance(layer, CollapsibleLinearBlock)]


@pytest.mark.parametrize("variant", SESR_TABLE)
def test_sesr_counts_are_the_papers(variant):
    weights, slopes, biases = SESR_TABLE[variant]
    for scale, expected in zip((2, 3, 4), weights, strict=True):
        model = models.SESR(scale, variant, expansion=4)
        assert sum(kernel.size for kernel in deployed_kernels(model)) == expected
        prelus = [layer for layer in model.layers if isinstance(layer, keras.layers.PReLU)]
        assert sum(layer.count_params() for layer in prelus) == slopes
    model = models.SESR(2, variant, expansion=4)
    assert sum(layer.filters for layer in model.layers if isinstance(layer, CollapsibleLinearBlock)) == biases


def test_sesr_expands_as_in_the_paper():
    assert models.SESR(2, "m5").count_params() == 318_720 + 1_892 + 80


def test_fsrcnn_has_the_published_weights():
    model = models.FSRCNN(2)
    assert (
        sum(w.numpy().size for layer in model.layers for w in layer.weights[:1] if "Conv" in type(layer).__name__)
        == 12_464
    )


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("build", [models.SESR, models.FSRCNN, models.QuickSRNet])
def test_shapes_and_range(build, scale, channels):
    model = build(scale, channels=channels)
    image = np.random.default_rng(0).random((2, 7, 9, channels)).astype("float32")
    result = ops.convert_to_numpy(model(image))
    assert result.shape == (2, 7 * scale, 9 * scale, channels)
    assert 0 <= result.min() <= result.max() <= 1
    assert model.output_shape == (None, None, None, channels)


@pytest.mark.parametrize(
    ("build", "channels"),
    [(models.QuickSRNet, 1), (models.QuickSRNet, 3), (models.SESR, 1), (models.SESR, 3), (models.SESRNPU, 1)],
)
def test_the_image_lies_under_each_output_pixel(build, channels):
    """With zero linear parts, what is left of the network is nearest-neighbour upscaling, colour by colour."""
    model = build(2) if channels == 1 else build(2, channels=channels)
    for layer in model.layers:
        if isinstance(layer, CollapsibleLinearBlock):
            layer.project_kernel.assign(np.zeros(layer.project_kernel.shape))
        elif isinstance(layer, keras.layers.Conv2D):
            kernel = np.round(layer.get_weights()[0])  # the identity alone: the random part is below one half
            layer.set_weights([kernel, *layer.get_weights()[1:]])
    image = np.random.default_rng(0).random((1, 5, 6, channels)).astype("float32")
    expected = image.repeat(2, axis=1).repeat(2, axis=2)
    np.testing.assert_allclose(ops.convert_to_numpy(model(image)), expected, atol=1e-6)


def test_npu_network_has_two_sources_alone_the_last_block_and_the_image():
    """No wide tensor waits for an addition: that is what the network is for."""
    model = models.SESRNPU(2, depth=3)
    added = [layer for layer in model.layers if isinstance(layer, keras.layers.Add)]
    assert [layer.name for layer in added] == ["image_residual"]
    assert [tensor.shape[-1] for tensor in added[0].input] == [4, 1]
    kernels = deployed_kernels(models.SESRNPU(2, depth=3, last_kernel_size=5))
    assert [kernel.shape for kernel in kernels] == [(5, 5, 1, 16), *[(3, 3, 16, 16)] * 3, (5, 5, 16, 4)]


def test_a_sparse_npu_network_keeps_two_of_four_in_every_block_but_the_first():
    first, *others = deployed_kernels(models.SESRNPU(2, depth=2, sparsity="2:4", int8_aware=True))
    assert np.count_nonzero(first) > first.size * 0.9  # fake quantisation rounds a few to zero
    for kernel in others:
        kept = np.count_nonzero(kernel.reshape(*kernel.shape[:2], -1, 4, kernel.shape[3]), axis=3)
        assert kept.max() == 2


@pytest.mark.parametrize(
    ("build", "arguments"),
    [
        (models.SESR, {"scale": 5}),
        (models.SESR, {"variant": "m4"}),
        (models.SESR, {"channels": 2}),
        (models.SESR, {"activation": "gelu"}),
        (models.SESRNPU, {"scale": 1}),
        (models.SESRNPU, {"depth": -1}),
        (models.SESRNPU, {"sparsity": "4:2"}),
        (models.FSRCNN, {"scale": 1}),
        (models.QuickSRNet, {"variant": "tiny"}),
        (models.QuickSRNet, {"scale": 7}),
    ],
)
def test_wrong_arguments_are_refused(build, arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        build(**arguments)
