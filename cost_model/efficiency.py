"""How much of the hardware's figures a kernel reaches: between measured points, and beyond them.

The logarithm of the efficiency is interpolated over the logarithms (base 2) of the kernel's sizes,
by the mean of a Gaussian process (Rasmussen, Williams 2006, "Gaussian Processes for Machine
Learning", algorithm 2.1) with the covariance

    k(a, b) = c^2 + t^2 a . b + s^2 (1 + r) exp(-r),   r = sqrt(3) |a - b| / l,

and n^2 more where a is b: a trend in each size, a smooth surface around it that is as flexible as
points are dense (a Matern covariance), and the noise of a measurement. Far from all points the
surface is back at the trend, and what it gives is kept between the least and the greatest
efficiency that was measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

# c, t, s, l (in octaves) and n, in units of the natural logarithm of an efficiency. Of 200 choices
# these predicted measured points best that were left out (AVX-512 CPU, 42 tables): by 10 % in the
# median for a vendor's convolutions, 8 % for matrix products, 2 % for 8-bit ones.
_CONSTANT, _TREND, _SURFACE, _LENGTH, _NOISE = 2.0, 0.05, 0.8, 4.0, 0.05


class Estimate(NamedTuple):
    """What is known of the efficiency at some sizes.

    Attributes:
        efficiency: share of the ideal speed, > 0.
        distance: to the nearest measured point, in octaves.
    """

    efficiency: float
    distance: float


@dataclass(frozen=True, slots=True)
class EfficiencyTable:
    """Measured efficiencies of one kind of kernel in one element type.

    Attributes:
        names: names of the sizes.
        points: for each measurement, the sizes in the order of the names.
        efficiencies: what was measured there: ideal seconds over measured seconds.
    """

    names: tuple[str, ...]
    points: tuple[tuple[float, ...], ...]
    efficiencies: tuple[float, ...]

    def __post_init__(self) -> None:
        """Check the table.

        Raises:
            ValueError: if it is empty, ragged, or holds something that is no size or efficiency.
        """
        if not self.points or len(self.points) != len(self.efficiencies):
            raise ValueError(f"need one efficiency for each of one or more points, got {self}")
        for sizes, value in zip(self.points, self.efficiencies, strict=True):
            if len(sizes) != len(self.names):
                raise ValueError(f"need {len(self.names)} sizes ({self.names}), got {sizes}")
            if not all(math.isfinite(number) and number > 0 for number in (*sizes, value)):
                raise ValueError(f"sizes and efficiencies must be > 0, got {sizes}: {value}")

    def at(self, sizes: Mapping[str, float]) -> Estimate:
        """Return the efficiency at sizes that need not have been measured.

        Raises:
            KeyError: if a size of the table is not given.
        """
        place = _octaves([sizes[name] for name in self.names])
        fit = _fit(self)
        mean = fit.mean + sum(
            weight * _covariance(place, point)
            for weight, point in zip(fit.weights, fit.points, strict=True)
        )
        value = min(max(math.exp(mean), min(self.efficiencies)), max(self.efficiencies))
        return Estimate(value, min(math.dist(place, point) for point in fit.points))


class _Fit(NamedTuple):
    points: tuple[tuple[float, ...], ...]
    mean: float
    weights: tuple[float, ...]


def _octaves(sizes: Sequence[float]) -> tuple[float, ...]:
    return tuple(math.log2(max(size, 1.0)) for size in sizes)


def _covariance(one: Sequence[float], other: Sequence[float]) -> float:
    products = sum(a * b for a, b in zip(one, other, strict=True))
    ratio = math.sqrt(3) * math.dist(one, other) / _LENGTH
    surface = _SURFACE**2 * (1 + ratio) * math.exp(-ratio)
    return _CONSTANT**2 + _TREND**2 * products + surface


@cache
def _fit(table: EfficiencyTable) -> _Fit:
    points = tuple(_octaves(point) for point in table.points)
    values = [math.log(value) for value in table.efficiencies]
    mean = sum(values) / len(values)
    matrix = [[_covariance(a, b) for b in points] for a in points]
    for index, row in enumerate(matrix):
        row[index] += _NOISE**2
    return _Fit(points, mean, _solve(matrix, [value - mean for value in values]))


def _solve(matrix: list[list[float]], right: list[float]) -> tuple[float, ...]:
    """Return the solution of a symmetric positive definite system, by Cholesky's factors."""
    size = len(right)
    lower = [[0.0] * size for _ in range(size)]
    for i in range(size):
        for j in range(i + 1):
            rest = matrix[i][j] - sum(a * b for a, b in zip(lower[i][:j], lower[j], strict=False))
            lower[i][j] = math.sqrt(rest) if i == j else rest / lower[j][j]
    middle: list[float] = []
    for i in range(size):
        done = sum(a * b for a, b in zip(lower[i], middle, strict=False))
        middle.append((right[i] - done) / lower[i][i])
    result = [0.0] * size
    for i in reversed(range(size)):
        done = sum(lower[k][i] * result[k] for k in range(i + 1, size))
        result[i] = (middle[i] - done) / lower[i][i]
    return tuple(result)
