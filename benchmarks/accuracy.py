"""Accuracy after a short training: exact, and each GA method under each GA schedule.

    python -m benchmarks.accuracy --data DIR        # ten runs; writes results/accuracy.json
    python -m benchmarks.accuracy --data DIR --runs exact topk/ga-2

Everything but method and schedule is the same in all runs: model, data order, seed, optimizer.
Runs that the results file already holds, with the same settings, are kept.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.timing import earlier_runs, write_results
from examples import cifar10

METHODS = ("zero", "random", "topk")
SCHEDULES = ("ga-1", "ga-2", "ga-3")
EXACT = "exact"


def main(argv: Sequence[str] | None = None) -> None:
    """Train every combination, print a table, write the results."""
    given = _parse(argv)
    console = Console()
    settings = {"epochs": given.epochs, "model": given.model, "seed": given.seed}
    runs = earlier_runs(given.output, settings)
    for name in given.runs:
        arguments = _combinations()[name]
        torch._dynamo.reset()
        common = [
            "--data", str(given.data), "--model", given.model, "--epochs", str(given.epochs),
            "--seed", str(given.seed), "--threads", str(given.threads), "--channels-last",
        ]  # fmt: skip
        result = cifar10.main([*common, *arguments])
        # Of the configuration only what differs: the rest holds paths of this machine.
        runs[name] = {"arguments": arguments, "runs": result["runs"]}
        # Written after every run: a long measurement that is cut off is not lost.
        console.print(f"written to {write_results(given.output, {**settings, 'runs': runs})}")
    console.print(_table(runs))


def _combinations() -> dict[str, list[str]]:
    exact = {EXACT: ["--backend", "inductor"]}
    approximate = {
        f"{method}/{schedule}": ["--method", method, "--schedule", schedule]
        for method in METHODS
        for schedule in SCHEDULES
    }
    return exact | approximate


def final_accuracy(run: dict[str, Any]) -> float:
    """Return the test accuracy in percent after the last epoch of a run."""
    return float(run["runs"][0]["epochs"][-1]["test_accuracy_percent"])


def _table(runs: dict[str, Any]) -> Table:
    accuracies = {name: final_accuracy(run) for name, run in runs.items()}
    exact = accuracies.get(EXACT)
    table = Table(title="test accuracy in %" + (f", exact {exact:.2f}" if exact else ""))
    for column in ("method", *SCHEDULES):
        table.add_column(column)
    for method in METHODS:
        cells = [accuracies.get(f"{method}/{schedule}") for schedule in SCHEDULES]
        table.add_row(method, *(_cell(cell, exact) for cell in cells))
    return table


def _cell(accuracy: float | None, exact: float | None) -> str:
    if accuracy is None:
        return "not run"
    return f"{accuracy:.2f}" + (f" ({accuracy - exact:+.2f})" if exact else "")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="CIFAR-10 as published")
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    every = list(_combinations())
    parser.add_argument("--runs", nargs="+", choices=every, default=every, metavar="RUN")
    parser.add_argument("--output", default="accuracy", help="name of the results file")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
