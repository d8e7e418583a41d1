"""The prior adds up to what was measured, on a network like the one it was measured on."""

import json
from pathlib import Path

import pytest

from graphpass import Options
from graphpass.planner import make_plan
from graphpass.prediction import Prediction
from tests.graphpass.planning import Prices, chain, conv_layer

ROOT = Path(__file__).parents[2]
# As many layers with a weight as ResNet-20 has; the first is left out, as it was there.
NETWORK = chain([conv_layer(number) for number in range(1, 21)])
LAYERS = "conv[!1]", "conv1?", "conv20"


def prediction(*records: dict[str, object]) -> Prediction:
    options = Options(methods={layer: list(records) for layer in LAYERS})
    found = make_plan(NETWORK, options, 0, None, None, Prices()).prediction
    assert found is not None
    return found


def both(name: str) -> tuple[dict[str, object], ...]:
    return ({"name": name, "gradient": "weight"}, {"name": name, "gradient": "input"})


@pytest.mark.parametrize(
    ("plan", "records"),
    [
        ("int8", both("int8")),
        ("prune", both("prune")),
        ("int8, forward too", (*both("int8"), {"name": "int8", "gradient": "forward"})),
        ("bf16", (*both("bf16"), {"name": "bf16", "gradient": "forward"})),
    ],
)
def test_plans_of_all_layers_add_what_they_were_measured_to(
    plan: str, records: tuple[dict[str, object], ...]
) -> None:
    path = ROOT / "benchmarks" / "results" / "noise.json"
    measured = json.loads(path.read_text())["plans"][plan]
    found = prediction(*records)
    assert found.tau == pytest.approx(measured["tau"], rel=0.1, abs=1e-4)
    assert found.bias == pytest.approx(measured["bias"], rel=0.1, abs=4e-4)
    assert {site.noise_source for site in found.sites.values()} == {"", "prior"}


def test_a_layer_of_zeros_is_lost() -> None:
    found = prediction({"name": "zero", "gradient": "weight"})
    assert found.bias == pytest.approx(19 / 20) and found.tau == 0


def test_an_input_gradient_costs_more_the_more_layers_it_reaches() -> None:
    sites = prediction(*both("int8")).sites
    taus = [sites[f"conv{number}:input"].tau or 0.0 for number in (2, 10, 20)]
    assert 0 < taus[0] < taus[1] < taus[2]
    weights = {sites[f"conv{number}:weight"].tau for number in (2, 10, 20)}
    assert len(weights) == 1
