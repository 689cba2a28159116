"""Gaussians around the most probable weights, as wide as the curvature there says."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import keras
import numpy as np
from keras import ops

from keras_efficient.bayes.compiled import compiled
from keras_efficient.bayes.data import Data
from keras_efficient.bayes.inference._likelihood import derived
from keras_efficient.bayes.inference._runs import ModelFunction, check_run, divided
from keras_efficient.bayes.inference.maximum import MAP, tops
from keras_efficient.bayes.members import Members
from keras_efficient.bayes.posterior import StackedPosterior
from keras_efficient.errors import UnsupportedLayer, WrongArgument

__all__ = [
    "Curvature",
    "Diagonal",
    "DiagonalLaplace",
    "Full",
    "Kronecker",
    "KroneckerLaplace",
    "LastLayerLaplace",
    "last_dense",
    "log_marginal",
    "tuned_precision",
]

FACTORS = 10.0 ** np.arange(-1, 5.5, 0.5)  # of the marginal likelihood's precision, that are tried on held-out data


class Curvature(Protocol):
    """A positive semidefinite matrix H of a layer's weights, which are (inputs and a one for the bias, units)."""

    @property
    def eigenvalues(self) -> np.ndarray:
        """Of H."""
        ...

    def draw(self, random: np.random.Generator, precision: float) -> np.ndarray:
        """(inputs + 1, units) of N(0, (H + precision I)⁻¹)."""
        ...


class Full:
    """Any H, (size, size) with size = inputs · units, rows of weights one behind the other."""

    def __init__(self, matrix: np.ndarray, units: int):
        values, self._axes = np.linalg.eigh(matrix)
        self.eigenvalues, self._units = np.maximum(values, 0.0), units

    def draw(self, random: np.random.Generator, precision: float) -> np.ndarray:
        width = 1 / np.sqrt(self.eigenvalues + precision)
        drawn: np.ndarray = self._axes @ (width * random.standard_normal(len(width)))
        return drawn.reshape(-1, self._units)


class Diagonal:
    """H of independent weights, given as (inputs, units)."""

    def __init__(self, diagonal: np.ndarray):
        self.eigenvalues = np.maximum(diagonal, 0.0)

    def draw(self, random: np.random.Generator, precision: float) -> np.ndarray:
        drawn: np.ndarray = random.standard_normal(self.eigenvalues.shape) / np.sqrt(self.eigenvalues + precision)
        return drawn


class Kronecker:
    """H = A ⊗ G of what goes into a layer and of what comes back to it, (inputs, inputs) and (units, units)."""

    def __init__(self, inputs: np.ndarray, outputs: np.ndarray):
        (a, self._in), (g, self._out) = np.linalg.eigh(inputs), np.linalg.eigh(outputs)
        self.eigenvalues = np.outer(np.maximum(a, 0.0), np.maximum(g, 0.0))

    def draw(self, random: np.random.Generator, precision: float) -> np.ndarray:
        noise = random.standard_normal(self.eigenvalues.shape) / np.sqrt(self.eigenvalues + precision)
        drawn: np.ndarray = self._in @ noise @ self._out.T
        return drawn


def log_marginal(eigenvalues: np.ndarray, squared_norm: float, precision: float) -> float:
    """What the logarithm of the marginal likelihood has that hangs on the prior's precision δ.

    ```
    ln p(D) ≈ ln p(D | w*) − ½ δ ‖w*‖² + ½ Σ ln(δ / (λ + δ))        λ: eigenvalues of H
    ```
    """
    return float(0.5 * (np.log(precision) - np.log(eigenvalues + precision)).sum() - 0.5 * precision * squared_norm)


