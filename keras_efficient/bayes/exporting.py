"""A posterior in a file for a device: its mean, its members, or a network that draws."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
from keras import ops

from keras_efficient.bayes.noise import Chance, Noise, OneMember, name_of, noisy, spreads
from keras_efficient.bayes.posterior import Posterior, StackedPosterior, StochasticPosterior, draws
from keras_efficient.deploy import deploy, rebuild
from keras_efficient.errors import ConversionError, UnknownName, UnsupportedLayer, WrongArgument

if TYPE_CHECKING:
    from keras_efficient.export import Report

__all__ = ["MODES", "draw_noise", "ensemble_network", "export_posterior", "mean_network", "noise_network"]

MODES = ("mean", "ensemble", "sample", "noise_input", "distilled")
LEAST_LIKENESS = 0.5  # of members' weights, as a cosine: below it they are networks of their own
DRAWS = 64  # of a network that draws, from which standard deviations of its weights are known to 9 %
INVOKES = 32  # of a file that draws, in which two answers at least are not the same


def export_posterior(
    posterior: Posterior,
    path: str | Path,
    *,
    mode: str = "ensemble",
    members: int | None = None,
    target: str | None = None,
    precision: str = "float32",
    overwrite: bool = False,
    **options: Any,
) -> Report:
    """Writes a file that gives probabilities of classes, (n, classes), and checks it as `export.save` does.

    Args:
        posterior: of a model that gives logits.
        path: its suffix picks the target when none is named.
        mode: what is in the file.
            `mean`: one network, at the mean of the weights. Members must be draws around one maximum, as of SWA, SWAG
            and Laplace: the mean of several maxima is no network that was ever good.
            `ensemble`: all members, one after the other, and the mean of their probabilities, as `predict` gives it
            with `reduce="mean"`.
            `sample`: a network that draws at every run, on processors, in floats: one of the members for all rows, or,
            of a network that draws itself, other weights for each row. Means over runs come near to `predict`.
            `noise_input`: a network with independent Gaussian weights, whose chance is a second input, `noise`;
            `draw_noise` gives it. The members' means and standard deviations are kept, not what they have in common.
            `distilled`: the student that `inference.Distillation` makes of a posterior, with the expected entropy,
            (n, 1), as a second output.
        members: of `ensemble` and `sample`, the first so many; `None`: all.
        target, precision: as of `export.save`. With int8, probabilities are in 16 bits: of 1/256, the step of an int8
            softmax, nothing is left that members could differ by.
        overwrite: whether an existing file may be replaced.
        **options: others of `export.save`, such as `calibration`, which is of the model's input alone.

    Returns:
        The report of `export.save`.

    Raises:
        UnknownName: no such mode.
        WrongArgument: a posterior of which there is no such file.
        ConversionError: a file that should draw and does not.
        KerasEfficientError: as `export.save`.
    """
    from keras_efficient import export
    from keras_efficient.atomic import check_target, replacing

    path = Path(path)
    if mode not in MODES:
        raise UnknownName("mode", mode, MODES)
    if members is not None and mode not in ("ensemble", "sample"):
        raise WrongArgument(f"`members` is of an ensemble and of a sample; mode {mode!r} has no such thing.")
    about: dict[str, Any] = {"mode": mode, "kind": posterior.kind, "members": members or posterior.count}
    if mode == "sample":
        _check_sample(target, precision)
    check_target(path, overwrite=overwrite)
    if (len(posterior.model.outputs) == 2) != (mode == "distilled"):
        raise WrongArgument(
            f"Mode {mode!r} is not of this posterior, whose model has {len(posterior.model.outputs)} output(s).",
            hint="A student of `Distillation` has two and takes mode 'distilled', all others have one and do not.",
        )
    if mode == "distilled":
        network = _student(posterior)
    elif mode == "mean":
        network = mean_network(posterior)
    elif mode == "ensemble":
        network = ensemble_network(posterior, members)
    elif mode == "sample" and isinstance(posterior, StackedPosterior):
        network = _one_of(posterior, members)
        about["drawn"] = "one member for all rows of a run"
    else:
        network, chance = noise_network(posterior)
        about |= {"drawn": "other weights for each row", "noise": chance.described()}
        if mode == "sample":
            network = _drawing(network, chance)
        else:
            options = _with_noise(options, network, chance)
    options["metadata"] = {**(options.get("metadata") or {}), "posterior": about}
    options |= {"target": target, "precision": precision}
    if precision == "int8":
        options.setdefault("wide_probabilities", True)
    if mode != "sample":
        return export.save(network, path, overwrite=overwrite, **options)
    with tempfile.TemporaryDirectory(prefix="keras_efficient-") as folder:
        scratch = Path(folder) / path.name
        report = export.save(network, scratch, **{**options, "verify": False})
        _check_chance(scratch, report, network)
        with replacing(path, overwrite=overwrite) as temporary:
            shutil.copyfile(scratch, temporary)
    kept = [note for note in report.notes if not note.startswith(("MISSES", "Verified"))]
    notes = (*kept, f"Two of {INVOKES} runs at least differ; probabilities were not compared one by one.")
    return replace(report, sqnr_db=None, max_error=None, notes=notes)


def mean_network(posterior: Posterior) -> keras.Model:
    """One deployed network with the mean of all weights; gives probabilities.

    A stochastic posterior gives that of its layers' own means.

    Raises:
        WrongArgument: draws that are not around one maximum.
    """
    return _with_probabilities(posterior.model, [_middle(posterior)])


def ensemble_network(posterior: Posterior, members: int | None = None) -> keras.Model:
    """Deployed members side by side in one model, which gives the mean of their probabilities.

    Of a network that draws weights for all rows, these are the draws that `predict` takes. What draws for each row
    draws once for all of them here.

    Raises:
        WrongArgument: more members than there are, or layers that have no `drawn(seed)`.
    """
    return _with_probabilities(posterior.model, list(_networks(posterior, _count(posterior, members))))


def noise_network(posterior: Posterior, *, seed: int = 0) -> tuple[keras.Model, Chance]:
    """A model of [inputs, noise] that gives probabilities, and what noise is drawn from.

    Raises:
        WrongArgument: draws that are not around one maximum.
        UnsupportedLayer: layers other than Dense and convolutions whose weights differ.
    """
    middle = _middle(posterior)
    stochastic = isinstance(posterior, StochasticPosterior)
    drawing = [layer.name for layer in posterior.model._flatten_layers() if stochastic and draws(layer)]
    inner = [name for name in drawing if name not in {layer.name for layer in middle.layers}]
    if inner:
        raise UnsupportedLayer(inner[0], "it draws inside another layer, where noise cannot follow.")
    dropped = [name for name in drawing if isinstance(middle.get_layer(name), keras.layers.Dropout)]
    networks = _networks(posterior, DRAWS, without=dropped) if stochastic else _networks(posterior, posterior.count)
    network, chance = noisy(middle, spreads(networks), dropped, seed)
    outputs = keras.layers.Softmax(name="probabilities")(network.output)
    return keras.Model(network.inputs, outputs, name=posterior.model.name), chance


def draw_noise(metadata: Mapping[str, Any], rows: int, random: np.random.Generator) -> np.ndarray:
    """The second input of a file of mode `noise_input`, (rows, size), by the metadata that `export.load` shows.

    Raises:
        WrongArgument: a file of another mode.
    """
    about = metadata.get("posterior", {})
    if about.get("mode") != "noise_input":
        raise WrongArgument("This file takes no noise.")
    parts = []
    for one in about["noise"]:
        ones = np.ones(one["to"] - one["from"], np.float32)
        parts.append(Chance(*(value * ones for value in (*one["values"], one["rate"]))))
    return Chance.joined(parts).draw(rows, random)


def _check_sample(target: str | None, precision: str) -> None:
    if keras.backend.backend() != "tensorflow":
        raise WrongArgument(
            "Mode 'sample' draws by TensorFlow's operators.", hint="Start Python with KERAS_BACKEND=tensorflow."
        )
    if (target or "").startswith("ethos-u") or precision in ("int8", "int16x8"):
        raise WrongArgument(
            "Mode 'sample' draws in floats, on a processor.",
            hint="Choose float32, or mode 'ensemble' or 'noise_input'.",
        )


def _count(posterior: Posterior, members: int | None) -> int:
    count = posterior.count if members is None else members
    if not 1 <= count <= posterior.count:
        raise WrongArgument(f"There are 1 to {posterior.count} members, not {count!r}.")
    return count


def _networks(posterior: Posterior, count: int, without: Sequence[str] = ()) -> Iterator[keras.Model]:
    """Members' networks, deployed; of a network that draws, draws of all layers but for some."""
    if isinstance(posterior, StackedPosterior):
        arrays = posterior.arrays()
        for number in range(count):
            yield _deployed(posterior.model, *([values[number] for values in arrays[kind]] for kind in _KINDS))
        return
    assert isinstance(posterior, StochasticPosterior)
    for number in range(count):
        _, states = posterior._member(number)
        seeds = dict(zip(map(id, posterior.model.non_trainable_variables), states, strict=True))

        def frozen(operation: Any, path: str, seeds: Any = seeds) -> Any:
            if not draws(operation) or path in without:
                return None
            if not hasattr(operation, "drawn"):
                raise WrongArgument(
                    f"Layer {path!r} draws for each row and has no `drawn`: there are no members to write down.",
                    hint="Choose mode 'mean', 'sample' or 'noise_input'.",
                )
            return operation.drawn(int(ops.convert_to_numpy(seeds[id(operation._seed_generators[0].state)])[0]))

        with _holding(posterior.model, _values(posterior)):
            yield deploy(rebuild(posterior.model, frozen))


