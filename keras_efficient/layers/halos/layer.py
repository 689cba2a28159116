"""The layer: logits of all classes in training, the best of a few candidates where it is used."""

from __future__ import annotations

import hashlib
import numbers
import weakref
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_efficient.errors import UnsupportedLayer, WrongArgument
from keras_efficient.layers.halos.index import Index, shapes
from keras_efficient.layers.halos.plans import (
    ArraySource,
    Plan,
    best,
    candidate_ids,
    candidates,
    flat,
    products,
    side_by_side,
)
from keras_efficient.layers.table import Table, dequantize, fake_quantize, quantize, scales, unpack

__all__ = ["HALOSOutput"]

WIDTHS = (32, 16, 8, 4)
CHUNK = 32 * 2**20  # bytes that a batch takes at once


@keras.saving.register_keras_serializable(package="keras_efficient")
class HALOSOutput(keras.layers.Layer):
    """The `Dense` at the end of a classifier of very many classes, which learns where to look for the answer.

    ```
    training:  logits_i = w_i · x + b_i                           for every class i
    answers:   the k largest logits, and their classes, of candidates that an index finds for x
    ```

    Train a model with it as with a `Dense` of logits, by a loss with `from_logits=True` or by
    `keras_efficient.models.SampledSoftmax`. Then `keras_efficient.extreme.learn_index(model, data)` learns from
    labelled data which classes to look at, and `keras_efficient.deploy.deploy(model)` or an exported file answers
    `(logits, classes)`. Without an index all classes are looked at.

    ```python
    outputs = keras_efficient.layers.HALOSOutput(670_091, k=5)(hidden)
    ```

    With `embed=True` a call gives the rows of classes instead: the embedding of a model whose input and output share
    their weights. Say `dim` then, since the first call does not.

    ```python
    words = keras_efficient.layers.HALOSOutput(50_000, dim=256)
    outputs = words(network(words(ids, embed=True)))
    ```

    Args:
        units: Integer. Number of classes.
        k: Integer. How many classes an answer names.
        use_bias, kernel_initializer, bias_initializer, kernel_regularizer, bias_regularizer: as in `Dense`. The kernel
            has a row for each class: shape `(units, d)`.
        bits: 32, 16, 8 or 4. Width of the numbers of each class's row where answers are made: rounded with a scale a
            row. Logits in training are not rounded. With an index rows are stored so; without one the rounded rows are
            floats, which an export's `precision` makes small.
        dim: Integer or `None`: d, where it is to be known before the first call.
        plan: of the index; `set_index` gives it.

    Call arguments:
        inputs: `(…, d)`; with `embed`, class numbers `(…)`, and the output is `(…, d)`.
        embed: Boolean.

    Input shape: `(…, d)`. Output shape: `(…, units)`, logits. Answers, which `top_k(x)` and the deployed form give, are
    `(…, k)` twice: logits in falling order, and classes, int32. Where there are fewer than k candidates the rest are
    −inf and −1; in LiteRT, whose fast kernels know no infinity, any number from the lowest float32 on down: ask whether
    the class is −1. Of equal logits any comes first.

    An index belongs to the weights that it was learned for. Once they are trained on, `deploy`, exports and `set_index`
    refuse it; `top_k`, `candidates` and `set_neurons` do not look, since to compare a large kernel takes longer than an
    answer. Nothing tells that layers below have changed: call `extreme.reindex` after any training.

    The deployed form takes `(batch, d)` and gives `(logits, classes)`, so the layer must be the model's last.

    Raises:
        ValueError: numbers out of range.

    Source: HALOS: Hashing Large Output Space for Cheap Inference, MLSys 2022.
    """

    def __init__(
        self,
        units,
        k=5,
        use_bias=True,
        kernel_initializer="glorot_uniform",
        bias_initializer="zeros",
        kernel_regularizer=None,
        bias_regularizer=None,
        *,
        bits=32,
        dim=None,
        plan=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        _check_count("units", units, 2**31 - 1)
        _check_count("k", k, units)
        if bits not in WIDTHS:
            raise ValueError(f"`bits` must be one of {', '.join(map(str, WIDTHS))}. Received: bits={bits!r}.")
        self.units, self.k, self.use_bias, self.bits = int(units), int(k), use_bias, int(bits)
        if dim is not None:
            _check_count("dim", dim, 2**31 - 1)
        self.dim = dim
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.bias_initializer = keras.initializers.get(bias_initializer)
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)
        self.bias_regularizer = keras.regularizers.get(bias_regularizer)
        self.plan = Plan.from_config(plan) if isinstance(plan, dict) else plan
        self._fingerprint = ""
        self._arrays = {}
        self._unfilled = False  # of the plan of a configuration, until contents are set or loaded

    def build(self, input_shape=None):
        dim = input_shape[-1] if self.dim is None else self.dim
        if self.plan is not None and (self.plan.units, self.plan.dim) != (self.units, dim):
            sizes = f"({self.plan.units}, {self.plan.dim}) weights, layer {self.name!r} has ({self.units}, {dim})"
            raise ValueError(f"The plan of the index is of {sizes}.")
        self.kernel = self.add_weight(
            name="kernel",
            shape=(self.units, dim),
            # The initializers take the last axis for that of the units.
            initializer=lambda shape, dtype=None: ops.transpose(self.kernel_initializer(shape[::-1], dtype)),
            regularizer=self.kernel_regularizer,
        )
        self.bias = None
        if self.use_bias:
            initializer, regularizer = self.bias_initializer, self.bias_regularizer
            self.bias = self.add_weight(
                name="bias", shape=(self.units,), initializer=initializer, regularizer=regularizer
            )
        self._create()
        self._unfilled = self.plan is not None
        self.built = True

    def _create(self):
        """Adds the index's arrays."""
        self._arrays = {}
        for name, (shape, dtype) in shapes(self.plan).items() if self.plan else ():
            options = {"initializer": _EMPTY.get(name, "zeros"), "trainable": False, "autocast": False}
            self._arrays[name] = self.add_weight(name=name, shape=shape, dtype=dtype, **options)

    def call(self, inputs, embed=False):
        if embed:
            return ops.take(self.kernel, inputs, axis=0)
        logits = ops.matmul(inputs, ops.transpose(self.kernel))
        return logits if self.bias is None else logits + self.bias

    def compute_output_shape(self, input_shape, embed=False):
        return (*input_shape, self.dim) if embed else (*input_shape[:-1], self.units)

    def compute_output_spec(self, inputs, embed=False):
        if embed and self.dim is None:
            raise ValueError(f"Layer {self.name!r} embeds: it must be told `dim`, the width of a row.")
        return keras.KerasTensor(self.compute_output_shape(inputs.shape, embed), dtype=self.compute_dtype)

    def top_k(self, inputs, k=None, *, exclude=None):
        """The k candidates with the largest logits, as `deploy()` answers them.

        Args:
            inputs: `(…, d)`.
            k: how many; by default the layer's.
            exclude: `(…, m)` classes that must not be answered, such as what a user has; −1 where there is none.

        Returns:
            logits `(…, k)` float32 and classes `(…, k)` int32; −inf and −1 where there are too few candidates.
        """
        k = self.k if k is None else k
        _check_count("k", k, self.units)
        x = ops.cast(ops.convert_to_tensor(inputs), "float32")
        axes = tuple(x.shape[:-1])
        flat = ops.reshape(x, (-1, x.shape[-1]))
        hidden = None if exclude is None else ops.reshape(exclude, (-1, ops.shape(exclude)[-1]))
        numbers = self.units if self.plan is None else self.plan.neurons * x.shape[-1]
        logits, ids = self._in_parts(lambda part, other: self._best(part, k, other), flat, hidden, numbers)
        shape = axes if None not in axes else tuple(ops.shape(x)[:-1])
        return ops.reshape(logits, (*shape, k)), ops.reshape(ids, (*shape, k))

    def _best(self, x, k, exclude):
        if self.plan is not None:
            return best(*candidates(self.plan, x, _Trained(self)), k, exclude)
        width = 0 if exclude is None else exclude.shape[-1]
        most = self.units if width is None else min(self.units, k + width)
        logits, ids = ops.top_k(_Trained(self).all_logits(x), most)
        return best(logits, ops.cast(ids, "int32"), k, exclude)

    def candidates(self, inputs):
        """The classes that are looked at for queries `(batch, d)`: `(batch, candidates)` int32, −1 in free places."""
        if self.plan is None:
            raise ValueError(f"Layer {self.name!r} has no index: all classes are candidates.")
        x = ops.cast(ops.convert_to_tensor(inputs), "float32")
        numbers = self.plan.routed * x.shape[-1] + self.plan.candidates
        return self._in_parts(lambda part, _: (candidate_ids(self.plan, part, _Trained(self)),), x, None, numbers)[0]

    def _in_parts(self, function, x, other, numbers):
        """The results of a batch in parts, where an input takes so many numbers, and a part `CHUNK` bytes."""
        size = max(1, CHUNK // (4 * numbers))
        if isinstance(x, keras.KerasTensor) or x.shape[0] is None or x.shape[0] <= size:
            return function(x, other)
        parts = [
            function(x[start : start + size], None if other is None else other[start : start + size])
            for start in range(0, x.shape[0], size)
        ]
        return tuple(ops.concatenate(values, axis=0) for values in zip(*parts, strict=True))

    @property
    def index(self):
        """The `Index`; `None` where there is none."""
        if self.plan is None:
            return None
        arrays = {name: ops.convert_to_numpy(value) for name, value in self._arrays.items()}
        return Index(self.plan, arrays, self._fingerprint)

    def set_index(self, index):
        """Takes an index that was learned for these weights; `None` removes the one that is there.

        Where a model is spread over devices compile it again then: its steps know each variable's place.

        Functions that were compiled with `top_k` in them must be compiled again.

        Raises:
            WrongArgument: an index of other sizes, or one that was learned for other weights.
        """
        self._check_built("set_index")
        if index is not None and not isinstance(index, Index):
            raise WrongArgument(f"An `Index` is needed, or None, not {type(index).__name__}.")
        if index is not None:
            sizes = (index.plan.units, index.plan.dim)
            if sizes != tuple(self.kernel.shape):
                raise WrongArgument(
                    f"The index is of {sizes} weights, layer {self.name!r} has {tuple(self.kernel.shape)}."
                )
            if index.fingerprint and index.fingerprint != self.fingerprint():
                raise _other_weights(self)
        state = (None, {}, "", False) if index is None else (index.plan, index.arrays, index.fingerprint, False)
        self.put_back(state)

    def taken(self):
        """The index as it is, for `put_back`: plan, arrays, fingerprint, and whether it is without contents."""
        arrays = {name: ops.convert_to_numpy(value) for name, value in self._arrays.items()}
        return self.plan, arrays, self._fingerprint, self._unfilled

    def put_back(self, state):
        """Takes what `taken` gave, unchecked."""
        self._tracker.unlock()
        for variable in self._arrays.values():
            self._untrack_variable(variable)
        self.plan, arrays, self._fingerprint, self._unfilled = state
        self._create()
        self._tracker.lock()
        for name, variable in self._arrays.items():
            variable.assign(arrays[name])

    @property
    def neurons(self):
        """Rows that a query is multiplied with for an answer, those that find its candidates included."""
        return self.units if self.plan is None else self.plan.neurons

    def set_neurons(self, neurons):
        """The dial between time and recall: at most so many rows are multiplied with, those that find candidates
        included. Nothing is learned anew. Functions that were compiled with `top_k` in them must be compiled again.

        Lists and hash tables have so many classes as they were learned with: beyond that the dial changes nothing. Of
        cells all can be looked at. To look at all classes take the index away, `set_index(None)`.

        Raises:
            WrongArgument: the layer has no index, or one that cannot look at so few.
        """
        if self.plan is None:
            raise WrongArgument(
                f"Layer {self.name!r} has no index.", hint="extreme.learn_index(model, data) makes one."
            )
        self.plan = self.plan.dial(int(neurons))

    def fingerprint(self):
        """SHA-256 of the kernel and the bias, as float32."""
        self._check_built("fingerprint")
        digest = hashlib.sha256()
        for variable in (self.kernel, self.bias):
            if variable is not None:
                array = np.ascontiguousarray(ops.convert_to_numpy(variable), dtype=np.float32)
                digest.update(f"{array.shape} {array.dtype}".encode())
                digest.update(array)
        return digest.hexdigest()

    def answer(self):
        """A model of this layer in its training form, but giving the answers that the deployed form gives."""
        self._check_answers("answer")
        x = keras.Input((self.kernel.shape[1],), dtype=self.compute_dtype, name="x")
        return keras.Model(x, list(_Answers(self, name=self.name)(x)), name=self.name)

    def deploy(self):
        """A functional model of stock layers, `(batch, d)` to `(logits, classes)`; with an index, of its candidates.

        Classes of one block lie side by side, so that a query reads a few stretches of memory.
        """
        self._check_answers("deploy")
        x = keras.Input((self.kernel.shape[1],), dtype="float32", name="x")
        source = _Deployed(self)
        if self.plan is None:
            logits, ids = ops.top_k(source.all_logits(x), self.k)
            answer = [logits, ops.cast(ids, "int32")]
        else:
            answer = list(best(*candidates(self.plan, x, source), self.k))
        model = keras.Model(x, answer, name=self.name)
        for index, operation in enumerate(model.operations):
            if not isinstance(operation, keras.layers.Layer):  # Keras numbers these anew at every call in a process
                operation.name = f"{type(operation).__name__.lower()}_{index}"
        return model

    def call_deployed(self, model, inputs, embed=False):
        """Calls the deployed model, or gives the rows of classes by a stock `Embedding`, one for all such calls."""
        if not embed:
            return model(inputs)
        if model not in _EMBEDDINGS:
            kernel = ops.convert_to_numpy(self.kernel)
            layer = keras.layers.Embedding(*kernel.shape, dtype="float32", name=f"{self.name}_embedding")
            layer.build()
            layer.set_weights([kernel])
            _EMBEDDINGS[model] = layer
        return _EMBEDDINGS[model](inputs)

    def table(self, rows):
        """How so many rows are stored where answers are made."""
        return Table(rows, self.kernel.shape[1], bits=self.bits)

    def get_config(self):
        return {
            **super().get_config(),
            "units": self.units,
            "k": self.k,
            "use_bias": self.use_bias,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
            "bias_initializer": keras.initializers.serialize(self.bias_initializer),
            "kernel_regularizer": keras.regularizers.serialize(self.kernel_regularizer),
            "bias_regularizer": keras.regularizers.serialize(self.bias_regularizer),
            "bits": self.bits,
            "dim": self.dim,
            "plan": None if self.plan is None else self.plan.to_config(),
        }

    def save_own_variables(self, store):
        for name, variable in self._own().items():
            store[name] = ops.convert_to_numpy(variable)
        if self._fingerprint:
            store["fingerprint"] = np.frombuffer(bytes.fromhex(self._fingerprint), np.uint8)

    def load_own_variables(self, store):
        known = set(store.keys()) - {"fingerprint"}
        if known != set(self._own()):
            raise ValueError(
                f"Layer {self.name!r} has the variables {', '.join(sorted(self._own()))}; the file holds "
                f"{', '.join(sorted(known))}. Has one of the two an index?"
            )
        arrays = {name: np.asarray(store[name]) for name in self._own()}
        if self.plan is not None:
            Index(self.plan, {name: arrays[name] for name in self._arrays})  # refuses what is none
        for name, variable in self._own().items():
            variable.assign(arrays[name])
        self._unfilled = False
        if "fingerprint" in store.keys():  # noqa: SIM118 - a store has no `in` of its own
            self._fingerprint = bytes(np.asarray(store["fingerprint"])).hex()

    def _own(self):
        weights = {"kernel": self.kernel} if self.bias is None else {"kernel": self.kernel, "bias": self.bias}
        return {**weights, **self._arrays}

    def _check_answers(self, what):
        self._check_built(what)
        if self._fingerprint and self._fingerprint != self.fingerprint():
            raise _other_weights(self)
        self.check_contents()
        ranks = {len(node.input_tensors[0].shape) for node in self._inbound_nodes if not embeds(node)}
        if ranks and 2 not in ranks:  # calls in other models are among them
            raise UnsupportedLayer(
                self.name,
                f"its input has {max(ranks)} axes, and answers are given for (batch, {self.kernel.shape[1]}).",
                hint="Deploy a model that takes the step to be answered before this layer.",
            )

    def check_contents(self):
        """Refuses an index that a configuration brought along, without what is in it.

        Raises:
            WrongArgument: it is such a one.
        """
        if self._unfilled and (ops.convert_to_numpy(self._arrays["slots"]) < 0).all():
            raise WrongArgument(
                f"The index of layer {self.name!r} is empty: a copy from a configuration has none of its contents.",
                hint="Load or set the weights, extreme.learn_index(model, data), or layer.set_index(None).",
            )

    def _check_built(self, what):
        if not self.built:
            raise ValueError(f"You must build the layer (call it once) before `{what}()`.")


# An index without contents: no class in a block, and the first ones in the head.
_EMPTY = {
    "slots": lambda shape, dtype=None: ops.full(shape, -1, dtype=dtype),
    "head": lambda shape, dtype=None: ops.arange(shape[0], dtype=dtype),
}

# The stock layers that embed for a deployed model, while that lives: they are no part of its graph.
_EMBEDDINGS: weakref.WeakKeyDictionary[keras.Model, keras.layers.Layer] = weakref.WeakKeyDictionary()


def _other_weights(layer):
    return WrongArgument(
        f"The index was learned for other weights than those of layer {layer.name!r}.",
        hint="extreme.reindex(model, data) fits the index that is there; layer.set_index(None) removes it.",
    )


def embeds(node):
    """Whether a call in a model's graph asks for rows."""
    return bool(node.arguments.kwargs.get("embed"))


def input_of(model, layer):
    """What a layer of logits is given in a model's graph; it may be in others too, and embed."""
    return _calls(model, layer)[0].input_tensors[0]


def check_answers_last(model, layer):
    """Refuses a model whose outputs a layer's answers cannot take the place of, as `deploy` would.

    Raises:
        UnsupportedLayer: the layer is called several times, or its logits are no output of the model.
    """
    calls, graph = _calls(model, layer), getattr(model, "_functional", None) or model
    if len(calls) > 1:
        raise UnsupportedLayer(layer.name, f"{model.name!r} calls it {len(calls)} times.", hint="Give each its own.")
    if not any(tensor is calls[0].output_tensors[0] for tensor in graph.outputs):
        hint = "Let it be the last, and the loss take logits: from_logits=True."
        raise UnsupportedLayer(layer.name, f"its logits are no output of {model.name!r}.", hint=hint)


def _calls(model, layer):
    """The nodes of a model's graph where a layer gives logits."""
    graph = getattr(model, "_functional", None) or model
    nodes = [node for nodes in getattr(graph, "_nodes_by_depth", {}).values() for node in nodes]
    if not (calls := [node for node in nodes if node.operation is layer and not embeds(node)]):
        reason = f"it is not in the graph of {model.name!r} itself, but in a model inside of it."
        raise UnsupportedLayer(layer.name, reason)
    return calls


class _Answers(keras.layers.Layer):
    """The answers of a layer, by that layer's own weights: a table may be too large for a second one."""

    def __init__(self, of, **kwargs):
        super().__init__(dtype=of.dtype_policy, **kwargs)
        self._of = lambda: of  # behind a function Keras does not take it for a part of this layer
        self.neurons, self.units = of.neurons, of.units

    def call(self, inputs):
        return self._of().top_k(inputs)

    def compute_output_spec(self, inputs):
        shape = (*inputs.shape[:-1], self._of().k)
        return keras.KerasTensor(shape, dtype="float32"), keras.KerasTensor(shape, dtype="int32")

    def answer(self):
        return None

    def deploy(self):
        return self._of().deploy()

    def get_config(self):
        return {"name": self.name, "of": self._of()}


class _Trained(ArraySource):
    """The arrays of the training form. Classes' rows are taken from the kernel, by their number."""

    def __init__(self, layer: HALOSOutput):
        super().__init__(layer._arrays, self._rounded)
        self.layer = layer

    def ids(self, blocks: Any) -> Any:
        return flat(ops.take(self.arrays["slots"], blocks, axis=0)[:, :, : self.layer.plan.width])

    def head(self, x: Any) -> tuple[Any, Any]:
        ids = self.arrays["head"]
        rows = self._rows(ids)
        logits = ops.matmul(x, ops.transpose(rows)) + self._bias(ids)
        return logits, ops.zeros_like(logits, dtype="int32") + ids

    def logits(self, blocks: Any, ids: Any, x: Any) -> Any:
        safe = ops.maximum(ids, 0)
        rows = self._rows(safe)
        return ops.where(ops.less(ids, 0), -np.inf, products(rows, x) + self._bias(safe))

    def all_logits(self, x: Any) -> Any:
        logits = ops.matmul(x, ops.transpose(self._rounded(ops.cast(self.layer.kernel, "float32"))))
        return logits if self.layer.bias is None else logits + ops.cast(self.layer.bias, "float32")

    def _rows(self, ids: Any) -> Any:
        return self._rounded(ops.cast(ops.take(self.layer.kernel, ids, axis=0), "float32"))

    def _bias(self, ids: Any) -> Any:
        if self.layer.bias is None:
            return ops.zeros_like(ids, dtype="float32")
        return ops.cast(ops.take(self.layer.bias, ids, axis=0), "float32")

    def _rounded(self, rows: Any) -> Any:
        table = self.layer.table(1)
        return rows if table.bits == 32 else fake_quantize(table, rows, scales(table, rows))


class _Deployed:
    """The arrays of the deployed form in stock layers: an `Embedding` gives a block's rows, a `Dense` has all rows."""

    def __init__(self, layer: HALOSOutput):
        self.layer, self.plan = layer, layer.plan
        self.kernel = np.asarray(ops.convert_to_numpy(layer.kernel), np.float32)
        bias = None if layer.bias is None else ops.convert_to_numpy(layer.bias)
        self.bias = np.zeros(layer.units, np.float32) if bias is None else np.asarray(bias, np.float32)
        self.arrays = {name: ops.convert_to_numpy(value) for name, value in layer._arrays.items()}
        if layer.plan is not None:
            self.arrays["slots"] = self.arrays["slots"][:, : layer.plan.width]

    def scores(self, name: str, blocks: Any, x: Any) -> Any:
        rows, biases = self.arrays[name], self.arrays[f"{name}_bias"]
        if blocks is None:
            return self._dense(name, rows[0], biases[0])(x)
        places = np.arange(rows.shape[0] * rows.shape[1]).reshape(rows.shape[:2])
        found = self._products(name, rows.reshape(-1, rows.shape[2]), places, blocks, x)
        return found + flat(self._embedding(f"{name}_bias", biases)(blocks))

    def picked(self, name: str, x: Any) -> Any:
        return ops.take(x, self.arrays[name], axis=1)

    def ids(self, blocks: Any) -> Any:
        return flat(self._embedding("slots", self.arrays["slots"])(blocks))

    def head(self, x: Any) -> tuple[Any, Any]:
        ids = self.arrays["head"]
        logits = self._dense("head", self._as_stored(self.kernel[ids]), self.bias[ids])(x)
        return logits, ops.zeros_like(logits, dtype="int32") + ids

    def logits(self, blocks: Any, ids: Any, x: Any) -> Any:
        slots = self.arrays["slots"]
        biases = np.where(slots < 0, np.float32(-np.inf), self.bias[slots])
        if self.plan.overlapping:  # rows are read by their number; of a free place any, as its bias decides
            places, wanted = np.arange(self.layer.units)[:, None], ops.maximum(ids, 0)
            found = self._products("classes", self.kernel, places, wanted, x)
        else:
            found = self._products("classes", self.kernel, np.maximum(slots, 0), blocks, x)
        return found + flat(self._embedding("bias", biases)(blocks))

    def all_logits(self, x: Any) -> Any:
        return self._dense("classes", self._as_stored(self.kernel), self.bias)(x)

    def _products(self, name: str, rows: np.ndarray, places: np.ndarray, blocks: Any, x: Any) -> Any:
        """Of queries with rows at the places ``(blocks, width)`` of the blocks ``(b, p)``: ``(b, p·width)``."""
        table = self.layer.table(len(rows))
        if not table.has_scale:
            taken = self._embedding(name, rows[places].reshape(len(places), -1))(blocks)
            return products(side_by_side(taken, rows.shape[1]), x)
        stored, scale = quantize(table, rows)
        taken = self._embedding(name, stored[places].reshape(len(places), -1))(blocks)
        codes = side_by_side(taken, stored.shape[1])
        found = _products_of_nibbles(table, codes, x) if table.bits == 4 else products(unpack(table, codes), x)
        return found * flat(self._embedding(f"{name}_scale", scale[places, 0])(blocks))

    def _as_stored(self, rows: np.ndarray) -> np.ndarray:
        """The values that rows have once they were rounded."""
        table = self.layer.table(len(rows))
        return np.asarray(ops.convert_to_numpy(dequantize(table, *quantize(table, rows)))) if table.has_scale else rows

    def _embedding(self, name: str, values: np.ndarray) -> keras.layers.Layer:
        dtype = str(values.dtype)
        layer = keras.layers.Embedding(*values.shape, dtype=dtype, name=name)
        layer.embeddings_initializer = lambda shape, dtype=None: values  # zeros first would be one more large table
        layer.build()
        layer.embeddings_initializer = keras.initializers.Zeros()
        layer.trainable = dtype == "float32"  # integers have no gradient
        return layer

    def _dense(self, name: str, rows: np.ndarray, biases: np.ndarray) -> keras.layers.Layer:
        layer = keras.layers.Dense(len(rows), dtype="float32", name=name)
        layer.build((None, rows.shape[1]))
        layer.set_weights([np.ascontiguousarray(rows.T), biases])
        return layer


def _products_of_nibbles(table: Table, stored: Any, x: Any) -> Any:
    """``products(unpack(table, stored), x)`` in floats, without the two halves of each byte side by side.

    ```
    byte = low + 16 high:   low · x_l + high · x_h = byte · x_l + high · (x_h − 16 x_l)
    ```
    """
    width = stored.shape[-1]
    low, high = x[:, :width], ops.pad(x[:, width:], [[0, 0], [0, 2 * width - x.shape[1]]])
    bytes_ = ops.cast(stored, "float32")
    found = products(bytes_, low) + products(ops.floor(bytes_ * (1 / 16)), high - 16.0 * low)
    return found + float(table.least) * ops.sum(x, axis=1, keepdims=True)


def _check_count(name: str, value: Any, most: int) -> None:
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or not 1 <= int(value) <= most:
        raise ValueError(f"`{name}` must be an integer from 1 to {most}. Received: {name}={value!r}.")
