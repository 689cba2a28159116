"""Arm's compiler for Ethos-U, Vela: which configurations exist, running it, reading its estimate.

Vela is a program whose C++ core writes to file descriptor 1, so it runs in a child process:
``python -m keras_efficient.export.vela JOB.json`` compiles any number of files, one JSON line on stdout for each. It
accepts systems that its accelerator cannot have, and files that it then maps to the CPU alone, both with exit code 0;
`check_system` and `keras_efficient.export.targets.ethos_u` look for these.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from keras_efficient.errors import ConversionError, UnknownName, WrongArgument

__all__ = [
    "ACCELERATORS",
    "SYSTEMS",
    "Estimate",
    "System",
    "check_system",
    "compile_files",
    "default_system",
    "version",
]

_FLASH = ("Sram_Only", "Shared_Sram")
_DRAM = ("Dedicated_Sram", "Dedicated_Sram_256KB", "Dedicated_Sram_384KB", "Dedicated_Sram_512KB")

# System configurations of Vela's Arm/vela.ini by the family of the accelerator, with the memory modes that fit each: a
# system whose second port leads to flash cannot write there.
SYSTEMS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "u55": {"Ethos_U55_Deep_Embedded": _FLASH, "Ethos_U55_High_End_Embedded": _FLASH},
    "u65": {
        "Ethos_U65_Embedded": _FLASH,
        "Ethos_U65_Mid_End": _DRAM,
        "Ethos_U65_High_End": _DRAM,
        "Ethos_U65_Client_Server": _DRAM,
    },
    "u85": {
        "Ethos_U85_SYS_Flash_Low": _FLASH,
        "Ethos_U85_SYS_Flash_High": _FLASH,
        "Ethos_U85_SYS_DRAM_Low": _DRAM,
        "Ethos_U85_SYS_DRAM_Mid": _DRAM,
        "Ethos_U85_SYS_DRAM_High": _DRAM,
    },
}

# accelerator: (system configuration, memory mode) when the caller names none
_DEFAULTS: Mapping[str, tuple[str, str]] = {
    **{f"ethos-u55-{n}": ("Ethos_U55_High_End_Embedded", "Shared_Sram") for n in (32, 64, 128, 256)},
    **{f"ethos-u65-{n}": ("Ethos_U65_High_End", "Dedicated_Sram") for n in (256, 512)},
    **{f"ethos-u85-{n}": ("Ethos_U85_SYS_DRAM_Mid", "Dedicated_Sram_384KB") for n in (128, 256, 512)},
    **{f"ethos-u85-{n}": ("Ethos_U85_SYS_DRAM_High", "Dedicated_Sram_512KB") for n in (1024, 2048)},
}

ACCELERATORS = tuple(_DEFAULTS)


@dataclass(frozen=True)
class System:
    """An accelerator in a system: what Vela needs to know to estimate and to compile."""

    accelerator: str
    system_config: str
    memory_mode: str

    @property
    def has_dram(self) -> bool:
        """Whether feature maps live in DRAM, with a small SRAM to stage them."""
        return self.memory_mode in _DRAM

    @property
    def family(self) -> str:
        """``u55``, ``u65`` or ``u85``."""
        return self.accelerator.split("-")[1]


@dataclass(frozen=True)
class Estimate:
    """What Vela says of one compiled file. Times and traffic are its estimates: nothing was run.

    Attributes:
        ms: time of one inference. Operators left to the CPU count nothing.
        cpu_ops: operators left to the CPU.
        sram_kib: peak of the SRAM that it uses.
        dram_bytes: read from and written to DRAM (or flash) in one inference.
        npu_cycles: in which the NPU computes; the rest of the time it waits for memory.
        clock_mhz: of the accelerator.
    """

    ms: float
    cpu_ops: int
    sram_kib: float
    dram_bytes: int
    npu_cycles: int
    clock_mhz: float


def version() -> str:
    """Vela's version."""
    from importlib.metadata import version as installed

    return installed("ethos-u-vela")


def default_system(accelerator: str) -> System:
    """The system that is taken where the caller names none."""
    return System(accelerator, *_DEFAULTS[accelerator])


