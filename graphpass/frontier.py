"""The frontier of noise against time, and single points of it.

A graph is a list of layers, and each layer offers a few choices: ways to compute all its products,
with seconds and noise. Both are sums over the layers, so that a plan is a solution of the
multiple-choice knapsack problem. What is known of each answer:

* The points of `frontier` are optimal: no plan of at most their noise is faster. They are the
  corners of the lower convex hull of all plans, which are made of corners of the layers' own hulls,
  taken in the order of seconds saved per noise. A product of two positive linear functions, such as
  time times the growth of the number of steps, is least at a corner; so "auto" is optimal too.
* Between two corners, `fastest` and `quietest` improve the lower one by dynamic programming over
  those layers alone whose choices can matter, which the bound of the linear relaxation tells
  (Pisinger, "A minimal algorithm for the multiple-choice knapsack problem", 1995). This is optimal
  if `exact` says so; else the work was limited, and it is within `gap` of the best.

All of it grows with the number of layers as sorting does. It is deterministic: ties go to the
earlier layer, and the earlier choice.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

# States of the dynamic programme that are looked at before it is given up: half a second.
_WORK = 300_000
# Sums of the same numbers in another order differ by this much.
_TOLERANCE = 1e-12


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to compute the products of a layer.

    Attributes:
        seconds: of all its products.
        tau: noise that they add, relative to the noise of the gradient; finite.
        bias: squared bias that they add, relative to the squared gradient; finite.
        picks: what is chosen for each of its sites: position among its candidates, None for exact.
    """

    seconds: float
    tau: float = 0.0
    bias: float = 0.0
    picks: tuple[int | None, ...] = ()


Layers = Sequence[Sequence[Choice]]


@dataclass(frozen=True, slots=True)
class Point:
    """A plan as a point: seconds of all products, noise and bias."""

    seconds: float
    tau: float
    bias: float


@dataclass(frozen=True, slots=True)
class Frontier:
    """The corners of the frontier, from the least noise to the least time.

    Attributes:
        points: the corners.
        start: choice of each layer at the first of them.
        steps: the layer that changes from each corner to the next, and its new choice.
    """

    points: tuple[Point, ...]
    start: tuple[int, ...]
    steps: tuple[tuple[int, int], ...]

    def selection(self, number: int) -> tuple[int, ...]:
        """Return the choice of each layer at a corner."""
        chosen = list(self.start)
        for layer, choice in self.steps[:number]:
            chosen[layer] = choice
        return tuple(chosen)


@dataclass(frozen=True, slots=True)
class Solution:
    """A plan with the least of one quantity under a limit of the other.

    Attributes:
        selection: choice of each layer.
        exact: whether it is known to be optimal.
        gap: how much less the optimum may be, at most.
    """

    selection: tuple[int, ...]
    exact: bool
    gap: float


def point_of(layers: Layers, selection: Sequence[int]) -> Point:
    """Return what a selection adds up to."""
    chosen = [layer[i] for layer, i in zip(layers, selection, strict=True)]
    return Point(
        math.fsum(choice.seconds for choice in chosen),
        math.fsum(choice.tau for choice in chosen),
        math.fsum(choice.bias for choice in chosen),
    )


def frontier(layers: Layers) -> Frontier:
    """Return the corners of the frontier of noise against time."""
    tables = [[(choice.tau, choice.seconds) for choice in layer] for layer in layers]
    start, increments = _relaxed(tables)
    now = point_of(layers, start)
    points, chosen = [now], list(start)
    for step in increments:
        old, new = (layers[step.layer][i] for i in (chosen[step.layer], step.choice))
        chosen[step.layer] = step.choice
        now = Point(
            now.seconds + new.seconds - old.seconds,
            now.tau + new.tau - old.tau,
            now.bias + new.bias - old.bias,
        )
        points.append(now)
    return Frontier(tuple(points), start, tuple((step.layer, step.choice) for step in increments))


def fastest(layers: Layers, max_tau: float) -> Solution | None:
    """Return the fastest plan of at most so much noise; None if there is none."""
    return _least([[(choice.tau, choice.seconds) for choice in layer] for layer in layers], max_tau)


def quietest(layers: Layers, max_seconds: float) -> Solution | None:
    """Return the plan of least noise that takes at most so many seconds; None if there is none."""
    tables = [[(choice.seconds, choice.tau) for choice in layer] for layer in layers]
    return _least(tables, max_seconds)


# Weight, which is limited, and value, which is to be least.
_Pair = tuple[float, float]
_Table = Sequence[_Pair]


@dataclass(frozen=True, slots=True)
class _Step:
    """From one corner of a layer's hull to the next one."""

    slope: float
    layer: int
    level: int
    choice: int
    weight: float


def _relaxed(tables: Sequence[_Table]) -> tuple[tuple[int, ...], list[_Step]]:
    """Return the choices of least weight, and the steps from there, the best first."""
    hulls = [_hull(table) for table in tables]
    steps = []
    for layer, (table, hull) in enumerate(zip(tables, hulls, strict=True)):
        for level, (before, after) in enumerate(pairwise(hull), start=1):
            weight = table[after][0] - table[before][0]
            slope = (table[after][1] - table[before][1]) / weight
            steps.append(_Step(slope, layer, level, after, weight))
    steps.sort(key=lambda step: (step.slope, step.layer, step.level))
    return tuple(hull[0] for hull in hulls), steps


