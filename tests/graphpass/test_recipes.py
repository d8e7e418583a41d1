"""A recipe is options that compile; mistakes in its name or parameters are explained."""

from typing import Any

import pytest
import torch
from torch import nn

import graphpass
from graphpass import ConfigError, Options
from graphpass.recipes import RECIPES
from tests.compiling import interpreted


def net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 24, 3), nn.ReLU(), nn.Conv2d(24, 32, 3), nn.ReLU(), nn.Conv2d(32, 24, 3)
    )


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_recipe_plans_what_it_names(name: str) -> None:
    model = net()
    options = graphpass.recipe(name, model)
    assert Options.from_dict(options).to_dict() == options
    plan = graphpass.plan(model, torch.randn(16, 3, 12, 12), **options)
    methods = {entry["name"] for entry in RECIPES[name].methods} - {"$method"} or {"zero"}
    assert {decision.method for decision in plan.approximated} == methods
    # The first layer is exact in every recipe but that of ERK, which gives it what it gives.
    assert all(decision.layer > 1 for decision in plan.approximated)


def test_sampled_channels_are_those_of_the_forward_product() -> None:
    """Backward of the recipe is the gradient of its sampled forward product."""
    torch.manual_seed(0)
    model, x = net().double(), torch.randn(2, 3, 10, 10, dtype=torch.float64)
    with interpreted():
        options = {**graphpass.recipe("crs-topk"), "strict": True}
        torch.compile(model, backend="approx", options=options)(x).square().sum().backward()
    found = model[2].weight.grad
    hidden = torch.relu(model[0](x)).detach()
    norms = [v.square().sum((0, 2, 3)).sqrt() for v in (hidden, model[2].weight)]
    mass = norms[0] * norms[1]
    rest = mass.topk(12, largest=False).indices
    assert not found[:, rest].any()
    assert all(found[:, i].any() for i in range(24) if i not in rest.tolist())


def test_gradients_of_a_linear_layer_are_those_of_its_sampled_forward_product() -> None:
    torch.manual_seed(0)
    nn = torch.nn
    model = nn.Sequential(nn.Linear(9, 48), nn.ReLU(), nn.Linear(48, 32), nn.Tanh()).double()
    x = torch.randn(7, 9, dtype=torch.float64)
    with interpreted():
        options = {**graphpass.recipe("crs-topk"), "strict": True}
        compiled = torch.compile(model, backend="approx", options=options)
        compiled(x).square().sum().backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    hidden, second = model[1](model[0](x)), model[2]
    assert isinstance(second, nn.Linear)
    with torch.no_grad():
        taken = (hidden.norm(dim=0) * second.weight.norm(dim=0)).topk(24).indices
    out = hidden[:, taken] @ second.weight[:, taken].T + second.bias
    out.tanh().square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad)
    rows = {(row.where, row.gradient) for row in graphpass.reports()[-1].approximated}
    assert rows == {("2", "forward"), ("2", "weight"), ("2", "input")}


def test_erk_gives_larger_layers_fewer_weights() -> None:
    model = net()
    options = graphpass.recipe("swat-erk", model, sparsity=0.8)
    sparsity = {layer: entries[0]["sparsity"] for layer, entries in options["methods"].items()}
    sizes = {name: model.get_submodule(name).weight.numel() for name in ("0", "2", "4")}
    assert sparsity["2"] == sparsity["4"] > sparsity.get("0", 0.0)
    kept = sum(size * (1 - sparsity.get(name, 0.0)) for name, size in sizes.items())
    assert kept == pytest.approx(0.2 * sum(sizes.values()), rel=1e-3)


@pytest.mark.parametrize(
    ("name", "given", "text"),
    [
        ("crs_topk", {}, "unknown recipe 'crs_topk': legal are ga-1, .*did you mean 'crs-topk'"),
        ("agp", {"keep": 0.5}, "recipe 'agp' has no parameter 'keep': legal are p"),
        ("crs-topk", {"keep": 2}, "keep=2; give a number"),
        ("swat-erk", {}, "needs the model"),
        ("ga-1", {"method": "nothing"}, "unknown method 'nothing'"),
    ],
)
def test_mistakes_are_explained(name: str, given: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        graphpass.recipe(name, **given)