def _values(posterior: Posterior) -> list[Any]:
    arrays = posterior.arrays()
    return [*arrays["trainable"], *arrays["non_trainable"]]


def _middle(posterior: Posterior) -> keras.Model:
    """The network of means, which gives logits."""
    if not isinstance(posterior, StackedPosterior):
        with _holding(posterior.model, _values(posterior)):
            return deploy(posterior.model)
    arrays = posterior.arrays()
    likeness = _likeness(arrays["trainable"])
    if likeness < LEAST_LIKENESS:
        raise WrongArgument(
            f"Members are networks of their own (cosine of their weights {likeness:.2f}): they have no mean.",
            hint="Choose mode 'ensemble', or distil them.",
        )
    return _deployed(posterior.model, *([_mean(values) for values in arrays[kind]] for kind in _KINDS))


def _student(posterior: Posterior) -> keras.Model:
    network = _middle(posterior)
    logits, entropy = network.outputs
    probabilities = keras.layers.Softmax(name="probabilities")(logits)
    return keras.Model(network.inputs, [probabilities, entropy], name=posterior.model.name)


def _one_of(posterior: StackedPosterior, members: int | None) -> keras.Model:
    """A network that is another member at every call."""
    count = _count(posterior, members)
    if count < 2:
        raise WrongArgument("One member leaves nothing to draw.", hint="Choose mode 'mean'.")
    networks = list(_networks(posterior, count))
    first = networks[0]
    x = keras.Input(batch_shape=first.input.shape, dtype=first.input.dtype, name=name_of(first.input))
    layer = OneMember(first, count, name="member")
    logits = layer(x)
    layer.fill(networks)
    return keras.Model(x, keras.layers.Softmax(name="probabilities")(logits), name=posterior.model.name)


