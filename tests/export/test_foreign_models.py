"""Models that are not ours take the same road: one of every family of keras.applications, and nets of other shapes."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers as L
from keras import ops

from keras_efficient import export
from keras_efficient.errors import ConversionError

APPLICATIONS = {  # family: (constructor, smallest side)
    "mobilenet": (lambda **k: keras.applications.MobileNet(alpha=0.25, **k), 32),
    "mobilenet_v2": (lambda **k: keras.applications.MobileNetV2(alpha=0.35, **k), 32),
    "mobilenet_v3": (lambda **k: keras.applications.MobileNetV3Small(**k), 32),
    "efficientnet": (lambda **k: keras.applications.EfficientNetB0(**k), 32),
    "efficientnet_v2": (lambda **k: keras.applications.EfficientNetV2B0(**k), 32),
    "resnet": (lambda **k: keras.applications.ResNet50(**k), 32),
    "resnet_v2": (lambda **k: keras.applications.ResNet50V2(**k), 32),
    "densenet": (lambda **k: keras.applications.DenseNet121(**k), 32),
    "inception_v3": (lambda **k: keras.applications.InceptionV3(**k), 75),
    "inception_resnet_v2": (lambda **k: keras.applications.InceptionResNetV2(**k), 75),
    "xception": (lambda **k: keras.applications.Xception(**k), 71),
    "nasnet": (lambda **k: keras.applications.NASNetMobile(**k), 32),
    "vgg": (lambda **k: keras.applications.VGG16(**k), 32),
    "convnext": (lambda **k: keras.applications.ConvNeXtTiny(**k), 64),  # 32: tf2onnx errs at the 1×1 image, refused
}
FAST = ("mobilenet_v2",)


def shaken(model: keras.Model, seed: int = 0) -> keras.Model:
    """Gives vectors (biases, statistics, scales) random values, so that a fold that forgets one of them shows."""
    generator = np.random.default_rng(seed)
    for layer in model._flatten_layers():
        for weight in getattr(layer, "_trainable_variables", []) + getattr(layer, "_non_trainable_variables", []):
            if len(weight.shape) == 1 and weight.dtype == "float32":
                positive = weight.name in ("gamma", "moving_variance", "variance") or "scale" in weight.name
                low, high = (0.7, 1.3) if positive else (-0.1, 0.1)
                weight.assign(generator.uniform(low, high, weight.shape).astype("float32"))
    return model


def application(family: str) -> tuple[keras.Model, np.ndarray]:
    constructor, side = APPLICATIONS[family]
    keras.utils.set_random_seed(0)
    model = constructor(weights=None, input_shape=(side, side, 3), classes=10, classifier_activation=None)
    samples = np.random.default_rng(1).uniform(0, 1, (8, side, side, 3)).astype("float32")
    return shaken(model), samples


def applications() -> list:
    return [pytest.param(f, marks=() if f in FAST else pytest.mark.slow, id=f) for f in APPLICATIONS]


@pytest.mark.parametrize("family", applications())
def test_application_in_float(family, tmp_path):
    model, samples = application(family)
    for suffix in (".tflite", ".onnx"):
        report = export.save(model, tmp_path / f"m{suffix}", samples=samples[:4])
        assert report.sqnr_db > 75, (suffix, report)
        assert report.macs
        assert report.parameters == model.count_params()
    tflite, onnx = (export.load(tmp_path / f"m{suffix}") for suffix in (".tflite", ".onnx"))
    np.testing.assert_allclose(tflite(samples[:1]), onnx(samples[:1]), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mobilenet", "mobilenet_v2", "mobilenet_v3", "efficientnet", "resnet", "convnext"])
def test_application_in_int8_is_all_integers(family, tmp_path):
    model, samples = application(family)
    report = export.save(model, tmp_path / "m.tflite", precision="int8", calibration=samples)
    assert not any("float" in dtype for counts in report.ops.values() for dtype in counts)
    assert report.sqnr_db > 12


def unet() -> keras.Model:
    inputs = keras.Input((None, None, 3), name="image")
    x = L.Conv2D(8, 3, padding="same", activation="relu")(inputs)
    skip = x
    x = L.MaxPooling2D()(x)
    x = L.BatchNormalization()(L.SeparableConv2D(16, 3, padding="same")(x))
    x = L.Conv2DTranspose(8, 2, strides=2, padding="same")(L.Activation("swish")(x))
    x = L.Concatenate()([x, skip])
    x = L.UpSampling2D(interpolation="bilinear")(L.AveragePooling2D(2)(x))
    return keras.Model(inputs, L.Conv2D(2, 1, activation="sigmoid", name="mask")(x), name="unet")


def recurrent(kind: str) -> keras.Model:
    inputs = keras.Input((12, 5), name="series")
    layer = {"lstm": L.LSTM(6, return_sequences=True), "gru": L.GRU(6), "bidirectional": L.Bidirectional(L.LSTM(4))}[
        kind
    ]
    x = layer(inputs)
    return keras.Model(inputs, L.Dense(3, name="out")(x), name=kind)


def transformer() -> keras.Model:
    ids = keras.Input((10,), dtype="int32", name="ids")
    x = L.Embedding(50, 16)(ids)
    x = x + L.Embedding(10, 16)(ops.arange(10))
    attended = L.MultiHeadAttention(2, 8)(x, x, use_causal_mask=True)
    x = L.LayerNormalization()(x + attended)
    x = L.LayerNormalization()(x + L.Dense(16)(L.Dense(32, activation="gelu")(x)))
    return keras.Model(ids, L.Dense(50, name="logits")(x), name="transformer")


def sequential() -> keras.Model:
    return keras.Sequential(
        [keras.Input((8, 8, 2)), L.Conv2D(4, 3), L.PReLU(), L.Flatten(), L.Dropout(0.5), L.Dense(3)], name="sequential"
    )


def many_ports() -> keras.Model:
    image, ids = keras.Input((8, 8, 3), name="image"), keras.Input((4,), dtype="int32", name="ids")
    x = L.GlobalAveragePooling2D()(L.Conv2D(6, 3, groups=3)(image))
    x = L.Concatenate()([x, L.Flatten()(L.Embedding(20, 3)(ids))])
    logits = L.Dense(5, name="logits")(x)
    outputs = {"scores": ops.softmax(logits), "best": ops.argmax(logits, axis=-1), "extra": [x, L.Dense(2)(x)]}
    return keras.Model({"image": image, "ids": ids}, outputs, name="many_ports")


def grouped_norm() -> keras.Model:
    inputs = keras.Input((8, 8, 4), name="image")
    x = L.GroupNormalization(2)(L.Conv2D(8, 3, groups=2, activation="gelu")(inputs))
    return keras.Model(inputs, L.Dense(3)(L.GlobalMaxPooling2D()(L.DepthwiseConv2D(3, dilation_rate=2)(x))))


OTHERS = {
    "unet": unet,
    "lstm": lambda: recurrent("lstm"),
    "gru": lambda: recurrent("gru"),
    "bidirectional": lambda: recurrent("bidirectional"),
    "transformer": transformer,
    "sequential": sequential,
    "many_ports": many_ports,
    "grouped_norm": grouped_norm,
}


@pytest.mark.parametrize("suffix", [".tflite", ".onnx"])
@pytest.mark.parametrize("name", list(OTHERS))
def test_other_model_in_float(name, suffix, tmp_path):
    keras.utils.set_random_seed(3)
    model = shaken(OTHERS[name](), 5)
    report = export.save(model, tmp_path / f"m{suffix}")
    assert report.sqnr_db > 75, report
    run = export.load(tmp_path / f"m{suffix}")
    given = {
        spec: np.ones([size or 16 for size in (1, *shape[1:])], run.input_dtypes[spec])
        for spec, shape in run.input_shapes.items()
    }
    expected = model(given if len(given) > 1 else next(iter(given.values())), training=False)
    found = run(given)
    keras.tree.assert_same_structure(expected, found)
    for want, have in zip(keras.tree.flatten(expected), keras.tree.flatten(found), strict=True):
        np.testing.assert_allclose(have, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["unet", "lstm", "bidirectional", "transformer", "grouped_norm"])
def test_other_model_in_int8(name, tmp_path):
    keras.utils.set_random_seed(3)
    model = shaken(OTHERS[name](), 5)
    spec = model.inputs[0]
    generator = np.random.default_rng(2)
    shape = (16, *(size or 32 for size in spec.shape[1:]))
    data = generator.integers(0, 10, shape) if spec.dtype == "int32" else generator.random(shape, "float32")
    report = export.save(model, tmp_path / "m.tflite", precision="int8", calibration=data)
    assert not any("float" in dtype for counts in report.ops.values() for dtype in counts)
    assert report.sqnr_db > 12


def test_int8_of_a_free_loop_is_refused(tmp_path):
    """The calibrator would end the whole process with a segmentation fault."""
    inputs = keras.Input((None, 5), name="series")
    model = keras.Model(inputs, L.LSTM(4, name="memory")(inputs))
    data = np.random.default_rng(0).random((4, 7, 5), "float32")
    with pytest.raises(ConversionError, match=r"memory.* is a loop"):
        export.save(model, tmp_path / "m.tflite", precision="int8", calibration=data)
    assert not list(tmp_path.iterdir())
