"""Compressed embedding tables: `Embedding` in a fraction of the bytes, by any of a dozen methods."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import numbers
from collections.abc import Collection
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_efficient.layers.embedding.fit import fit
from keras_efficient.layers.embedding.hashing import mix
from keras_efficient.layers.embedding.plans import METHODS, Plan
from keras_efficient.layers.table import Table, dequantize, fake_quantize, quantize, scales

__all__ = ["CompressedEmbedding"]

COMBINERS = (None, "sum", "mean", "sqrtn")
POLICIES = ("error", "clip", "wrap")
LAYER_OPTIONS = ("activity_regularizer", "autocast", "dtype", "name", "trainable")  # of every Keras layer
WIDE = ("int64", "uint64", "uint32")  # what int32 cannot hold all of


@keras.saving.register_keras_serializable(package="keras_efficient")
class CompressedEmbedding(keras.layers.Layer):
    """An `Embedding` whose vectors are made from tables of a fraction of its bytes, by a method of choice.

    `MEmComEmbedding` is the one to start with; this class holds what all methods share, and is there to compare them.
    `method` and its options:

    | method | a vector is | options |
    |---|---|---|
    | `"memcom"` | `U[h(i)] · V[i]` | see `MEmComEmbedding` |
    | `"factorised"` | `Σ_k A[i, k] · P[k]`, MEmCom's subspace form | |
    | `"codebooks"` | `[U₁[h₁(i)], …, U_G[h_G(i)]]`, learned hashes | |
    | `"naive"` | `U[h(i)]` | `hash` |
    | `"truncate"` | `U[min(i, m − 1)]` | |
    | `"double"` | `[A[h₁(i)], B[h₂(i)]]` | `how`, `own_rows` |
    | `"quotient_remainder"` | `R[i mod m] ∘ Q[i div m]` | `how` |
    | `"hash_embedding"` | `Σ_k P[i, k] · U[h_k(i)]` | |
    | `"reduced"` | `[A[i], 0]`; the whole table where nothing is reduced | |
    | `"tensor_train"` | `G₁[i₁] · G₂[i₂] · G₃[i₃]` | |
    | `"deep_hash"` | `MLP(hashes(i))` | `hashes` |
    | `"robe"` | stretches of one array | `block` |

    ```python
    keras_efficient.layers.CompressedEmbedding(100_000, 64, method="quotient_remainder", bits=8, compression=16)
    ```

    Args:
        input_dim: Integer. Number of entities n; ids are 0 … n − 1. Methods that treat frequent entities in another way
            take ids as sorted by falling frequency, as `StringLookup.adapt` and `IntegerLookup.adapt` sort them.
        output_dim: Integer. Width of a vector d.
        embeddings_initializer: of the tables that stand for rows of `Embedding`.
        embeddings_regularizer: applied in training to the vectors that a call looks up, over the number of them.
        mask_zero: Boolean. Id 0 is padding: it is masked, and left out of pooled vectors.
        method: String. See the table above.
        compression: Number. The bytes of the float32 table over the bytes of everything stored here, scales and
            scalars included, are at least this; `compression_ratio` says what became of it.
        size: Integer, in the place of `compression`: rows, columns, or whatever the method counts.
        bits: 32, 16, 8, 4, 2 or 1. Width of the numbers in the tables. Training keeps floats and rounds what it looks
            up (with a straight-through gradient); `freeze()` and `deploy()` store the integers.
        combiner: `None`, `"sum"`, `"mean"` or `"sqrtn"`. Pools the vectors along the last axis of the ids in the same
            call. The mean of nothing is zero; of an axis of no ids it is NaN where a compiled function or a deployed
            model leaves its length free.
        out_of_range: what becomes of ids that are negative or ≥ n: `"error"` raises where the ids are known (inside a
            compiled function the result is undefined), and in exported files of methods that have a row for each
            entity; `"clip"`; `"wrap"` (i mod n). Ids that do not fit into 32 bits are cut by Keras on JAX.
        frozen: Boolean. The tables are stored at their own width and cannot be trained; `freeze()` makes it so.
        **options: of the method, and those of `keras.layers.Layer`.

    Call arguments:
        inputs: integers of any shape `(…)`; or, with a combiner, a list of ids and weights of one shape; or a
            `tf.RaggedTensor` of ids with a combiner.

    Output shape: `(…, output_dim)`; with a combiner without the ids' last axis.

    Raises:
        TypeError: ids that are floats (unless a model's `Input` without a dtype makes them so); an unknown option.
        ValueError: an id out of range; a compression that leaves nothing (the message says how far the method goes).
    """

    def __init__(
        self,
        input_dim,
        output_dim,
        embeddings_initializer="uniform",
        embeddings_regularizer=None,
        mask_zero=False,
        *,
        method,
        compression=None,
        size=None,
        bits=32,
        combiner=None,
        out_of_range="error",
        frozen=False,
        **options,
    ):
        _check_choice("combiner", combiner, COMBINERS)
        _check_choice("frozen", frozen, (False, True))
        _check_choice("out_of_range", out_of_range, POLICIES)
        self._check_options(method, options)
        self.plan = _make_plan(method, options, input_dim, output_dim, compression, size, bits)
        super().__init__(**options)
        self.embeddings_initializer = keras.initializers.get(embeddings_initializer)
        self.embeddings_regularizer = keras.regularizers.get(embeddings_regularizer)
        self.mask_zero = mask_zero
        self.supports_masking = mask_zero
        self.method = method
        self.combiner = combiner
        self.out_of_range = out_of_range
        self.frozen = frozen
        self._ids_shape, self._weighted = (None,), False
        # Of the ids that models give: Sequential without an Input makes floats of them.
        self._float_ids: set[str] = set()
        self.autocast = False  # ids are no numbers to be cast

    @classmethod
    def _check_options(cls, method, options):
        """Raises what is an option neither of the method nor of Keras, with those that there are."""
        _check_method(method)
        signature = inspect.signature(cls.__init__).parameters
        common = set(signature) - {"self", "input_dim", "output_dim", "method", "options", "kwargs"}
        known = {*common, *LAYER_OPTIONS, *_own_options(METHODS[method]), "grown_from"}
        if unknown := sorted(set(options) - known):
            nearest = difflib.get_close_matches(unknown[0], known, n=1)
            guess = f" Did you mean {nearest[0]!r}?" if nearest else ""
            known = ", ".join(sorted(known - {"grown_from"}))
            raise TypeError(f"Method {method!r} has no option {unknown[0]!r}.{guess} It has: {known}.")

    @property
    def input_dim(self):
        """Number of entities."""
        return self.plan.input_dim

    @property
    def output_dim(self):
        """Width of a vector."""
        return self.plan.output_dim

    @property
    def _tables(self):
        return self.plan.tables()

    @property
    def bits(self):
        """Width of the numbers in the tables."""
        return self.plan.bits

    @property
    def nbytes(self):
        """Bytes of everything that the deployed form stores: tables, scales, kernels."""
        return self.plan.nbytes

    @property
    def compression_ratio(self):
        """Bytes of the float32 table that this layer takes the place of, over `nbytes`."""
        return self.plan.full_nbytes / self.plan.nbytes

    def build(self, input_shape=None):
        shape = (None,) if input_shape is None else _ids_shape(input_shape)
        self._ids_shape = (None, *shape[1:])
        self._weighted = input_shape is not None and len(input_shape) > 0 and isinstance(input_shape[0], (list, tuple))
        if self._weighted and self.combiner is None:
            raise ValueError(f"Weights need a `combiner`. Received: ids and weights, combiner=None ({self.name}).")
        self._create({})
        self.built = True

    def _create(self, values):
        """Adds the variables, with these values where there are any: floats to train, or the integers of storage."""
        self._state = {}
        forked = _forks()
        options = {"autocast": False, "trainable": not self.frozen}
        for name, table in self._tables.items():
            stored = table.has_scale and self.frozen
            integers = stored or table.choices > 0
            self._state[name] = self.add_weight(
                name=name,
                shape=(table.rows, table.packed_columns if stored else table.columns),
                initializer="zeros" if stored else _initializer(table, forked(self.embeddings_initializer)),
                dtype=table.stored_dtype if integers else self.variable_dtype,
                **{**options, "trainable": not (integers or self.frozen)},
            )
            if stored:
                self._state[f"{name}_scale"] = self.add_weight(
                    name=f"{name}_scale",
                    shape=(table.rows, 1) if table.scale == "row" else (),
                    initializer="ones",
                    dtype="float32",
                    **options,
                )
        for name, shape in self.plan.dense().items():
            self._state[name] = self.add_weight(
                name=name, shape=shape, initializer=_kernel_initializer(shape), dtype=self.variable_dtype, **options
            )
        for name, value in values.items():
            self._state[name].assign(value)

    def call(self, inputs, training=False):
        ids, weights, mask = self._read_inputs(inputs)
        values, dense = self._values(ids)
        if self.embeddings_regularizer is not None and training:
            vectors = ops.cast(self.plan.project(values, dense), "float32")  # sums of squares leave float16's range
            self.add_loss(self.embeddings_regularizer(vectors) / ops.cast(ops.size(ids), "float32"))
        if self.combiner is not None:  # long sums leave float16's range
            values = ops.cast(values, "float32")
        pooled = ops.cast(_pooled(values, self.combiner, weights, mask, self.plan.axes), self.compute_dtype)
        return ops.cast(self.plan.project(pooled, dense), self.compute_dtype)

    def _values(self, ids):
        rows = self._all_rows(self.plan.codes(ids))
        rows |= self._all_rows(self.plan.chosen(rows))
        dense = {name: self._multiplication(name) for name in self.plan.dense()}
        return self.plan.combine(rows, dense, ids), dense

    def _all_rows(self, codes):
        return {name: self._rows(name, self._tables[name], places) for name, places in codes.items()}

    def _rows(self, name, table, codes):
        taken = ops.take(self._state[name], codes, axis=0)
        if table.choices:
            return taken
        if self.frozen and table.has_scale:
            scale = self._state[f"{name}_scale"]
            taken = dequantize(table, taken, ops.take(scale, codes, axis=0) if table.scale == "row" else scale)
        elif table.has_scale:
            taken = fake_quantize(table, taken, scales(table, taken if table.scale == "row" else self._state[name]))
        return ops.cast(taken, self.compute_dtype)

    def _multiplication(self, name):
        kernel = self._state[name] if self.frozen else self._state[name] * _kernel_scale(self._state[name].shape)
        return lambda vectors: ops.matmul(vectors, ops.cast(kernel, self.compute_dtype))

    def _read_inputs(self, inputs):
        """Ids as int32, inside the range; weights and mask, or `None`."""
        ids, weights = inputs if isinstance(inputs, (list, tuple)) and len(inputs) == 2 else (inputs, None)
        if ids is None:
            raise TypeError(f"Ids must be integers. Received: None ({self.name}).")
        mask = None
        if hasattr(ids, "row_lengths") and hasattr(ids, "to_tensor"):  # a tf.RaggedTensor
            if self.combiner is None:
                raise ValueError(
                    "Ragged ids need a `combiner`: without one the vectors would be ragged. "
                    f'Received: {type(ids).__name__}, combiner=None. Pass ids.to_tensor(), or combiner="mean".'
                )
            if hasattr(weights, "nested_row_splits"):
                _check_rows(ids, weights, self.name)
            dense = ids.to_tensor(0)
            weights = weights.to_tensor(0.0) if hasattr(weights, "to_tensor") else weights
            mask = ops.not_equal((ids * 0 + 1).to_tensor(0), 0)
            ids = dense
        if weights is not None and self.combiner is None:
            raise ValueError("Weights need a `combiner`. Received: ids and weights, combiner=None.")
        self._take_floats(ids)
        ids = _integers(ids, self._float_ids)
        if weights is not None:
            weights = ops.cast(ops.convert_to_tensor(weights), "float32")
            _check_weights(ids.shape, weights.shape, self.name)
        self._check_pooled(ids.shape)
        if self.out_of_range == "error":
            _check_range(ids, self.input_dim)
        if self.mask_zero:
            present = ops.not_equal(ids, 0)
            mask = present if mask is None else ops.logical_and(mask, present)
        if keras.backend.standardize_dtype(ids.dtype) not in WIDE:
            ids = ops.cast(ids, "int32")  # eight bits could not hold the limits
        ids = ops.cast(_in_range(ids, self.input_dim, self.out_of_range), "int32")
        return ids, weights, None if mask is None else ops.cast(mask, "float32")

    def _check_pooled(self, shape):
        if self.combiner is not None and len(shape) < 2:
            raise ValueError(
                f"A combiner pools along the ids' last axis, which must not be the batch. Received: ids of shape "
                f"{tuple(shape)}, combiner={self.combiner!r} ({self.name})."
            )

    def _take_floats(self, ids):
        """Notes the floats that a model gives for ids, if they are symbols; of others nobody says what they are."""
        dtype = keras.backend.standardize_dtype(ids.dtype) if hasattr(ids, "dtype") else ""
        if keras.backend.is_float_dtype(dtype) and dtype not in self._float_ids and _known(ids) is None:
            _check_tells_apart(dtype, self.input_dim, self.name)
            self._float_ids.add(dtype)

    def compute_mask(self, inputs, previous_mask=None):
        if not self.mask_zero or self.combiner is not None:
            return None
        return ops.not_equal(inputs, 0)

    def compute_output_shape(self, input_shape):
        shape = tuple(_ids_shape(input_shape))
        if len(shape) > len(self._ids_shape):  # a wrapper calls a layer that is built without a node that says so
            self._ids_shape = (None,) * len(shape)
        return (*(shape if self.combiner is None else shape[:-1]), self.output_dim)

    def compute_output_spec(self, inputs, training=False):
        ids, weights = inputs if isinstance(inputs, (list, tuple)) else (inputs, None)
        self._take_floats(ids)
        _integers(ids, self._float_ids)
        if weights is not None:
            _check_weights(ids.shape, weights.shape, self.name)
        self._check_pooled(ids.shape)
        return keras.KerasTensor(self.compute_output_shape(ids.shape), dtype=self.compute_dtype)

    def embeddings(self, ids=None):
        """The vectors of these ids (default: of all) as a NumPy array, as inference would give them."""
        self._check_built("embeddings")
        ids = np.arange(self.input_dim) if ids is None else np.asarray(ids)
        shape = (*ids.shape, self.output_dim)
        if not ids.size:
            return np.zeros(shape, np.float32)
        if self.out_of_range == "error":
            _check_range(_integers(ids), self.input_dim)
        ids = ops.convert_to_numpy(_in_range(_integers(ids), self.input_dim, self.out_of_range)).reshape(-1)
        parts = np.array_split(ids, len(ids) // 65536 + 1)
        vectors = (self.plan.project(*self._values(_integers(part))) for part in parts)
        found = np.concatenate([ops.convert_to_numpy(part) for part in vectors])
        return found.astype("float32").reshape(shape)

    @classmethod
    def from_embedding(cls, source, *, counts=None, steps=300, **options):
        """A layer whose vectors come as near as its tables allow to those of a trained table.

        It minimises ``Σ c_i ‖E_i − e(i)‖²``: in closed form or by alternating least squares where the method has such,
        else by `steps` steps of Adam.

        Args:
            source: a built `keras.layers.Embedding`, or a matrix ``(input_dim, output_dim)``. An `Embedding` also gives
                `mask_zero` and the name.
            counts: how often each entity occurs, ``(input_dim,)``; by default all alike.
            steps: of Adam, for the methods without a closed form.
            **options: arguments of the layer but `input_dim` and `output_dim`.

        Raises:
            ValueError: a source that is no matrix or not built; counts of another length, negative or not finite.
        """
        if isinstance(source, keras.layers.Embedding):
            if not source.built:
                raise ValueError("The Embedding is not built: it has no vectors to be compressed.")
            if getattr(source, "quantization_mode", None):
                raise ValueError("The Embedding is quantised: give the matrix of its vectors, layer(np.arange(n)).")
            options = {"mask_zero": source.mask_zero, "name": source.name, **options}
            source = source.embeddings
        if isinstance(source, CompressedEmbedding):
            raise ValueError("The layer is compressed already: give the matrix of its vectors, layer.embeddings().")
        if isinstance(source, keras.layers.Layer):
            raise ValueError(f"An Embedding or a matrix is needed. Received: a layer {type(source).__name__}.")
        if wrong := {"input_dim", "output_dim"} & set(options):
            raise ValueError(f"The source says what `{min(wrong)}` is: leave it out.")
        matrix = np.asarray(ops.convert_to_numpy(source), np.float32)
        if matrix.ndim != 2 or not np.isfinite(matrix).all():
            raise ValueError(f"A finite matrix (entities, columns) is needed. Received: shape {matrix.shape}.")
        weights = _counts(counts, len(matrix))
        layer = cls(*matrix.shape, **{**options, "frozen": False})
        layer.build((None, None))
        values = fit(layer.plan, matrix, weights)
        if values is None:
            _fit_by_gradients(layer, matrix, weights, steps)
        else:
            for name, value in values.items():
                shape = layer.plan.dense().get(name)
                layer._state[name].assign(value if shape is None else value / _kernel_scale(shape))
        if options.get("frozen"):
            layer.freeze()
        return layer

    def freeze(self):
        """Turns the tables into the integers of storage: less memory, a small file, no more training.

        A model that holds the layer must be compiled again before it is fitted or predicts: its compiled functions have
        the old variables.

        Raises:
            ValueError: the layer is not built.
        """
        self._check_built("freeze")
        if not self.frozen:
            self._replace(self._stored(), frozen=True)

    def grow(self, input_dim):
        """Makes room for more entities. The vectors of the old ones do not change by a bit; `size` stays.

        New scalars begin as the mean of the old ones, other new rows as the layer's initializer has them, new choices
        among codebooks as hashes; other integers of a frozen layer are the last one's. A model that holds the layer
        must be compiled again before it is fitted or predicts.

        Raises:
            ValueError: fewer entities than before, or a method whose old vectors would change.
        """
        self._check_built("grow")
        _check_size("input_dim", input_dim)
        if input_dim < self.input_dim:
            raise ValueError(f"The layer has {self.input_dim} entities already. Received: input_dim={input_dim}.")
        if not self.plan.grows:
            raise ValueError(f"The vectors of method {self.method!r} would all change with the number of entities.")
        old = {name: ops.convert_to_numpy(variable) for name, variable in self._state.items()}
        tables = self._tables
        before = self.plan.grown_from or self.input_dim
        self._replace({}, plan=dataclasses.replace(self.plan, input_dim=int(input_dim), grown_from=before))
        for name, variable in self._state.items():
            variable.assign(_grown(old[name], ops.convert_to_numpy(variable), tables.get(name)))

    def _replace(self, values, plan=None, frozen=None):
        """Makes the variables anew, for another plan or form."""
        self._tracker.unlock()
        for variable in list(self._state.values()):
            self._untrack_variable(variable)
        self.plan = self.plan if plan is None else plan
        self.frozen = self.frozen if frozen is None else frozen
        self._create(values)
        self._tracker.lock()

    def _stored(self):
        """The values of every variable in the form of storage, by name."""
        current = {name: ops.convert_to_numpy(variable) for name, variable in self._state.items()}
        if self.frozen:
            return current
        found = {name: current[name] * _kernel_scale(shape) for name, shape in self.plan.dense().items()}
        for name, table in self._tables.items():
            found[name] = current[name]
            if table.has_scale:
                found[name], found[f"{name}_scale"] = quantize(table, current[name])
        return found

    def deploy(self):
        """A functional model of stock layers: an `Embedding` for every table (of bytes where the table has bits), and
        the arithmetic between them. It takes ids of the most axes that a model gives the layer, and weights, too, where
        one does; `call_deployed` makes the other calls of it."""
        self._check_built("deploy")
        calls = [node.input_tensors for node in self._inbound_nodes]
        rank = max(len(call[0].shape) for call in calls) if calls else len(self._ids_shape)
        weighted = any(len(call) > 1 for call in calls) if calls else self._weighted
        wide = any(keras.backend.standardize_dtype(call[0].dtype) in WIDE for call in calls)
        return _Deployment(self).model(rank, weighted, "int64" if wide else "int32")

    def call_deployed(self, model, inputs, training=False):
        """Calls the deployed model as this layer is called: with ids of fewer axes, or without weights."""
        tensors = list(inputs) if isinstance(inputs, (list, tuple)) else [inputs]
        number = len(model._inbound_nodes)

        def named(tensor, what):
            """Keras' own numbers, of a new process, may be those of a model that was read."""
            tensor._keras_history.operation.name = f"{self.name}_{number}_{what}"
            return tensor

        missing = len(model.inputs[0].shape) - len(tensors[0].shape)
        if missing > 0:
            axes = tuple(range(1, 1 + missing))
            tensors = [named(ops.expand_dims(tensor, axes), "expand_dims") for tensor in tensors]
        if len(tensors) < len(model.inputs):
            tensors.append(named(ops.ones_like(tensors[0], dtype="float32"), "ones"))
        vectors = model(tensors if len(tensors) > 1 else tensors[0])
        return named(ops.squeeze(vectors, axes), "squeeze") if missing > 0 else vectors

    def get_config(self):
        plan = {f.name: getattr(self.plan, f.name) for f in dataclasses.fields(self.plan)}
        return {
            **super().get_config(),
            **plan,
            "method": self.method,
            "embeddings_initializer": keras.initializers.serialize(self.embeddings_initializer),
            "embeddings_regularizer": keras.regularizers.serialize(self.embeddings_regularizer),
            "mask_zero": self.mask_zero,
            "combiner": self.combiner,
            "out_of_range": self.out_of_range,
            "frozen": self.frozen,
        }

    def get_build_config(self):
        shape = [self._ids_shape, self._ids_shape] if self._weighted else self._ids_shape
        return {"input_shape": shape, **({"float_ids": sorted(self._float_ids)} if self._float_ids else {})}

    def build_from_config(self, config):
        self._float_ids.update(config.get("float_ids", ()))
        self.build(config["input_shape"])

    def save_own_variables(self, store):
        for name, variable in self._state.items():
            store[name] = ops.convert_to_numpy(variable)

    def load_own_variables(self, store):
        if set(store.keys()) != set(self._state):
            form = "of a frozen layer " if any(key.endswith("_scale") for key in set(store.keys())) else ""
            raise ValueError(
                f"Layer {self.name!r} has the variables {', '.join(sorted(self._state))}; the file holds those {form}"
                f"({', '.join(sorted(store.keys()))}). Were both made with the same method, bits and frozen?"
            )
        for name, variable in self._state.items():
            variable.assign(store[name])

    def _check_built(self, what):
        if not self.built:
            raise ValueError(f"You must build the layer (call it once) before `{what}()`.")


class _Deployment:
    """Builds a layer's deployed form: the same plan, run on the symbolic tensors of stock layers."""

    def __init__(self, layer: CompressedEmbedding):
        self.layer = layer
        self.plan = layer.plan
        self.values = layer._stored()

    def model(self, rank: int, weighted: bool, dtype: str) -> keras.Model:
        layer, plan = self.layer, self.plan
        shape = (None,) * rank  # free: a wrapper, or a model without an Input, may give other lengths than were seen
        given = keras.Input(batch_shape=shape, dtype=dtype, name="ids")
        inputs = [given]
        ids = _in_range(given, plan.input_dim, layer.out_of_range)
        if dtype == "int64":  # what does not fit into 32 bits is cut, and must stay out of range
            ids = ids if layer.out_of_range != "error" else ops.clip(ids, -1, plan.input_dim)
            ids = ops.cast(ids, "int32")
        rows = self._all_rows(plan.codes(ids))
        rows |= self._all_rows(plan.chosen(rows))
        dense = {name: self._dense(name, shape) for name, shape in plan.dense().items()}
        values = plan.combine(rows, dense, ids)
        weights = mask = None
        if weighted:
            weights = keras.Input(batch_shape=shape, dtype="float32", name="weights")
            inputs.append(weights)
        if layer.mask_zero and layer.combiner is not None:
            mask = ops.cast(ops.not_equal(given, 0), "float32")
        outputs = plan.project(_pooled(values, layer.combiner, weights, mask, plan.axes), dense)
        return _numbered(keras.Model(inputs if len(inputs) > 1 else inputs[0], outputs, name=layer.name))

    def _all_rows(self, codes: dict[str, Any]) -> dict[str, Any]:
        return {name: self._rows(name, self.layer._tables[name], places) for name, places in codes.items()}

    def _rows(self, name: str, table: Table, codes: Any) -> Any:
        """A stock `Embedding`; for integers, together with what turns them into floats, in a model of its own."""
        if not table.has_scale:
            return self._embedding(name, self.values[name], table.stored_dtype)(codes)
        inputs = keras.Input(batch_shape=codes.shape, dtype="int32", name="codes")
        scale = self.values[f"{name}_scale"]
        by_row = table.scale == "row"
        scale = self._embedding(f"{name}_scale", scale, "float32")(inputs) if by_row else float(scale)
        stored = self._embedding(f"{name}_stored", self.values[name], table.stored_dtype)(inputs)
        return _numbered(keras.Model(inputs, dequantize(table, stored, scale), name=name))(codes)

    def _embedding(self, name: str, values: np.ndarray, dtype: str) -> keras.Layer:
        layer = keras.layers.Embedding(*values.shape, embeddings_initializer="zeros", dtype=dtype, name=name)
        layer.build()
        layer.set_weights([values])
        layer.trainable = dtype == "float32"  # integers have no gradient
        return layer

    def _dense(self, name: str, shape: tuple[int, int]) -> keras.Layer:
        layer = keras.layers.Dense(shape[1], use_bias=False, dtype="float32", name=name)
        layer.build((None, shape[0]))
        layer.set_weights([self.values[name]])
        return layer


def _numbered(model: keras.Model) -> keras.Model:
    """The model with operations named by their place: Keras numbers them anew at every call in a process."""
    for index, operation in enumerate(model.operations):
        if not isinstance(operation, keras.Layer):
            operation.name = f"{type(operation).__name__.lower()}_{index}"
    return model


def _pooled(values: Any, combiner: str | None, weights: Any, mask: Any, axes: int) -> Any:
    """``Σ w·e / Σ |w|`` (mean), ``Σ w·e / √Σ w²`` (sqrtn), ``Σ w·e`` (sum) along the last axis of the ids.

    It is the axis before the last `axes` of the values.
    """
    if combiner is None:
        return values
    along = -1 - axes
    if mask is not None:
        weights = mask if weights is None else weights * mask
    if weights is None:
        if combiner == "mean" and values.shape[along] != 0:
            return ops.mean(values, axis=along)
        if combiner in ("sum", "mean"):
            return ops.sum(values, axis=along)  # the mean of nothing is zero
        weights = ops.ones_like(values[(..., *(0,) * axes)])

    def beside(numbers: Any) -> Any:
        for _ in range(axes):
            numbers = ops.expand_dims(numbers, -1)
        return numbers

    total = ops.sum(values * beside(weights), axis=along)
    if combiner == "sum":
        return total
    norm = ops.sum(ops.abs(weights), axis=-1) if combiner == "mean" else ops.sqrt(ops.sum(ops.square(weights), axis=-1))
    return total / beside(ops.where(ops.equal(norm, 0), 1.0, norm))


def _make_plan(method, options, input_dim, output_dim, compression, size, bits) -> Plan:
    """The method's plan; takes its options out of `options`."""
    for name, value in (("input_dim", input_dim), ("output_dim", output_dim)):
        _check_size(name, value)
    if compression is not None and size is not None:
        raise ValueError(f"Give `compression` or `size`, not both. Received: compression={compression}, size={size}.")
    kind = METHODS[method]
    own = _own_options(kind)
    chosen = {name: options.pop(name) for name in list(options) if name in own or name == "grown_from"}
    plan = kind(input_dim=int(input_dim), output_dim=int(output_dim), bits=bits, **chosen)
    if size is not None:
        if not isinstance(size, numbers.Integral) or isinstance(size, bool) or size < 1:
            raise ValueError(f"The number of {plan.counts} must be a positive integer. Received: {size!r}.")
        return dataclasses.replace(plan, size=int(size))
    if compression is None:
        if not plan.has_default:
            raise ValueError(f"Method {method!r} needs `compression` or `size`.")
        return dataclasses.replace(plan, size=plan.limits()[1])
    if not isinstance(compression, numbers.Real) or isinstance(compression, bool) or not float(compression) >= 1:
        raise ValueError(f"`compression` must be a number from 1 on. Received: compression={compression!r}.")
    return plan.fitted(float(compression))


def _check_method(method: Any) -> None:
    if method not in METHODS:
        raise ValueError(f"`method` must be one of {', '.join(METHODS)}. Received: method={method!r}.")


def _own_options(kind: type[Plan]) -> set[str]:
    return {f.name for f in dataclasses.fields(kind)} - {f.name for f in dataclasses.fields(Plan)}


def _check_size(name: str, value: Any) -> None:
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or not 1 <= int(value) < 2**31:
        raise ValueError(f"`{name}` must be an integer from 1 to 2³¹ − 1. Received: {name}={value!r}.")


def _grown(old: np.ndarray, fresh: np.ndarray, table: Table | None) -> np.ndarray:
    """The old rows and new ones: of scalars their mean, of stored integers and scales the last row, else fresh ones."""
    if old.shape == fresh.shape:
        return old
    if table is not None and table.choices:
        new = fresh[len(old) :]
    elif table is None or not np.issubdtype(old.dtype, np.floating):
        new = np.repeat(old[-1:], len(fresh) - len(old), axis=0)
    elif table.initial == "embeddings" and not np.all(fresh == fresh[:1]):
        new = fresh[len(old) :]
    else:
        new = np.repeat(old.mean(axis=0, keepdims=True), len(fresh) - len(old), axis=0)
    return np.concatenate([old, new.astype(old.dtype)])


def _counts(counts: Any, entities: int) -> np.ndarray:
    """Weights of the entities, never quite zero: an entity that was not seen has a vector all the same."""
    if counts is None:
        return np.ones(entities, np.float32)
    counts = np.asarray(counts)
    if counts.dtype.kind not in "iuf":
        raise ValueError(f"`counts` must be numbers. Received: {counts.dtype}.")
    counts = counts.astype(np.float32)
    if counts.shape != (entities,):
        raise ValueError(f"`counts` must have one number for each of {entities} entities. Received: {counts.shape}.")
    if not np.isfinite(counts).all() or (counts < 0).any() or not counts.any():
        raise ValueError("`counts` must be finite, not negative, and not all zero.")
    return np.maximum(counts, 1e-3 * counts.mean()).astype(np.float32)


def _fit_by_gradients(layer: CompressedEmbedding, matrix: np.ndarray, counts: np.ndarray, steps: int) -> None:
    """Trains a layer of the same tables that gives single vectors, and takes over what it learnt."""
    changed = {"combiner": None, "mask_zero": False, "trainable": True, "embeddings_regularizer": None}
    plain = type(layer).from_config({**layer.get_config(), **changed})
    ids = keras.Input((), dtype="int32")
    model = keras.Model(ids, plain(ids))
    rate = keras.optimizers.schedules.CosineDecay(0.02, steps)
    model.compile(optimizer=keras.optimizers.Adam(rate), loss="mse")
    batch = min(len(matrix), 8192)
    per_epoch = -(-len(matrix) // batch)
    order = np.random.default_rng(0).permutation(len(matrix)).astype("int32")
    weights = (counts / counts.mean())[order]
    epochs = max(1, steps // per_epoch)
    model.fit(order, matrix[order], sample_weight=weights, batch_size=batch, epochs=epochs, verbose=0)
    layer.set_weights(plain.get_weights())


def _check_choice(name: str, value: Any, known: tuple[Any, ...]) -> None:
    if value not in known:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, known))}. Received: {name}={value!r}.")


