"""Large tables that the converter never sees: it would copy each of them several times, and take minutes for that.

A small table takes the place of each while a model is converted, and the large one its place in the file.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from keras_efficient.export import flatbuffer
from keras_efficient.export.lowerings import operations, rebuild_if
from keras_efficient.export.lowerings.plain_gather import PlainGather

if TYPE_CHECKING:
    import keras

__all__ = ["LARGE", "put_back", "taken_out"]

LARGE = 32 * 2**20  # bytes
ROWS = 13  # of a small table: enough for no two of them to be alike


def taken_out(model: keras.Model, *, of_floats: bool) -> tuple[keras.Model, list[tuple[np.ndarray, np.ndarray]]]:
    """The model with small tables in the place of large ones, and pairs of both; itself where it has none.

    Args:
        model: as it would be converted.
        of_floats: whether tables of floats are meant, too, which some precisions round.
    """
    random = np.random.default_rng(0)
    large = {id(layer): layer for layer in operations(model) if _is_large(layer, of_floats)}
    tables = {}
    for key, layer in large.items():
        shape, dtype = (ROWS, layer.output_dim), np.dtype(layer.embeddings.dtype)
        whole = random.integers(0, 100, shape, dtype) if dtype.kind in "iu" else None
        tables[key] = random.normal(size=shape).astype(dtype) if whole is None else whole

    def small(layer: Any) -> PlainGather:
        twin = PlainGather.from_config({**layer.get_config(), "input_dim": ROWS})
        twin.build()
        twin.set_weights([tables[id(layer)]])
        return twin

    pairs = [(tables[key], np.asarray(layer.embeddings)) for key, layer in large.items()]
    return rebuild_if(model, lambda operation: id(operation) in tables, small), pairs


def put_back(data: bytes, tables: list[tuple[np.ndarray, np.ndarray]]) -> bytes | None:
    """The file with the large tables; `None` where a small one is not there as it was, or as float16."""
    model = flatbuffer.unpack(data)
    for small, large in tables:
        found = _tensors_of(model, small)
        if not found:
            return None
        for tensor in found:
            tensor.shape = list(large.shape)
        buffer = model.buffers[found[0].buffer]
        dtype = small.dtype if len(buffer.data) == small.nbytes else np.dtype(np.float16)
        buffer.data = np.ascontiguousarray(large.astype(dtype, copy=False)).view(np.uint8).ravel()
    return flatbuffer.pack(model)


def _tensors_of(model: Any, small: np.ndarray) -> list[Any]:
    """The tensors that hold a small table."""
    wanted = {small.tobytes(), small.astype(np.float16).tobytes()}
    return [
        tensor
        for subgraph in model.subgraphs
        for tensor in subgraph.tensors
        if list(tensor.shape) == list(small.shape) and _contents(model, tensor) in wanted
    ]


def _contents(model: Any, tensor: Any) -> bytes:
    data = model.buffers[tensor.buffer].data
    return b"" if data is None else bytes(data)


def _is_large(layer: Any, of_floats: bool) -> bool:
    if type(layer) is not PlainGather:
        return False
    dtype = np.dtype(layer.embeddings.dtype)
    return (of_floats or dtype.kind in "iu") and layer.input_dim * layer.output_dim * dtype.itemsize >= LARGE
