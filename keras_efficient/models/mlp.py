"""Multilayer perceptrons that classify small images: URSABench's MLP200, MLP400 and MLP600."""

from __future__ import annotations

import math

import keras
from keras import layers

from keras_efficient.errors import WrongArgument

__all__ = ["MLP", "check_classifier"]


def MLP(width=200, depth=2, *, input_shape=(28, 28, 1), num_classes=10, dropout=0.0, name=None):
    """Images to logits: `flatten → depth times (Dense(width), ReLU, Dropout) → Dense(num_classes)`.

    On MNIST: 199,210 weights at a width of 200, 478,410 at 400, 837,610 at 600.

    Args:
        width: Integer. Of each hidden layer.
        depth: Integer. Hidden layers.
        input_shape: of one example; it is flattened.
        num_classes: Integer.
        dropout: Float in [0, 1), behind each hidden layer; the paper's twins have 0.2.
        name: of the model; `mlp_200` and so on if `None`.

    Input shape: `(batch, *input_shape)`. Output shape: `(batch, num_classes)`.

    Raises:
        WrongArgument: a number out of range, or an input with a free size.

    Source: URSABench, MLSys 2022.
    """
    check_classifier(num_classes, dropout)
    input_shape = tuple(input_shape)
    if not input_shape or None in input_shape or math.prod(input_shape) < 1:
        raise WrongArgument(f"`input_shape` must have fixed sizes. Received: input_shape={input_shape!r}.")
    if width < 1 or depth < 0:
        raise WrongArgument(f"`width` is 1 or more, `depth` 0 or more. Received: width={width!r}, depth={depth!r}.")
    inputs = keras.Input(input_shape, name="input")
    x = layers.Flatten(name="flatten")(inputs) if len(input_shape) > 1 else inputs
    for index in range(depth):
        x = layers.Dense(width, activation="relu", kernel_initializer="he_normal", name=f"hidden_{index}")(x)
        if dropout:
            x = layers.Dropout(dropout, name=f"hidden_{index}_dropout")(x)
    return keras.Model(inputs, layers.Dense(num_classes, name="logits")(x), name=name or f"mlp_{width}")


def check_classifier(num_classes, dropout):
    """Refuses numbers that no classifier can have."""
    if num_classes < 2:
        raise WrongArgument(f"`num_classes` must be 2 or more. Received: num_classes={num_classes!r}.")
    if not 0 <= dropout < 1:
        raise WrongArgument(f"`dropout` must be from 0 to below 1. Received: dropout={dropout!r}.")
