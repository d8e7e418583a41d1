"""Does a plan keep its budget? Whole trainings under budgets, their noise measured from outside.

    python -m benchmarks.budget_kept --data DIR

ResNet-20 on CIFAR-10, 5 epochs. After every epoch the weights are held, and the noise that the plan
in force adds is measured from gradients, over batches and draws, against that of 32 fresh batches:
what the training itself neither sees nor uses. A planner spends no more than pays, so that noise
may stay below a budget; it is kept where the mean over the training is at most a fifth above it.
"""

import argparse
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import trainings
from benchmarks.noise_moments import IN_FORCE
from benchmarks.timing import earlier_runs, write_results
from benchmarks.trainings import Training

MODEL = "resnet20"


def main(argv: Sequence[str] | None = None) -> None:
    """Train, print the table, write the results after every run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.budget_kept", description=__doc__)
    trainings.add_arguments(parser, "budget_kept")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.03, 0.1, 0.3])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--fresh", type=int, default=32, help="batches that V is measured from")
    parser.add_argument("--limit-train", type=int, help="train on fewer images, to try the flow")
    given = parser.parse_args(argv)
    settings = {name: getattr(given, name) for name in ("epochs", "fresh", "limit_train")}
    common = [
        "--data", str(given.data), "--device", given.device, "--model", MODEL, "--channels-last",
        "--epochs", str(given.epochs), "--fresh", str(given.fresh), "--backend", "approx",
        "--strict", "--moments", *map(str, range(1, given.epochs + 1)),
    ]  # fmt: skip
    if given.limit_train is not None:
        common += ["--limit-train", str(given.limit_train)]
    runs = earlier_runs(given.output, settings)
    trainings.run(
        [
            Training(
                f"tau {budget:g}",
                (*common, "--budget", str(budget)),
                program="benchmarks.noise_moments",
            )
            for budget in given.budgets
        ],
        runs,
        lambda runs: write_results(given.output, {**settings, "runs": runs}),
        at_once=given.at_once,
        seconds=given.seconds,
        threads=given.threads,
    )
    Console().print(table(runs))


def table(runs: Mapping[str, Any]) -> Table:
    """Return what was measured of every budget."""
    shown = Table(title=f"{MODEL}: noise of the plan in force, after every epoch")
    for column in ("budget", "products", "tau", "mean", "of the budget", "as probed", "accuracy %"):
        shown.add_column(column, justify="right")
    for name, run in runs.items():
        moments, budget = run.get("moments", []), float(name.split()[1])
        if not moments:
            shown.add_row(name, *["-"] * 6)
            continue
        taus = [moment["tau"][IN_FORCE] for moment in moments]
        probed = [m["probed_tau"] for m in moments if m["probed_tau"] is not None]
        shown.add_row(
            name,
            " ".join(str(moment["approximated"]) for moment in moments),
            " ".join(f"{tau:.3f}" for tau in taus),
            f"{statistics.mean(taus):.3f}",
            f"{statistics.mean(taus) / budget:.2f}",
            " ".join(f"{tau:.3f}" for tau in probed),
            f"{run['epochs'][-1]['test_accuracy_percent']:.2f}",
        )
    return shown


if __name__ == "__main__":
    main()
