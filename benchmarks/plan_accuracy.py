"""Accuracy and wall-clock of whole trainings: exact, and under a plan of `benchmarks.plans`.

    python -m benchmarks.plan_accuracy --data DIR --plan "int8, bf16 forward" --epochs 15

For every seed, exact training and the planned one start from the same values and see the same
batches. The difference in accuracy is given with its confidence interval over seeds (Student's t).
Runs that the results file already holds, with the same settings, are kept.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from scipy.stats import t as student

from benchmarks.plans import PLANS
from benchmarks.timing import RESULTS, write_results
from benchmarks.training_step import Case
from examples import cifar10

CONFIDENCE = 0.95
EXACT = "exact"


def main(argv: Sequence[str] | None = None) -> None:
    """Train every seed twice, print the comparison, write the results."""
    given = _parse(argv)
    settings = {name: getattr(given, name) for name in ("model", "epochs", "threads", "lr")}
    runs = _earlier_runs(given.output, settings)
    for seed in given.seeds:
        for plan in (EXACT, given.plan):
            if f"{plan}/{seed}" not in runs:
                runs[f"{plan}/{seed}"] = train(given, plan, seed)
                # Written after every run: a long measurement that is cut off is not lost.
                write_results(given.output, {**settings, "runs": runs})
    Console().print(compare(runs, given.plan, given.seeds))


def train(given: argparse.Namespace, plan: str, seed: int) -> dict[str, float]:
    """Return accuracy in percent and seconds of training of one run."""
    arguments = [
        "--data", str(given.data), "--model", given.model, "--epochs", str(given.epochs),
        "--seed", str(seed), "--threads", str(given.threads), "--channels-last",
    ]  # fmt: skip
    if given.lr is not None:
        arguments += ["--lr", str(given.lr)]
    if plan == EXACT:
        arguments += ["--backend", "inductor"]
    else:
        layers = Case(given.model).layers()[1:]
        arguments += ["--methods-json", json.dumps(dict.fromkeys(layers, PLANS[plan]))]
    torch._dynamo.reset()
    (run,) = cifar10.main(arguments)["runs"]
    epochs = run["epochs"]
    return {
        "test_accuracy_percent": epochs[-1]["test_accuracy_percent"],
        "train_s": sum(epoch["train_s"] for epoch in epochs),
    }


def compare(runs: dict[str, dict[str, float]], plan: str, seeds: Sequence[int]) -> str:
    """Return what the plan costs in accuracy, and what it saves."""
    pairs = [(runs[f"{EXACT}/{seed}"], runs[f"{plan}/{seed}"]) for seed in seeds]
    name = "test_accuracy_percent"
    differences = [planned[name] - exact[name] for exact, planned in pairs]
    faster = statistics.mean(exact["train_s"] / planned["train_s"] for exact, planned in pairs)
    accuracies = ", ".join(f"{planned[name]:.2f} to {exact[name]:.2f}" for exact, planned in pairs)
    text = f"{plan}: {accuracies}; mean difference {statistics.mean(differences):+.2f}"
    if len(pairs) > 1:
        spread = statistics.stdev(differences) / len(pairs) ** 0.5
        half = float(student.ppf((1 + CONFIDENCE) / 2, len(pairs) - 1)) * spread
        text += f" ± {half:.2f} points"
    return f"{text}; {faster:.2f} times faster"


def _earlier_runs(name: str, settings: dict[str, Any]) -> dict[str, dict[str, float]]:
    path = RESULTS / f"{name}.json"
    if not path.exists():
        return {}
    record = json.loads(path.read_text())
    same = all(record.get(key) == value for key, value in settings.items())
    return dict(record["runs"]) if same else {}


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan_accuracy", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="CIFAR-10 as published")
    parser.add_argument("--plan", choices=tuple(PLANS), required=True)
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--lr", type=float)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", default="plan_accuracy", help="name of the results file")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