def _ids_shape(input_shape: Any) -> tuple[int | None, ...]:
    """The shape of the ids, of an input that may be a list of ids and weights."""
    first = input_shape[0] if len(input_shape) else None
    return tuple(first) if isinstance(first, (list, tuple)) else tuple(input_shape)


def _integers(ids: Any, floats: Collection[str] = ()) -> Any:
    """Ids as a tensor of integers; or of the floats that models give.

    Raises:
        TypeError: they are other floats, booleans or text.
    """
    if not hasattr(ids, "dtype"):
        ids = np.asarray(ids)
    dtype = keras.backend.standardize_dtype(ids.dtype)
    if not dtype.startswith(("int", "uint")) and dtype not in floats:
        raise TypeError(
            f"Ids must be integers. Received: a tensor of {dtype}. Cast them, or declare a model's input as "
            'keras.Input(shape, dtype="int32").'
        )
    return ids if isinstance(ids, keras.KerasTensor) else ops.convert_to_tensor(ids)


def _known(tensor: Any) -> np.ndarray | None:
    """The values; `None` while they are symbols: inside a model that is put together, or a compiled function."""
    if isinstance(tensor, keras.KerasTensor):
        return None
    try:
        return ops.convert_to_numpy(tensor)
    except Exception:  # each backend has an error of its own
        return None


