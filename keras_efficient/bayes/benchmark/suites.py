"""A suite: data, a network, methods, seeds and tasks, as YAML says them."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import re
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import yaml

from keras_efficient import models
from keras_efficient.bayes import datasets
from keras_efficient.bayes.benchmark import scores
from keras_efficient.bayes.inference import METHODS
from keras_efficient.errors import FileProblem, UnknownName, WrongArgument

__all__ = ["Cell", "Suite", "bundled", "fingerprint", "load_suite", "method_of", "model_of"]

MOST_BYTES = 2**20  # of a YAML file


@dataclass(frozen=True)
class Cell:
    """One run: a method with a seed, and all that it hangs on.

    Attributes:
        suite: fingerprint of what all cells of a suite share.
        label: of the method, in the suite.
        spec: everything that `run_cell` needs, as JSON holds it.
    """

    suite: str
    label: str
    spec: dict[str, Any]

    @property
    def seed(self) -> int:
        return int(self.spec["seed"])

    @property
    def name(self) -> str:
        """Of its files: no label is in it, so that a method may be called otherwise."""
        return fingerprint(self.spec)


@dataclass(frozen=True)
class Suite:
    """What is compared.

    Attributes:
        name: of the suite.
        data: `{"name": …}` and arguments of `datasets`.
        model: `{"name": …}` and arguments of a function in `models`.
        methods: label to `{"name": …}` and fields of a method.
        seeds: each is a run of its own.
        tasks: name of a task to its options.

    Raises:
        WrongArgument: an unknown name or argument, the nearest known one is the hint; no method, no seed, or one twice.
    """

    name: str
    data: Mapping[str, Any]
    model: Mapping[str, Any]
    methods: Mapping[str, Mapping[str, Any]]
    seeds: tuple[int, ...] = (0, 1, 2)
    tasks: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {"prediction": {}})

    def __post_init__(self) -> None:
        object.__setattr__(self, "seeds", tuple(self.seeds))
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise WrongArgument(f"Suite {self.name!r} needs seeds, each once: {list(self.seeds)!r}.")
        if not self.methods:
            raise WrongArgument(f"Suite {self.name!r} has no methods.")
        for seed in self.seeds:
            if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
                raise WrongArgument(f"A seed is a whole number from 0 on, not {seed!r}.")
        _function(self.data, datasets.DATASETS, "data set")
        model_of(self.model)
        labels: dict[str, str] = {}
        for label, one in self.methods.items():
            method_of(one)
            same = labels.setdefault(fingerprint(one), label)
            if same != label:
                raise WrongArgument(f"Suite {self.name!r}: {same!r} and {label!r} are the same method.")
        scores.check(self.tasks)
        for one in _outside(self.tasks).values():
            _function(one, datasets.OUTSIDE, "data set")
        reference = scores.reference_of(self.tasks)
        if reference is not None and reference not in self.methods:
            raise UnknownName("reference among the methods", reference, self.methods)

    def with_path(self, path: str | Path) -> Suite:
        """The suite with all its data sets in a folder; results hang on what data sets hold, not on where they are."""

        def moved(spec: Mapping[str, Any]) -> dict[str, Any]:
            takes = "path" in inspect.signature(datasets.OUTSIDE[spec["name"]]).parameters
            return {**spec, "path": str(Path(path).absolute())} if takes else dict(spec)

        found = _plain(self.tasks)
        outside = {name: moved(spec) for name, spec in _outside(found).items()}
        if outside:
            found["out_of_distribution"] = {**found["out_of_distribution"], "outside": outside}
        return dataclasses.replace(self, data=moved(self.data), tasks=found)

    def check_data(self) -> None:
        """Reads the data sets, so that what is wrong with them is found before anything is trained.

        Raises:
            FileProblem, MissingDependency, WrongArgument: as `datasets.load`.
        """
        splits = datasets.load(self.data)
        for one in _outside(self.tasks).values():
            splits.outside(one)

    def cells(self) -> list[Cell]:
        """Every method with every seed; seeds outside, so that a suite cut short has a run of each method."""
        shared = {
            "data": dict(self.data),
            "model": dict(self.model),
            "tasks": {k: dict(v) for k, v in self.tasks.items()},
        }
        return [
            Cell(self.fingerprint, label, {**shared, "method": _plain(method), "seed": seed})
            for seed in self.seeds
            for label, method in self.methods.items()
        ]

    @property
    def fingerprint(self) -> str:
        """Of what all cells share: methods and seeds may be added to a folder of results, nothing else may change."""
        return fingerprint({"data": dict(self.data), "model": dict(self.model), "tasks": _plain(self.tasks)})


def bundled() -> dict[str, Suite]:
    """The suites that come with the package."""
    return {name: _parsed(file.read_text("utf-8"), name) for name, file in _files().items()}


def _files() -> dict[str, Traversable]:
    folder = resources.files(__package__) / "bundled"
    files = sorted(folder.iterdir(), key=lambda one: one.name)
    return {one.name.removesuffix(".yaml"): one for one in files if one.name.endswith(".yaml")}


def load_suite(name: str | Path) -> Suite:
    """A bundled suite by its name, or one from a YAML file.

    Raises:
        UnknownName: neither.
        FileProblem: no such file, or no YAML.
        WrongArgument: what `Suite` refuses.
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        files = _files()
        if str(name) not in files:
            raise UnknownName("suite", str(name), files, see="`keras-efficient ursabench list`")
        return _parsed(files[str(name)].read_text("utf-8"), str(name))
    try:
        if path.stat().st_size > MOST_BYTES:
            raise FileProblem(path, f"holds over {MOST_BYTES} bytes.")
        text = path.read_text("utf-8")
    except FileProblem:
        raise
    except (OSError, UnicodeDecodeError) as err:
        raise FileProblem(path, f"cannot be read: {getattr(err, 'strerror', None) or err}.") from err
    return _parsed(text, str(path))


