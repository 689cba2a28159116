"""Kernels on a GPU beside PyTorch and JAX; needs these, and neither TensorFlow nor Keras.

All but JAX is timed by replays of CUDA graphs, over inputs that take turns and do not fit into the L2 cache together;
numbers are medians.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from math import exp, log, prod
from typing import Any

import numpy as np

from benchmarks.bolt_networks import BERT, CONVOLUTIONS, PAIRS, ROW_PAIRS, convolution, pair, row_pair, rows_of, sesr
from benchmarks.harness import Row
from keras_efficient.errors import KerasEfficientError
from keras_efficient.export.bolt import tuning
from keras_efficient.export.bolt.architectures import architecture
from keras_efficient.export.bolt.region import Activate, Add, Region
from keras_efficient.export.bolt.search import Candidate, candidates

__all__ = ["rows"]

NOT_MEASURED = "no GPU was at hand"
LAUNCHES = 20
Case = tuple[str, Region, tuple[int, int, int]]  # a name, what is computed, and images, height and width
CANDIDATES = 16
SECONDS = 20.0  # of search, for a region


def rows(quick: bool) -> Iterator[Row]:
    """All rows; without a GPU each says that it was not measured."""
    try:
        from keras_efficient.export.bolt.meter import CudaMeter

        bench: _Bench | None = _Bench(CudaMeter(), quick)
    except KerasEfficientError as err:
        bench, why = None, NOT_MEASURED
        print(err.message, file=sys.stderr)
    else:
        why = ""
    if bench is None:
        for what, unit, bar in _BARS:
            yield Row(what, None, unit, bar=bar, why=why)
        return
    yield from bench.rows()


_BARS = (
    ("every kernel against float64: the largest relative error", "", "≤ 0.001"),
    ("SESR-M5 ×2, 1080p: time", "ms", "≤ 0.25 ms; floor 0.07 to 0.11"),
    ("SESR-M5 ×2, 1080p: the best of torch eager, torch.compile and jax.jit over ours", "ms", "≥ 3×"),
    ("SESR-M5 ×2, 540p: the best peer over ours", "ms", "≥ 2×"),
    ("SESR-M5 ×2, 256×256: the best peer over ours", "ms", "≥ 2×"),
    ("convolutions with epilogues: geometric mean of the best peer over ours", "", "≥ 1.3×"),
    ("pairs of convolutions and of products: geometric mean of the best peer over ours", "", "≥ 1.1×"),
    ("products of BERT with GELU: the slowest of cuBLASLt over ours", "", "≥ 0.95×"),
    ("search for the kernels of a network, from cold", "s", "≤ 1200 s"),
    ("the same from the file of measurements", "s", "≤ 10 s"),
)


class _Bench:
    def __init__(self, meter: Any, quick: bool):
        self.meter, self.quick = meter, quick
        self.errors: list[float] = []
        self.arch = architecture(meter.arch)

    def rows(self) -> Iterator[Row]:
        bars = {what: (unit, bar) for what, unit, bar in _BARS}
        names = list(bars)
        start = time.perf_counter()
        ours = self.ours(sesr(5), (1, 1080, 1920))
        cold = time.perf_counter() - start
        for number, (label, shape) in enumerate(
            (("1080p", (1, 1080, 1920)), ("540p", (1, 540, 960)), ("256×256", (1, 256, 256)))
        ):
            region = sesr(5)
            best = ours if number == 0 else self.ours(region, shape)
            peers = self.peers(region, shape)
            name, peer = min(peers.items(), key=lambda pair: pair[1])
            details = {"peers, ms": {one: 1000 * value for one, value in peers.items()}, "ours": best.to_dict()}
            if number == 0:
                details["floor, ms"] = [0.071, 0.11]
                yield self.row(names[1], 1000 * best.seconds, None, best.seconds <= 0.25e-3, details)
            wanted = 3 if number == 0 else 2
            ratio = peer / best.seconds
            what = names[2 + number]
            details["best peer"] = name
            barred: dict[str, Any] = {"bar": bars[what][1], "reached": ratio >= wanted, "details": details}
            yield Row(what, 1000 * best.seconds, "ms", 1000 * peer, ratio, **barred)
            del label
        yield from self.several(names[5], 1.3, self.convolutions())
        yield from self.several(names[6], 1.1, self.pairs())
        yield from self.products(names[7])
        yield self.row(names[0], max(self.errors), None, max(self.errors) <= 1e-3, {"kernels": len(self.errors)})
        yield self.row(names[8], cold, None, cold <= 1200, {"network": "SESR-M5, 1080p: one kernel"})
        yield self.again(names[9])

    def row(self, what: str, value: float, peer: float | None, reached: bool, details: dict[str, Any]) -> Row:
        unit, bar = next((unit, bar) for one, unit, bar in _BARS if one == what)
        return Row(what, value, unit, peer, None, bar, reached, "", details)

    def ours(self, region: Region, shape: tuple[int, int, int], cache: tuning.Cache | None = None) -> Candidate:
        """The fastest candidate, measured."""
        ranking = candidates(region, self.arch, *shape, limit=4 if self.quick else CANDIDATES)
        deadline = time.monotonic() + SECONDS
        how: dict[str, Any] = {"arch": self.meter.arch, "deadline": deadline, "cache": cache}
        found, refused = tuning.tuned(region, ranking, shape, self.meter, **how)
        if not found[0].measured:
            raise RuntimeError(f"No kernel of {len(ranking)} ran: {refused[:3]}")
        source = found[0].emit(region)
        from keras_efficient.export.bolt import build

        cubin = build.compiled_source(source, self.meter.arch).cubin
        self.errors.append(self.meter.error(region, source, cubin))
        return found[0]

    def again(self, what: str) -> Row:
        import tempfile
        from pathlib import Path

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "measured.jsonl"
            self.ours(sesr(5), (1, 540, 960), tuning.Cache(path))
            start = time.perf_counter()
            self.ours(sesr(5), (1, 540, 960), tuning.Cache(path))
            seconds = time.perf_counter() - start
        return self.row(what, seconds, None, seconds <= 10, {})

    def several(self, what: str, bar: float, cases: Iterator[Case]) -> Iterator[Row]:
        ratios = []
        for label, region, shape in cases:
            best, peers = self.ours(region, shape), self.peers(region, shape)
            name, peer = min(peers.items(), key=lambda pair: pair[1])
            ratios.append(peer / best.seconds)
            roof = _roofline(region, shape, self.arch.memory_rate)
            details = {
                "peers, ms": {one: 1000 * value for one, value in peers.items()},
                "best peer": name,
                "roofline of memory, ms": 1000 * roof,
                "ours": best.to_dict(),
            }
            yield Row(label, 1000 * best.seconds, "ms", 1000 * peer, ratios[-1], details=details)
        mean = exp(sum(map(log, ratios)) / len(ratios))
        yield Row(what, mean, "", ratio=mean, bar=f"≥ {bar}×", reached=mean >= bar, details={"ratios": ratios})

    def convolutions(self) -> Iterator[Case]:
        for case in CONVOLUTIONS[: 2 if self.quick else None]:
            n, size, channels, filters, kernel, stride, activation, residual = case
            region = convolution(channels, filters, kernel, stride, activation, residual)
            width = 1920 if size == 1080 else size
            more = " + residual" if residual else ""
            label = f"{n}×{size}×{width}, {kernel}×{kernel}, {channels} to {filters}, /{stride}, {activation}{more}"
            yield label, region, (n, size, width)

    def pairs(self) -> Iterator[Case]:
        for n, size, channels, filters, stride in PAIRS[: 1 if self.quick else None]:
            label = f"{n}×{size}², 3×3 {channels} to {filters}, /{stride}, and 1×1"
            yield label, pair(channels, filters, stride), (n, size, size)
        for number, channels, middle, filters in ROW_PAIRS[: 1 if self.quick else None]:
            label = f"{number} rows, {channels} to {middle} to {filters}"
            yield label, row_pair(channels, middle, filters), (1, 1, number)

    def products(self, what: str) -> Iterator[Row]:
        ratios = []
        for number, filters, channels in BERT:
            region = rows_of(channels, filters, "gelu_tanh")
            best, peers = self.ours(region, (1, 1, number)), self.peers(region, (1, 1, number))
            peer = min(peers.values())
            ratios.append(peer / best.seconds)
            rate = 2e-12 * number * filters * channels / best.seconds
            details = {"peers, ms": {one: 1000 * value for one, value in peers.items()}, "TFLOP/s": rate}
            label = f"{number} rows, {channels} to {filters}, GELU"
            yield Row(label, 1000 * best.seconds, "ms", 1000 * peer, ratios[-1], details=details)
        yield Row(what, min(ratios), "", ratio=min(ratios), bar="≥ 0.95×", reached=min(ratios) >= 0.95)

    def peers(self, region: Region, shape: tuple[int, int, int]) -> dict[str, float]:
        """Seconds of PyTorch, plain and compiled, and of JAX; what fails is left out, with a word on stderr."""
        found = {}
        peers = {"torch eager": _eager, "torch.compile": _compiled, "jax.jit": _jax, "cuBLASLt": _cublas}
        for name, run in peers.items():
            try:
                value = run(region, shape)
            except Exception as err:  # a peer that cannot is no reason to measure nothing
                print(f"{name}: {type(err).__name__}: {str(err)[:200]}", flush=True)
                continue
            if value is not None:
                found[name] = value
        return found


def _roofline(region: Region, shape: tuple[int, int, int], rate: float) -> float:
    """Seconds in which memory moves inputs, weights and output once."""
    n, height, width = shape
    size = (1, width) if region.rows else (height, width)
    numbers = n * prod(size) * region.channels[0]
    for layer in region.layers:
        size = size if region.rows else layer.size(*size)
    numbers += n * prod(size) * (region.layers[-1].filters + sum(region.channels[1:]))
    return 2 * (numbers + sum(layer.weights.size for layer in region.layers)) / rate


# ------------------------------------------------------------------------------------------------------------- PyTorch


def _module(region: Region) -> Any:
    """A region in PyTorch: channels-last images in half precision."""
    import torch
    from torch.nn import functional

    def tensor(array: np.ndarray) -> Any:
        return torch.tensor(np.ascontiguousarray(array), dtype=torch.float16, device="cuda")

    weights = [
        tensor(layer.weights[0, 0].T)
        if region.rows
        else tensor(layer.weights.transpose(3, 2, 0, 1)).contiguous(memory_format=torch.channels_last)
        for layer in region.layers
    ]
    biases = [tensor(layer.bias) for layer in region.layers]
    slopes = {
        id(step): tensor(np.broadcast_to(step.slopes, layer.filters))
        for layer in region.layers
        for step in layer.steps
        if isinstance(step, Activate) and step.slopes is not None
    }
    kinds: dict[str, Callable[[Any], Any]] = {
        "relu": functional.relu,
        "gelu": functional.gelu,
        "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
        "silu": functional.silu,
        "hard_swish": functional.hardswish,
        "softplus": functional.softplus,
    }

    def forward(*inputs: Any) -> Any:
        values = list(inputs)
        for number, layer in enumerate(region.layers):
            x, weight, bias = values[layer.value], weights[number], biases[number]
            if region.rows:
                x = functional.linear(x, weight, bias)
            else:
                x = functional.conv2d(x, weight, bias, stride=layer.stride, padding=layer.padding[:2])
            for step in layer.steps:
                if isinstance(step, Add):
                    x = x + values[step.value]
                elif step.kind == "prelu":
                    x = functional.prelu(x, slopes[id(step)])
                else:
                    x = kinds[step.kind](x)
            values.append(x)
        return functional.pixel_shuffle(values[-1], region.shuffle) if region.shuffle > 1 else values[-1]

    return forward


def _torch_inputs(region: Region, shape: tuple[int, int, int]) -> list[list[Any]]:
    """Sets of inputs, twice as large together as the L2 cache."""
    import torch

    n, height, width = shape
    size = (height, width)
    shapes = [(width, region.channels[0])] if region.rows else [(n, region.channels[0], *size)]
    for layer in region.layers:
        size = size if region.rows else layer.size(*size)
    shapes += [(n, channels, *size) for channels in region.channels[1:]]
    total = 2 * sum(prod(one) for one in shapes) + 2 * n * prod(size) * region.layers[-1].filters
    count = int(min(max(2 * torch.cuda.get_device_properties(0).L2_cache_size // total + 1, 2), 64))
    kind = {} if region.rows else {"memory_format": torch.channels_last}
    how: dict[str, Any] = {"dtype": torch.float16, "device": "cuda"}
    return [[torch.randn(one, **how).contiguous(**kind) for one in shapes] for _ in range(count)]


def _torch_seconds(run: Callable[..., Any], sets: list[list[Any]]) -> float:
    """Of one call, in a graph of several."""
    import torch

    with torch.inference_mode():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for inputs in sets[:3]:
                run(*inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for number in range(LAUNCHES):
                run(*sets[number % len(sets)])
        times = []
        for _ in range(12):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end) / 1000 / LAUNCHES)
    return statistics.median(times[2:])


def _eager(region: Region, shape: tuple[int, int, int]) -> float:
    return _torch_seconds(_module(region), _torch_inputs(region, shape))


def _compiled(region: Region, shape: tuple[int, int, int]) -> float:
    import torch

    torch._dynamo.reset()
    # Graphs are captured by ours, so that all are timed alike.
    run = torch.compile(_module(region), mode="max-autotune-no-cudagraphs")
    return _torch_seconds(run, _torch_inputs(region, shape))


def _cublas(region: Region, shape: tuple[int, int, int]) -> float | None:
    """cuBLASLt with its own epilogue, for one product with GELU."""
    import torch

    step = region.layers[0].steps[0] if region.layers[0].steps else None
    if not region.rows or len(region.layers) > 1 or getattr(step, "kind", None) != "gelu_tanh":
        return None
    layer = region.layers[0]
    weight = torch.tensor(layer.weights[0, 0], dtype=torch.float16, device="cuda")
    bias = torch.tensor(layer.bias, dtype=torch.float16, device="cuda")
    run = lambda x: torch.ops.aten._addmm_activation(bias, x, weight, use_gelu=True)  # noqa: E731
    return _torch_seconds(run, _torch_inputs(region, shape))


# ----------------------------------------------------------------------------------------------------------------- JAX


def _jax_function(region: Region) -> Callable[..., Any]:
    """A region in JAX: N×H×W×C images in half precision."""
    import jax
    import jax.numpy as jnp
    from jax import lax

    kinds: dict[str, Callable[[Any], Any]] = {
        "relu": jax.nn.relu,
        "gelu": lambda x: jax.nn.gelu(x, approximate=False),
        "gelu_tanh": jax.nn.gelu,
        "silu": jax.nn.silu,
        "hard_swish": jax.nn.hard_swish,
        "softplus": jax.nn.softplus,
    }
    weights = [jnp.asarray(layer.weights, jnp.float16) for layer in region.layers]
    biases = [jnp.asarray(layer.bias, jnp.float16) for layer in region.layers]

    def forward(*inputs: Any) -> Any:
        values = list(inputs)
        for number, layer in enumerate(region.layers):
            x = values[layer.value]
            if region.rows:
                x = x @ weights[number][0, 0]
            else:
                pads = ((layer.padding[0], layer.padding[2]), (layer.padding[1], layer.padding[3]))
                x = lax.conv_general_dilated(
                    x, weights[number], layer.stride, pads, dimension_numbers=("NHWC", "HWIO", "NHWC")
                )
            x = x + biases[number]
            for step in layer.steps:
                if isinstance(step, Add):
                    x = x + values[step.value]
                elif step.kind == "prelu":
                    x = jnp.where(x > 0, x, x * jnp.asarray(step.slopes, jnp.float16))
                else:
                    x = kinds[step.kind](x)
            values.append(x)
        x = values[-1]
        if region.shuffle > 1:
            n, height, width, channels = x.shape
            block = region.shuffle
            x = x.reshape(n, height, width, block, block, channels // block**2).transpose(0, 1, 3, 2, 4, 5)
            x = x.reshape(n, height * block, width * block, -1)
        return x

    return forward


def _jax(region: Region, shape: tuple[int, int, int]) -> float:
    """Many calls, one behind the other, until all results are there: JAX has no graphs to replay."""
    import jax
    import jax.numpy as jnp

    n, height, width = shape
    size = (height, width)
    shapes = [(width, region.channels[0])] if region.rows else [(n, *size, region.channels[0])]
    for layer in region.layers:
        size = size if region.rows else layer.size(*size)
    shapes += [(n, *size, channels) for channels in region.channels[1:]]
    key = jax.random.key(0)
    sets = [[jax.random.normal(key, one, jnp.float16) for one in shapes] for _ in range(8)]
    run = jax.jit(_jax_function(region))
    for inputs in sets:
        run(*inputs).block_until_ready()
    times = []
    for _ in range(12):
        start = time.perf_counter()
        found = [run(*sets[number % len(sets)]) for number in range(5 * LAUNCHES)]
        jax.block_until_ready(found)
        times.append((time.perf_counter() - start) / (5 * LAUNCHES))
    return statistics.median(times[2:])
