"""Bolt: parts of a network as fused GPU kernels, found by a search among templates.

    region.py, spec.py       a part of a network that one kernel computes, as values and as JSON; reference.py: in NumPy
    naming.py, graph.py,     an ONNX file, called by its Keras layers, normalised (by widening, folding, layout,
    partition.py             phases), padded (aligning.py), and its parts, each as a node of its own (standard.py:
                             what such a node means); half.py: in float16; ranges.py: whether its numbers fit into that
    templates/, source.py    CUDA sources for a region, written from parameters; grids.py: how they are launched
    search.py, tuning.py     candidates ranked by an estimate (architectures.py), or by a GPU's times (meter.py)
    build.py, checking.py    sources compiled; run on the CPU, thread by thread (host/), and compared
    assembling.py, bundle.py all of it, from an ONNX file to one file
    runtime.py, dlpack.py    bundles on a GPU, with others' arrays; ort/: in ONNX Runtime; trt.py: in TensorRT
    advice.py                what would make a network faster on its GPU

Source: Xing et al., MLSys 2022, https://arxiv.org/abs/2110.15238.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from keras_efficient import lazy

if TYPE_CHECKING:
    from keras_efficient.export.bolt import ort, runtime, trt
    from keras_efficient.export.bolt.assembling import assemble
    from keras_efficient.export.bolt.bundle import Bundle

__all__ = ["Bundle", "assemble", "ort", "runtime", "trt"]

_HOMES = {"Bundle": "bundle", "assemble": "assembling", "ort": "ort", "runtime": "runtime", "trt": "trt"}

__getattr__, __dir__ = lazy.names(__name__, _HOMES, __all__)
