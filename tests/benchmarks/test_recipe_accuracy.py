"""Trainings by recipe: what is run, and the table of what came of it."""

import argparse
import io
from pathlib import Path

import pytest
from rich.console import Console
from torch import nn

from benchmarks import recipe_accuracy
from benchmarks.recipe_accuracy import STUDIES, planned, table
from benchmarks.timing import write_results
from benchmarks.trainings import Runs
from examples import arguments, cifar10, mnist, ptb
from graphpass import Options

_EXAMPLES = {"examples.cifar10": cifar10, "examples.mnist": mnist, "examples.ptb": ptb}


def _given(*studies: str) -> argparse.Namespace:
    return recipe_accuracy._parse(["--data", "data", "--studies", *studies, "--max-steps", "3"])


@pytest.mark.parametrize("study", STUDIES)
def test_examples_take_the_arguments(study: str) -> None:
    # Of ERK, densities are given to the layers of the model; any one will do here.
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))
    trainings = planned(_given(study))
    assert len({training.name for training in trainings}) == len(trainings)
    for training in trainings:
        given = _EXAMPLES[training.program].parser().parse_args(training.arguments)
        arguments.check(given)
        assert arguments.settings(given).max_steps == 3
        exact = recipe_accuracy.EXACT in training.name
        assert exact == (given.backend == "inductor")
        if not exact:
            Options(**arguments.approx_options(given, model, 10))


def test_first_seeds_come_first() -> None:
    names = [training.name for training in planned(_given("resnet20", "mnist-mlp"))]
    assert [name.rpartition("/")[2] for name in names] == ["0"] * 7 + ["1"] * 3 + ["2"] * 3


def test_the_table_compares_after_the_same_epoch() -> None:
    def run(*scores: float, share: float = 1.0) -> dict[str, object]:
        epochs = [{"test_accuracy_percent": score} for score in scores]
        return {"epochs": epochs, "finished": False, "flops_share": share}

    way = "crs-backward keep=0.4 backward=0.05"
    runs = {
        "mnist-mlp exact/0": run(90.0, 91.0, 92.0),
        f"mnist-mlp {way}/0": run(88.0, 90.5, share=0.25),
        "mnist-mlp exact/1": run(91.0),
        f"mnist-mlp {way}/1": run(),
    }
    out = io.StringIO()
    Console(file=out, width=200).print(table(runs, ["mnist-mlp"]))
    lines = [line.split("│")[1:-1] for line in out.getvalue().splitlines() if "mnist-mlp" in line]
    cells = {line[1].strip(): [cell.strip() for cell in line[2:]] for line in lines}
    # Both came to the second epoch of seed 0; of seed 1 there is nothing to compare.
    assert cells["exact"] == ["0.0", "0", "1 or 2", "91.00 (91.00 to 91.00)", "-", "98.16"]
    assert cells[way] == ["75.0", "79", "1 or 2", "90.50", "-0.50", "98.1"]
    assert cells["crs-topk keep=0.4"][3] == "-"


@pytest.mark.parametrize("more", [(), ("--threads", "2")])
def test_runs_made_with_other_arguments_are_made_again(
    more: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    [first, *_] = planned(_given("resnet20"))
    elsewhere = ["here" if word == "data" else word for word in first.arguments]
    output, given = str(tmp_path / "runs"), ["--data", "data", "--studies", "resnet20"]
    run = {"arguments": [*elsewhere, *more], "finished": True, "epochs": []}
    write_results(output, {"runs": {first.name: run}})
    kept: list[bool] = []

    def train(_: object, runs: Runs, *__: object, **___: object) -> None:
        kept.append(runs[first.name]["finished"])

    monkeypatch.setattr(recipe_accuracy.trainings, "run", train)
    recipe_accuracy.main([*given, "--max-steps", "3", "--output", output])
    assert kept == [not more]
