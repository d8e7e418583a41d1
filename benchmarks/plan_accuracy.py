"""Accuracy, time and memory of whole trainings: exact, and under plans of `benchmarks.plans`.

    python -m benchmarks.plan_accuracy --data DIR --plans "int8, forward too" --short 7

For every seed, exact training and the planned ones start from the same values and see the same
batches. The difference in accuracy is given with its confidence interval over seeds (Student's t).
`--short` trains exactly for fewer epochs too: what a plan has to beat is exact training of the same
wall-clock. Every run is a process of its own, whose processor time and peak memory are noted, with
compilation; seconds of training mean something on a quiet machine only. Runs that the results file
already holds, with the same settings, are kept.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from scipy.stats import t as student

from benchmarks.plans import PLANS
from benchmarks.timing import earlier_runs, write_results
from benchmarks.training_step import Case

CONFIDENCE = 0.95
EXACT = "exact"
# What is compared beside accuracy, exact over planned.
_FIGURES = {
    "train_s": "faster",
    "cpu_s": "less processor time",
    "peak_memory_bytes": "less memory at its peak",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Train, print the comparison, write the results."""
    given = _parse(argv)
    settings = {name: getattr(given, name) for name in ("model", "epochs", "threads", "lr")}
    runs = earlier_runs(given.output, settings)
    # Each with its epochs.
    kinds = {EXACT: given.epochs, **dict.fromkeys(given.plans, given.epochs)}
    if given.short is not None:
        kinds[f"{EXACT}, {given.short} epochs"] = given.short
    for seed in given.seeds:
        for kind, epochs in kinds.items():
            if f"{kind}/{seed}" not in runs:
                runs[f"{kind}/{seed}"] = train(given, kind, epochs, seed)
                # Written after every run: a long measurement that is cut off is not lost.
                write_results(given.output, {**settings, "runs": runs})
    for kind in list(kinds)[1:]:
        Console().print(compare(runs, kind, given.seeds))


def train(given: argparse.Namespace, kind: str, epochs: int, seed: int) -> dict[str, float]:
    """Return accuracy in percent, seconds and bytes of one run.

    Raises:
        SystemExit: if the run fails.
    """
    arguments = [
        "--data", str(given.data), "--model", given.model, "--epochs", str(epochs),
        "--seed", str(seed), "--threads", str(given.threads), "--channels-last",
    ]  # fmt: skip
    if given.lr is not None:
        arguments += ["--lr", str(given.lr)]
    plan = PLANS.get(kind)
    if isinstance(plan, list):
        layers = Case(given.model).layers()[1:]
        arguments += ["--methods-json", json.dumps(dict.fromkeys(layers, plan))]
    else:
        arguments += ["--backend", "inductor"] if plan is None else _flags(plan)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "results.json"
        command = [sys.executable, "-m", "examples.cifar10", *arguments, "--json", str(path)]
        process = subprocess.Popen(command)
        _, status, used = os.wait4(process.pid, 0)
        if status != 0:
            raise SystemExit(f"{' '.join(command)} failed")
        (run,) = json.loads(path.read_text())["runs"]
    return {
        "test_accuracy_percent": run["epochs"][-1]["test_accuracy_percent"],
        "train_s": sum(epoch["train_s"] for epoch in run["epochs"]),
        "cpu_s": used.ru_utime + used.ru_stime,
        # Linux counts it in KiB.
        "peak_memory_bytes": used.ru_maxrss * 1024,
    }


def _flags(options: dict[str, Any]) -> list[str]:
    """Return options of the backend as arguments of the example."""
    flags: list[str] = []
    for name, value in options.items():
        values = value if isinstance(value, tuple) else (value,)
        flags += [f"--{name.replace('_', '-')}", *map(str, values)]
    return flags


def compare(runs: dict[str, dict[str, float]], kind: str, seeds: Sequence[int]) -> str:
    """Return what a kind of training costs in accuracy, and what it saves."""
    pairs = [(runs[f"{EXACT}/{seed}"], runs[f"{kind}/{seed}"]) for seed in seeds]
    name = "test_accuracy_percent"
    differences = [other[name] - exact[name] for exact, other in pairs]
    accuracies = ", ".join(f"{other[name]:.2f} to {exact[name]:.2f}" for exact, other in pairs)
    text = f"{kind}: {accuracies}; mean difference {statistics.mean(differences):+.2f}"
    if len(pairs) > 1:
        spread = statistics.stdev(differences) / len(pairs) ** 0.5
        half = float(student.ppf((1 + CONFIDENCE) / 2, len(pairs) - 1)) * spread
        text += f" ± {half:.2f} points"
    for name, what in _FIGURES.items():
        # Of a run made beside other work, the file has no seconds.
        if all(name in run for pair in pairs for run in pair):
            ratio = statistics.mean(exact[name] / other[name] for exact, other in pairs)
            text += f"; {ratio:.2f} times {what}"
    return text


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan_accuracy", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="CIFAR-10 as published")
    parser.add_argument("--plans", nargs="+", choices=tuple(PLANS), required=True)
    parser.add_argument("--short", type=int, help="epochs of exact training that is shortened")
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--lr", type=float)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", default="plan_accuracy", help="name of the results file")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
