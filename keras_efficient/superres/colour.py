"""Studio-range luma and chroma (ITU-R BT.601), the colour space of super-resolution scores; number formats of images.

One scale for all: a floating-point image runs from 0 to 1. An integer image is divided by 255 (uint8) or 65535 (uint16)
first, so that 8 and 16 bits mean the same. Y then lies in 16/255 … 235/255, Cb and Cr in 16/255 … 240/255. Nothing is
rounded on the way, so that `ycbcr_to_rgb` undoes `rgb_to_ycbcr` up to floating-point error.
"""

from __future__ import annotations

import numpy as np

from keras_efficient.errors import WrongArgument

__all__ = ["from_unit", "rgb_to_y", "rgb_to_ycbcr", "to_unit", "ycbcr_to_rgb"]

_MATRIX = np.array([[65.481, 128.553, 24.966], [-37.797, -74.203, 112.0], [112.0, -93.786, -18.214]]) / 255
_OFFSET = np.array([16.0, 128.0, 128.0]) / 255
_INVERSE = np.linalg.inv(_MATRIX)


def rgb_to_y(rgb: np.ndarray, *, dtype=np.float32) -> np.ndarray:
    """Studio-range luma, Y = (16 + 65.481 R + 128.553 G + 24.966 B) / 255 with R, G, B in [0, 1].

    Args:
        rgb: …×3; uint8, uint16, or floating point in [0, 1].
        dtype: type to compute in.

    Returns:
        …, in 16/255 … 235/255.
    """
    rgb = _checked(rgb, dtype)
    return rgb @ _MATRIX[0].astype(dtype) + dtype(_OFFSET[0])


def rgb_to_ycbcr(rgb: np.ndarray, *, dtype=np.float32) -> np.ndarray:
    """Studio-range Y, Cb, Cr (…×3, in `dtype`) of an RGB image (…×3; uint8, uint16, or floating point in [0, 1])."""
    rgb = _checked(rgb, dtype)
    return rgb @ _MATRIX.T.astype(dtype) + _OFFSET.astype(dtype)


def ycbcr_to_rgb(ycbcr: np.ndarray) -> np.ndarray:
    """The inverse of `rgb_to_ycbcr`: …×3 floating point to …×3 in the same precision, neither clipped nor rounded."""
    ycbcr = np.asarray(ycbcr)
    if ycbcr.shape[-1:] != (3,) or ycbcr.dtype.kind != "f":
        raise WrongArgument(f"ycbcr_to_rgb takes …×3 floating point, not {ycbcr.shape} of {ycbcr.dtype}.")
    return (ycbcr - _OFFSET.astype(ycbcr.dtype)) @ _INVERSE.T.astype(ycbcr.dtype)


def to_unit(image: np.ndarray, *, dtype=np.float32) -> np.ndarray:
    """An image in [0, 1]: uint8 / 255, uint16 / 65535, floating point as it is.

    Raises:
        WrongArgument: for any other type.
    """
    image = np.asarray(image)
    if image.dtype in (np.uint8, np.uint16):
        return image.astype(dtype) / dtype(np.iinfo(image.dtype).max)
    if image.dtype.kind != "f":
        raise WrongArgument(f"An image is uint8, uint16 or floating point in [0, 1], not {image.dtype}.")
    return image.astype(dtype, copy=False)


def from_unit(image: np.ndarray, dtype) -> np.ndarray:
    """The inverse of `to_unit`: clips to [0, 1] and, for uint8 and uint16, scales and rounds half up (once)."""
    dtype = np.dtype(dtype)
    image = np.clip(image, 0, 1)
    if dtype.kind == "f":
        return image.astype(dtype, copy=False)
    image *= image.dtype.type(np.iinfo(dtype).max)
    image += image.dtype.type(0.5)
    return image.astype(dtype)  # truncates


def _checked(rgb, dtype) -> np.ndarray:
    rgb = np.asarray(rgb)
    if rgb.shape[-1:] != (3,):
        raise WrongArgument(f"An RGB image has 3 channels last, not the shape {rgb.shape}.")
    return to_unit(rgb, dtype=dtype)
