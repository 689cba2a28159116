"""Efficient Keras layers and models: train them, load them pretrained, ship them to phones, NPUs and GPUs.

Three verbs: import a layer, load a model, export a file::

    from keras_efficient import layers, zoo, export

Importing this package imports neither Keras nor TensorFlow; a sub-module is imported when it is first used.
"""

from __future__ import annotations

from pathlib import Path

from keras_efficient import lazy

__version__ = "0.1.0"

_SUBMODULES = (
    "bayes",
    "compress",
    "deploy",
    "distribution",
    "errors",
    "export",
    "extreme",
    "layers",
    "models",
    "ranking",
    "recsys",
    "superres",
    "video",
    "zoo",
)

__all__ = ["__version__", *_SUBMODULES]


def _find_subpackages_of_a_checkout() -> None:
    """Makes ``zoo/`` and ``export/`` of a checkout's root importable as our sub-packages.

    A wheel holds them inside the package already. In a checkout whose root is the working directory, the folder
    ``keras_efficient`` hides every installed copy, so the root joins the package's search path.
    """
    root = Path(__file__).resolve().parent.parent
    if (root / "setup.cfg").is_file() and (root / "zoo" / "__init__.py").is_file():
        __path__.append(str(root))


_find_subpackages_of_a_checkout()


__getattr__, __dir__ = lazy.names(__name__, {name: name for name in _SUBMODULES}, __all__)
