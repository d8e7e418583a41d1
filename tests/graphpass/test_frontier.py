"""The frontier against every plan there is, and on graphs too large for that."""

import itertools
import math
import random
import time
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphpass import frontier as module
from graphpass.frontier import Choice, Point, fastest, frontier, point_of, quietest

# Few different numbers, so that ties are common.
SECONDS = st.integers(0, 12).map(lambda n: n / 4)
NOISE = st.sampled_from([0.0, 0.1, 0.2, 0.25, 0.5, 1.0])
CHOICES = st.builds(Choice, seconds=SECONDS, tau=NOISE)
LAYERS = st.lists(
    st.lists(CHOICES, min_size=0, max_size=3).flatmap(
        lambda others: SECONDS.map(lambda s: [Choice(s), *others])
    ),
    min_size=1,
    max_size=5,
)
Layers = list[list[Choice]]


def every_plan(layers: Layers) -> list[Point]:
    ranges = (range(len(layer)) for layer in layers)
    return [point_of(layers, selection) for selection in itertools.product(*ranges)]


@given(LAYERS, st.floats(0, 4))
def test_fastest_within_a_noise(layers: Layers, limit: float) -> None:
    solution = fastest(layers, limit)
    assert solution is not None and solution.exact
    found = point_of(layers, solution.selection)
    assert found.tau <= limit * (1 + 1e-9) + 1e-9
    best = min(p.seconds for p in every_plan(layers) if p.tau <= limit)
    assert found.seconds <= best + 1e-9


@given(LAYERS, st.floats(0, 15))
def test_quietest_within_a_time(layers: Layers, limit: float) -> None:
    fitting = [p.tau for p in every_plan(layers) if p.seconds <= limit]
    solution = quietest(layers, limit)
    if not fitting:
        assert solution is None
        return
    assert solution is not None and solution.exact
    found = point_of(layers, solution.selection)
    assert found.seconds <= limit * (1 + 1e-9) + 1e-9
    assert found.tau <= min(fitting) + 1e-9


@given(LAYERS)
def test_corners_are_optimal_and_hold_the_least_product(layers: Layers) -> None:
    plans = every_plan(layers)
    corners = frontier(layers)
    for number, corner in enumerate(corners.points):
        again = point_of(layers, corners.selection(number))
        assert math.isclose(again.seconds, corner.seconds, abs_tol=1e-9)
        assert math.isclose(again.tau, corner.tau, abs_tol=1e-9)
        assert not any(p.tau <= corner.tau and p.seconds < corner.seconds - 1e-9 for p in plans)
    for growth in (0.1, 0.5, 0.9):
        costs = [[p.seconds * (1 + growth * p.tau) for p in ps] for ps in (plans, corners.points)]
        assert min(costs[1]) <= min(costs[0]) + 1e-9


def large(layers: int, seed: int, alike: bool = False) -> Layers:
    """Return layers with a dozen choices each; `alike` ones repeat a few times and noises."""
    source = random.Random(seed)
    made = []
    for _ in range(layers):
        size = source.choice([1.0, 2.0, 4.0]) if alike else source.lognormvariate(0, 1)
        noise = 1.0 if alike else source.lognormvariate(0, 1)
        ways = (0.9, 0.8, 0.7, 0.65, 0.6, 0.5, 0.45, 0.4, 0.35, 0.33, 0.3)
        made.append(
            [Choice(size), *(Choice(size * way, noise * (1 / way - 1) ** 2 / 99) for way in ways)]
        )
    return made


@pytest.mark.parametrize("alike", [False, True])
def test_large_graphs_are_solved_to_within_a_thousandth_in_time(alike: bool) -> None:
    layers = large(400, seed=1, alike=alike)
    corners = frontier(layers)
    limit = corners.points[-1].tau * 0.37
    started = time.process_time()
    solution = fastest(layers, limit)
    assert solution is not None
    # Half a second here; the bound leaves room for a busy machine, not for another order.
    assert time.process_time() - started < 4
    found = point_of(layers, solution.selection)
    assert found.tau <= limit * (1 + 1e-9)
    assert solution.gap <= 1e-3 * found.seconds
    assert found.seconds <= _corner_below(corners.points, limit).seconds


def _corner_below(points: Sequence[Point], limit: float) -> Point:
    return max((p for p in points if p.tau <= limit), key=lambda p: p.tau)


def test_limited_work_still_gives_a_plan_within_its_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = large(7, seed=3)
    layers = [layer[::3] for layer in layers]
    limit = 0.6 * frontier(layers).points[-1].tau
    exact = fastest(layers, limit)
    assert exact is not None and exact.exact
    best = point_of(layers, exact.selection).seconds
    monkeypatch.setattr(module, "_WORK", 5)
    limited = fastest(layers, limit)
    assert limited is not None and not limited.exact and limited.gap > 0
    found = point_of(layers, limited.selection)
    assert found.tau <= limit * (1 + 1e-9)
    assert best <= found.seconds <= best + limited.gap + 1e-12


def test_no_layers() -> None:
    assert frontier([]).points == (Point(0.0, 0.0, 0.0),)
    solution = fastest([], 0.0)
    assert solution is not None and solution.selection == ()
