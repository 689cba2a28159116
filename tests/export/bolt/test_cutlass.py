"""Kernels made with CUTLASS: which regions they serve, that they compile, and, with stand-ins for a few instructions,
what they compute; and what is offered where nvcc or CUTLASS are missing."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from keras_efficient.errors import ConversionError, MissingDependency, UnsupportedLayer, VerificationError
from keras_efficient.export.bolt import assembling, build, checking, host
from keras_efficient.export.bolt.architectures import ARCHITECTURES, architecture
from keras_efficient.export.bolt.grids import launch
from keras_efficient.export.bolt.region import ACTIVATIONS, Activate, Add, Layer, Region
from keras_efficient.export.bolt.search import candidates, left_out, refusals
from keras_efficient.export.bolt.templates import cutlass, tile
from keras_efficient.export.bolt.templates.cutlass import Cutlass

from . import kernels
from .kernels import bias, conv, prelu, sesr, weights

SMALL = Cutlass(64, 64, 2, 2, 32, 3)
STAND_INS = Path(__file__).parent / "cutlass_host"
ALL = tuple(
    prelu(72) if kind == "prelu" else Activate(kind, low=-0.5, high=0.7) if kind == "clip" else Activate(kind)
    for kind in ACTIVATIONS
)


def rows(channels, filters, *steps):
    return Layer(0, weights(1, 1, channels, filters), bias(filters), steps=steps)


PRODUCT = Region((rows(136, 200, prelu(200), Add(1), Activate("gelu")),), (136, 200), rows=True)
STRIDED = {"stride": (2, 1), "dilation": (1, 2), "padding": (0, 2, 1, 1)}
IMAGES = Region((conv(0, 3, 72, 136, Add(1), prelu(136), **STRIDED),), (72, 136))
LARGE = Region((rows(1024, 1024, Activate("relu")),), (1024,), rows=True)
CASES = {
    "rows, tiles of filters, less than a tile of the inner axis left": (PRODUCT, SMALL, (77,)),
    "stride, dilation, uneven padding, two images": (IMAGES, Cutlass(64, 128, 2, 2, 64, 3), (2, 11, 13)),
    "all activations, one place": (Region((conv(0, 3, 16, 72, *ALL),), (16,)), SMALL, (1, 1, 1)),
    "fewer parts of the inner axis than stages": (
        Region((conv(0, 1, 128, 64, prelu(64), stride=(2, 2)),), (128,)),
        Cutlass(64, 64, 2, 2, 64, 4),
        (1, 9, 9),
    ),
}


@pytest.fixture(scope="module")
def headers():
    """Folders of CUTLASS's and CUDA's headers, all of CUDA's of one version."""
    try:
        own, folders = build.cutlass(), build._include_folders()
    except MissingDependency as err:
        pytest.skip(str(err))
    for one in folders:
        if (one / "crt/host_defines.h").is_file():
            return own, one, one / "cccl"
    pytest.skip("nvidia-cuda-crt is not installed")


@pytest.fixture
def interpreter(headers, monkeypatch):
    if not checking.is_possible():
        pytest.skip("g++ is not installed")
    files = b"".join(path.read_bytes() for path in sorted(STAND_INS.rglob("*.h*")))
    known = f"-DSTAND_INS_{hashlib.sha256(files).hexdigest()[:16]}"
    folders = [f"-I{one}" for one in (STAND_INS, *headers)]
    own = ("-fpermissive", "-DBOLT_HOST_CUTLASS", known, "-include", str(STAND_INS / "built_ins.hpp"), *folders)
    monkeypatch.setattr(host, "FLAGS", (*host.FLAGS, *own))


@pytest.fixture
def complete(monkeypatch):
    """A machine with all that is needed, as far as the search sees."""
    monkeypatch.setattr(build, "missing_for_cutlass", lambda: None)


@pytest.mark.parametrize("name", CASES)
def test_kernels_compute_what_regions_mean(interpreter, name):
    region, parameters, shape = CASES[name]
    error, counted = kernels.run(region, cutlass.emit(region, parameters), *shape)
    assert error < 1e-3
    assert counted.conflicts == 1


@pytest.mark.parametrize(
    ("pattern", "wrong"),
    [
        ("if (i > 0) barrier();", ";"),
        ("place < places && filter < filters ?", "filter < filters ?"),
    ],
    ids=["barrier", "last places"],
)
def test_a_broken_kernel_is_found_out(interpreter, pattern, wrong):
    source = cutlass.emit(PRODUCT, SMALL)
    assert source.text.count(pattern) == 1
    assert any(is_wrong(source, source.text.replace(pattern, wrong), seed) for seed in range(4))


