"""Embedding tables of a trained model: what compressing each would save and lose, and the model with them compressed.

The other compressions of this package train with tensorflow-model-optimization; this one needs Keras only::

    for table in compress.advise_embeddings(model):
        print(table.path, table.share, table.settings)
    smaller = compress.compress_embeddings(model, compression=16)
    smaller.compile("adam", "mse")
    smaller.fit(x, y)                                       # a few epochs at a low rate, if validation gains
"""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import keras
import numpy as np

from keras_efficient.deploy import rebuild
from keras_efficient.errors import UnknownName, UnsupportedLayer, WrongArgument
from keras_efficient.layers import CompressedEmbedding, MEmComEmbedding
from keras_efficient.layers.embedding.fit import weighted_error
from keras_efficient.layers.embedding.memcom import FORMS
from keras_efficient.layers.table import BITS

__all__ = [
    "RATIOS",
    "SMALL",
    "EmbeddingAdvice",
    "EmbeddingSetting",
    "advise_embeddings",
    "compress_embeddings",
    "weights_nbytes",
]

RATIOS = (4, 12, 16, 40)
SMALL = 64 * 1024  # bytes of a table below which compressing it is not worth the trouble

# Of a fit for an estimate. The time of the subspace form grows with rows · width · scalars, seconds a setting at this
# product; with fewer rows than eight times the scalars it would learn the sample by heart.
_MOST_ROWS, _MOST_WORK = 20_000, 40_000_000

Table: TypeAlias = keras.layers.Embedding | CompressedEmbedding


@dataclass(frozen=True)
class EmbeddingSetting:
    """One way to compress a table.

    Attributes:
        form: of `MEmComEmbedding`: ``"scaled"`` (as published: floats), ``"subspace"`` or ``"codebooks"``.
        bits: width of the table's numbers.
        compression: ratio that was asked for.
        largest: largest ratio that is possible with this form and these bits.
        nbytes: bytes of all that is stored, or `None` where the ratio is impossible.
        table_error: ``Σ ‖E_i − e(i)‖² / Σ ‖E_i‖²`` without training, 0 where nothing is lost and 1 where all is: an
            estimate of how far the vectors move, not of the model's quality. `None` where the ratio is impossible.
        sampled: from how many rows, spread evenly, the error comes.
    """

    form: str
    bits: int
    compression: float
    largest: float
    nbytes: int | None = None
    table_error: float | None = None
    sampled: int = 0


@dataclass(frozen=True)
class EmbeddingAdvice:
    """One embedding table of a model.

    Attributes:
        path: of its layer: names of the models and wrappers around it, and its own, joined by ``/``.
        entities: rows.
        width: columns.
        nbytes: bytes.
        share: part of the bytes of all the model's weights, 0 to 1.
        worth_it: whether it is large enough to be compressed (64 KiB).
        settings: what was tried; empty where it is not worth it.
    """

    path: str
    entities: int
    width: int
    nbytes: int
    share: float
    worth_it: bool
    settings: tuple[EmbeddingSetting, ...] = ()


def advise_embeddings(
    model: keras.Model, ratios: Sequence[float] = RATIOS, on_progress: Callable[[str], None] | None = None
) -> list[EmbeddingAdvice]:
    """What compressing each embedding table of a trained model would save, and how far its vectors would move.

    Tables are those of `keras.layers.Embedding` (in floats, no subclass of it), and of a `CompressedEmbedding` that
    compresses nothing, wherever they sit. Of large tables the errors are estimated from at most 20,000 rows, of the
    subspace form from fewer where rows are wide.

    Args:
        model: a built model. It is not changed.
        ratios: compressions to try. None: only the tables are listed.
        on_progress: is called with what is being done.

    Returns:
        The tables in the order of the model's layers; a shared one once.

    Raises:
        WrongArgument: no built model, a ratio that is not above 1, or a table that is not finite.
    """
    for ratio in ratios:
        _check_compression(ratio)
    total = weights_nbytes(model)
    return [_advice(path, layer, total, ratios, on_progress) for path, layer in _tables(model)]


