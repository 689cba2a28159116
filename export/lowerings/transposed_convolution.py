"""A transposed convolution that enlarges by a whole factor, as a convolution and a depth-to-space.

Runtimes that have no fast kernel for a transposed convolution run the two several times faster.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from keras_efficient.export.lowerings import Lowering, rebuild_if

__all__ = ["CONVOLUTION_AND_SHUFFLE", "convolution_and_shuffle", "phase_kernels"]


def convolution_and_shuffle(model: keras.Model) -> keras.Model:
    """Every channels-last Conv2DTranspose with same padding and the stride r > 1 in both directions.

    Output pixel ``r·Y + p`` is the sum over inputs ``Y + d`` with the tap ``t = p + pad - r·d``: for each of the r²
    phases an ordinary convolution.
    """
    return rebuild_if(model, _applies, _lowered)


def _applies(operation: Any) -> bool:
    # A user's subclass may compute something else.
    if type(operation) is not keras.layers.Conv2DTranspose or not operation.built:
        return False
    stride = set(operation.strides)
    return (
        operation.padding == "same"
        and len(stride) == 1
        and stride != {1}
        and set(operation.dilation_rate) == {1}
        and operation.output_padding is None
        and operation.data_format == "channels_last"
    )


def _lowered(layer: keras.layers.Conv2DTranspose) -> keras.Model:
    block = layer.strides[0]
    kernel = phase_kernels(np.asarray(layer.kernel), block)
    inputs = keras.Input((None, None, kernel.shape[2]), name=f"{layer.name}_input")
    convolution = keras.layers.Conv2D(
        kernel.shape[3], kernel.shape[:2], padding="same", use_bias=layer.use_bias, name=f"{layer.name}_phases"
    )
    phases = convolution(inputs)
    bias = [np.tile(np.asarray(layer.bias), block * block)] if layer.use_bias else []
    convolution.set_weights([kernel, *bias])
    result = keras.ops.depth_to_space(phases, block)
    if layer.activation is not keras.activations.linear:
        result = keras.layers.Activation(layer.activation, name=f"{layer.name}_activation")(result)
    return keras.Model(inputs, result, name=layer.name)


def phase_kernels(kernel: np.ndarray, block: int) -> np.ndarray:
    """K×K×I×(r²·O) of the convolution out of k×k×O×I of the transposed one."""
    *size, filters, depth = kernel.shape
    pads = [max(0, length - block) // 2 for length in size]
    reaches = []  # of the phases' taps, in input pixels to either side
    for length, pad in zip(size, pads, strict=True):
        offsets = [d for p in range(block) for d in range(-length, length) if 0 <= p + pad - block * d < length]
        reaches.append(max(map(abs, offsets)))
    rows, columns = (2 * reach + 1 for reach in reaches)
    phases = np.zeros((rows, columns, depth, block, block, filters), kernel.dtype)
    for row, column, p, q in np.ndindex(rows, columns, block, block):
        y = p + pads[0] - block * (row - reaches[0])
        x = q + pads[1] - block * (column - reaches[1])
        if 0 <= y < size[0] and 0 <= x < size[1]:
            phases[row, column, :, p, q] = kernel[y, x].T
    return phases.reshape(rows, columns, depth, -1)


CONVOLUTION_AND_SHUFFLE = Lowering(name="convolution-and-shuffle", function=convolution_and_shuffle)
