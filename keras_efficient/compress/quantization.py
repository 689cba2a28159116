"""Quantisation-aware training: the model learns with the rounding that its 8-bit file will do."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from keras_efficient.compress._tfmot import import_tf_keras, import_tfmot
from keras_efficient.compress.bridge import Bridge, operation_twin_class, to_tf_keras
from keras_efficient.compress.session import Session
from keras_efficient.deploy import rebuild
from keras_efficient.errors import UnsupportedLayer

if TYPE_CHECKING:
    from keras_efficient.export import Report

__all__ = ["QuantizationSession", "quantize_aware"]


def quantize_aware(model: keras.Model) -> QuantizationSession:
    """Prepares a model for training in which kernels and activations are rounded as in an int8 file.

    Kernels are rounded to 8 bits, symmetric, with one scale for each output channel of a convolution and one for all of
    a dense or depthwise kernel; activations to 8 bits with a minimum and a maximum that follow the training by a moving
    average (Jacob et al., CVPR 2018). PReLU and `keras.ops` operations are covered too. Nothing holds the zeros of a
    pruned model: training moves them.

    Args:
        model: a functional or Sequential Keras 3 model, best a trained one; it is deployed first and not changed.

    Returns:
        A `QuantizationSession`. The first `fit` sets the ranges from its first batch (arrays and `tf.data`; from a
        generator they begin at ±6 and take some thousand steps to settle).

    Raises:
        UnsupportedLayer: a layer that tfmot cannot quantise (recurrent, 1-D convolution, layer normalisation, a batch
            normalisation that follows no convolution, a layer that is called twice), or as in `to_tf_keras`.
        MissingDependency: see `to_tf_keras`.
    """
    bridge = to_tf_keras(model)
    tfmot, tf_keras = import_tfmot(), import_tf_keras()
    quantization = tfmot.quantization.keras
    paths = {twin.name: twin.path for twin in bridge.twins}
    for twin in bridge.twins:
        if twin.calls > 1:
            raise UnsupportedLayer(
                twin.path,
                f"it is called {twin.calls} times, and tfmot learns one range for a layer",
                hint="Give every call a layer of its own, or quantise after training: export.save(precision='int8').",
            )

    def annotate(layer):
        return quantization.quantize_annotate_layer(layer, _config(layer, paths[layer.name]))

    annotated = tf_keras.models.clone_model(bridge.model, clone_function=annotate)
    classes = {kind.__name__: kind for kind in (*_configs().values(), operation_twin_class())}
    try:
        with quantization.quantize_scope(classes):
            trained = quantization.quantize_apply(annotated)
    except (RuntimeError, ValueError) as error:
        raise _refusal(error, paths, bridge) from error
    for wrapper in trained.layers:
        # tfmot lists the kernel of a frozen layer among those to train.
        if hasattr(wrapper, "_weight_vars") and not wrapper.trainable:
            wrapper._non_trainable_weights.extend(wrapper._trainable_weights)
            wrapper._trainable_weights.clear()
    layers = [twin.path for twin in bridge.twins if twin.weights]
    return QuantizationSession(bridge, trained, layers, {})


class QuantizationSession(Session):
    """A `Session` whose model rounds; see there for what it shares with pruning and clustering."""

    def strip(self, *, ranges: bool = True) -> keras.Model:
        """The trained model as a Keras 3 model of stock layers and operations.

        Kernels lie on their 8-bit grid. With `ranges`, `keras.quantizers.fake_quant_with_min_max_vars` operations carry
        the trained range of every inner activation, and `export.save(…, precision="int8")` writes them into the file;
        only what has none (the outputs, some operations) is calibrated. Such a model rounds as an int8 file does, so
        int8 is the only precision that `export.save` takes it in. With ``ranges=False`` the model is plain: for
        another precision (all activations are calibrated then), for further training, or for a rewrite that looks for
        layers side by side.

        Raises:
            WrongArgument: nothing has been trained yet.
        """
        plain = super().strip()
        if not ranges:
            return plain
        found = self._ranges()

        def follow(path: str, tensor: keras.KerasTensor) -> keras.KerasTensor:
            if path not in found:
                return tensor
            rounded = keras.quantizers.fake_quant_with_min_max_vars(tensor, *found[path])
            # Keras would number it, otherwise in every strip().
            rounded._keras_history.operation.name = f"{path.replace('/', '.')}_range"
            return rounded

        return rebuild(plain, lambda operation, path: None, follow=follow)

    def export(self, path: str | Path, *, precision: str = "int8", **options: Any) -> Report:
        """As `Session.export`, in int8; it needs `calibration=`.

        For another precision: ``export.save(session.strip(ranges=False), path, precision=…)``.
        """
        return super().export(path, precision=precision, **options)

    def _before_fit(self, x: Any = None, *args: Any, **options: Any) -> None:
        """Sets each range to what its layer gives on the first batch: tfmot's moving average forgets slowly."""
        batch = None if self._trained else _first_batch(x)
        if batch is None:
            return
        model = self._bridge.model
        names = [twin.name for twin in self._bridge.twins]
        outputs = import_tf_keras().Model(model.inputs, [model.get_layer(name).output for name in names])
        by_path = {twin.path: value for twin, value in zip(self._bridge.twins, outputs(batch), strict=True)}
        for path, variables in self._range_variables().items():
            if path in by_path:
                value = by_path[path].numpy()
                variables["min_var"].assign(min(0.0, float(value.min())))
                variables["max_var"].assign(max(0.0, float(value.max())))

    def _strip(self) -> keras.Model:
        wrappers = {layer.layer.name: layer for layer in self.model.layers if hasattr(layer, "_weight_vars")}
        weights = {
            twin.name: _weights(wrappers[twin.name], twin.weights) for twin in self._bridge.twins if twin.weights
        }
        return self._bridge.back(weights)

    def _ranges(self) -> dict[str, tuple[float, float]]:
        """Trained minimum and maximum by the path of the input, layer or operation that they belong to."""
        variables = self._range_variables()
        return {path: (float(v["min_var"]), float(v["max_var"])) for path, v in variables.items()}

    def _range_variables(self) -> dict[str, Any]:
        """The variables `min_var` and `max_var` of every activation's range, by path."""
        paths = {twin.name: twin.path for twin in self._bridge.twins}
        result = {}
        for layer in self.model.layers:
            if hasattr(layer, "quantizer_vars"):
                # tfmot puts one quantiser behind each input, under a name of its own.
                source = layer.input._keras_history.layer.name
                result[source] = layer.quantizer_vars
            elif hasattr(layer, "_quantize_activations"):
                path = paths[layer.layer.name]
                for activation in layer._quantize_activations:
                    if hasattr(activation, "_post_activation_vars"):
                        result[path] = activation._post_activation_vars
                if layer._output_quantizers:
                    result[path] = layer._output_quantizer_vars
        return result