def tuned_precision(eigenvalues: np.ndarray, squared_norm: float) -> float:
    """The prior's precision where `log_marginal` is highest.

    There δ ‖w*‖² is the number of weights that data determine, Σ λ / (λ + δ). The left side rises with δ and the right
    side falls, so the place is one and bisection finds it.

    Raises:
        WrongArgument: weights or curvature are all zero, where no precision is the best.
    """
    values = np.ravel(eigenvalues)
    if not (squared_norm > 0 and values.max(initial=0.0) > 0):
        raise WrongArgument("Weights or their curvature are all zero: no prior precision is better than another.")
    low, high = -40.0, 40.0  # of ln δ
    while high - low > 1e-10:
        middle = 0.5 * (low + high)
        delta = math.exp(middle)
        determined = (values / (values + delta)).sum()
        low, high = (middle, high) if delta * squared_norm < determined else (low, middle)
    return math.exp(0.5 * (low + high))


@dataclass(frozen=True)
class _Laplace(MAP):
    """What the three share: a maximum, a curvature for each layer, a precision of the prior, draws."""

    prior_precision: float | None = None
    held_out: float = 0.0
    draws: int = 50

    def fit(self, model_fn: ModelFunction, data: Data, seed: int) -> StackedPosterior:
        """Draws around the maximum that `MAP` finds with the same numbers and seed, on what is not held out.

        Its `diagnostics` have the `prior_precision`.

        Raises:
            UnsupportedLayer: a layer whose curvature is not known, named.
            WrongArgument: no draw, a precision not above 0, or a part to hold out that leaves nothing.
        """
        if self.draws < 1 or (self.prior_precision is not None and not self.prior_precision > 0):
            numbers = f"draws={self.draws!r}, prior_precision={self.prior_precision!r}"
            raise WrongArgument(f"Laplace draws once or more, with a precision above 0: {numbers}.")
        check_run(model_fn, data, seed)
        rest, held = divided(data, self.held_out, seed) if self.held_out else (data, None)
        members = tops(self, 1, model_fn, rest, seed)
        layers = self._layers(members.model)
        network = _Network(members, layers)
        around = _Around(network, self._curvatures(network, rest))
        precision = self.prior_precision or around.precision()
        if self.prior_precision is None and held is not None:
            precision = _best_on(held, network, around, precision, seed)
        drawn = around.draws(np.random.default_rng([seed, 3]), precision, self.draws)
        others = [np.repeat(one[None], self.draws, axis=0) for one in network.others]
        return StackedPosterior(Members(members.model, drawn, others), diagnostics={"prior_precision": precision})

    def _layers(self, model: keras.Model) -> list[keras.Layer]:
        return _known_layers(model, type(self).__name__)

    def _curvatures(self, network: _Network, data: Data) -> Sequence[Curvature]:
        raise NotImplementedError("Each method has a curvature of its own.")


@dataclass(frozen=True)
class LastLayerLaplace(_Laplace):
    """Laplace's approximation of the last layer's weights, with all their covariances; the others stay at the maximum.

    H is the Hessian of the negative log likelihood, exact since logits are linear in these weights:

    ```
    H = Σ_examples (diag p − p pᵀ) ⊗ φ φᵀ        φ: the last layer's inputs, and a one
    p(w | data) ≈ N(w*, (H + δ I)⁻¹)
    ```

    Attributes:
        learning_rate, …, batch_size: of the way to the maximum, as of `MAP`.
        prior_precision: δ; `None`: it is tuned.
        held_out: part of the data on which δ is tuned, by the negative log likelihood of draws; 0: on all data, where
            the marginal likelihood is highest.
        draws: how many.

    Source: Daxberger et al., NeurIPS 2021, https://arxiv.org/abs/2106.14806.
    """

    def _layers(self, model: keras.Model) -> list[keras.Layer]:
        return [last_dense(model, type(self).__name__)]

    def _curvatures(self, network: _Network, data: Data) -> list[Curvature]:
        total: Any = 0.0
        block = compiled(_block)
        for (rows,), logits in network.inputs(data):
            total = total + _double(block(rows, ops.softmax(logits)))
        size, units = total.shape[:2]
        return [Full(total.reshape(size * units, size * units), units)]


