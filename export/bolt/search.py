"""Templates and their parameters for a region, the best ones first: by measurements where there are some, else by an
estimate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from types import ModuleType
from typing import Any

from keras_efficient.export.bolt.architectures import Architecture
from keras_efficient.export.bolt.region import Region
from keras_efficient.export.bolt.source import Source
from keras_efficient.export.bolt.templates import TEMPLATES

__all__ = ["Candidate", "candidates", "left_out", "refusals", "unserved"]

LIMIT = 32  # candidates for a region that are built and measured


@dataclass(frozen=True)
class Candidate:
    """A template with parameters.

    Attributes:
        template: its name.
        parameters: the template's own dataclass.
        seconds: of a launch.
        measured: whether a GPU told so; else it is an estimate.
    """

    template: str
    parameters: Any
    seconds: float
    measured: bool = False

    def emit(self, region: Region) -> Source:
        source: Source = TEMPLATES[self.template].emit(region, self.parameters)
        return source

    def to_dict(self) -> dict[str, Any]:
        """Values that JSON can hold."""
        return {"template": self.template, **asdict(self.parameters)}


def candidates(
    region: Region, arch: Architecture, n: int, height: int, width: int, limit: int = LIMIT
) -> list[Candidate]:
    """The best by their ranks, for these sizes of the first input; none: no template serves the region."""
    served: list[list[Candidate]] = []
    for name, template in TEMPLATES.items():
        if template.refusal(region) is None and _missing(template) is None:
            given = template.candidates(region, arch)
            own = [Candidate(name, one, template.seconds(region, one, arch, n, height, width)) for one in given]
            served.append(_varied(sorted(own, key=_rank))[:limit])
    # Each template's best are measured, whatever estimates say; the rest by their rank.
    sure = limit // (2 * len(served)) if served else 0
    rest = _varied(sorted((one for own in served for one in own[sure:]), key=_rank))
    first = [one for own in served for one in own[:sure]]
    return sorted([*first, *rest[: limit - len(first)]], key=_rank)


def _varied(ranked: Sequence[Candidate]) -> list[Candidate]:
    """The first of each estimate, then the others: a search is for what estimates cannot tell, not for its like."""
    found = {one.seconds: one for one in reversed(ranked)}
    return [*reversed(found.values()), *(one for one in ranked if one is not found[one.seconds])]


def _rank(one: Candidate) -> float:
    """Its estimate, less what the template has for it that estimates do not know."""
    preference: float = getattr(TEMPLATES[one.template], "PREFERENCE", 1.0)
    return preference * one.seconds


def refusals(region: Region) -> dict[str, str]:
    """Why templates do not serve a region, by their names."""
    reasons = {name: template.refusal(region) or _missing(template) for name, template in TEMPLATES.items()}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def unserved(region: Region, arch: Architecture, *, sized: bool) -> str:
    """Why a region has no candidate, in words.

    Args:
        region: that has none.
        arch: of the GPU.
        sized: whether the size of its input is known.
    """
    reasons, boundless = refusals(region), replace(arch, shared_bytes=1 << 40, block_bytes=None)
    if not sized and any(template.refusal(region) is None for template in TEMPLATES.values()):
        return "the size of its input is not known"
    for name in TEMPLATES.keys() - reasons.keys():
        most = (arch.shared_bytes if arch.block_bytes is None else min(arch.block_bytes, arch.shared_bytes)) >> 10
        too_large = next(iter(TEMPLATES[name].candidates(region, boundless)), None) is not None
        none = f"no parameters fit into {most} KB of shared memory" if too_large else f"no parameters for {arch.name}"
        reasons[name] = none
    return "; ".join(f"{name}: {reasons[name]}" for name in TEMPLATES)


def left_out(region: Region) -> list[str]:
    """Templates that would serve a region if this machine could compile their kernels, and what it lacks."""
    fit = [(name, template) for name, template in TEMPLATES.items() if template.refusal(region) is None]
    return [f"{name}: {reason}" for name, template in fit if (reason := _missing(template)) is not None]


def _missing(template: ModuleType) -> str | None:
    reason: str | None = template.missing() if hasattr(template, "missing") else None
    return reason