def _first_batch(x: Any) -> Any:
    """The first inputs of `fit`'s data; `None` where taking them would use them up."""
    import tensorflow as tf

    if isinstance(x, tf.data.Dataset):
        batch = next(iter(x))
        return batch[0] if isinstance(batch, tuple) else batch
    is_array = all(hasattr(item, "shape") for item in tf.nest.flatten(x)) and x is not None
    return tf.nest.map_structure(lambda item: tf.convert_to_tensor(item[:_FIRST]), x) if is_array else None


_FIRST = 64  # examples; a range that one of them misses grows in training


def _weights(wrapper: Any, names: tuple[str, ...]) -> list[np.ndarray]:
    """A layer's weights out of its wrapper: those that are quantised on their grid, the others as they are."""
    variables = {_last_name(variable): variable for variable in wrapper.weights}
    rounded = {
        # In training mode the quantiser takes the range from the weights as they are now, after the last step.
        _last_name(weight): quantizer(weight, True, weights=quantizer_variables).numpy()
        for weight, quantizer, quantizer_variables in wrapper._weight_vars
    }
    return [rounded[name] if name in rounded else variables[name].numpy() for name in names]


def _last_name(variable: Any) -> str:
    return variable.name.split(":")[0].split("/")[-1]


# What these do keeps the range of their input.
_MOVING_OPERATIONS = frozenset(
    (
        "DepthToSpace",
        "SpaceToDepth",
        "Reshape",
        "Transpose",
        "Squeeze",
        "ExpandDims",
        "GetItem",
        "Flip",
        "Split",
        "Roll",
    )
)
_MOVING_LAYERS = frozenset(("MaxPooling1D", "RepeatVector", "GaussianNoise", "GaussianDropout", "AlphaDropout"))
_RANGE_LAYERS = frozenset(("Subtract", "Multiply", "Maximum", "Minimum", "Average", "Rescaling"))
_SPLIT_LAYERS = frozenset(("SeparableConv1D", "SeparableConv2D"))


