"""Pictures in and out: every kind and depth, orientation and profile, damage, files that are whole or not there."""

from __future__ import annotations

import io
import os
import signal
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image as Pillow
from PIL import ImageCms

from keras_efficient.atomic import replacing
from keras_efficient.errors import FileProblem, MissingDependency, WrongArgument
from keras_efficient.superres import Image, png, read_image, write_image

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def pixels(*shape, dtype=np.uint8, seed=0):
    generator = np.random.default_rng(seed)
    return generator.integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("suffix", [".png", ".tiff", ".webp", ".jpg"])
@pytest.mark.parametrize("channels", [(), (1,), (2,), (3,), (4,)])
def test_eight_bits_there_and_back(tmp_path, suffix, channels):
    image = pixels(13, 17, *channels)
    path = tmp_path / f"a{suffix}"
    if suffix == ".jpg" and channels in [(2,), (4,)]:
        with pytest.raises(WrongArgument, match="alpha"):
            write_image(path, Image(image))
        assert names_in(tmp_path) == []
        return
    write_image(path, Image(image, icc_profile=SRGB))
    back = read_image(path)
    assert back.icc_profile == SRGB
    if suffix in (".png", ".tiff"):
        np.testing.assert_array_equal(back.pixels, image[..., 0] if channels == (1,) else image)


@pytest.mark.parametrize("shape", [(7, 5), (7, 5, 1), (7, 5, 2), (7, 5, 3), (7, 5, 4), (1, 1), (1, 1, 4), (3, 2000, 3)])
def test_sixteen_bit_png_there_and_back(tmp_path, shape):
    pytest.importorskip("av", reason="needs the extra video")
    image = pixels(*shape, dtype=np.uint16)
    write_image(tmp_path / "a.png", Image(image, icc_profile=SRGB))
    back = read_image(tmp_path / "a.png")
    np.testing.assert_array_equal(back.pixels, image[..., 0] if shape[2:] == (1,) else image)
    assert back.icc_profile == SRGB
    with Pillow.open(tmp_path / "a.png") as file:  # another reader agrees, in its eight bits
        file.load()
        if file.mode == "RGB":
            np.testing.assert_array_equal(np.asarray(file), image >> 8)


def test_sixteen_bit_gray_tiff(tmp_path):
    image = pixels(9, 4, dtype=np.uint16)
    write_image(tmp_path / "a.tif", Image(image))
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif").pixels, image)


@pytest.mark.parametrize("channels", [1, 3])
def test_transparent_colour_of_a_sixteen_bit_png_becomes_alpha(tmp_path, channels):
    pytest.importorskip("av", reason="needs the extra video")
    image = pixels(6, 5, channels, dtype=np.uint16)
    buffer = io.BytesIO()
    png.encode_16_bit(image, buffer)
    content = struct.pack(f">{channels}H", *image[2, 3])
    chunk = struct.pack(">I", len(content)) + b"tRNS" + content + struct.pack(">I", zlib.crc32(b"tRNS" + content))
    data = buffer.getvalue()
    place = data.index(b"IDAT") - 4
    (tmp_path / "a.png").write_bytes(data[:place] + chunk + data[place:])
    alpha = np.full((6, 5, 1), 65535, np.uint16)
    alpha[2, 3] = 0
    np.testing.assert_array_equal(read_image(tmp_path / "a.png").pixels, np.concatenate([image, alpha], axis=2))


def test_interlaced_sixteen_bit_png(tmp_path, repo_root):
    """Adam7 by hand: the seven passes of a 9×9 gray picture."""
    pytest.importorskip("av", reason="needs the extra video")
    image = pixels(9, 9, dtype=np.uint16)
    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    raw = b"".join(
        b"\0" + row.astype(">u2").tobytes()
        for top, left, down, right in passes
        for row in image[top::down, left::right]
    )

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 9, 9, 16, 0, 0, 0, 1))
    (tmp_path / "a.png").write_bytes(png.SIGNATURE + header + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b""))
    np.testing.assert_array_equal(read_image(tmp_path / "a.png").pixels, image)


