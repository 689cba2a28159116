"""Targets `ethos-u…`: int8 files for Arm's microNPUs, compiled by Vela with every operator on the NPU.

The road of one file: convert to a quantised `.tflite`, rewrite its graph in the ways that may serve this NPU, let Vela
estimate each, take the fastest, check what Vela made of it. The rewrites keep every bit of the quantised file, so they
need no second calibration; the file that Vela was given is the one that is verified in LiteRT.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import compress, product
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keras_efficient.errors import ConversionError, UnsupportedLayer, WrongArgument
from keras_efficient.export import flatbuffer, vela
from keras_efficient.export.graph import Graph, GraphLowering
from keras_efficient.export.targets import Built, Lowered, Option, Request, Target, tflite
from keras_efficient.export.vela import Estimate, System

if TYPE_CHECKING:
    import keras
    import numpy as np

    from keras_efficient.export.calibration import Calibration
    from keras_efficient.export.lowerings.row_phases import PhaseMethod, Shuffle
    from keras_efficient.export.lowerings.tiles import ImageNetwork

__all__ = ["PRECISIONS", "TARGETS", "Layout", "Trial", "compile_file", "convert", "lower", "search", "validate"]

PRECISIONS = ("int8", "int16x8")
CROP = 128  # side of the calibration crops of a network with free axes
MAX_CROPS = 256
TILE_WIDTHS = (96, 640)  # that "auto" tries; narrower tiles are mostly margin, wider ones do not fit SRAM
START_WIDTHS = (320, 240)
HOPELESS = 1.1  # times the whole image's time, at both of those widths
MAX_SRAM_KIB = 16 * 1024  # more than any microcontroller has: worth a word


@dataclass(frozen=True)
class Layout:
    """One way to lay a network out in memory.

    Attributes:
        lowerings: names of the rewrites of the graph.
        graph: the rewritten graph.
        tiles: how many parts of the image are computed after one another, inside one inference.
        tile: height and width of a part, or `None` where the image stays whole.
        margin: columns that a part computes on either side besides its own.
    """

    lowerings: tuple[str, ...]
    graph: Graph
    tiles: int = 1
    tile: tuple[int, int] | None = None
    margin: int = 0

    @property
    def exact(self) -> bool:
        """Whether it gives the very integers of the file that was converted; some rewrites round otherwise."""
        from keras_efficient.export.lowerings.doubled_convolution import DOUBLED_CONVOLUTION
        from keras_efficient.export.lowerings.phase_convolution import PHASE_CONVOLUTION

        return not {PHASE_CONVOLUTION.name, DOUBLED_CONVOLUTION.name} & set(self.lowerings)


@dataclass(frozen=True)
class Trial:
    """A layout with the file that holds it and what Vela said of it: an estimate, or why there is none."""

    layout: Layout
    file: Path
    result: Estimate | str

    @property
    def rank(self) -> tuple[float, float]:
        """Lower is better: nothing left to the CPU first, which counts as no time, then the time."""
        if isinstance(self.result, str):
            return float("inf"), float("inf")
        return self.result.cpu_ops, self.result.ms


def lower(model: keras.Model, request: Request) -> Iterator[Lowered]:
    """The model as for `tflite`; where PReLUs are rewritten, also with these as they are: it differs which is faster.

    PReLUs behind convolutions are rewritten later, in the quantised file, where that rounds least.
    """
    from keras_efficient.export import lowerings
    from keras_efficient.export.lowerings.prelu import OTHER_PRELU_AS_RELU, PRELU_AS_RELU
    from keras_efficient.export.lowerings.transposed_convolution import CONVOLUTION_AND_SHUFFLE

    # Transposed convolutions are taken apart in the quantised file, where both ways are tried.
    kept = (CONVOLUTION_AND_SHUFFLE,)
    first = Lowered(*lowerings.apply(model, tflite.needed_lowerings(request, without=kept)))
    yield first
    if PRELU_AS_RELU.name in first.lowerings:
        without = (OTHER_PRELU_AS_RELU, PRELU_AS_RELU, *kept)
        yield Lowered(*lowerings.apply(model, tflite.needed_lowerings(request, without=without)))


def convert(model: keras.Model, request: Request, path: Path) -> tuple[str, ...]:
    """Writes the quantised `.tflite` with fixed shapes that Vela is given; returns notes.

    A network of free height and width is calibrated on crops, then fixed to the request's size: to run the float
    network on whole frames of 1080 × 1920 would take the calibrator minutes.
    """
    return (*_convert(model, request, path), *tflite.widened(path, request))


def _convert(model: keras.Model, request: Request, path: Path) -> tuple[str, ...]:
    from keras_efficient.export.fixed_shapes import fix_shapes

    freed = _with_free_size(model, request)
    if freed is None:
        return tflite.convert_plainly(model, request, path)
    notes = tflite.convert_plainly(model, freed, path)
    if fix_shapes(path, {spec.name: spec.shape for spec in request.inputs}):  # type: ignore[misc]
        assert freed.calibration is not None
        return (*notes, f"Calibrated on {len(freed.calibration)} crops of {CROP}×{CROP} out of the calibration data.")
    return tflite.convert_plainly(model, request, path)


def _with_free_size(model: keras.Model, request: Request) -> Request | None:
    """The request for a file of free height and width and calibration crops, where model and data allow it."""
    if request.calibration is None or len(request.inputs) != 1:
        return None
    shape, wanted = tuple(model.inputs[0].shape), request.inputs[0].shape
    if len(shape) != 4 or shape[1] is not None or shape[2] is not None:
        return None
    if min(size or 0 for size in wanted[1:3]) < 2 * CROP:
        return None
    spec = replace(request.inputs[0], shape=(1, None, None, shape[3]))
    return replace(request, inputs=(spec,), calibration=_crops(request.calibration, spec.name))


def _crops(calibration: Calibration, name: str) -> Calibration:
    """Squares of `CROP`, spread evenly over each sample."""
    from keras_efficient.export.calibration import Calibration

    height, width = calibration.load(0)[name].shape[1:3]
    rows, columns = height // CROP, width // CROP
    each = max(1, min(rows * columns, ceil(MAX_CROPS / len(calibration))))
    last: dict[int, np.ndarray] = {}

    def load(index: int) -> dict[str, np.ndarray]:
        sample, part = divmod(index, each)
        if sample not in last:
            last.clear()  # neighbours are asked for one after another
            last[sample] = calibration.load(sample)[name]
        place = part * (rows * columns) // each
        top, left = place // columns * CROP, place % columns * CROP
        return {name: last[sample][:, top : top + CROP, left : left + CROP]}

    return Calibration(len(calibration) * each, load, calibration.source)


def search(
    graph: Graph,
    system: System,
    folder: Path,
    *,
    tile: Any = "auto",
    on_progress: Callable[[str], None] | None = None,
) -> list[Trial]:
    """Every layout that was tried, the best first.

    Args:
        graph: a quantised file with fixed shapes.
        system: for which Vela estimates.
        folder: for the files.
        tile: `None` for the whole image at once, ``(height, width)`` in input pixels, or ``"auto"``.
        on_progress: called with one line now and then.
    """
    from keras_efficient.export.lowerings.tiles import find_image_network

    trials: list[Trial] = []

    def attempt(layouts: Sequence[Layout]) -> list[Trial]:
        made = _estimate(layouts, system, folder, len(trials), on_progress)
        trials.extend(made)
        return made

    for simple, names in _simplified(graph):
        network = find_image_network(simple)
        if isinstance(tile, tuple):
            if network is None:
                continue
            attempt([_tiled(simple, network, names, tile, method) for method in _methods(simple, network)])
            continue
        whole = attempt(list(_whole(simple, names)))
        if tile == "auto" and network is not None and system.has_dram and whole:
            _search_tiles(simple, network, names, attempt, min(trial.rank[1] for trial in whole))
    if not trials:
        raise WrongArgument(
            f"tile={tile}: this network cannot be cut into tiles.",
            hint="Only networks of one image at one size can; leave tile= out.",
        )
    return sorted(trials, key=lambda trial: trial.rank)


def _simplified(graph: Graph) -> Iterator[tuple[Graph, tuple[str, ...]]]:
    """The graph without what costs time for nothing, with and without the rewrites that do not always pay."""
    from keras_efficient.export.lowerings.doubled_convolution import DOUBLED_CONVOLUTION
    from keras_efficient.export.lowerings.idle_clips import IDLE_CLIPS
    from keras_efficient.export.lowerings.late_shuffle import LATE_SHUFFLE
    from keras_efficient.export.lowerings.phase_convolution import PHASE_CONVOLUTION

    def applied(graph: Graph, *lowerings: GraphLowering) -> tuple[Graph, tuple[str, ...]]:
        names = []
        for lowering in lowerings:
            lowered = lowering.function(graph)
            if lowered is not None:
                graph = lowered
                names.append(lowering.name)
        return graph, tuple(names)

    optional = [
        lowering for lowering in (PHASE_CONVOLUTION, DOUBLED_CONVOLUTION) if lowering.function(graph) is not None
    ]
    for chosen in product((False, True), repeat=len(optional)):
        yield applied(graph, IDLE_CLIPS, *compress(optional, chosen), LATE_SHUFFLE)


def _whole(graph: Graph, names: tuple[str, ...]) -> Iterator[Layout]:
    """The image in one piece, its depth-to-space in every way there is."""
    from keras_efficient.export.lowerings.row_phases import find_shuffle, phase_methods
    from keras_efficient.export.lowerings.tiles import with_row_phases

    shuffles = [shuffle for op in graph.ops if (shuffle := find_shuffle(graph, op)) is not None]
    if not shuffles:
        yield Layout(names, graph)
        return
    own = {shuffle.source: list(phase_methods(graph, shuffle)) for shuffle in shuffles}
    for number in range(max(map(len, own.values()))):
        chosen = {source: methods[min(number, len(methods) - 1)] for source, methods in own.items()}
        rewritten = with_row_phases(graph, _chooser(chosen))
        labels = dict.fromkeys(method.name for method in chosen.values())
        yield Layout((*names, *labels), graph if rewritten is None else rewritten)


def _chooser(methods: Mapping[int, PhaseMethod]) -> Callable[[Shuffle], PhaseMethod]:
    return lambda shuffle: methods[shuffle.source]


def _methods(graph: Graph, network: ImageNetwork) -> list[PhaseMethod | None]:
    from keras_efficient.export.lowerings.row_phases import phase_methods

    return [None] if network.shuffle is None else list(phase_methods(graph, network.shuffle))


def _tiled(
    graph: Graph, network: ImageNetwork, names: tuple[str, ...], tile: tuple[int, int], method: PhaseMethod | None
) -> Layout:
    from keras_efficient.export.lowerings.tiles import in_tiles, margin

    _, height, width, _ = graph.tensor(network.source).shape
    rows, columns = min(tile[0], height), min(tile[1], width)
    step = _step(network.shuffle, width)
    columns = min(width, ceil(columns / step) * step)
    count = ceil(height / rows) * ceil(width / columns)
    label = () if method is None else (method.name,)
    made = in_tiles(graph, network, (rows, columns), method)
    return Layout((*names, *label, "tiles"), made, count, (rows, columns), margin(network, method))


def _step(shuffle: Shuffle | None, width: int) -> int:
    """The width of a tile must be a multiple of this, so that its row phases fill groups of 16 numbers."""
    from keras_efficient.export.lowerings.row_phases import group_pixels

    step = group_pixels(shuffle.run) if shuffle else 1
    return step if width % step == 0 else 1


def _search_tiles(
    graph: Graph,
    network: ImageNetwork,
    names: tuple[str, ...],
    attempt: Callable[[Sequence[Layout]], list[Trial]],
    whole: float,
) -> None:
    """Columns as high as the image: every method at two widths, then all widths, then their neighbours.

    `whole` is the best time without tiles, in ms.
    """
    _, height, width, _ = graph.tensor(network.source).shape
    step = max(8, _step(network.shuffle, width))
    widths = _tile_widths(width, step)
    if not widths:
        return

    def nearest(wanted: int) -> int:
        return min(widths, key=lambda w: abs(w - wanted))

    def attempt_pairs(pairs: Sequence[tuple[PhaseMethod | None, int]]) -> list[Trial]:
        return attempt([_tiled(graph, network, names, (height, w), method) for method, w in pairs])

    starts = sorted({nearest(wanted) for wanted in START_WIDTHS})
    pairs = [(method, w) for w in starts for method in _methods(graph, network)]
    made = attempt_pairs(pairs)
    best = min(range(len(made)), key=lambda i: made[i].rank)
    if made[best].rank[1] > HOPELESS * whole:
        return
    method = pairs[best][0]
    made += attempt_pairs([(method, w) for w in widths if w not in starts])
    leaders = [trial.layout.tile[1] for trial in sorted(made, key=lambda trial: trial.rank)[:2] if trial.layout.tile]
    near = {w + offset * step for w in leaders for offset in (-2, -1, 1, 2, 4)}
    attempt_pairs(
        [(method, w) for w in sorted(near - set(widths)) if TILE_WIDTHS[0] <= w <= min(width, TILE_WIDTHS[1])]
    )


def _tile_widths(width: int, step: int) -> list[int]:
    """Widths of two and more equal tiles, rounded up to `step`."""
    narrowest, widest = TILE_WIDTHS
    equal = (ceil(width / count / step) * step for count in range(2, ceil(width / narrowest) + 1))
    return [w for w in dict.fromkeys(equal) if narrowest <= w <= widest]


def _estimate(
    layouts: Sequence[Layout],
    system: System,
    folder: Path,
    start: int,
    on_progress: Callable[[str], None] | None,
) -> list[Trial]:
    """Writes the layouts' files and has Vela compile them."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"layout-{start + number}.tflite" for number in range(len(layouts))]
    for file, layout in zip(files, layouts, strict=True):
        file.write_bytes(layout.graph.to_bytes())

    def report(done: int) -> None:
        if on_progress is not None:
            on_progress(f"estimating layout {start + done} for {system.accelerator}")

    results = vela.compile_files(files, system, folder, report) if files else []
    return [Trial(layout, file, result) for layout, file, result in zip(layouts, files, results, strict=True)]