def is_wrong(source, text, seed):
    try:
        error, _ = kernels.run(PRODUCT, source, 77, seed=seed, text=text)
    except VerificationError:
        return True
    return not error < 5e-3


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
@pytest.mark.parametrize(
    ("region", "parameters"),
    [
        (PRODUCT, Cutlass(128, 128, 2, 2, 32, 4, 2)),
        (Region((conv(0, 3, 64, 64, Activate("gelu"), Add(1)),), (64, 64)), Cutlass(256, 64, 4, 1, 32, 4, 2)),
    ],
    ids=["rows", "images"],
)
def test_kernels_stay_in_registers(arch, region, parameters):
    if (reason := build.missing_for_cutlass()) is not None:
        pytest.skip(reason)
    source = cutlass.emit(region, parameters)
    built = build.compiled_source(source, arch)
    info = built.kernels[source.kernel]
    assert (info.spill_loads, info.spill_stores, info.stack_bytes, info.shared_bytes) == (0, 0, 0, 0)
    assert info.registers * source.threads * source.blocks <= 65536
    assert b"mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32" in built.ptx


@pytest.mark.parametrize(
    ("region", "words"),
    [
        (sesr(3), "not one layer"),
        (Region((kernels.depthwise(64, 3),), (64,)), "not one layer"),
        (Region((conv(0, 3, 64, 64),), (64,), shuffle=2), "shuffled"),
        (Region((conv(0, 3, 60, 64),), (60,)), "60 channels or 64 filters"),
        (Region((conv(0, 3, 64, 70),), (64,)), "64 channels or 70 filters"),
        (Region((conv(0, 3, 16, 56),), (16,)), "56 filters of 144"),
        (Region((conv(0, 1, 64, 256),), (64,)), "256 filters of 64"),
        (Region((conv(0, 33, 8, 64),), (8,)), "larger than 32"),
        (Region((conv(0, 3, 64, 64, Add(1)),), (64, 1)), "of other channels"),
        (Region((conv(0, 3, 64, 64, Add(0), Add(1)),), (64, 64)), "more than one value"),
    ],
)
def test_regions_that_the_template_does_not_serve(region, words):
    assert words in cutlass.refusal(region)
    with pytest.raises(UnsupportedLayer, match=words):
        cutlass.emit(region, SMALL)


@pytest.mark.parametrize("values", [(64, 64, 4, 2, 32, 3), (64, 64, 2, 2, 48, 3), (64, 64, 2, 2, 32, 2)])
def test_parameters_that_do_not_fit(values):
    with pytest.raises(UnsupportedLayer, match="no tiles of CUTLASS"):
        cutlass.emit(LARGE, Cutlass(*values))


def test_sources_hang_on_structure_alone():
    one, other = (cutlass.emit(Region((rows(136, 72),), (136,), rows=True), SMALL) for _ in range(2))
    assert (one.text, one.kernel, one.rule) == (other.text, other.kernel, other.rule)
    assert one.packed != other.packed
    assert one.kernel != cutlass.emit(LARGE, SMALL).kernel


def test_weights_are_packed_by_filters():
    layer = IMAGES.layers[0]
    source = cutlass.emit(IMAGES, SMALL)
    count = layer.weights.size
    found = np.frombuffer(source.packed[: 2 * count], np.float16).reshape(136, 3, 3, 72)
    assert (found == layer.weights.transpose(3, 0, 1, 2).astype(np.float16)).all()
    tables = np.frombuffer(source.packed[2 * count :], np.float32).reshape(2, 192)  # three tiles of filters
    assert (tables[:, 136:] == 0).all()
    assert (tables[0, :136] == layer.bias).all()
    assert (tables[1, :136] == layer.steps[1].slopes).all()


def test_launches_cover_places_and_filters():
    source = cutlass.emit(PRODUCT, SMALL)
    grid, integers = launch(source.rule, 1, 1, 130, 132)
    assert (grid, integers) == ((3, 4, 1), (130, 1, 130))
    assert source.shared_bytes == 3 * 2 * 32 * 128
    assert cutlass.emit(IMAGES, SMALL).shared_bytes == 3 * 2 * 32 * 128 + cutlass.TABLE_BYTES


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89", "sm_90a"])
def test_candidates(complete, arch):
    given = ARCHITECTURES[arch]
    for region in (LARGE, Region((conv(0, 3, 256, 256, prelu(256), Add(1)),), (256, 256))):
        found = list(cutlass.candidates(region, given))
        assert 10 <= len(found) <= 40
        for one in found:
            source = cutlass.emit(region, one)
            assert source.shared_bytes <= given.shared_bytes
            assert source.blocks * (source.shared_bytes + 1024) <= given.shared_bytes + 1024
            # On their way out, 16 places of each warp are in shared memory, with 8 floats more than there are filters.
            assert 4 * 16 * one.down * (one.filters + 8) <= one.stage_bytes
    few = Region((conv(0, 3, 32, 64),), (32,))
    assert {(one.filters, one.inner) for one in cutlass.candidates(few, given)} == {(64, 32)}


