"""From a Keras model to a checked file that runs on a phone, an NPU, a GPU or in ONNX Runtime, and back.

::

    from keras_efficient import export

    report = export.save(model, "model.tflite", precision="int8", calibration="photos/")
    run = export.load("model.tflite")
    y = run(x)                      # float arrays in, float arrays out, whatever the file holds

`targets` maps the name of each target to its `Target`; `bolt` makes and runs `.bolt` files for GPUs. Importing this
module imports neither Keras nor TensorFlow.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from keras_efficient import lazy

# The registry takes the place of the folder's name in this namespace; `from keras_efficient.export.targets import …`
# reaches the folder as ever.
from keras_efficient.export.targets import Target
from keras_efficient.export.targets import registry as targets

if TYPE_CHECKING:
    from keras_efficient.export import bolt
    from keras_efficient.export.pipeline import load, save
    from keras_efficient.export.report import Report

__all__ = ["Report", "Target", "bolt", "load", "save", "targets"]

_HOMES = {"bolt": "bolt", "load": "pipeline", "save": "pipeline", "Report": "report"}


__getattr__, __dir__ = lazy.names(__name__, _HOMES, __all__)
