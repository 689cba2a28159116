"""Pruning, clustering and quantisation-aware training of one trained network, until the file."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers, ops

from keras_efficient import compress, export
from keras_efficient.deploy import foreign_layers
from keras_efficient.errors import KerasEfficientError, UnknownName, UnsupportedLayer, WrongArgument


def psnr(prediction, target) -> float:
    return float(-10 * np.log10(np.mean((np.clip(prediction, 0, 1) - target) ** 2)))


def quality(model, photos) -> float:
    """PSNR in dB on photos that no training has seen."""
    return psnr(model.predict(photos.held_out_low, verbose=0), photos.held_out_high)


def file_quality(path, photos) -> float:
    run = export.load(path)
    return psnr(np.concatenate([run(x[None]) for x in photos.held_out_low]), photos.held_out_high)


def fitted(session, photos, epochs=4):
    session.compile(keras.optimizers.Adam(1e-3), keras.losses.MeanSquaredError())
    session.fit(photos.low, photos.high, batch_size=16, epochs=epochs, verbose=0)
    return session


@pytest.fixture(scope="module")
def pruned(trained, photos):
    return fitted(compress.prune(trained, 0.5, frequency=8), photos)


@pytest.fixture(scope="module")
def clustered(trained, photos):
    return fitted(compress.cluster(trained, 8), photos)


@pytest.fixture(scope="module")
def quantized(trained, photos):
    return fitted(compress.quantize_aware(trained), photos, epochs=8)


SESSIONS = pytest.mark.parametrize("name", ["pruned", "clustered", "quantized"])


@SESSIONS
def test_comes_back_as_the_same_model_of_stock_layers(name, trained, photos, request, tmp_path):
    session = request.getfixturevalue(name)
    model = session.strip()
    assert foreign_layers(model) == ()
    assert [layer.name for layer in model.layers] == [layer.name for layer in trained.layers]
    assert (model.name, model.output_names) == (trained.name, trained.output_names)
    assert model.get_layer("block").get_layer("conv").kernel.shape == (3, 3, 12, 12)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(again.predict(photos.low[:2], verbose=0), model.predict(photos.low[:2], verbose=0))
    # What is stripped computes what was trained: to float32 rounding, or, where the output is left unrounded and the
    # ranges of the kernels are those after the last step, to steps of the quantisation.
    difference = np.abs(session.predict(photos.low[:8], verbose=0) - model.predict(photos.low[:8], verbose=0))
    assert difference.mean() < (2e-3 if name == "quantized" else 1e-6)


@SESSIONS
def test_the_given_model_is_not_changed(name, trained, photos, request):
    before = quality(trained, photos)
    request.getfixturevalue(name).strip()
    assert quality(trained, photos) == before


def test_half_of_each_kernel_is_zero_and_quality_recovers(pruned, trained, photos):
    model = pruned.strip()
    sizes = compress.measure(model)
    assert set(pruned.layers) == {"first", "block/conv", "block/project", "last"}
    assert set(pruned.skipped) == {"slopes"}
    kernels = {name: kernel for name, kernel in sizes.kernels.items() if name.endswith("kernel")}
    assert len(kernels) == 4
    assert {kernel.sparsity for kernel in kernels.values()} == {0.5}
    at_once = keras.models.clone_model(trained)
    at_once.set_weights([_half_zero(w) if w.ndim == 4 else w for w in trained.get_weights()])
    assert quality(model, photos) > quality(at_once, photos) + 0.5
    assert quality(model, photos) > quality(trained, photos) - 0.3


def _half_zero(kernel):
    return np.where(np.abs(kernel) > np.median(np.abs(kernel)), kernel, 0)


def test_two_of_four_input_channels_are_zero(trained, photos):
    session = fitted(compress.prune(trained, pattern=(2, 4), frequency=4), photos, epochs=1)
    assert set(session.skipped) == {"first", "slopes"}
    assert "1 input channels" in session.skipped["first"]
    inputs = keras.Input((4, 4, 8))
    up = layers.Conv2DTranspose(8, 2, name="up")(layers.Conv2D(8, 1)(inputs))
    assert "output channels" in compress.prune(keras.Model(inputs, up), pattern=(2, 4)).skipped["up"]
    for name in ("conv", "project"):
        kernel = keras.ops.convert_to_numpy(session.strip().get_layer("block").get_layer(name).kernel)
        groups = kernel.transpose(3, 0, 1, 2).reshape(-1, 4)
        assert np.all(np.count_nonzero(groups, axis=1) == 2)


def test_kernels_take_eight_values_and_quality_recovers(clustered, trained, photos):
    model = clustered.strip()
    kernels = {n: k for n, k in compress.measure(model).kernels.items() if n.endswith("kernel")}
    assert max(kernel.unique_values for kernel in kernels.values()) <= 8
    at_once = compress.cluster(trained, 8)
    at_once.compile("sgd", "mse")
    at_once.model.optimizer.learning_rate = 0.0
    at_once.fit(photos.low[:1], photos.high[:1], verbose=0)
    assert quality(model, photos) > quality(at_once.strip(), photos) + 0.3
    assert quality(model, photos) > quality(trained, photos) - 1.5


def test_pruned_zeros_survive_clustering(pruned, photos):
    session = fitted(compress.cluster(pruned.strip(), 8, keep_zeros=True), photos, epochs=1)
    kernels = {n: k for n, k in session.measure().kernels.items() if n.endswith("kernel")}
    assert min(kernel.sparsity for kernel in kernels.values()) >= 0.5
    assert max(kernel.unique_values for kernel in kernels.values()) <= 9


@pytest.mark.parametrize("name", ["pruned", "clustered"])
def test_files_shrink_only_when_they_are_compressed(name, trained, photos, request, tmp_path):
    session = request.getfixturevalue(name)
    export.save(trained, tmp_path / "plain.tflite", samples=photos.low[:2])
    report = session.export(tmp_path / "small.tflite", samples=photos.low[:2])
    plain, small = compress.measure(tmp_path / "plain.tflite"), compress.measure(tmp_path / "small.tflite")
    assert report.bytes == small.bytes
    assert abs(small.bytes - plain.bytes) < 0.05 * plain.bytes
    assert small.gzip_bytes < 0.85 * plain.gzip_bytes
    model = session.measure()
    if name == "pruned":
        assert small.sparsity == pytest.approx(model.sparsity, abs=0.01)
    np.testing.assert_allclose(
        export.load(tmp_path / "small.tflite")(photos.low[:1]), session.strip()(photos.low[:1]), atol=1e-5
    )


@pytest.fixture(scope="module")
def int8_files(trained, quantized, photos, tmp_path_factory):
    """Reports and paths: quantised after training, and quantisation-aware trained."""
    folder = tmp_path_factory.mktemp("int8")
    options = {"calibration": photos.low[:64], "input_shape": (24, 24)}
    after = export.save(trained, folder / "after.tflite", precision="int8", **options)
    aware = quantized.export(folder / "aware.tflite", **options)
    return {"after": (folder / "after.tflite", after), "aware": (folder / "aware.tflite", aware)}


def test_quantisation_aware_training_beats_quantisation_after_training(int8_files, trained, photos):
    found = {name: file_quality(path, photos) for name, (path, _) in int8_files.items()}
    assert found["aware"] >= found["after"]
    assert found["aware"] > quality(trained, photos) - 0.1


def test_the_aware_file_is_all_integers(int8_files):
    path, report = int8_files["aware"]
    assert {dtype for counts in report.ops.values() for dtype in counts} == {"int8"}
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(path))
    for detail in (*interpreter.get_input_details(), *interpreter.get_output_details()):
        assert detail["dtype"] is np.int8


def test_the_aware_file_keeps_the_trained_ranges_and_computes_the_rounded_model(int8_files, quantized, photos):
    path, _ = int8_files["aware"]
    run = export.load(path)
    rounded = quantized.strip().predict(photos.held_out_low, verbose=0)
    found = np.concatenate([run(x[None]) for x in photos.held_out_low])
    # An inner tensor that lies on the edge of a step may fall on either side, and moves some pixels by a few steps.
    step = run.output_step(run.output_names[0])
    assert np.abs(found - rounded).mean() < step
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(path), experimental_preserve_all_tensors=True)
    interpreter.allocate_tensors()
    scales = [detail["quantization"][0] for detail in interpreter.get_tensor_details()]
    for name in ("block/conv", "last"):
        low, high = quantized._ranges()[name]
        # TensorFlow widens a range until zero lies on a step; the scale stays.
        assert min(abs(scale * 255 / (high - low) - 1) for scale in scales if scale) < 1e-3, name


def test_another_precision_takes_the_model_without_ranges(quantized, photos, tmp_path):
    with pytest.raises(KerasEfficientError, match="fake quantisation"):
        quantized.export(tmp_path / "half.tflite", precision="float16", samples=photos.low[:2])
    export.save(quantized.strip(ranges=False), tmp_path / "half.tflite", precision="float16", samples=photos.low[:2])


def test_without_ranges_the_model_is_plain(quantized, trained, photos):
    plain = quantized.strip(ranges=False)
    assert [op.name for op in plain.operations] == [op.name for op in trained.operations]
    assert quality(plain, photos) > quality(trained, photos) - 0.1


def test_sparsity_rises_to_its_goal_and_a_training_too_short_is_told(trained, photos):
    session = compress.prune(trained, 0.8, begin_step=2, end_step=11, frequency=4)
    session.compile("sgd", "mse")
    session.fit(photos.low[:64], photos.high[:64], batch_size=8, verbose=0)
    with pytest.warns(UserWarning, match="8 steps were trained"):
        halfway = session.measure().kernels["conv/kernel"].sparsity
    session.fit(photos.low[:48], photos.high[:48], batch_size=8, verbose=0)
    assert 0.0 < halfway < session.measure().kernels["conv/kernel"].sparsity == pytest.approx(0.8, abs=1e-3)


def test_strip_is_deterministic(quantized):
    first, second = quantized.strip(), quantized.strip()
    assert first.get_config() == second.get_config()


def test_chosen_layers_only(trained):
    assert compress.prune(trained, layers=["block/conv"]).layers == ("block/conv",)
    with pytest.raises(UnknownName, match="block/conv"):
        compress.prune(trained, layers=["block/convv"])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: compress.prune(m, 1.0), "between 0 and 1"),
        (lambda m: compress.prune(m, 0.5, pattern=(2, 4)), "give one"),
        (lambda m: compress.prune(m, pattern=(4, 4)), "0 < m < n"),
        (lambda m: compress.prune(m, begin_step=5, end_step=5), "count up"),
        (lambda m: compress.cluster(m, 1), "at least 2"),
        (lambda m: compress.cluster(m, start="kmeans"), "kmeans\\+\\+"),
        (lambda m: compress.cluster(m, 100_000), "no layer"),
        (lambda m: compress.prune(m).strip(), "fit"),
    ],
)
def test_wrong_arguments(call, words, trained):
    with pytest.raises(WrongArgument, match=words):
        call(trained)


def test_objects_of_keras_3_cross_over(trained, photos):
    session = compress.prune(trained)
    rate = keras.optimizers.schedules.CosineDecay(1e-3, 4)
    huber, error = keras.losses.Huber(0.1), keras.metrics.MeanAbsoluteError()
    session.compile(keras.optimizers.AdamW(rate, weight_decay=1e-4), huber, [error])
    low, high = photos.low[:32], photos.high[:32]
    found = session.evaluate(low, high, batch_size=32, verbose=0)
    prediction = trained.predict(low, verbose=0)
    # Means of 73 728 float32 values, summed in another order.
    np.testing.assert_allclose(found, [huber(high, prediction), error(high, prediction)], rtol=1e-5)
    session.fit(low, high, epochs=2, batch_size=32, verbose=0, callbacks=None)
    assert session.model.optimizer.weight_decay == pytest.approx(1e-4)
    # The rate of the second step.
    assert float(session.model.optimizer.learning_rate) == pytest.approx(float(rate(1)))
    with pytest.raises(WrongArgument, match=r"tf_keras\.callbacks"):
        session.fit(photos.low, photos.high, callbacks=[keras.callbacks.EarlyStopping()])
    with pytest.raises(WrongArgument, match="Lion9"):
        session.compile(type("Lion9", (keras.optimizers.Lion,), {})())


class Cubes(keras.losses.Loss):
    def call(self, y_true, y_pred):
        return ops.mean(ops.abs(y_true - y_pred) ** 3, axis=-1)


def cubes(y_true, y_pred):
    return ops.mean(ops.abs(y_true - y_pred) ** 3, axis=-1)


def classifier():
    keras.utils.set_random_seed(5)
    inputs = keras.Input((4,))
    return keras.Model(inputs, layers.Dense(3, activation="softmax")(layers.Dense(8)(inputs)))


@pytest.mark.parametrize(
    "loss",
    [
        "mse",
        keras.losses.MeanSquaredError(),
        keras.losses.MeanSquaredError(reduction="sum"),
        keras.losses.Huber(0.1, reduction="mean"),
        Cubes(),
        cubes,
    ],
    ids=["name", "object", "sum", "huber", "own-object", "function"],
)
def test_a_loss_is_weighted_as_in_keras_3(loss):
    model, rng = classifier(), np.random.default_rng(0)
    x, y = rng.random((16, 4), "float32"), rng.random((16, 3), "float32")
    y[8:] += 5  # what an unweighted loss would see
    weights = np.repeat([1.0, 0.0], 8)
    session = compress.prune(model)
    session.compile("sgd", loss)
    model.compile("sgd", loss)
    options = {"sample_weight": weights, "batch_size": 16, "verbose": 0}
    assert session.evaluate(x, y, **options) == pytest.approx(model.evaluate(x, y, **options), rel=1e-5)


@pytest.mark.parametrize(
    "loss", ["sparse_categorical_crossentropy", keras.losses.SparseCategoricalCrossentropy()], ids=["name", "object"]
)
def test_classes_and_metrics_are_weighted_as_in_keras_3(loss):
    model, rng = classifier(), np.random.default_rng(0)
    x, y = rng.random((16, 4), "float32"), np.arange(16) % 3
    options = {"class_weight": {0: 1.0, 1: 0.0, 2: 3.0}, "batch_size": 16, "verbose": 0, "epochs": 2, "shuffle": False}
    session = compress.prune(model, 1e-6)
    found, expected = [], []
    for each, histories in ((session, found), (model, expected)):
        # One for each: a metric of Keras 3 has a state of its own.
        metric = keras.metrics.SparseCategoricalCrossentropy(name="weighted")
        each.compile(keras.optimizers.SGD(0.1), loss, weighted_metrics=[metric])
        history = each.fit(x, y, **options).history
        histories += [*history["loss"], *history["weighted"]]
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_options_that_a_configuration_leaves_out_cross_or_are_refused():
    rng = np.random.default_rng(0)
    y, x = rng.random((16, 3), "float32"), rng.random((16, 4), "float32")
    session = compress.prune(classifier())
    metric = keras.metrics.CosineSimilarity(axis=0)
    session.compile("sgd", "mse", metrics=[metric])
    _, found = session.evaluate(x, y, batch_size=16, verbose=0)
    assert found == pytest.approx(float(metric(y, session.predict(x, verbose=0))), rel=1e-5)
    session.compile(keras.optimizers.RMSprop(use_ema=True))
    assert session.model.optimizer.ema_overwrite_frequency is None  # tf_keras would have 100
    partly = keras.optimizers.AdamW()
    partly.exclude_from_weight_decay(var_names=["bias"])
    with pytest.raises(WrongArgument, match="leaves weights out"):
        session.compile(partly)
    with pytest.raises(WrongArgument, match="mean_with_sample_weight"):
        session.compile("sgd", keras.losses.MeanSquaredError(reduction="mean_with_sample_weight"))
    own = type("Accuracy", (keras.metrics.Accuracy,), {})()
    with pytest.raises(WrongArgument, match="like this one"):
        session.compile("sgd", "mse", [own])


@pytest.mark.parametrize(
    "prepare", [compress.prune, lambda model: compress.cluster(model, 4)], ids=["prune", "cluster"]
)
def test_masks_are_kept_in_training(prepare):
    keras.utils.set_random_seed(6)
    ids = keras.Input((6,), dtype="int32")
    each = layers.Dense(4)(layers.Embedding(9, 5, mask_zero=True)(ids))
    session = prepare(keras.Model(ids, [each, layers.GlobalAveragePooling1D()(each)]))
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 3, (16, 6)), [rng.random((16, 6, 4), "float32"), rng.random((16, 4), "float32")]
    session.compile("adam", [keras.losses.MeanSquaredError(), "mse"])
    session.fit(x, y, verbose=0)
    model = session.strip()
    for left, right in zip(session.predict(x, verbose=0), model.predict(x, verbose=0), strict=True):
        np.testing.assert_allclose(left, right, atol=1e-6)
    model.compile("adam", ["mse", "mse"])
    # The loss leaves out what is masked.
    assert session.evaluate(x, y, verbose=0) == pytest.approx(model.evaluate(x, y, verbose=0), rel=1e-5)


@pytest.mark.parametrize(
    "prepare",
    [
        compress.prune,
        lambda model: compress.cluster(model, 4),
        compress.quantize_aware,
    ],
    ids=["prune", "cluster", "quantize"],
)
def test_a_frozen_layer_stays_and_statistics_go_on(prepare):
    keras.utils.set_random_seed(7)
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(8, 3, name="frozen", trainable=False)(inputs)
    x = layers.BatchNormalization(momentum=0.5, name="norm")(x)
    x = layers.Conv2D(4, 3, name="last")(layers.ReLU()(x))
    model, rng = keras.Model(inputs, x), np.random.default_rng(0)
    low, high = rng.random((8, 8, 8, 3), "float32"), rng.random((8, 4, 4, 4), "float32")
    kernels = []
    for rate in (0.0, 0.1):
        session = prepare(model)
        session.compile(keras.optimizers.SGD(rate), "mse")
        session.fit(low, high, verbose=0)
        kernels.append([np.asarray(session.strip().get_layer(name).kernel) for name in ("frozen", "last")])
    (before, old), (after, new) = kernels
    np.testing.assert_array_equal(before, after)
    assert np.abs(old - new).max() > 1e-3
    model = session.strip()
    means = ops.mean(model.get_layer("frozen")(low), (0, 1, 2))
    # One step at a momentum of 0.5 goes half of the way from 0; a rounded input is off by a step of 1/255 at most.
    np.testing.assert_allclose(model.get_layer("norm").moving_mean, means / 2, atol=2e-3)


def test_a_data_set_is_taken(trained, photos):
    import tensorflow as tf

    data = tf.data.Dataset.from_tensor_slices((photos.low[:32], photos.high[:32])).batch(8)
    session = compress.quantize_aware(trained)
    session.compile("adam", "mse")
    session.fit(data, verbose=0)
    low, high = session._ranges()["first"]
    assert -3 < low < 0 < high < 3  # not the ±6 at which tfmot begins


def quantizable(layer, shape=(8, 8, 3)):
    inputs = keras.Input(shape)
    return keras.Model(inputs, layer(inputs))


def called_twice(inputs):
    shared = layers.Conv2D(3, 3, padding="same", name="refused")
    return shared(shared(inputs))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (layers.LSTM(3, name="refused"), (5, 4)),
        (layers.LayerNormalization(name="refused"), (8, 8, 3)),
        (layers.Conv1D(3, 3, name="refused"), (8, 3)),
        (layers.SeparableConv2D(3, 3, name="refused"), (8, 8, 3)),
        (layers.BatchNormalization(name="refused"), (8, 8, 3)),
        (called_twice, (8, 8, 3)),
    ],
    ids=["lstm", "layer-normalization", "conv1d", "separable", "batch-normalization", "called-twice"],
)
def test_what_cannot_be_quantised_is_refused_by_path(layer, shape):
    with pytest.raises(UnsupportedLayer) as refusal:
        compress.quantize_aware(quantizable(layer, shape))
    assert refusal.value.path == "refused"
    assert refusal.value.hint


def test_common_layers_are_quantised():
    inputs = keras.Input((16, 16, 3))
    x = layers.Conv2D(8, 3, strides=2, use_bias=False, padding="same")(inputs)
    x = layers.ReLU(6.0)(layers.BatchNormalization()(x))
    x = layers.DepthwiseConv2D(3, padding="same", use_bias=False)(x)
    x = layers.ReLU()(layers.BatchNormalization()(x))
    x = layers.Concatenate()([layers.MaxPooling2D()(x), layers.AveragePooling2D(2)(x)])
    x = layers.Conv2DTranspose(8, 2, strides=2)(x)
    x = layers.UpSampling2D()(layers.LeakyReLU()(x)) * 0.5
    x = layers.Dense(4, activation="softmax")(layers.Dropout(0.1)(layers.GlobalAveragePooling2D()(x)))
    model = keras.Model(inputs, x)
    session = compress.quantize_aware(model)
    session.compile("adam", "mse")
    rng = np.random.default_rng(0)
    session.fit(rng.random((16, 16, 16, 3)), rng.random((16, 4)), verbose=0)
    data = rng.random((4, 16, 16, 3)).astype("float32")
    difference = np.abs(session.strip().predict(data, verbose=0) - session.predict(data, verbose=0))
    assert difference.max() < 0.05
