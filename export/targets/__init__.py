"""What a model can be exported to: the values that describe a target, and the registry of all targets.

A target is one `Target` object in one file of this folder. A third party adds one through the entry-point group
``keras_efficient.targets``: the entry point names a `Target`, a list of them, or a function that returns either.
"""

from __future__ import annotations

import importlib
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keras_efficient.errors import UnknownName, WrongArgument

if TYPE_CHECKING:
    import keras

    from keras_efficient.export.calibration import Calibration
    from keras_efficient.export.runtime import ExportedModel
    from keras_efficient.export.signature import InputSpec

__all__ = ["Built", "Lowered", "Option", "Request", "Target", "Targets", "registry"]

ENTRY_POINT_GROUP = "keras_efficient.targets"
_OWN_MODULES = ("tflite", "onnx", "ethos_u", "cuda", "tensorrt")

_LISTS = "keras_efficient.export.targets (keras-efficient export --list-targets)"

_log = logging.getLogger("keras_efficient")


@dataclass(frozen=True)
class Option:
    """An argument of `export.save` that only some targets take.

    Args:
        default: the value when the caller gives none.
        help: one line for the documentation and the command line.
        choices: the allowed values, or empty where any value of the default's kind is allowed.
    """

    default: Any
    help: str
    choices: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Request:
    """What the caller of `export.save` asked for, checked and complete; every stage reads it, none changes it.

    Args:
        target: where the file will run.
        precision: one of ``target.precisions``.
        inputs: name, full shape (batch axis first, `None` a free axis) and dtype of each input, in the model's order.
        calibration: real inputs for static quantisation, or `None` where the precision needs none.
        options: the target's own options, defaults filled in.
        metadata: what is written into the file under the key ``keras_efficient``.
        on_progress: called with one line whenever a stage starts.
    """

    target: Target
    precision: str
    inputs: tuple[InputSpec, ...]
    calibration: Calibration | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    on_progress: Callable[[str], None] = _log.info

    @property
    def is_calibrated(self) -> bool:
        """Whether the precision needs calibration data."""
        return self.precision in self.target.calibrated


@dataclass(frozen=True)
class Lowered:
    """One candidate to convert: a model, and the names of the lowerings that made it.

    Args:
        model: computes what the deployed model computes.
        lowerings: names in the order in which they were applied.
        notes: what the caller should know about this candidate.
    """

    model: keras.Model
    lowerings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Built:
    """A converted and, where the target has a compiler, compiled file that waits for its verification.

    Args:
        path: the file to deliver.
        runnable: the file that `Target.open` can run here: `path` itself, or what the compiler was given.
        lowerings: names of the lowerings in the file.
        notes: what the caller should know.
        npu: figures of an NPU compiler, or `None`.
        kernels: figures of a GPU compiler for each kernel, or `None`.
        cost: the target's estimate, in its own unit; of several candidates the lowest is taken. `None` sorts last.
    """

    path: Path
    runnable: Path
    lowerings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    npu: Mapping[str, Any] | None = None
    kernels: Sequence[Mapping[str, Any]] | None = None
    cost: float | None = None


def _one_candidate(model: keras.Model, request: Request) -> Iterator[Lowered]:
    yield Lowered(model)


@dataclass(frozen=True)
class Target:
    """A place where models run, and how a file for it is made and opened.

    Args:
        name: what the user writes, such as ``ethos-u55-128``.
        suffix: of its files, with the dot.
        precisions: what `convert` can make, the default of the command line first.
        convert: ``(model, request, path) -> notes`` writes the file; raises `ConversionError`.
        open: ``(path, threads) -> ExportedModel``: the file as a callable, float arrays in and out.
        inspect: ``(path, shapes) -> {"ops": {operator: {dtype: count}}, "macs": int | None}``, with the multiply-
            accumulates counted at the input shapes by name; it may have other fields of a `Report`.
        write_metadata: ``(path, mapping)`` puts the mapping into the file.
        lower: ``(model, request) -> candidates``; every candidate is built, the cheapest is kept.
        compile: ``(built, request, folder) -> built``, or `None` where nothing is compiled.
        check: ``(path, model, request) -> notes`` refuses a converted file that is not what was asked for.
        validate: ``(request)`` refuses options that do not go together, before any work.
        ready: ``(options)`` refuses options by themselves, and a machine that lacks what they take, before Keras is
            imported.
        options: the extra arguments of `export.save` that this target takes; values that JSON can hold.
        calibrated: those precisions that need calibration data.
        text: those precisions whose files can look up text.
        static: whether every axis must be fixed before conversion.
        default: whether its suffix alone picks this target.
        summary: one line for lists of targets.
    """

    name: str
    suffix: str
    precisions: tuple[str, ...]
    convert: Callable[[keras.Model, Request, Path], tuple[str, ...]]
    open: Callable[[Path, int | None], ExportedModel]
    inspect: Callable[[Path, Mapping[str, tuple[int, ...]]], Mapping[str, Any]]
    write_metadata: Callable[[Path, Mapping[str, Any]], None]
    lower: Callable[[keras.Model, Request], Iterator[Lowered]] = _one_candidate
    compile: Callable[[Built, Request, Path], Built] | None = None
    check: Callable[[Path, keras.Model, Request], tuple[str, ...]] | None = None
    validate: Callable[[Request], None] | None = None
    ready: Callable[[Mapping[str, Any]], None] | None = None
    options: Mapping[str, Option] = field(default_factory=dict)
    calibrated: tuple[str, ...] = ()
    text: tuple[str, ...] = ()
    static: bool = False
    default: bool = False
    summary: str = ""


