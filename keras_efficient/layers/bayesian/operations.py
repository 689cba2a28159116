"""What stock layers do with their kernel, before bias and activation: mixed in beside them."""

from __future__ import annotations

import inspect
from typing import Any

import keras
from keras import ops

__all__ = ["NOT_TAKEN", "Convolution", "Product", "TransposedConvolution", "drops_in", "named"]

# Arguments of stock layers that change a kernel which is not a plain weight here.
NOT_TAKEN = ("lora_rank", "lora_alpha", "quantization_config")


def drops_in(cls: Any, mixed_in: type) -> None:
    """Gives a class the arguments of the stock layer that it is made of, and those by keyword of what is mixed in.

    The stock layer is kept in `cls.stock`.
    """
    cls.stock = next(one for one in cls.__mro__ if one.__module__.partition(".")[0] == "keras")

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        mixed_in.__init__(self, *args, **kwargs)  # type: ignore[misc]

    own = inspect.signature(mixed_in.__init__).parameters.values()  # type: ignore[misc]
    theirs = inspect.signature(cls.stock.__init__).parameters.values()
    added = [one for one in own if one.kind is one.KEYWORD_ONLY]
    *kept, last = [one for one in theirs if one.name not in NOT_TAKEN]
    __init__.__signature__ = inspect.Signature([*kept, *added, last])  # type: ignore[attr-defined]
    cls.__init__ = __init__


def named(model: keras.Model) -> keras.Model:
    """The model, with fixed names of all that is no layer; Keras numbers it anew at every call in a process."""
    for number, operation in enumerate(model.operations):
        if not isinstance(operation, keras.layers.Layer):
            operation.name = f"{model.name}_{number}"
    return model


class Product:
    """Of `Dense`."""

    def linear(self, inputs: Any, kernel: Any) -> Any:
        """Outputs of any kernel, in its dtype."""
        return ops.matmul(inputs, kernel)

    def axes(self) -> tuple[int, int]:
        """How many axes are places that share the kernel, and which axis has the features."""
        return 0, -1


class Convolution:
    """Of `Conv1D`, `Conv2D`, `Conv3D`."""

    def linear(self: Any, inputs: Any, kernel: Any) -> Any:
        """Outputs of any kernel, in its dtype."""
        padding = self.padding
        if padding == "causal":  # Conv1D only
            inputs, padding = ops.pad(inputs, self._compute_causal_padding()), "valid"
        options = {"strides": self.strides, "dilation_rate": self.dilation_rate, "data_format": self.data_format}
        return ops.conv(inputs, kernel, padding=padding, **options)

    def axes(self: Any) -> tuple[int, int]:
        """How many axes are places that share the kernel, and which axis has the features."""
        return self.rank, -1 if self.data_format == "channels_last" else 1


class TransposedConvolution(Convolution):
    """Of `Conv1DTranspose`, `Conv2DTranspose`, `Conv3DTranspose`."""

    def linear(self: Any, inputs: Any, kernel: Any) -> Any:
        """Outputs of any kernel, in its dtype."""
        return ops.conv_transpose(
            inputs,
            kernel,
            strides=self.strides,
            padding=self.padding,
            output_padding=self.output_padding,
            dilation_rate=self.dilation_rate,
            data_format=self.data_format,
        )
