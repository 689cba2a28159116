"""The one bridge between the two forms of a model: what is trained, and the stock Keras layers that are shipped.

A layer of this package trains in a form of its own (expanded convolutions, hashed tables, a posterior) and answers
``deploy()`` with stock layers that compute the same inference. :func:`deploy` does so for a whole model::

    from keras_efficient.deploy import deploy

    deploy(model).save("model.keras")      # opens in a process where this package is not installed

Everything downstream (compression, lowering, conversion) sees deployed models only.
"""

from __future__ import annotations

import inspect
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import keras
import numpy as np
from keras.src.backend import compute_output_spec
from keras.src.models.functional import Functional

from keras_efficient.errors import UnsupportedLayer

__all__ = ["Deployable", "answering", "deploy", "foreign_layers", "rebuild"]

Replace = Callable[[keras.Operation, str], keras.Operation | None]
Follow = Callable[[str, keras.KerasTensor], keras.KerasTensor]


@runtime_checkable
class Deployable(Protocol):
    """A layer, or a model, that knows stock layers with the same inference."""

    def deploy(self) -> keras.Operation:
        """Returns a built stock layer, or a functional or Sequential model of them, with its weights set.

        A functional model takes tensors of one rank. A layer that takes several says with a second method,
        ``call_deployed(model, *args, **kwargs)``, how its own calls are made of calls of that model.

        A layer that is a model's last may answer in another form than it is trained in: a model that gives several
        tensors where the layer gives one. A method ``answer()`` then returns the layer in a training form that gives
        these too, in a model that takes one tensor, for whoever compares the two (:func:`answering`); or `None`.

        It may be called on built layers only. What it returns is copied, so sharing variables with it does no harm.
        """
        ...


def deploy(model: keras.Model) -> keras.Model:
    """Returns the deployed form of a model: stock Keras layers that compute the same inference.

    Every :class:`Deployable` layer is replaced by what its ``deploy()`` returns, wherever it sits: in nested models, in
    ``TimeDistributed``, ``Bidirectional``, ``RNN`` and other stock wrappers. Stock layers and the user's own layers are
    copied (:func:`foreign_layers` lists the latter). Names of inputs, outputs and layers, the structure of inputs and
    outputs and the sharing of layers stay; reduced precision (``mixed_float16``, ``bfloat16``, ...) becomes float32.

    Args:
        model: a built functional or Sequential model, or a model with a ``deploy()`` of its own. It is not changed, and
            the result shares no variable with it.

    Returns:
        An uncompiled functional or Sequential model. Deploying it again gives an equal model.

    Raises:
        UnsupportedLayer: a subclassed model without ``deploy()``, an unbuilt model or layer, or a layer that cannot be
            made again from its configuration; the error names its path.
    """
    return rebuild(model, _deployed)


def rebuild(
    model: keras.Model,
    replace: Replace,
    *,
    follow: Follow | None = None,
    shared: Callable[[keras.Layer], bool] | None = None,
) -> keras.Model:
    """Copies a model, giving some of its operations another form, or something behind them.

    Args:
        model: a built functional or Sequential model. It is not changed.
        replace: ``replace(operation, path)`` is asked once for every layer and ``keras.ops`` operation (and for the
            model itself, with an empty path); `path` joins the names of the models and wrappers around it by ``/``. It
            returns `None` to keep the operation, or the layer, model or operation to put in its place: called with the
            same arguments (or as the operation's ``call_deployed`` says), weights set.
        follow: ``follow(path, tensor)`` is asked for every input and for every operation with a single output. What it
            returns takes the tensor's place inside the model; the model's outputs (and those of the models in it) stay
            what their operation gives, so that they keep their names. A Sequential model becomes a functional one.
        shared: which layers that keep their form, or are put in a place, are taken themselves instead of copied. The
            given model must then be the caller's own, whose layers learn of their further calls.

    Returns:
        A new model that shares no variable with the given one or with the replacements, but for layers that are
        `shared`.

    Raises:
        UnsupportedLayer: as :func:`deploy`.
    """
    with _default_policy_in_float32():
        return _Rebuilding(replace, follow, shared).run(model)


