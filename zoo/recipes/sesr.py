"""Makes the SESR weights of the zoo.

    python -m keras_efficient.zoo.recipes.sesr sesr-m5-x2 --data FOLDER --out runs/

`FOLDER` holds the training pictures (any number of sub-folders); 5 % of them, chosen by name, are kept for validation, and
no test set is looked at. Interrupt it and run it again: it goes on from its last checkpoint. `KERAS_BACKEND` chooses
TensorFlow or JAX. A model that starts from another one needs that one trained before, in the same `--out`.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from keras_efficient.superres.training import Schedule

__all__ = ["RECIPES", "Recipe", "build", "train"]


@dataclass(frozen=True)
class Recipe:
    """How one zoo model is made: its builder and arguments, its schedule, and the model whose weights it starts from."""

    builder: str
    arguments: dict[str, Any]
    schedule: Schedule
    starts_from: str | None = None
    patch: int = 48
    unclipped: str = "image_residual"
    extra: dict[str, Any] = field(default_factory=dict)


def _sesr(variant: str, scale: int, activation: str = "prelu", **options) -> dict[str, Any]:
    return {"variant": variant, "scale": scale, "activation": activation, "expansion": 64, **options}


_LONG = Schedule(100_000, peak_rate=2.5e-3)
_WARM = Schedule(40_000, peak_rate=1.5e-3)
_TUNE = Schedule(15_000, peak_rate=1e-3)
_INT8 = Schedule(6_000, peak_rate=3e-4, squared_share=1.0)

RECIPES = {
    "sesr-m5-x2": Recipe("SESR", _sesr("m5", 2), _LONG),
    "sesr-npu6-x2": Recipe("SESRNPU", {"depth": 6}, Schedule(60_000, peak_rate=2.5e-3), unclipped="last"),
    "sesr-m5-x2.relu": Recipe("SESR", _sesr("m5", 2, "relu"), _TUNE, starts_from="sesr-m5-x2"),
    "sesr-m3-x2": Recipe("SESR", _sesr("m3", 2), _WARM, starts_from="sesr-m5-x2"),
    "sesr-m7-x2": Recipe("SESR", _sesr("m7", 2), _WARM, starts_from="sesr-m5-x2"),
    "sesr-m11-x2": Recipe("SESR", _sesr("m11", 2), _WARM, starts_from="sesr-m7-x2"),
    "sesr-m5-x3": Recipe("SESR", _sesr("m5", 3), _WARM, starts_from="sesr-m5-x2", patch=40),
    "sesr-m5-x4": Recipe("SESR", _sesr("m5", 4), _WARM, starts_from="sesr-m5-x2", patch=40),
    "fsrcnn-x2": Recipe("FSRCNN", {"scale": 2}, _WARM, unclipped="enlarge"),
    "sesr-m5-x2.int8": Recipe("SESR", _sesr("m5", 2, int8_aware=True), _INT8, starts_from="sesr-m5-x2"),
    "sesr-m5-x2.relu-int8": Recipe(
        "SESR", _sesr("m5", 2, "relu", int8_aware=True), _INT8, starts_from="sesr-m5-x2.relu"
    ),
    "sesr-npu6-x2.int8": Recipe(
        "SESRNPU", {"depth": 6, "int8_aware": True}, _INT8, starts_from="sesr-npu6-x2", unclipped="last_int8"
    ),
}


def build(name: str):
    """The training form of a zoo model, with fresh weights."""
    from keras_efficient import models

    recipe = RECIPES[name]
    return getattr(models, recipe.builder)(name=name.replace("-", "_").replace(".", "_"), **recipe.arguments)


def train(name: str, data: Path, out: Path, *, steps: int | None = None, until: int | None = None) -> None:
    """Trains one model (or goes on with it) and writes `NAME.weights.h5` when its schedule is done."""
    import dataclasses

    import keras

    from keras_efficient.superres.data import PatchSet, list_images, read_pairs, split_by_name
    from keras_efficient.superres.training import Trainer

    recipe = RECIPES[name]
    schedule = recipe.schedule if steps is None else dataclasses.replace(recipe.schedule, steps=steps)
    keras.utils.set_random_seed(schedule.seed)
    scale = recipe.arguments.get("scale", 2)
    training, validation = split_by_name(list_images(data))
    pairs = read_pairs(training, scale) + read_pairs(training, scale, shrink=0.75)
    patches = PatchSet(pairs, scale, recipe.patch)
    model = build(name)
    if recipe.starts_from:
        source = build(recipe.starts_from)
        source.load_weights(out / f"{recipe.starts_from}.weights.h5")
        copied = copy_matching_layers(source, model)
        print(f"{len(copied)} layers start from {recipe.starts_from}", file=sys.stderr)
    trainer = Trainer(model, patches, schedule, out / name, unclipped=recipe.unclipped)

    def show(step, last, loss):
        print(f"\r{name}: step {step:,} of {last:,}, loss {loss:.5f}", end="", file=sys.stderr, flush=True)

    psnr = trainer.run(read_pairs(validation, scale), on_progress=show, until=until)
    print(f"\n{name}: validation {psnr:.3f} dB", file=sys.stderr)
    if trainer.step >= schedule.steps:
        temporary = out / f"{name}.tmp.weights.h5"
        model.save_weights(temporary)
        os.replace(temporary, out / f"{name}.weights.h5")


def copy_matching_layers(source, target) -> list[str]:
    """Copies the weights of layers that both models have, by name and shapes; returns their names.

    The new blocks of a deeper network start as identities: their linear part is made zero, their kernel is the identity,
    and a PReLU of slope 1 lets everything pass. The network then computes what the shallower one did.
    """
    import numpy as np

    copied = []
    known = {layer.name: layer for layer in source.layers}
    for layer in target.layers:
        shapes = [w.shape for w in layer.weights]
        other = known.get(layer.name)
        if not shapes:
            continue
        if other is not None and [w.shape for w in other.weights] == shapes:
            layer.set_weights(other.get_weights())
            copied.append(layer.name)
        elif other is None and layer.name.startswith("body_") and layer.name.endswith("_activation"):
            layer.set_weights([np.ones_like(w) for w in layer.get_weights()])
        elif other is None and layer.name.startswith("body_") and not layer.name.endswith("_int8"):
            layer.project_kernel.assign(np.zeros(layer.project_kernel.shape))
    return copied


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted(RECIPES))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs"))
    parser.add_argument("--steps", type=int, help="instead of the recipe's, for a trial")
    parser.add_argument("--until", type=int, help="stop (with a checkpoint) after this step")
    arguments = parser.parse_args()
    train(arguments.name, arguments.data, arguments.out, steps=arguments.steps, until=arguments.until)


if __name__ == "__main__":
    main()
