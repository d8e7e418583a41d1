"""The training program: same results for the same seed, exact resumption, clear refusals.

What needs no compiler runs with `--backend eager`; one thread, because the networks are tiny.
"""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from examples import arguments, checkpoint, cifar10, compare, data, models, program, training
from examples.results import StepTime, step_statistics
from examples.settings import Settings
from graphpass import ConfigError

TESTED = 48
# 3 epochs of 4 steps.
TINY = "--limit-train 64 --batch-size 16 --epochs 3 --threads 1".split()
EAGER = [*TINY, "--model", "resnet8", "--backend", "eager"]
# On every other step the second convolution gets no gradient.
ZERO = [*TINY, "--model", "cnn2", "--method", "zero", "--schedule", "ga-cnn2"]


@pytest.fixture(autouse=True)
def _few_test_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluate on few images: most of the time would go there."""
    whole = data.digits()
    few = replace(whole, test=data.Split(whole.test.images[:TESTED], whole.test.labels[:TESTED]))
    monkeypatch.setattr(data, "digits", lambda: few)


def learned(result: dict[str, Any], run: int = 0) -> list[tuple[float, float]]:
    """Return loss and accuracy of every epoch: what must not depend on anything but the seed."""
    return [(e["train_loss"], e["test_accuracy_percent"]) for e in result["runs"][run]["epochs"]]


def weights(path: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load(path)["model"]


def test_results_are_returned_and_written(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    result = cifar10.main([*EAGER, "--json", str(path)])
    assert json.loads(path.read_text(encoding="utf-8")) == result
    assert result["arguments"]["model"] == "resnet8"
    assert result["environment"]["threads"] == 1
    assert result["reports"] == []
    [run] = result["runs"]
    assert [epoch["steps"] for epoch in run["epochs"]] == [4, 4, 4]
    assert run["steps"] == 12
    assert run["train_s"] > 0
    assert 0 <= run["test_accuracy_percent"] <= 100
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_an_interrupted_run_leaves_the_epochs_it_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, step = tmp_path / "results.json", training.Trainer.train_step

    def interrupted(trainer: training.Trainer) -> None:
        if trainer.step == 6:
            raise KeyboardInterrupt
        step(trainer)

    monkeypatch.setattr(training.Trainer, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cifar10.main([*EAGER, "--json", str(path)])
    [run] = json.loads(path.read_text(encoding="utf-8"))["runs"]
    assert [epoch["steps"] for epoch in run["epochs"]] == [4]


@pytest.mark.parametrize("options", [[], ["--dtype", "bf16", "--channels-last"]])
def test_same_seed_same_bits(tmp_path: Path, options: list[str]) -> None:
    runs = []
    for name in "ab":
        argv = [*EAGER, *options, "--epochs", "1", "--checkpoint", str(tmp_path / name)]
        runs.append((learned(cifar10.main(argv)), weights(tmp_path / name)))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(value, runs[1][1][name]) for name, value in runs[0][1].items())


def test_the_seed_matters() -> None:
    first, second = (cifar10.main([*EAGER, "--epochs", "1", "--seed", s]) for s in ("1", "2"))
    assert learned(first) != learned(second)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("stop", [4, 6])
def test_resumed_run_equals_uninterrupted_one(tmp_path: Path, stop: int, optimizer: str) -> None:
    argv = [*EAGER, "--optimizer", optimizer, "--epochs", "2"]
    whole, part = tmp_path / "whole", tmp_path / "part"
    expected = cifar10.main([*argv, "--checkpoint", str(whole)])
    cifar10.main([*argv, "--max-steps", str(stop), "--checkpoint", str(part)])
    # Whatever the process drew before must not matter.
    torch.rand(7)
    resumed = cifar10.main([*argv, "--resume", str(part), "--checkpoint", str(part)])
    assert learned(resumed) == learned(expected)
    assert all(torch.equal(value, weights(part)[name]) for name, value in weights(whole).items())


def test_a_step_limit_reports_the_epoch_so_far() -> None:
    [run] = cifar10.main([*EAGER, "--max-steps", "6"])["runs"]
    assert [epoch["steps"] for epoch in run["epochs"]] == [4, 2]


def test_resuming_needs_a_checkpoint_of_the_same_run(tmp_path: Path) -> None:
    path = tmp_path / "state"
    argv = [*EAGER, "--epochs", "1"]
    cifar10.main([*argv, "--checkpoint", str(path)])
    resume = ["--resume", str(path)]
    with pytest.raises(ConfigError, match="its task is resnet8 on 64 images of digits, that of"):
        cifar10.main([*argv, *resume, "--model", "resnet14"])
    with pytest.raises(ConfigError, match="its optimizer is sgd, that of this run is adam"):
        cifar10.main([*argv, *resume, "--optimizer", "adam"])
    with pytest.raises(ConfigError, match="no such file"):
        cifar10.main([*argv, "--resume", str(tmp_path / "absent")])
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ConfigError, match="damaged or not a checkpoint"):
        cifar10.main([*argv, *resume])
    torch.save({"weights": torch.zeros(3)}, path)
    with pytest.raises(ConfigError, match="not a checkpoint of format 1"):
        cifar10.main([*argv, *resume])


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "results.json"
    path.write_text("old", encoding="utf-8")
    with pytest.raises(ValueError, match="not JSON compliant"):
        checkpoint.write_json(path, {"loss": math.nan})

    def full(descriptor: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        checkpoint.write_json(path, {"loss": 1.0})
    assert path.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--backend", "eager", "--method", "zero"], "--method means nothing to --backend eager"),
        (["--backend", "inductor", "--report"], "--report means nothing to --backend inductor"),
        (["--method", "zero", "--methods-json", "{}"], "--method and --methods-json"),
        (["--methods-json", "{"], "is not JSON .* give a mapping"),
        (["--budget", "low"], "--budget 'low': give auto or a number"),
        (["--compare", "--backend", "inductor"], "--compare sets another backend"),
        (["--compare", "--resume", "x"], "--compare trains two runs"),
        (["--json", "absent/results.json"], "there is no folder .*absent"),
        (["--checkpoint", "."], "cannot write .*: it is a folder"),
        (["--threads", "0"], "--threads 0: give a number of at least 1"),
        (["--epochs", "0"], "epochs is 0: give a number of at least 1"),
        (["--max-steps", "-1"], "max_steps is -1"),
        (["--lr", "nan"], "lr is nan: give a positive number"),
        (["--seed", "-1"], "seed is -1: give a number from 0"),
        (["--device", "abacus"], "there is no device 'abacus': legal are cpu, cuda"),
        (["--device", "meta"], "cannot train on 'meta': legal are cpu, cuda"),
        (["--device", "cuda:99"], "there is no device 'cuda:99': torch sees .* on this machine"),
        (["--backend", "eager", "--strict"], "--strict means nothing to --backend eager"),
        (["--model", "lenet"], "unknown model 'lenet'"),
        (["--data", "absent"], "cannot read CIFAR-10 from absent: no such folder"),
        (["--batch-size", "300"], "batch size 300 does not suit 128 training images"),
    ],
)
def test_mistakes_are_refused_before_training(argv: Sequence[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cifar10.main(["--limit-train", "128", *argv])


def test_a_mistake_ends_the_script_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert program.exit_code(lambda: cifar10.main(["--model", "lenet"])) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: unknown model 'lenet'")
    assert len(printed.err.splitlines()) == 1


def test_interruption_is_not_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    assert program.exit_code(interrupted) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_methods_leave_the_first_convolution_and_the_classifier_exact() -> None:
    methods = arguments.methods_for(models.build("resnet8"), "topk")
    assert list(methods) == [
        *(f"layer{stage}.0.conv{conv}" for stage in (1, 2, 3) for conv in (1, 2))
    ]
    assert set(methods.values()) == {"topk"}


@pytest.mark.parametrize("schedule", ["linear", "cosine", "exponential"])
def test_learning_rate_rises_then_falls(schedule: str) -> None:
    settings = Settings(lr_schedule=schedule)
    factors = [settings.lr_factor(step, 100) for step in range(100)]
    peak = factors.index(max(factors))
    assert 3 <= peak <= 5
    assert factors[0] == pytest.approx(0.2)
    assert factors[: peak + 1] == sorted(factors[: peak + 1])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)
    assert 0 < factors[-1] < 0.02


def test_learning_rate_of_other_lengths() -> None:
    assert [Settings(lr_schedule="constant").lr_factor(step, 5) for step in range(5)] == [1.0] * 5
    assert Settings().lr_factor(0, 1) == 1.0
    assert Settings().lr_factor(9, 3) == 0.0


def test_compiling_steps_count_as_compilation() -> None:
    times = [StepTime(9.0, True), StepTime(1.0, False), StepTime(5.0, True), StepTime(3.0, False)]
    statistics = step_statistics(times)
    assert statistics == {
        "steps": 4,
        "train_s": 8.0,
        "compile_s": 10.0,
        "median_step_s": 2.0,
        "mean_step_s": 2.0,
    }
    assert step_statistics(times[:1])["median_step_s"] is None
    assert step_statistics([])["train_s"] == 0


def test_speedup_is_the_median_over_turns_without_compilation() -> None:
    first = [StepTime(9.0, True)]
    other = first + [StepTime(1.0, False)] * 12
    exact = first + [StepTime(s, False) for s in (1.0,) * 4 + (2.0,) * 4 + (3.0,) * 4]
    expected = {"turns": 3, "speedup": 2.0, "speedup_low": 1.5, "speedup_high": 2.5}
    assert compare.speedup(exact, other) == expected
    # The third turn is cut short, and the second one compiled.
    other[6] = StepTime(1.0, True)
    expected = {"turns": 1, "speedup": 1.0, "speedup_low": 1.0, "speedup_high": 1.0}
    assert compare.speedup(exact, other[:-1]) == expected
    assert compare.speedup(exact[:4], other) == {"turns": 0}


def test_turns_change_nothing_that_is_learned() -> None:
    fresh_task = cifar10.prepare(cifar10.parser().parse_args(EAGER))
    trainers = []
    for _ in range(2):
        torch.manual_seed(0)
        settings = Settings(epochs=2, batch_size=16, backend="eager")
        trainers.append(program.Trainer(fresh_task(settings), settings))
    with arguments.threads(1):
        compare.fit_in_turns(*trainers, Console(file=StringIO()))
    expected = learned(cifar10.main([*EAGER, "--epochs", "2"]))
    for trainer in trainers:
        assert [(e.train_loss, e.score) for e in trainer.history] == expected


def test_unknown_methods_are_refused_in_one_line() -> None:
    with pytest.raises(ConfigError, match="unknown method 'none'") as refusal:
        cifar10.main([*TINY, "--model", "cnn2", "--method", "none"])
    assert len(str(refusal.value).splitlines()) == 1


@pytest.mark.usefixtures("interpreted")
def test_approximate_run_reports_what_it_did(capsys: pytest.CaptureFixture[str]) -> None:
    result = cifar10.main([*ZERO, "--report"])
    [run], [report] = result["runs"], result["reports"]
    assert run["options"]["methods"] == {"conv2": "zero"}
    assert run["options"]["total_steps"] == 12
    approximated = [row for row in report["rows"] if row["method"] != "exact"]
    assert [(row["where"], row["gradient"]) for row in approximated] == [("conv2", "weight")]
    assert "ga-cnn2" in capsys.readouterr().out
    assert run["compile_s"] > 0


@pytest.mark.usefixtures("interpreted")
def test_approximate_run_resumes_exactly(tmp_path: Path) -> None:
    whole, part = tmp_path / "whole", tmp_path / "part"
    expected = cifar10.main([*ZERO, "--checkpoint", str(whole)])
    # An odd number of steps: resumed in the other phase of the schedule, it would differ.
    cifar10.main([*ZERO, "--max-steps", "7", "--checkpoint", str(part)])
    resumed = cifar10.main([*ZERO, "--resume", str(part), "--checkpoint", str(part)])
    assert learned(resumed) == learned(expected)
    assert all(torch.equal(value, weights(part)[name]) for name, value in weights(whole).items())


@pytest.mark.usefixtures("interpreted")
def test_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "results.json"
    result = cifar10.main([*ZERO, "--compare", "--json", str(path)])
    assert json.loads(path.read_text(encoding="utf-8")) == result
    assert [run["backend"] for run in result["runs"]] == ["inductor", "approx"]
    # Exact training is the same alone, and approximate training is something else.
    assert learned(result) == learned(
        cifar10.main([*TINY, "--model", "cnn2", "--backend", "inductor"])
    )
    assert learned(result, run=1) != learned(result)
    assert result["comparison"]["turns"] >= 1
    output = capsys.readouterr().out
    assert "median step" in output
    assert "conv2" in output