@dataclass(frozen=True)
class DiagonalLaplace(_Laplace):
    """Laplace's approximation of all weights as if they were independent, by the diagonal of the Gauss-Newton matrix.

    ```
    H = Σ_examples Jᵀ (diag p − p pᵀ) J        J: derivatives of logits by weights
    ```

    Draws of all weights go through the network itself, and not through its linear form, for which this Gaussian is
    right: with the marginal likelihood's δ they are far too wide. So a part of the data is held out by default.

    Attributes:
        learning_rate, …, draws: of `LastLayerLaplace`.

    Source: Daxberger et al., NeurIPS 2021, https://arxiv.org/abs/2106.14806.
    """

    held_out: float = 0.1

    def _curvatures(self, network: _Network, data: Data) -> list[Curvature]:
        return [Diagonal(squares) for squares in network.summed(data, _squares)]


@dataclass(frozen=True)
class KroneckerLaplace(_Laplace):
    """Laplace's approximation of all weights, with covariances within each layer that are a Kronecker product.

    ```
    H of a layer ≈ mean(a aᵀ) ⊗ Σ g gᵀ        a: its inputs, and a one; g: columns of the matrix at its outputs
    ```

    Means and sums go over examples, and over places of the picture in a convolution. See `DiagonalLaplace` about draws.

    Attributes:
        learning_rate, …, draws: of `LastLayerLaplace`.

    Source: Martens, Grosse, ICML 2015, https://arxiv.org/abs/1503.05671; Ritter, Botev, Barber, ICLR 2018.
    """

    held_out: float = 0.1

    def _curvatures(self, network: _Network, data: Data) -> list[Curvature]:
        inputs: list[Any] = [0.0] * len(network.layers)
        product = compiled(_product)
        for rows, _ in network.inputs(data):
            # The mean over places, since outputs are summed over them.
            inputs = [
                total + _double(product(one, one)) / one.shape[1] for total, one in zip(inputs, rows, strict=True)
            ]
        outputs = network.summed(data, lambda _, columns: _product(columns, columns))
        return [Kronecker(a / len(data), g) for a, g in zip(inputs, outputs, strict=True)]


def last_dense(model: keras.Model, method: str) -> keras.layers.Dense:
    """The layer that gives a model's logits.

    Raises:
        UnsupportedLayer: it is not a Dense layer without an activation, or is called more than once.
    """
    layer = model.layers[-1]
    linear = isinstance(layer, keras.layers.Dense) and layer.activation is keras.activations.linear
    if not linear or len(layer._inbound_nodes) != 1 or layer.output is not model.outputs[0]:
        reason = f"{method} needs a model that ends in one Dense layer without an activation."
        raise UnsupportedLayer(layer.path, reason, hint="Give logits, and no softmax.")
    return layer


def _known_layers(model: keras.Model, method: str) -> list[keras.Layer]:
    """Those with weights, all of which must be of the kinds whose curvature is known."""
    layers = [layer for layer in model.layers if layer.trainable_variables]
    for layer in layers:
        convolution = type(layer) is keras.layers.Conv2D and layer.groups == 1 and _is_last(layer)
        if not (convolution or type(layer) is keras.layers.Dense) or len(layer._inbound_nodes) != 1:
            reason = f"{method} knows Dense and Conv2D layers that are called once, with channels last and one group."
            raise UnsupportedLayer(layer.path, reason, hint="LastLayerLaplace takes any layers before the last one.")
    return layers


def _is_last(layer: Any) -> bool:
    return bool(layer.data_format == "channels_last")


def _block(rows: Any, p: Any) -> Any:
    """Σ_examples φ φᵀ ⊗ (diag p − p pᵀ), (inputs, units, inputs, units)."""
    rows = ops.reshape(rows, (-1, rows.shape[-1]))
    spread = p[:, :, None] * (ops.eye(p.shape[1]) - p[:, None, :])
    return ops.einsum("nuc,ni,nj->iujc", spread, rows, rows)


