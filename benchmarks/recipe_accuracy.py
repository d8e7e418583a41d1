"""Trainings of the papers on sparse and sampled products: exact, and by recipe, on one schedule.

    python -m benchmarks.recipe_accuracy --data DIR --studies mnist-mlp mnist-cnn
    python -m benchmarks.recipe_accuracy --data DIR --device cuda --at-once 24 --seconds 270

Raihan, Aamodt 2020 (arXiv:2001.01969; SWAT), tables 2 and 4, in trainings that are much shorter
than theirs; Adelman, Silberstein 2018 (arXiv:1805.08079; CRS), table 2: deterministic top-k, with
the paper's networks, batches and optimizers. They report the epoch that was best on a validation
split, this the test split after the last epoch; of a study whose trainings were stopped, after the
last epoch that all of a seed came to. FLOPs are those of convolutions and matrix products of a
training step, as reports count them: a product of a masked operand counts as the dense product that
computes it (what a machine saves that skips zeros is in `benchmarks.swat_accounting`). The
perceptron's first layer is sampled too: without it, the paper's share of FLOPs could not be saved.

On a GPU, kernels of our own would have to be compiled for every shape, which takes longer than
short trainings do: `GRAPHPASS_TRITON=0` in the environment leaves them out. Trainings that the
results file already holds finished, made with the same arguments, are kept; `--seconds 0` trains
nothing and prints the table.
"""

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import trainings
from benchmarks.timing import earlier_runs, write_results
from benchmarks.trainings import Runs, Training

EXACT = "exact"


@dataclass(frozen=True, slots=True)
class Way:
    """How a network is trained.

    Attributes:
        arguments: of the example.
        saved: share of a step's FLOPs that the paper saves, in percent.
        score: what the paper comes to.
    """

    arguments: tuple[str, ...]
    saved: str = "-"
    score: str = "-"


@dataclass(frozen=True, slots=True)
class Study:
    """A network and the ways it is trained.

    Attributes:
        program: the example.
        arguments: of the example, in all ways.
        ways: by name; exact training is the first.
        score: what the example calls its figure of merit.
        seeds: how many trainings of each.
    """

    program: str
    arguments: tuple[str, ...]
    ways: Mapping[str, Way]
    score: str = "test_accuracy_percent"
    seeds: int = 1


def _exact(score: str) -> dict[str, Way]:
    return {EXACT: Way(("--backend", "inductor"), "0", score)}


def _recipe(text: str, saved: str = "-", score: str = "-", schedule: str = "") -> dict[str, Way]:
    chosen = ("--recipe", *text.split(), *(("--schedule", schedule) if schedule else ()))
    return {text: Way(chosen, saved, score)}


def _cifar10(model: str, epochs: int, ways: Mapping[str, Way]) -> Study:
    arguments = ("--model", model, "--epochs", str(epochs), "--batch-size", "256")
    return Study("examples.cifar10", (*arguments, "--channels-last"), ways)


def _mnist(model: str, epochs: int, ways: Mapping[str, Way]) -> Study:
    arguments = ("--model", model, "--epochs", str(epochs), "--lr-schedule", "constant")
    return Study("examples.mnist", arguments, ways, seeds=3)


