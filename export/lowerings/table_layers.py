"""Layers that take rows from a table of integers, in the form in which a `.tflite` can hold it.

They are called in the place of a model, so they take a mask, and have no use for it.
"""

from __future__ import annotations

import keras
import numpy as np

from keras_efficient.export.lowerings.plain_gather import PlainGather

__all__ = ["FloatTable", "IntegerTable", "SignTable", "narrowest_bits"]


def narrowest_bits(values: np.ndarray) -> int:
    """Width of the narrowest number format of TFLite that holds these integers: 2, 4, 8, 16 or 32."""
    least, most = (int(values.min()), int(values.max())) if values.size else (0, 0)
    return next((bits for bits in (2, 4, 8, 16) if -(2 ** (bits - 1)) <= least and most < 2 ** (bits - 1)), 32)


class FloatTable(PlainGather):
    """A table of floats after all."""

    def call(self, inputs, mask=None):
        return super().call(inputs)

    def compute_output_spec(self, inputs, mask=None):
        return super().compute_output_spec(inputs)


class _Table(keras.layers.Layer):
    """``(…)`` ids to ``(…, columns)`` floats, ``(code + offset) · step`` times the row's own scale where rows have one.

    Ids of more axes are made one axis where EMBEDDING_LOOKUP will read the table, which takes nothing else.
    """

    flattens = True

    def __init__(self, rows, columns, step, offset, has_row_scales, **kwargs):
        super().__init__(dtype="float32", autocast=False, trainable=False, **kwargs)
        self.rows, self.columns, self.has_row_scales = rows, columns, has_row_scales
        self.step, self.offset = step, offset

    def build(self, input_shape=None):
        self.row_scales = self._table("row_scales", 1, "float32") if self.has_row_scales else None
        self.built = True

    def _table(self, name, columns, dtype):
        options = {"initializer": "zeros", "trainable": False, "autocast": False}
        return self.add_weight(name=name, shape=(self.rows, columns), dtype=dtype, **options)

    def fill(self, codes, row_scales):
        """Sets the contents: `codes` ``(rows, columns)``, and row scales ``(rows, 1)`` or `None`."""
        self._stored.assign(self._packed(codes))
        if row_scales is not None:
            self.row_scales.assign(row_scales)

    def call(self, ids, mask=None):
        import tensorflow as tf

        reshaped = self.flattens and len(ids.shape) != 1
        flat = tf.reshape(ids, [-1]) if reshaped else ids
        found = self._values(flat)
        if self.row_scales is not None:
            found = found * tf.gather(tf.convert_to_tensor(self.row_scales), flat)
        found = found[..., : self.columns] if found.shape[-1] > self.columns else found
        return tf.reshape(found, self._shape(ids)) if reshaped else found

    def _shape(self, ids):
        """Of the result; constants but for one size where that is possible, which spares the file SHAPE and others."""
        import tensorflow as tf

        sizes = [*ids.shape, self.columns]
        if sizes.count(None) <= 1:
            return [-1 if size is None else size for size in sizes]
        return tf.concat([tf.shape(ids), [self.columns]], 0)

    def compute_output_spec(self, ids, mask=None):
        return keras.KerasTensor((*ids.shape, self.columns), dtype="float32")

    def get_config(self):
        fields = ("rows", "columns", "step", "offset", "has_row_scales")
        return {"name": self.name, **{field: getattr(self, field) for field in fields}}


class IntegerTable(_Table):
    """Integers of 2 or 4 bits, in bytes that the file packs, or of 8 or 16.

    Args:
        bits: 2, 4, 8 or 16.
    """

    def __init__(self, rows, columns, step, offset, has_row_scales, bits, **kwargs):
        super().__init__(rows, columns, step, offset, has_row_scales, **kwargs)
        self.bits = bits
        self.flattens = bits < 8

    @property
    def _width(self):
        # LiteRT packs a table as one run of numbers, and finds a row only where it begins with a byte.
        return -(-self.columns * self.bits // 8) * 8 // self.bits if self.bits < 8 else self.columns

    def build(self, input_shape=None):
        self._stored = self._table("codes", self._width, "int8" if self.bits <= 8 else "int16")
        super().build(input_shape)

    def _packed(self, codes):
        return np.pad(codes, ((0, 0), (0, self._width - self.columns)))

    def _values(self, ids):
        import tensorflow as tf

        found = tf.cast(tf.gather(tf.convert_to_tensor(self._stored), ids), tf.float32)
        found = found * self.step if self.step != 1.0 else found
        return found + self.offset * self.step if self.offset else found

    def get_config(self):
        return {**super().get_config(), "bits": self.bits}


class SignTable(_Table):
    """Integers of one bit, which no number format has: codes -1 and 0 with the offset 0.5, which is a sign.

    A byte is looked up in a table of the eight signs that it stands for, which costs 512 bytes in the file.
    """

    def build(self, input_shape=None):
        self._stored = self._table("bytes", -(-self.columns // 8), "uint8")
        super().build(input_shape)

    def _packed(self, codes):
        return np.packbits(codes == 0, axis=1, bitorder="little")

    def _values(self, ids):
        import tensorflow as tf

        signs = (
            np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little").astype(np.int8) * 2 - 1
        )
        found = tf.cast(tf.gather(tf.convert_to_tensor(self._stored), ids), tf.int32)
        found = tf.cast(tf.gather(signs, tf.reshape(found, [-1])), tf.float32) * (self.step / 2)
        return tf.reshape(found, [-1, 8 * self._stored.shape[1]])
