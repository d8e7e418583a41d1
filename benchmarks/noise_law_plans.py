"""The plans that `benchmarks.noise_law` trains with: made and timed on this processor.

    python -m benchmarks.noise_law_plans              # plan, on the prices of this machine
    python -m benchmarks.noise_law_plans --time       # and time the steps against exact ones

Methods are written down layer by layer, so that another device computes the very same estimates.
The planner chooses among the unbiased methods that a GPU has as well. One more plan, made by hand,
adds more noise than any budget would make the planner add: the law is to be seen where it bites.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import torch

import graphpass
from benchmarks.timing import paired, ratio, read_results, write_results
from benchmarks.training_step import Case, make_step
from graphpass.plan import Plan

RESULTS = "noise_law_plans"
MODEL = "resnet20"
BUDGETS = (0.01, 0.1, 0.3, 1.0)
METHODS = ["int8", "pixels", "phase", "prune"]
BY_HAND = "pixels, 1/20"
_KEEP = 0.05


def main(argv: Sequence[str] | None = None) -> None:
    """Plan or time, write the results."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.noise_law_plans", description=__doc__
    )
    parser.add_argument("--time", action="store_true", help="time what was planned before")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args(argv)
    torch.set_num_threads(given.threads)
    plans = read_results(RESULTS)["plans"] if given.time else planned()
    if given.time:
        time(plans, given.rounds)
    write_results(RESULTS, {"model": MODEL, "plans": plans})


def planned() -> dict[str, Any]:
    """Return the plans by name: methods by layer, and what is predicted."""
    case = Case(MODEL)
    plans = {}
    for budget in BUDGETS:
        plan = graphpass.plan(case.model(), case.images(), budget=budget, methods=METHODS)
        prediction = plan.prediction
        assert prediction is not None
        plans[f"tau {budget:g}"] = {
            "methods": methods_of(plan),
            "predicted_tau": prediction.tau,
            "predicted_speedup": prediction.exact_step_s / prediction.step_s,
        }
    by_hand = [{"name": "pixels", "gradient": "weight", "keep": _KEEP}]
    plans[BY_HAND] = {"methods": {path: by_hand for path in case.layers()[1:]}}
    return plans


def methods_of(plan: Plan) -> dict[str, list[dict[str, Any]]]:
    """Return a plan as the option `methods` that asks for the same."""
    methods: dict[str, list[dict[str, Any]]] = {}
    for decision in plan.approximated:
        path, _, gradient = decision.site.rpartition(":")
        spec = {"name": decision.method, "gradient": gradient, **decision.params}
        methods.setdefault(path, []).append(spec)
    return methods


def time(plans: dict[str, Any], rounds: int) -> None:
    """Add how many times faster than exact ones the steps of every plan are, measured."""
    case = Case(MODEL)
    exact = make_step(case, None)
    steps = {
        name: make_step(case, {"methods": plan["methods"], "strict": True})
        for name, plan in plans.items()
    }
    for name, (mine, bases) in paired(exact, steps, rounds, repeat=1).items():
        plans[name]["speedup"] = ratio(bases, mine)


if __name__ == "__main__":
    main()