def compile_file(built: Built, request: Request, folder: Path) -> Built:
    """Finds the fastest layout of a quantised file, and checks what Vela made of it.

    Raises:
        UnsupportedLayer: an operator would run on the CPU, and ``allow_cpu`` is not set.
        ConversionError: Vela failed, or its file is not the one that it was given.
    """
    system = _system(request)
    trials = search(
        Graph.from_bytes(built.runnable.read_bytes()),
        system,
        folder / "layouts",
        tile=_tile(request),
        on_progress=request.on_progress,
    )
    best = trials[0]
    if isinstance(best.result, str):
        raise ConversionError(f"Vela could not compile the model: {best.result}")
    compiled = best.file.with_name(f"{best.file.stem}_vela.tflite")
    left = _left_to_cpu(compiled)
    _check_coverage(left, compiled, system, bool(request.options["allow_cpu"]))
    _check_interface(best.file, compiled)
    if best.layout.exact:
        _check_bits(built.runnable, best.file, request)
    return replace(
        built,
        path=compiled,
        runnable=best.file,
        lowerings=(*built.lowerings, *best.layout.lowerings),
        notes=(*built.notes, *_notes(best, trials, system, left)),
        npu=_figures(best, system, left),
        cost=best.result.ms + 1e6 * len(left),
    )