def test_large_products_come_first(complete):
    for arch in ("sm_80", "sm_86", "sm_89"):
        best = candidates(Region((rows(4096, 4096),), (4096,), rows=True), architecture(arch), 1, 1, 4096)
        assert best[0].template == "cutlass"
        assert "tile" in {one.template for one in best}  # which is measured too
    peak = 2 * 4096**3 / 312e12  # of an A100, by its data sheet
    assert peak < candidates(LARGE, architecture("sm_80"), 1, 1, 4096 * 16)[0].seconds < 1.5 * peak


@pytest.mark.parametrize("package", ["nvcc", "cutlass"])
def test_without_nvcc_or_headers_it_is_left_out_and_the_reason_told(monkeypatch, package):
    def missing():
        raise MissingDependency(f"nvidia-{package}", "A test", "cutlass")

    monkeypatch.setattr(build, package, missing)
    if package == "cutlass":
        monkeypatch.setattr(build, "nvcc", lambda: Path("/nowhere/bin/nvcc"))
    reason = f"no nvidia-{package}: pip install 'keras-efficient[cutlass]'"
    assert {one.template for one in candidates(LARGE, architecture("sm_80"), 1, 1, 512)} == {"tile"}
    assert refusals(LARGE)["cutlass"] == reason
    assert left_out(LARGE) == [f"cutlass: {reason}"]
    assert left_out(sesr(3)) == []


def test_without_a_host_compiler(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "nvcc", lambda: Path("/nowhere/bin/nvcc"))
    monkeypatch.setattr(build, "cutlass", lambda: tmp_path)
    monkeypatch.setenv("PATH", "")
    assert "g++" in build.missing_for_cutlass()


def test_headers_come_from_a_checkout_that_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("CUTLASS_PATH", str(tmp_path))
    with pytest.raises(MissingDependency, match=r"nvidia-cutlass.*\n.*keras-efficient\[cutlass\]"):
        build.cutlass()
    (tmp_path / "include/cutlass").mkdir(parents=True)
    (tmp_path / "include/cutlass/cutlass.h").touch()
    assert build.cutlass() == tmp_path / "include"


INFO = build.KernelInfo(100, 0, 0, 0, 0)


def assembled(monkeypatch, fails):
    """What `assemble` takes for a large product, and the sources that were compiled."""
    asked = []

    def compiled_source(source, arch):
        asked.append(source)
        if fails(source):
            raise ConversionError("nvcc refused the source: kernel.cu:1: no.")
        return build.Compiled(b"code", b"", "", {source.kernel: INFO}, 0.1)

    monkeypatch.setattr(build, "compiled_source", compiled_source)
    monkeypatch.setattr(checking, "problem", lambda region, source: None)
    ranking = candidates(Region((rows(4096, 4096),), (4096,), rows=True), architecture("sm_80"), 1, 1, 4096)
    kernel, reason = assembling._kernel(0, LARGE, ranking, "sm_80", {}, [], {})
    assert reason is None
    return kernel.report(), asked


def test_a_kernel_that_is_not_checked_says_so(complete, monkeypatch):
    report, asked = assembled(monkeypatch, lambda source: False)
    assert (report["template"], report["checked"], report["refused"]) == ("cutlass", False, [])
    assert [one.compiler for one in asked] == ["nvcc"]


def test_where_nvcc_and_headers_do_not_fit_another_template_serves(complete, monkeypatch):
    report, asked = assembled(monkeypatch, lambda source: source.compiler == "nvcc")
    assert (report["template"], report["checked"]) == ("tile", True)
    assert [one.compiler for one in asked] == ["nvcc", "nvrtc"]
    assert "nvcc refused the source" in report["refused"][0]


def test_what_was_left_out_is_in_the_report(monkeypatch):
    monkeypatch.setattr(build, "missing_for_cutlass", lambda: "no nvcc")
    report, _ = assembled(monkeypatch, lambda source: False)
    assert (report["template"], report["refused"]) == ("tile", ["cutlass: no nvcc"])


def test_the_interpreter_alone_refuses_in_a_line():
    if not checking.is_possible():
        pytest.skip("g++ is not installed")
    with pytest.raises(ConversionError, match="run on a GPU only"):
        kernels.run(PRODUCT, cutlass.emit(PRODUCT, SMALL), 77)
    assert tile.emit(PRODUCT, tile.Tile()).runs_on_cpu


def test_a_report_says_which_kernels_ran_on_the_cpu():
    from keras_efficient.export.targets.cuda import _checks

    ran, alone, none = ({"template": name, "checked": name == "strip"} for name in ("strip", "cutlass", "tile"))
    assert _checks([ran, ran]) == "each run on the CPU and compared"
    assert _checks([ran, ran, alone]) == "2 run on the CPU and compared, 1 by CUTLASS not checked on the CPU"
    assert _checks([none]) == "not checked, since g++ is missing"