# Half of the decoder's 650 terms, those of largest norm; gradients are those of that product.
_HALF_OF_DECODER = {
    "decoder": [
        {"name": "crs_unscaled", "keep": 0.5, "gradient": "forward"},
        {"name": "crs_unscaled", "keep": 0.5, "gradient": "input", "axis": "channels"},
        {"name": "crs_unscaled", "keep": 0.5, "gradient": "weight", "axis": "channels"},
    ]
}
# Thresholds from a part of the values, as one of all would cost a GPU more than the product does;
# by momentum, layers exchange density twice an epoch. Of the perceptron CRS's paper trains 20
# epochs, of the convolutional network 20,000 steps; that the perceptron loses nothing with 40 % of
# the pairs is said without a figure. SWAT's accuracies are those of 150 epochs.
STUDIES = {
    "resnet18": _cifar10(
        "resnet18",
        4,
        _exact("94.59")
        | _recipe("swat-u sparsity=0.9 threshold_from=16384")
        | _recipe("swat-channels sparsity=0.5", "49.8", "94.73")
        | _recipe("swat-channels sparsity=0.7", "69.8", "94.65"),
    ),
    "vgg16": _cifar10(
        "vgg16",
        5,
        _exact("93.30")
        | _recipe("swat-u sparsity=0.9 threshold_from=16384", "89.7", "91.95")
        | _recipe("swat-erk sparsity=0.95 threshold_from=16384", "89.5", "92.50")
        | _recipe("swat-m sparsity=0.95 threshold_from=16384 refresh=97", "64.0", "93.41"),
    ),
    "resnet20": _cifar10(
        "resnet20",
        6,
        _exact("-")
        | _recipe("swat-u sparsity=0.9 threshold_from=16384")
        | _recipe("swat-erk sparsity=0.9 threshold_from=16384")
        | _recipe("swat-m sparsity=0.9 threshold_from=16384 refresh=97"),
    ),
    "ptb": Study(
        "examples.ptb",
        ("--epochs", "4"),
        _exact("83.5")
        | {
            "half of the decoder": Way(
                ("--methods-json", json.dumps(_HALF_OF_DECODER)), "24", "83.6"
            )
        },
        score="test_perplexity",
    ),
    "mnist-cnn": _mnist(
        "mnist-cnn",
        17,
        _exact("99.29")
        | _recipe("crs-backward keep=0.4 backward=0.2", "77", "99.25")
        | _recipe("crs-topk keep=0.4"),
    ),
    "mnist-mlp": _mnist(
        "mnist-mlp",
        20,
        _exact("98.16")
        | _recipe("crs-backward keep=0.4 backward=0.05", "79", "98.1", "always")
        | _recipe("crs-topk keep=0.4", "60", schedule="always"),
    ),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Train, print the table, write the results."""
    given = _parse(argv)
    todo = planned(given)
    runs = earlier_runs(given.output, {})
    for training in todo:
        if _but_data(runs.get(training.name, {}).get("arguments", [])) != _but_data(
            training.arguments
        ):
            # Made in another way: it stays until it is made again.
            runs.get(training.name, {})["finished"] = False
    trainings.run(
        todo,
        runs,
        lambda runs: write_results(given.output, {"runs": runs}),
        at_once=given.at_once,
        seconds=given.seconds,
        threads=given.threads,
    )
    Console().print(table(runs, given.studies))


def _but_data(arguments: Sequence[str]) -> list[str]:
    """Return the arguments without the folder of the data, which differs between machines."""
    before = ["", *arguments][: len(arguments)]
    pairs = zip(before, arguments, strict=True)
    return [word for name, word in pairs if "--data" not in (name, word)]


def planned(given: argparse.Namespace) -> list[Training]:
    """Return the trainings that were asked for, the first seed of all of them first."""
    shared = ["--data", str(given.data), "--device", given.device]
    found = []
    for seed in range(max(STUDIES[name].seeds for name in given.studies)):
        for name in given.studies:
            study = STUDIES[name]
            # Rounding to bfloat16 would be an approximation of its own in the small networks.
            dtype = given.dtype if study.program == "examples.cifar10" else "fp32"
            for way, how in study.ways.items() if seed < study.seeds else ():
                arguments = [*study.arguments, *shared, *how.arguments, "--dtype", dtype]
                # Where something cannot be done, exact training is not to pass for it.
                arguments += ["--seed", str(seed), *(() if way == EXACT else ("--strict",))]
                for limit in ("epochs", "max_steps"):
                    if (value := getattr(given, limit)) is not None:
                        arguments += [f"--{limit.replace('_', '-')}", str(value)]
                kind = f"{name} {way}"
                found.append(Training(f"{kind}/{seed}", tuple(arguments), kind, study.program))
    return found


def table(runs: Runs, studies: Sequence[str]) -> Table:
    """Return what the trainings came to, beside the paper's figures."""
    shown = Table(title="Test accuracy in %, or perplexity, and FLOPs of a step saved in %")
    for column in ("network", "way", "saved", "(paper)", "epochs", "score", "to exact", "(paper)"):
        shown.add_column(column, justify="right")
    for name in studies:
        study = STUDIES[name]
        scores = {way: _scores(runs, name, way) for way in study.ways}
        for way, how in study.ways.items():
            pairs = list(zip(scores[EXACT], scores[way], strict=True))
            both = [
                (exact, mine) for exact, mine in pairs if exact is not None and mine is not None
            ]
            change = statistics.mean(mine - exact for exact, mine in both) if both else None
            shown.add_row(
                name, way, _saved(runs.get(f"{name} {way}/0")), how.saved,
                _lengths(runs, name),
                _spread([score for score in scores[way] if score is not None]),
                "-" if change is None or way == EXACT else f"{change:+.2f}", how.score,
            )  # fmt: skip
    return shown


def _lengths(runs: Runs, name: str) -> str:
    """Return after how many epochs the seeds of a study are compared."""
    found = {_epochs(runs, name, seed) for seed in range(STUDIES[name].seeds)} - {0}
    return " or ".join(map(str, sorted(found))) or "-"


def _epochs(runs: Runs, name: str, seed: int) -> int:
    """Return how many epochs all trainings of a seed have; those that have none do not count."""
    found = [runs.get(f"{name} {way}/{seed}", {}).get("epochs") for way in STUDIES[name].ways]
    return min((len(epochs) for epochs in found if epochs), default=0)


def _scores(runs: Runs, name: str, way: str) -> list[float | None]:
    """Return for each seed what a training came to in the last epoch that all of that seed have."""
    study = STUDIES[name]
    found: list[float | None] = []
    for seed in range(study.seeds):
        epochs = runs.get(f"{name} {way}/{seed}", {}).get("epochs")
        last = _epochs(runs, name, seed)
        found.append(float(epochs[last - 1][study.score]) if epochs else None)
    return found


def _saved(run: Mapping[str, Any] | None) -> str:
    share = run.get("flops_share") if run else None
    return "-" if share is None else f"{100 * (1 - share):.1f}"


def _spread(scores: Sequence[float]) -> str:
    if len(scores) < 2:
        return f"{scores[0]:.2f}" if scores else "-"
    return f"{statistics.mean(scores):.2f} ({min(scores):.2f} to {max(scores):.2f})"


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.recipe_accuracy", description=__doc__
    )
    trainings.add_arguments(parser, "recipe_accuracy")
    names = list(STUDIES)
    parser.add_argument("--studies", nargs="+", choices=names, default=names)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of CIFAR-10")
    parser.add_argument("--epochs", type=int, help="in place of the study's own")
    parser.add_argument("--max-steps", type=int, help="stop after so many steps, to try it")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
