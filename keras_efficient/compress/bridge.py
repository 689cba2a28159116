"""The bridge from a deployed Keras 3 model to tf_keras and back.

tf_keras reads neither a Keras 3 configuration nor a Keras 3 file. So the graph is replayed: for every call in it, a
tf_keras layer of the same class and options is called on the mapped tensors, then the weights are copied layer by
layer, and both models are run on one sample. Nested models are laid out flat, since tfmot does not look into them.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import keras
import numpy as np
from keras.src.models.functional import Functional

from keras_efficient.compress._tfmot import import_tf_keras, require_tensorflow_backend
from keras_efficient.deploy import deploy
from keras_efficient.errors import UnsupportedLayer

__all__ = ["Bridge", "Twin", "operation_twin_class", "to_tf_keras"]


@dataclass(frozen=True)
class Twin:
    """A layer (or `keras.ops` operation) and its counterpart.

    Attributes:
        path: of the layer in the Keras 3 model.
        name: of the tf_keras layer.
        weights: last parts of the counterpart's weight names, in the order of the layer's weights.
        calls: how often the layer is called.
    """

    path: str
    name: str
    weights: tuple[str, ...]
    calls: int


@dataclass(frozen=True)
class Bridge:
    """A deployed model, its tf_keras counterpart, and which layer is which.

    Attributes:
        source: the deployed Keras 3 model.
        model: the tf_keras model: flat; inputs and outputs in the order in which the source's flatten.
        twins: in the order of the graph.
    """

    source: keras.Model
    model: Any
    twins: tuple[Twin, ...]

    def back(self, weights: Mapping[str, Sequence[np.ndarray]]) -> keras.Model:
        """A copy of the source that carries the given weights.

        Args:
            weights: lists of arrays by the tf_keras layer's name; layers that are not named keep theirs.
        """
        result = deploy(self.source)
        for twin in self.twins:
            if twin.weights and twin.name in weights:
                _layer_at(result, twin.path).set_weights(list(weights[twin.name]))
        return result


def to_tf_keras(model: keras.Model) -> Bridge:
    """Deploys a Keras 3 model and builds the same model of tf_keras layers.

    Initialisers, regularisers and constraints are left behind: the weights are there already, and a penalty that should
    go on holding belongs into the loss.

    Raises:
        UnsupportedLayer: a layer without a counterpart of the same inference, named by its path (or by the model's
            name, where it is inside a nested model).
        WrongArgument: Keras does not run on TensorFlow.
        MissingDependency: tf_keras is not installed.
    """
    require_tensorflow_backend()
    tf_keras = import_tf_keras()
    source = deploy(model)
    replay = _Replay()
    inputs = [_input(tensor) for tensor in source.inputs]
    outputs = replay.run(source, inputs, "")
    twin_model = tf_keras.Model(_bare(inputs), _bare(outputs), name=source.name)
    twins = tuple(replay.copy_weights(twin_model))
    _refuse_different(source, twin_model, twins)
    return Bridge(source, twin_model, twins)


class _Replay:
    """Calls tf_keras layers where the Keras 3 graph calls its own."""

    def __init__(self) -> None:
        self._twins: dict[int, tuple[keras.Operation, Any, str]] = {}
        self._calls: dict[int, int] = {}
        self._names: set[str] = set()

    def run(self, model: keras.Model, inputs: Sequence[Any], path: str) -> list[Any]:
        graph = model._functional if isinstance(model, keras.Sequential) else model
        tensors = {id(x): y for x, y in zip(graph.inputs, inputs, strict=True)}
        for depth in sorted(graph._nodes_by_depth, reverse=True):
            for node in graph._nodes_by_depth[depth]:
                # As Keras does it: a mask's graph may hang on tensors outside of the model.
                if node.is_input or any(id(x) not in tensors for x in node.input_tensors):
                    continue
                args, kwargs = node.arguments.fill_in(tensors)
                outputs = self._call(node.operation, args, kwargs, path)
                tensors.update(zip(map(id, node.outputs), keras.tree.flatten(outputs), strict=True))
        return [tensors[id(x)] for x in graph.outputs]

    def copy_weights(self, model: Any) -> list[Twin]:
        """Gives the layers of the tf_keras model their weights, and tells which layer is which."""
        result, used = [], {layer.name for layer in model.layers}
        for key, (operation, twin, path) in self._twins.items():
            if twin.name not in used:
                continue  # It made a mask: those go from layer to layer by themselves.
            if isinstance(operation, keras.Layer):
                _copy_weights(operation, twin, path)
            names = tuple(weight.name.split(":")[0].split("/")[-1] for weight in twin.weights)
            result.append(Twin(path, twin.name, names, self._calls[key]))
        return result

    def _call(self, operation: keras.Operation, args: tuple, kwargs: dict, path: str) -> Any:
        path = f"{path}/{operation.name}" if path else operation.name
        if isinstance(operation, Functional | keras.Sequential):
            return self.run(operation, keras.tree.flatten(args), path)
        if type(operation) is keras.layers.Identity:
            return args[0]
        kwargs = {key: value for key, value in kwargs.items() if key not in ("mask", "training") and value is not None}
        if not isinstance(operation, keras.Layer):
            twin, args, kwargs = self._operation(operation, args, kwargs, path)
            self._twins[id(twin)], self._calls[id(twin)] = (operation, twin, path), 1
        else:
            if id(operation) not in self._twins:
                self._twins[id(operation)] = (operation, _layer_twin(operation, path, self._name(path)), path)
            self._calls[id(operation)] = self._calls.get(id(operation), 0) + 1
            twin = self._twins[id(operation)][1]
        try:
            return twin(*args, **kwargs)
        except Exception as error:
            reason = f"its counterpart in tf_keras cannot be called ({str(error).strip().splitlines()[0]})"
            raise UnsupportedLayer(path, reason, hint="Replace it by layers that Keras 2 has too.") from error

    def _operation(self, operation, args, kwargs, path) -> tuple[Any, tuple, dict]:
        """A tf_keras layer for a `keras.ops` operation, and what to call it on."""
        tf_keras = import_tf_keras()
        flat = keras.tree.flatten((args, kwargs))
        tensors = [x for x in flat if _is_symbolic(x)]
        name = self._name(path)
        kind, inputs = type(operation).__name__, _bare(tensors)
        # tfmot knows what these do to a range.
        if kind in _MERGES and len(flat) == 2 and len(tensors) == 2 and tensors[0].shape == tensors[1].shape:
            return getattr(tf_keras.layers, _MERGES[kind])(name=name), (inputs,), {}
        if kind in ("Relu", "Relu6") and len(flat) == 1:
            return tf_keras.layers.ReLU(6.0 if kind == "Relu6" else None, name=name), (inputs,), {}
        places = iter(range(len(tensors)))
        arguments = keras.tree.map_structure(
            lambda x: f"{_PLACE}{next(places)}" if _is_symbolic(x) else x, [list(args), kwargs]
        )
        try:
            config = {
                "operation": keras.saving.serialize_keras_object(operation),
                "arguments": keras.saving.serialize_keras_object(arguments),
            }
        except Exception as error:
            raise UnsupportedLayer(path, f"the operation {kind} cannot be written as a configuration") from error
        return operation_twin_class()(**config, name=name), (inputs,), {}

    def _name(self, path: str) -> str:
        name, count = path.replace("/", "."), 1
        # TensorFlow's scopes do not begin with an underscore.
        name = f"layer{name}" if name.startswith("_") else name
        unique = name
        while unique in self._names:
            unique, count = f"{name}_{count}", count + 1
        self._names.add(unique)
        return unique


def _is_symbolic(x: Any) -> bool:
    try:
        return import_tf_keras().backend.is_keras_tensor(x)
    except ValueError:  # what tf_keras raises for a slice, a number, …
        return False


_PLACE = "tensor "
_MERGES = {"Add": "Add", "Subtract": "Subtract", "Multiply": "Multiply", "Maximum": "Maximum", "Minimum": "Minimum"}


@cache
def operation_twin_class() -> Any:
    """The tf_keras layer that runs a `keras.ops` operation. A class made late, since tf_keras is imported late."""
    tf_keras: Any = import_tf_keras()

    class OperationTwin(tf_keras.layers.Layer):
        def __init__(self, operation, arguments, **kwargs):
            super().__init__(**kwargs)
            self._config = {"operation": operation, "arguments": arguments}
            self.kind = operation["class_name"]
            self._operation = keras.saving.deserialize_keras_object(operation)
            self._arguments = keras.saving.deserialize_keras_object(arguments)

        def call(self, inputs):
            tensors = inputs if isinstance(inputs, list | tuple) else [inputs]

            def fill(x):
                is_place = isinstance(x, str) and x.startswith(_PLACE)
                return tensors[int(x.removeprefix(_PLACE))] if is_place else x

            args, kwargs = keras.tree.map_structure(fill, self._arguments)
            return self._operation(*args, **kwargs)

        def get_config(self):
            return {**super().get_config(), **self._config}

    return OperationTwin


# Options of Keras 3 that change nothing of the inference, or that are crossed apart.
_IGNORED = frozenset(
    (
        "name",
        "dtype",
        "seed",
        "use_cudnn",
        "lora_rank",
        "lora_alpha",
        "quantization_config",
        "autocast",
        "layer",
        "backward_layer",
    )
)
_HIDDEN = frozenset(("trainable", "zero_output_for_mask"))  # taken among **kwargs
_RENAMED = {"LeakyReLU": {"negative_slope": "alpha"}}


def _layer_twin(layer: keras.Layer, path: str, name: str) -> Any:
    """An unbuilt tf_keras layer of the same class and options."""
    tf_keras = import_tf_keras()
    kind = type(layer).__name__
    twin_class = getattr(tf_keras.layers, kind, None)
    if twin_class is None or type(layer).__module__.partition(".")[0] != "keras" or kind in _REFUSED:
        raise UnsupportedLayer(
            path,
            f"{type(layer).__name__} has no counterpart in tf_keras"
            if twin_class is None
            else f"{kind} is not carried over",
            hint="Compression works on stock layers that Keras 2 has too, in functional and Sequential models.",
        )
    config = _options(layer, twin_class, path) | {"name": name, "dtype": layer.compute_dtype}
    if isinstance(layer, keras.layers.TimeDistributed):
        return twin_class(_layer_twin(layer.layer, f"{path}/{layer.layer.name}", layer.layer.name), **config)
    if isinstance(layer, keras.layers.Bidirectional):
        forward, backward = (
            _layer_twin(inner, f"{path}/{inner.name}", inner.name)
            for inner in (layer.forward_layer, layer.backward_layer)
        )
        return twin_class(forward, backward_layer=backward, **config)
    try:
        return twin_class(**config)
    except Exception as error:
        reason = f"{kind} of tf_keras does not take its options ({str(error).strip().splitlines()[0]})"
        raise UnsupportedLayer(path, reason) from error


# Their options hold layers, models or code of the user's.
_REFUSED = frozenset(("Lambda", "RNN", "StackedRNNCells", "Wrapper"))


def _options(layer: keras.Layer, twin_class: type, path: str) -> dict[str, Any]:
    renamed = _RENAMED.get(type(layer).__name__, {})
    known = {
        parameter.name
        for base in twin_class.__mro__
        if "__init__" in vars(base)
        for parameter in inspect.signature(vars(base)["__init__"]).parameters.values()
    }
    options: dict[str, Any] = {}
    for key, value in layer.get_config().items():
        key = renamed.get(key, key)
        if key in _IGNORED or key.endswith(("_initializer", "_regularizer", "_constraint")):
            continue
        if key in known or (key in _HIDDEN and value is not False):
            if isinstance(value, dict) and "class_name" in value:
                raise UnsupportedLayer(path, f"its option {key}={value['class_name']} is an object, not a stock name")
            options[key] = value
        elif value not in (None, False):
            raise UnsupportedLayer(path, f"{type(layer).__name__} of tf_keras has no option {key}={value!r}")
    return options


def _copy_weights(layer: keras.Layer, twin: Any, path: str) -> None:
    values = layer.get_weights()
    shapes, twin_shapes = [tuple(v.shape) for v in values], [tuple(w.shape) for w in twin.weights]
    if shapes != twin_shapes:
        raise UnsupportedLayer(path, f"its weights have the shapes {shapes}, those of its counterpart {twin_shapes}")
    if values:
        twin.set_weights(values)


def _input(tensor: keras.KerasTensor) -> Any:
    name = tensor._keras_history.operation.name
    batch, *shape = tensor.shape
    return import_tf_keras().Input(tuple(shape), batch_size=batch, dtype=tensor.dtype, name=name)


def _bare(items: Sequence[Any]) -> Any:
    return items[0] if len(items) == 1 else list(items)


def _layer_at(model: keras.Model, path: str) -> keras.Layer:
    layer: keras.Layer = model
    for name in path.split("/"):
        layer = layer.get_layer(name)
    return layer


def _refuse_different(source: keras.Model, twin: Any, twins: Sequence[Twin]) -> None:
    """Runs both models on one sample. Two layers of one name need not compute the same in Keras 2 and 3."""
    graph = source._functional if isinstance(source, keras.Sequential) else source
    sample = [_sample(tensor) for tensor in graph.inputs]
    packed = keras.tree.pack_sequence_as(graph._inputs_struct, sample)
    try:
        expected = graph(packed, training=False)
    except Exception:
        return  # It does not take the made-up size, so nothing can be said.
    if _equal(expected, twin(_bare(sample), training=False)):
        return
    tf_keras = import_tf_keras()
    path = source.name
    for pair in twins:
        if "/" in pair.path or pair.calls > 1:
            continue
        operation = next(op for op in graph.operations if op.name == pair.path)
        until = keras.Model(graph._inputs_struct, operation._inbound_nodes[-1].outputs[0])(packed, training=False)
        twin_until = tf_keras.Model(twin.inputs, twin.get_layer(pair.name).output)(_bare(sample), training=False)
        if not _equal(until, twin_until):
            path = pair.path
            break
    raise UnsupportedLayer(
        path,
        "its counterpart in tf_keras computes something else",
        hint="An activation or layer means another thing in Keras 2 (hard_sigmoid does): replace it.",
    )


def _equal(expected: Any, found: Any) -> bool:
    # The same operators in the same order: any real difference is far larger.
    for want, have in zip(keras.tree.flatten(expected), keras.tree.flatten(found), strict=True):
        want, have = np.asarray(want, "float64"), np.asarray(have, "float64")
        tolerance = 1e-4 * max(1, np.abs(want[np.isfinite(want)]).max(initial=0))
        if want.shape != have.shape or not np.allclose(have, want, rtol=0, atol=tolerance, equal_nan=True):
            return False
    return True


def _sample(tensor: keras.KerasTensor) -> np.ndarray:
    shape = (tensor.shape[0] or 2, *(size or 32 for size in tensor.shape[1:]))
    rng = np.random.default_rng(0)
    # Integers are mostly indices: 0 and 1 are in every vocabulary, and 0 is what a mask hides.
    return (rng.random(shape) if "float" in tensor.dtype else rng.integers(0, 2, shape)).astype(tensor.dtype)
