"""`keras-efficient advise` on a model with a large and a small table, and on one of convolutions."""

from __future__ import annotations

import json

import numpy as np
import pytest

from .conftest import program


@pytest.fixture(scope="module")
def ranker_file(tmp_path_factory):
    import keras
    from keras import layers

    keras.utils.set_random_seed(2)
    ids = keras.Input((4,), dtype="int32", name="ids")
    x = [layers.Embedding(3000, 12, mask_zero=True, name="items")(ids), layers.Embedding(20, 12, name="days")(ids)]
    model = keras.Model(ids, layers.Dense(1)(layers.GlobalAveragePooling1D()(layers.Add()(x))), name="ranker")
    path = tmp_path_factory.mktemp("advise") / "ranker.keras"
    model.save(path)
    return path


def test_the_tables_and_what_they_could_be(ranker_file):
    done = program("advise", ranker_file, "--embedding", "-v")
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["items", "3,000", "12", "144,000", "99.3%", "see", "below"] in lines
    assert ["days", "20", "12", "960", "0.7%", "not", "worth", "it", "(under", "64", "KiB)"] in lines
    # of 12 floats, one stays for each entity as published
    assert any(line[:4] == ["items", "16×", "scaled", "32"] and "impossible:" in line for line in lines)
    tried = [line for line in lines if line[:4] == ["items", "16×", "subspace", "2"]]
    assert len(tried) == 1
    assert 0 < float(tried[0][-2]) < 1
    assert tried[0][-1] == "3,000"
    assert "items: subspace, 2 bits, 16×" in done.stderr, "progress"


def test_json_is_one_document(ranker_file):
    done = program("advise", ranker_file, "--embedding", "--json")
    values = json.loads(done.stdout)
    assert (values["model"], values["applied"]) == (str(ranker_file), None)
    assert values["nbytes"] == 4 * (3020 * 12 + 13)
    items, days = values["tables"]
    assert (items["path"], items["worth_it"]) == ("items", True)
    assert (days["path"], days["worth_it"], days["settings"]) == ("days", False, [])
    assert {setting["compression"] for setting in items["settings"]} == {4, 12, 16, 40}
    for setting in items["settings"]:
        if setting["nbytes"] is None:
            assert setting["compression"] > setting["largest"]
        else:
            assert setting["nbytes"] <= 144_000 / setting["compression"]
            assert 0 <= setting["table_error"] <= 1
            assert setting["sampled"] == 3000
    assert done.stderr == "", done.stderr


def test_apply_writes_a_model_that_loads_and_trains(ranker_file, tmp_path):
    import keras

    import keras_efficient.layers  # noqa: F401 - registers what the file holds

    path = tmp_path / "small.keras"
    path.write_text("in the way")
    kept = program("advise", ranker_file, "--embedding", "--apply", path, spy=True)
    assert kept.returncode == 1
    assert "exists already" in kept.stderr
    assert "keras" not in kept.imported, "refused before the work"
    assert path.read_text() == "in the way"
    options = ("--compression", "8", "--form", "scaled", "--force", "--json")
    done = program("advise", ranker_file, "--embedding", "--apply", path, *options)
    assert done.returncode == 0, done.stderr
    applied = json.loads(done.stdout)["applied"]
    assert (applied["replaced"], applied["left"]) == (["items"], ["days"])
    assert applied["nbytes_before"] == 4 * (3020 * 12 + 13)
    assert applied["nbytes_after"] <= 144_000 / 8 + 4 * (20 * 12 + 13)
    assert applied["ratio"] == pytest.approx(applied["nbytes_before"] / applied["nbytes_after"])
    assert applied["file_nbytes"] == path.stat().st_size
    assert list(tmp_path.iterdir()) == [path]
    model = keras.saving.load_model(path)
    layer = model.get_layer("items")
    assert (layer.form, layer.bits, layer.plan.scalar_bits, layer.mask_zero) == ("scaled", 8, 8, True)
    assert len(layer.trainable_weights) == 2
    assert np.isfinite(model.predict(np.ones((2, 4), "int32"), verbose=0)).all()


def test_apply_tells_people_what_to_do_next(ranker_file, tmp_path, capsys):
    from keras_efficient.cli.advise import _apply

    _apply(str(ranker_file), tmp_path / "small.keras", {}, force=False)
    words = " ".join(capsys.readouterr().out.split())
    assert "replaced items left as they are days" in words
    assert "145,012 before" in words
    assert "nothing was trained since" in words
    assert "--freeze" in words


