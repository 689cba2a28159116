"""Embedding tables and output layers spread over devices by rows, with `keras.distribution` on JAX."""

from __future__ import annotations

import re
import warnings

import keras

from keras_efficient.errors import WrongArgument

__all__ = ["TableParallel", "local_rows"]

TABLES = r"(^|/)([^/]*embedding[^/]*/[^/]+$|(logits|halos_output(_\d+)?)/)"
MANY = 256  # rows a device, of what is worth a warning


class TableParallel(keras.distribution.ModelParallel):
    """Shards embedding tables by rows over some devices, and batches over the others.

    ```python
    keras.distribution.set_distribution(recsys.TableParallel(table_devices=4))
    model = models.SequenceClassifier(…)          # built, compiled and fitted as ever
    ```

    A variable is sharded where it belongs to a layer that `tables` matches, and its rows can be divided by the number
    of devices; where they cannot, its columns are; where neither can, every device has it whole. Its moments in the
    optimizer follow it. All else is on every device, and gradients are summed over the batch's shards: the result is
    that of one device but for the order of sums.

    On several hosts, call `keras.distribution.initialize(…)` first and run the same program on each; `devices` are then
    those of all hosts. `recsys.train` gives each host its part of every batch; what else is fitted must be such parts
    (`local_rows`). Tables that span hosts cannot be read by one of them, to save or to evaluate: let `table_devices` be
    at most a host's devices, or gather them (`jax.experimental.multihost_utils.process_allgather`).

    Args:
        table_devices: over how many devices a table is spread; it must divide the number of devices.
        devices: names of devices; by default all, `keras.distribution.list_devices()`.
        tables: a regular expression for variables' paths; by default the variables of layers whose name has `embedding`
            in it, or which are named `logits` or, as Keras names a `HALOSOutput`, `halos_output`.

    Raises:
        WrongArgument: `table_devices` does not divide the number of devices.
    """

    def __init__(self, table_devices, *, devices=None, tables=TABLES):
        devices = list(devices or keras.distribution.list_devices())
        if table_devices < 1 or len(devices) % table_devices:
            hint = None if keras.backend.backend() == "jax" else "Keras spreads tables over devices on JAX only."
            raise WrongArgument(f"{len(devices)} devices cannot be divided into groups of {table_devices}.", hint=hint)
        shape = (len(devices) // table_devices, table_devices)
        mesh = keras.distribution.DeviceMesh(shape, ["batch", "tables"], devices)
        layouts = keras.distribution.LayoutMap(mesh)
        super().__init__(layout_map=layouts, batch_dim_name="batch", auto_shard_dataset=False)
        self._tables = re.compile(tables)
        self._spread = table_devices
        self._warned: set[str] = set()

    def get_variable_layout(self, variable):
        """Rows, else columns, else a copy on every device."""
        axes = [None] * len(variable.shape)
        if self._tables.search(variable.path):
            axis = next((i for i, size in enumerate(variable.shape) if size and size % self._spread == 0), None)
            if axis != 0 and variable.shape[0] >= self._spread * MANY:
                self._warn(variable, "every device has them whole" if axis is None else "their columns are")
            if axis is not None:
                axes[axis] = "tables"
        return keras.distribution.TensorLayout(axes, self.device_mesh)

    def _warn(self, variable, instead):
        if variable.path not in self._warned:
            self._warned.add(variable.path)
            warnings.warn(
                f"The {variable.shape[0]} rows of {variable.path} cannot be divided among {self._spread} devices: "
                f"{instead}. Choose a number of entities that can be.",
                stacklevel=3,
            )


def local_rows(size: int) -> slice:
    """The rows of a batch of this size that this host's devices hold under the distribution that is set; else all.

    Raises:
        WrongArgument: the rows cannot be divided among the devices.
    """
    distribution = keras.distribution.distribution()
    if keras.backend.backend() != "jax" or distribution is None:
        return slice(0, size)
    sharding = distribution.get_data_layout((size,)).backend_layout
    try:
        parts = [index[0].indices(size) for index in sharding.addressable_devices_indices_map((size,)).values()]
    except ValueError as error:
        hint = f"Give batches of a multiple of {distribution.device_mesh.shape[0]}, of users as of negatives."
        raise WrongArgument(f"{size} rows cannot be divided among the devices.", hint=hint) from error
    return slice(min(part[0] for part in parts), max(part[1] for part in parts))
