"""The training loop: patches against NumPy's own turns, resume, both backends, and that it learns."""

import csv
import signal

import keras
import numpy as np
import pytest
from keras import ops

from keras_efficient.errors import FileProblem, WrongArgument
from keras_efficient.models import SESR
from keras_efficient.superres import training
from keras_efficient.superres.data import PatchSet, split_by_name
from keras_efficient.superres.evaluation import Pair
from keras_efficient.superres.resize import imresize
from keras_efficient.superres.soap import SOAP
from keras_efficient.superres.training import Schedule, Trainer, _compiled_chunk, _gather


def pairs(scale=2, count=3):
    random = np.random.default_rng(0)
    made = []
    for number in range(count):
        coarse = random.random((9 + number, 12)).astype("float32")
        high = np.clip(imresize(coarse, output_size=(48 + scale * 2 * number, 60)), 0, 1)
        high = high[: high.shape[0] // scale * scale, : high.shape[1] // scale * scale]
        made.append(Pair(str(number), np.clip(imresize(high, 1 / scale), 0, 1), high))
    return made


@pytest.mark.contract
@pytest.mark.parametrize("scale", [2, 3])
def test_gathered_patches_are_numpys_turns_of_the_pictures(scale):
    """Each patch must be one of the pictures' windows, flipped and turned as its number says, in low and high alike."""
    sources = pairs(scale)
    patch = 7
    patches = PatchSet(sources, scale, patch)
    plan = patches.plan(4, 16, seed=3)
    assert set(plan.turn.ravel()) == set(range(8))
    for step in range(4):
        y, target = _gather(
            patches,
            patches.low,
            patches.high,
            patches.turns,
            *(a[step] for a in (plan.origin, plan.down, plan.right, plan.turn)),
        )
        high = ops.convert_to_numpy(ops.depth_to_space(target, scale))[..., 0]
        y = ops.convert_to_numpy(y)[..., 0]
        for sample in range(16):
            windows = []
            for source in sources:
                rows, columns = source.low.shape
                for top in range(rows - patch + 1):
                    for left in range(columns - patch + 1):
                        windows.append((source, top, left))
            turn = plan.turn[step, sample]
            assert any(_matches(*w, turn, patch, scale, y[sample], high[sample]) for w in windows)


def _matches(source, top, left, turn, patch, scale, low, high):
    def turned(image):
        image = image[::-1] if turn & 1 else image
        image = image[:, ::-1] if turn & 2 else image
        return image.T if turn & 4 else image

    window = source.low[top : top + patch, left : left + patch]
    if np.abs(turned(window) - low).max() > 1e-4:
        return False
    big = source.high[top * scale : (top + patch) * scale, left * scale : (left + patch) * scale]
    return np.abs(turned(big) - high).max() <= 1e-4


def test_a_plan_is_fixed_by_its_seed():
    patches = PatchSet(pairs(), 2, 8)
    one, two, other = patches.plan(3, 4, 1), patches.plan(3, 4, 1), patches.plan(3, 4, 2)
    np.testing.assert_array_equal(one.origin, two.origin)
    assert (one.origin != other.origin).any()


def test_no_picture_large_enough_is_refused():
    with pytest.raises(WrongArgument, match="100×100"):
        PatchSet(pairs(), 2, 100)


def test_split_is_by_name_and_disjoint(tmp_path):
    paths = [tmp_path / f"{i}.png" for i in range(200)]
    training, validation = split_by_name(paths)
    assert set(training) | set(validation) == set(paths)
    assert not set(training) & set(validation)
    assert 2 <= len(validation) <= 25
    assert split_by_name(reversed(paths)) == (training, validation)


def small_trainer(folder, steps=12, seed=1):
    keras.utils.set_random_seed(seed)
    model = SESR(2, "m3", expansion=8)
    return Trainer(model, PatchSet(pairs(), 2, 12), Schedule(steps, batch=4, warmup=5, average=0.9), folder)


def test_training_learns_and_logs(tmp_path):
    trainer = small_trainer(tmp_path, steps=120)
    before = trainer.evaluate_average(pairs())
    after = trainer.run(pairs(), chunk=30, evaluate_every=60)
    assert after > before + 1
    with (tmp_path / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [60, 120]
    assert float(rows[-1]["validation_psnr_db"]) == pytest.approx(after, abs=1e-3)


@pytest.mark.contract
def test_an_interrupted_training_goes_on_as_if_nothing_had_happened(tmp_path):
    whole = small_trainer(tmp_path / "whole")
    whole.run(pairs(), chunk=4, evaluate_every=8)
    first = small_trainer(tmp_path / "parts")
    first.run(pairs(), chunk=4, evaluate_every=8, until=8)
    second = small_trainer(tmp_path / "parts", seed=99)  # other initial weights: the checkpoint must win
    assert second.step == 8
    second.run(pairs(), chunk=4, evaluate_every=8)
    for one, two in zip(whole.model.get_weights(), second.model.get_weights(), strict=True):
        np.testing.assert_allclose(one, two, atol=2e-5)


@pytest.mark.contract
def test_ctrl_c_inside_a_chunk_leaves_a_checkpoint_that_fits_together(tmp_path, monkeypatch):
    whole = small_trainer(tmp_path / "whole")
    whole.run(pairs(), chunk=4, evaluate_every=8)
    first = small_trainer(tmp_path / "parts")

    def interrupted(trainer):
        run_chunk = _compiled_chunk(trainer)

        def run(plan, squared):
            if trainer.step == 4:
                signal.raise_signal(signal.SIGINT)
            return run_chunk(plan, squared)

        return run

    usual = signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore it
    try:
        with monkeypatch.context() as patch:
            patch.setattr(training, "_compiled_chunk", interrupted)
            with pytest.raises(KeyboardInterrupt):
                first.run(pairs(), chunk=4, evaluate_every=100)
    finally:
        signal.signal(signal.SIGINT, usual)
    assert first.step == int(first.optimizer.iterations) == 8
    second = small_trainer(tmp_path / "parts", seed=99)
    assert second.step == 8
    second.run(pairs(), chunk=4, evaluate_every=8)
    for one, two in zip(whole.model.get_weights(), second.model.get_weights(), strict=True):
        np.testing.assert_allclose(one, two, atol=2e-5)


def test_a_checkpoint_of_another_model_or_schedule_is_refused(tmp_path):
    small_trainer(tmp_path).run(pairs(), chunk=5, until=5)
    with pytest.raises(FileProblem, match="another schedule"):
        small_trainer(tmp_path, steps=13)
    with pytest.raises(FileProblem, match="another model"):
        Trainer(SESR(2, "m5", expansion=8), PatchSet(pairs(), 2, 12), Schedule(10), tmp_path)


@pytest.mark.contract
def test_soap_without_rotation_is_adam():
    """Sides longer than `largest_side` keep the plain basis: the update must be Adam's."""
    weights = [np.random.default_rng(0).normal(size=(6, 5)).astype("float32"), np.ones(4, "float32")]
    results = []
    for optimizer in (
        SOAP(0.1, beta_1=0.9, beta_2=0.99, epsilon=1e-8, largest_side=1),
        keras.optimizers.Adam(0.1, beta_1=0.9, beta_2=0.99, epsilon=1e-8),
    ):
        variables = [keras.Variable(w) for w in weights]
        for step in range(5):
            optimizer.apply([ops.convert_to_tensor(np.cos(w + step)) for w in weights], variables)
        results.append([ops.convert_to_numpy(v) for v in variables])
    for one, two in zip(*results, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-4)


def test_soap_rotation_is_orthogonal_and_helps_an_ill_conditioned_problem():
    random = np.random.default_rng(0)
    basis, _ = np.linalg.qr(random.normal(size=(12, 12)))
    hessian = ops.convert_to_tensor((basis * np.logspace(-3, 1, 12)) @ basis.T, "float32")
    start = random.normal(size=(12, 3)).astype("float32")

    def loss_after(optimizer, steps=300):
        variable = keras.Variable(start)
        for _ in range(steps):
            optimizer.apply([ops.matmul(hessian, variable)], [variable])
        value = ops.convert_to_numpy(variable)
        return float(np.sum(value * (np.asarray(hessian) @ value))), optimizer

    soap, optimizer = loss_after(SOAP(0.02, refresh=5))
    adam, _ = loss_after(keras.optimizers.Adam(0.02, beta_1=0.95, beta_2=0.95))
    vectors = ops.convert_to_numpy(optimizer._bases[0][0][1])
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(12), atol=1e-4)
    assert soap < adam
