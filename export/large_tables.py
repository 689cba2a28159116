"""Tables that the converter never sees: it would copy large ones several times, and take minutes for that, and round
the scales and biases of rows where it rounds rows.

A small table takes the place of each while a model is converted, and the table itself its place in the file.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from keras_efficient.errors import ConversionError
from keras_efficient.export import flatbuffer
from keras_efficient.export.lowerings import LARGE, operations, rebuild_if
from keras_efficient.export.lowerings.plain_gather import PlainGather
from keras_efficient.export.lowerings.table_layers import IntegerTable, SignTable

if TYPE_CHECKING:
    import keras

__all__ = ["put_back", "taken_out"]

MOST = 2**31 - 2**20  # bytes of a flatbuffer, whose offsets are signed
ROUNDED = 1024  # numbers from which on the converter rounds a table of floats
KEPT = ("bias", "scale")  # ends of the names of tables that belong to another one's rows
ROWS = 13  # of a small table: enough for no two of them to be alike


def taken_out(model: keras.Model, *, rounding: bool) -> tuple[keras.Model, list[tuple[np.ndarray, np.ndarray]]]:
    """The model with small tables in the place of large ones, and pairs of both; itself where it has none.

    Args:
        model: as it would be converted.
        rounding: whether the converter will round tables of floats to integers. Then it has to see those of rows, and
            must not see scales and biases of rows.
    """
    random, found = np.random.default_rng(0), {}
    for layer in operations(model):
        if _is_meant(layer, rounding):
            large = layer.get_weights()
            found[id(layer)] = [(_like(array, random), array) for array in large]

    def small(layer: Any) -> Any:
        size = "input_dim" if isinstance(layer, PlainGather) else "rows"
        twin = type(layer).from_config({**layer.get_config(), size: ROWS})
        twin.build()
        twin.set_weights([small for small, _ in found[id(layer)]])
        return twin

    return rebuild_if(model, lambda x: id(x) in found, small), [pair for pairs in found.values() for pair in pairs]


def _is_meant(layer: Any, rounding: bool) -> bool:
    if type(layer) not in (PlainGather, IntegerTable, SignTable):
        return False
    arrays = [(np.dtype(weight.dtype), int(np.prod(weight.shape))) for weight in layer.weights]
    if rounding and type(layer) is PlainGather and arrays[0][0].kind == "f":
        return layer.name.endswith(KEPT) and arrays[0][1] >= ROUNDED
    scales = rounding and any(dtype.kind == "f" and size >= ROUNDED for dtype, size in arrays)
    return scales or sum(dtype.itemsize * size for dtype, size in arrays) >= LARGE


def _like(array: np.ndarray, random: np.random.Generator) -> np.ndarray:
    shape = (ROWS, *array.shape[1:])
    if array.dtype.kind in "iu":
        return random.integers(0, 100, shape, array.dtype)
    return random.normal(size=shape).astype(array.dtype)


def put_back(data: bytes, tables: list[tuple[np.ndarray, np.ndarray]]) -> bytes | None:
    """The file with the large tables; `None` where a small one is not there as it was, or as float16."""
    size = len(data) + sum(large.nbytes for _, large in tables)
    if size >= MOST:
        raise ConversionError(
            f"The tables need {size / 1e9:.1f} GB; a .tflite holds less than 2.1 GB.",
            hint="Store them in fewer bits, such as HALOSOutput(bits=8).",
        )
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
