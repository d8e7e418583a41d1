"""What the planner chooses: against every plan there is, by hand, and on graphs of full size."""

import itertools
import math
import time
from dataclasses import replace
from typing import Any

import pytest

from graphpass import AccuracyDrop, ConfigError, Options, Plan, Speedup
from graphpass.candidates import ladder, menus
from graphpass.capture import Analysis
from graphpass.curve import Curve
from graphpass.errors import Reason
from graphpass.method import methods
from graphpass.noise import LocalNoise, NoiseTable, key_of
from graphpass.planner import make_plan
from graphpass.prediction import Prediction
from graphpass.site import Gradient
from tests.graphpass.planning import Prices, chain, conv_layer

SMALL = chain([conv_layer(number) for number in (1, 2, 3)])


def planned(
    analysis: Analysis = SMALL, noise: Any = None, prices: Any = None, **given: Any
) -> Plan:
    return make_plan(analysis, Options(**given), 0, None, noise, prices or Prices())


def names(plan: Plan) -> dict[str, str | None]:
    return {d.site: d.method for d in plan.decisions if not d.site.endswith("forward")}


def every_point(analysis: Analysis, given: tuple[str, ...]) -> list[tuple[float, float]]:
    """Return (seconds, tau) of every plan, added up in another way than the planner does."""
    found, _ = menus(analysis, {}, given, 0.0, None, Prices())
    points = []
    for picks in itertools.product(*([None, *menu.candidates] for menu in found)):
        prices = [
            menu.exact if pick is None else pick.price
            for menu, pick in zip(found, picks, strict=True)
        ]
        alone = sum(price.seconds - sum(price.shared.values()) for price in prices)
        shared = {name: s for price in prices for name, s in price.shared.items()}
        points.append((alone + sum(shared.values()), sum(p.effect.tau for p in picks if p)))
    return points


GIVEN = ("int8", "prune", "phase")


@pytest.fixture(scope="module", name="points")
def _points() -> list[tuple[float, float]]:
    return every_point(SMALL, GIVEN)


@pytest.mark.parametrize("tau", [1e-9, 2e-4, 1e-3, 0.01, 0.1, 0.3, 10.0])
def test_a_number_is_the_most_noise(tau: float, points: list[tuple[float, float]]) -> None:
    found = planned(budget=tau, methods=GIVEN).prediction
    assert found is not None and found.tau is not None
    assert found.tau <= tau * (1 + 1e-9)
    assert found.step_s == pytest.approx(min(s for s, noise in points if noise <= tau))


@pytest.mark.parametrize("factor", [1.0, 1.05, 1.2, 1.4, 1.48])
def test_a_speedup_with_the_least_noise(factor: float, points: list[tuple[float, float]]) -> None:
    found = planned(budget=Speedup(factor), methods=GIVEN).prediction
    assert found is not None
    assert found.exact_step_s / found.step_s >= factor * (1 - 1e-9)
    limit = found.exact_step_s / factor * (1 + 1e-9)
    assert found.tau == pytest.approx(min(noise for s, noise in points if s <= limit))


def test_auto_is_the_least_time_to_the_same_loss(points: list[tuple[float, float]]) -> None:
    found = planned(methods=GIVEN).prediction
    assert found is not None and found.noise_ratio == pytest.approx(4.0)
    best = min(s * (1 + 0.8 * tau) for s, tau in points) / found.exact_step_s
    assert found.time_ratio == pytest.approx(best)


def test_work_that_is_shared_is_counted_once() -> None:
    plan = planned(budget=1.0, methods=["int8"])
    assert set(names(plan).values()) == {"int8"}
    assert plan.prediction is not None
    sites = plan.prediction.sites
    # In graph order: the input gradient comes first and pays for both.
    assert sites["conv2:input"].planned_s == pytest.approx(1.02 * 0.6)
    assert sites["conv2:weight"].planned_s == pytest.approx(1.02 * 0.6 - 0.25)
    # Alone the rounding does not pay; together it does.
    dear = Prices({"int8": 1.1})
    assert names(planned(budget=1.0, methods=["int8"], prices=dear)) == {
        "conv1:weight": None,
        **{f"conv{n}:{g}": "int8" for n in (2, 3) for g in ("input", "weight")},
    }


def test_the_rest_of_a_step_as_planned_is_shorter_where_caches_hold_more() -> None:
    found = planned(budget=1.0, methods=["int8"], prices=Prices(rest_s=3.0, warm=0.5)).prediction
    assert found is not None and found.planned_rest_s is not None
    chosen = [site.exact_s for site in found.sites.values() if site.approximated]
    share = sum(chosen) / (found.exact_step_s - 3.0)
    assert 0 < share < 1 and found.planned_rest_s == pytest.approx(3.0 * (1 - share / 2))
    products = sum(site.planned_s for site in found.sites.values())
    assert found.step_s == pytest.approx(products + found.planned_rest_s)
    # The plan is a corner of the frontier, and exact is one.
    seconds = {point.tau: point.seconds for point in found.frontier}
    assert seconds[0.0] == pytest.approx(found.exact_step_s)
    assert seconds[found.frontier[-1].tau] == pytest.approx(found.step_s)
    assert Prediction.from_dict(found.to_dict()) == found