def compress_embeddings(
    model: keras.Model,
    *,
    compression: float = 16,
    form: str = "subspace",
    bits: int | None = None,
    counts: Mapping[str, Any] | None = None,
    only: Collection[str] | None = None,
    frozen: bool = False,
) -> keras.Model:
    """Copies a model with its embedding tables compressed by `MEmComEmbedding.from_embedding`.

    Every table of 64 KiB or more is replaced, unless the form cannot compress it so far: narrow tables (the biases of
    a recommender) stay as they are. All else is copied unchanged, in float32; names, masks and what is shared stay. An
    `embeddings_constraint` and an `embeddings_regularizer` are dropped: they are of the whole table. The new layers can
    be trained where the old ones could. Whether that gains is for validation data to say: a few epochs at a low rate
    help the scaled form much, and few-bit tables by up to a per cent. `frozen`, `freeze()` or deploying makes their
    bytes as few as promised.

    Args:
        model: a built functional or Sequential model. It is not changed.
        compression: bytes of the float32 table over those of all that takes its place, at least.
        form: ``"subspace"``, ``"codebooks"`` or ``"scaled"``.
        bits: 32, 16, 8, 4, 2 or 1. By default 2 for the subspace form and 8 for the others. The scalars of the scaled
            form take as many, but at least 8.
        counts: by layer path, how often each entity occurs. Tables that are not named weigh all entities alike.
        only: paths of the layers to replace, whatever their size; `advise_embeddings` shows them.
        frozen: the tables hold the integers of storage: a small model and file, no more training.

    Returns:
        An uncompiled model.

    Raises:
        WrongArgument: an argument that is out of range, nothing to compress, or a table in `only` that cannot be
            compressed so far.
        UnknownName: a path in `counts` or `only` that is no table's.
        UnsupportedLayer: as `keras_efficient.deploy.deploy`; or the table sits inside a layer of another's making.
    """
    options = _options(form, bits)
    _check_compression(compression)
    tables = _tables(model)
    if not tables:
        raise WrongArgument(f"Model {model.name!r} has no embedding table that could be compressed.")
    if isinstance(only, str):
        only = (only,)
    if counts is not None and not isinstance(counts, Mapping):
        raise WrongArgument(
            "`counts` are by layer: {path: counts of its entities}.", hint=f"Paths: {', '.join(dict(tables))}."
        )
    counts = counts or {}
    for path in [*counts, *(only or ())]:
        if path not in dict(tables):
            raise UnknownName("embedding table", path, dict(tables))
    waiting = {id(layer): path for path, layer in _chosen(tables, compression, options, only)}

    def replace(operation: keras.Operation, _: str) -> keras.Operation | None:
        path = waiting.pop(id(operation), None)
        if path is None:
            return None
        return _compressed(path, operation, counts.get(path), compression=compression, frozen=frozen, **options)

    result = rebuild(model, replace)
    for path in waiting.values():
        raise UnsupportedLayer(
            path,
            "the layer around it does not let its parts be exchanged",
            hint="Leave this table out: name the others in `only`.",
        )
    return result


def weights_nbytes(model: keras.Model) -> int:
    """Bytes of a model's weights; compressed embeddings count with what they store when frozen or deployed.

    Raises:
        WrongArgument: no built model.
    """
    if not isinstance(model, keras.Model) or not model.built:
        raise WrongArgument(f"A built Keras model is needed, not {model!r}.", hint="Call it once, or build() it.")
    compressed = {id(layer): layer for _, layer in _inner(model) if isinstance(layer, CompressedEmbedding)}.values()
    counted = {id(variable) for layer in compressed for variable in layer.weights}
    others = sum(_nbytes(variable) for variable in model.weights if id(variable) not in counted)
    return others + sum(layer.nbytes for layer in compressed)


def _advice(
    path: str, layer: Table, total: int, ratios: Sequence[float], on_progress: Callable[[str], None] | None
) -> EmbeddingAdvice:
    nbytes = _table_nbytes(layer)
    about = (path, layer.input_dim, layer.output_dim, nbytes, nbytes / total)
    if nbytes < SMALL:
        return EmbeddingAdvice(*about, worth_it=False)
    settings = []
    for ratio in ratios:
        subspaces = [("subspace", bits) for bits in _sensible_bits(ratio)]
        for form, bits in [("scaled", 32), *subspaces, ("codebooks", 8)]:
            if on_progress is not None:
                on_progress(f"{path}: {form}, {bits} bits, {ratio:g}×")
            settings.append(_setting(path, layer, form, bits, ratio))
    return EmbeddingAdvice(*about, worth_it=True, settings=tuple(settings))