def validate(request: Request) -> None:
    """Refuses a system that the accelerator cannot have, and a tile that is none.

    Raises:
        WrongArgument: the option that is wrong, with what may stand there.
    """
    _system(request)
    _tile(request)


def _system(request: Request) -> System:
    options = request.options
    return vela.check_system(request.target.name, options["system_config"], options["memory_mode"])


def _tile(request: Request) -> Any:
    """The option `tile` as `None`, ``"auto"`` or a pair of sizes."""
    tile = request.options["tile"]
    if tile in (None, "none"):
        return None
    if tile == "auto":
        return tile
    sizes = tile.lower().replace("×", "x").split("x") if isinstance(tile, str) else tile
    try:
        height, width = (int(size) for size in sizes)
    except (TypeError, ValueError) as err:
        raise WrongArgument(f"tile={tile!r} is no tile.", hint="Give (height, width), 'auto' or None.") from err
    if height < 1 or width < 1:
        raise WrongArgument(f"tile={tile!r}: sizes are whole numbers from 1 on.")
    return height, width


def _left_to_cpu(compiled: Path) -> list[flatbuffer.Operator]:
    """The operators that Vela did not move into its own."""
    return [op for op in flatbuffer.operators(flatbuffer.read_bytes(compiled)) if op.name != "ethos-u"]


