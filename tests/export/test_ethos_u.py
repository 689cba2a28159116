"""The Ethos-U targets: systems, Vela in its child process, coverage, layouts, and what is refused."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import layers as L
from keras import ops

from keras_efficient import export
from keras_efficient.errors import ConversionError, UnknownName, UnsupportedLayer, WrongArgument
from keras_efficient.export import flatbuffer, vela
from keras_efficient.export.graph import Graph
from keras_efficient.export.lowerings.row_phases import phase_methods
from keras_efficient.export.lowerings.tiles import find_image_network, with_row_phases
from keras_efficient.export.targets import ethos_u


def network(name: str = "enlarger") -> keras.Model:
    """A super-resolution network with an image residual, of free height and width."""
    keras.utils.set_random_seed(2)
    image = keras.Input((None, None, 1), name="y")
    x = L.Conv2D(16, 3, padding="same", activation="relu", name="first")(image)
    x = L.Conv2D(16, 3, padding="same", activation="relu", name="body")(x)
    x = L.Add(name="residual")([L.Conv2D(4, 3, padding="same", name="last")(x), image])
    return keras.Model(image, ops.depth_to_space(L.ReLU(max_value=1.0, name="clip")(x), 2), name=name)


@pytest.fixture(scope="session")
def pictures() -> np.ndarray:
    return np.random.default_rng(0).random((4, 64, 96, 1), dtype=np.float32)


@pytest.fixture(scope="session")
def saved(pictures, tmp_path_factory):
    """(path, report, messages) of the network for the largest accelerator at 64 × 96."""
    path, messages = tmp_path_factory.mktemp("npu") / "model.tflite", []
    report = export.save(
        network(),
        path,
        target="ethos-u85-2048",
        precision="int8",
        calibration=pictures,
        input_shape=(64, 96),
        on_progress=messages.append,
    )
    return path, report, messages


@pytest.fixture(scope="session")
def quantised(saved, pictures, tmp_path_factory):
    """The int8 file before any rewrite."""
    path = tmp_path_factory.mktemp("npu") / "plain.tflite"
    export.save(network(), path, precision="int8", calibration=pictures, input_shape=(64, 96))
    return path


# ---------------------------------------------------------------------------------------------- systems


def test_every_accelerator_is_a_target():
    sizes = {"u55": (32, 64, 128, 256), "u65": (256, 512), "u85": (128, 256, 512, 1024, 2048)}
    names = {f"ethos-{family}-{macs}" for family, all_macs in sizes.items() for macs in all_macs}
    assert names == set(vela.ACCELERATORS) == {name for name in export.targets if name.startswith("ethos")}
    for name in names:
        assert vela.check_system(name) == vela.default_system(name)


def test_the_table_of_systems_is_velas_own():
    """Each name is in the configuration file that Vela ships, and none of its names is missing here."""
    from importlib.resources import files

    text = (files("ethosu") / "config_files/Arm/vela.ini").read_text()
    sections = {line.strip("[] \n") for line in text.splitlines() if line.startswith("[")}
    modes = {mode for systems in vela.SYSTEMS.values() for allowed in systems.values() for mode in allowed}
    ours = {f"System_Config.{name}" for systems in vela.SYSTEMS.values() for name in systems}
    assert ours | {f"Memory_Mode.{mode}" for mode in modes} == sections


@pytest.mark.parametrize(
    ("accelerator", "system", "mode", "error"),
    [
        ("ethos-u99-1", None, None, UnknownName),
        ("ethos-u55-128", "Ethos_U85_SYS_DRAM_High", None, WrongArgument),  # Vela accepts it with exit code 0
        ("ethos-u85-2048", "Ethos_U85_SYS_DRAM_Higher", None, UnknownName),
        ("ethos-u55-128", None, "Dedicated_Sram", WrongArgument),
        ("ethos-u85-256", "Ethos_U85_SYS_Flash_Low", "Dedicated_Sram_512KB", WrongArgument),
        ("ethos-u85-256", None, "Shared", UnknownName),
    ],
)
def test_impossible_systems_are_refused(accelerator, system, mode, error):
    with pytest.raises(error):
        vela.check_system(accelerator, system, mode)


def test_a_memory_mode_follows_its_system():
    assert vela.check_system("ethos-u85-2048", "Ethos_U85_SYS_Flash_High").memory_mode == "Shared_Sram"


def test_every_accelerator_compiles(saved, quantised, tmp_path):
    """The lowered network runs wholly on each of them, faster on those with more multipliers."""
    graph = Graph.from_bytes(quantised.read_bytes())
    network = find_image_network(graph)
    method = next(phase_methods(graph, network.shuffle))
    lowered = tmp_path / "lowered.tflite"
    lowered.write_bytes(with_row_phases(graph, lambda shuffle: method).to_bytes())
    times = {}
    for name in vela.ACCELERATORS:
        (estimate,) = vela.compile_files([lowered], vela.check_system(name), tmp_path / name)
        assert estimate.cpu_ops == 0, name
        times[name] = estimate.ms
    for family in ("u55", "u65", "u85"):
        own = [times[name] for name in vela.ACCELERATORS if f"-{family}-" in name]
        assert own == sorted(own, reverse=True)


# ---------------------------------------------------------------------------------------------- the file


def test_everything_is_on_the_npu(saved):
    path, report, _ = saved
    assert [operator.name for operator in flatbuffer.operators(path.read_bytes())] == ["ethos-u"]
    npu = report.npu
    assert npu["cpu_ops"] == 0
    assert npu["npu_ops"] == sum(count for kinds in report.ops.values() for count in kinds.values())
    assert npu["ms_per_frame"] > 0
    assert npu["fps"] == pytest.approx(1e3 / npu["ms_per_frame"])
    assert 0 < npu["sram_kib"] <= 512
    assert (npu["accelerator"], npu["system_config"], npu["memory_mode"]) == (
        "ethos-u85-2048",
        "Ethos_U85_SYS_DRAM_High",
        "Dedicated_Sram_512KB",
    )
    # at least the image is read and the result written
    assert npu["dram_bytes_per_frame"] >= 64 * 96 + 4 * 64 * 96
    assert npu["tiles"] >= 1
    json.loads(report.to_json())


def test_the_verified_file_is_the_compiled_one(saved, quantised, tmp_path):
    """Same borders as the plain int8 file, down to the scales; our metadata is in it; the sizes are those asked for."""
    path, report, _ = saved
    compiled, plain = (Graph.from_bytes(p.read_bytes()) for p in (path, quantised))
    for a, b in zip((*compiled.inputs, *compiled.outputs), (*plain.inputs, *plain.outputs), strict=True):
        assert compiled.tensor(a).shape == plain.tensor(b).shape
        assert compiled.tensor(a).grid == plain.tensor(b).grid
    assert flatbuffer.read_metadata(path.read_bytes())["target"] == "ethos-u85-2048"
    assert report.sqnr_db > 25
    assert "ms_per_frame is the estimate of Vela" in " ".join(report.notes)


def test_progress_is_told(saved):
    _, _, messages = saved
    assert any("compiling" in message for message in messages)
    assert any("estimating layout" in message for message in messages)


def test_the_choice_is_named(saved):
    """The fastest of the ways to shuffle was taken, and all of them were tried."""
    _, report, _ = saved
    assert any(name.startswith(("row-phases", "split")) for name in report.lowerings)
    assert any("The fastest of" in note for note in report.notes)


def test_stdout_stays_clean(quantised, tmp_path):
    """Vela's C++ core writes to descriptor 1; none of it reaches ours."""
    program = (
        "import sys; from pathlib import Path; from keras_efficient.export import vela;"
        "system = vela.check_system('ethos-u55-64');"
        "print(vela.compile_files([Path(sys.argv[1])], system, Path(sys.argv[2]))[0].cpu_ops)"
    )
    command = [sys.executable, "-c", program, str(quantised), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"  # the plain file's DEPTH_TO_SPACE is on no NPU


def test_vela_tells_what_is_wrong_with_a_file(quantised, tmp_path):
    """One bad file among good ones; each gets its own answer."""
    bad, empty = tmp_path / "bad.tflite", tmp_path / "empty.tflite"
    bad.write_bytes(b"junk" * 20)
    empty.write_bytes(b"")
    results = vela.compile_files([bad, quantised, empty], vela.check_system("ethos-u55-64"), tmp_path / "out")
    assert isinstance(results[0], str)
    assert isinstance(results[2], str)
    assert isinstance(results[1], vela.Estimate)


def test_a_child_that_dies_is_an_error(quantised, tmp_path, monkeypatch):
    monkeypatch.setattr(vela.sys, "executable", "/bin/false")
    with pytest.raises(ConversionError, match=r"Vela ended with status 1"):
        vela.compile_files([quantised], vela.check_system("ethos-u55-64"), tmp_path / "out")


# ---------------------------------------------------------------------------------------------- tiles


@pytest.mark.parametrize("tile", [(64, 32), "24x40"])
def test_the_callers_tile(pictures, tmp_path, tile):
    path = tmp_path / "tiled.tflite"
    report = export.save(
        network(), path, target="ethos-u85-256", precision="int8", calibration=pictures, input_shape=(64, 96), tile=tile
    )
    height, width = (24, 40) if tile == "24x40" else tile
    assert report.npu["tile"] == [height, width]
    assert report.npu["tiles"] == -(-64 // height) * -(-96 // width)
    assert report.npu["cpu_ops"] == 0
    assert "tiles" in report.lowerings


def test_tiles_are_searched_for_a_large_image(quantised, tmp_path):
    """A wide image in a small SRAM: some tile beats the image in one piece, and the best is first."""
    path = tmp_path / "wide.tflite"
    path.write_bytes(quantised.read_bytes())
    graph = Graph.from_bytes(path.read_bytes())
    wide = _resized(graph, 270, 960)
    trials = ethos_u.search(wide, vela.check_system("ethos-u85-2048"), tmp_path / "layouts")
    whole = min(trial.result.ms for trial in trials if trial.layout.tile is None)
    assert trials[0].layout.tile is not None
    assert trials[0].result.ms < whole
    assert all(a.rank <= b.rank for a, b in itertools.pairwise(trials))
    assert len({trial.layout.tile for trial in trials}) > 5


def _resized(graph: Graph, height: int, width: int) -> Graph:
    """The same graph at another size: every shape but those of constants is an image's."""
    old = graph.tensor(graph.inputs[0]).shape
    for index, tensor in enumerate(graph.model.subgraphs[0].tensors):
        if not graph.is_constant(index) and len(tensor.shape) == 4:
            factor = tensor.shape[1] // old[1]
            tensor.shape = [1, height * factor, width * factor, tensor.shape[3]]
    return Graph(graph.model)


@pytest.mark.parametrize("tile", ["banana", (0, 4), (1, 2, 3)])
def test_no_tile(pictures, tmp_path, tile):
    with pytest.raises(WrongArgument, match="tile"):
        export.save(
            network(),
            tmp_path / "x.tflite",
            target="ethos-u85-256",
            precision="int8",
            calibration=pictures[:1],
            input_shape=(64, 96),
            tile=tile,
        )


# ---------------------------------------------------------------------------------------------- what is refused


def test_free_sizes_are_refused(pictures, tmp_path):
    with pytest.raises(WrongArgument, match="fixed sizes"):
        export.save(network(), tmp_path / "x.tflite", target="ethos-u55-64", precision="int8", calibration=pictures)


def test_float_is_refused(pictures, tmp_path):
    """Vela takes a float file and leaves all of it to the CPU, with exit code 0."""
    with pytest.raises(UnknownName, match="float32"):
        export.save(network(), tmp_path / "x.tflite", target="ethos-u55-64", precision="float32", input_shape=(64, 96))


def unsupported_model() -> tuple[keras.Model, np.ndarray]:
    """Enlarges by three, bilinearly: the NPUs know powers of two only."""
    layers = [
        keras.Input((12, 16, 3)),
        L.Conv2D(8, 3, activation="relu", name="before"),
        L.UpSampling2D(3, interpolation="bilinear", name="enlarge"),
        L.Conv2D(4, 3, name="after"),
    ]
    model = keras.Sequential(layers, name="unsupported")
    return model, np.random.default_rng(0).random((3, 12, 16, 3), dtype=np.float32)


def test_an_operator_on_the_cpu_is_refused_by_name(tmp_path):
    model, data = unsupported_model()
    path = tmp_path / "x.tflite"
    options = {"target": "ethos-u55-128", "precision": "int8", "calibration": data}
    with pytest.raises(UnsupportedLayer, match=r"enlarge.*RESIZE_BILINEAR") as caught:
        export.save(model, path, **options)
    assert "allow_cpu=True" in str(caught.value)
    assert not path.exists()
    report = export.save(model, path, **options, allow_cpu=True)
    assert report.npu["cpu_ops"] == 1
    assert any("RESIZE_BILINEAR" in note for note in report.notes)


def test_a_file_of_which_nothing_is_on_the_npu_is_refused(quantised):
    """What Vela writes, with exit code 0, for a float file or one of free size: the file that it was given."""
    left = ethos_u._left_to_cpu(quantised)
    with pytest.raises(UnsupportedLayer, match="nothing of this model"):
        ethos_u._check_coverage(left, quantised, vela.check_system("ethos-u55-64"), allow_cpu=True)


def test_a_classifier(tmp_path):
    """Inverted residuals with squeeze-and-excite compile as they are."""
    keras.utils.set_random_seed(1)
    image = keras.Input((32, 32, 3), name="image")
    x = L.Conv2D(8, 3, strides=2, padding="same", activation="relu6")(image)
    y = L.Conv2D(32, 1, activation="relu6")(x)
    y = L.DepthwiseConv2D(3, padding="same", activation="relu6")(y)
    gate = L.GlobalAveragePooling2D(keepdims=True)(y)
    gate = L.Conv2D(32, 1, activation="sigmoid")(L.Conv2D(8, 1, activation="relu")(gate))
    x = L.Add()([x, L.Conv2D(8, 1)(L.Multiply()([y, gate]))])
    model = keras.Model(image, L.Dense(5, activation="softmax")(L.GlobalAveragePooling2D()(x)), name="classifier")
    data = np.random.default_rng(0).random((4, 32, 32, 3), dtype=np.float32)
    report = export.save(
        model, tmp_path / "c.tflite", target="ethos-u55-128", precision="int8", calibration=data, tile=None
    )
    assert report.npu["cpu_ops"] == 0
    assert report.npu["tiles"] == 1


@pytest.mark.parametrize(("between", "candidates"), [("nothing", 1), ("an addition", 2)])
def test_prelus_are_tried_in_every_way_that_rounds_least(between, candidates, pictures, tmp_path):
    """Behind a convolution, as it is or as two convolutions; else as it is or as a depthwise convolution."""
    keras.utils.set_random_seed(4)
    image = keras.Input((64, 96, 1), name="y")
    x = L.Conv2D(16, 3, padding="same")(image)
    x = x if between == "nothing" else L.Add()([x, image])
    act = L.PReLU(shared_axes=[1, 2], name="act")
    model = keras.Model(image, ops.depth_to_space(L.Conv2D(4, 3, padding="same")(act(x)), 2), name="with_prelu")
    act.set_weights([np.random.default_rng(0).uniform(0, 0.5, (1, 1, 16))])
    messages: list[str] = []
    report = export.save(
        model,
        tmp_path / "p.tflite",
        target="ethos-u85-2048",
        precision="int8",
        calibration=pictures,
        on_progress=messages.append,
    )
    assert sum("compiling" in message for message in messages) == candidates
    assert report.npu["cpu_ops"] == 0
    assert candidates == 2 or "prelu-as-relu" not in report.lowerings
