"""What holds for every command: help, imports, exit status, where output goes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest
import typer

import keras_efficient

from .conftest import program

HELPS = [[], ["zoo"], ["zoo", "list"], ["zoo", "show"], ["export"], ["upscale"], ["bench"], ["env"], ["advise"]]
HELPS += [["video"], ["video", "certs"], ["video", "serve"], ["video", "stream"]]
# typer, rich, and what these import (typer checks values by pydantic, rich looks for attrs).
ALLOWED = {
    "typer",
    "rich",
    "annotated_doc",
    "annotated_types",
    "attr",
    "markdown_it",
    "mdurl",
    "pydantic",
    "pydantic_core",
    "pygments",
    "shellingham",
    "typing_extensions",
    "typing_inspection",
}
HEAVY = {"keras", "tensorflow", "jax", "numpy", "PIL", "yaml", "h5py", "onnx", "onnxruntime", "ai_edge_litert", "pooch"}


@pytest.mark.parametrize("command", HELPS, ids=" ".join)
def test_help_imports_typer_and_rich_only(command):
    done = program(*command, "--help", spy=True)
    assert done.returncode == 0
    assert "Usage" in done.stdout
    ours = {"keras_efficient", "__main__", "_virtualenv", "_distutils_hack", "sitecustomize", "usercustomize"}
    foreign = {
        name
        for name in done.imported - ALLOWED - ours - sys.stdlib_module_names
        if not name.startswith(("__editable__", "_sysconfigdata", "__mp_main__"))
    }
    assert foreign == set()


@pytest.mark.parametrize("command", [["env"], ["zoo", "list"], ["--version"]], ids=" ".join)
def test_light_commands_import_no_keras(command):
    done = program(*command, spy=True)
    assert done.returncode == 0
    assert not (HEAVY - {"yaml"}) & done.imported


def test_version():
    assert program("--version").stdout == f"keras-efficient {keras_efficient.__version__}\n"


def test_env_as_json(tmp_path):
    done = program("env", "--json", KERAS_EFFICIENT_HOME=str(tmp_path), KERAS_EFFICIENT_OFFLINE="1")
    values = json.loads(done.stdout)
    assert values["cache"] == str(tmp_path)
    assert values["variables"]["KERAS_EFFICIENT_OFFLINE"] == "1"
    assert values["packages"]["keras"][0] == "3"
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["nonsense"], 2, "nonsense"),
        (["zoo", "show", "sesr-m5x2"], 2, "Unknown model: 'sesr-m5x2'"),
        (["export", "sesr-m5x2", "-o", "a.tflite"], 2, "Unknown model"),
        (["export", "missing.keras", "-o", "a.tflite"], 1, "missing.keras: no such file"),
        (["export", "m.keras", "-o", "a.tflite", "--target", "tflit"], 2, "Did you mean 'tflite'"),
        (["export", "m.keras", "-o", "a.tflite", "--precision", "int9"], 2, "Did you mean 'int8'"),
        (["export", "m.keras", "-o", "a.tflite", "--precision", "int8"], 2, "--calibration"),
        (["export", "m.keras", "-o", "a.xyz"], 2, ".xyz"),
        (["export", "m.keras", "-o", "nowhere/a.tflite"], 1, "folder"),
        (["export", "m.keras", "-o", "a.tflite", "--input-shape", "12y"], 2, "1080x1920"),
        (["export", "m.keras"], 2, "-o OUT"),
        (["export", "empty.keras", "-o", "a.tflite"], 1, "empty (0 bytes)"),
        (["export", "text.txt", "-o", "a.tflite"], 1, "no .keras file"),
        (["upscale", "missing.png", "-o", "a.png"], 1, "missing.png: no such file"),
        (["upscale", "text.txt", "-o", "text.txt"], 2, "is the input itself"),
        (["upscale", "text.txt", "-o", "a.png", "--model", "missing.tflite"], 1, "missing.tflite"),
        (["upscale", "text.txt", "-o", "a.png", "--model", "empty.tflite"], 1, "empty.tflite"),
        (["upscale", "text.txt", "-o", "a.png", "--tile", "big"], 2, "big"),
        (["upscale", "text.txt", "-o", "a.png", "--tile", "²x3"], 2, "²x3"),
        (["upscale", "text.txt", "-o", "a.png", "--tile", "²"], 2, "no size"),
        (["upscale", "photos/a.png", "-o", "photos", "--force"], 2, "photos/a.png is the input itself"),
        (["upscale", "photos/a.png", "more/a.png", "-o", "out"], 2, "photos/a.png and more/a.png would both become"),
        (["upscale", "text.txt", "-o", "empty.tflite"], 1, "--force"),
        (["bench", "missing.tflite"], 1, "missing.tflite"),
        (["bench", "missing.onnx"], 1, "missing.onnx"),
        (["bench", "missing.bolt"], 1, "missing.bolt: no such file"),
        (["bench", "made.bolt"], 1, "made.bolt: was exported for a GPU; this command cannot use it."),
        (["upscale", "text.txt", "-o", "a.png", "--model", "made.bolt"], 1, "export.bolt.runtime.load runs it there"),
        (["export", "made.engine", "-o", "a.onnx"], 1, "made.engine: was exported for a GPU"),
        (["advise", "made.bolt", "--target", "cuda-sm90a"], 1, "made.bolt: was exported for a GPU"),
        (["export", "m.keras", "-o", "a.bolt", "--tune", "-1"], 2, "Error: --tune -1: give seconds, 0 or more."),
        (["export", "m.keras", "-o", "a.bolt", "--tune=nan"], 2, "--tune nan: give seconds"),
        (["export", "m.keras", "-o", "a.bolt", "--tune=inf"], 2, "--tune inf: give seconds"),
        (["export", "m.keras", "-o", "a.onnx", "--tune", "3"], 2, "Unknown option of target 'onnx': 'tune'."),
        (["export", "m.keras", "-o", "a.onnx", "--option", "opsets=17"], 2, "Did you mean 'opset'?"),
        (["export", "m.keras", "-o", "a.onnx", "--option", "opset"], 2, "--option opset: is not NAME=VALUE."),
        (["export", "m.keras", "-o", "a.onnx", "--option", "a=1", "--option", "a=2"], 2, "--option a is given twice"),
        (["export", "m.keras", "-o", "a.bolt", "--option", "tune=1", "--tune", "1"], 2, "--tune are the same"),
        (["export", "--list-targets", "--target", "tensort"], 2, "Did you mean 'tensorrt'?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_errors_are_short_and_have_a_status(tmp_path, arguments, status, words):
    (tmp_path / "empty.keras").touch()
    (tmp_path / "empty.tflite").touch()
    for suffix in ("bolt", "engine"):
        (tmp_path / f"made.{suffix}").write_bytes(b"not looked at")
    (tmp_path / "text.txt").write_text("text")
    for folder in ("photos", "more"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.png").write_bytes(b"not looked at")
    before = sorted(tmp_path.rglob("*"))
    done = program(*arguments, cwd=tmp_path)
    assert done.returncode == status, done.stderr
    assert words in " ".join(done.stderr.replace("│", "").split())
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) <= 7, "a usage error has typer's box, others two lines"
    assert done.stdout == ""
    assert sorted(tmp_path.rglob("*")) == before


def test_debug_shows_the_traceback_wherever_it_stands(tmp_path):
    for arguments in (["--debug", "zoo", "show", "nothing"], ["zoo", "show", "nothing", "--debug"]):
        done = program(*arguments, cwd=tmp_path)
        assert done.returncode == 2
        assert "Traceback" in done.stderr
        assert "Unknown model" in done.stderr


def test_json_errors_leave_stdout_empty(tmp_path):
    done = program("zoo", "show", "nothing", "--json", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")


def test_targets_are_listed():
    targets = {row["name"]: row for row in json.loads(program("export", "--list-targets", "--json").stdout)}
    assert "int8" in targets["tflite"]["precisions"]
    assert targets["onnx"]["suffix"] == ".onnx"
    assert "tflite" in program("export", "--list-targets").stdout
    options = program("export", "--list-targets", "--target", "tensorrt").stdout
    assert options.split()[:4] == ["option", "default", "choices", "what"]
    assert '"tensorrt" "rtx"' in options
    (one,) = json.loads(program("export", "--list-targets", "--target", "cuda-sm80", "--json").stdout)
    assert set(one["options"]) == {"tune", "shared_kb", "tune_cache"}


def test_options_are_read():
    from keras_efficient.cli import parse

    assert parse.options(None) == {}
    given = ["opset=17", "runtime=rtx", "timing-cache=a=b", 'profile={"y": [[1, 2]]}', "wide=true"]
    expected = {"opset": 17, "runtime": "rtx", "timing_cache": "a=b", "profile": {"y": [[1, 2]]}, "wide": True}
    assert parse.options(given) == expected


def test_sizes_are_read():
    from keras_efficient.cli import parse

    assert parse.shape(None) is None
    assert parse.shape("1080x1920") == (1080, 1920)
    assert parse.shape("ids=64, weights=64") == {"ids": (64,), "weights": (64,)}
    with pytest.raises(typer.BadParameter, match="two inputs' as a=64,b=8"):
        parse.shape("ids=,weights=64")
    for text in ("a=64,a=8", "=64", "a=3,4"):
        with pytest.raises(typer.BadParameter, match="each input's name and size once"):
            parse.shape(text)


def test_json_keeps_stdout_clean_whoever_prints():
    """Compilers write to descriptor 1 itself."""
    code = """if True:
        import os, sys
        from keras_efficient.cli.output import out
        out.begin(as_json=True)
        print("from Python")
        os.write(1, b"from C")
        out.record({"a": 1})
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == {"a": 1}
    assert "from Python" in done.stderr
    assert "from C" in done.stderr