def test_speedups_that_are_impossible_say_what_is_possible() -> None:
    with pytest.raises(ConfigError, match=r"Speedup\(10\): the best .* is predicted") as caught:
        planned(budget=Speedup(10))
    best = float(str(caught.value).partition("to be Speedup(")[2].partition(")")[0])
    found = planned(budget=Speedup(best)).prediction
    assert found is not None and found.exact_step_s / found.step_s >= best
    with pytest.raises(ConfigError, match="best that is possible"):
        planned(budget=Speedup(best + 0.01))


def test_a_drop_is_the_noise_that_its_curve_gives() -> None:
    curve = Curve(90.0, slope=2.0, slope_error=0.1, saturation=0.8, largest_tau=1.0)
    drop = AccuracyDrop(0.1, curve)
    assert names(planned(budget=drop)) == names(planned(budget=curve.tau_for(0.1)))
    with pytest.raises(ConfigError, match=r"graphpass\.tune"):
        planned(budget=AccuracyDrop(0.1))


def test_auto_leaves_everything_exact_where_little_is_to_be_gained() -> None:
    # 2 % of 5 % can be saved at most.
    plan = planned(prices=Prices(rest_s=300.0))
    assert not plan.approximated
    reasons = {d.reason for d in plan.decisions if not d.site.endswith("forward")}
    assert all(reason.startswith(Reason.SMALL_GAIN.value) for reason in reasons)
    assert "of 2 %" in reasons.pop()
    # Nothing is faster at all.
    slow = planned(prices=Prices(dict.fromkeys(methods(), 1.5)))
    assert not slow.approximated
    assert slow.decisions[-1].reason.startswith(f"{Reason.NO_GAIN.value}: ")


def test_reasons_and_what_else_was_considered() -> None:
    plan = planned(budget=0.001)
    assert plan.prediction is not None
    exact = [d for d in plan.decisions if d.reason.startswith(Reason.NOISE_TOO_DEAR.value)]
    assert exact and "would save" in exact[0].reason
    others = plan.prediction.sites["conv2:weight"].others
    assert "bf16: biased, and `max_bias` is 0" in others
    assert any(text.startswith("pixels(keep=0.1): would save") for text in others)
    # Every rung of every method is either chosen or told.
    offered = len(ladder(next(s for s in SMALL.sites if s.id == "conv2:weight")))
    chosen = plan.prediction.sites["conv2:weight"].approximated
    assert len(others) + chosen == offered


def test_what_may_not_be_approximated_stays_exact() -> None:
    only = planned(budget=9.0, methods=["prune"], gradients=["input"])
    assert names(only)["conv2:input"] == "prune" and names(only)["conv2:weight"] is None
    assert {m for m in names(only).values() if m} == {"prune"}
    forward = [d for d in planned(budget=9.0).decisions if d.site.endswith("forward")]
    assert {d.reason for d in forward} == {Reason.FORWARD.value}
    scheduled = planned(budget=9.0, schedule="ga-3")
    assert any("never selects this layer" in d.reason for d in scheduled.decisions)


def test_biased_methods_need_to_be_admitted() -> None:
    cheap = Prices({"bf16": 0.1, "zero": 0.05})
    assert not planned(budget=1.0, prices=cheap).approximated
    assert not planned(budget=1.0, prices=cheap, methods=["bf16", "zero"]).approximated
    admitted = planned(budget=1.0, prices=cheap, max_bias=1e-3)
    assert {m for m in names(admitted).values()} == {"bf16"}
    assert admitted.prediction is not None and admitted.prediction.bias is not None
    assert 0 < admitted.prediction.bias <= 1e-3
    # A weight gradient that is zero is a third of all there is.
    more = planned(budget=1.0, prices=cheap, max_bias=0.5)
    assert more.prediction is not None and more.prediction.bias is not None
    assert [d.method for d in more.approximated].count("zero") == 1
    assert more.prediction.bias <= 0.5


def test_forward_products_need_to_be_asked_for_and_bias_to_be_admitted() -> None:
    given: dict[str, Any] = {"budget": 1.0, "gradients": ["weight", "input", "forward"]}
    refused = planned(**given)
    assert not [d for d in refused.approximated if d.site.endswith("forward")]
    assert refused.prediction is not None
    assert "int8: biased, and `max_bias` is 0" in refused.prediction.sites["conv2:forward"].others

    plan = planned(**given, max_bias=0.01)
    forward = {d.site: d.method for d in plan.approximated if d.site.endswith("forward")}
    assert forward == dict.fromkeys(("conv1:forward", "conv2:forward", "conv3:forward"), "int8")
    assert plan.prediction is not None and plan.prediction.bias is not None
    # What was seen of 19 layers, for three.
    assert plan.prediction.bias == pytest.approx(3 / 19 * 0.0056)
    less = planned(**given, max_bias=2.5 / 19 * 0.0056)
    assert [d.site[5:] for d in less.approximated].count(":forward") == 2


