"""Templates and their parameters for a region, the best ones first: by measurements where there are some, else by an
estimate."""

from __future__ import annotations

import heapq
from dataclasses import asdict, dataclass
from typing import Any

from keras_efficient.export.bolt.architectures import Architecture
from keras_efficient.export.bolt.region import Region
from keras_efficient.export.bolt.source import Source
from keras_efficient.export.bolt.templates import TEMPLATES

__all__ = ["Candidate", "candidates", "refusals"]

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
    """The best by their estimates, for these sizes of the first input; none: no template serves the region."""
    found = [
        Candidate(name, parameters, template.seconds(region, parameters, arch, n, height, width))
        for name, template in TEMPLATES.items()
        if template.refusal(region) is None
        for parameters in template.candidates(region, arch)
    ]
    return heapq.nsmallest(limit, found, key=lambda one: one.seconds)


def refusals(region: Region) -> dict[str, str]:
    """Why templates do not serve a region, by their names."""
    reasons = {name: template.refusal(region) for name, template in TEMPLATES.items()}
    return {name: reason for name, reason in reasons.items() if reason is not None}
