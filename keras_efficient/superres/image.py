"""Reading and writing of still pictures with nothing lost on the way: bits, alpha, colour profile, orientation.

Pillow reads and writes what has 8 bits a sample; PNG with 16 bits goes through `keras_efficient.superres.png`, since
Pillow cuts 16-bit colour to 8 bits silently.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from keras_efficient.atomic import replacing
from keras_efficient.errors import FileProblem, KerasEfficientError, WrongArgument
from keras_efficient.superres import png

__all__ = ["WRITABLE_SUFFIXES", "Image", "check_fits", "check_quality", "check_suffix", "read_image", "write_image"]

WRITABLE_SUFFIXES = (".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")

_ORIENTATION = 0x0112
# Description, make, model, software, date, artist, copyright. In a TIFF its structure has tags beside them.
_DESCRIPTIVE = (0x010E, 0x010F, 0x0110, 0x0131, 0x0132, 0x013B, 0x8298)
_EXIF_FOLDERS = (0x8769, 0x8825)  # how and when, where
_EXIF_STRUCTURE = (0xA002, 0xA003, 0xA005)  # width, height, the place of a further folder
_TIFF_BITS, _TIFF_PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0
_LARGEST = {"JPEG": 65500, "WEBP": 16383}
_LARGEST_JPEG_EXIF = 65533  # bytes
_MANY_FRAMES = ("GIF", "PNG", "TIFF", "WEBP", "AVIF")


@dataclass(frozen=True, eq=False)
class Image:
    """A picture.

    Attributes:
        pixels: H×W (gray), H×W×2 (gray, alpha), H×W×3 (RGB) or H×W×4 (RGB, alpha); uint8 or uint16.
        icc_profile: the colour profile to be kept with the pixels, or None.
        exif: the EXIF block (shot by what, when, where) without orientation, size and thumbnail, or None.
    """

    pixels: np.ndarray
    icc_profile: bytes | None = None
    exif: bytes | None = None


def read_image(path: str | Path) -> Image:
    """Reads a picture upright: the EXIF orientation is applied and dropped.

    Palettes become RGB(A), 1 bit becomes gray, CMYK becomes RGB (through its colour profile where it has one). Broken
    EXIF is left out.

    Raises:
        FileProblem: missing, empty, cut off, damaged, no picture, more pixels than Pillow's `MAX_IMAGE_PIXELS` allows
            (a decompression bomb), animated, or of more bits than can be kept.
        MissingDependency: 16 bits a sample in PNG, and PyAV is not installed.
    """
    path = Path(path)
    if path.is_dir():
        raise FileProblem(path, "is a folder, not a picture.")
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise FileProblem(path, "no such file.") from error
    except OSError as error:
        raise FileProblem(path, f"cannot be read: {error.strerror or error}.") from error
    if not data:
        raise FileProblem(path, "is empty (0 bytes).")
    return _decoded(path, data)


def write_image(path: str | Path, image: Image, *, quality: int = 95, overwrite: bool = False) -> None:
    """Writes a picture in the format that the suffix names; the file appears whole or not at all.

    Args:
        path: .png and .tif (8 or 16 bits; TIFF: 16 bits in gray only, and of EXIF the text only), .jpg (no alpha; no
            EXIF of more than 64 kB) or .webp.
        image: the picture.
        quality: of JPEG and WebP, 1 … 100.
        overwrite: replace what is there.

    Raises:
        WrongArgument: a suffix that is not known or cannot hold such pixels.
        FileProblem: it exists already, or cannot be written (full disk, no permission, …).
    """
    path = check_suffix(path)
    check_quality(quality)
    check_fits(path, image.pixels.shape, image.pixels.dtype)
    kind = _kind_of(path)
    with replacing(path, overwrite=overwrite) as temporary, open(temporary, "xb") as file:
        if kind == "PNG" and image.pixels.dtype == np.uint16:
            png.encode_16_bit(image.pixels, file, icc=image.icc_profile, exif=image.exif)
        else:
            file.write(_encoded_by_pillow(path, image, kind, quality))


def check_suffix(path: str | Path) -> Path:
    """Refuses a name whose suffix is no format that can be written."""
    path = Path(path)
    if path.suffix.lower() not in WRITABLE_SUFFIXES:
        raise WrongArgument(
            f"{path}: pictures cannot be written as {path.suffix or 'a file without suffix'!r}.",
            hint=f"Known: {', '.join(WRITABLE_SUFFIXES)}.",
        )
    return path


def check_fits(path: str | Path, shape: tuple[int, ...], dtype: np.typing.DTypeLike) -> None:
    """Refuses pixels that the format of `path` cannot hold: their size, channels (alpha) or bits."""
    path, dtype, kind = Path(path), np.dtype(dtype), _kind_of(Path(path))
    channels = 1 if len(shape) == 2 else shape[-1]
    if dtype not in (np.uint8, np.uint16) or len(shape) not in (2, 3) or not 1 <= channels <= 4:
        raise WrongArgument(
            f"{path}: pixels of {dtype}, {shape}, cannot be written.",
            hint="Pictures are uint8 or uint16, H×W or H×W×(1 … 4).",
        )
    if dtype == np.uint16 and not (kind == "PNG" or (kind == "TIFF" and channels == 1)):
        raise WrongArgument(f"{path}: {kind} would cut 16 bits a sample to 8.", hint="Write a .png.")
    if kind == "JPEG" and channels in (2, 4):
        raise WrongArgument(f"{path}: JPEG has no alpha channel.", hint="Write a .png or .webp.")
    if max(shape[:2]) > _LARGEST.get(kind, 2**31 - 1):
        raise WrongArgument(f"{path}: {shape[0]}×{shape[1]} is too large for {kind}.", hint="Write a .png.")


def check_quality(quality: int) -> None:
    """Refuses a quality of JPEG and WebP outside of 1 … 100."""
    if not (isinstance(quality, int) and 1 <= quality <= 100):
        raise WrongArgument(f"quality is a whole number from 1 to 100, not {quality!r}.")


def _decoded(path: Path, data: bytes) -> Image:
    from PIL import Image as Pillow
    from PIL import UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is wrong enough ends in an error
            with Pillow.open(io.BytesIO(data)) as file:
                _check_frames_and_bits(path, file)
                header = png.header(data)
                if header is not None and header.bits == 16:
                    pixels, profile = png.decode_16_bit(data), file.info.get("icc_profile")
                else:
                    if header is not None:
                        _walk_through(png.chunks(data))  # Pillow overlooks a missing end
                    pixels, profile = _pixels_by_pillow(path, file)
                # Last, since PNG may have EXIF behind the pixels, and Pillow turns a TIFF upright while it loads it.
                orientation, exif = _exif_of(file)
    except UnidentifiedImageError as error:
        raise FileProblem(path, "is no picture, or of a kind that is not known.") from error
    except Pillow.DecompressionBombError as error:
        raise FileProblem(
            path,
            f"has more than {2 * (Pillow.MAX_IMAGE_PIXELS or 0):,} pixels, which may be an attack.",
            hint="If you trust it, raise PIL.Image.MAX_IMAGE_PIXELS.",
        ) from error
    except (KerasEfficientError, MemoryError):
        raise
    except Exception as error:  # a decoder may raise anything
        raise FileProblem(path, f"is damaged or cut off ({_reason(error)}).") from error
    return Image(_upright(pixels, orientation), profile, exif)


def _check_frames_and_bits(path: Path, file) -> None:
    frames = getattr(file, "n_frames", 1)
    if frames > 1 and file.format in _MANY_FRAMES:
        raise FileProblem(path, f"holds {frames} pictures; only single ones are taken.", hint="Make it a video first.")
    if file.format == "TIFF" and file.mode not in ("I;16", "I;16B") and max(file.tag_v2.get(_TIFF_BITS, (8,))) > 8:
        raise FileProblem(path, "colour TIFF of more than 8 bits is not read.", hint="Convert it to a 16-bit PNG.")
    if file.mode in ("I", "F") or (file.mode.startswith("I;16") and file.format not in ("TIFF", "PNG")):
        raise FileProblem(path, f"pixels of kind {file.mode!r} are not read.", hint="Convert it to a 16-bit PNG.")


def _pixels_by_pillow(path: Path, file) -> tuple[np.ndarray, bytes | None]:
    profile = file.info.get("icc_profile")
    file.load()
    if file.mode.startswith("I;16"):
        samples = np.asarray(file).astype(np.uint16)
        is_negative = file.format == "TIFF" and file.tag_v2.get(_TIFF_PHOTOMETRIC) == _WHITE_IS_ZERO
        return (65535 - samples if is_negative else samples), profile
    if file.mode == "CMYK":
        return np.asarray(_rgb_of_cmyk(file, profile)), None  # the profile described the inks
    if file.mode in ("LAB", "HSV"):
        raise FileProblem(path, f"colours as {file.mode} are not read.", hint="Convert it to RGB.")
    is_gray = file.mode in ("1", "L", "LA", "La")
    has_alpha = "transparency" in file.info or file.mode in ("LA", "La", "PA", "RGBA", "RGBa")
    return np.asarray(file.convert(("L" if is_gray else "RGB") + "A" * has_alpha)), profile


def _rgb_of_cmyk(file, profile: bytes | None):
    if profile:
        from PIL import ImageCms

        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            return ImageCms.profileToProfile(file, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
        except (ImageCms.PyCMSError, OSError):
            pass  # a broken profile: go without
    return file.convert("RGB")


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Undoes the EXIF orientation: 2 mirrored, 3 upside down, …, 5 to 8 with rows and columns exchanged."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def _exif_of(file) -> tuple[int, bytes | None]:
    """The orientation, and what else is to be kept; of broken EXIF what comes before the break."""
    orientation = 1
    try:
        tags = file.getexif()
        orientation = tags.get(_ORIENTATION, 1)
        return orientation, _exif_to_keep(tags, _EXIF_FOLDERS)
    except Exception:  # pictures matter more
        return orientation, None


def _exif_to_keep(tags, folders: tuple[int, ...]) -> bytes | None:
    """EXIF made anew of what describes the picture and not the file."""
    from PIL import Image as Pillow

    kept = Pillow.Exif()
    for tag in _DESCRIPTIVE:
        if isinstance(text := tags.get(tag), str) and text:
            kept[tag] = text
    for number in folders:
        folder = {tag: value for tag, value in tags.get_ifd(number).items() if tag not in _EXIF_STRUCTURE}
        if folder:
            kept[number] = folder
    return kept.tobytes() if len(kept) else None


def _walk_through(chunks) -> None:
    for _ in chunks:
        pass


def _reason(error: Exception) -> str:
    return str(error).strip().rstrip(".") or type(error).__name__


def _kind_of(path: Path) -> str:
    return {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".webp": "WEBP"}.get(path.suffix.lower(), "TIFF")


def _encoded_by_pillow(path: Path, image: Image, kind: str, quality: int) -> memoryview:
    """A picture of 8 bits, or a TIFF, as the bytes of its file.

    Writing them is the caller's: what fails here lies with the picture, not with the disk.
    """
    from PIL import Image as Pillow

    pixels = image.pixels
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    options: dict[str, Any] = {"compression": "tiff_adobe_deflate"} if kind == "TIFF" else {}
    if kind in ("JPEG", "WEBP"):
        options["quality"] = quality
    if image.icc_profile:
        options["icc_profile"] = image.icc_profile
    file = io.BytesIO()
    try:
        if exif := _exif_that_fits(image.exif, kind):
            options["exif"] = exif
        Pillow.fromarray(np.ascontiguousarray(pixels)).save(file, kind, **options)
    except MemoryError:
        raise
    except Exception as error:  # an encoder may raise anything
        raise FileProblem(path, f"{kind} cannot hold the picture ({_reason(error)}).", hint="Write a .png.") from error
    return file.getbuffer()


def _exif_that_fits(exif: bytes | None, kind: str) -> bytes | None:
    from PIL import Image as Pillow

    if exif and kind == "TIFF":  # Pillow compresses by libtiff, which takes no folders
        tags = Pillow.Exif()
        tags.load(exif)
        return _exif_to_keep(tags, ())
    return None if exif and kind == "JPEG" and len(exif) > _LARGEST_JPEG_EXIF else exif