def test_forward_products_keep_their_prior_when_noise_was_measured() -> None:
    """Probes compare gradients of one forward pass; no correction was measured for them either."""
    given: dict[str, Any] = {"budget": 1.0, "gradients": ["forward"], "max_bias": 0.01}
    supposed, plan = planned(**given), planned(**given, noise=table(0.01, correction=9.0))
    assert plan.approximated == supposed.approximated != ()
    assert plan.prediction is not None and supposed.prediction is not None
    assert plan.prediction.tau == pytest.approx(supposed.prediction.tau)
    assert {s.noise_source for s in plan.prediction.sites.values()} == {"", "prior"}


def table(noise: float, **changes: Any) -> NoiseTable:
    """Return a measured table: the same noise for every candidate, V = 4 and S = 1 a layer."""
    entries = {
        key_of(site.id, method.name, params): LocalNoise(noise, 0.0, 8.0)
        for site in SMALL.sites
        if site.gradient is not Gradient.FORWARD
        for method, params in ladder(site)
    }
    weights = [site.id for site in SMALL.sites if site.gradient is Gradient.WEIGHT]
    made = NoiseTable(entries, dict.fromkeys(weights, 4.0), dict.fromkeys(weights, 1.0))
    return replace(made, **changes)


def test_noise_of_a_plan_by_hand() -> None:
    measured = table(0.06, correction=0.5)
    plan = planned(budget=9.0, methods=["prune"], noise=measured)
    assert plan.prediction is not None
    # Three weight gradients, and input gradients that reach one and two layers of (4 + 1).
    by_hand = (3 * 0.06 + 0.5 * 0.06 / 8 * (5 + 10)) / 12
    assert plan.prediction.tau == pytest.approx(by_hand)
    assert {s.noise_source for s in plan.prediction.sites.values()} == {"", "measured"}
    assert plan.prediction.noise_ratio == pytest.approx(4.0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_noise_that_is_no_number_is_not_spent(value: float) -> None:
    plan = planned(budget=9.0, noise=table(value))
    assert not plan.approximated
    assert Reason.NOISE_UNKNOWN.value in plan.decisions[-1].reason


def test_a_gradient_of_zero_leaves_nothing_to_measure_noise_against() -> None:
    zero = dict.fromkeys((s.id for s in SMALL.sites if s.gradient == "weight"), 0.0)
    assert not planned(noise=table(0.1, variance=zero, square=zero)).approximated
    # One layer alone: the others carry the noise.
    one = {**dict.fromkeys(zero, 4.0), "conv2:weight": 0.0}
    assert planned(budget=9.0, noise=table(0.1, variance=one)).approximated


def test_a_candidate_that_was_not_measured_is_not_chosen() -> None:
    missing = table(0.01)
    entries = {key: value for key, value in missing.entries.items() if key[1] != "pixels"}
    plan = planned(budget=9.0, noise=replace(missing, entries=entries))
    assert "pixels" not in names(plan).values() and plan.approximated


def test_the_same_plan_every_time_and_in_files() -> None:
    plan = planned(budget=0.01)
    again = Plan.from_json(planned(budget=0.01).to_json())
    assert again == plan and again.prediction == plan.prediction
    assert again.to_json() == plan.to_json()
    assert replace(plan, prediction=None) == plan
    text = str(plan)
    assert "us exact, predicted" in text and "tau, prior" in text and "tau, measured" not in text
    assert "<- this plan" in text


def test_candidates_are_dropped_only_where_they_are_no_loss(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dear = Prices({"int8": 1.1, "prune": 0.9})
    whole = planned(budget=0.003, prices=dear)
    monkeypatch.setattr("graphpass.selection._COMBINATIONS", 1)
    # Rounding that is shared makes int8 pay, though alone it costs more than the exact product.
    assert planned(budget=0.003, prices=dear) == whole
    assert "int8" in names(whole).values()


def resnet152() -> Analysis:
    """Return the shapes of ResNet-152's convolutions at 224 pixels: one in three is 3x3."""
    stages = [(64, 56, 3), (128, 28, 8), (256, 14, 36), (512, 7, 3)]
    layers = [conv_layer(1, 64, 112)]
    for channels, size, blocks in stages:
        for _ in range(3 * blocks):
            layers.append(conv_layer(len(layers) + 1, channels, size))
    return chain(layers)


def test_full_size_graphs_are_planned_in_time() -> None:
    analysis = resnet152()
    seconds = []
    for sites in (analysis, chain([conv_layer(n) for n in range(1, 201)])):
        started = time.process_time()
        plan = make_plan(sites, Options(budget=0.05), 0, None, None, Prices())
        seconds.append(time.process_time() - started)
        assert plan.approximated
    # Well under a second on an idle core.
    assert max(seconds) < 4