def method_of(spec: Mapping[str, Any]) -> Any:
    """The method that `{"name": …, field: value, …}` says; a field that is a method itself is said the same way.

    Raises:
        WrongArgument: an unknown method or field, or a value that is none of the field's.
    """
    made = _function(spec, METHODS, "method")
    wanted = {one.name: one for one in dataclasses.fields(made)}
    hints = typing.get_type_hints(made)
    values = {}
    for name, value in spec.items():
        if name == "name":
            continue
        if isinstance(value, Mapping):
            value = method_of(value)
        elif not _fits(value, hints[name]):
            raise WrongArgument(f"Method {spec['name']!r}: {name!r} is {wanted[name].type}, not {value!r}.")
        values[name] = value
    return made(**values)


def model_of(spec: Mapping[str, Any]) -> Callable[[], Any]:
    """A function that makes the network that `{"name": …, argument: value, …}` says."""
    made = _function(spec, models.CLASSIFIERS, "network")
    values = {name: value for name, value in spec.items() if name != "name"}
    return lambda: made(**values)


def fingerprint(value: Any) -> str:
    """SHA-256 of what JSON holds, in 64 digits; where files lie (`path`) does not count."""
    plain = json.dumps(_without_paths(value), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(plain.encode()).hexdigest()


def _without_paths(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_paths(one) for name, one in value.items() if name != "path"}
    return value


class _Loader(yaml.SafeLoader):
    """Without aliases, of which a few lines can be gigabytes, and without keys that come twice."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(problem="aliases are not taken", problem_mark=self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        names = [key.value for key, _ in node.value]
        for number, name in enumerate(names):
            if name in names[:number]:
                mark = node.value[number][0].start_mark
                raise yaml.MarkedYAMLError(problem=f"{name!r} is there twice", problem_mark=mark)
        return super().construct_mapping(node, deep=deep)


# YAML 1.1 takes 1e-3 for a word.
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+[eE][-+]?\d+$"), list("-+0123456789"))


def _parsed(text: str, source: str) -> Suite:
    try:
        found = yaml.load(text, _Loader)  # a safe loader
    except yaml.YAMLError as err:
        mark = getattr(err, "problem_mark", None)
        where = f"{source}, line {mark.line + 1}" if mark else source
        raise FileProblem(where, f"is no YAML: {getattr(err, 'problem', err)}.") from err
    if not isinstance(found, dict):
        raise FileProblem(source, "should be a list of `key: value`.")
    names = [one.name for one in dataclasses.fields(Suite)]
    _check_names(found, names, f"key in {source}")
    needed = [one.name for one in dataclasses.fields(Suite) if one.default is one.default_factory]
    for name in needed:
        if name not in found:
            raise WrongArgument(f"{source} lacks `{name}` at its top level.")
    for name in ("data", "model", "methods", "tasks"):
        if name in found and not isinstance(found[name], dict):
            raise WrongArgument(f"{source}: `{name}` should be `key: value`, not {found[name]!r}.")
    for label, method in found["methods"].items():
        if not isinstance(method, dict):
            raise WrongArgument(f"{source}: method {label!r} should be `name: …` and its fields, not {method!r}.")
    if "tasks" in found:
        found["tasks"] = {name: {} if options is None else options for name, options in found["tasks"].items()}
        for name, options in found["tasks"].items():
            if not isinstance(options, dict):
                raise WrongArgument(f"{source}: the options of task {name!r} should be `key: value`, not {options!r}.")
    if not isinstance(found.get("seeds", []), list):
        raise WrongArgument(f"{source}: `seeds` should be a list, not {found['seeds']!r}.")
    try:
        return Suite(**found)
    except WrongArgument as err:
        raise WrongArgument(f"{source}: {err.message}", hint=err.hint) from err


def _function(spec: Mapping[str, Any], known: Mapping[str, Any], kind: str) -> Any:
    """The one that is named, after its arguments were looked at."""
    name = spec.get("name")
    if name is None:
        raise WrongArgument(f"A {kind} needs a `name`: one of {', '.join(known)}.")
    if name not in known:
        raise UnknownName(kind, str(name), known)
    parameters = inspect.signature(known[name]).parameters
    given = [one for one in spec if one != "name"]
    _check_names(given, parameters, f"argument of {kind} {name!r}")
    missing = [one for one, is_ in parameters.items() if is_.default is inspect.Parameter.empty and one not in given]
    if missing:
        raise WrongArgument(f"The {kind} {name!r} needs `{missing[0]}`.")
    return known[name]


def _check_names(given: Iterable[str], known: Iterable[str], kind: str) -> None:
    known = list(known)
    for name in given:
        if name not in known:
            raise UnknownName(kind, str(name), known)


def _fits(value: Any, hint: Any) -> bool:
    """Whether YAML's value is of a field's type; whole numbers serve as others."""
    options = (
        typing.get_args(hint)
        if typing.get_origin(hint) is not None and typing.get_origin(hint) is not tuple
        else (hint,)
    )
    plain = {float: (int, float), int: (int,), str: (str,), bool: (bool,), type(None): (type(None),)}
    for one in options:
        if one not in plain:
            return True  # of what is more than a number or a word, the method itself says what is wrong
        if isinstance(value, plain[one]) and (one is bool or not isinstance(value, bool)):
            return True
    return False


def _plain(value: Any) -> Any:
    return {name: _plain(one) for name, one in value.items()} if isinstance(value, Mapping) else value


def _outside(wanted: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Mapping[str, Any]]:
    """Data sets of the task `out_of_distribution`, by the names that a suite has for them."""
    found = wanted.get("out_of_distribution", {}).get("outside", {})
    if not isinstance(found, Mapping) or not all(isinstance(one, Mapping) for one in found.values()):
        raise WrongArgument(f"`outside` is `label: {{name: …}}` for each data set, not {found!r}.")
    return found