def answering(model: keras.Model) -> keras.Model:
    """The model in its training form, but giving what its deployed form gives: the model itself where that is alike.

    Layers that have an ``answer()`` are replaced by what it returns.
    """
    found = any(hasattr(layer, "answer") and not _is_stock(layer) for layer in model._flatten_layers())
    return rebuild(model, _answer) if found else model


def foreign_layers(model: keras.Model) -> tuple[str, ...]:
    """Paths of the layers that are the user's own: classes that do not come with Keras, and ``Lambda``.

    They pass through :func:`deploy` unchanged, and whoever opens the saved model needs their code.
    """
    found: dict[str, None] = {}

    def visit(layer: keras.Layer, path: str) -> None:
        for inner in layer._flatten_layers(include_self=False, recursive=False):
            inner_path = _join(path, inner.name)
            # A Sequential holds a Functional of its own layers, under another name.
            if isinstance(layer, keras.Sequential) and isinstance(inner, Functional) and inner not in layer.layers:
                continue
            if _is_stock(inner) or (isinstance(inner, keras.Model) and _has_graph(inner)):
                visit(inner, inner_path)
            else:
                found[inner_path] = None

    visit(model, "")
    return tuple(found)


class _Rebuilding:
    """One copy in the making: which operation has become which, and whose state must still be copied."""

    def __init__(self, replace: Replace, follow: Follow | None, shared: Callable[[keras.Layer], bool] | None):
        self._replace = replace
        self._follow = follow
        self._shared = shared or (lambda layer: False)
        # Keyed by identity, so that a shared layer stays shared; the original is held to keep its id taken.
        self._twins: dict[int, tuple[keras.Operation, keras.Operation]] = {}
        self._states: list[tuple[keras.Layer, keras.Layer, str]] = []
        # Of operations that gave one tensor and now give several: these by the first of them, and the operation's path.
        self._answers: dict[int, tuple[Any, str]] = {}
        # Of copies of nested models that give masks as outputs of their own: which outputs they are of.
        self._masked: dict[int, list[int]] = {}

    def run(self, model: keras.Model) -> keras.Model:
        replacement = self._replace(model, "")
        twin = self._model(model if replacement is None else replacement, "", model.name)
        for source, copy, path in self._states:
            self._copy_state(source, copy, path)
        return twin

    def _call(self, operation: keras.Operation, path: str) -> Callable[..., Any]:
        """What is called in the operation's place."""
        called = self._plain_call(operation, path)

        def call(*args: Any, **kwargs: Any) -> Any:
            for tensor in keras.tree.flatten((args, kwargs)):
                if id(tensor) in self._answers:
                    raise UnsupportedLayer(
                        _join(path, operation.name),
                        f"it takes the logits of {self._answers[id(tensor)][1]!r}, which deployed gives answers.",
                        hint="Let that layer be the model's last.",
                    )
            outputs = called(*args, **{**kwargs, **_masks(operation, args, kwargs)})
            flat = keras.tree.flatten(outputs)
            if len(operation._inbound_nodes[0].output_tensors) == 1 and len(flat) > 1:
                self._answers[id(flat[0])] = (outputs, _join(path, operation.name))
                return flat[0]
            return outputs

        return call

    def _plain_call(self, operation: keras.Operation, path: str) -> Callable[..., Any]:
        twin = self._twin(operation, path)
        if id(twin) in self._masked:
            return _setting_masks(twin, self._masked[id(twin)])
        is_deployed = isinstance(twin, keras.Model) and not isinstance(operation, keras.Model)
        adapted = getattr(operation, "call_deployed", None) if is_deployed else None
        is_wrapper = isinstance(operation, keras.layers.TimeDistributed)
        if not adapted and not (is_wrapper and type(twin.layer) is not type(operation.layer)):
            return twin

        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                if adapted:
                    return adapted(twin, *args, **kwargs)
                compute_output_spec(twin, *args, **kwargs)  # Keras would not look into it before its first use
                return twin(*args, **kwargs)
            except ValueError as error:
                raise UnsupportedLayer(
                    _join(path, operation.name),
                    f"its deployed form cannot be called as it is ({_first_line(error)})",
                    hint="Is one layer called by itself, and by a wrapper with ids of other ranks? Give that its own.",
                ) from error

        return call

    def _twin(self, operation: keras.Operation, path: str) -> Any:
        if id(operation) not in self._twins:
            self._twins[id(operation)] = (operation, self._make(operation, _join(path, operation.name)))
        return self._twins[id(operation)][1]

    def _make(self, operation: keras.Operation, path: str) -> keras.Operation:
        source = self._source(operation, path)
        frozen = isinstance(operation, keras.Layer) and not operation.trainable
        if isinstance(source, keras.Model):
            twin = self._model(source, path, operation.name, is_replacement=source is not operation)
        elif not isinstance(source, keras.Layer):
            return _copy_unbuilt(source, path, operation.name)
        elif self._shared(source):
            source.name = operation.name
            return source
        else:
            twin = self._wrapper(source, path, operation.name) or _copy_unbuilt(source, path, operation.name)
            self._states.append((source, twin, path))
        if frozen:
            twin.trainable = False
        return twin

    def _source(self, operation: keras.Operation, path: str) -> Any:
        replacement = self._replace(operation, path)
        return operation if replacement is None else replacement

    def _model(self, model: keras.Model, path: str, name: str, is_replacement: bool = False) -> keras.Model:
        if not isinstance(model, keras.Model) or not _has_graph(model):
            raise UnsupportedLayer(
                path or name,
                f"{type(model).__name__} is a subclassed model: its graph of layers is not known",
                hint="Build it with the functional API, or give it a deploy() that returns a functional model.",
            )
        # Nobody asks for the inputs of a replacement by name, and Keras numbers them anew at every deploy().
        rename = {id(x): f"input_{i}" for i, x in enumerate(keras.tree.flatten(model.inputs))} if is_replacement else {}
        if isinstance(model, keras.Sequential):
            twin = self._sequential(model, path, name, rename)
        else:
            twin = self._functional(model, path, name, rename)
        if not model.trainable:
            twin.trainable = False
        # Keeps replacements alive as long as their inner layers' ids serve as keys.
        self._twins[id(model)] = (model, twin)
        return twin

    def _functional(self, model: Functional, path: str, name: str, rename: dict[int, str]) -> keras.Model:
        inputs = keras.tree.map_structure(lambda tensor: _copy_input(tensor, rename), model.input)
        if self._follow is None:
            return self._unfollowed(model, inputs, path, name)
        originals: dict[int, tuple[keras.KerasTensor, keras.KerasTensor]] = {}

        def followed(tensor, operation_name):
            result = self._follow(_join(path, operation_name), tensor)
            originals[id(result)] = (result, tensor)
            return result

        def call(operation):
            def run(*args, **kwargs):
                outputs = self._call(operation, path)(*args, **kwargs)
                single = isinstance(outputs, keras.KerasTensor) and not isinstance(operation, keras.Model)
                return followed(outputs, operation.name) if single else outputs

            return run

        started = keras.tree.map_structure(lambda x: followed(x, x._keras_history.operation.name), inputs)
        outputs = model._run_through_graph(started, operation_fn=call)
        outputs = keras.tree.map_structure(lambda x: originals[id(x)][1] if id(x) in originals else x, outputs)
        return keras.Model(inputs, self._whole_answers(outputs), name=name)

    def _unfollowed(self, model: Functional, inputs: Any, path: str, name: str) -> keras.Model:
        """The copy of a model; with the masks of its outputs behind them, where it is nested and they would be lost.

        Layers that mask what they give put the mask on the tensor, out of every model around them; what takes the place
        of such a layer cannot do that.
        """
        wanted = [mask for mask in map(_mask, model.outputs) if path and mask is not None]
        graph = keras.Model(model.input, [model.output, wanted]) if wanted else model
        outputs = graph._run_through_graph(inputs, operation_fn=lambda operation: self._call(operation, path))
        if wanted:
            outputs, wanted = outputs
        pairs = list(zip(model.outputs, keras.tree.flatten(outputs), strict=True))
        lost = any(_mask(old) is not None and _mask(new) is None for old, new in pairs)
        inner = any(id(self._twins[id(x)][1]) in self._masked for x in model.operations if id(x) in self._twins)
        copies = iter(wanted)
        masks = [next(copies) if _mask(old) is not None else _mask(new) for old, new in pairs] if path else []
        masked = [index for index, mask in enumerate(masks) if mask is not None]
        outputs = self._whole_answers(outputs)
        if not (masked and (lost or inner)):
            return keras.Model(inputs, outputs, name=name)
        twin = keras.Model(inputs, [outputs, [masks[index] for index in masked]], name=name)
        self._masked[id(twin)] = masked
        return twin

    def _whole_answers(self, outputs: Any) -> Any:
        """Outputs of a model with all tensors of an answer in the place of the first."""
        return keras.tree.map_structure(lambda x: self._answers[id(x)][0] if id(x) in self._answers else x, outputs)

    def _sequential(self, model: keras.Sequential, path: str, name: str, rename: dict[int, str]) -> keras.Model:
        if not model.built or model._functional is None:
            raise UnsupportedLayer(
                path or name,
                "this Sequential model is not built",
                hint="Start it with keras.Input(shape), or call it once.",
            )
        if self._follow is not None:
            return self._functional(model._functional, path, name, rename)
        layers = [self._twin(layer, path) for layer in model.layers]
        given = {
            id(node.operation): node.input_tensors
            for nodes in model._functional._nodes_by_depth.values()
            for node in nodes
        }
        several = isinstance(layers[-1], keras.Model) and len(layers[-1].outputs) > len(model.outputs)
        masks = any(self._loses_mask(layer, twin) for layer, twin in zip(model.layers, layers, strict=True))
        if (
            several
            or masks
            or any(not _takes(twin, given[id(layer)]) for layer, twin in zip(model.layers, layers, strict=True))
        ):
            return self._functional(model._functional, path, name, rename)
        return keras.Sequential([_copy_input(model.inputs[0], rename), *layers], name=name)

    def _loses_mask(self, layer: keras.Layer, twin: keras.Operation) -> bool:
        """Whether a layer of a Sequential model masks what it gives, and its copy, called as it is, does not."""
        if not isinstance(twin, keras.Model) or isinstance(layer, keras.Model):
            return id(twin) in self._masked
        return any(_mask(tensor) is not None for node in layer._inbound_nodes for tensor in node.output_tensors)

    def _wrapper(self, layer: keras.Layer, path: str, name: str) -> keras.Layer | None:
        """Copies a stock layer that holds other layers given by the user; `None` where it is no such layer."""
        config = _float32(layer.get_config()) | {"name": name} if _is_stock(layer) else {}
        if isinstance(layer, keras.layers.Bidirectional) and config:
            return self._bidirectional(layer, path, config)
        if isinstance(layer, keras.layers.Wrapper) and config:
            return type(layer)(**config | {"layer": self._twin(layer.layer, path)})
        if type(layer) is keras.layers.RNN:
            return keras.layers.RNN(**config | {"cell": self._twin(layer.cell, path)})
        if type(layer) is keras.layers.StackedRNNCells:
            return keras.layers.StackedRNNCells(**config | {"cells": [self._twin(x, path) for x in layer.cells]})
        if type(layer) is keras.layers.Pipeline:
            return keras.layers.Pipeline(**config | {"layers": [self._twin(x, path) for x in layer.layers]})
        return None

    def _bidirectional(self, layer: keras.layers.Bidirectional, path: str, config: dict) -> keras.Layer:
        forward, forward_path = layer.forward_layer, _join(path, layer.forward_layer.name)
        source = self._source(forward, forward_path)
        backward = self._twin(layer.backward_layer, path)
        template = _copy_unbuilt(source, forward_path, forward.name)
        twin = type(layer)(**config | {"layer": template, "backward_layer": backward})
        # The constructor makes its own forward layer from the template's configuration.
        self._twins[id(forward)] = (forward, twin.forward_layer)
        self._states.append((source, twin.forward_layer, forward_path))
        return twin

    def _copy_state(self, source: keras.Layer, twin: keras.Layer, path: str) -> None:
        """Copies variables, random states and assets (vocabularies) of a layer and of the layers inside it."""
        inner, inner_twins = ([*x._flatten_layers(include_self=False, recursive=False)] for x in (source, twin))
        if len(inner) != len(inner_twins):
            raise UnsupportedLayer(
                path,
                f"it holds {len(inner)} layers, its copy made from its configuration {len(inner_twins)}",
                hint="get_config() must describe all that the constructor makes.",
            )
        try:
            _copy_own_state(source, twin)
        except Exception as error:
            reason = f"its weights do not fit a copy made from its configuration ({_first_line(error)})"
            raise UnsupportedLayer(path, reason, hint="Is it built, and does get_config() say all of it?") from error
        for layer, layer_twin in zip(inner, inner_twins, strict=True):
            if id(layer) not in self._twins:
                self._copy_state(layer, layer_twin, _join(path, layer.name))


