"""Accuracy after a short training: exact, and each GA method under each GA schedule.

    python -m benchmarks.accuracy --data DIR        # ten runs; writes results/accuracy.json

Everything but method and schedule is the same in all runs: model, data order, seed, optimizer.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.timing import write_results
from examples import cifar10

METHODS = ("zero", "random", "topk")
SCHEDULES = ("ga-1", "ga-2", "ga-3")
EXACT = "exact"


def main(argv: Sequence[str] | None = None) -> None:
    """Train every combination, print a table, write the results."""
    given = _parse(argv)
    console = Console()
    runs: dict[str, Any] = {}
    for name, arguments in _combinations().items():
        torch._dynamo.reset()
        common = [
            "--data", str(given.data), "--model", given.model, "--epochs", str(given.epochs),
            "--seed", str(given.seed), "--threads", str(given.threads), "--channels-last",
        ]  # fmt: skip
        result = cifar10.main([*common, *arguments])
        runs[name] = {"arguments": arguments, "result": result}
        # Written after every run: a long measurement that is cut off is not lost.
        record = {"epochs": given.epochs, "model": given.model, "seed": given.seed, "runs": runs}
        path = write_results("accuracy", record)
    console.print(_table(runs))
    console.print(f"written to {path}")


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
    return float(run["result"]["runs"][0]["epochs"][-1]["test_accuracy_percent"])


def _table(runs: dict[str, Any]) -> Table:
    table = Table(title=f"test accuracy in %, exact {final_accuracy(runs[EXACT]):.2f}")
    for column in ("method", *SCHEDULES):
        table.add_column(column)
    for method in METHODS:
        cells = [final_accuracy(runs[f"{method}/{schedule}"]) for schedule in SCHEDULES]
        exact = final_accuracy(runs[EXACT])
        table.add_row(method, *(f"{cell:.2f} ({cell - exact:+.2f})" for cell in cells))
    return table


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="CIFAR-10 as published")
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
