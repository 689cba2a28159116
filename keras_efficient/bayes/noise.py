"""Networks that take their chance as an input, or draw it themselves at every call, in operators of any runtime."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_efficient.errors import UnsupportedLayer, WrongArgument

__all__ = ["Chance", "Noise", "OneMember", "name_of", "noisy", "spreads"]

_KERNELS = (keras.layers.Dense, keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D)


@dataclass(frozen=True, eq=False)
class Chance:
    """Independent numbers of two values each.

    Attributes:
        low, high: the values, (size,).
        rate: with which probability it is the low one, (size,).
    """

    low: np.ndarray
    high: np.ndarray
    rate: np.ndarray

    @classmethod
    def joined(cls, parts: Iterable[Chance]) -> Chance:
        """One behind the other."""
        each = list(parts)
        return cls(*(np.concatenate([getattr(one, name) for one in each]) for name in ("low", "high", "rate")))

    def __len__(self) -> int:
        return len(self.low)

    def draw(self, rows: int, random: np.random.Generator) -> np.ndarray:
        """(rows, size) float32."""
        return np.where(random.random((rows, len(self))) < self.rate, self.low, self.high).astype(np.float32)

    def described(self) -> list[dict[str, Any]]:
        """For metadata: runs of numbers of one kind."""
        table = np.stack([self.low, self.high, self.rate], axis=1)
        starts = [0, *(np.flatnonzero((table[1:] != table[:-1]).any(axis=1)) + 1), len(self)]
        return [
            {"from": int(start), "to": int(end), "values": table[start, :2].tolist(), "rate": float(table[start, 2])}
            for start, end in itertools.pairwise(starts)
        ]


def _signs(count: int) -> Chance:
    ones = np.ones(count, np.float32)
    return Chance(-ones, ones, ones / 2)


def _kept(count: int, rate: float) -> Chance:
    ones = np.ones(count, np.float32)
    return Chance(0 * ones, ones / max(1 - rate, 1e-7), rate * ones)


def spreads(networks: Iterable[keras.Model]) -> dict[str, list[np.ndarray]]:
    """Standard deviation of each layer's weights over networks of one architecture, by the layer's name; of layers
    whose weights differ at all."""
    count, means, squares = 0, [], []  # type: ignore[var-annotated]
    names: list[tuple[str, int]] = []
    for network in networks:
        layers = [layer for layer in network.layers if layer.weights]
        values = [np.asarray(weight, np.float64) for layer in layers for weight in layer.get_weights()]
        if not count:
            names = [(layer.name, len(layer.weights)) for layer in layers]
            means, squares = ([np.zeros_like(value) for value in values] for _ in range(2))
        count += 1
        for place, value in enumerate(values):
            before = value - means[place]
            means[place] += before / count
            squares[place] += before * (value - means[place])
    each = iter(np.sqrt(square / max(count - 1, 1)) for square in squares)
    found = {name: [next(each) for _ in range(weights)] for name, weights in names}
    return {name: values for name, values in found.items() if any(value.any() for value in values)}


def noisy(
    network: keras.Model, deviations: dict[str, list[np.ndarray]], dropped: Iterable[str], seed: int
) -> tuple[keras.Model, Chance]:
    """A network whose weights are drawn for each row, of stock layers and one more input of signs.

    With independent Gaussian weights (m, s), and signs e that are fixed, r and t that are drawn:

    ```
    outputs = linear(x, m) + t · linear(x · r, s · e)
    ```

    so that each weight is m ± s. Mean, variance and covariance of outputs are those of Gaussian weights; sums of many
    are as good as Gaussian. No weight is computed, so that an int8 file has them all as constants.

    Args:
        network: of means; deployed, its layers at one level.
        deviations: of weights by the layer's name; of Dense layers and convolutions.
        dropped: names of `Dropout` layers that drop.
        seed: of the fixed signs.

    Returns:
        The model of [x, noise], and what noise is drawn from.

    Raises:
        UnsupportedLayer: other layers whose weights differ.

    Source: Wen, Vicol, Ba, Tran, Grosse, ICLR 2018, https://arxiv.org/abs/1803.04386; there signs are by example too.
    """
    random, dropped = np.random.default_rng(seed), set(dropped)
    parts: list[Chance] = []
    # How many numbers there are is known only once all layers were seen.
    for layer in network.layers:
        if layer.name in deviations:
            parts += _of_kernel(layer)
        elif layer.name in dropped:
            parts.append(_of_dropout(layer))
    if not parts:
        raise WrongArgument(f"Nothing in model {network.name!r} differs between draws.")
    chance = Chance.joined(parts)
    x = keras.Input(batch_shape=network.input.shape, dtype=network.input.dtype, name=name_of(network.input))
    noise = keras.Input((len(chance),), batch_size=network.input.shape[0], name="noise")
    ends = np.cumsum([len(part) for part in parts]).tolist()
    places = iter(zip([0, *ends[:-1]], ends, strict=True))
    slices = {}
    for layer in network.layers:  # in the order in which the parts were
        count = 2 if layer.name in deviations else int(layer.name in dropped)
        slices[layer.name] = [next(places) for _ in range(count)]

    def part(name: str, number: int, shape: tuple[int, ...]) -> Any:
        start, end = slices[name][number]
        return ops.reshape(noise[:, start:end], (-1, *shape))

    def call(operation: Any) -> Callable[..., Any]:
        name = operation.name

        def with_noise(inputs: Any, *args: Any, **kwargs: Any) -> Any:
            ones = (1,) * (len(inputs.shape) - 2)
            plain, other = _linear(operation, deviations[name], random)
            before = part(name, 0, (*ones, inputs.shape[-1]))
            outputs = plain(inputs)
            behind = part(name, 1, (*ones, outputs.shape[-1]))
            return operation.activation(outputs + behind * other(inputs * before))

        def masked(inputs: Any, *args: Any, **kwargs: Any) -> Any:
            return inputs * part(name, 0, _sizes(operation, inputs.shape))

        return with_noise if name in deviations else masked if name in dropped else operation

    return keras.Model([x, noise], network._run_through_graph(x, operation_fn=call), name=network.name), chance


def _of_kernel(layer: keras.Layer) -> list[Chance]:
    first = not isinstance(layer, _KERNELS) or getattr(layer, "data_format", "channels_last") != "channels_last"
    if first or getattr(layer, "groups", 1) != 1:
        reason = (
            f"its weights differ, which noise can follow in Dense and Conv layers only, not in {type(layer).__name__}."
        )
        raise UnsupportedLayer(layer.name, reason, hint="Choose mode 'ensemble'.")
    if len(layer._inbound_nodes) != 1:
        raise UnsupportedLayer(layer.name, "it is called several times, which noise cannot follow.")
    return [_signs(layer.input.shape[-1]), _signs(layer.output.shape[-1])]


def _of_dropout(layer: Any) -> Chance:
    return _kept(math.prod(_sizes(layer, layer.input.shape)), layer.rate)


def _sizes(layer: Any, shape: Any) -> tuple[int, ...]:
    """Of a mask, without the batch."""
    own = layer.noise_shape or (None,) * len(shape)
    sizes = tuple(size if one is None else one for one, size in zip(own[1:], shape[1:], strict=True))
    if None in sizes:
        raise UnsupportedLayer(layer.name, f"it drops places of {tuple(shape)}, whose sizes must be known.")
    return sizes


def _linear(layer: Any, deviations: list[np.ndarray], random: np.random.Generator) -> tuple[Any, Any]:
    """A layer of means without its activation, and one of deviations with signs that stay."""
    kernel, *bias = deviations
    signs = np.where(random.random(kernel.shape) < 0.5, -1, 1)
    found = []
    for suffix, weights in (("mean", layer.get_weights()), ("spread", [kernel * signs, *bias])):
        config = {**layer.get_config(), "activation": None, "name": f"{layer.name}_{suffix}"}
        twin = type(layer).from_config(config)
        twin.build(layer.input.shape)
        twin.set_weights(weights)
        found.append(twin)
    return found[0], found[1]


def name_of(tensor: Any) -> str:
    name: str = tensor._keras_history.operation.name
    return name


def _uniform(shape: Any) -> Any:
    """Within [0, 1), drawn at every call, by an operator that files have; those of `keras.random` they have not.

    Seeds of 0 are no seeds, whatever `tf.random.set_seed` was given: others would begin the same sequence whenever the
    file is opened.
    """
    import tensorflow as tf

    return tf.raw_ops.RandomUniform(shape=shape, dtype=tf.float32, seed=0, seed2=0)


@keras.saving.register_keras_serializable(package="keras_efficient")
class Noise(keras.Layer):
    """Numbers of two values for each row of its input, drawn at every call. Of TensorFlow.

    Args:
        low, high, rate: of `Chance`, lists of one length.
    """

    def __init__(self, low: list[float], high: list[float], rate: list[float], **kwargs: Any):
        super().__init__(**kwargs)
        self.low, self.high, self.rate = list(low), list(high), list(rate)

    def call(self, inputs):
        import tensorflow as tf

        low, high, rate = (tf.constant(one, tf.float32) for one in (self.low, self.high, self.rate))
        drawn = _uniform(tf.stack([tf.shape(inputs)[0], len(self.low)]))
        return low + (high - low) * tf.cast(drawn >= rate, tf.float32)

    def compute_output_shape(self, input_shape):
        return (input_shape[0], len(self.low))

    def get_config(self):
        return {**super().get_config(), "low": self.low, "high": self.high, "rate": self.rate}


@keras.saving.register_keras_serializable(package="keras_efficient")
class OneMember(keras.Layer):
    """One of several networks of one architecture, drawn at every call, for all rows. Of TensorFlow.

    Args:
        network: the architecture.
        count: of members.
    """

    def __init__(self, network: keras.Model, count: int, **kwargs: Any):
        super().__init__(**kwargs)
        self.network, self.count = network, count

    def build(self, input_shape):
        self.stacked = [
            self.add_weight((self.count, *one.shape), "zeros", one.dtype, trainable=False, name=f"weight_{number}")
            for number, one in enumerate(self._variables())
        ]

    def fill(self, networks: Iterable[keras.Model]) -> None:
        """Takes members' weights."""
        each = zip(*([np.asarray(one) for one in self._variables(network)] for network in networks), strict=True)
        for variable, values in zip(self.stacked, each, strict=True):
            variable.assign(np.stack(values))

    def call(self, inputs):
        import tensorflow as tf

        number = tf.cast(tf.floor(_uniform([1]) * self.count), tf.int32)
        mine = [tf.squeeze(tf.gather(one.value, number), 0) for one in self.stacked]
        trainable = len(self.network.trainable_variables)
        outputs, _ = self.network.stateless_call(mine[:trainable], mine[trainable:], inputs, training=False)
        return outputs

    def compute_output_shape(self, input_shape):
        return (input_shape[0], *self.network.output_shape[1:])

    def get_config(self):
        network = keras.saving.serialize_keras_object(self.network)
        return {**super().get_config(), "network": network, "count": self.count}

    @classmethod
    def from_config(cls, config):
        network = keras.saving.deserialize_keras_object(copy.deepcopy(config["network"]))
        return cls(**{**config, "network": network})

    def _variables(self, network: keras.Model | None = None) -> list[Any]:
        network = network or self.network
        return [*network.trainable_variables, *network.non_trainable_variables]
