"""Training under a plan that nobody named: what `torch.compile(model, backend="approx")` does."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphpass
from graphpass import ConfigError, Speedup, steering
from graphpass.rewrite import Replacement
from graphpass.site import Gradient
from tests.graphpass.planning import Prices

pytestmark = pytest.mark.usefixtures("interpreted")

PATHS = ("0", "2", "4")


def net() -> nn.Module:
    torch.manual_seed(1)
    layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)]
    return nn.Sequential(*layers)


def gradients(**options: Any) -> tuple[dict[str, Tensor], graphpass.Plan]:
    """Return the gradient of every weight in one step, and the plan."""
    torch._dynamo.reset()
    model = net()
    compiled = torch.compile(model, backend="approx", options={"strict": True, **options})
    x = torch.randn(8, 3, 12, 12, generator=torch.Generator().manual_seed(2))
    compiled(x).square().sum().backward()
    weights = {p: model.get_submodule(p).weight for p in PATHS}
    found = {path: weight.grad for path, weight in weights.items()}
    return found, graphpass.session(model).plan  # type: ignore[return-value]


@pytest.fixture(name="paying")
def _paying(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this machine one on which every method pays."""
    monkeypatch.setattr("graphpass.pricing.of", lambda *_: Prices())


@pytest.mark.usefixtures("paying")
def test_a_budget_is_spent_and_zero_is_exact() -> None:
    given = {"methods": ["phase"], "seed": 3}
    exact, nothing = gradients(budget=0, **given)
    assert not nothing.approximated and nothing.prediction is None
    inductor, _ = gradients(budget=0)
    assert all(torch.equal(exact[path], inductor[path]) for path in PATHS)
    # Rows of three layers at 0.12 each, of V in all: two of them fit.
    some, plan = gradients(budget=0.3, **given)
    changed = {path for path in PATHS if not torch.equal(some[path], exact[path])}
    assert changed == {d.site.partition(":")[0] for d in plan.approximated}
    assert 0 < len(changed) < len(PATHS)
    assert plan.prediction is not None and plan.prediction.tau is not None
    assert 0 < plan.prediction.tau <= 0.3
    # As asked of the planner without training, and from a file.
    alone = graphpass.plan(net(), torch.empty(8, 3, 12, 12), budget=0.3, **given)
    assert alone == plan and alone.prediction == plan.prediction
    followed, _ = gradients(plan=graphpass.Plan.from_json(plan.to_json()), seed=3)
    assert all(torch.equal(followed[path], some[path]) for path in PATHS)


def test_forward_products_are_planned_where_that_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("graphpass.pricing.of", lambda *_: Prices({"bf16": 0.5}))
    given = {"budget": 1.0, "methods": ["bf16"], "gradients": ["forward"]}
    exact, plan = gradients(**given)
    assert not plan.approximated
    found, plan = gradients(**given, max_bias=0.01)
    assert [d.site for d in plan.approximated] == [f"{path}:forward" for path in PATHS]
    assert plan.prediction is not None and plan.prediction.bias is not None
    assert 0 < plan.prediction.bias <= 0.01
    for path in PATHS:
        error = (found[path] - exact[path]).norm() / exact[path].norm()
        assert 0 < error < 0.05


def test_probes_look_at_no_forward_product(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at, names_of = list[Replacement](), steering.names_of

    def noting(analysis: Any, candidates: Any, *others: Any) -> Any:
        looked_at.extend(candidates.values())
        return names_of(analysis, candidates, *others)

    monkeypatch.setattr(steering, "names_of", noting)
    monkeypatch.setattr("graphpass.pricing.of", lambda *_: Prices({"bf16": 0.5}))
    products = ["weight", "forward"]
    _, plan = gradients(budget=1.0, methods=["bf16"], gradients=products, max_bias=0.01)
    assert {d.site.partition(":")[2] for d in plan.approximated} == {*products}
    assert {replacement.site.gradient for replacement in looked_at} == {Gradient.WEIGHT}


@pytest.mark.usefixtures("paying")
def test_an_impossible_speedup_reaches_the_user() -> None:
    with pytest.raises(ConfigError, match=r"Speedup\(9\): the best that is possible here"):
        gradients(budget=Speedup(9))


def test_where_nothing_pays_the_default_is_inductors_own_graph() -> None:
    found, plan = gradients()
    assert not plan.approximated
    assert graphpass.reports()[-1].variants == 1
    exact, _ = gradients(budget=0)
    assert all(torch.equal(found[path], exact[path]) for path in PATHS)
