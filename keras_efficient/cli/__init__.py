"""The command-line program `keras-efficient`; the only part of the package that prints."""

from keras_efficient.cli.app import main

__all__ = ["main"]
