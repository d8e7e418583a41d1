"""What probes and the sketch of gradients say, against the noise itself, during a training run.

    python -m benchmarks.probe --data DIR --aten
    python -m benchmarks.probe --data DIR --aten --device cuda --groups 6

At some moments of an exact run the weights are held. The noise V of the batch is measured from 64
fresh batches, and estimated as in training, from consecutive steps before the moment. The noise
that a plan adds is measured from its own gradients, E|ĝ - g|^2 over batches and draws, and
predicted: by the law from local noise, with input gradients' errors taken as they are and with the
correction that one probe of the plan measured on other batches; and as that probe has it in all.
"""

import argparse
import math
import statistics
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks import trainings
from benchmarks.gradients import gradient, square_of_mean, variance
from benchmarks.laboratory import Laboratory, Specs
from benchmarks.timing import write_results
from benchmarks.training_step import BATCH, Case
from benchmarks.trainings import Training
from examples import checkpoint, data
from examples.results import environment
from graphpass.measuring import table_of
from graphpass.noise import NoiseTable
from graphpass.propagation import Propagation
from graphpass.sheet import Probe
from graphpass.sketch import Sketch, values_of
from graphpass.variants import EXACT, Active

_SETTINGS = ("model", "fresh", "batches", "draws", "probes")
# Pairs of consecutive steps, as in training.
WINDOW = 32
BOTH, WEIGHT = ("weight", "input"), ("weight",)


def _plan(name: str, gradients: Sequence[str], **params: object) -> Specs:
    return [{"name": name, "gradient": gradient, **params} for gradient in gradients]


PLANS: dict[str, Specs] = {
    "int8": _plan("int8", BOTH),
    "pixels, 1/4": _plan("pixels", WEIGHT, keep=0.25),
    "pixels, 1/10": _plan("pixels", WEIGHT, keep=0.1),
    "pixels_int8, 1/4": _plan("pixels_int8", WEIGHT, keep=0.25),
    "pixels_int8, 1/10": _plan("pixels_int8", WEIGHT, keep=0.1),
    "phase, 2x2": _plan("phase", WEIGHT, down=2, across=2),
    "phase, 2x1": _plan("phase", WEIGHT, down=2, across=1),
    "prune, p=0.9": _plan("prune", BOTH, p=0.9),
    "prune, p=0.99": _plan("prune", BOTH, p=0.99),
    "crs, 1/2": _plan("crs", WEIGHT, keep=0.5),
    "crs, 1/4": _plan("crs", WEIGHT, keep=0.25),
    "fp8, e4m3": _plan("fp8", BOTH, emulate=True),
    "fp8, e5m2": _plan("fp8", BOTH, emulate=True, grad="e5m2"),
}