def _sensible_bits(ratio: float) -> list[int]:
    """Widths of the subspace form's scalars that are worth a try at this ratio.

    At this ratio a column has 32 / ratio bits, so scalars of b bits are 32 / (ratio · b) a column. Far fewer scalars
    than columns leave directions out. More of them than columns are good at two bits: at 4× four of two bits lose a
    sixth of what two of four bits do, of normal values with and without a falling spectrum. Two of one bit lose a
    sixth to a half more than one of two. So 4× takes two bits, 12× and 16× two and four, 40× one and two.
    """
    most = {1: 4 / 3, 2: 4, 4: 4 / 3}
    # Outside of all that, the end that is nearest.
    return [b for b, limit in most.items() if 1 / 3 <= 32 / (ratio * b) <= limit] or [4 if ratio < 16 else 1]


def _setting(path: str, layer: Table, form: str, bits: int, ratio: float) -> EmbeddingSetting:
    options = {"form": form, "bits": bits}
    largest = _largest(layer, options)
    if ratio > largest:
        return EmbeddingSetting(form, bits, ratio, _floor(largest))
    whole = MEmComEmbedding(layer.input_dim, layer.output_dim, compression=ratio, **options)
    ids, size = _sample(whole)
    matrix = _vectors(layer, ids)
    fitted = _fitted(path, matrix, hash_size=size, **options)
    error = weighted_error(matrix, fitted.embeddings(), np.ones(len(matrix), np.float32))
    return EmbeddingSetting(form, bits, ratio, _floor(largest), whole.nbytes, error, len(matrix))


