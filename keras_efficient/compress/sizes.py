"""How large a model is on disk and after gzip, how many of its weights are zero, how many values they take.

A pruned or clustered file has as many bytes as before: its zeros and repeated values are stored like all others. What
becomes smaller is the compressed file (an application package, a download, Vela's weight streams), hence gzip.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from keras_efficient.errors import WrongArgument

if TYPE_CHECKING:
    import keras

__all__ = ["KernelSizes", "Sizes", "measure"]


@dataclass(frozen=True)
class KernelSizes:
    """One weight tensor of two or more axes.

    Attributes:
        weights: number of values.
        sparsity: part of them that is zero, 0 to 1.
        unique_values: number of different values.
    """

    weights: int
    sparsity: float
    unique_values: int


@dataclass(frozen=True)
class Sizes:
    """Size of a model or file.

    Attributes:
        bytes: of the file, or of a model's weights one after another.
        gzip_bytes: of the same, compressed by gzip (level 9).
        sparsity: part of all kernels' values that is zero, 0 to 1.
        unique_values: of the kernel that takes most different values.
        kernels: each kernel by its path (a file's: by tensor name).
    """

    bytes: int
    gzip_bytes: int
    sparsity: float
    unique_values: int
    kernels: Mapping[str, KernelSizes]


def measure(model: keras.Model | str | Path) -> Sizes:
    """Measures a Keras model, or a `.tflite` file.

    Kernels are the weights of two or more axes: biases, scales and slopes are neither pruned nor clustered.

    Raises:
        WrongArgument: neither a model nor a `.tflite`.
        FileProblem: the file is missing or damaged.
    """
    if isinstance(model, str | Path):
        if Path(model).suffix.lower() != ".tflite":
            raise WrongArgument(f"{model}: only .tflite files are measured.", hint="Open others with Keras first.")
        data, arrays = _file_arrays(Path(model))
    else:
        arrays = {weight.path: _array(weight) for weight in model.weights}
        data = b"".join(array.tobytes() for array in arrays.values())
    kernels = {path: _kernel(array) for path, array in arrays.items() if array.ndim > 1}
    total = sum(kernel.weights for kernel in kernels.values())
    return Sizes(
        bytes=len(data),
        gzip_bytes=len(gzip.compress(data, compresslevel=9, mtime=0)),
        sparsity=sum(kernel.sparsity * kernel.weights for kernel in kernels.values()) / max(1, total),
        unique_values=max((kernel.unique_values for kernel in kernels.values()), default=0),
        kernels=kernels,
    )


def _kernel(array: np.ndarray) -> KernelSizes:
    return KernelSizes(array.size, float(np.mean(array == 0)) if array.size else 0.0, int(np.unique(array).size))


def _array(weight: keras.Variable) -> np.ndarray:
    import keras

    return keras.ops.convert_to_numpy(weight)


def _file_arrays(path: Path) -> tuple[bytes, dict[str, np.ndarray]]:
    from keras_efficient.export import flatbuffer

    data = flatbuffer.read_bytes(path)
    return data, dict(_constants(flatbuffer.unpack(data)))


def _constants(model) -> Iterator[tuple[str, np.ndarray]]:
    """Weights of a `.tflite`: constants of 8, 16 or 32 bits that an operator multiplies with."""
    dtypes = {0: np.float32, 1: np.float16, 7: np.int16, 9: np.int8}  # the schema's TensorType
    for graph in model.subgraphs:
        for tensor in graph.tensors:
            data = model.buffers[tensor.buffer].data
            if tensor.type in dtypes and data is not None and len(data):
                raw = np.frombuffer(np.asarray(data, np.uint8).tobytes(), dtypes[tensor.type])
                yield tensor.name.decode("utf-8", "replace"), raw.reshape(tensor.shape)
