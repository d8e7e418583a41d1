"""What measuring costs: probes against exact steps, and the controller between them.

    python -m benchmarks.probe_cost

A probe of candidates and one of a whole plan alternate with exact steps. What the controller does
on the host on an ordinary step, and what the hooks of the sketch take while its window is open, are
timed alone, as they are far below the spread of a step.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn

from benchmarks.laboratory import Laboratory, Specs
from benchmarks.timing import paired, ratio, write_results
from benchmarks.training_step import BATCH, Case
from graphpass.controller import Controller, Policy, Subplan
from graphpass.plan import Plan
from graphpass.sheet import Probe
from graphpass.sketch import Sketch
from graphpass.variants import EXACT, Active

CANDIDATES: Specs = [
    *({"name": "int8", "gradient": gradient} for gradient in ("weight", "input")),
    *({"name": "prune", "gradient": gradient} for gradient in ("weight", "input")),
    {"name": "pixels", "gradient": "weight", "keep": 0.25},
    {"name": "pixels", "gradient": "weight", "keep": 0.1},
]
# At the default interval: probes of candidates, of the plan, and calls with an open window.
EVERY, PROBES, PLAN_PROBES, WINDOW = 500, 1, 2, 32


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, write the results."""
    given = _parse(argv)
    torch.set_num_threads(given.threads)
    torch._inductor.config.fallback_by_default = given.aten
    record = measure(Case(given.model), given.rounds)
    Console().print(record)
    write_results(
        given.output, {"model": given.model, "batch": BATCH, "aten": given.aten, **record}
    )


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """Return times of probes against exact steps, and of everything else."""
    model: nn.Module = case.model()
    laboratory = Laboratory()
    compiled = torch.compile(model, backend=laboratory)
    images, labels = case.images(), torch.randint(0, 10, (BATCH,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)

    def step_of(running: Active | Probe) -> Callable[[], None]:
        def step() -> None:
            laboratory.running = running
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(compiled(images), labels).backward()
            optimizer.step()

        return step

    exact = step_of(EXACT)
    exact()
    paths = case.layers()[1:]
    candidates = laboratory.numbers(CANDIDATES, paths)
    plan = laboratory.numbers(CANDIDATES[:2], paths)
    steps = {
        "candidates": step_of(Probe(candidates, EXACT)),
        "plan": step_of(Probe(EXACT, plan)),
    }
    for step in (exact, *steps.values()):
        step()
        step()
    seconds = paired(exact, steps, rounds, repeat=1)
    exact_s = statistics.median(base for _, bases in seconds.values() for base in bases)
    times = {name: ratio(mine, bases) for name, (mine, bases) in seconds.items()}
    turn_s, hooks_s = _turn_s(laboratory), _hooks_s(laboratory)
    extra = PROBES * (times["candidates"]["median"] - 1) + PLAN_PROBES * (
        times["plan"]["median"] - 1
    )
    return {
        "exact_s": exact_s,
        "candidates": len(candidates),
        "probe_of_candidates_in_exact_steps": times["candidates"],
        "probe_of_plan_in_exact_steps": times["plan"],
        "turn_s": turn_s,
        "hooks_s": hooks_s,
        "controller_share": (turn_s + hooks_s * WINDOW / EVERY) / exact_s,
        "probes_share": extra / EVERY,
    }


def _turn_s(laboratory: Laboratory) -> float:
    """Return the seconds that an ordinary step spends in the controller."""
    policy = Policy(EVERY, lambda _: Plan(), lambda *_: (), lambda: 0.1, first=10**9)
    current = Subplan(Plan, lambda _: EXACT, lambda: EXACT, lambda _: None, lambda _: None)
    controller = Controller(policy, laboratory.variants.subject, laboratory.names(), current)
    parameters, device, calls = laboratory.parameters, torch.device("cpu"), 10000
    start = time.perf_counter()
    for step in range(calls):
        controller.turn(step, parameters, device)
    return (time.perf_counter() - start) / calls


def _hooks_s(laboratory: Laboratory) -> float:
    """Return the seconds that the hooks and the sums of a sketch take in one step."""
    gradients = {i: torch.zeros_like(p) for i, p in laboratory.parameters.items()}
    sketch, calls = Sketch(laboratory.parameters), 50
    start = time.perf_counter()
    for _ in range(calls):
        for position, gradient in gradients.items():
            sketch.gather(position, gradient)
        sketch.fold()
    return (time.perf_counter() - start) / calls


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.probe_cost", description=__doc__)
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--aten", action="store_true", help="compile no code but our kernels")
    parser.add_argument("--output", default="probe_cost", help="name of the results file")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
