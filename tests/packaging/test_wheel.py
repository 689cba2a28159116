"""The wheel: what is in it, and that it works from a folder where no checkout is near."""

from __future__ import annotations

import configparser
import shutil
import subprocess
import sys
import zipfile

import pytest


@pytest.fixture(scope="module")
def wheel(repo_root, tmp_path_factory):
    """Built from a copy: setuptools would take in what an earlier build/ holds."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in ("keras_efficient", "zoo", "export"):
        shutil.copytree(repo_root / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(repo_root / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*command, "--no-build-isolation", "--wheel-dir", str(folder), str(source)], check=True)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def names(wheel):
    with zipfile.ZipFile(wheel) as file:
        return file.namelist()


def test_one_top_level_name(names):
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"keras_efficient"}


def test_every_listed_package_is_in_it(names, repo_root):
    parser = configparser.ConfigParser()
    parser.read(repo_root / "setup.cfg", "utf-8")
    for package in parser["options"]["packages"].split():
        assert f"{package.replace('.', '/')}/__init__.py" in names


def test_every_source_file_and_nothing_else(names, repo_root):
    ours = {path.relative_to(repo_root).as_posix() for path in (repo_root / "keras_efficient").rglob("*.py")}
    for folder in ("zoo", "export"):
        paths = (repo_root / folder).rglob("*.py")
        ours |= {f"keras_efficient/{path.relative_to(repo_root).as_posix()}" for path in paths}
    assert {name for name in names if name.endswith(".py")} == ours
    assert not [name for name in names if "test" in name.split("/")]
    assert not [name for name in names if "conftest" in name]


def test_data_files_are_in_it(names, repo_root):
    assert "keras_efficient/py.typed" in names
    for folder in ("cards", "weights"):
        for path in (repo_root / "zoo" / folder).iterdir():
            if not path.name.startswith("."):
                assert f"keras_efficient/zoo/{folder}/{path.name}" in names
    assert any(name.endswith("/LICENSE") for name in names)
    assert any(name.endswith("/entry_points.txt") for name in names)


def test_it_works_outside_of_the_checkout(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as file:
        file.extractall(tmp_path / "site")
    code = """if True:
        import sys
        sys.path.insert(0, sys.argv[1])
        import keras_efficient
        from keras_efficient import export, superres, zoo
        for module in (keras_efficient, export, superres, zoo):
            assert module.__file__.startswith(sys.argv[1]), module.__file__
        assert len(keras_efficient.__path__) == 1     # the hook for checkouts kept still
        for name in zoo.list_models():
            zoo.card(name)
        assert "tflite" in export.targets
        for bare in ("zoo", "export"):
            try:
                __import__(bare)
            except ImportError:
                continue
            raise SystemExit(f"bare {bare} can be imported")
    """
    subprocess.run([sys.executable, "-P", "-c", code, str(tmp_path / "site")], check=True, cwd=tmp_path)
