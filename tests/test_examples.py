"""The examples run to their end, on less than their usual input."""

from __future__ import annotations

import importlib.util

import pytest

from keras_efficient import export


def load(path):
    spec = importlib.util.spec_from_file_location(f"example_{path.stem}", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    return example


def test_memcom(repo_root, tmp_path, capsys):
    scores = load(repo_root / "examples" / "memcom.py").main(tmp_path, users=400, items=2000, epochs=12)
    assert (tmp_path / "query.tflite").stat().st_size < 60_000  # the whole table alone would take 512,000
    assert all(score > 0.04 for score in scores.values())  # at random: 20 of 2000 items, about 0.01
    assert "query.tflite" in capsys.readouterr().out


def test_sesr(repo_root, tmp_path, capsys):
    report = load(repo_root / "examples" / "sesr.py").main(tmp_path, "ethos-u85-256", (64, 96))
    assert report.npu["cpu_ops"] == 0
    assert report.bytes == (tmp_path / "sesr-m5-x2-ethos-u85-256.tflite").stat().st_size
    assert {path.name for path in tmp_path.iterdir()} >= {"chelsea-x2.png", "before-after.png"}
    printed = capsys.readouterr().out
    scores = {line.split(":")[0]: float(line.split()[1]) for line in printed.splitlines() if "PSNR" in line}
    assert scores["SESR"] > scores["bicubic"] + 0.5
    assert report.target in export.targets


def test_halos(repo_root, tmp_path, capsys):
    found = load(repo_root / "examples" / "halos.py").main(tmp_path, classes=3000, points=15_000, epochs=4, budget=0.06)
    assert found["share"] <= 0.06
    assert found["P@1 of candidates"] > 0.9 * found["P@1 of all classes"] > 0.3
    assert {path.name for path in tmp_path.iterdir()} == {"all-classes.tflite", "candidates.tflite"}
    assert "the first point is of class" in capsys.readouterr().out


def test_accmpeg(repo_root, tmp_path, capsys):
    found = load(repo_root / "examples" / "accmpeg.py").main(tmp_path, frames=40, steps=60, step=6)
    assert set(found) == {"uniform", "defaults", "camera"}
    assert all(count > 1000 for count in found.values())
    assert found["camera"] < found["uniform"]
    assert {path.name for path in tmp_path.iterdir()} == {"camera.tflite", "signs-1.mp4", "signs-2.mp4"}
    assert "rank correlation" in capsys.readouterr().out


def test_ursabench(repo_root, tmp_path, capsys):
    scores = load(repo_root / "examples" / "ursabench.py").main(tmp_path, epochs=8)
    assert set(scores) == {"MAP", "ensemble of 5", "cyclic SGHMC", "SWAG", "last-layer Laplace", "file"}
    assert all(found["error"] < 0.06 for found in scores.values())
    assert abs(scores["file"]["error"] - scores["ensemble of 5"]["error"]) <= 0.005
    assert scores["MAP"]["noise"] > 0.9
    assert [path.name for path in tmp_path.iterdir()] == ["digits-ensemble.tflite"]
    assert "the digit that it doubts most" in capsys.readouterr().out


def test_bolt(repo_root, tmp_path, capsys):
    pytest.importorskip("cuda.bindings", reason="kernels need the extra gpu")
    found = load(repo_root / "examples" / "bolt.py").main(tmp_path, (270, 480), "cuda-sm80")
    assert found["error"] < 2e-3
    assert found["sqnr_db"] > 50
    assert (tmp_path / "sesr-m5-x2-cuda-sm80.bolt").stat().st_size < 2**21
    assert list(tmp_path.glob("strip_*.cu"))
    assert "lines to read" in capsys.readouterr().out
