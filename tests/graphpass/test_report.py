"""Reports and plans made without training: what they say, and the forms they come in."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import graphpass
from graphpass import ConfigError, Plan, Report
from graphpass.errors import Reason
from graphpass.outlook import Measured, frontier_svg

# What is tested here are graphs, not the loops that Inductor writes for them.
pytestmark = pytest.mark.usefixtures("interpreted")


class Small(nn.Module):
    """Two convolutions and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 8, 3, padding=1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.conv1(x)))
        return self.fc(self.conv2(x).mean((2, 3)))


class Broken(nn.Module):
    """Two linear layers with a graph break between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.second = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        torch._dynamo.graph_break()
        return self.second(x)


@pytest.fixture
def report() -> Report:
    options = {"methods": {"conv2": "topk", "fc": "zero"}, "schedule": "ga-2", "strict": True}
    compiled = torch.compile(Small(), backend="approx", options=options)
    for _ in range(2):
        compiled(torch.randn(6, 3, 8, 8)).sum().backward()
    return graphpass.reports()[-1]


def test_rows_say_method_or_reason(report: Report) -> None:
    rows = {(row.where, row.gradient): row for row in report.rows}
    assert rows["conv2", "weight"].method == "topk"
    assert rows["conv2", "weight"].params["k"] == 1
    assert rows["conv2", "weight"].planned_flops < rows["conv2", "weight"].exact_flops
    assert "never selects this layer: layer 3" in rows["fc", "weight"].reason
    assert rows["conv1", "weight"].reason == "not named by `methods`"
    assert rows["conv1", "forward"].reason == Reason.FORWARD.value
    assert all((row.method == "exact") == bool(row.reason) for row in report.rows)


def test_text_has_table_totals_and_the_schedule_as_a_figure(report: Report) -> None:
    text = str(report)
    assert "topk(k=1" in text
    assert f"{report.exact_saved_bytes / 1e6:.2f} MB exact" in text
    assert "compiled variants: 2" in text
    assert text.splitlines()[-1].split() == ["conv2", ".#" * 12]


def test_predictions_have_columns_of_their_own(report: Report) -> None:
    assert report.prediction is not None
    row = next(row for row in report.rows if (row.where, row.gradient) == ("conv2", "weight"))
    assert row.prediction == report.prediction.sites["conv2:weight"]
    assert row.prediction is not None and row.prediction.approximated
    # Nothing is known of the noise of topk before it is measured, and nothing is made up.
    assert row.prediction.tau is None and report.prediction.inflation is None
    text = str(report)
    assert "us exact, predicted" in text and "us exact, measured" not in text
    assert "step, measured: not yet exact" in text and "tau not known" in text
    ceiling = report.prediction.ceiling_s
    assert 0 < ceiling < report.prediction.exact_step_s - row.prediction.exact_s + 1e-9
    measured = replace(report, measured=Measured(0.012, 0.010, 0.05, 0.0))
    assert "step, measured: 12.000 ms exact, 10.000 ms planned" in str(measured)
    assert "noise of the plan, measured: tau 0.05, bias 0" in str(measured)
    assert Report.from_json(measured.to_json()) == measured


def test_the_frontier_is_drawn(tmp_path: Path) -> None:
    x = torch.empty(64, 3, 32, 32)
    wide = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3))
    plan = graphpass.plan(wide, x, budget=0.5)
    assert plan.prediction is not None and len(plan.prediction.frontier) > 2
    assert plan.prediction.tau is not None and 0 < plan.prediction.tau <= 0.5
    lines = [line for line in str(plan).splitlines() if line.startswith("  tau ")]
    points = plan.prediction.frontier
    assert len(points) <= len(lines) <= len(points) + 1
    assert sum(line.endswith("<- this plan") for line in lines) == 1
    bars = [line.count("#") for line in lines]
    assert bars == sorted(bars, reverse=True) and bars[0] > bars[-1]
    svg = frontier_svg(plan.prediction)
    assert svg.count("<circle") == len(points) + 1 and svg.endswith("</svg>")
    plan.to_html(tmp_path / "plan.html")
    page = (tmp_path / "plan.html").read_text()
    assert svg in page and page.count('class="approximated"') == len(plan.approximated)
    assert all(decision.site in page for decision in plan.decisions)


def test_json_round_trip(report: Report) -> None:
    assert Report.from_json(report.to_json()) == report
    assert json.loads(report.to_json())["schedule"] == "ga-2"


def test_html_tells_what_is_predicted(tmp_path: Path) -> None:
    compiled = torch.compile(Small(), backend="approx", options={"strict": True})
    compiled(torch.randn(6, 3, 8, 8)).sum().backward()
    report = graphpass.reports()[-1]
    report.to_html(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "What is predicted" in page and "step, predicted: " in page
    assert "bf16: biased, and `max_bias` is 0" in page
    # Here nothing pays, and the report says so of every gradient.
    gradients = [row for row in report.rows if row.gradient != "forward"]
    assert gradients and all(row.reason.startswith("planner: ") for row in gradients)
    assert report.variants == 1 and not report.approximated


def test_html_is_one_whole_page(report: Report, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    report.to_html(path)
    page = path.read_text()
    products, _, predicted = page.partition('<table class="predicted">')
    assert products.count("<tr") == 1 + len(report.rows)
    assert predicted.count("<tr") == 1 + len(report.approximated)
    assert page.count('class="approximated"') == len(report.approximated)
    assert "conv2" in page
    assert "</html>" in page
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]


def test_dot_names_every_product(report: Report) -> None:
    dot = report.to_dot()
    assert dot.count("[label=") == len(report.rows)
    assert dot.count("lightblue") == len(report.approximated)
    assert '"conv1:forward" -> "conv2:forward"' in dot
    assert '"fc:input" -> "conv2:input"' in dot
    assert dot.count("{") == dot.count("}")


def test_plan_without_training_changes_nothing() -> None:
    model = Small().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(6, 3, 8, 8)
    state = torch.get_rng_state()
    plan = graphpass.plan(model, x, methods={"conv*": "zero"})
    assert torch.equal(state, torch.get_rng_state())
    assert [d.site for d in plan.approximated] == ["conv2:weight", "conv1:weight"]
    assert not model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.conv1.weight.grad is None


def test_plan_is_the_one_that_training_follows() -> None:
    model, x = Small(), torch.randn(6, 3, 8, 8)
    options = {"methods": {"conv2": "topk", "fc": "zero"}, "schedule": "ga-2"}
    plan = graphpass.plan(model, x, **options)
    compiled = torch.compile(model, backend="approx", options={**options, "strict": True})
    compiled(x).sum().backward()
    assert graphpass.session(compiled).plan == plan


def test_plan_covers_every_graph_of_a_model() -> None:
    plan = graphpass.plan(Broken(), torch.randn(3, 4), methods={"second": "zero"})
    assert [(d.site, d.layer) for d in plan.approximated] == [("second:weight", 2)]
    assert {d.site for d in plan.decisions} >= {"first:weight", "first:forward"}
    # So does its prediction, with noise relative to that of all graphs: one of two layers is lost.
    assert plan.prediction is not None
    assert set(plan.prediction.sites) == {d.site for d in plan.decisions}
    assert plan.prediction.bias == pytest.approx(1 / 2)


def test_plan_takes_a_loss_and_fake_inputs() -> None:
    mode = torch._subclasses.FakeTensorMode()
    with mode:
        x = torch.empty(6, 3, 8, 8)
    plan = graphpass.plan(Small(), x, loss=torch.sum, methods={"conv*": "zero"})
    assert len(plan.approximated) == 2


def test_plan_of_a_model_that_trains_nothing() -> None:
    with pytest.raises(ConfigError, match="no convolution or matrix product"):
        graphpass.plan(Small().requires_grad_(False), torch.randn(6, 3, 8, 8))


def test_plan_of_something_else() -> None:
    with pytest.raises(ConfigError, match="give the model itself"):
        graphpass.plan(torch.compile(Small()), torch.randn(6, 3, 8, 8))


def test_plan_file_is_used(tmp_path: Path) -> None:
    model, x = Small(), torch.randn(6, 3, 8, 8)
    path = tmp_path / "plan.json"
    graphpass.plan(model, x, methods={"conv2": "zero"}).save(path)
    assert Plan.load(path).approximated[0].site == "conv2:weight"
    compiled = torch.compile(model, backend="approx", options={"plan": str(path), "strict": True})
    compiled(x).sum().backward()
    assert model.conv2.weight.grad is not None
    assert model.conv2.weight.grad.abs().max() == 0
    assert model.fc.weight.grad is not None
    assert model.fc.weight.grad.abs().max() > 0