def _hull(table: _Table) -> list[int]:
    """Return the corners of the lower convex hull, as the weight grows and the value falls."""
    order = sorted(range(len(table)), key=lambda i: (table[i], i))
    hull: list[int] = []
    for i in order:
        if hull and table[i][1] >= table[hull[-1]][1]:
            continue
        while len(hull) > 1 and not _turns(table, hull[-2], hull[-1], i):
            hull.pop()
        hull.append(i)
    return hull


def _turns(table: _Table, first: int, second: int, third: int) -> bool:
    """Return whether the way through three points bends upwards at the second."""
    (w1, v1), (w2, v2), (w3, v3) = table[first], table[second], table[third]
    return (v2 - v1) * (w3 - w2) < (v3 - v2) * (w2 - w1)


def _least(tables: Sequence[_Table], limit: float) -> Solution | None:
    start, steps = _relaxed(tables)
    weight = math.fsum(table[i][0] for table, i in zip(tables, start, strict=True))
    limit += _TOLERANCE * max(abs(limit), abs(weight))
    if weight > limit:
        return None
    chosen, level, base, slope = list(start), [0] * len(tables), list(start), 0.0
    for step in steps:
        if level[step.layer] != step.level - 1:
            continue
        if weight + step.weight <= limit:
            weight += step.weight
            chosen[step.layer], level[step.layer] = step.choice, step.level
        elif not slope:
            # The relaxation ends inside this step; what follows fills up what is left.
            base, slope = list(chosen), step.slope
    if not slope:
        return Solution(tuple(chosen), True, 0.0)
    return _improved(tables, chosen, base, -slope, limit)


def _improved(
    tables: Sequence[_Table], chosen: Sequence[int], base: Sequence[int], rate: float, limit: float
) -> Solution:
    """Return the best selection, searched among those that the relaxation's bound leaves.

    Args:
        tables: weight and value of every choice of every layer.
        chosen: a selection within the limit.
        base: the selection that is least in value + rate * weight.
        rate: value that a unit of weight is worth.
        limit: of the weight.
    """
    totals = [_total(tables, selection) for selection in (base, chosen)]
    (base_weight, base_value), (_, best) = totals
    bound = base_value + rate * (base_weight - limit)
    slack = _TOLERANCE * max(abs(base_value), abs(best), abs(rate * limit))
    core = _core(tables, base, rate, best - bound)
    # Weight, value, and what was changed: a list that states share.
    states: list[tuple[float, float, Any]] = [(base_weight, base_value, None)]
    answer, work = None, 0
    for layer, alternatives in core:
        grown = states + [
            (weight + more, value + dearer, (trail, layer, choice))
            for weight, value, trail in states
            for more, dearer, choice in alternatives
        ]
        work += len(grown)
        if work > _WORK:
            return Solution(_changed(chosen, base, answer), False, best - bound)
        for weight, value, trail in grown:
            if weight <= limit and value < best - slack:
                best, answer = value, (trail,)
        # A state counts as well as it could become, by the bound.
        worth = best - slack + rate * limit
        states = _undominated([s for s in grown if s[1] + rate * s[0] < worth])
    return Solution(_changed(chosen, base, answer), True, 0.0)


def _core(
    tables: Sequence[_Table], base: Sequence[int], rate: float, gap: float
) -> list[tuple[int, list[tuple[float, float, int]]]]:
    """Return the layers whose change can matter, the most promising first.

    A choice that is worse by `gap` or more, its weight counted at the rate, is in no better plan.
    """
    found = []
    for layer, (table, here) in enumerate(zip(tables, base, strict=True)):
        weight, value = table[here]
        losses = [
            (v - value + rate * (w - weight), (w - weight, v - value, i))
            for i, (w, v) in enumerate(table)
            if i != here
        ]
        near = [(loss, change) for loss, change in losses if loss < gap]
        if near:
            found.append((min(loss for loss, _ in near), layer, [change for _, change in near]))
    return [(layer, changes) for _, layer, changes in sorted(found, key=lambda item: item[:2])]


def _undominated(states: list[tuple[float, float, Any]]) -> list[tuple[float, float, Any]]:
    kept: list[tuple[float, float, Any]] = []
    least = math.inf
    for state in sorted(states, key=lambda state: state[:2]):
        if state[1] < least - _TOLERANCE * abs(state[1]):
            kept.append(state)
            least = state[1]
    return kept


def _changed(chosen: Sequence[int], base: Sequence[int], answer: Any) -> tuple[int, ...]:
    if answer is None:
        return tuple(chosen)
    result, (trail,) = list(base), answer
    while trail is not None:
        trail, layer, choice = trail
        result[layer] = choice
    return tuple(result)


def _total(tables: Sequence[_Table], selection: Sequence[int]) -> _Pair:
    pairs = [table[i] for table, i in zip(tables, selection, strict=True)]
    return math.fsum(w for w, _ in pairs), math.fsum(v for _, v in pairs)
