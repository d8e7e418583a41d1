"""Groups of plans that were measured side by side, and budgets that were kept."""

from typing import Any

from rich.console import Console

from benchmarks import budget_kept, probe


def _group(moments: dict[str, dict[str, float]], variance: float) -> dict[str, Any]:
    return {
        "moments": {
            moment: {"variance": variance, "plans": plans} for moment, plans in moments.items()
        }
    }


def test_moments_of_groups_become_one() -> None:
    runs = {
        "a": _group({"100": {"int8": 1.0}, "400": {"int8": 2.0}}, 5.0),
        "b": _group({"100": {"prune": 3.0}}, 6.0),
        "failed": {"failed": "no memory"},
    }
    merged = probe._merged(runs)
    assert merged == {
        "100": {"variance": 5.0, "plans": {"int8": 1.0, "prune": 3.0}},
        "400": {"variance": 5.0, "plans": {"int8": 2.0}},
    }


def test_the_table_of_budgets() -> None:
    def moment(tau: float, probed: float | None) -> dict[str, Any]:
        return {"tau": {"in force": tau}, "probed_tau": probed, "approximated": 36}

    epochs = [{"test_accuracy_percent": 70.0}]
    runs = {
        "tau 0.1": {"moments": [moment(0.08, None), moment(0.12, 0.1)], "epochs": epochs},
        "tau 0.3": {"failed": "no memory"},
    }
    console = Console(width=120)
    with console.capture() as capture:
        console.print(budget_kept.table(runs))
    shown = capture.get()
    assert "0.080 0.120" in shown and "1.00" in shown and "36 36" in shown
    assert "tau 0.3" in shown
