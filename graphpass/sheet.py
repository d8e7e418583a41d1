"""What a probe looks at, how the numbers are laid out that it leaves, and what they mean."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from graphpass.noise import LocalNoise
from graphpass.site import Site

_NUMBERS_PER_CANDIDATE = 4


@dataclass(frozen=True, slots=True)
class Probe:
    """What a probe looks at: the name of a compiled variant, as a set of sites is of others.

    Attributes:
        candidates: approximations that are looked at one by one, as numbers of replacements.
        plan: approximations that are looked at together.
    """

    candidates: frozenset[int]
    plan: frozenset[int]


@dataclass(frozen=True, slots=True)
class Reading:
    """What a probe found.

    Attributes:
        local: of each candidate, in the order of their numbers.
        total: of the plan, |approximate - exact|^2 of every parameter's gradient, by position.
        propagated: the part of it that the plan's own approximation of a weight gradient does not
            make: what arrived with the output gradient. By site, in the order of the weight
            gradients of the graph.
    """

    local: tuple[LocalNoise, ...]
    total: dict[int, float]
    propagated: tuple[float, ...]

    @property
    def is_finite(self) -> bool:
        """Whether every number is one; after a loss that is NaN or infinite none is."""
        entries = [
            value
            for entry in self.local
            for value in (entry.noise, entry.bias, entry.square, entry.density)
        ]
        return all(map(math.isfinite, [*entries, *self.total.values(), *self.propagated]))


@dataclass(frozen=True, slots=True)
class Sheet:
    """What stands where in a probe's notes; place 0 says that they were written.

    Attributes:
        candidates: number of candidates.
        weights: number of weight gradients in the graph.
        parameters: positions of the parameters among the graph's inputs, ascending.
    """

    candidates: int
    weights: int
    parameters: tuple[int, ...]

    @property
    def size(self) -> int:
        """Numbers there is room for, beside place 0."""
        return _NUMBERS_PER_CANDIDATE * self.candidates + self.weights + len(self.parameters)

    def of_candidate(self, number: int) -> int:
        """Return the place of a candidate's noise, bias, square and density."""
        return 1 + _NUMBERS_PER_CANDIDATE * number

    def of_weight(self, number: int) -> int:
        """Return the place of what arrives at a weight gradient."""
        return self.of_candidate(self.candidates) + number

    def of_parameter(self, position: int) -> int:
        """Return the place of a parameter's total error."""
        return self.of_weight(self.weights) + self.parameters.index(position)

    def read(self, numbers: Sequence[float]) -> Reading | None:
        """Return what was noted; None while nothing was."""
        if not numbers[0]:
            return None
        starts = map(self.of_candidate, range(self.candidates))
        local = [LocalNoise(*numbers[i : i + _NUMBERS_PER_CANDIDATE]) for i in starts]
        total = {p: numbers[self.of_parameter(p)] for p in self.parameters}
        propagated = numbers[self.of_weight(0) : self.of_weight(self.weights)]
        return Reading(tuple(local), total, tuple(propagated))


@dataclass(frozen=True, slots=True)
class Subject:
    """The graph that is probed.

    Attributes:
        weights: its weight gradients, in the order of the graph.
        parameters: positions of its parameters among its inputs, ascending.
    """

    weights: tuple[Site, ...]
    parameters: tuple[int, ...]

    def sheet(self, candidates: int) -> Sheet:
        """Return how the notes of a probe of so many candidates are laid out."""
        return Sheet(candidates, len(self.weights), self.parameters)
