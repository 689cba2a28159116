"""A posterior in a file is the same posterior, and nothing else in a file becomes one."""

from __future__ import annotations

import json
import zipfile

import keras
import numpy as np
import pytest
from keras import layers

from keras_efficient.bayes import Members, StackedPosterior, StochasticPosterior, load_posterior
from keras_efficient.errors import FileProblem, WrongArgument

RNG = np.random.default_rng(0)
X = RNG.normal(size=(7, 6)).astype("float32")


@keras.saving.register_keras_serializable(package="test")
class Dropping(layers.Dropout):
    def call(self, inputs, training=False):
        return super().call(inputs, training=True)


def network(*, drops=False):
    inputs = keras.Input((6,))
    x = layers.BatchNormalization()(layers.Dense(5, activation="relu")(inputs))
    x = Dropping(0.5)(x) if drops else x
    return keras.Model(inputs, layers.Dense(3)(x))


def stacked():
    return StackedPosterior(Members.new(network, 3, seed=1), diagnostics={"r_hat": 1.5})


def stochastic():
    return StochasticPosterior(network(drops=True), 5, seed=2)


@pytest.mark.contract
@pytest.mark.parametrize("made", [stacked, stochastic])
def test_it_is_the_same_afterwards(made, tmp_path):
    posterior, path = made(), tmp_path / "some.posterior"
    posterior.save(path)
    found = load_posterior(path)
    np.testing.assert_array_equal(found.predict(X), posterior.predict(X))
    assert type(found) is type(posterior)
    assert found.diagnostics == posterior.diagnostics
    with pytest.raises(FileProblem, match="exists"):
        posterior.save(path)


@pytest.mark.contract
def test_draws_of_a_stochastic_network_are_draws_of_their_own_and_stay():
    posterior = stochastic()
    first = posterior.predict(X)
    np.testing.assert_array_equal(posterior.predict(X), first)
    assert len(np.unique(first.round(6), axis=0)) == 5
    other = StochasticPosterior(posterior.model, 5, seed=3)
    assert np.abs(other.predict(X) - first).max() > 0.01


def test_a_network_without_noise_is_none():
    with pytest.raises(WrongArgument, match="no layer that draws"):
        StochasticPosterior(network())


def rewritten(path, change):
    """The file's parts, changed, in a new file."""
    with zipfile.ZipFile(path) as file:
        parts = {entry.filename: file.read(entry) for entry in file.infolist()}
    change(parts)
    other = path.with_name("other.posterior")
    with zipfile.ZipFile(other, "w") as file:
        for name, content in parts.items():
            file.writestr(name, content)
    return other


def header(parts, change):
    found = json.loads(parts["posterior.json"])
    change(found)
    parts["posterior.json"] = json.dumps(found)


def large(found):
    found["model"]["config"]["layers"][-1]["config"]["units"] = 2 * 10**9


def lambda_layer(found):
    found["model"]["config"]["layers"][1]["class_name"] = "Lambda"


CHANGES = {
    "is none of ours": lambda parts: parts.pop("posterior.json"),
    "lacks an array": lambda parts: parts.pop("trainable/2.npy"),
    "cut off": lambda parts: parts.update({"trainable/0.npy": parts["trainable/0.npy"][:-4]}),
    "objects": lambda parts: parts.update({"trainable/0.npy": parts["trainable/0.npy"].replace(b"<f4", b"|O ")}),
    "forty gigabytes": lambda parts: header(parts, large),
    "Lambda": lambda parts: header(parts, lambda_layer),
    "another kind": lambda parts: header(parts, lambda found: found.update(kind="pickled")),
    "the future": lambda parts: header(parts, lambda found: found.update(format=9)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_is_no_posterior_is_refused(change, tmp_path):
    path = tmp_path / "some.posterior"
    stacked().save(path)
    with pytest.raises(FileProblem, match=r"other\.posterior"):
        load_posterior(rewritten(path, change))


def test_packed_and_missing_and_other_files(tmp_path):
    path = tmp_path / "some.posterior"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("posterior.json", "{}")
    with pytest.raises(FileProblem, match="packed"):
        load_posterior(path)
    path.write_bytes(b"no zip")
    with pytest.raises(FileProblem, match="damaged"):
        load_posterior(path)
    with pytest.raises(FileProblem, match="no such file"):
        load_posterior(tmp_path / "absent")
