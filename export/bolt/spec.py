"""A region's structure as JSON values, and its weights as the arrays that its ONNX node takes.

```
{"version": 1, "rows": false, "shuffle": 2, "channels": [1],
 "layers": [{"value": 0, "kernel": [5, 5], "channels": 1, "filters": 16, "stride": [1, 1], "dilation": [1, 1],
             "padding": [2, 2, 2, 2], "depthwise": false, "steps": [{"kind": "prelu", "slopes": 16}, {"add": 0}]}]}
```

Arrays are in the layers' order: weights, bias, then the slopes of each PReLU. Weights are filters × channels × height
× width as in ONNX (depthwise: channels × 1 × height × width), of rows channels × filters; slopes channels × 1 × 1, of
rows channels. Everything is float32.

What is read may come from anybody: each value has its type and its limits, and no array is made before all are checked.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from math import isinf, prod
from typing import Any

import numpy as np

from keras_efficient.errors import WrongArgument
from keras_efficient.export.bolt.region import ACTIVATIONS, Activate, Add, Layer, Region, Step

__all__ = [
    "VERSION",
    "arrays",
    "outline",
    "owners",
    "parsed",
    "region_of",
    "shapes",
    "spec",
    "structure_hash",
    "written",
]

VERSION = 1
LONGEST_TEXT = 1 << 20
MOST = {"layers": 1024, "inputs": 256, "steps": 64, "channels": 1 << 20, "kernel": 255, "shuffle": 16}
MOST_WEIGHTS = (1 << 31) - 1
MOST_LIMIT = float(np.finfo(np.float32).max)


def spec(region: Region) -> dict[str, Any]:
    """The structure of a region, without weights and names; equal structures give equal values."""
    return {
        "version": VERSION,
        "rows": bool(region.rows),
        "shuffle": int(region.shuffle),
        "channels": [int(one) for one in region.channels],
        "layers": [
            {
                "value": int(layer.value),
                "kernel": [int(one) for one in layer.kernel],
                "channels": layer.channels,
                "filters": layer.filters,
                "stride": [int(one) for one in layer.stride],
                "dilation": [int(one) for one in layer.dilation],
                "padding": [int(one) for one in layer.padding],
                "depthwise": bool(layer.depthwise),
                "steps": [_step(step) for step in layer.steps],
            }
            for layer in region.layers
        ],
    }


def _step(step: Step) -> dict[str, Any]:
    if isinstance(step, Add):
        return {"add": int(step.value)}
    if step.slopes is not None:
        return {"kind": "prelu", "slopes": int(step.slopes.size)}
    if step.kind == "clip":
        limits = {"low": step.low, "high": step.high}
        return {"kind": "clip", **{name: None if isinf(one) else float(one) for name, one in limits.items()}}
    return {"kind": step.kind}


def written(structure: Mapping[str, Any]) -> str:
    """The one text of a structure."""
    return json.dumps(structure, sort_keys=True, separators=(",", ":"), allow_nan=False)


def structure_hash(structure: Mapping[str, Any]) -> str:
    """Twelve hexadecimal digits that tell structures apart."""
    return hashlib.sha256(written(structure).encode()).hexdigest()[:12]


def arrays(region: Region) -> list[np.ndarray]:
    """Weights, bias and slopes of each layer, as this file's head tells."""
    found = []
    for layer in region.layers:
        turned = layer.weights.transpose((2, 3, 0, 1) if layer.depthwise else (3, 2, 0, 1))
        found += [layer.weights[0, 0] if region.rows else turned, layer.bias]
        for step in layer.steps:
            if isinstance(step, Activate) and step.slopes is not None:
                found.append(step.slopes.reshape(-1) if region.rows else step.slopes.reshape(-1, 1, 1))
    return [np.array(one, np.float32, order="C") for one in found]


def owners(structure: Mapping[str, Any]) -> list[int]:
    """The number of its layer, for each of the arrays."""
    counts = [2 + sum("slopes" in step for step in layer["steps"]) for layer in structure["layers"]]
    return [number for number, count in enumerate(counts) for _ in range(count)]


# ------------------------------------------------------------------------------------------------------------ reading


def parsed(text: str) -> dict[str, Any]:
    """A structure out of its text, checked.

    Raises:
        WrongArgument: no JSON, too long, or not what `spec` writes.
    """
    if not isinstance(text, str) or len(text) > LONGEST_TEXT:
        raise WrongArgument(f"A region's structure is a text of at most {LONGEST_TEXT} characters.")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as err:
        raise WrongArgument(f"A region's structure is no JSON: {str(err)[:200]}") from err
    _checked(found)
    return found


