"""MNIST with sampled products against exact training: accuracy, and the FLOPs that are saved.

    python -m benchmarks.mnist_accuracy --data DIR
    python -m benchmarks.mnist_accuracy --data DIR --models mnist-mlp --seeds 0

Table 2 of Adelman, Silberstein 2018 (arXiv:1805.08079): deterministic top-k, sampled more in the
backward products, at least ten samples a product. Networks, batch, optimizer and length are the
paper's; it reports the test accuracy of the epoch that was best on a validation split, this the
test accuracy after the last epoch. FLOPs are those of convolutions and matrix products, as the
report counts them. The perceptron's first layer is sampled too: without it, the paper's share of
FLOPs could not be saved. Runs that the results file already holds, with the same settings, are
kept.
"""

import argparse
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.timing import earlier_runs, write_results
from examples import mnist

EXACT = "exact"
MODELS = ("mnist-mlp", "mnist-cnn")


@dataclass(frozen=True, slots=True)
class Row:
    """A row of the table.

    Attributes:
        model: the network.
        epochs: length of the training.
        recipe: name and parameters of a recipe, as the command line takes them.
        paper: the paper's percentage of FLOPs saved, accuracy and accuracy of exact training.
        schedule: which layers it samples, if not those of the recipe.
    """

    model: str
    epochs: int
    recipe: tuple[str, ...]
    paper: tuple[str, str, str]
    schedule: str = ""

    @property
    def name(self) -> str:
        """What the row is called."""
        return " ".join((self.model, *self.recipe))


# Of the perceptron the paper trains 20 epochs, of the convolutional network 20,000 steps. That it
# loses nothing with 40 % of the pairs is said of the perceptron, without a figure.
ROWS = (
    Row("mnist-mlp", 20, ("crs-topk", "keep=0.4"), ("60", "-", "98.16"), "always"),
    Row(
        "mnist-mlp",
        20,
        ("crs-backward", "keep=0.4", "backward=0.05"),
        ("80", "98.1", "98.16"),
        "always",
    ),
    Row("mnist-cnn", 17, ("crs-topk", "keep=0.4"), ("-", "-", "99.29")),
    Row("mnist-cnn", 17, ("crs-backward", "keep=0.4", "backward=0.2"), ("78", "99.25", "99.29")),
)


def main(argv: Sequence[str] | None = None) -> None:
    """Train, print the table, write the results."""
    given = _parse(argv)
    rows = [row for row in ROWS if row.model in given.models]
    epochs = {row.model: row.epochs for row in ROWS}
    runs = earlier_runs(given.output, {"epochs": epochs})
    for seed in given.seeds:
        for row in rows:
            for name, arguments in _kinds(row).items():
                if f"{name}/{seed}" not in runs:
                    runs[f"{name}/{seed}"] = train(given, row, seed, arguments)
                    # Written after every run: a long measurement that is cut off is not lost.
                    write_results(given.output, {"epochs": epochs, "runs": runs})
    Console().print(table(runs, rows, given.seeds))


def train(
    given: argparse.Namespace, row: Row, seed: int, arguments: Sequence[str]
) -> dict[str, float]:
    """Return the accuracy of a run, and the share of the exact FLOPs that it does."""
    torch._dynamo.reset()
    result = mnist.main(
        [
            "--data", str(given.data), "--model", row.model, "--epochs", str(row.epochs),
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
    runs: Mapping[str, Mapping[str, float]], rows: Sequence[Row], seeds: Sequence[int]
) -> Table:
    """Return means over the seeds, beside the paper's figures."""
    shown = Table(title="MNIST, test accuracy in %")
    for column in (
        "network and recipe", "FLOPs saved %", "(paper)", "exact", "(paper)", "sampled", "(paper)"
    ):  # fmt: skip
        shown.add_column(column, justify="right")
    for row in rows:
        exact, sampled = ([runs[f"{name}/{seed}"] for seed in seeds] for name in _kinds(row))
        saved, accuracy, of_exact = row.paper
        share = f"{100 * (1 - sampled[0]['flops_share']):.1f}"
        shown.add_row(row.name, share, saved, _spread(exact), of_exact, _spread(sampled), accuracy)
    return shown


def _spread(runs: Sequence[Mapping[str, float]]) -> str:
    values = [run["test_accuracy_percent"] for run in runs]
    return f"{statistics.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def _kinds(row: Row) -> dict[str, list[str]]:
    """Return the arguments of exact training and of the recipe, by name of the run."""
    exact = f"{row.model} {EXACT}"
    sampled = ["--recipe", *row.recipe, *(["--schedule", row.schedule] if row.schedule else [])]
    return {exact: ["--backend", "inductor"], row.name: sampled}


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.mnist_accuracy", description=__doc__
    )
    parser.add_argument("--data", type=Path, required=True, help="MNIST as published")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", default="mnist_accuracy", help="name of the results file")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