def _check_tells_apart(dtype: str, input_dim: int, name: str) -> None:
    """Refuses a dtype whose whole numbers are too few for the ids.

    Raises:
        TypeError: it is.
    """
    digits = {"float32": 24, "float64": 53, "float16": 11, "bfloat16": 8}[dtype]
    if input_dim > 2**digits:
        raise TypeError(
            f"The model's input gives ids as {dtype}, which tells 2^{digits} of them apart; layer {name!r} has "
            f'{input_dim}. Begin the model with keras.Input(shape, dtype="int32").'
        )


def _check_weights(ids: Any, weights: Any, name: str) -> None:
    """Weights have the shape of the ids, as far as either is known; else they would be spread over them silently."""
    ids, weights = tuple(ids), tuple(weights)
    alike = (None in (a, b) or a == b for a, b in zip(ids, weights, strict=False))
    if len(ids) != len(weights) or not all(alike):
        raise ValueError(f"Weights must have the shape of the ids. Received: ids {ids}, weights {weights} ({name}).")


def _check_rows(ids: Any, weights: Any, name: str) -> None:
    """Ragged weights have the rows of the ids, where they are known; made dense, others would be padded silently."""
    pairs = zip(ids.nested_row_splits, weights.nested_row_splits, strict=False)
    known = [(_known(a), _known(b)) for a, b in pairs]
    alike = all(a is None or b is None or np.array_equal(a, b) for a, b in known)
    if ids.ragged_rank != weights.ragged_rank or not alike:
        raise ValueError(f"Ragged weights must have rows as long as those of the ids ({name}).")