def test_sixteen_bit_png_without_pyav_names_the_extra(tmp_path, monkeypatch):
    write_image(tmp_path / "a.png", Image(pixels(3, 3, 3, dtype=np.uint16)))
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingDependency, match=r"keras-efficient\[video\]"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize(
    ("mode", "options", "shape"),
    [
        ("1", {}, (6, 8)),
        ("L", {}, (6, 8)),
        ("L", {"transparency": 0}, (6, 8, 2)),
        ("LA", {}, (6, 8, 2)),
        ("P", {}, (6, 8, 3)),
        ("P", {"transparency": 0}, (6, 8, 4)),
        ("RGB", {}, (6, 8, 3)),
        ("RGB", {"transparency": (1, 2, 3)}, (6, 8, 4)),
        ("RGBA", {}, (6, 8, 4)),
    ],
)
def test_every_kind_of_eight_bit_png(tmp_path, mode, options, shape):
    image = Pillow.fromarray(pixels(6, 8, 3 if mode == "P" else 4)).convert(mode)
    image.save(tmp_path / "a.png", **options)
    result = read_image(tmp_path / "a.png").pixels
    assert (result.shape, result.dtype) == (shape, np.uint8)
    if mode != "P" and not options:
        np.testing.assert_array_equal(result, np.asarray(image).astype(np.uint8) * (255 if mode == "1" else 1))


def test_cmyk_becomes_rgb_and_loses_the_profile_of_its_inks(tmp_path):
    Pillow.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=100, icc_profile=b"no profile")
    image = read_image(tmp_path / "a.jpg")
    assert image.icc_profile is None
    np.testing.assert_allclose(image.pixels, np.broadcast_to([255, 0, 0], (8, 8, 3)), atol=3)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif"])
def test_orientation_is_applied_and_dropped_and_the_rest_of_exif_kept(tmp_path, orientation, suffix):
    from PIL import ImageOps

    exif = Pillow.Exif()
    exif[0x0112], exif[0x010F] = orientation, "a camera"
    if suffix != ".tif":
        exif.get_ifd(0x8769)[0xA002] = 16
    stored = Pillow.fromarray(np.kron(pixels(3, 4, 3), np.ones((8, 8, 1), np.uint8)))
    stored.save(tmp_path / f"a{suffix}", exif=exif)
    image = read_image(tmp_path / f"a{suffix}")
    with Pillow.open(tmp_path / f"a{suffix}") as file:
        np.testing.assert_array_equal(image.pixels, np.asarray(ImageOps.exif_transpose(file).convert("RGB")))
    write_image(tmp_path / f"b{suffix}", image)
    with Pillow.open(tmp_path / f"b{suffix}") as file:
        kept = file.getexif()
        assert 0x0112 not in kept
        assert kept[0x010F] == "a camera"
        assert 0xA002 not in kept.get_ifd(0x8769)


def camera_exif(**long):
    exif = Pillow.Exif()
    exif[0x0112], exif[0x010F] = 6, "a camera"
    exif[0x8769] = {0x9003: "2020:01:01 00:00:00", 0xA002: 16, **({0x927C: b"x" * 70_000} if long else {})}
    exif[0x8825] = {1: "N", 2: (60.0, 10.0, 0.0)}
    return exif


@pytest.mark.parametrize("source", [".jpg", ".tif"])
@pytest.mark.parametrize("target", [".jpg", ".png", ".tif", ".webp"])
def test_what_describes_the_picture_goes_into_every_format_and_the_files_structure_into_none(tmp_path, source, target):
    Pillow.fromarray(pixels(20, 30, 3)).save(tmp_path / f"a{source}", exif=camera_exif().tobytes())
    large = np.kron(read_image(tmp_path / f"a{source}").pixels, np.ones((2, 2, 1), np.uint8))
    write_image(tmp_path / f"b{target}", Image(large, exif=read_image(tmp_path / f"a{source}").exif))
    np.testing.assert_equal(read_image(tmp_path / f"b{target}").pixels.shape, (60, 40, 3))
    with Pillow.open(tmp_path / f"b{target}") as file:
        tags = file.getexif()
        assert tags[0x010F] == "a camera"
        if target != ".tif":
            assert set(tags) == {0x010F, 0x8769, 0x8825}, "no sizes, strips, compression of the source"
            assert dict(tags.get_ifd(0x8769)) == {0x9003: "2020:01:01 00:00:00"}
            assert tags.get_ifd(0x8825)[1] == "N"


def test_exif_too_long_for_jpeg_is_left_out_there(tmp_path):
    Pillow.fromarray(pixels(6, 8, 3)).save(tmp_path / "a.png", exif=camera_exif(long=True))
    image = read_image(tmp_path / "a.png")
    assert len(image.exif) > 65_533
    write_image(tmp_path / "b.jpg", image)
    assert read_image(tmp_path / "b.jpg").exif is None
    write_image(tmp_path / "b.png", image)
    assert read_image(tmp_path / "b.png").exif == image.exif


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
@pytest.mark.parametrize(
    "exif", [b"garbage garbage", b"II*\0", b"II*\0\xff\xff\xff\x7f"], ids=["no TIFF", "short", "far"]
)
def test_broken_exif_costs_no_picture(tmp_path, suffix, exif):
    path = tmp_path / f"a{suffix}"
    Pillow.fromarray(pixels(6, 8, 3)).save(path, exif=b"Exif\0\0" + exif)
    image = read_image(path)
    assert (image.pixels.shape, image.exif) == ((6, 8, 3), None)