class Targets(Mapping[str, Target]):
    """Read-only mapping from a target's name to the `Target`; iterating gives the names in natural order.

    The targets' modules are imported when the mapping is first looked into. A plug-in that cannot be loaded is
    reported by a warning and listed in `broken`; the others stay usable.
    """

    def __init__(self) -> None:
        self._targets: dict[str, Target] | None = None
        self.broken: dict[str, str] = {}

    def _loaded(self) -> dict[str, Target]:
        if self._targets is None:
            found: dict[str, Target] = {}
            for module in _OWN_MODULES:
                for target in _targets_of(importlib.import_module(f"{__name__}.{module}").TARGETS):
                    found[target.name] = target
            self._add_plugins(found)
            self._targets = found
        return self._targets

    def _add_plugins(self, found: dict[str, Target]) -> None:
        from importlib.metadata import entry_points

        for entry in entry_points(group=ENTRY_POINT_GROUP):
            try:
                for target in _targets_of(entry.load()):
                    if target.name in found:
                        raise WrongArgument(f"the name {target.name!r} is taken.")
                    found[target.name] = target
            except Exception as err:  # a plug-in may fail in any way; ours must not fail with it
                self.broken[entry.name] = f"{type(err).__name__}: {err}"
                warnings.warn(f"Export target plug-in {entry.name!r} ({entry.value}) is broken: {err}", stacklevel=4)

    def __getattr__(self, name: str) -> Any:
        # The registry stands in the place of this folder's module in `keras_efficient.export`, so that
        # `import keras_efficient.export.targets.tflite as x` looks for `tflite` here.
        try:
            return getattr(sys.modules[__name__], name)
        except AttributeError:
            raise AttributeError(f"Targets has no attribute {name!r}") from None

    def __getitem__(self, name: str) -> Target:
        return self._loaded()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._loaded())

    def __len__(self) -> int:
        return len(self._loaded())

    def __repr__(self) -> str:
        return f"Targets({', '.join(self)})"

    def find(self, name: str | None, path: Path) -> Target:
        """The target called `name`, or, without a name, the default one for the suffix of `path`.

        Raises:
            UnknownName: no target has this name.
            WrongArgument: the suffix belongs to no target, or not to the target that was named.
        """
        if name is not None:
            if name not in self:
                raise UnknownName("target", name, self, see=_LISTS)
            target = self[name]
            if path.suffix.lower() != target.suffix:
                raise WrongArgument(
                    f"{path.name}: target {name!r} writes {target.suffix} files.",
                    hint=f"Name it {path.with_suffix(target.suffix).name!r}.",
                )
            return target
        for target in self.values():
            if target.default and target.suffix == path.suffix.lower():
                return target
        ending = repr(path.suffix) if path.suffix else "files without a suffix"
        suffixes = sorted({target.suffix for target in self.values()})
        raise WrongArgument(
            f"{path.name}: no target writes {ending}.",
            hint=f"Known suffixes: {', '.join(suffixes)}; or name a target.",
        )


def _targets_of(value: Any) -> list[Target]:
    """The targets in what a module or a plug-in offers: a `Target`, an iterable of them, or a function for either."""
    if isinstance(value, Target):
        return [value]
    if callable(value):
        return _targets_of(value())
    targets = list(value)
    wrong = [item for item in targets if not isinstance(item, Target)]
    if wrong:
        raise WrongArgument(f"expected Target objects, received {type(wrong[0]).__name__}.")
    return targets


registry = Targets()
