"""Plans that are measured and changed while a compiled model trains."""

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import graphpass
from graphpass import ConfigError, controller, measuring, pricing, steering
from graphpass.capture import Analysis
from graphpass.pricing import Price
from graphpass.site import Site
from graphpass.variants import Dispatcher

pytestmark = pytest.mark.usefixtures("interpreted")

WIDTH, BATCH, EVERY, WINDOW = 16, 64, 12, 4


class Cheap:
    """Prices at which every approximation takes half of the time."""

    def exact(self, site: Site) -> Price:
        del site
        return Price(1.0, {}, "calibrated")

    def approximate(self, site: Site, method: Any, params: Any) -> Price:
        del site, method, params
        return Price(0.5, {}, "calibrated")

    def rest(self) -> Price:
        return Price(1.0, {}, "calibrated")


def cheap(analysis: Analysis, threads: int) -> Cheap:
    del analysis, threads
    return Cheap()


@pytest.fixture(autouse=True)
def _cheap_and_short(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(pricing, "of", cheap)
    monkeypatch.setattr(controller, "_WINDOW", WINDOW)
    monkeypatch.setattr(steering, "_FIRST_STEP", 10)
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield


class Net(nn.Module):
    """Two layers, the same in every instance."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(torch.tanh(self.body(x)))
        return y


class Training:
    """A run: model, optimizer, and its steps."""

    def __init__(self, **options: Any) -> None:
        self.model = Net()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)
        wanted: dict[str, Any] = {
            "budget": 1.0,
            "methods": ["int8"],
            "probe_every": EVERY,
            "strict": True,
        }
        self.call = torch.compile(self.model, backend="approx", options=wanted | options)
        self.session = graphpass.session(self.model)

    def run(self, steps: range) -> None:
        for step in steps:
            x = torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(step))
            self.optimizer.zero_grad()
            (self.call(x) - x.roll(1, 1)).square().sum().backward()
            self.optimizer.step()

    def state(self) -> dict[str, Any]:
        return {
            "model": copy.deepcopy(self.model.state_dict()),
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
            "session": json.loads(json.dumps(self.session.state_dict())),
        }

    def load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.session.load_state_dict(state["session"])


def test_a_run_is_measured_and_goes_on_bit_for_bit() -> None:
    whole = Training()
    whole.run(range(3))
    assert whole.session.noise is None
    early = whole.state()
    whole.run(range(3, 2 * EVERY + 10))
    noise = whole.session.noise
    assert noise is not None and 0 < noise.tau < 1
    assert noise.table.source == "measured" and set(noise.table.variance) >= {"head:weight"}
    assert noise.tau == pytest.approx(noise.predicted.tau, rel=1.0)
    assert {d.method for d in whole.session.plan.approximated} == {"int8"}
    assert counters["stats"]["unique_graphs"] >= 1
    resumed = Training()
    resumed.load(early)
    resumed.run(range(3, 2 * EVERY + 10))
    pairs = zip(whole.model.parameters(), resumed.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert resumed.session.noise == noise
    # The plan is changed by a new budget, without another measurement.
    whole.session.set_budget(1e-9)
    whole.run(range(100, 102))
    assert whole.session.plan.approximated == ()
    with pytest.raises(ConfigError, match="budget=-1"):
        whole.session.set_budget(-1)


def test_no_ordinary_step_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers are read on the host where a round ends, and nowhere else."""
    reads: list[int] = []
    run = Training()
    original = measuring.Round.read

    def reading(self: Any) -> Any:
        reads.append(run.session.step)
        return original(self)

    monkeypatch.setattr(measuring.Round, "read", reading)
    originals = {
        name: getattr(Tensor, name) for name in ("item", "tolist", "__bool__", "__float__")
    }
    waits: list[int] = []
    called = Dispatcher.__call__

    def dispatch(self: Dispatcher, *args: Any) -> Any:
        known, waited = len(self.variants.compiled), len(waits)
        for name, function in originals.items():

            def waiting(tensor: Tensor, function: Any = function) -> Any:
                waits.append(run.session.step)
                return function(tensor)

            monkeypatch.setattr(Tensor, name, waiting)
        try:
            return called(self, *args)
        finally:
            for name, function in originals.items():
                monkeypatch.setattr(Tensor, name, function)
            if len(self.variants.compiled) > known:
                # Compilers read what they like.
                del waits[waited:]

    run.run(range(2))
    monkeypatch.setattr(Dispatcher, "__call__", dispatch)
    run.run(range(2, 2 * EVERY))
    assert reads and set(waits) <= set(reads)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"methods": {"*": "int8"}}, "the plan was given"),
        ({"budget": 0}, "the budget is 0"),
        ({"methods": ["zero"]}, "saves"),
    ],
    ids=["forced", "zero", "nothing"],
)
def test_why_nothing_is_measured(options: dict[str, Any], reason: str) -> None:
    run = Training(**options)
    run.run(range(2))
    assert run.session.noise is None
    assert any(reason in note for note in run.session.notes)
    with pytest.raises(ConfigError, match="no plan of this model is made by the planner"):
        run.session.set_budget(0.1)


def test_a_plan_with_forward_products_is_measured_without_them() -> None:
    products = ["weight", "input", "forward"]
    run = Training(methods=["bf16"], gradients=products, max_bias=0.1)
    run.run(range(2 * EVERY + 10))
    assert run.session.noise is not None and run.session.noise.table.source == "measured"
    measured = {site.partition(":")[2] for site, _, _ in run.session.noise.table.entries}
    assert measured == {"weight", "input"}
    planned = {d.site.partition(":")[2] for d in run.session.plan.approximated}
    assert "forward" in planned


def test_nothing_is_measured_where_sizes_are_dynamic() -> None:
    model = Net()
    options: dict[str, Any] = {"budget": 1.0, "methods": ["int8"]}
    call = torch.compile(model, backend="approx", options=options, dynamic=True)
    call(torch.randn(BATCH, WIDTH)).sum().backward()
    assert any("sizes are dynamic" in note for note in graphpass.session(model).notes)


def test_a_budget_falls_with_the_learning_rate() -> None:
    run = Training(decay_budget=True)
    run.session.follow(run.optimizer)
    assert run.session.decay(wanted=True) == 1
    run.optimizer.param_groups[0]["lr"] /= 4
    assert run.session.decay(wanted=True) == pytest.approx(0.25)
    assert run.session.decay(wanted=False) == 1


def test_states_of_earlier_versions_still_load() -> None:
    session = graphpass.session(Net())
    session.load_state_dict({"version": 1, "step": 7, "counts_forwards": True, "calls": []})
    assert session.step == 7
