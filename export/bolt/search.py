"""Templates and their parameters for a region, the best ones first: by measurements where there are some, else by an
estimate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any

from keras_efficient.export.bolt.architectures import Architecture
from keras_efficient.export.bolt.region import Region
from keras_efficient.export.bolt.source import Source
from keras_efficient.export.bolt.templates import TEMPLATES

__all__ = ["Candidate", "candidates", "left_out", "refusals"]

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


def left_out(region: Region) -> list[str]:
    """Templates that would serve a region if this machine could compile their kernels, and what it lacks."""
    fit = [(name, template) for name, template in TEMPLATES.items() if template.refusal(region) is None]
    return [f"{name}: {reason}" for name, template in fit if (reason := _missing(template)) is not None]


def _missing(template: ModuleType) -> str | None:
    reason: str | None = template.missing() if hasattr(template, "missing") else None
    return reason
