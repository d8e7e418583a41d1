"""What trainings under plans are worth, by the law and by what exact trainings reach."""

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks import noise_law_table, timing


def test_without_noise_an_epoch_is_worth_an_epoch() -> None:
    moments = [{"epoch": 1, "variance": 4.0, "square": 1.0, "tau": {"plan": 0.0}}]
    assert noise_law_table.worth(moments, "plan", 10) == pytest.approx(10)


def test_worth_follows_noise_along_the_training() -> None:
    # tau r / (1 + r) is 1 up to the middle, and rises to 3 at the end: 1/2 falls to 1/4.
    moments = [
        {"epoch": 5, "variance": 1.0, "square": 1.0, "tau": {"plan": 2.0}},
        {"epoch": 10, "variance": 3.0, "square": 1.0, "tau": {"plan": 4.0}},
    ]
    expected = 5 * 0.5 + 5 * (0.5 + 0.25) / 2
    assert noise_law_table.worth(moments, "plan", 10) == pytest.approx(expected, rel=1e-3)


def test_a_gradient_lost_in_noise_counts_all_of_tau() -> None:
    moments = [{"epoch": 1, "variance": 1.0, "square": -0.1, "tau": {"plan": 1.0}}]
    assert noise_law_table.worth(moments, "plan", 10) == pytest.approx(5)


@pytest.mark.parametrize("sign", [1, -1], ids=["accuracy", "loss"])
def test_length_is_read_off_exact_trainings(sign: int) -> None:
    exact = {2.0: [sign * 10.0, sign * 12.0], 4.0: [sign * 21.0], 8.0: [sign * 31.0]}
    assert noise_law_table.length_of(sign * 21.0, exact) == pytest.approx(4)
    # Half of the way in log epochs.
    assert noise_law_table.length_of(sign * 26.0, exact) == pytest.approx(32**0.5)
    assert noise_law_table.length_of(sign * 40.0, exact) == pytest.approx(8)
    for length in (2.0, 3.0, 7.0):
        value = noise_law_table.value_at(length, exact)
        assert noise_law_table.length_of(value, exact) == pytest.approx(length)


def test_the_table_and_the_plot_of_a_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(accuracy: float, **more: Any) -> dict[str, Any]:
        epoch = {"test_accuracy_percent": accuracy, "train_loss": 1 - accuracy / 100}
        return {"finished": True, "epochs": [epoch], **more}

    moment = {"epoch": 1, "variance": 1.0, "square": 1.0, "tau": {"tau 1": 1.0}}
    runs = {
        "moments": run(80.0, moments=[moment]),
        **{f"exact, {n} epochs/{s}": run(70.0 + 2 * n + s) for n in (2, 4, 6) for s in (0, 1)},
        "tau 1/0": run(78.5),
        "tau 1/1": {"finished": False, "epochs": []},
    }
    plans = {"tau 1": {"methods": {}, "predicted_tau": 0.9, "speedup": {"median": 1.5}}}
    (tmp_path / "noise_law.json").write_text(json.dumps({"epochs": 6, "runs": runs}))
    (tmp_path / "noise_law_plans.json").write_text(json.dumps({"plans": plans}))
    for module in (timing, noise_law_table):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    monkeypatch.setattr(noise_law_table, "Console", lambda: Console(width=200))
    noise_law_table.main([])
    printed = capsys.readouterr().out
    # 6 epochs at an inflation of 1.5; 78.5 is what 4 exact epochs reach, as in the same time.
    assert "4.0" in printed and "78.50 ± 0.00" in printed and "1.50" in printed
    assert (tmp_path / "noise_law.svg").read_text().count("<circle") == 2
