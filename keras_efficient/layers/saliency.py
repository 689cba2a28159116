"""A head that says of each macroblock of a video frame how much it matters."""

from __future__ import annotations

import numbers

import keras
import numpy as np
from keras import ops

from keras_efficient.macroblocks import BLOCK

__all__ = ["MacroblockSaliencyHead"]


@keras.saving.register_keras_serializable(package="keras_efficient")
class MacroblockSaliencyHead(keras.layers.Layer):
    """Features of a picture to one score for each macroblock of 16×16 pixels.

    ```
    s = conv1x1(relu6(conv3x3(features)))
    scores = mean of 16/stride × 16/stride values of s         where stride divides 16; of those in the frame
    scores = s, stride/16 times larger (bilinear)              where 16 divides stride; cropped to the frame
    ```

    Drops in behind any backbone, of `keras.applications` or your own:

    ```python
    features = backbone(frames)                                  # every 32nd pixel
    scores = keras_efficient.layers.MacroblockSaliencyHead(32, frame_size=(720, 1280))(features)     # (45, 80)
    ```

    Args:
        stride: Integer: pixels of the frame from one feature to the next; it divides 16 or is a multiple of it.
        filters: Integer. Channels of the 3×3 convolution.
        frame_size: `(height, width)` of frames, in pixels, or `None`. Strides above 16 give more scores than there are
            macroblocks where they do not divide the frame: with the size known the rest is cropped.
        kernel_initializer: of both convolutions.

    Input shape: `(batch, height / stride, width / stride, channels)`, rounded up, as convolutions with
    `padding="same"` give it. Output shape: `(batch, height / 16, width / 16)`, rounded up.

    Raises:
        ValueError: a stride that does not fit, or features of another size than the frame's.

    Source: AccMPEG: Optimizing Video Encoding for Accurate Video Analytics, MLSys 2022.
    """

    def __init__(self, stride, filters=32, *, frame_size=None, kernel_initializer="glorot_uniform", **kwargs):
        super().__init__(**kwargs)
        for name, value in (("stride", stride), ("filters", filters)):
            if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < 1:
                raise ValueError(f"`{name}` must be an integer from 1 on. Received: {name}={value!r}.")
        if BLOCK % stride and stride % BLOCK:
            raise ValueError(f"`stride` must divide {BLOCK} or be a multiple of it. Received: stride={stride}.")
        self.stride, self.filters = int(stride), int(filters)
        self.frame_size = None if frame_size is None else tuple(map(int, frame_size))
        self.kernel_initializer = keras.initializers.get(kernel_initializer)

    def build(self, input_shape):
        if self.frame_size is not None:
            wanted = tuple(-(-size // self.stride) for size in self.frame_size)
            if any(have not in (None, want) for have, want in zip(input_shape[1:3], wanted, strict=True)):
                raise ValueError(
                    f"Frames of {self.frame_size} have {wanted} features of stride {self.stride}. "
                    f"Received: {input_shape[1:3]}."
                )
        initializer = self.kernel_initializer
        shapes = {"mix": (3, 3, input_shape[-1], self.filters), "score": (1, 1, self.filters, 1)}
        for name, shape in shapes.items():
            kernel = self.add_weight(name=f"{name}_kernel", shape=shape, initializer=initializer)
            bias = self.add_weight(name=f"{name}_bias", shape=shape[-1:], initializer="zeros")
            setattr(self, f"{name}_kernel", kernel)
            setattr(self, f"{name}_bias", bias)
        self.built = True

    def call(self, inputs):
        options = {"padding": "same", "data_format": "channels_last"}
        x = ops.relu6(ops.conv(inputs, self.mix_kernel, **options) + self.mix_bias)
        x = ops.conv(x, self.score_kernel, **options) + self.score_bias
        if self.stride < BLOCK:
            x = ops.cast(_averaged(x, BLOCK // self.stride), self.compute_dtype)
        elif self.stride > BLOCK:
            x = self._cropped(_enlarged(x, self.stride // BLOCK))
        return ops.squeeze(x, axis=-1)

    def _cropped(self, x):
        if self.frame_size is None:
            return x
        rows, columns = (-(-size // BLOCK) for size in self.frame_size)
        return x[:, :rows, :columns]

    def compute_output_shape(self, input_shape):
        def blocks(size, frame):
            if size is None:
                return None if frame is None else -(-frame // BLOCK)
            many = -(-size * self.stride // BLOCK)
            return many if frame is None else -(-frame // BLOCK)

        frame = self.frame_size or (None, None)
        return (input_shape[0], *map(blocks, input_shape[1:3], frame))

    def compute_output_spec(self, inputs):
        return keras.KerasTensor(self.compute_output_shape(inputs.shape), dtype=self.compute_dtype)

    def deploy(self):
        """A functional model of stock layers."""
        if not self.built:
            raise ValueError("You must build the layer (call it once) before `deploy()`.")
        rows, columns = (None, None) if self.frame_size is None else (-(-s // self.stride) for s in self.frame_size)
        inputs = keras.Input((rows, columns, self.mix_kernel.shape[2]), dtype="float32", name="features")
        mix = keras.layers.Conv2D(self.filters, 3, padding="same", name="mix", dtype="float32")
        score = keras.layers.Conv2D(1, 1, name="score", dtype="float32")
        x = score(keras.layers.ReLU(6.0, name="relu6", dtype="float32")(mix(inputs)))
        if self.stride < BLOCK:
            x = _averaged(x, BLOCK // self.stride)
        elif self.stride > BLOCK:
            factor = self.stride // BLOCK
            x = keras.layers.UpSampling2D(factor, interpolation="bilinear", name="enlarge", dtype="float32")(x)
            x = self._cropped_by_a_layer(x)
        mix.set_weights([ops.convert_to_numpy(value) for value in (self.mix_kernel, self.mix_bias)])
        score.set_weights([ops.convert_to_numpy(value) for value in (self.score_kernel, self.score_bias)])
        scores = ops.squeeze(x, axis=-1)
        _name_operations(scores)
        return keras.Model(inputs, scores, name=self.name)

    def _cropped_by_a_layer(self, x):
        if self.frame_size is None:
            return x
        more = [size - -(-frame // BLOCK) for size, frame in zip(x.shape[1:3], self.frame_size, strict=True)]
        if not any(more):
            return x
        return keras.layers.Cropping2D(tuple((0, some) for some in more), name="crop", dtype="float32")(x)

    def get_config(self):
        return {
            **super().get_config(),
            "stride": self.stride,
            "filters": self.filters,
            "frame_size": self.frame_size,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
        }


def _name_operations(x):
    """Fixed names for all that leads to a tensor and is no layer; Keras numbers it anew at every call in a process."""
    found, waiting = [], [x]
    while waiting:
        operation = waiting.pop()._keras_history.operation
        if operation not in found:
            found.append(operation)
            waiting += [tensor for node in operation._inbound_nodes for tensor in node.input_tensors]
    for number, operation in enumerate(one for one in found if not isinstance(one, keras.layers.Layer)):
        operation.name = f"scores_{number}" if number else "scores"


def _averaged(x, factor):
    """Means of factor × factor values from the upper left on; at the lower and the right edge of those that there are.

    Padding "same" would also put some before the first, and shift all macroblocks by up to half of one.
    """

    def means(values):
        return ops.average_pool(values, factor, strides=factor, padding="valid", data_format="channels_last")

    more = [(0, 0), (0, factor - 1), (0, factor - 1), (0, 0)]
    rows, columns = x.shape[1:3]
    if rows is None or columns is None:
        return means(ops.pad(x, more)) / means(ops.pad(ops.ones_like(x), more))
    if rows % factor == 0 and columns % factor == 0:
        return means(x)
    down, across = (factor / np.minimum(factor, size - np.arange(0, size, factor)) for size in (rows, columns))
    return ops.multiply(means(ops.pad(x, more)), np.outer(down, across).astype("float32")[..., None])


def _enlarged(x, factor):
    size = (x.shape[1] * factor, x.shape[2] * factor)
    return ops.image.resize(x, size, interpolation="bilinear", data_format="channels_last")