def _drawing(network: keras.Model, chance: Chance) -> keras.Model:
    """A model of [inputs, noise] with noise of its own."""
    given = network.inputs[0]
    x = keras.Input(batch_shape=given.shape, dtype=given.dtype, name=name_of(given))
    noise = Noise(chance.low.tolist(), chance.high.tolist(), chance.rate.tolist(), name="noise")(x)
    outputs = keras.layers.Identity(name="probabilities")(keras.Model(network.inputs, network.output)([x, noise]))
    return keras.Model(x, outputs, name=network.name)


def _with_noise(options: dict[str, Any], network: keras.Model, chance: Chance) -> dict[str, Any]:
    """Inputs of the posterior's model in the options of `export.save`, with noise beside each."""
    from keras_efficient.export.calibration import Calibration, calibration_from
    from keras_efficient.export.signature import input_specs, resolve_shapes

    spec, noise = input_specs(network)
    options = dict(options)
    shape = options.get("input_shape")
    if shape is not None and not isinstance(shape, Mapping):
        options["input_shape"] = {spec.name: shape}
    (spec,) = resolve_shapes([spec], shape)
    for name in ("calibration", "samples"):
        if options.get(name) is not None:
            plain = calibration_from(options[name], [spec])

            def load(index: int, plain: Calibration = plain) -> dict[str, np.ndarray]:
                return {**plain.load(index), noise.name: chance.draw(1, np.random.default_rng(index))}

            options[name] = Calibration(len(plain), load, f"{plain.source}, with noise beside each")
    return options