class Run:
    """A model in training, and what is measured of it."""

    def __init__(self, given: argparse.Namespace) -> None:
        """Build the model and compile its exact step."""
        self.given = given
        self.case = Case(given.model)
        self.model: nn.Module = self.case.model().to(given.device)
        images = data.load(given.data).to(given.device)
        self.batches = data.Batches(images, BATCH, seed=0, channels_last=True)
        self.laboratory = Laboratory()
        torch._dynamo.reset()
        self.compiled = torch.compile(self.model, backend=self.laboratory)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        self.gradient(self.batches.next())
        self.sketch: Sketch | None = None

    def train(self, steps: int) -> None:
        """Take exact steps, with a sketch of the last ones."""
        self.laboratory.running = EXACT
        parameters = self.laboratory.parameters
        for left in range(steps, 0, -1):
            if left == WINDOW + 1:
                self.sketch = Sketch(parameters)
                self.sketch.open(parameters)
            self.gradient(self.batches.next())
            self.optimizer.step()
            if self.sketch is not None:
                self.sketch.fold()
        assert self.sketch is not None
        self.sketch.close()

    def gradient(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the gradient of a batch, of all parameters, flat, in float64."""
        return gradient(self.model, self.compiled, batch)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print tables, write the results."""
    given = _parse(argv)
    if given.groups > 1:
        side_by_side(given)
        return
    torch.set_num_threads(given.threads)
    # What is looked at are numbers: calling ATen for every operation compiles ten times as fast.
    torch._inductor.config.fallback_by_default = given.aten
    run, record, before = Run(given), {}, 0
    for moment in given.moments:
        run.train(moment - before)
        before = moment
        record[moment] = measure(run)
        # After every moment: what follows may take long.
        _write(given, record)


def side_by_side(given: argparse.Namespace) -> None:
    """Measure groups of plans, each in a process with a training of its own."""
    todo, ends = [], [len(given.plans) * i // given.groups for i in range(given.groups + 1)]
    for start, end in pairwise(ends):
        plans = given.plans[start:end]
        arguments = [f"--{name}={getattr(given, name)}" for name in (*_SETTINGS, "device")]
        arguments += ["--plans", *plans, "--moments", *map(str, given.moments)]
        arguments += ["--data", str(given.data)]
        arguments += ["--aten"] if given.aten else []
        todo.append(
            Training(
                ", ".join(plans), ("benchmarks.probe", *arguments), "", "benchmarks.gpu_warmed"
            )
        )
    trainings.run(
        todo,
        {},
        lambda runs: _write(given, _merged(runs)),
        at_once=given.groups,
        seconds=given.seconds,
        threads=given.threads,
    )


def _merged(runs: trainings.Runs) -> dict[str, Any]:
    """Return the moments of all groups as one: of the first what is not of plans."""
    merged: dict[str, Any] = {}
    for run in runs.values():
        for moment, found in run.get("moments", {}).items():
            whole = merged.setdefault(moment, {**found, "plans": {}})
            whole["plans"] |= found["plans"]
    return merged


def _write(given: argparse.Namespace, moments: dict[Any, Any]) -> None:
    """Print a table of each moment, write the results."""
    settings = {name: getattr(given, name) for name in _SETTINGS}
    record = {**settings, "window": WINDOW, "moments": moments}
    if given.json is not None:
        runs = [{"epochs": [], **record}]
        checkpoint.write_json(given.json, {"environment": environment(), "runs": runs})
        return
    for moment, found in moments.items():
        Console().print(_table(moment, found))
    write_results(given.output, record)


def measure(run: Run) -> dict[str, Any]:
    """Return everything about one moment; the weights stay as they are."""
    given, laboratory = run.given, run.laboratory
    laboratory.running = EXACT
    gradients = [run.gradient(run.batches.next()) for _ in range(given.fresh)]
    truth = variance(gradients)
    every = {name: laboratory.numbers(PLANS[name], run.case.layers()[1:]) for name in given.plans}
    # A device may lack a method.
    plans = {name: numbers for name, numbers in every.items() if numbers}
    local = _local(run, frozenset[int]().union(*plans.values()))
    rows = {}
    for name, numbers in plans.items():
        rows[name] = _compare(run, numbers, local, truth)
        Console().print(name, rows[name])
    assert run.sketch is not None
    values = values_of(run.sketch.result().tolist())
    estimate = sum(half for half, _ in values)
    matrices = [p for p in run.sketch.positions if laboratory.parameters[p].dim() > 1]
    of_matrices = sum(values[run.sketch.positions.index(p)][0] for p in matrices)
    return {
        "variance": truth,
        "sketched_variance": estimate,
        "part_of_products": of_matrices / estimate,
        "square": square_of_mean(gradients),
        "sketched_square": sum(square - half for half, square in values),
        "plans": rows,
    }


def _local(run: Run, candidates: Active) -> NoiseTable:
    """Return what probes of the candidates and the sketch have found."""
    assert run.sketch is not None
    probe = Probe(candidates, EXACT)
    run.laboratory.running = probe
    readings = []
    for _ in range(run.given.probes):
        run.gradient(run.batches.next())
        readings.append(run.laboratory.reading())
    values = values_of(run.sketch.result().tolist())
    compared = dict(zip(run.sketch.positions, values, strict=True))
    names = run.laboratory.names()
    return table_of({probe: readings}, compared, 0.0, names, NoiseTable())[0]


def _compare(run: Run, numbers: Active, local: NoiseTable, truth: float) -> dict[str, float]:
    """Return the tau of a plan: measured, and as predicted in several ways."""
    names = run.laboratory.names()
    keys = [names.candidates[number] for number in numbers]
    probe = Probe(EXACT, numbers)
    run.laboratory.running = probe
    readings = []
    for _ in range(run.given.probes):
        run.gradient(run.batches.next())
        readings.append(run.laboratory.reading())
    corrected, probed = table_of({probe: readings}, None, 0.0, names, local)
    errors = []
    for _ in range(run.given.batches):
        batch = run.batches.next()
        run.laboratory.running = EXACT
        exact = run.gradient(batch)
        run.laboratory.running = numbers
        for _ in range(run.given.draws):
            errors.append(float((run.gradient(batch) - exact).square().sum()))
    return {
        "measured": statistics.mean(errors) / truth,
        "law": Propagation(local, names.reach).plan(keys).tau,
        "corrected_law": Propagation(corrected, names.reach).plan(keys).tau,
        "probe": probed,
        "correction": corrected.correction,
    }


def _table(moment: int | str, found: dict[str, Any]) -> Table:
    estimate, truth = found["sketched_variance"], found["variance"]
    table = Table(
        title=f"after {moment} steps; V {estimate / truth:.2f} of that from fresh batches, "
        f"V / |E g|^2 {truth / found['square']:.1f}"
    )
    for column in ("plan", "tau measured", "law", "corrected law", "probe", "correction"):
        table.add_column(column)
    for name, row in found["plans"].items():
        table.add_row(name, *(f"{value:.4f}" for value in row.values()))
    return table


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.probe", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="CIFAR-10 as published")
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--plans", nargs="+", default=tuple(PLANS), choices=tuple(PLANS))
    parser.add_argument("--moments", nargs="+", type=int, default=(100, 400, 1000))
    parser.add_argument("--fresh", type=int, default=64, help="batches that V is measured from")
    parser.add_argument("--batches", type=int, default=4, help="that tau is measured on")
    parser.add_argument("--draws", type=int, default=4, help="of each batch")
    parser.add_argument("--probes", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ...")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--groups", type=int, default=1, help="of plans, a process each")
    parser.add_argument("--seconds", type=float, default=math.inf, help="end what still runs then")
    parser.add_argument("--json", type=Path, help="results of a process of several")
    parser.add_argument("--aten", action="store_true", help="compile no code but our kernels")
    parser.add_argument("--output", default="probe", help="name or path of the results, no suffix")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
