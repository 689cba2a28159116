"""Magnitude pruning: the smallest weights are set to zero while the others go on learning."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import keras

from keras_efficient.compress._tfmot import import_tf_keras, import_tfmot
from keras_efficient.compress.bridge import to_tf_keras
from keras_efficient.compress.session import Session, keep_mask, selected
from keras_efficient.errors import WrongArgument

__all__ = ["prune"]


def prune(
    model: keras.Model,
    sparsity: float | None = None,
    *,
    pattern: tuple[int, int] | None = None,
    begin_step: int = 0,
    end_step: int | None = None,
    frequency: int = 100,
    layers: Iterable[str] | None = None,
) -> Session:
    """Prepares a model for training with pruned kernels.

    A kernel's smallest magnitudes are set to zero and held there: a part `sparsity` of each kernel, or, with `pattern`
    ``(m, n)``, the m smallest of every n consecutive input channels (``(2, 4)`` is what sparse tensor cores and XNNPACK
    run faster); a shorter group at the end counts as if zeros filled it. Kernels of convolutions, dense layers,
    attention and embeddings are pruned; depthwise kernels, biases, recurrent and frozen layers are not, and with a
    pattern transposed convolutions neither (`session.skipped` names them).

    Args:
        model: a functional or Sequential Keras 3 model; it is deployed first and not changed.
        sparsity: final part of zeros, between 0 and 1; 0.5 without a pattern.
        pattern: ``(m, n)``, in the place of `sparsity`.
        begin_step: optimizer steps before pruning begins.
        end_step: with it the sparsity rises from 0 by a cubic law (Zhu and Gupta, 2017) until this step; without it, it
            is there at once.
        frequency: optimizer steps from one choice of the zeros to the next; a pattern's are chosen once, at the first.
        layers: paths of the layers to prune, by default all that can be.

    Returns:
        A `Session`; its `strip()` has the zeros in its kernels.

    Raises:
        WrongArgument: sparsity, pattern or steps that make no sense, or nothing to prune (`UnknownName` for a path).
        UnsupportedLayer, MissingDependency: see `to_tf_keras`.
    """
    _check(sparsity, pattern, begin_step, end_step, frequency)
    bridge = to_tf_keras(model)
    tfmot, tf_keras = import_tfmot(), import_tf_keras()
    chosen = selected(bridge, layers)
    if pattern is not None:
        options = {"sparsity_m_by_n": tuple(pattern)}
        goal = pattern[0] / pattern[1]
    else:
        options, goal = {}, 0.5 if sparsity is None else sparsity
    schedule = _schedule(tfmot, goal, begin_step, end_step, frequency)
    reasons = {
        twin.name: _obstacle(bridge.model.get_layer(twin.name), twin.path in chosen, pattern) for twin in bridge.twins
    }

    def wrap(layer):
        if layer.name in reasons and reasons[layer.name] is None:
            return keep_mask(tfmot.sparsity.keras.prune_low_magnitude(layer, pruning_schedule=schedule, **options))
        return layer

    pruned = [twin.path for twin in bridge.twins if reasons[twin.name] is None]
    if not pruned:
        raise WrongArgument(f"Model {model.name!r} has no layer that can be pruned.", hint="Choose other layers.")
    skipped = {twin.path: why for twin in bridge.twins if twin.weights and (why := reasons[twin.name])}
    training = tf_keras.models.clone_model(bridge.model, clone_function=wrap)
    return _PruningSession(bridge, training, pruned, skipped, last_step=end_step or begin_step + 1)


class _PruningSession(Session):
    def __init__(self, *args: Any, last_step: int):
        super().__init__(*args)
        self._last_step = last_step

    def _callbacks(self) -> list[Any]:
        return [import_tfmot().sparsity.keras.UpdatePruningStep()]

    def _strip(self) -> keras.Model:
        weights = {}
        for layer in self.model.layers:
            if hasattr(layer, "pruning_obj"):
                if (steps := int(layer.pruning_step)) < self._last_step:
                    warnings.warn(
                        f"{steps} steps were trained, the sparsity is complete after {self._last_step}.", stacklevel=4
                    )
                layer.pruning_obj.weight_mask_op()
                layer = layer.layer
            weights[layer.name] = layer.get_weights()
        return self._bridge.back(weights)


def _schedule(tfmot: Any, goal: float, begin_step: int, end_step: int | None, frequency: int) -> Any:
    schedules = tfmot.sparsity.keras
    if end_step is None:
        # tfmot's first step is 1, and it acts where (step - begin) is a multiple of the frequency: without the + 1 the
        # first hundred steps would prune nothing.
        return schedules.ConstantSparsity(goal, begin_step=begin_step + 1, frequency=frequency)
    # For the same reason the last step must be one at which it acts, or the goal would not be reached.
    turns = max(1, round((end_step - begin_step) / frequency))
    frequency = max(1, (end_step - begin_step) // turns)
    return schedules.PolynomialDecay(
        0.0, goal, begin_step=end_step - turns * frequency, end_step=end_step, frequency=frequency
    )


def _obstacle(layer: Any, chosen: bool, pattern: tuple[int, int] | None) -> str | None:
    """Why a tf_keras layer is not pruned; `None` where it is."""
    from tensorflow_model_optimization.python.core.sparsity.keras.prune_registry import PruneRegistry

    names = PruneRegistry._LAYERS_WEIGHTS_MAP.get(type(layer), [])
    if not chosen:
        return "not chosen"
    if not layer.trainable:
        return "it is frozen (trainable=False)"
    if not names:
        return f"tfmot prunes no weight of {type(layer).__name__}"
    if pattern is None:
        return None
    shape = tuple(layer.kernel.shape) if hasattr(layer, "kernel") else ()
    if len(shape) not in (2, 4):
        return f"a pattern needs a kernel of 2 or 4 axes, {type(layer).__name__} has none"
    if "Transpose" in type(layer).__name__:
        return "tfmot lays the pattern along the output channels of a transposed convolution"
    # tfmot pads a short group with zeros, takes those as the pruned ones, and prunes nothing, without a word.
    if shape[-2] < pattern[1]:
        return f"its {shape[-2]} input channels are fewer than the {pattern[1]} of the pattern"
    return None


def _check(
    sparsity: float | None, pattern: tuple[int, int] | None, begin_step: int, end_step: int | None, frequency: int
) -> None:
    if sparsity is not None and not 0.0 < sparsity < 1.0:
        raise WrongArgument(f"sparsity={sparsity}: it is a part of the weights, between 0 and 1.")
    if pattern is not None:
        if sparsity is not None:
            raise WrongArgument(f"sparsity={sparsity} and pattern={pattern}: a pattern has its own sparsity; give one.")
        if begin_step or end_step is not None:
            raise WrongArgument(
                f"begin_step={begin_step}, end_step={end_step}: a pattern is there from the first step."
            )
        if len(pattern) != 2 or not 0 < pattern[0] < pattern[1]:
            raise WrongArgument(f"pattern={pattern}: (m, n) sets m of every n weights to zero, with 0 < m < n.")
    if begin_step < 0 or frequency < 1 or (end_step is not None and end_step <= begin_step):
        raise WrongArgument(
            f"begin_step={begin_step}, end_step={end_step}, frequency={frequency}: these do not count up from 0.",
            hint="0 <= begin_step < end_step, and frequency from 1.",
        )