def _check_chance(path: Path, report: Report, network: keras.Model) -> None:
    """That the file draws, with one operator, whose numbers no other one repeats, and anew at every run.

    Raises:
        ConversionError: it does not.
    """
    from keras_efficient import export
    from keras_efficient.export.signature import input_specs
    from keras_efficient.export.verify import grouped, synthetic_samples

    found = sum(count for name, types in report.ops.items() if "RANDOM" in name.upper() for count in types.values())
    if found != 1:
        raise ConversionError(f"The file has {found} operators that draw, in the place of one.")
    run = export.load(path)
    specs = [replace(one, shape=run.input_shapes[one.name]) for one in input_specs(network)]
    sample = next(grouped(synthetic_samples(network, specs, 1), specs))
    answers = [run.run(run._named(dict(sample))) for _ in range(INVOKES)]
    if all(np.array_equal(one[name], answers[0][name]) for one in answers for name in one):
        raise ConversionError(f"{INVOKES} runs of the file gave the same: its chance was lost.")


_KINDS = ("trainable", "non_trainable")


def _mean(values: np.ndarray) -> np.ndarray:
    """Over members; of integers, such as states of seeds, there is none."""
    return values.mean(axis=0, dtype=np.float64) if values.dtype.kind == "f" else values[0]


def _likeness(trainable: Sequence[np.ndarray]) -> float:
    """Mean cosine between the weights of two members.

    ```
    |Σ w|² = Σ |w|² + Σ_{i≠j} wᵢ·wⱼ
    ```
    """
    count = len(trainable[0])
    if count == 1:
        return 1.0
    own = sum(float(np.square(values, dtype=np.float64).sum()) for values in trainable)
    together = sum(float(np.square(values.sum(axis=0, dtype=np.float64)).sum()) for values in trainable)
    return (together - own) / max(own * (count - 1), 1e-30)


def _deployed(model: keras.Model, trainable: Sequence[Any], others: Sequence[Any]) -> keras.Model:
    """A copy of stock layers with these weights."""
    with _holding(model, [*trainable, *others]):
        return deploy(model)


@contextlib.contextmanager
def _holding(model: keras.Model, values: Sequence[Any]) -> Iterator[None]:
    """The model has these weights as long as it lasts."""
    variables = [*model.trainable_variables, *model.non_trainable_variables]
    kept = [ops.convert_to_numpy(variable) for variable in variables]
    try:
        for variable, value in zip(variables, values, strict=True):
            variable.assign(value)
        yield
    finally:
        for variable, value in zip(variables, kept, strict=True):
            variable.assign(value)


def _with_probabilities(model: keras.Model, each: Sequence[keras.Model]) -> keras.Model:
    """Networks of logits on one input, and the mean of their softmaxes."""
    (given,) = model.inputs
    x = keras.Input(batch_shape=given.shape, dtype=given.dtype, name=name_of(given))
    found = []
    for number, network in enumerate(each):
        member = keras.Model(network.input, network.output, name=f"member_{number}")
        found.append(keras.layers.Softmax(name=f"softmax_{number}")(member(x)))
    if len(found) == 1:
        return keras.Model(x, keras.layers.Identity(name="probabilities")(found[0]), name=model.name)
    return keras.Model(x, keras.layers.Average(name="probabilities")(found), name=model.name)
