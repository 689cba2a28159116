"""Upscales a photo with a pretrained SESR, and exports the model to a checked int8 file for an Arm Ethos-U85.

    python examples/sesr.py            (or: make demo)

Writes to out/: the photo twice as large, a comparison with bicubic interpolation, and the file for the NPU.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from keras_efficient import export, superres, zoo
from keras_efficient.deploy import deploy

PHOTOS = Path(__file__).parent / "data"
PHOTO = PHOTOS / "chelsea.png"
MODEL = "sesr-m5-x2"
EYES = (slice(70, 190), slice(110, 270))  # the part of the photo that the comparison shows: rows, columns


def main(out: Path, target: str, input_shape: tuple[int, int]) -> export.Report:
    """The three steps; returns the report of the exported file."""
    out.mkdir(parents=True, exist_ok=True)
    model = deploy(zoo.load(MODEL))

    superres.upscale_file(PHOTO, out / "chelsea-x2.png", model, overwrite=True)
    print(f"{out / 'chelsea-x2.png'}: the photo, twice as large")

    compare(model, out / "before-after.png")

    report = export.save(
        model,
        out / f"{MODEL}-{target}.tflite",
        target=target,
        precision="int8",
        calibration=superres.calibration(PHOTOS),
        input_shape=input_shape,
        overwrite=True,
    )
    print(f"{out / f'{MODEL}-{target}.tflite'}: int8 for {target}, compared with the float model\n")
    print(report.to_json())
    return report


def compare(model, path: Path) -> None:
    """Shrinks the photo and enlarges it again in two ways, so that both can be held against the original."""
    photo = superres.read_image(PHOTO).pixels
    photo = photo[: photo.shape[0] // 2 * 2, : photo.shape[1] // 2 * 2]
    small = superres.imresize(photo, 0.5)
    results = {"bicubic": superres.imresize(small, 2), "SESR": superres.upscale(small, model), "original": photo}
    for name, result in results.items():
        if name != "original":
            score = superres.psnr(superres.rgb_to_y(result), superres.rgb_to_y(photo), shave=2)
            print(f"{name}: {score:.2f} dB PSNR (Y) on the photo shrunk to a half")
    side_by_side({name: result[EYES] for name, result in results.items()}).save(path)
    print(f"{path}: {' | '.join(results)}")


def side_by_side(pictures: dict[str, np.ndarray], zoom: int = 3, border: int = 8) -> Image.Image:
    """The pictures in a row, every pixel `zoom` times as large, each with its name above."""
    height, width = (zoom * n for n in next(iter(pictures.values())).shape[:2])
    font = ImageFont.load_default(size=24)
    top = 24 + 2 * border
    sheet = Image.new("RGB", (len(pictures) * (width + border) + border, height + top + border), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (name, pixels) in enumerate(pictures.items()):
        left = border + index * (width + border)
        draw.text((left, border), name, fill="black", font=font)
        sheet.paste(Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST), (left, top))
    return sheet


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--target", default="ethos-u85-2048", help="see keras-efficient export --list-targets")
    parser.add_argument("--height", type=int, default=270, help="of the NPU's input")
    parser.add_argument("--width", type=int, default=480)
    arguments = parser.parse_args()
    main(arguments.out, arguments.target, (arguments.height, arguments.width))
