"""What `benchmarks.noise_law` found: a table, and accuracy over the steps that a training is worth.

    python -m benchmarks.noise_law_table

By the law, a step under a plan is worth 1 / (1 + tau r / (1 + r)) exact ones, with tau and r as
they were measured along an exact training. An exact training of so many epochs should end where the
planned one does. How many it takes in truth is read off the exact trainings of several lengths,
once by test accuracy and once by training loss, between two lengths linearly in log epochs.
"""

import argparse
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import line_plot
from benchmarks.line_plot import Line
from benchmarks.noise_law import EXACT, MOMENTS
from benchmarks.noise_law_plans import RESULTS as PLANS
from benchmarks.timing import RESULTS, read_results
from graphpass.noise import steps_inflation

ACCURACY, LOSS = "test_accuracy_percent", "train_loss"
Points = Mapping[float, Sequence[float]]


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table, draw the plot."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.noise_law_table", description=__doc__
    )
    parser.add_argument("--output", default="noise_law", help="name of the results file")
    given = parser.parse_args(argv)
    record = read_results(given.output)
    epochs, runs = record["epochs"], record["runs"]
    plans = read_results(PLANS)["plans"]
    exact = {
        figure: {
            length: values
            for name in _kinds(runs)
            if name.startswith(EXACT)
            for length, values in [(float(name.split()[1]), finals(runs, name, figure))]
        }
        for figure in (ACCURACY, LOSS)
    }
    rows = {
        name: row(name, plans[name], runs, exact, epochs) for name in plans if name in _kinds(runs)
    }
    Console().print(table(rows, exact, epochs))
    draw(given.output, rows, exact[ACCURACY], epochs)


def finals(runs: Mapping[str, Any], kind: str, figure: str) -> list[float]:
    """Return a figure at the end of every finished run of a kind."""
    found = [run for name, run in runs.items() if name.rpartition("/")[0] == kind]
    return [run["epochs"][-1][figure] for run in found if run["finished"]]


def worth(moments: Sequence[Mapping[str, Any]], plan: str, epochs: float) -> float:
    """Return how many exact epochs the law says that a planned training is worth.

    Args:
        moments: what was measured, by epoch; between them linear, beyond them constant.
        plan: whose tau is taken.
        epochs: length of the training.
    """
    at = [float(moment["epoch"]) for moment in moments]
    shares = [1 / steps_inflation(moment["tau"][plan], _ratio(moment)) for moment in moments]
    # The middles of a hundred parts of the training.
    middles = (np.arange(100) + 0.5) * epochs / 100
    return float(epochs * np.interp(middles, at, shares).mean())


def length_of(value: float, exact: Points) -> float:
    """Return the length of exact training that ends at a value; beyond the lengths, the nearest."""
    lengths = sorted(exact)
    ends = [statistics.mean(exact[length]) for length in lengths]
    # `interp` wants ascending abscissas; a loss falls with the length.
    sign = 1 if ends[-1] > ends[0] else -1
    logs = [math.log(length) for length in lengths]
    order = np.argsort([sign * end for end in ends])
    found = np.interp(sign * value, [sign * ends[i] for i in order], [logs[i] for i in order])
    return float(np.exp(found))


def value_at(length: float, exact: Points) -> float:
    """Return where an exact training of some length ends."""
    lengths = sorted(exact)
    ends = [statistics.mean(exact[known]) for known in lengths]
    return float(np.interp(math.log(length), [math.log(known) for known in lengths], ends))


def row(
    name: str,
    plan: Mapping[str, Any],
    runs: Mapping[str, Any],
    exact: Mapping[str, Points],
    epochs: float,
) -> dict[str, Any]:
    """Return everything about one plan."""
    moments = runs[MOMENTS]["moments"]
    accuracies, losses = (finals(runs, name, figure) for figure in (ACCURACY, LOSS))
    speedup = plan.get("speedup", {}).get("median")
    return {
        "predicted_tau": plan.get("predicted_tau"),
        "tau": [moment["tau"][name] for moment in moments],
        "ratio": [_ratio(moment) for moment in moments],
        "accuracy": accuracies,
        "worth": worth(moments, name, epochs),
        "by_accuracy": [length_of(value, exact[ACCURACY]) for value in accuracies],
        "by_loss": [length_of(value, exact[LOSS]) for value in losses],
        "speedup": speedup,
        "same_time": value_at(epochs / speedup, exact[ACCURACY]) if speedup else None,
    }


def table(rows: Mapping[str, Any], exact: Mapping[str, Points], epochs: float) -> Table:
    """Return the table."""
    lengths = ", ".join(
        f"{length:g} epochs {_spread(values)}" for length, values in sorted(exact[ACCURACY].items())
    )
    shown = Table(title=f"{epochs} epochs; exact: {lengths}")
    for column in (
        "plan", "tau supposed", "tau measured", "accuracy %", "worth by the law, epochs",
        "by accuracy", "by training loss", "step, times faster", "exact in the same time",
    ):  # fmt: skip
        shown.add_column(column, justify="right")
    for name, found in rows.items():
        supposed, speedup = found["predicted_tau"], found["speedup"]
        shown.add_row(
            name,
            "-" if supposed is None else f"{supposed:.3f}",
            f"{statistics.mean(found['tau']):.3f} "
            f"({min(found['tau']):.3f} to {max(found['tau']):.3f})",
            _spread(found["accuracy"]),
            f"{found['worth']:.1f}",
            _spread(found["by_accuracy"], 1),
            _spread(found["by_loss"], 1),
            "-" if speedup is None else f"{speedup:.2f}",
            "-" if speedup is None else f"{found['same_time']:.2f}",
        )
    return shown


def draw(output: str, rows: Mapping[str, Any], exact: Points, epochs: float) -> None:
    """Draw test accuracy over exact epochs, of planned trainings over their worth by the law."""
    lengths = sorted(exact)
    ends = [exact[length] for length in lengths]
    lines = {
        "exact": Line(lengths, *_means(ends)),
        f"planned, {epochs} epochs, at their worth by the law": Line(
            [found["worth"] for found in rows.values()],
            *_means([found["accuracy"] for found in rows.values()]),
            joined=False,
        ),
    }
    lowest = math.floor(min(min(values) for values in ends))
    labels = ("exact epochs", "test accuracy, %: mean and deviation over seeds")
    title = "ResNet-20: noise against length"
    ticks = range(math.floor(lengths[0]), math.ceil(lengths[-1]) + 1)
    line_plot.write(RESULTS / f"{output}.svg", title, labels, ticks, lines, lowest)


def _ratio(moment: Mapping[str, Any]) -> float:
    """Return r = V / |E g|^2, infinite where |E g|^2 could not be told from 0."""
    return moment["variance"] / moment["square"] if moment["square"] > 0 else math.inf


def _kinds(runs: Mapping[str, Any]) -> list[str]:
    """Return the kinds of which a run has come to its end."""
    return list(dict.fromkeys(name.rpartition("/")[0] for name in runs if runs[name]["finished"]))


def _means(values: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    return [statistics.mean(seeds) for seeds in values], [_deviation(seeds) for seeds in values]


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _spread(values: Sequence[float], digits: int = 2) -> str:
    return f"{statistics.mean(values):.{digits}f} ± {_deviation(values):.{digits}f}"


if __name__ == "__main__":
    main()
