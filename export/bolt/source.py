"""What a template makes of a region: a self-contained source, its packed weights, and how it is launched."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

__all__ = ["Source", "complete", "header", "indented"]


@dataclass(frozen=True, eq=False)
class Source:
    """One kernel.

    Its arguments are flat, in TensorRT's order: the inputs, the packed weights, 32-bit integers, the output.

    Attributes:
        text: CUDA C++, all of it.
        kernel: its name.
        threads: of a block.
        blocks: on a multiprocessor at once, that registers are shared out for.
        shared_bytes: dynamic shared memory of a block.
        packed: weights, biases and slopes as the kernel reads them.
        rule: from sizes to a grid, as of `grids.launch`.
        compiler: that takes it. What needs "nvcc" includes headers that are not in the text.
    """

    text: str
    kernel: str
    threads: int
    blocks: int
    shared_bytes: int
    packed: bytes
    rule: Mapping[str, Any]
    compiler: Literal["nvrtc", "nvcc"] = "nvrtc"

    @property
    def runs_on_cpu(self) -> bool:
        """Whether `host.run` takes it."""
        return self.compiler == "nvrtc"


@cache
def header(name: str) -> str:
    """The text of a file of `templates/`."""
    return Path(__file__).with_name("templates").joinpath(name).read_text("utf-8")


def complete(template: str, code: str, headers: Sequence[str]) -> tuple[str, str]:
    """A kernel's name, which tells it from those of other code, and its source with all headers in it.

    Args:
        template: its name.
        code: with KERNEL_NAME in the place of the kernel's.
        headers: of `templates/`, without their ending.
    """
    name = f"{template}_{hashlib.sha256(code.encode()).hexdigest()[:12]}"
    return name, "\n".join([*(header(f"{one}.cuh") for one in headers), code.replace("KERNEL_NAME", name)])


def indented(lines: list[str]) -> str:
    """Lines with the indentation of their braces."""
    found, depth, once = [], 0, 0
    for line in lines:
        closing = len(line) - len(line.lstrip("}"))
        depth -= closing
        found.append("    " * (depth + once) + line)
        depth += line.count("{") - line.count("}") + closing
        is_head = line.startswith(("for ", "if ")) and not line.endswith(("{", ";", "}"))
        once = 1 if is_head else 0
    return "\n".join(found)
