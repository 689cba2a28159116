"""Runs exported files on this machine: float arrays in, float arrays out, whatever number format the file has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keras_efficient.errors import ConversionError, FileProblem, WrongArgument
from keras_efficient.export import flatbuffer, signature

if TYPE_CHECKING:
    import numpy as np

__all__ = ["ExportedModel", "LiteRTModel"]


class ExportedModel:
    """A file that can be called like the model it was made from.

    Attributes:
        path: the file.
        metadata: what `export.save` wrote into the file, an empty dict for files of others.
        input_names, output_names: in the order in which inputs are taken and outputs given.
        input_shapes: full shapes by input name; `None` is an axis whose size is free.
        input_dtypes: NumPy dtypes that a call takes, by input name; ``object`` for text.
        threads: that the runtime may use.
    """

    path: Path
    metadata: Mapping[str, Any]
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    input_shapes: Mapping[str, tuple[int | None, ...]]
    input_dtypes: Mapping[str, str]
    threads: int

    @property
    def scale(self) -> int | None:
        """Enlargement of a super-resolution model as its metadata has it, else `None`."""
        return self.metadata.get("scale")

    def __call__(self, inputs: Any) -> Any:
        """Runs the file.

        Args:
            inputs: one array, or for several inputs a list in order or a dict by name.

        Returns:
            What the model returned: one array, a list, or a dict of arrays.

        Raises:
            WrongArgument: the inputs are not those of the model.
        """
        flat = self.run(self._named(inputs))
        return signature.pack([flat[name] for name in self.output_names], self.metadata.get("outputs"))

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Runs the file on named inputs and returns named outputs."""
        raise NotImplementedError("Each runtime has its own way: see LiteRTModel and those of other targets.")

    def invoke(self) -> None:
        """Runs the inputs of the last `run` again, without any copying: for measuring time."""
        raise NotImplementedError("Each runtime has its own way: see LiteRTModel and those of other targets.")

    def output_step(self, name: str) -> float | None:
        """Size of one quantisation step of an output, or `None` where it is not quantised."""
        return None

    def overflow(self, inputs: Mapping[str, np.ndarray]) -> str | None:
        """Where numbers inside of the file leave its precision, which its outputs here do not show; `None`: nowhere."""
        return None

    def _ordered(self, kind: str, names: Sequence[str]) -> tuple[str, ...]:
        """The names in the order that `export.save` recorded, else as the file has them."""
        record = self.metadata.get(kind)
        if not record:
            return tuple(names)
        recorded = record["names"] if kind == "outputs" else record
        return tuple(recorded) if set(recorded) == set(names) else tuple(names)

    def _named(self, inputs: Any) -> dict[str, np.ndarray]:
        import numpy as np

        if isinstance(inputs, Mapping):
            values = dict(inputs)
        elif isinstance(inputs, (list, tuple)) and (len(self.input_names) > 1 or len(inputs) == 1):
            values = dict(zip(self.input_names, inputs, strict=False))
            if len(inputs) != len(self.input_names):
                raise WrongArgument(f"{self.path.name} takes {len(self.input_names)} inputs, received {len(inputs)}.")
        else:
            values = {self.input_names[0]: inputs}
        if set(values) != set(self.input_names):
            raise WrongArgument(f"{self.path.name} takes the inputs {list(self.input_names)}, received {list(values)}.")
        return {name: self._checked(name, np.asarray(values[name])) for name in self.input_names}

    def _checked(self, name: str, array: np.ndarray) -> np.ndarray:
        shape = self.input_shapes[name]
        fits = len(array.shape) == len(shape) and all(
            want is None or want == have for want, have in zip(shape, array.shape, strict=True)
        )
        if not fits:
            raise WrongArgument(f"{self.path.name}: input {name!r} takes shape {shape}, received {array.shape}.")
        if self.input_dtypes[name] in ("int32", "int64") and array.dtype.kind == "f":
            fractions = array[array % 1 != 0]
            if fractions.size:
                raise WrongArgument(f"{self.path.name}: input {name!r} takes integers, received {fractions.flat[0]}.")
        return array.astype(self.input_dtypes[name], copy=False)