def test_apply_with_counts_writes_the_small_integers(ranker_file, tmp_path):
    import keras

    import keras_efficient.layers  # noqa: F401 - registers what the file holds

    np.save(tmp_path / "counts.npy", 1 / np.arange(1, 3001))
    options = ("--freeze", "--counts", "items=counts.npy", "--json")
    done = program("advise", ranker_file, "--embedding", "--apply", "small.keras", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    layer = keras.saving.load_model(tmp_path / "small.keras").get_layer("items")
    assert layer.frozen
    assert not layer.trainable_weights
    assert json.loads(done.stdout)["applied"]["file_nbytes"] < 145_012 / 2
    flat = program("advise", ranker_file, "--embedding", "--apply", "flat.keras", "--freeze", cwd=tmp_path)
    assert flat.returncode == 0, flat.stderr
    flat = keras.saving.load_model(tmp_path / "flat.keras").get_layer("items")
    whole = keras.saving.load_model(ranker_file).get_layer("items").embeddings
    error = [np.square(x.embeddings()[:30] - whole[:30]).sum() for x in (layer, flat)]
    assert error[0] < error[1], "frequent ids lose less"


@pytest.mark.parametrize(
    ("layer", "counts", "words"),
    [
        ("items", np.ones(7), "one number for each of 3000"),
        ("items", np.full(3000, -1.0), "not negative"),
        ("nobody", np.ones(3000), "nobody"),
    ],
)
def test_counts_that_fit_no_table(ranker_file, tmp_path, layer, counts, words):
    np.save(tmp_path / "c.npy", counts)
    options = ("--embedding", "--apply", "small.keras", "--counts", f"{layer}=c.npy")
    done = program("advise", ranker_file, *options, cwd=tmp_path)
    assert done.returncode in (1, 2)
    assert words in " ".join(done.stderr.replace("│", "").split())
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["c.npy"]


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["m.keras"], 2, "--embedding"),
        (["sesr-m5x2", "--embedding"], 2, "Unknown model: 'sesr-m5x2'"),
        (["missing.keras", "--embedding"], 1, "missing.keras: no such file"),
        (["m.keras", "--embedding", "--target", "cuda-sm90a"], 2, "either --embedding or --target"),
        (["m.keras", "--target", "cuda-sm91"], 2, "Unknown target of advice: 'cuda-sm91'"),
        (["m.keras", "--target", "onnx"], 2, "Known: cuda-sm80"),
        (["missing.keras", "--target", "cuda-sm90a"], 1, "missing.keras: no such file"),
        (["m.keras", "--target", "cuda-sm90a", "--input-shape", "big"], 2, "'big' is no size"),
        (["m.keras", "--target", "cuda-sm90a", "--apply", "a.keras"], 2, "--apply belongs to --embedding"),
        (["m.keras", "--target", "cuda-sm90a", "--bits", "2"], 2, "--bits belongs to --apply"),
        (["m.keras", "--embedding", "--input-shape", "64x64"], 2, "--input-shape belongs to --target"),
        (["m.keras", "--embedding", "--bits", "2"], 2, "--bits belongs to --apply"),
        (["m.keras", "--embedding", "--force"], 2, "--force belongs to --apply"),
        (["m.keras", "--embedding", "--freeze"], 2, "--freeze belongs to --apply"),
        (["m.keras", "--embedding", "--apply", "a.keras", "--counts", "c.npy"], 2, "is not LAYER=FILE.npy"),
        (["m.keras", "--embedding", "--apply", "a.keras", "--counts", "x=c.npy"], 1, "c.npy: no such file"),
        (["m.keras", "--embedding", "--apply", "a.keras", "--bits", "3"], 2, "not 3"),
        (["m.keras", "--embedding", "--apply", "a.keras", "--form", "flat"], 2, "flat"),
        (["m.keras", "--embedding", "--apply", "a.tflite"], 2, "ends in .keras"),
        (["m.keras", "--embedding", "--apply", "m.keras", "--force"], 2, "is the input itself"),
        (["m.keras", "--embedding", "--apply", "nowhere/a.keras"], 1, "no such folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_errors_are_found_before_keras_is_imported(tmp_path, arguments, status, words):
    (tmp_path / "m.keras").write_bytes(b"not looked at")
    done = program("advise", *arguments, cwd=tmp_path, spy=True)
    assert done.returncode == status, done.stderr
    assert words in " ".join(done.stderr.replace("│", "").split())
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert "keras" not in done.imported
    assert [path.name for path in tmp_path.iterdir()] == ["m.keras"]


def test_what_would_suit_a_gpu(keras_file, capsys):
    pytest.importorskip("onnxscript", reason="advice for GPUs needs the extra gpu")
    done = program("advise", keras_file, "--target", "cuda-sm90a", "--input-shape", "64x96", "--json")
    assert done.returncode == 0, done.stderr
    values = json.loads(done.stdout)
    assert (values["model"], values["target"]) == (str(keras_file), "cuda-sm90a")
    assert values["sizes"] == {"y": [1, 64, 96, 1]}
    relus = [one for one in values["advice"] if one["kind"] == "activation"]
    assert len(relus) == 3
    for one in relus:
        assert one["what"].startswith("relu: ")
        assert one["gain"]["low_ms"] < one["gain"]["high_ms"] == 0
        assert one["gain"]["basis"] == "estimated"
    from keras_efficient.cli.advise import _advise_gpu

    _advise_gpu(str(keras_file), "cuda-sm90a", (64, 96))
    table = capsys.readouterr().out
    assert table.split()[:4] == ["layer", "about", "advice", "time"]
    assert relus[0]["layer"] in "".join(table.split())
    assert "not measured" in table


def test_advice_for_a_gpu_needs_a_size(keras_file):
    pytest.importorskip("onnxscript", reason="advice for GPUs needs the extra gpu")
    done = program("advise", keras_file, "--target", "cuda-sm90a")
    assert done.returncode == 2
    assert "--input-shape" in done.stderr
    assert done.stdout == ""


def test_a_model_without_tables(keras_file):
    done = program("advise", keras_file, "--embedding")
    assert done.returncode == 2
    assert f"{keras_file}: has no embedding table" in done.stderr
    assert done.stdout == ""


def test_help_imports_no_keras():
    done = program("advise", "--help", spy=True)
    assert "--embedding" in done.stdout
    assert "--target" in done.stdout
    assert not {"keras", "numpy", "tensorflow", "yaml"} & done.imported