def test_errors_of_every_kind_in_a_decoder_or_encoder_name_the_file(tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("Failed to decode frame 0.")

    Pillow.fromarray(pixels(6, 8, 3)).save(tmp_path / "a.bmp")
    monkeypatch.setattr("PIL.BmpImagePlugin.BmpImageFile.load", fail)
    with pytest.raises(FileProblem, match=r"a\.bmp.*damaged.*frame 0\)"):
        read_image(tmp_path / "a.bmp")
    monkeypatch.setattr("PIL.Image.Image.save", fail)
    with pytest.raises(FileProblem, match=r"b\.webp.*cannot hold"):
        write_image(tmp_path / "b.webp", Image(pixels(4, 4)))
    assert names_in(tmp_path) == ["a.bmp"]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_gray_tiff_whose_zero_is_white(tmp_path, dtype):
    tifffile = pytest.importorskip("tifffile", reason="writes the picture of this test")
    image = pixels(9, 4, dtype=dtype)
    tifffile.imwrite(tmp_path / "a.tif", np.iinfo(dtype).max - image, photometric="miniswhite")
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif").pixels, image)


def test_orientation_of_a_sixteen_bit_png(tmp_path):
    pytest.importorskip("av", reason="needs the extra video")
    image = pixels(5, 7, 3, dtype=np.uint16)
    exif = Pillow.Exif()
    exif[0x0112] = 6
    write_image(tmp_path / "a.png", Image(image, exif=exif.tobytes()))
    np.testing.assert_array_equal(read_image(tmp_path / "a.png").pixels, np.rot90(image, -1))


def test_what_cannot_be_kept_is_refused(tmp_path):
    frames = [Pillow.fromarray(pixels(4, 4, seed=i)) for i in range(2)]
    frames[0].save(tmp_path / "moves.gif", save_all=True, append_images=frames[1:])
    with pytest.raises(FileProblem, match="2 pictures"):
        read_image(tmp_path / "moves.gif")
    Pillow.new("F", (4, 4)).save(tmp_path / "float.tif")
    with pytest.raises(FileProblem, match="16-bit PNG"):
        read_image(tmp_path / "float.tif")
    tifffile = pytest.importorskip("tifffile", reason="writes the picture of this test")
    tifffile.imwrite(tmp_path / "deep.tif", pixels(4, 4, 3, dtype=np.uint16))
    with pytest.raises(FileProblem, match=r"deep\.tif"):
        read_image(tmp_path / "deep.tif")
    with pytest.raises(WrongArgument, match="16 bits"):
        write_image(tmp_path / "a.jpg", Image(pixels(4, 4, dtype=np.uint16)))
    with pytest.raises(WrongArgument, match="suffix"):
        write_image(tmp_path / "a", Image(pixels(4, 4)))
    with pytest.raises(WrongArgument, match=r"\.bmp"):
        write_image(tmp_path / "a.bmp", Image(pixels(4, 4)))
    with pytest.raises(WrongArgument, match="float64"):
        write_image(tmp_path / "a.png", Image(np.zeros((4, 4))))


def test_unreadable_files_say_why(tmp_path):
    for name, content, reason in [
        ("empty.png", b"", "0 bytes"),
        ("text.png", b"not a picture at all", "no picture"),
        ("missing.png", None, "no such file"),
    ]:
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(FileProblem, match=reason) as caught:
            read_image(tmp_path / name)
        assert name in str(caught.value)
        assert len(str(caught.value).splitlines()) <= 2
    with pytest.raises(FileProblem, match="folder"):
        read_image(tmp_path)


def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path):
    for bits, kind in ((8, 2), (16, 2)):
        header = struct.pack(">IIBBBBB", 60_000, 60_000, bits, kind, 0, 0, 0)
        parts = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 1000)), (b"IEND", b"")]
        chunks = (struct.pack(">I", len(c)) + n + c + struct.pack(">I", zlib.crc32(n + c)) for n, c in parts)
        (tmp_path / "bomb.png").write_bytes(png.SIGNATURE + b"".join(chunks))
        with pytest.raises(FileProblem, match="pixels"):
            read_image(tmp_path / "bomb.png")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif", "16.png"])