def _check_coverage(left: Sequence[flatbuffer.Operator], compiled: Path, system: System, allow_cpu: bool) -> None:
    total = flatbuffer.operators(flatbuffer.read_bytes(compiled))
    if len(total) == len(left):
        raise UnsupportedLayer(
            left[0].layer if left else "model",
            f"nothing of this model can run on {system.accelerator}; {left[0].name if left else 'it'} is the first.",
            hint="Use the target 'tflite'.",
        )
    if left and not allow_cpu:
        others = f", nor {len(left) - 1} more operators" if len(left) > 1 else ""
        raise UnsupportedLayer(
            _layer_of(left[0]),
            f"{system.accelerator} cannot run its {left[0].dtype} {left[0].name}{others}.",
            hint="Replace the layer, or pass allow_cpu=True to leave such operators to the CPU (they count no time).",
        )


def _layer_of(operator: flatbuffer.Operator) -> str:
    """The Keras layer of an operator; the model's output has lost its name, so its input's then."""
    if "/" in operator.outputs[0].name:
        return operator.layer
    named = [tensor.name for tensor in operator.inputs if tensor is not None and "/" in tensor.name]
    return f"after {flatbuffer.layer_path(named[0])}" if named else operator.layer


def _check_interface(given: Path, compiled: Path) -> None:
    """Inputs and outputs keep shape, number format and scale, and one operator holds the NPU's program."""
    graphs = [Graph.from_bytes(path.read_bytes()) for path in (given, compiled)]
    faces = [
        [(graph.tensor(i).shape, graph.tensor(i).grid) for i in (*graph.inputs, *graph.outputs)] for graph in graphs
    ]
    if faces[0] != faces[1]:
        raise ConversionError("Vela's file has other inputs or outputs than the file that it was given.")
    programs = sum(op.name == "ethos-u" for op in flatbuffer.operators(compiled.read_bytes()))
    left = len(_left_to_cpu(compiled))
    if programs != 1 and not left:
        raise ConversionError(f"Vela's file holds {programs} NPU programs in the place of one.")