def _config(layer: Any, path: str) -> Any:
    """The QuantizeConfig for a tf_keras layer; `None` where tfmot has one of its own."""
    configs, kind = _configs(), type(layer).__name__
    if kind == "PReLU":
        return configs["prelu"]()
    if isinstance(layer, operation_twin_class()):
        return configs["nothing"]() if layer.kind in _MOVING_OPERATIONS else configs["output"]()
    if kind in _MOVING_LAYERS:
        return configs["nothing"]()
    if kind in _RANGE_LAYERS:
        return configs["output"]()
    if kind in _SPLIT_LAYERS:
        raise UnsupportedLayer(
            path, f"tfmot takes {kind} apart", hint="Build it of a depthwise and a 1×1 convolution to quantise it."
        )
    return None


@cache
def _configs() -> dict[str, type]:
    """QuantizeConfigs for what tfmot does not know. Classes made late, since tfmot is imported late."""
    quantization: Any = import_tfmot().quantization.keras

    class Nothing(quantization.QuantizeConfig):
        def get_weights_and_quantizers(self, layer):
            return []

        def get_activations_and_quantizers(self, layer):
            return []

        def set_quantize_weights(self, layer, quantize_weights):
            pass

        def set_quantize_activations(self, layer, quantize_activations):
            pass

        def get_output_quantizers(self, layer):
            return []

        def get_config(self):
            return {}

    class Output(Nothing):
        def get_output_quantizers(self, layer):
            return [
                quantization.quantizers.MovingAverageQuantizer(
                    num_bits=8, per_axis=False, symmetric=False, narrow_range=False
                )
            ]

    class Slopes(Output):
        # One scale for all slopes, as LiteRT's PRELU has it.
        def get_weights_and_quantizers(self, layer):
            quantizer = quantization.quantizers.LastValueQuantizer(
                num_bits=8, per_axis=False, symmetric=True, narrow_range=True
            )
            return [(layer.alpha, quantizer)]

        def set_quantize_weights(self, layer, quantize_weights):
            layer.alpha = quantize_weights[0]

    return {"nothing": Nothing, "output": Output, "prelu": Slopes}


def _refusal(error: Exception, paths: dict[str, str], bridge: Bridge) -> UnsupportedLayer:
    """tfmot names the tf_keras layer in its message; ours names the path."""
    text = str(error).strip().splitlines()[0]
    named = re.search(r"Layer ([^:\s]+):", text)
    path = paths.get(named.group(1)) if named else None
    reason = "tensorflow-model-optimization cannot quantise it" if path else f"it cannot be quantised ({text})"
    hint = "Quantise after training instead: export.save(model, path, precision='int8', calibration=…)."
    return UnsupportedLayer(path or bridge.source.name, reason, hint=hint)
