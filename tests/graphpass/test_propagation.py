"""The law of noise: what single approximations and whole plans add to the gradient."""

import math
from dataclasses import replace

import pytest

from graphpass.dependence import reach_of
from graphpass.noise import LocalNoise, NoiseTable, key_of
from graphpass.propagation import Effect, Propagation
from graphpass.site import Gradient
from tests.graphpass.planning import chain, conv_layer

DW1, DW2, DX2 = ("one:weight", "m", "{}"), ("two:weight", "m", "{}"), ("two:input", "m", "{}")
TABLE = NoiseTable(
    entries={
        DW1: LocalNoise(noise=0.3, bias=0.1, square=9.0),
        DW2: LocalNoise(noise=0.5, bias=0.2, square=9.0),
        DX2: LocalNoise(noise=0.02, bias=0.01, square=2.0),
    },
    variance={"one:weight": 3.0, "two:weight": 6.0, "norm.bias": 1.0},
    square={"one:weight": 1.0, "two:weight": 2.0, "norm.bias": 1.0},
    correction=1.5,
)
REACH = {"two:input": ("one:weight",)}


def test_the_law() -> None:
    found = Propagation(TABLE, REACH).plan([DW1, DW2, DX2])
    # The relative error of the input gradient, of V + S of the only layer before it.
    from_inputs = 1.5 * 0.02 / 2 * (3 + 1)
    assert found.from_inputs == pytest.approx(from_inputs / 10)
    assert found.tau == pytest.approx((0.3 + 0.5 + from_inputs) / 10)
    assert found.bias == pytest.approx((0.1 + 0.2 + 1.5 * 0.01 / 2 * 4) / 4)
    assert Propagation(TABLE, REACH).plan([]).tau == 0
    assert Propagation(TABLE.scaled(2), REACH).plan([DW1]).tau == pytest.approx(0.06)


def test_what_has_no_gradient_adds_nothing_unless_something_is_added_to_it() -> None:
    still = replace(TABLE, entries={DX2: LocalNoise(0.0, 0.0, 0.0)})
    assert Propagation(still, REACH).plan([DX2]).tau == 0
    drawn = replace(TABLE, entries={DX2: LocalNoise(0.1, 0.0, 0.0)})
    assert Propagation(drawn, REACH).plan([DX2]).tau == math.inf
    nothing = replace(TABLE, variance={"one:weight": 0.0}, square={"one:weight": 0.0})
    assert Propagation(nothing, REACH).plan([]).tau == 0
    assert Propagation(nothing, REACH).plan([DW1]).tau == math.inf
    assert nothing.ratio == 0


def test_a_plan_is_the_sum_of_what_it_approximates_over_all_trained_parameters() -> None:
    analysis = chain([conv_layer(number) for number in (1, 2, 3)])
    backward = [site for site in analysis.sites if site.gradient is not Gradient.FORWARD]
    keys = [key_of(site.id, "m", {}) for site in backward]
    entries = {key: LocalNoise(0.1 * i, 0.01 * i, 2.0) for i, key in enumerate(keys, start=1)}
    weights = [site.id for site in backward if site.gradient is Gradient.WEIGHT]
    # A norm's parameters have a noise of their own, and belong to no product.
    variance = {**dict.fromkeys(weights, 3.0), "norm.weight": 6.0}
    square = {**dict.fromkeys(weights, 1.0), "norm.weight": 2.0}
    table = NoiseTable(entries, variance, square, correction=1.5)
    law = Propagation(table, reach_of(analysis.flow, analysis.sites))
    assert (law.variance, law.square, law.noise_ratio) == (15.0, 5.0, table.ratio)
    effects = [law.effect(site, entries[key]) for site, key in zip(backward, keys, strict=True)]
    whole = law.plan(keys)
    assert whole.tau == pytest.approx(sum(e.tau for e in effects if e is not None))
    assert whole.bias == pytest.approx(sum(e.bias for e in effects if e is not None))
    # A forward product's error is one of the whole gradient, and is not corrected.
    found = law.effect(analysis.sites[0], LocalNoise(0.1, 0.05, 2.0))
    assert found == Effect(pytest.approx(0.05 * 20 / 15), pytest.approx(0.025 * 20 / 5))
