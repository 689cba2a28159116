"""Classifiers by the names that URSABench knows them by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

import keras

from keras_efficient.models.mlp import MLP
from keras_efficient.models.resnet import CifarResNet, PreResNet, ResNet50, WideResNet

__all__ = ["CLASSIFIERS"]

# Each takes `input_shape`, `num_classes`, `dropout` and `name`.
CLASSIFIERS: Mapping[str, Callable[..., keras.Model]] = MappingProxyType(
    {
        "mlp": MLP,
        "mlp200": partial(MLP, 200),
        "mlp400": partial(MLP, 400),
        "mlp600": partial(MLP, 600),
        "resnet20": partial(CifarResNet, 20),
        "resnet32": partial(CifarResNet, 32),
        "resnet56": partial(CifarResNet, 56),
        "preresnet20": partial(PreResNet, 20),
        "preresnet164": partial(PreResNet, 164),
        "wideresnet28x10": partial(WideResNet, 28, 10),
        "resnet50": ResNet50,
        "resnet50-small": partial(ResNet50, small_images=True, num_classes=10),
    }
)
