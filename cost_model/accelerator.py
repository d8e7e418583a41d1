"""Cycles of an accelerator that skips zeros, with the load imbalance of its array.

A two-dimensional array of processing units: rows work on different filters, columns on different
positions with the same filters, each with `lanes` multipliers that share out the non-zero products
of one filter. All wait for the row with the most non-zeros before the next filters come. SWAT
(Raihan, Aamodt 2020, section 4.4) simulates such a machine, an extension of Bit-Tactical (Delmas
Lascorz et al. 2019), and gives no sizes; memory is never the limit there, nor here.

Two bounds on how lanes share: balanced, any lane takes any product of its filter; separate, each
lane has its own share of the filter and skips its own zeros only. Zeros are independent of each
other, so non-zeros are binomially distributed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SparseArray:
    """Sizes of the array: its defaults are those of one tile of Bit-Tactical.

    Attributes:
        rows: filters that are worked on at a time.
        columns: positions that are worked on at a time.
        lanes: multipliers of a unit.
        balanced: whether a unit's lanes share its products evenly.
    """

    rows: int = 16
    columns: int = 16
    lanes: int = 16
    balanced: bool = True


@dataclass(frozen=True, slots=True)
class SparseProduct:
    """One matrix product of which one factor is sparse.

    Attributes:
        filters: vectors of the sparse factor.
        length: values of each.
        positions: vectors of the dense factor.
        density: share of the values that are not zero.
    """

    filters: int
    length: int
    positions: int
    density: float


def cycles(product: SparseProduct, array: SparseArray) -> float:
    """Return the expected number of cycles of one product."""
    groups, rest = divmod(product.filters, array.rows)
    steps = groups * _slowest(product, array, array.rows)
    if rest:
        steps += _slowest(product, array, rest)
    return steps * math.ceil(product.positions / array.columns)


def speedup(products: Sequence[SparseProduct], array: SparseArray) -> float:
    """Return how many times fewer cycles the products take than dense ones."""
    dense = [
        SparseProduct(product.filters, product.length, product.positions, 1.0)
        for product in products
    ]
    return sum(cycles(product, array) for product in dense) / sum(
        cycles(product, array) for product in products
    )


def _slowest(product: SparseProduct, array: SparseArray, rows: int) -> float:
    """Return the expected cycles of the row, or of the lane, that has most to do."""
    if array.balanced:
        return _largest(product.length, product.density, rows, array.lanes)
    length = math.ceil(product.length / array.lanes)
    return _largest(length, product.density, rows * array.lanes, 1)


def _largest(length: int, density: float, count: int, lanes: int) -> float:
    """Return E[max of `count` draws of ceil(Binomial(length, density) / lanes)]."""
    if density >= 1:
        return math.ceil(length / lanes)
    if density <= 0:
        return 0.0
    expected, below, step = 0.0, 0.0, 0
    for ones in range(length + 1):
        if ones > step * lanes:
            # All that is known not to exceed `step`: the maximum exceeds it with the rest.
            expected += 1 - min(below, 1.0) ** count
            step += 1
        below += _binomial(length, ones, density)
        if 1 - below < 1e-12:
            break
    return expected


def _binomial(length: int, ones: int, density: float) -> float:
    choose = math.lgamma(length + 1) - math.lgamma(ones + 1) - math.lgamma(length - ones + 1)
    log = choose + ones * math.log(density) + (length - ones) * math.log1p(-density)
    return math.exp(log)