def _check_range(ids: Any, input_dim: int) -> None:
    """Compares ids with the range, where their values are known."""
    values = _known(ids)
    if values is None:
        return
    if values.dtype.kind == "f" and (fractions := values[values % 1 != 0]).size:
        raise TypeError(f"Ids must be integers. Received: {fractions.flat[0]}.")
    if values.size and (values.min() < 0 or values.max() >= input_dim):
        wrong = values.min() if values.min() < 0 else values.max()
        raise ValueError(
            f"Ids must be from 0 to {input_dim - 1}. Received: {wrong}. "
            'Use `out_of_range="clip"` or "wrap" to take others, or `grow()` for new entities.'
        )


def _in_range(ids: Any, input_dim: int, policy: str) -> Any:
    if policy == "clip":
        return ops.clip(ids, 0, input_dim - 1)
    return ops.mod(ids, input_dim) if policy == "wrap" else ids


def _forks() -> Any:
    """A function that gives an initializer again, each time with another seed: one seed would make all tables alike."""
    count = -1

    def forked(initializer: keras.initializers.Initializer) -> keras.initializers.Initializer:
        nonlocal count
        count += 1
        config = initializer.get_config()
        if isinstance(config.get("seed"), int):
            return type(initializer).from_config({**config, "seed": config["seed"] + count})
        return initializer.clone()

    return forked


