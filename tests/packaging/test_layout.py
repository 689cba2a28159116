"""What holds for the source tree: lists that must agree with folders, imports that must not happen."""

from __future__ import annotations

import ast
import configparser
import importlib.util
import re
import subprocess
import sys

import pytest

SOURCES = ("keras_efficient", "zoo", "export", "examples", "benchmarks", "tests")


@pytest.fixture(scope="module")
def setup(repo_root):
    parser = configparser.ConfigParser()
    parser.read(repo_root / "setup.cfg", "utf-8")
    return parser


def packages_in(root):
    """Import names of all folders with Python files below the three source folders."""
    for folder, name in (("keras_efficient", ""), ("zoo", "keras_efficient."), ("export", "keras_efficient.")):
        for path in sorted((root / folder).rglob("*.py")):
            yield name + ".".join(path.parent.relative_to(root).parts)


def test_setup_cfg_lists_every_package(setup, repo_root):
    listed = setup["options"]["packages"].split()
    assert len(listed) == len(set(listed))
    assert set(listed) == set(packages_in(repo_root))


def test_every_package_has_an_init(repo_root):
    for folder in ("keras_efficient", "zoo", "export"):
        for path in (repo_root / folder).rglob("*.py"):
            assert (path.parent / "__init__.py").is_file(), path.parent


def test_the_lock_has_what_setup_cfg_needs(setup, repo_root):
    import re

    locked = {
        re.split("[=<> ;]", line)[0].lower().replace("_", "-")
        for line in (repo_root / "requirements.lock").read_text().splitlines()
        if line and not line.startswith(("#", " "))
    }
    # `cutlass` is for users who want it: tests of it skip without nvcc and headers, of 300 MB.
    offered = {name: text for name, text in setup["options.extras_require"].items() if name != "cutlass"}
    extras = [line for text in offered.values() for line in text.splitlines()]
    needed = {
        re.split("[=<>![]", line)[0].strip().lower().replace("_", "-")
        for line in [*setup["options"]["install_requires"].splitlines(), *extras]
        if line.strip()
    }
    assert needed <= locked


def test_no_file_imports_bare_zoo_or_export(repo_root):
    """In the root they would be second copies of keras_efficient.zoo and keras_efficient.export."""
    for folder in SOURCES:
        for path in (repo_root / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom) and node.level == 0:
                    names = [node.module]
                assert not {name.split(".")[0] for name in names} & {"zoo", "export"}, f"{path}:{node.lineno}"


def test_importing_the_package_is_light():
    code = """if True:
        import sys
        import keras_efficient
        from keras_efficient import errors, export, superres, zoo
        heavy = {"keras", "tensorflow", "jax", "onnx", "onnxruntime", "ai_edge_litert", "PIL"} & set(sys.modules)
        assert not heavy, heavy
        assert not [name for name in ("keras_efficient.nothing",) if name in sys.modules]
        try:
            keras_efficient.nothing
        except AttributeError as error:
            assert "nothing" in str(error)
        else:
            raise SystemExit("an unknown attribute was found")
    """
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_sets_no_environment_variable():
    """Keras' backend and h5py set some of their own; ours adds none."""
    code = """if True:
        import os
        import keras
        before = dict(os.environ)
        from keras_efficient import compress, deploy, export, layers, models, superres, zoo
        assert dict(os.environ) == before, set(os.environ) ^ set(before)
    """
    subprocess.run([sys.executable, "-c", code], check=True)


def test_version_agrees(repo_root):
    import keras_efficient

    version = keras_efficient.__version__
    assert f"version: {version}" in (repo_root / "CITATION.cff").read_text()
    assert f"## [{version}]" in (repo_root / "CHANGELOG.md").read_text()


def test_readme_snippets_are_python_and_name_what_exists(repo_root):
    blocks = re.findall(r"```python\n(.*?)```", (repo_root / "README.md").read_text("utf-8"), re.DOTALL)
    assert len(blocks) >= 3
    for block in blocks:
        imports = [node for node in ast.parse(block).body if isinstance(node, (ast.Import, ast.ImportFrom))]
        exec("\n".join(ast.unparse(node) for node in imports), {})  # our own README


def test_tables_of_the_readme_agree_with_the_results(repo_root):
    spec = importlib.util.spec_from_file_location("benchmarks_tables", repo_root / "benchmarks" / "tables.py")
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    found = []
    for path in (repo_root / "README.md", *(repo_root / "docs").glob("*.md")):
        text = path.read_text("utf-8")
        assert tables.filled(text, repo_root / "benchmarks" / "results") == text
        found += re.findall(r"<!-- table:(\w+) -->", text)
    assert {"sesr", "bolt", "bolt_short"} <= set(found)
    row = {"what": "w", "ours": 37.4, "unit": "dB", "peer": None, "ratio": None, "bar": "≥ 40", "reached": False}
    assert "| w | 37.4 dB |  |  | ≥ 40 | **no**: short |" in tables.table([{**row, "why": "short"}])
    networks = [
        {**row, "what": f"{name}: time", "ours": ours, "reached": ours < 9} for name, ours in (("a", 7), ("b", 9.5))
    ]
    unknown = [{**row, "reached": None, "why": "no GPU"}] * 3
    short = tables.short_table([*networks, {**row, "bar": ""}, *unknown]).splitlines()[2:]
    assert short == ["| time | 2 | 7 dB to 9.5 dB | ≥ 40 | **1** |", "| other bars | 3 |  |  | not measured: no GPU |"]