def check_system(accelerator: str, system_config: str | None = None, memory_mode: str | None = None) -> System:
    """The `System` of these names, the defaults filled in.

    Raises:
        UnknownName: Vela's configuration has no such name.
        WrongArgument: the parts do not belong together. Vela would accept some such triples and estimate nonsense.
    """
    if accelerator not in _DEFAULTS:
        raise UnknownName("accelerator", accelerator, ACCELERATORS)
    default = default_system(accelerator)
    own = SYSTEMS[default.family]
    config = system_config or default.system_config
    if config not in own:
        if not any(config in systems for systems in SYSTEMS.values()):
            raise UnknownName("system configuration", config, own)
        raise WrongArgument(
            f"{accelerator} cannot be in the system {config!r}.", hint=f"Choose one of {', '.join(own)}."
        )
    mode = memory_mode or (default.memory_mode if default.memory_mode in own[config] else own[config][-1])
    if mode not in own[config]:
        if mode not in (*_FLASH, *_DRAM):
            raise UnknownName("memory mode", mode, own[config])
        raise WrongArgument(
            f"System {config!r} cannot have the memory mode {mode!r}.", hint=f"Choose one of {', '.join(own[config])}."
        )
    return System(accelerator, config, mode)


def compile_files(
    files: Sequence[Path], system: System, folder: Path, on_result: Callable[[int], None] | None = None
) -> list[Estimate | str]:
    """Compiles `.tflite` files in one child process; ``folder/<stem>_vela.tflite`` is what Vela made of each.

    Args:
        files: with different stems.
        system: for which to compile.
        folder: for Vela's output.
        on_result: called with the number of files done after each.

    Returns:
        For each file its `Estimate`, or the reason why Vela gave none.

    Raises:
        ConversionError: the child process ended before its work was done.
    """
    folder.mkdir(parents=True, exist_ok=True)
    job = folder / "vela-job.json"
    job.write_text(json.dumps({"files": [str(f) for f in files], "system": asdict(system), "folder": str(folder)}))
    messages = folder / "vela-messages.txt"
    results: list[Estimate | str] = []
    with messages.open("wb") as log:
        command = [sys.executable, "-m", __name__, str(job)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
        assert child.stdout is not None
        try:
            for line in child.stdout:
                answer = json.loads(line)
                results.append(answer["error"] if "error" in answer else Estimate(**answer))
                if on_result is not None:
                    on_result(len(results))
        finally:  # also on Ctrl-C
            if len(results) < len(files):
                child.kill()
            child.wait()
    if len(results) < len(files):
        lines = [line for line in messages.read_text(errors="replace").splitlines() if line.strip()]
        raise ConversionError(
            f"Vela ended with status {child.returncode} while it compiled {files[len(results)].name}"
            f"{': ' + lines[-1][:200] if lines else '.'}"
        )
    return results


def _compile_one(file: Path, system: System, folder: Path) -> dict[str, Any]:
    """In the child: runs Vela on one file and reads its tables."""
    from ethosu.vela.vela import main as vela

    arguments = {
        "--config": "Arm/vela.ini",
        "--accelerator-config": system.accelerator,
        "--system-config": system.system_config,
        "--memory-mode": system.memory_mode,
        "--output-dir": str(folder),
    }
    flat = [word for pair in arguments.items() for word in pair]
    try:
        status = vela([str(file), *flat, "--verbose-performance"])
    except SystemExit as err:
        status = err.code
    except Exception as err:  # Vela has no common base of its errors; any of them is the file's result
        return {"error": " ".join(f"{type(err).__name__}: {err}".split())[:300]}
    if status:
        return {"error": f"Vela ended with status {status}."}
    return asdict(_read_tables(file.stem, system, folder))


def _read_tables(stem: str, system: System, folder: Path) -> Estimate:
    """From ``<stem>_summary_<system>.csv`` (seconds, KiB, bytes) and ``<stem>_per-layer.csv`` (a row an operator)."""
    summary = next(_rows(folder / f"{stem}_summary_{system.system_config}.csv"))
    outside = ("dram", "on_chip_flash", "off_chip_flash")
    return Estimate(
        ms=float(summary["inference_time"]) * 1e3,
        cpu_ops=sum(row["Target"] == "CPU" for row in _rows(folder / f"{stem}_per-layer.csv")),
        sram_kib=float(summary["sram_memory_used"]),
        dram_bytes=int(sum(float(summary[f"{memory}_total_bytes"]) for memory in outside)),
        npu_cycles=int(float(summary["cycles_npu"])),
        clock_mhz=float(summary["core_clock"]) / 1e6,
    )


def _rows(path: Path) -> Iterator[dict[str, str]]:
    import csv

    with path.open(newline="") as file:
        yield from csv.DictReader(file)


def _main(job_path: str) -> int:
    """The child's whole work."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # Vela's report, from Python and from C++, goes to stderr
    job = json.loads(Path(job_path).read_text())
    system, folder = System(**job["system"]), Path(job["folder"])
    for file in job["files"]:
        answers.write(json.dumps(_compile_one(Path(file), system, folder)) + "\n")
        answers.flush()
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1]))
