"""Which weight gradients an input gradient's error reaches, against a second way of finding out.

The second way is to spoil an input gradient of the exact step, and to see what changes.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphpass
from examples import models
from graphpass import memory
from graphpass.capture import Analysis
from graphpass.dependence import reached
from tests.graphpass.nets import NETS

pytestmark = pytest.mark.usefixtures("interpreted")


@pytest.fixture(name="folder", autouse=True)
def _folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Remember what was found in a folder of the test alone."""
    monkeypatch.setenv("GRAPHPASS_CACHE_DIR", str(tmp_path))
    return tmp_path / "graphs"


def analysis_of(folder: Path, model: nn.Module, *inputs: Tensor) -> Analysis:
    """Return what planning writes down; nothing is compiled for it."""
    before = set(folder.glob("*.json"))
    graphpass.plan(model, *inputs, budget=0)
    (path,) = set(folder.glob("*.json")) - before
    found = memory.load(path.stem)
    assert found is not None
    return found


def names(analysis: Analysis) -> dict[str, set[str]]:
    """Return the ids of the weight gradients that each backward site reaches."""
    sites = analysis.sites
    return {
        sites[number].id: {sites[i].id for i in found}
        for number, found in reached(analysis.flow, sites).items()
        if sites[number].gradient != "forward"
    }


def test_a_chain_reaches_the_layers_before(folder: Path) -> None:
    net = NETS["mlp"]
    found = names(analysis_of(folder, net.build(), *net.batch(4)))
    assert found["4:input"] == {"0:weight", "2:weight"}
    assert found["2:input"] == {"0:weight"}
    assert found["4:weight"] == set()


@pytest.mark.parametrize("name", ["separable", "transformer"])
def test_errors_reach_what_spoiling_an_input_gradient_changes(folder: Path, name: str) -> None:
    net = NETS[name]
    model, batch = net.build(), net.batch(4)
    analysis = analysis_of(folder, model, *batch)
    found = names(analysis)
    exact = gradients(model, batch, {})
    modules = {path for path, _ in model.named_modules()}
    inputs = [s for s in analysis.sites if s.gradient == "input" and s.reason is None]
    paths = {s.path for s in inputs if "#" not in s.name and s.path in modules and s.path}
    assert len(paths) > 2
    for path in sorted(paths)[1:2]:
        torch._dynamo.reset()
        spoilt = gradients(model, batch, {path: {"name": "zero", "gradient": "input"}})
        changed = {owner for owner in spoilt if not torch.equal(spoilt[owner], exact[owner])}
        site = next(s for s in inputs if s.path == path)
        # Parameters of norms change too; nothing that no product reads is a site.
        weights = {i.rsplit(":", 1)[0].partition("#")[0] for i in found[site.id]}
        assert weights == {owner for owner in changed if owner in weights_of(analysis)}


def weights_of(analysis: Analysis) -> set[str]:
    return {site.path for site in analysis.sites if site.gradient == "weight"}


def gradients(model: nn.Module, batch: Any, methods: Any) -> dict[str, Tensor]:
    """Return the gradient of every layer's weight, by the layer's path."""
    torch.manual_seed(0)
    model.zero_grad()
    options = {"strict": True, "methods": methods} if methods else {"budget": 0}
    output = torch.compile(model, backend="approx", options=options)(*batch)
    output.square().sum().backward()
    return {
        path.rpartition(".")[0]: parameter.grad.clone()
        for path, parameter in model.named_parameters()
        if path.endswith("weight") and parameter.grad is not None
    }


def test_shortcuts_cost_a_few_edges_a_layer(folder: Path) -> None:
    small, large = (
        analysis_of(folder, models.resnet(depth, width=4, image_size=8), torch.randn(4, 3, 8, 8))
        for depth in (8, 14)
    )
    assert len(large.flow) / len(large.sites) < 1.3 * len(small.flow) / len(small.sites) < 4


def test_what_leaves_a_graph_is_not_taken_for_harmless(folder: Path) -> None:
    net = NETS["graph_break"]
    graphpass.plan(net.build(), *net.batch(4), budget=0)
    found = {}
    for path in folder.glob("*.json"):
        analysis = memory.load(path.stem)
        assert analysis is not None
        found.update(names(analysis))
    # What enters these graphs comes from the one before: its gradient goes back there.
    assert found["blocks.broken.after:input"] >= {"blocks.broken.after:weight"}
    assert found["blocks.broken.before:input"] == {"blocks.broken.before:weight"}


def test_files_of_another_format_are_not_read(folder: Path) -> None:
    net = NETS["separable"]
    assert analysis_of(folder, net.build(), *net.batch(4)).flow
    (path,) = folder.glob("*.json")
    path.write_text(path.read_text().replace(f'"version": {memory._VERSION}', '"version": 1'))
    assert memory.load(path.stem) is None