def _deployed(operation: keras.Operation, path: str) -> keras.Operation | None:
    """The deployed form of one operation; `None` where it has none of its own."""
    where, layer = path or operation.name, operation
    while isinstance(layer, Deployable) and not _is_stock(layer):
        if not getattr(layer, "built", True):
            raise UnsupportedLayer(where, "it is not built", hint="Call the model once, or build() it.")
        result = layer.deploy()
        if result is layer or not isinstance(result, keras.Layer):
            raise UnsupportedLayer(where, f"its deploy() returned {result!r}, which is no other layer")
        layer = result
    return None if layer is operation else layer


def _answer(operation: keras.Operation, path: str) -> keras.Operation | None:
    return operation.answer() if hasattr(operation, "answer") and not _is_stock(operation) else None


def _is_stock(operation: object) -> bool:
    # A Lambda's class is stock, its code is the user's.
    return type(operation).__module__.partition(".")[0] == "keras" and not isinstance(operation, keras.layers.Lambda)


def _has_graph(model: keras.Model) -> bool:
    """Whether the model computes what its graph of layers says; a subclass with a call() of its own need not."""
    return any(isinstance(model, kind) and type(model).call is kind.call for kind in (Functional, keras.Sequential))


def _mask(tensor: Any) -> keras.KerasTensor | None:
    return getattr(tensor, "_keras_mask", None)