def _squares(rows: Any, columns: Any) -> Any:
    """Σ_examples (Σ_places a gᵀ)², (inputs, units)."""
    if rows.shape[1] == 1:
        return ops.matmul(ops.transpose(ops.square(rows[:, 0])), ops.square(columns[:, 0]))
    return ops.sum(ops.square(ops.einsum("npi,npu->niu", rows, columns)), axis=0)


def _product(left: Any, right: Any) -> Any:
    """Σ_examples Σ_places a aᵀ."""
    return ops.einsum("npi,npj->ij", left, right)


class _Around:
    """The Gaussian around one network's weights, those of some layers.

    Args:
        network: with its layers.
        curvatures: for each of them.
    """

    def __init__(self, network: _Network, curvatures: Sequence[Curvature]):
        order = {id(variable): place for place, variable in enumerate(network.model.trainable_variables)}
        self._trainable, self._curvatures = network.trainable, curvatures
        # Places of kernel and bias among the model's weights.
        self._places = [[order[id(one)] for one in layer.trainable_variables] for layer in network.layers]
        self._middles = [_matrix([network.trainable[place] for place in some]) for some in self._places]

    def precision(self) -> float:
        """Of the prior, where the marginal likelihood is highest."""
        eigenvalues = np.concatenate([np.ravel(one.eigenvalues) for one in self._curvatures])
        return tuned_precision(eigenvalues, sum(float(np.square(one).sum()) for one in self._middles))

    def draws(self, random: np.random.Generator, precision: float, count: int) -> list[np.ndarray]:
        """For each of the model's trainable weights (count, …)."""
        stacked = [np.repeat(one[None], count, axis=0) for one in self._trainable]
        for curvature, middle, places in zip(self._curvatures, self._middles, self._places, strict=True):
            kernel, *bias = (stacked[place] for place in places)
            for row in range(count):
                drawn = middle + curvature.draw(random, precision)
                kernel[row] = drawn[: len(drawn) - len(bias)].reshape(kernel[row].shape)
                for one in bias:
                    one[row] = drawn[-1]
        return stacked


def _best_on(held: Data, network: _Network, around: _Around, begin: float, seed: int) -> float:
    """The precision at which the mean prediction of some draws has the least negative log likelihood."""
    run = compiled(lambda trainable, x: ops.softmax(network.model.stateless_call(trainable, network.others, x)[0]))
    losses = {}
    for precision in begin * FACTORS:
        stacked = around.draws(np.random.default_rng([seed, 6]), precision, 8)  # with the same noise at each
        own = np.zeros(len(held))
        for row in range(8):
            trainable = [ops.convert_to_tensor(one[row]) for one in stacked]
            for start in range(0, len(held), 1000):
                some = slice(start, start + 1000)
                p = ops.convert_to_numpy(run(trainable, ops.convert_to_tensor(held.x[some])))
                own[some] += p[np.arange(len(p)), held.y[some]]
        losses[float(precision)] = -np.log(np.maximum(own, np.finfo(np.float32).tiny)).mean()
    return min(losses, key=losses.__getitem__)


def _matrix(weights: list[np.ndarray]) -> np.ndarray:
    """(inputs, units) of a kernel, and the bias as a last row."""
    kernel = weights[0].reshape(-1, weights[0].shape[-1])
    return np.concatenate([kernel, *(bias[None] for bias in weights[1:])]).astype(np.float64)


