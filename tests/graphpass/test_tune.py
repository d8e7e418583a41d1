"""Tuning with a training function whose curve is known."""

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

import graphpass
from graphpass import AccuracyDrop, ConfigError, Plan, Tuned
from graphpass.curve import Curve
from graphpass.frontier import Point
from graphpass.prediction import Prediction

TRUTH = Curve(exact=90.0, slope=4.0, slope_error=0.0, saturation=0.8, largest_tau=1.0)


class Training:
    """Loses as the curve says, learns with its length, and counts its runs."""

    def __init__(self, spread: float = 0.0, fails_from: float = math.inf) -> None:
        self.source, self.spread, self.fails_from = random.Random(0), spread, fails_from
        self.runs: list[tuple[float, float, int]] = []

    def __call__(self, options: dict[str, Any], length: float) -> float:
        graphpass.Options.from_dict(options)
        tau = options["budget"]
        self.runs.append((tau, length, options["seed"]))
        if tau >= self.fails_from:
            return math.nan
        level = TRUTH.exact + 5 * math.log(length)
        return level - TRUTH.drop(tau) + self.source.gauss(0, self.spread)


def tune(train: Any, points: float = 0.5, **given: Any) -> Tuned:
    return graphpass.tune(train, AccuracyDrop(points), progress=False, **given)


def test_the_noise_that_costs_so_much_is_found() -> None:
    train = Training()
    found = tune(train, trials=6, rounds=3)
    assert TRUTH.drop(found.tau) == pytest.approx(0.5)
    assert found.curve.exact == pytest.approx(TRUTH.exact)
    assert found.interval == pytest.approx((0.5, 0.5))
    # Fewer and longer runs, round by round, and exact training in each of them.
    lengths = [length for _, length, _ in train.runs]
    assert [lengths.count(part) for part in (0.25, 0.5, 1.0)] == [6, 3, 3]
    assert [length for tau, length, _ in train.runs if tau == 0] == [0.25, 0.5, 1.0]
    assert {seed for _, _, seed in train.runs} == {0, 1, 2}
    # What lies near to the answer is looked at longer.
    last = [tau for tau, length, _ in train.runs if length == 1.0 and tau]
    assert all(abs(math.log(tau / found.tau)) < math.log(10) for tau in last)


def test_the_options_train_with_that_noise() -> None:
    found = tune(Training(), seed=5, methods=["int8"])
    assert found.options.seed == 5 and found.options.methods == ["int8"]
    assert isinstance(found.options.budget, AccuracyDrop)
    assert found.options.budget.tau == found.tau
    again = graphpass.Options.from_dict(found.options.to_dict())
    assert again == found.options


def test_confidence_comes_from_the_spread_of_the_runs() -> None:
    sure, unsure = (tune(Training(spread), trials=8) for spread in (0.02, 0.5))
    width = [high - low for low, high in (sure.interval, unsure.interval)]
    assert width[0] < width[1]
    assert sure.interval[0] < 0.5 < sure.interval[1]
    text = str(sure)
    assert text.count("\n") == len(sure.trials) + 1
    assert "with 95 % confidence" in text


def test_a_search_goes_on_where_it_stopped(tmp_path: Path) -> None:
    path = tmp_path / "runs.json"

    class Stopped(Training):
        def __call__(self, options: dict[str, Any], length: float) -> float:
            if len(self.runs) == 7:
                raise KeyboardInterrupt
            return super().__call__(options, length)

    stopped = Stopped()
    with pytest.raises(KeyboardInterrupt):
        tune(stopped, trials=6, path=path)
    resumed = Training()
    found = tune(resumed, trials=6, path=path)
    whole = Training()
    assert found == tune(whole, trials=6)
    assert stopped.runs + resumed.runs == whole.runs
    idle = Training()
    assert tune(idle, trials=6, path=str(path)) == found and not idle.runs


def test_files_of_another_search_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "runs.json"
    tune(Training(), path=path)
    before = path.read_text()
    with pytest.raises(ConfigError, match=r"runs\.json' holds the runs of another search"):
        tune(Training(), path=path, trials=5)
    assert path.read_text() == before
    for text in ("", "[]", "{}", json.dumps({"search": {}, "runs": [{}]})):
        path.write_text(text)
        with pytest.raises(ConfigError, match="cannot go on from"):
            tune(Training(), path=path)


def test_what_does_not_converge_limits_the_noise() -> None:
    found = tune(Training(fails_from=0.3), points=50.0)
    assert found.tau < 0.3
    assert "diverged" in str(found)
    with pytest.raises(ConfigError, match="did not converge at tau 0"):
        tune(Training(fails_from=0.0))


def test_points_are_those_of_the_frontier() -> None:
    points = (Point(2.0, 0.0, 0.0), Point(1.5, 0.02, 0.0), Point(1.0, 0.4, 0.0))
    plan = Plan(prediction=Prediction({}, 0.0, 1.0, 1.0, points))
    train = Training()
    found = tune(train, plan=plan, rounds=1)
    taus = [tau for tau, _, _ in train.runs]
    assert taus[0] == 0 and min(taus[1:]) == pytest.approx(0.02)
    assert max(taus) == pytest.approx(0.4)
    assert found.curve.saturation == 0.5
    with pytest.raises(ConfigError, match="nothing to choose"):
        tune(train, plan=Plan(prediction=Prediction({}, 0.0, 1.0, 1.0, points[:1])))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"trials": 2}, r"trials=2; give an integer of at least 3"),
        ({"rounds": 0}, r"rounds=0; give an integer of at least 1"),
        ({"rounds": True}, r"rounds=True"),
        ({"plan": "plan.json"}, r"plan='plan\.json'; give what graphpass\.plan"),
        ({"methods": {"*": "zero"}}, r"needs methods to be None or a list"),
        ({"seed": -1}, r"seed=-1"),
        ({"colour": 1}, r"unknown option 'colour'"),
    ],
)
def test_what_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tune(Training(), **given)


def test_other_budgets_and_results_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"tune: budget=0\.3; give graphpass\.AccuracyDrop"):
        graphpass.tune(Training(), 0.3)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"train returned None; return the accuracy"):
        tune(lambda options, length: None)
