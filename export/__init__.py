"""From a Keras model to a checked file that runs on a phone, an NPU, a GPU or in ONNX Runtime, and back.

::

    from keras_efficient import export

    report = export.save(model, "model.tflite", precision="int8", calibration="photos/")
    run = export.load("model.tflite")
    y = run(x)                      # float arrays in, float arrays out, whatever the file holds

`targets` maps the name of each target to its `Target`. Importing this module imports neither Keras nor TensorFlow.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

# The registry takes the place of the folder's name in this namespace; `from keras_efficient.export.targets import …`
# reaches the folder as ever.
from keras_efficient.export.targets import Target
from keras_efficient.export.targets import registry as targets

if TYPE_CHECKING:
    from keras_efficient.export.pipeline import load, save
    from keras_efficient.export.report import Report

__all__ = ["Report", "Target", "load", "save", "targets"]

_HOMES = {"load": "pipeline", "save": "pipeline", "Report": "report"}


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
