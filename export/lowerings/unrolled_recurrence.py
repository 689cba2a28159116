"""Recurrent layers as one copy of their cell a time step.

TFLite's calibrator does not survive a loop (the process dies of a segmentation fault), so integers need the steps
written out. It works for a fixed number of steps.
"""

from __future__ import annotations

from typing import Any

import keras

from keras_efficient.export.lowerings import Lowering, rebuild_if

__all__ = ["MAX_STEPS", "UNROLLED_RECURRENCE", "unrolled_recurrence"]

MAX_STEPS = 200  # each step repeats the cell's operators in the file


def unrolled_recurrence(model: keras.Model) -> keras.Model:
    """Every RNN, LSTM and GRU of a fixed number of time steps up to `MAX_STEPS` with ``unroll=True``."""
    return rebuild_if(model, _applies, _lowered)


def _applies(operation: Any) -> bool:
    # A user's subclass may compute something else.
    if type(operation) not in (keras.layers.LSTM, keras.layers.GRU, keras.layers.SimpleRNN) or operation.unroll:
        return False
    steps = _steps(operation)
    return steps is not None and steps <= MAX_STEPS


def _steps(layer: Any) -> int | None:
    spec = layer.input_spec[0] if isinstance(layer.input_spec, (list, tuple)) else layer.input_spec
    shapes = [(layer.get_build_config() or {}).get("input_shape"), getattr(spec, "shape", None)]
    shape = next((shape for shape in shapes if shape), None)
    return shape[1] if shape and len(shape) == 3 else None


def _lowered(layer: keras.layers.Layer) -> keras.layers.Layer:
    twin = type(layer).from_config({**layer.get_config(), "unroll": True})
    twin.build((None, _steps(layer), layer.cell.kernel.shape[0]))
    twin.set_weights(layer.get_weights())
    return twin


UNROLLED_RECURRENCE = Lowering(name="unrolled-recurrence", function=unrolled_recurrence)
