"""What `export.save` found out about the file it wrote."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["Report"]


@dataclass(frozen=True)
class Report:
    """Measured facts about an exported file. What was not measured is `None`, and a note says why.

    Attributes:
        target: name of the target.
        precision: as asked for.
        bytes: size of the file.
        parameters: number of weights of the deployed model.
        macs: multiply-accumulates of one inference at the file's own (or the verified) input shape.
        bytes_read: bytes of weights that one inference reads: of tables the rows that it takes. `None`: not counted.
        ops: operators in the file: ``{"CONV_2D": {"int8": 7}}``, counted by the type of their main input.
        sqnr_db: signal over squared error of the file against the original Keras model, in dB; the worst output.
            `inf` where they are equal (`null` in JSON, with a note).
        max_error: largest absolute difference, in the output's units.
        latency_ms: median time of one inference on this machine; a note names threads and shape.
        lowerings: rewrites that were applied before the conversion.
        notes: everything else that a user should know.
        npu: figures of an NPU compiler, or `None`.
        kernels: figures of a GPU compiler for each kernel, or `None`: of a `.bolt` its number of layers, template and
            parameters, registers of a thread, bytes of shared memory of a block (`shared_bytes`), bytes of a thread
            for which there is no register (`spills`), and milliseconds, `measured_ms` or `estimated_ms`.
    """

    target: str
    precision: str
    bytes: int
    parameters: int
    macs: int | None = None
    bytes_read: int | None = None
    ops: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    sqnr_db: float | None = None
    max_error: float | None = None
    latency_ms: float | None = None
    lowerings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    npu: Mapping[str, Any] | None = None
    kernels: Sequence[Mapping[str, Any]] | None = None

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values that JSON can hold; an infinite SQNR becomes `None` and a note."""
        values = asdict(self)
        if self.sqnr_db == float("inf"):
            values["sqnr_db"] = None
            values["notes"] = (*self.notes, "sqnr_db is infinite: the file and the model agree to the last bit.")
        return values

    def to_json(self, *, indent: int | None = 2) -> str:
        """The report as one JSON object."""
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)
