"""Files and folders of pictures: kept, skipped, reported, resumed."""

from __future__ import annotations

import os

import numpy as np
import pytest

from keras_efficient.errors import FileProblem, WrongArgument
from keras_efficient.superres import Bicubic, Image, read_image, upscale, upscale_file, upscale_folder, write_image
from keras_efficient.superres.files import planned


@pytest.fixture
def model():
    return Bicubic(2)


def picture(*shape, dtype=np.uint8):
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape, dtype)


def below(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_a_file(tmp_path, model):
    write_image(tmp_path / "a.png", Image(picture(10, 12, 4)))
    upscale_file(tmp_path / "a.png", tmp_path / "b.png", model)
    np.testing.assert_array_equal(read_image(tmp_path / "b.png").pixels, upscale(picture(10, 12, 4), model))


def test_a_real_photo_in_every_format(tmp_path, model, data_dir):
    for suffix in (".png", ".jpg", ".webp", ".tif"):
        target = tmp_path / f"b{suffix}"
        upscale_file(data_dir / "sr/demo/rocket.jpg", target, model)
        assert read_image(target).pixels.shape == (854, 1280, 3)


def test_sixteen_bits_stay_sixteen(tmp_path, model):
    pytest.importorskip("av", reason="needs the extra video")
    image = picture(10, 12, 3, dtype=np.uint16)
    write_image(tmp_path / "a.png", Image(image, icc_profile=b"x" * 200))
    upscale_file(tmp_path / "a.png", tmp_path / "b.png", model)
    result = read_image(tmp_path / "b.png")
    assert result.icc_profile == b"x" * 200
    np.testing.assert_array_equal(result.pixels, upscale(image, model))


def test_the_target_is_checked_before_any_work(tmp_path):
    def model(y):
        raise AssertionError("no work should be done")

    write_image(tmp_path / "a.png", Image(picture(4, 4)))
    (tmp_path / "there.png").touch()
    with pytest.raises(FileProblem, match="exists"):
        upscale_file(tmp_path / "a.png", tmp_path / "there.png", model, scale=2)
    with pytest.raises(FileProblem, match="folder"):
        upscale_file(tmp_path / "a.png", tmp_path / "missing/b.png", model, scale=2)
    with pytest.raises(WrongArgument, match=r"\.gif"):
        upscale_file(tmp_path / "a.png", tmp_path / "b.gif", model, scale=2)


@pytest.mark.parametrize(
    ("shape", "dtype", "name", "words"),
    [
        ((4, 4, 4), np.uint8, "b.jpg", "alpha"),
        ((4, 4), np.uint16, "b.webp", "16 bits"),
        ((1, 9000), np.uint8, "b.webp", "2×18000 is too large"),
    ],
)
def test_what_the_target_cannot_hold_is_found_out_before_the_model_runs(tmp_path, shape, dtype, name, words):
    def model(y):
        raise AssertionError("no work should be done")

    if dtype == np.uint16:
        pytest.importorskip("av", reason="needs the extra video")
    write_image(tmp_path / "a.png", Image(picture(*shape, dtype=dtype)))
    with pytest.raises(WrongArgument, match=words):
        upscale_file(tmp_path / "a.png", tmp_path / name, model, scale=2, halo=1)
    assert below(tmp_path) == ["a.png"]


def test_no_result_replaces_an_input_by_whatever_name(tmp_path, model):
    folder = tmp_path / "photos"
    folder.mkdir()
    write_image(folder / "a.png", Image(picture(4, 4)))
    before = (folder / "a.png").read_bytes()
    (tmp_path / "link").mkdir()
    os.link(folder / "a.png", tmp_path / "link" / "a.png")
    for target in (folder / "a.png", tmp_path / "photos/../photos/a.png", tmp_path / "link/a.png"):
        with pytest.raises(WrongArgument, match="input itself"):
            upscale_file(folder / "a.png", target, model, overwrite=True)
    with pytest.raises(WrongArgument, match="input itself"):
        upscale_folder(folder, tmp_path / "link", model, overwrite=True)
    assert (folder / "a.png").read_bytes() == before


def test_a_plan_gives_every_file_a_result_of_its_own(tmp_path):
    for name in ("one/x.png", "two/x.png", "one/pics/y.png", "two/pics/y.png", "one/z.bmp", "one/z.gif", "one/v.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    one, two, target = tmp_path / "one", tmp_path / "two", tmp_path / "large"

    def results(*sources, **options):
        return sorted(result.relative_to(target).as_posix() for _, result in planned(sources, target, **options))

    assert results(one / "z.bmp") == ["z.png"]
    assert results(one / "z.bmp", one / "z.gif") == ["z.bmp.png", "z.gif.png"]
    assert results(one) == ["v.mp4", "x.png", "z.bmp.png", "z.gif.png"]
    assert results(one, two, suffix=".webp") == [
        *("one/v.mp4", "one/x.webp", "one/z.bmp.webp", "one/z.gif.webp", "two/x.webp")
    ]
    for sources in ([one / "x.png", two / "x.png"], [one / "pics", two / "pics"]):
        with pytest.raises(WrongArgument, match=r"one/.* and .*two/.* would both become .*\.png"):
            results(*sources)
    with pytest.raises(WrongArgument, match="where the pictures are"):
        planned([one, two], one)
    with pytest.raises(WrongArgument, match="where the pictures are"):
        planned([one, two], tmp_path)


def test_results_may_go_above_the_pictures(photos, tmp_path, model):
    report = upscale_folder(photos, tmp_path, model)
    assert sorted(path.relative_to(tmp_path).as_posix() for path in report.done) == ["a.png", "b.JPG"]


def test_a_decoder_that_fails_in_its_own_way_stops_no_folder(photos, tmp_path, model, monkeypatch):
    from PIL import JpegImagePlugin

    def fail(file):
        raise RuntimeError("odd")

    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "load", fail)
    report = upscale_folder(photos, tmp_path / "large", model)
    assert [path.name for path in report.done] == ["a.png"]
    assert [path.name for path, _ in report.failed] == ["b.JPG", "broken.png"]


def test_ctrl_c_leaves_nothing(tmp_path):
    def model(y):
        raise KeyboardInterrupt

    write_image(tmp_path / "a.png", Image(picture(4, 4)))
    with pytest.raises(KeyboardInterrupt):
        upscale_file(tmp_path / "a.png", tmp_path / "b.png", model, scale=2)
    assert below(tmp_path) == ["a.png"]


@pytest.fixture
def photos(tmp_path):
    source = tmp_path / "photos"
    (source / "trip" / "day 1").mkdir(parents=True)
    write_image(source / "a.png", Image(picture(6, 6, 3)))
    write_image(source / "b.JPG", Image(picture(6, 7, 3)))
    write_image(source / "trip/day 1/c.webp", Image(picture(5, 5, 3)))
    (source / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (source / "notes.txt").write_text("no picture")
    (source / ".hidden.png").write_bytes(b"")
    return source


def test_a_folder(photos, tmp_path, model):
    seen = []
    report = upscale_folder(photos, tmp_path / "large", model, on_progress=lambda *p: seen.append(p))
    assert below(tmp_path / "large") == ["a.png", "b.JPG"]
    assert sorted(path.name for path in report.done) == ["a.png", "b.JPG"]
    assert [path.name for path, _ in report.failed] == ["broken.png"]
    assert "photos" not in report.failed[0][1], "the reason does not repeat the path"
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_a_folder_with_its_sub_folders_goes_on_where_it_stopped(photos, model):
    target = photos / "large"  # inside the source: results are not taken for pictures
    target.mkdir()
    write_image(target / "a.png", Image(picture(1, 1)))
    first = upscale_folder(photos, target, model, recursive=True, suffix=".png")
    assert below(target) == ["a.png", "b.png", "trip/day 1/c.png"]
    assert first.kept == (target / "a.png",)
    assert read_image(target / "a.png").pixels.shape == (1, 1)
    second = upscale_folder(photos, target, model, recursive=True, suffix=".png")
    assert (len(second.done), len(second.kept), len(second.failed)) == (0, 3, 1)
    third = upscale_folder(photos, target, model, recursive=True, suffix=".png", overwrite=True)
    assert len(third.done) == 3
    assert read_image(target / "a.png").pixels.shape == (12, 12, 3)


def test_two_pictures_never_share_a_result(tmp_path, model):
    source = tmp_path / "photos"
    source.mkdir()
    write_image(source / "a.png", Image(picture(3, 3)))
    write_image(source / "a.webp", Image(picture(4, 4, 3)))
    upscale_folder(source, tmp_path / "large", model, suffix=".png")
    assert below(tmp_path / "large") == ["a.png", "a.webp.png"]
    assert read_image(tmp_path / "large/a.png").pixels.shape == (6, 6)


def test_bad_folders_are_refused(photos, tmp_path, model):
    with pytest.raises(FileProblem, match="no such folder"):
        upscale_folder(tmp_path / "missing", tmp_path / "large", model)
    with pytest.raises(WrongArgument, match="another folder"):
        upscale_folder(photos, photos, model)
    with pytest.raises(WrongArgument, match="quality"):
        upscale_folder(photos, tmp_path / "large", model, quality=0)
    with pytest.raises(WrongArgument, match=r"\.bmp"):
        upscale_folder(photos, tmp_path / "large", model, suffix=".bmp")
