"""Certificates: made, and refused for reasons that are named."""

from __future__ import annotations

import datetime
import stat

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from keras_efficient.errors import FileProblem, WrongArgument
from keras_efficient.video.transport import certificates as module
from keras_efficient.video.transport.certificates import checked, common_name, make_authority

from .helpers import certificates, files


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return certificates(tmp_path_factory.mktemp("certificates"), "cam1", "cam2")


def check(folder, name, **others):
    return checked(**{**files(folder, name), **others})


def test_what_is_made_is_taken(folder):
    for name in ("server", "cam1", "cam2"):
        own, _, _ = check(folder, name)
        assert common_name(own) == name
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.glob("*.key")} == {0o600}
    assert not list(folder.glob(".*"))


def test_nothing_is_overwritten_without_being_asked(folder, tmp_path):
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(FileProblem, match="exists already and is kept"):
        make_authority(folder, ["localhost"], ["cam3"])
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    make_authority(tmp_path, ["localhost"], ["cam1"])
    first = (tmp_path / "cam1.pem").read_bytes()
    make_authority(tmp_path, ["localhost"], ["cam1"], overwrite=True)
    assert (tmp_path / "cam1.pem").read_bytes() != first
    assert stat.S_IMODE((tmp_path / "cam1.key").stat().st_mode) == 0o600
    check(tmp_path, "cam1")


@pytest.mark.parametrize(
    ("servers", "cameras", "days"),
    [
        ([], ["a"], 1),
        (["x"], ["server"], 1),
        (["x"], ["a", "A"], 1),
        (["x"], ["../a"], 1),
        (["x"], ["a"], 0),
        (["é"], [], 1),
    ],
)
def test_names_and_days_that_are_none(tmp_path, servers, cameras, days):
    with pytest.raises(WrongArgument):
        make_authority(tmp_path, servers, cameras, days=days)
    assert not list(tmp_path.glob("server*"))


def shifted(monkeypatch, days):
    real = datetime.datetime

    class Shifted(real):
        @classmethod
        def now(cls, zone=None):
            return real.now(zone) + datetime.timedelta(days=days)

    monkeypatch.setattr(module.datetime, "datetime", Shifted)


def test_dates(folder, monkeypatch):
    with monkeypatch.context() as patch:
        shifted(patch, 400)
        with pytest.raises(FileProblem, match=r"cam1\.pem: expired on 20\d\d-.* UTC"):
            check(folder, "cam1")
    with monkeypatch.context() as patch:
        shifted(patch, -3)
        with pytest.raises(FileProblem, match=r"cam1\.pem: is not valid before (.|\n)*set the clock"):
            check(folder, "cam1")


def test_others(folder, tmp_path):
    foreign = certificates(tmp_path / "foreign", "cam1")
    with pytest.raises(FileProblem, match=r"cam1\.pem: is not signed by .*authority\.pem"):
        check(foreign, "cam1", authority=folder / "authority.pem")
    with pytest.raises(FileProblem, match=r"cam2\.key: is not the key of .*cam1\.pem"):
        check(folder, "cam1", key=folder / "cam2.key")
    with pytest.raises(FileProblem, match=r"is not signed by"):  # another camera is no authority
        check(folder, "cam1", authority=folder / "cam2.pem")
    with pytest.raises(FileProblem, match=r"none\.pem: no such file(.|\n)*video certs"):
        check(folder, "cam1", certificate=tmp_path / "none.pem")
    with pytest.raises(FileProblem, match="cannot be read"):
        check(folder, "cam1", authority=tmp_path)
    with pytest.raises(FileProblem, match="holds no private key"):
        check(folder, "cam1", key=folder / "cam1.pem")
    with pytest.raises(FileProblem, match="holds no certificate"):
        check(folder, "cam1", certificate=folder / "cam1.key")
    both = tmp_path / "both.pem"
    both.write_bytes((foreign / "authority.pem").read_bytes() + (folder / "authority.pem").read_bytes())
    check(folder, "cam1", authority=both)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_garbage(folder, tmp_path, data):
    """Only one kind of error comes out, whichever of the files is damaged, and however."""
    which = data.draw(st.sampled_from(["certificate", "key", "authority"]))
    text = bytearray(files(folder, "cam1")[which].read_bytes())
    if data.draw(st.booleans()):
        for _ in range(data.draw(st.integers(1, 20))):
            text[data.draw(st.integers(28, len(text) - 28))] = data.draw(st.integers(0, 255))
    else:
        text = data.draw(st.binary(max_size=200)) + text[: data.draw(st.integers(0, len(text) - 30))]
    path = tmp_path / "damaged"
    path.write_bytes(text)
    try:
        own, _, _ = check(folder, "cam1", **{which: path})
    except FileProblem:
        return
    assert common_name(own) == "cam1"
