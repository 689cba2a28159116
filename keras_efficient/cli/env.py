"""`keras-efficient env`: what a bug report needs to say. Imports none of the packages that it lists."""

from __future__ import annotations

import os
import platform
import sys
from typing import Annotated, Any

import typer

from keras_efficient.cli.output import out

__all__ = ["env"]

PACKAGES = (
    "keras",
    "tensorflow",
    "jax",
    "numpy",
    "ai-edge-litert",
    "ai-edge-quantizer",
    "ethos-u-vela",
    "onnx",
    "onnxruntime",
    "tf2onnx",
    "onnxscript",
    "cuda-bindings",
    "nvidia-cuda-nvrtc",
    "tensorrt",
    "tensorflow-model-optimization",
    "tf_keras",
    "pillow",
    "av",
    "grpcio",
    "cryptography",
    "psycopg",
    "h5py",
    "typer",
    "rich",
)
_OTHER_VARIABLES = ("KERAS_BACKEND", "TF_USE_LEGACY_KERAS", "CUDA_VISIBLE_DEVICES", "NO_COLOR")


def env(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False) -> None:
    """Show versions, variables and folders, as a bug report needs them."""
    out.begin(as_json=as_json)
    values = _environment()
    shown = {key: value for key, value in values.items() if key not in ("packages", "variables")}
    out.record(values, shown={**shown, **values["packages"], **values["variables"]})


def _environment() -> dict[str, Any]:
    import keras_efficient
    from keras_efficient.zoo.weights import cache_folder

    names = sorted(name for name in os.environ if name.startswith("KERAS_EFFICIENT_") or name in _OTHER_VARIABLES)
    return {
        "keras_efficient": keras_efficient.__version__,
        "python": platform.python_version(),
        "executable": sys.executable,
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "cache": str(cache_folder()),
        "packages": {name: _version(name) for name in PACKAGES},
        "variables": {name: os.environ[name] for name in names},
    }


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None
