"""What plans add to the noise of the gradient, measured: tau and bias on real images.

    python -m benchmarks.noise --data DIR --model resnet20 --plans int8 "int8, forward too"

With g the exact gradient of a batch (all parameters), ĝ that of the plan and V = E|g - E g|^2 the
noise that the choice of the batch makes, at fixed weights after some exact steps:

    tau = E|ĝ - E ĝ|^2 / V,      bias = |E ĝ - g|^2 / |E g|^2,

the latter with the part that is left of the draws' noise taken out. Expectations are means over
batches, and over draws on one batch.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks.gradients import gradient, square_of_mean, variance
from benchmarks.plans import BACKWARD, PLANS, options_of
from benchmarks.timing import write_results
from benchmarks.training_step import BATCH, Case
from examples import data


def _fp8(*gradients: str) -> list[dict[str, Any]]:
    """Return 8-bit floats in plain torch: a CPU has none."""
    return [{"name": "fp8", "gradient": gradient, "emulate": True} for gradient in gradients]


EMULATED = {
    "fp8": _fp8(*BACKWARD),
    "fp8, forward too": _fp8("forward", *BACKWARD),
    **{f"fp8 {gradient}": _fp8(gradient) for gradient in ("forward", *BACKWARD)},
}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print a table, write the results."""
    given = _parse(argv)
    torch.set_num_threads(given.threads)
    batches = data.Batches(data.load(given.data), BATCH, seed=0, channels_last=True)
    model = Case(given.model).model()
    _train(model, batches, given.steps)
    exact = torch.compile(model)
    gradients = [gradient(model, exact, batches.next()) for _ in range(given.batches)]
    truth, square = variance(gradients), square_of_mean(gradients)
    batch = batches.next()
    g = gradient(model, exact, batch)
    record: dict[str, Any] = {}
    for name in given.plans:
        torch._dynamo.reset()
        options = options_of(Case(given.model), {**PLANS, **EMULATED}[name])
        planned = torch.compile(model, backend="approx", options=options)
        draws = [gradient(model, planned, batch) for _ in range(given.draws)]
        noise = variance(draws)
        offset = float((torch.stack(draws).mean(0) - g).square().sum()) - noise / len(draws)
        record[name] = {"tau": noise / truth, "bias": offset / square}
    ratio = truth / square
    Console().print(_table(given, record, ratio))
    settings = {name: getattr(given, name) for name in ("model", "steps", "batches", "draws")}
    written = write_results(given.output, {**settings, "noise_ratio": ratio, "plans": record})
    Console().print(f"written to {written}")


def _train(model: nn.Module, batches: data.Batches, steps: int) -> None:
    compiled = torch.compile(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        images, labels = batches.next()
        F.cross_entropy(compiled(images), labels).backward()
        optimizer.step()


def _table(given: argparse.Namespace, record: dict[str, Any], ratio: float) -> Table:
    table = Table(
        title=f"{given.model} after {given.steps} steps, batch {BATCH}; V / |E g|^2 = {ratio:.1f}"
    )
    for column in ("plan", "tau", "bias"):
        table.add_column(column)
    for name, row in record.items():
        table.add_row(name, f"{row['tau']:.4f}", f"{row['bias']:.4f}")
    return table


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.noise", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="CIFAR-10 as published")
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--plans", nargs="+", default=tuple(PLANS), choices=(*PLANS, *EMULATED))
    parser.add_argument("--steps", type=int, default=200, help="exact steps before")
    parser.add_argument("--batches", type=int, default=48)
    parser.add_argument("--draws", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", default="noise", help="name of the results file")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