def _masks(operation: keras.Operation, args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The masks of the tensors that an operation is called with, as arguments: Keras would take them from the tensors,
    but then not write them into the graph where the call has other arguments by name."""
    parameters = inspect.signature(operation.call).parameters
    if not any("mask" in name for name in parameters):
        return {}
    given = inspect.signature(operation.call).bind(*args, **kwargs).arguments
    tensors = {name: value for name, value in given.items() if _is_symbolic(value)}
    names = dict.fromkeys(tensors, "mask") if len(tensors) == 1 else {name: f"{name}_mask" for name in tensors}
    found = {mask: keras.tree.map_structure(_mask, tensors[name]) for name, mask in names.items() if mask in parameters}
    return {
        name: mask
        for name, mask in found.items()
        if given.get(name) is None and any(x is not None for x in keras.tree.flatten(mask))
    }


def _is_symbolic(value: Any) -> bool:
    flat = keras.tree.flatten(value)
    return bool(flat) and all(isinstance(x, keras.KerasTensor) for x in flat)


def _setting_masks(model: keras.Model, masked: Sequence[int]) -> Callable[..., Any]:
    """The call of a model whose last outputs are the masks of some of the others."""

    def call(*args: Any, **kwargs: Any) -> Any:
        outputs, masks = model(*args, **kwargs)
        flat = keras.tree.flatten(outputs)
        for index, mask in zip(masked, masks, strict=True):
            flat[index]._keras_mask = mask
        return outputs

    return call


def _takes(operation: keras.Operation, tensors: Sequence[keras.KerasTensor]) -> bool:
    """Whether a functional model takes so many tensors of such ranks; other operations take what they took before."""
    if not isinstance(operation, Functional):
        return True
    return [len(x.shape) for x in operation.inputs] == [len(x.shape) for x in tensors]


def _join(path: str, name: str) -> str:
    return f"{path}/{name}" if path else name


def _first_line(error: Exception) -> str:
    """What an error says first; Keras puts a line that names its layer, and codes of colour, around that."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    lines = [line for line in map(str.strip, plain.splitlines()) if line]
    said = [line for line in lines if not line.startswith("Exception encountered when calling")]
    return (said or lines or [type(error).__name__])[0]


def _copy_input(tensor: keras.KerasTensor, rename: dict[int, str]) -> keras.KerasTensor:
    layer = tensor._keras_history.operation
    return keras.Input(
        batch_shape=tensor.shape,
        dtype=_FLOAT32.get(tensor.dtype, tensor.dtype),
        sparse=tensor.sparse,
        ragged=tensor.ragged,
        name=rename.get(id(tensor), layer.name),
        optional=layer.optional,
    )


def _copy_unbuilt(operation: keras.Operation, path: str, name: str) -> keras.Operation:
    try:
        if isinstance(operation, keras.layers.Lambda):
            # Its configuration holds byte code, which Keras would refuse to read back.
            return keras.layers.Lambda(
                operation.function,
                output_shape=operation._output_shape,
                mask=operation.mask,
                arguments=operation.arguments,
                dtype=_float32(operation.get_config()["dtype"]),
                name=name,
            )
        twin = type(operation).from_config(_float32(operation.get_config()))
    except Exception as error:
        raise UnsupportedLayer(
            path,
            f"{type(operation).__name__} cannot be made again from its configuration ({_first_line(error)})",
            hint="Give it a get_config() and register what it names: keras.saving.register_keras_serializable().",
        ) from error
    # Not every operation takes a name in its constructor, and a replacement takes over the original's.
    twin.name = name
    return twin


def _copy_own_state(source: keras.Layer, twin: keras.Layer) -> None:
    store: dict[str, Any] = {}
    source.save_own_variables(store)
    twin.load_own_variables(
        {key: value if _is_taken_as_it_is(value, twin) else _plain_array(value) for key, value in store.items()}
    )
    for generator, generator_twin in zip(source._seed_generators, twin._seed_generators, strict=True):
        generator_twin.state.assign(keras.ops.convert_to_numpy(generator.state))
    if hasattr(source, "save_assets"):
        with tempfile.TemporaryDirectory() as folder:
            source.save_assets(folder)
            twin.load_assets(folder)


def _is_taken_as_it_is(value: Any, twin: keras.Layer) -> bool:
    """Whether a variable need not become an array first, which for a large table would be one more copy.

    TensorFlow copies what is assigned; in JAX both variables would hold one array, which training of either gives away.
    """
    return (
        keras.backend.backend() == "tensorflow"
        and isinstance(value, keras.Variable)
        and str(value.dtype) not in _FLOAT32
        and _is_stock(twin)
    )


def _plain_array(value: Any) -> np.ndarray:
    array = keras.ops.convert_to_numpy(value) if isinstance(value, keras.Variable) else np.asarray(value)
    return array.astype("float32") if str(array.dtype) in _FLOAT32 else array


# Policies and dtypes of reduced precision, which a deployed model does not have.
_FLOAT32 = dict.fromkeys(("mixed_float16", "mixed_bfloat16", "float16", "bfloat16"), "float32")


def _float32(config: Any, key: str = "") -> Any:
    """A copy of a configuration in which no dtype and no policy is of reduced precision."""
    if isinstance(config, dict):
        is_policy = str(config.get("class_name")).endswith("DTypePolicy")
        return {
            k: _float32(v, "policy" if is_policy and k == "config" else _policy_key(key, k)) for k, v in config.items()
        }
    if isinstance(config, list | tuple) and not hasattr(config, "_fields"):
        return type(config)(_float32(item) for item in config)
    if isinstance(config, str) and key == "dtype":
        return _FLOAT32.get(config, config)
    return config


def _policy_key(outer: str, key: str) -> str:
    return "dtype" if outer == "policy" and key in ("name", "source_name") else key


@contextmanager
def _default_policy_in_float32() -> Iterator[None]:
    """Models and layers made inside follow a float32 policy, whatever policy the user has set for training."""
    policy = keras.config.dtype_policy()
    if policy.name not in _FLOAT32:
        yield
        return
    keras.config.set_dtype_policy("float32")
    try:
        yield
    finally:
        keras.config.set_dtype_policy(policy)