def _check_bits(converted: Path, rewritten: Path, request: Request) -> None:
    """The chosen layout gives the integers of the file as it was converted, on a calibration sample."""
    import numpy as np

    from keras_efficient.export.verify import grouped

    assert request.calibration is not None
    sample = next(grouped([request.calibration.load(0)], request.inputs))
    before, after = (tflite.open_file(path).run(sample) for path in (converted, rewritten))
    for name, values in before.items():
        if not np.array_equal(values, after[name]):
            count = int(np.count_nonzero(values != after[name]))
            raise ConversionError(f"A rewrite of the graph changed {count} of {values.size} values of output {name!r}.")


def _figures(best: Trial, system: System, left: Sequence[flatbuffer.Operator]) -> dict[str, Any]:
    estimate, layout = best.result, best.layout
    assert isinstance(estimate, Estimate)
    return {
        **asdict(system),
        "ms_per_frame": estimate.ms,
        "fps": 1e3 / estimate.ms if estimate.ms else None,
        "npu_ops": len(layout.graph.ops) - len(left),
        "cpu_ops": len(left),
        "sram_kib": estimate.sram_kib,
        "dram_bytes_per_frame": estimate.dram_bytes,
        "tiles": layout.tiles,
        "tile": list(layout.tile) if layout.tile else None,
        "tile_margin": layout.margin,
        "npu_cycles": estimate.npu_cycles,
        "clock_mhz": estimate.clock_mhz,
        "vela": vela.version(),
    }