def test_a_file_cut_off_anywhere_is_refused(tmp_path, suffix):
    if suffix == "16.png":
        pytest.importorskip("av", reason="needs the extra video")
    path = tmp_path / f"a{suffix}"
    dtype = np.uint16 if suffix == "16.png" else np.uint8
    write_image(path, Image(pixels(24, 20, 3, dtype=dtype)))
    whole = path.read_bytes()
    for length in sorted({*range(1, len(whole) - 1, max(1, len(whole) // 40)), len(whole) - 13, len(whole) - 4}):
        path.write_bytes(whole[:length])
        with pytest.raises(FileProblem):
            read_image(path)


@pytest.mark.parametrize("suffix", [".png", "16.png"])
def test_a_flipped_bit_in_a_png_is_refused(tmp_path, suffix):
    pytest.importorskip("av", reason="needs the extra video")
    path = tmp_path / f"a{suffix}"
    write_image(path, Image(pixels(12, 10, 3, dtype=np.uint16 if suffix == "16.png" else np.uint8)))
    whole = path.read_bytes()
    for place in range(8, len(whole), max(1, len(whole) // 60)):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(FileProblem):
            read_image(path)


def test_an_existing_file_is_kept_unless_told_otherwise(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"precious")
    with pytest.raises(FileProblem, match="exists"):
        write_image(path, Image(pixels(4, 4)))
    assert path.read_bytes() == b"precious"
    write_image(path, Image(pixels(4, 4)), overwrite=True)
    np.testing.assert_array_equal(read_image(path).pixels, pixels(4, 4))
    assert names_in(tmp_path) == ["a.png"]
    with pytest.raises(FileProblem, match="folder"):
        write_image(tmp_path / "missing" / "a.png", Image(pixels(4, 4)))


def test_long_names(tmp_path):
    write_image(tmp_path / f"{'漢' * 80}.png", Image(pixels(4, 4)))  # 244 bytes
    assert names_in(tmp_path) == [f"{'漢' * 80}.png"]
    with pytest.raises(FileProblem, match="cannot be written"):
        write_image(tmp_path / f"{'漢' * 90}.png", Image(pixels(4, 4)))


def test_a_file_that_appears_meanwhile_is_kept_too(tmp_path):
    def write_slowly():
        with replacing(tmp_path / "a.png") as temporary:
            temporary.write_bytes(b"mine")
            (tmp_path / "a.png").write_bytes(b"precious")

    with pytest.raises(FileProblem, match="exists"):
        write_slowly()
    assert (tmp_path / "a.png").read_bytes() == b"precious"
    assert names_in(tmp_path) == ["a.png"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, MemoryError])
def test_whatever_happens_in_between_leaves_the_old_file_and_no_rest(tmp_path, error):
    path = tmp_path / "a.bin"
    path.write_bytes(b"precious")

    def break_off():
        with replacing(path, overwrite=True) as temporary:
            temporary.write_bytes(b"half")
            raise error

    with pytest.raises(error):
        break_off()
    assert path.read_bytes() == b"precious"
    assert names_in(tmp_path) == ["a.bin"]


WRITE_TOO_MUCH = """
import resource, sys
import numpy as np
from keras_efficient.errors import FileProblem
from keras_efficient.superres import Image, write_image
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
image = np.random.default_rng(0).integers(0, 65536, (200, 200, 3)).astype(np.uint16)
try:
    write_image(sys.argv[1], Image(image if sys.argv[2] == "16" else (image >> 8).astype(np.uint8)), overwrite=True)
except FileProblem as error:
    print(error)
    sys.exit(7)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="no limit on the size of files here")
@pytest.mark.parametrize(("name", "bits"), [("a.png", "8"), ("a.png", "16"), ("a.tif", "8")])
def test_a_disk_without_room_leaves_the_old_file_and_no_rest(tmp_path, name, bits):
    path = tmp_path / name
    path.write_bytes(b"precious")
    program = [sys.executable, "-c", WRITE_TOO_MUCH, os.fspath(path), bits]
    result = subprocess.run(program, capture_output=True, text=True, timeout=120)
    assert result.returncode == 7, result.stderr
    assert "cannot be written: larger than files may become here" in result.stdout
    assert path.read_bytes() == b"precious"
    assert names_in(tmp_path) == [name]


def test_permissions_follow_the_umask(tmp_path):
    write_image(tmp_path / "a.png", Image(pixels(4, 4)))
    (tmp_path / "b").write_bytes(b"")
    assert (tmp_path / "a.png").stat().st_mode == (tmp_path / "b").stat().st_mode
