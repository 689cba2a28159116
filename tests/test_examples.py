"""The examples run to their end, on less than their usual input."""

from __future__ import annotations

import importlib.util

from keras_efficient import export


def test_sesr(repo_root, tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("example_sesr", repo_root / "examples" / "sesr.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    report = example.main(tmp_path, "ethos-u85-256", (64, 96))
    assert report.npu["cpu_ops"] == 0
    assert report.bytes == (tmp_path / "sesr-m5-x2-ethos-u85-256.tflite").stat().st_size
    assert {path.name for path in tmp_path.iterdir()} >= {"chelsea-x2.png", "before-after.png"}
    printed = capsys.readouterr().out
    scores = {line.split(":")[0]: float(line.split()[1]) for line in printed.splitlines() if "PSNR" in line}
    assert scores["SESR"] > scores["bicubic"] + 0.5
    assert report.target in export.targets