def _notes(best: Trial, trials: Sequence[Trial], system: System, left: Sequence[flatbuffer.Operator]) -> Iterator[str]:
    layout = best.layout
    yield f"ms_per_frame is the estimate of Vela {vela.version()} for {system.accelerator}; nothing ran on an NPU."
    if len(trials) > 1:
        yield f"The fastest of {len(trials)} layouts was taken."
    if layout.tiles > 1 and layout.tile:
        yield (
            f"One inference computes the whole image, in {layout.tiles} tiles of {layout.tile[0]}×{layout.tile[1]} and "
            f"a margin of {layout.margin} columns{'; the result is the same to the last bit' if layout.exact else ''}."
        )
    sparse, dense = _sparse_convolutions(layout.graph)
    if sparse and system.family == "u85":
        yield f"{sparse} of {sparse + dense} convolutions are 2:4 sparse along their input channels: at double speed."
    if left:
        names = ", ".join(dict.fromkeys(operator.name for operator in left))
        yield f"On the CPU, counted with no time: {names}."
    assert isinstance(best.result, Estimate)
    if best.result.sram_kib > MAX_SRAM_KIB:
        yield f"The estimate assumes {best.result.sram_kib / 1024:.0f} MiB of SRAM; give a smaller input_shape=."


def _sparse_convolutions(graph: Graph) -> tuple[int, int]:
    """How many kernels have at most two non-zeros in every four consecutive input channels, and how many have more."""
    import numpy as np

    sparse = dense = 0
    for index in dict.fromkeys(op.inputs[1] for op in graph.ops if op.name == "CONV_2D"):
        kernel = graph.tensor(index).data
        if kernel is None or kernel.shape[-1] < 4 or graph.tensor(index).name == "select":
            continue
        groups = np.pad(kernel != 0, [(0, 0)] * 3 + [(0, -kernel.shape[-1] % 4)]).reshape(-1, 4)
        if groups.sum(axis=1).max() <= 2:
            sparse += 1
        else:
            dense += 1
    return sparse, dense


def _targets() -> Iterator[Target]:
    for accelerator in vela.ACCELERATORS:
        default = vela.default_system(accelerator)
        systems = vela.SYSTEMS[default.family]
        modes = tuple(dict.fromkeys(mode for modes in systems.values() for mode in modes))
        yield Target(
            name=accelerator,
            suffix=".tflite",
            precisions=PRECISIONS,
            calibrated=PRECISIONS,
            static=True,
            lower=lower,
            convert=convert,
            check=tflite.check,
            compile=compile_file,
            validate=validate,
            open=tflite.open_file,
            inspect=tflite.inspect,
            write_metadata=flatbuffer.write_metadata,
            options={
                "system_config": Option(default.system_config, "Vela's system configuration", tuple(systems)),
                "memory_mode": Option(None, f"Vela's memory mode, by default {default.memory_mode}", (None, *modes)),
                "allow_cpu": Option(False, "leave operators to the CPU that the NPU cannot run", (False, True)),
                "tile": Option("auto", "compute the image in tiles: (height, width), auto or None"),
                "wide_probabilities": tflite.WIDE_PROBABILITIES,
            },
            summary=f"Arm Ethos-{accelerator.removeprefix('ethos-').upper()} NPU, by Vela",
        )


TARGETS = tuple(_targets())
