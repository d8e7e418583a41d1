"""MNIST with sampled products against exact training: accuracy, and the FLOPs that are saved.

    python -m benchmarks.mnist_accuracy --data DIR
    python -m benchmarks.mnist_accuracy --data DIR --models mnist-mlp --seeds 0

Table 2 of Adelman, Silberstein 2018 (arXiv:1805.08079): deterministic top-k, sampled more in the
backward products, at least ten samples a product. Networks, batch, optimizer and length are the
paper's; it reports the test accuracy of the epoch that was best on a validation split, this the
test accuracy after the last epoch. FLOPs are those of convolutions and matrix products, as the
report counts them. Runs that the results file already holds, with the same settings, are kept.
"""

import argparse
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.timing import earlier_runs, write_results
from examples import mnist

EXACT = "exact"


@dataclass(frozen=True, slots=True)
class Row:
    """A row of the paper's table.

    Attributes:
        recipe: name and parameters of a recipe, as the command line takes them.
        epochs: length of the training.
        saved: percentage of the FLOPs that the paper saves.
        accuracy: of the paper, in percent.
        exact: the paper's accuracy of exact training, in percent.
    """

    recipe: tuple[str, ...]
    epochs: int
    saved: float
    accuracy: float
    exact: float


# Of the perceptron the paper trains 20 epochs, of the convolutional network 20,000 steps.
ROWS = {
    "mnist-mlp": Row(("crs-backward", "keep=0.4", "backward=0.05"), 20, 80, 98.1, 98.16),
    "mnist-cnn": Row(("crs-backward", "keep=0.4", "backward=0.2"), 17, 78, 99.25, 99.29),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Train, print the table, write the results."""
    given = _parse(argv)
    runs = earlier_runs(given.output, {"rows": _described()})
    for model in given.models:
        for seed in given.seeds:
            for kind, arguments in _kinds(ROWS[model]).items():
                name = f"{model}/{kind}/{seed}"
                if name not in runs:
                    runs[name] = train(given, model, seed, arguments)
                    # Written after every run: a long measurement that is cut off is not lost.
                    write_results(given.output, {"rows": _described(), "runs": runs})
    Console().print(table(runs, given.models, given.seeds))


def train(
    given: argparse.Namespace, model: str, seed: int, arguments: Sequence[str]
) -> dict[str, float]:
    """Return the accuracy of a run, and the share of the exact FLOPs that it does."""
    torch._dynamo.reset()
    row = ROWS[model]
    result = mnist.main(
        [
            "--data", str(given.data), "--model", model, "--epochs", str(row.epochs),
            "--lr-schedule", "constant", "--seed", str(seed), "--threads", str(given.threads),
            *arguments,
        ]
    )  # fmt: skip
    rows = [row for report in result["reports"] for row in report["rows"]]
    exact = sum(row["exact_flops"] for row in rows)
    return {
        "test_accuracy_percent": result["runs"][0]["epochs"][-1]["test_accuracy_percent"],
        "flops_share": sum(row["planned_flops"] for row in rows) / exact if exact else 1.0,
    }


def table(
    runs: Mapping[str, Mapping[str, float]], models: Sequence[str], seeds: Sequence[int]
) -> Table:
    """Return means over the seeds, beside the paper's figures."""
    shown = Table(title="MNIST, test accuracy in %")
    for column in ("network", "FLOPs saved %", "(paper)", "exact", "(paper)", "sampled", "(paper)"):
        shown.add_column(column, justify="right")
    for model in models:
        row = ROWS[model]
        exact, sampled = (
            [runs[f"{model}/{kind}/{seed}"] for seed in seeds] for kind in (EXACT, row.recipe[0])
        )
        saved = 100 * (1 - sampled[0]["flops_share"])
        shown.add_row(
            model, f"{saved:.1f}", f"{row.saved:.0f}", _spread(exact), f"{row.exact}",
            _spread(sampled), f"{row.accuracy}",
        )  # fmt: skip
    return shown


def _spread(runs: Sequence[Mapping[str, float]]) -> str:
    values = [run["test_accuracy_percent"] for run in runs]
    return f"{statistics.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def _kinds(row: Row) -> dict[str, list[str]]:
    return {EXACT: ["--backend", "inductor"], row.recipe[0]: ["--recipe", *row.recipe]}


def _described() -> dict[str, Any]:
    return {model: [*row.recipe, row.epochs] for model, row in ROWS.items()}


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.mnist_accuracy", description=__doc__
    )
    parser.add_argument("--data", type=Path, required=True, help="MNIST as published")
    parser.add_argument("--models", nargs="+", choices=ROWS, default=tuple(ROWS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", default="mnist_accuracy", help="name of the results file")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