class _Network:
    """One network whose layers' inputs, and what comes back to their outputs, are seen.

    Inputs are (examples, places, numbers and a one), outputs (examples, places, units): a convolution is a dense layer
    at each place of the picture.

    Args:
        members: the network, one.
        layers: that are looked at.
    """

    BATCH = 100

    def __init__(self, members: Members, layers: list[Any]):
        model = members.model
        self.model, self.layers = model, layers
        both = (members.trainable, members.non_trainable)
        self.trainable, self.others = ([ops.convert_to_numpy(one)[0] for one in some] for some in both)
        self._seen = keras.Model(model.inputs, [*(layer.input for layer in layers), model.output])
        variables = [*model.trainable_variables, *model.non_trainable_variables]
        values = {id(one): value for one, value in zip(variables, [*self.trainable, *self.others], strict=True)}
        # The other model may hold the same variables in another order.
        kinds = (self._seen.trainable_variables, self._seen.non_trainable_variables)
        self._weights = [[ops.convert_to_tensor(values[id(one)]) for one in some] for some in kinds]

    def inputs(self, data: Data) -> Iterator[tuple[list[Any], Any]]:
        """For each batch those of each layer, and logits."""
        run = compiled(self._run)
        for x in self._batches(data):
            yield run(x, *self._weights)

    def summed(self, data: Data, measure: Callable[[Any, Any], Any]) -> list[np.ndarray]:
        """For each layer `measure(inputs, outputs)`, summed over examples and over columns of the Gauss-Newton matrix.

        Outputs are derivatives by them of √p_c (logit_c − Σ p logit), p fixed, for each class c in turn. The squares
        of these columns add up to the matrix: Σ_c p_c (e_c − p) (e_c − p)ᵀ = diag p − p pᵀ.
        """

        def column(shifts: Any, x: Any, label: Any, trainable: Any, others: Any) -> Any:
            with _shifted(self.layers, shifts):
                inputs, logits = self._run(x, trainable, others)
            p = ops.stop_gradient(ops.softmax(logits))
            centred = ops.take(logits, label, axis=1) - ops.sum(p * logits, axis=1)
            return ops.sum(ops.sqrt(ops.take(p, label, axis=1)) * centred), inputs

        def measured(*some: Any) -> Any:
            (_, inputs), outputs = derived(column)(*some)
            pairs = zip(inputs, outputs, strict=True)
            return [measure(a, ops.reshape(g, (len(a), -1, g.shape[-1]))) for a, g in pairs]

        run = compiled(measured)
        totals: list[Any] = [0.0] * len(self.layers)
        for x in self._batches(data):
            shifts = [ops.zeros((len(x), *layer.output.shape[1:])) for layer in self.layers]
            for label in range(data.num_classes or 0):
                found = run(shifts, x, ops.convert_to_tensor(label), *self._weights)
                totals = [total + _double(one) for total, one in zip(totals, found, strict=True)]
        return totals

    def _run(self, x: Any, trainable: Any, others: Any) -> tuple[list[Any], Any]:
        (*inputs, logits), _ = self._seen.stateless_call(trainable, others, x, training=False)
        return [_rows(layer, one) for layer, one in zip(self.layers, inputs, strict=True)], ops.cast(logits, "float32")

    def _batches(self, data: Data) -> Iterator[Any]:
        for start in range(0, len(data), self.BATCH):
            yield ops.convert_to_tensor(data.x[start : start + self.BATCH])


def _rows(layer: Any, inputs: Any) -> Any:
    """What a layer's weights are multiplied with at each place, with a one for its bias."""
    if isinstance(layer, keras.layers.Conv2D):
        how = {"strides": layer.strides, "dilation_rate": layer.dilation_rate, "padding": layer.padding}
        inputs = ops.image.extract_patches(inputs, layer.kernel_size, **how)
    rows = ops.reshape(inputs, (len(inputs), -1, inputs.shape[-1]))
    return ops.concatenate([rows, ops.ones_like(rows[..., :1])], axis=-1) if layer.use_bias else rows


@contextlib.contextmanager
def _shifted(layers: list[Any], shifts: list[Any]) -> Iterator[None]:
    """Adds to what layers give their activations, as long as it lasts."""
    kept = [layer.activation for layer in layers]
    try:
        for layer, activation, shift in zip(layers, kept, shifts, strict=True):
            layer.activation = lambda sums, activation=activation, shift=shift: activation(sums + shift)
        yield
    finally:
        for layer, activation in zip(layers, kept, strict=True):
            layer.activation = activation


def _double(value: Any) -> np.ndarray:
    return ops.convert_to_numpy(value).astype(np.float64)