def test_hushed_output_is_shown_when_the_work_fails():
    code = """if True:
        import os
        from keras_efficient.cli.output import out
        with out.hushed():
            os.write(2, b"chatter")
        with out.hushed():
            os.write(2, b"reason")
            raise RuntimeError
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "reason" in done.stderr
    assert "chatter" not in done.stderr


def test_zoo_list_and_show(tmp_path):
    rows = json.loads(program("zoo", "list", "--json").stdout)
    assert isinstance(rows, list)
    assert [row["name"] for row in rows] == list(dict.fromkeys(row["name"] for row in rows))
    name = rows[0]["name"]
    assert name in program("zoo", "list").stdout
    assert json.loads(program("zoo", "show", name, "--json").stdout)["name"] == name
    assert program("zoo", "show", name, "--format", "hub").stdout.startswith("---\nlicense:")
    assert program("zoo", "show", name, "--format", "arm").stdout.startswith("description:")
    assert "limits" in program("zoo", "show", name).stdout


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize(
    "ending",
    [
        "raise TypeError('without the result')",
        "raise errors.UnsupportedLayer('a', 'an error that was made one of ours')",
        "out.detail('the next step')",
        "pass",  # the block ends well
    ],
)
def test_a_ctrl_c_that_native_code_lost_is_a_ctrl_c(ending):
    """What comes up is another error, or nothing; a traceback was printed by then."""
    code = """if True:
        import ctypes, os, signal, sys
        from keras_efficient import errors
        from keras_efficient.cli import app
        from keras_efficient.cli.output import out

        @ctypes.CFUNCTYPE(None)
        def called_from_c():
            os.kill(os.getpid(), signal.SIGINT)
            sum(range(10))

        @app.app.command()
        def work():
            with out.hushed():
                called_from_c()
                os.write(2, b"chatter")
                ENDING

        sys.argv = ["keras-efficient", "work"]
        app.main()
    """.replace("ENDING", ending)
    heeding = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, **heeding)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