def _sample(layer: MEmComEmbedding) -> tuple[np.ndarray, int]:
    """Rows to judge a layer by, spread evenly, and the `hash_size` that makes of them what the whole layer is.

    Of the scaled form these are whole buckets, which are fitted one by one: their error is the one they would have in
    the whole. With ``i mod m`` the ids of some buckets, numbered anew in their order, fall into the same buckets.
    """
    entities, size = layer.input_dim, layer.hash_size
    most = _most_rows(layer)
    if entities <= most:
        return np.arange(entities), size
    if layer.form != "scaled":
        return _evenly(entities, most), min(size, most)
    buckets = _evenly(size, max(1, most * size // entities))
    ids = np.flatnonzero(np.isin(np.arange(entities) % size, buckets))
    return ids[_evenly(len(ids), most)] if len(buckets) == 1 else ids, len(buckets)


def _most_rows(layer: MEmComEmbedding) -> int:
    if layer.form != "subspace":
        return _MOST_ROWS
    return min(_MOST_ROWS, max(8 * layer.hash_size, _MOST_WORK // (layer.output_dim * layer.hash_size)))


def _evenly(of: int, most: int) -> np.ndarray:
    """At most `most` of the numbers 0 … of − 1."""
    return np.linspace(0, of - 1, min(of, most)).astype(np.int64)


def _vectors(layer: Table, ids: np.ndarray) -> np.ndarray:
    if isinstance(layer, CompressedEmbedding):
        return layer.embeddings(ids)
    return np.asarray(keras.ops.convert_to_numpy(keras.ops.take(layer.embeddings, ids, axis=0)), np.float32)


def _chosen(
    tables: list[tuple[str, Table]], compression: float, options: dict[str, Any], only: Collection[str] | None
) -> list[tuple[str, Table]]:
    """The tables to be replaced: those named, or all that are large enough and can be compressed so far."""
    chosen, reasons = [], []
    for path, layer in tables:
        largest = _largest(layer, options)
        if only is None and _table_nbytes(layer) < SMALL:
            reasons.append(f"{path} is smaller than 64 KiB")
        elif (only is None or path in only) and compression > largest:
            reasons.append(f"{path} can be compressed {_floor(largest):g}× at most")
        elif only is None or path in only:
            chosen.append((path, layer))
    if not chosen or (only is not None and reasons):
        form, bits = options["form"], options["bits"]
        hint = "Name a table in `only` to compress it all the same." if reasons else None
        if any("at most" in reason for reason in reasons):
            hint = "Ask for less compression, or fewer bits."
        what = "; ".join(reasons) or "`only` is empty"
        raise WrongArgument(f"Nothing to compress {compression:g}× ({form}, {bits} bits): {what}.", hint=hint)
    return chosen


def _compressed(path: str, layer: Table, counts: Any, **options: Any) -> MEmComEmbedding:
    """The layer that takes the place of a table."""
    options |= {
        "mask_zero": layer.mask_zero,
        "embeddings_initializer": layer.embeddings_initializer,
        "name": layer.name,
        "dtype": layer.dtype_policy,
    }
    if isinstance(layer, CompressedEmbedding):
        options |= {"combiner": layer.combiner, "out_of_range": layer.out_of_range}
    return _fitted(path, _vectors(layer, np.arange(layer.input_dim)), counts=counts, **options)


def _fitted(path: str, matrix: np.ndarray, **options: Any) -> MEmComEmbedding:
    try:
        return MEmComEmbedding.from_embedding(matrix, **options)
    except ValueError as error:  # values that are not finite, counts of another length
        raise WrongArgument(f"Embedding table {path!r}: {error}") from error


def _tables(model: keras.Model) -> list[tuple[str, Table]]:
    """The embedding tables of a model by path, each once."""
    weights_nbytes(model)  # refuses what is no built model
    found: dict[int, tuple[str, Table]] = {}
    for path, layer in _inner(model):
        if _is_table(layer):
            found.setdefault(id(layer), (path, layer))
    return list(found.values())


def _is_table(layer: keras.Layer) -> bool:
    """Whether a layer is a whole table of floats, and nothing but that: a subclass may do more than look up."""
    if not layer.built:
        return False
    if type(layer) is keras.layers.Embedding:
        return layer.quantization_mode is None
    whole = type(layer) is CompressedEmbedding and layer.method == "reduced" and layer.bits == 32
    return whole and layer.plan.size == layer.output_dim


def _inner(layer: keras.Layer, path: str = "") -> Iterator[tuple[str, keras.Layer]]:
    """All layers inside a layer, with their paths as `rebuild` names them."""
    for inner in layer._flatten_layers(include_self=False, recursive=False):
        inner_path = f"{path}/{inner.name}" if path else inner.name
        yield inner_path, inner
        yield from _inner(inner, inner_path)


def _largest(layer: Table, options: dict[str, Any]) -> float:
    """The ratio with a single row or scalar."""
    return MEmComEmbedding(layer.input_dim, layer.output_dim, hash_size=1, **options).compression_ratio


def _floor(ratio: float) -> float:
    return math.floor(100 * ratio) / 100


def _table_nbytes(layer: Table) -> int:
    return layer.nbytes if isinstance(layer, CompressedEmbedding) else _nbytes(layer._embeddings)


def _nbytes(variable: keras.Variable) -> int:
    width = re.search(r"\d+", variable.dtype)  # a bool has none
    return math.prod(variable.shape) * int(width.group() if width else 8) // 8


def _options(form: str, bits: int | None) -> dict[str, Any]:
    """Arguments of the layer.

    Raises:
        WrongArgument: a form or a width that there is none of.
    """
    if form not in FORMS:
        raise UnknownName("form", form, FORMS)
    if bits is None:
        bits = 2 if form == "subspace" else 8
    known = [width for width in BITS if form != "codebooks" or width >= 8]
    if bits not in known:
        raise WrongArgument(f"`bits` must be one of {', '.join(map(str, known))}, not {bits!r}.")
    return {"form": form, "bits": bits, **({"scalar_bits": max(bits, 8)} if form == "scaled" else {})}


def _check_compression(compression: Any) -> None:
    if not isinstance(compression, numbers.Real) or not 1 < float(compression) < math.inf:
        raise WrongArgument(f"A compression must be a number above 1, not {compression!r}.")