class LiteRTModel(ExportedModel):
    """A `.tflite` in LiteRT. Quantised inputs and outputs are converted from and to float32 by the file's own scales.

    Args:
        path: the file.
        threads: for the interpreter; by default 1.
        delegate: whether XNNPACK runs what it can, which is faster by far; the built-in kernels differ from it by one
            quantisation step in some outputs.

    Raises:
        FileProblem: no such file, damaged, or compiled for an NPU.
    """

    def __init__(self, path: str | Path, threads: int | None = None, *, delegate: bool = True):
        from ai_edge_litert.interpreter import Interpreter, OpResolverType

        self.path = Path(path)
        self.threads = threads or 1
        model = flatbuffer.unpack(flatbuffer.read_bytes(self.path), self.path)
        resolver = OpResolverType.AUTO if delegate else OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
        # Nothing yet: a free axis is 1 in the file, too small for some.
        self._allocated: dict[str, tuple[int, ...]] = {}
        try:
            self._refuse_npu_files(model)
            self.metadata = flatbuffer.read_metadata(model)
            # By its path it is mapped into memory: of a large table only rows that are used are read.
            self._interpreter = Interpreter(
                model_path=str(self.path), num_threads=self.threads, experimental_op_resolver_type=resolver
            )
            self._inputs, self._outputs = self._details()
        except FileProblem:
            raise
        except Exception as err:  # an index out of range, text that is none, …: whatever damaged bytes lead to
            reason = (str(err).splitlines() or [type(err).__name__])[0]
            raise FileProblem(self.path, f"LiteRT cannot open it: {reason}", hint="Export the model again.") from err
        self.input_names, self.output_names = tuple(self._inputs), tuple(self._outputs)
        self.input_shapes = {
            name: tuple(None if size < 0 else int(size) for size in detail["shape_signature"])
            for name, detail in self._inputs.items()
        }
        self.input_dtypes = {
            name: "float32" if _is_quantized(detail) else _dtype_name(detail) for name, detail in self._inputs.items()
        }

    def _refuse_npu_files(self, model: Any) -> None:
        if any(operator.custom and operator.name == "ethos-u" for operator in flatbuffer.operators(model)):
            raise FileProblem(
                self.path,
                "compiled for an Arm Ethos-U NPU, so it cannot run on this machine.",
                hint="Export with target='tflite' and the same precision to run the model here.",
            )

    def _details(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Tensor details by the signature's names, in the order of the model; without a signature by tensor name."""
        inputs = {detail["index"]: detail for detail in self._interpreter.get_input_details()}
        outputs = {detail["index"]: detail for detail in self._interpreter.get_output_details()}
        signatures = self._interpreter.get_signature_list()
        if not signatures:
            return {d["name"]: d for d in inputs.values()}, {d["name"]: d for d in outputs.values()}
        runner = self._interpreter.get_signature_runner(next(iter(signatures)))
        named_inputs, named_outputs = runner.get_input_details(), runner.get_output_details()
        return (
            {n: inputs[named_inputs[n]["index"]] for n in self._ordered("inputs", list(named_inputs))},
            {n: outputs[named_outputs[n]["index"]] for n in self._ordered("outputs", list(named_outputs))},
        )

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self._resize({name: array.shape for name, array in inputs.items()})
        for name, array in inputs.items():
            detail = self._inputs[name]
            self._interpreter.set_tensor(detail["index"], _quantize(array, detail))
        self._interpreter.invoke()
        return {
            name: _dequantize(self._interpreter.get_tensor(detail["index"]), detail)
            for name, detail in self._outputs.items()
        }

    def tensor_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> list[tuple[int, ...]]:
        """Shapes of the main subgraph's tensors, by index, when the inputs have `shapes`.

        A shape that only a run can tell (of an operator with a computed shape) is as the file has it.
        """
        self._resize(dict(shapes))
        details = self._interpreter.get_tensor_details()
        found: list[tuple[int, ...]] = [()] * (1 + max(detail["index"] for detail in details))
        for detail in details:
            found[detail["index"]] = tuple(int(size) for size in detail["shape"])
        return found

    def _resize(self, shapes: dict[str, tuple[int, ...]]) -> None:
        if shapes == self._allocated:
            return
        for name, shape in shapes.items():
            if tuple(self._inputs[name]["shape"]) != shape or self._allocated:
                self._interpreter.resize_tensor_input(self._inputs[name]["index"], shape)
        try:
            self._interpreter.allocate_tensors()
        except RuntimeError as err:
            self._allocated = {}
            raise ConversionError(f"{self.path.name} cannot run at {shapes}: {str(err).splitlines()[0]}") from err
        self._allocated = shapes

    def invoke(self) -> None:
        self._interpreter.invoke()

    def output_step(self, name: str) -> float | None:
        detail = self._outputs[name]
        return float(detail["quantization"][0]) if _is_quantized(detail) else None


def _is_quantized(detail: Mapping[str, Any]) -> bool:
    return detail["quantization"][0] != 0.0


def _dtype_name(detail: Mapping[str, Any]) -> str:
    import numpy as np

    return "object" if detail["dtype"] is np.bytes_ else np.dtype(detail["dtype"]).name


def _quantize(array: np.ndarray, detail: Mapping[str, Any]) -> np.ndarray:
    """``q = round(x / scale) + zero_point``, saturated to the format's range."""
    import numpy as np

    if not _is_quantized(detail):
        return array.astype(_dtype_name(detail), copy=False)
    scale, zero = detail["quantization"]
    limits = np.iinfo(detail["dtype"])
    return np.clip(np.round(array / scale) + zero, limits.min, limits.max).astype(detail["dtype"])


def _dequantize(array: np.ndarray, detail: Mapping[str, Any]) -> np.ndarray:
    """``x = (q - zero_point) * scale``"""
    import numpy as np

    if not _is_quantized(detail):
        return array
    scale, zero = detail["quantization"]
    return (array.astype(np.float32) - np.float32(zero)) * np.float32(scale)