def shapes(structure: Mapping[str, Any]) -> list[tuple[int, ...]]:
    """Shapes of the arrays that belong to a structure.

    Raises:
        WrongArgument: not what `spec` writes.
    """
    _checked(structure)
    found: list[tuple[int, ...]] = []
    for layer in structure["layers"]:
        channels, filters, kernel = layer["channels"], layer["filters"], layer["kernel"]
        if structure["rows"]:
            found.append((channels, filters))
        else:
            found.append((filters, 1 if layer["depthwise"] else channels, *kernel))
        found.append((filters,))
        for step in layer["steps"]:
            if "slopes" in step:
                found.append((step["slopes"],) if structure["rows"] else (step["slopes"], 1, 1))
    return found


def region_of(structure: Mapping[str, Any], weights: Sequence[np.ndarray], names: Sequence[str] = ()) -> Region:
    """The region that `spec` and `arrays` were made from.

    Args:
        structure: as of `spec`.
        weights: as of `arrays`; float16 and float32 are taken.
        names: of inputs and output.

    Raises:
        WrongArgument: not what `spec` writes, or arrays of other shapes or types.
    """
    wanted = shapes(structure)
    given = [(getattr(one, "shape", None), str(getattr(one, "dtype", None))) for one in weights]
    if len(given) != len(wanted) or any(
        shape != want or kind not in ("float16", "float32") for (shape, kind), want in zip(given, wanted, strict=False)
    ):
        raise WrongArgument(f"Arrays of a region are {given}, its structure wants {wanted}.")
    left = iter([np.asarray(one, np.float32) for one in weights])
    layers = []
    for layer in structure["layers"]:
        matrix, bias = next(left), next(left)
        turned = matrix.transpose((2, 3, 0, 1) if layer["depthwise"] else (2, 3, 1, 0)) if matrix.ndim == 4 else None
        steps: list[Step] = []
        for step in layer["steps"]:
            if "add" in step:
                steps.append(Add(step["add"]))
            elif step["kind"] == "clip":
                low, high = step["low"], step["high"]
                limits = (float("-inf") if low is None else low, float("inf") if high is None else high)
                steps.append(Activate("clip", low=float(limits[0]), high=float(limits[1])))
            else:
                steps.append(Activate(step["kind"], next(left).reshape(-1) if "slopes" in step else None))
        layers.append(
            Layer(
                value=layer["value"],
                weights=matrix[None, None] if turned is None else turned,
                bias=bias,
                stride=tuple(layer["stride"]),
                dilation=tuple(layer["dilation"]),
                padding=tuple(layer["padding"]),
                depthwise=layer["depthwise"],
                steps=tuple(steps),
            )
        )
    return Region(
        tuple(layers), tuple(structure["channels"]), structure["shuffle"], structure["rows"], tuple(map(str, names))
    )


def outline(structure: Mapping[str, Any]) -> Region:
    """The region of a structure with zeros for all weights, which take no memory: for its sizes and shapes.

    Raises:
        WrongArgument: not what `spec` writes.
    """
    return region_of(structure, [np.broadcast_to(np.float32(0), shape) for shape in shapes(structure)])


def _checked(found: Any) -> None:
    """Raises where a structure is not what `spec` writes."""
    _keys(found, "a region", "version", "rows", "shuffle", "channels", "layers")
    if found["version"] != VERSION or isinstance(found["version"], bool):
        raise WrongArgument(f"A region of version {str(found['version'])[:20]}; this package reads {VERSION}.")
    _boolean(found["rows"], "rows")
    _integer(found["shuffle"], "shuffle", 1, MOST["shuffle"])
    _integers(found["channels"], "channels", 1, MOST["channels"], least=1, most=MOST["inputs"])
    layers = found["layers"]
    if not isinstance(layers, list) or not 1 <= len(layers) <= MOST["layers"]:
        raise WrongArgument(f"A region has 1 to {MOST['layers']} layers.")
    known = list(found["channels"])
    for layer in layers:
        _checked_layer(layer, known, inputs=len(found["channels"]), rows=found["rows"])
        known.append(layer["filters"])
    if known[-1] % found["shuffle"] ** 2 or (found["rows"] and found["shuffle"] > 1):
        raise WrongArgument(f"A region of {known[-1]} channels cannot be shuffled by {found['shuffle']}.")


