"""Calibration crops: in range and scale as `upscale` feeds a model, spread over pictures of every size."""

import numpy as np
import pytest
from PIL import Image

from keras_efficient import superres
from keras_efficient.errors import CalibrationError, FileProblem, WrongArgument


@pytest.fixture
def folder(tmp_path):
    ramp = np.linspace(0, 255, 300 * 400 * 3).reshape(300, 400, 3).astype(np.uint8)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    Image.fromarray(ramp[..., 0]).save(tmp_path / "gray.png")
    Image.fromarray(np.dstack([ramp, ramp[..., :1]])).save(tmp_path / "alpha.png")
    Image.fromarray(ramp[:20, :30]).save(tmp_path / "small.png")
    return tmp_path


def test_crops_are_luma_in_studio_range_and_gray_as_it_is(folder):
    crops = superres.calibration(folder, size=100, limit=100)
    assert crops.shape == (12 + 12 + 12 + 1, 100, 100, 1)
    assert crops.dtype == np.float32
    files = sorted(folder.iterdir())
    parts = dict(zip([file.stem for file in files], np.split(crops, [12, 24, 36]), strict=True))
    assert parts["a"].min() >= 16 / 255 - 1e-6
    assert parts["a"].max() <= 235 / 255 + 1e-6
    assert parts["gray"].min() < 16 / 255
    assert parts["gray"].max() > 235 / 255
    np.testing.assert_array_equal(parts["a"], parts["alpha"])
    whole = superres.rgb_to_y(superres.read_image(folder / "a.png").pixels)
    covered = np.sort(parts["a"].ravel())
    np.testing.assert_allclose(covered, np.sort(whole.ravel()), atol=1e-6)  # 3 × 4 crops of 100 cover 300 × 400


def test_a_limit_takes_the_centre_of_every_picture(folder):
    crops = superres.calibration(folder, channels=3, size=100, limit=4)
    assert crops.shape == (4, 100, 100, 3)
    pixels = superres.read_image(folder / "a.png").pixels[100:200] / np.float32(255)
    assert any(np.allclose(crops[0], pixels[:, left : left + 100], atol=1e-6) for left in (100, 200))


def test_a_limit_below_the_number_of_pictures_spreads_over_all(tmp_path):
    for level in range(0, 250, 10):
        Image.new("L", (8, 8), level).save(tmp_path / f"{level:03}.png")
    crops = superres.calibration(tmp_path, size=8, limit=5)
    assert np.unique((crops * 255).round()).tolist() == [0, 60, 120, 180, 240]


def test_wrong_arguments_and_folders(tmp_path):
    with pytest.raises(CalibrationError, match="no image"):
        superres.calibration(tmp_path)
    with pytest.raises(FileProblem, match="no such folder"):
        superres.calibration(tmp_path / "missing")
    (tmp_path / "a.png").write_bytes(b"not a picture")
    with pytest.raises(FileProblem, match=r"a\.png"):
        superres.calibration(tmp_path)
    with pytest.raises(WrongArgument, match="channels"):
        superres.calibration(tmp_path, channels=2)