def _initializer(table: Table, embeddings: keras.initializers.Initializer) -> Any:
    if table.choices:
        return lambda shape, dtype=None: _hashes(shape, table.choices)
    if isinstance(table.initial, float):
        return keras.initializers.RandomNormal(stddev=table.initial)
    if table.initial == "embeddings":
        return embeddings
    if table.initial == "around_one":
        return lambda shape, dtype=None: 1.0 + embeddings(shape, dtype)
    return table.initial


def _hashes(shape: tuple[int, int], buckets: int) -> Any:
    rows, columns = shape
    return ops.cast(mix(ops.arange(rows, dtype="int32")[:, None], buckets, np.arange(columns)), "uint8")


def _kernel_scale(shape: tuple[int, int]) -> float:
    """What a kernel is multiplied by while it is trained: its elements are about one then.

    A step of Adam is as large for every weight. For elements of 1/√d it would be a large part of the whole, and all
    entities share them.
    """
    return shape[1] ** -0.5


def _kernel_initializer(shape: tuple[int, int]) -> keras.initializers.Initializer:
    """Orthogonal, and of a size that keeps the variance of a vector's elements."""
    return keras.initializers.Orthogonal(gain=max(1.0, shape[1] / shape[0]) ** 0.5 / _kernel_scale(shape))