def _checked_layer(layer: Any, known: list[int], *, inputs: int, rows: bool) -> None:
    _keys(
        layer,
        "a layer",
        "value",
        "kernel",
        "channels",
        "filters",
        "stride",
        "dilation",
        "padding",
        "depthwise",
        "steps",
    )
    _integer(layer["value"], "value", 0, len(known) - 1)
    _boolean(layer["depthwise"], "depthwise")
    for name in ("channels", "filters"):
        _integer(layer[name], name, 1, MOST["channels"])
    for name, count, low in (("kernel", 2, 1), ("stride", 2, 1), ("dilation", 2, 1), ("padding", 4, 0)):
        _integers(layer[name], name, low, MOST["kernel"], least=count, most=count)
    if 0 < layer["value"] < inputs or known[layer["value"]] != layer["channels"]:
        raise WrongArgument(f"A layer of {layer['channels']} channels reads value {layer['value']} of {known[:20]}.")
    if layer["depthwise"] and layer["filters"] != layer["channels"]:
        raise WrongArgument(f"A depthwise layer makes {layer['filters']} channels of {layer['channels']}.")
    one = [layer[name] for name in ("kernel", "stride", "dilation")] + [[sum(layer["padding"]) + 1, 1]]
    if rows and (layer["depthwise"] or any(numbers != [1, 1] for numbers in one)):
        raise WrongArgument("A layer of rows is a product by a matrix: kernel, stride and dilation 1, no padding.")
    if prod(layer["kernel"]) * layer["channels"] * layer["filters"] > MOST_WEIGHTS:
        raise WrongArgument(f"A layer of more than {MOST_WEIGHTS} weights.")
    if not isinstance(layer["steps"], list) or len(layer["steps"]) > MOST["steps"]:
        raise WrongArgument(f"A layer has at most {MOST['steps']} steps.")
    for step in layer["steps"]:
        _checked_step(step, known, layer["filters"])


def _checked_step(step: Any, known: list[int], filters: int) -> None:
    if isinstance(step, dict) and "add" in step:
        _keys(step, "a step", "add")
        _integer(step["add"], "add", 0, len(known) - 1)
        if known[step["add"]] not in (1, filters):
            raise WrongArgument(f"A value of {known[step['add']]} channels is added to {filters}.")
        return
    kind = step.get("kind") if isinstance(step, dict) else None
    if kind not in ACTIVATIONS:
        raise WrongArgument(f"A step is no activation: {str(step)[:100]}.")
    more = {"prelu": ("slopes",), "clip": ("low", "high")}.get(str(kind), ())
    _keys(step, "a step", "kind", *more)
    if kind == "prelu" and (type(step["slopes"]) is not int or step["slopes"] not in (1, filters)):
        raise WrongArgument(f"{str(step['slopes'])[:20]} slopes for {filters} channels.")
    if kind == "clip":
        limits = [step[name] for name in more]
        for one in limits:
            if one is not None and (type(one) not in (int, float) or not abs(one) <= MOST_LIMIT):
                raise WrongArgument(f"A clip's limits are numbers, not {str(limits)[:100]}.")
        if None not in limits and limits[0] > limits[1]:
            raise WrongArgument(f"A clip from {limits[0]} to {limits[1]}.")


def _keys(found: Any, what: str, *names: str) -> None:
    if not isinstance(found, dict) or set(found) != set(names):
        has = sorted(map(str, found))[:20] if isinstance(found, dict) else type(found).__name__
        raise WrongArgument(f"Structure: {what} has {', '.join(names)}, not {has}.")


def _boolean(found: Any, name: str) -> None:
    if not isinstance(found, bool):
        raise WrongArgument(f"Structure: {name} is true or false, not {str(found)[:50]}.")


def _integer(found: Any, name: str, low: int, high: int) -> None:
    if not isinstance(found, int) or isinstance(found, bool) or not low <= found <= high:
        raise WrongArgument(f"Structure: {name} is an integer from {low} to {high}, not {str(found)[:50]}.")


def _integers(found: Any, name: str, low: int, high: int, *, least: int, most: int) -> None:
    if not isinstance(found, list) or not least <= len(found) <= most:
        raise WrongArgument(f"Structure: {name} is a list of {least} to {most} integers, not {str(found)[:50]}.")
    for one in found:
        _integer(one, name, low, high)
