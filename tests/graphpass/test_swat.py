"""SWAT over steps: thresholds that are kept, frozen topology, masked gradients, SWAT-M, export."""

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphpass
from codegen import threshold
from graphpass import ConfigError
from graphpass.largest import exchange
from graphpass.method import get_method
from graphpass.site import Gradient, Site
from graphpass.state import SiteState
from tests.graphpass import test_state
from tests.graphpass.test_state import batch

pytestmark = pytest.mark.usefixtures("interpreted")

Call = Callable[[Tensor], Tensor]


class Net(nn.Module):
    """A convolution, a grouped one, and a linear layer; the first convolution stays exact."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 8, 3)
        self.conv = nn.Conv2d(8, 12, 3, 2, 1, groups=2)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(torch.relu(self.first(x))))
        y: Tensor = self.fc(x.mean((2, 3)))
        return y


LAYERS = ("conv", "fc")


def trainer(sparsity: float = 0.7, lr: float = 0.3, **params: Any) -> tuple[Net, Call, Any]:
    """Return a model, compiled with SWAT for all products of two layers, and its optimizer."""
    torch._dynamo.reset()
    model = Net()
    swat = {"name": "swat", "sparsity": sparsity, **params}
    every = [swat | {"gradient": gradient.value} for gradient in Gradient]
    options = {"methods": dict.fromkeys(LAYERS, every), "strict": True}
    call: Call = torch.compile(model, backend="approx", options=options)
    return model, call, torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def step(number: int, model: Net, call: Call, optimizer: Any) -> dict[str, Tensor]:
    """Train a step; return the weights that it used."""
    optimizer.zero_grad()
    before = {name: getattr(model, name).weight.detach().clone() for name in LAYERS}
    call(batch(number)).square().sum().backward()
    optimizer.step()
    return before


def kept(model: nn.Module, product: str) -> dict[str, Tensor]:
    """Return what is kept of a product, such as "conv:forward", by slot."""
    (tensors,) = graphpass.session(model).state_dict()["kept"]
    return {
        key.rsplit(" ", 1)[1]: value
        for key, value in tensors.items()
        if key.startswith(f"{product} ")
    }


def test_a_threshold_is_kept_until_it_is_due() -> None:
    model, call, optimizer = trainer(refresh=3)
    thresholds = []
    for number in range(7):
        used = step(number, model, call, optimizer)
        for name in LAYERS:
            found = {g: float(kept(model, f"{name}:{g}")["threshold"]) for g in Gradient}
            assert found[Gradient.FORWARD] == found[Gradient.INPUT]
            if number % 3 == 0:
                weight = used[name].abs().flatten()
                share = float((weight >= found[Gradient.FORWARD]).sum()) / len(weight)
                assert share == pytest.approx(0.3, abs=1 / len(weight))
            if name == "conv":
                thresholds.append((found[Gradient.FORWARD], found[Gradient.WEIGHT]))
    first, second, last = thresholds[:3], thresholds[3:6], thresholds[6:]
    assert all(len(set(some)) == 1 for some in (first, second))
    assert len({first[0], second[0], last[0]}) == 3
    refreshed = kept(model, "conv:forward")["refreshed"]
    assert int(refreshed) == 6


def test_old_thresholds_are_what_products_are_computed_with() -> None:
    model, call, optimizer = trainer(refresh=100, sparsity=0.5)
    for number in range(4):
        step(number, model, call, optimizer)
    out, wanted = call(batch(9)), copy.deepcopy(model)
    with torch.no_grad():
        for name in LAYERS:
            layer = getattr(wanted, name)
            limit = kept(model, f"{name}:forward")["threshold"]
            now = layer.weight.abs().median()
            assert limit != now
            layer.weight *= layer.weight.abs() >= limit
    assert torch.equal(out, wanted(batch(9)))


def test_no_new_variant_is_compiled() -> None:
    model, call, optimizer = trainer(refresh=2, freeze_after=3, distribution="momentum")
    torch._dynamo.utils.counters.clear()
    for number in range(6):
        step(number, model, call, optimizer)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert len(graphpass.reports()) > 0


@pytest.mark.parametrize("structure", ["none", "filter", "channel"])
def test_topology_is_frozen_after_a_step(structure: str) -> None:
    params = {} if structure == "none" else {"structure": structure}
    model, call, optimizer = trainer(0.5, freeze_after=3, lr=3.0, **params)
    choices = []
    for number in range(7):
        step(number, model, call, optimizer)
        slot = "index" if structure == "channel" else "active"
        name = "fc" if structure == "channel" else "conv"
        choices.append({g: kept(model, f"{name}:{g}")[slot] for g in ("forward", "input")})
    for choice in choices:
        turned = structure != "none"
        assert turned or torch.equal(choice["forward"], choice["input"])
    for gradient in ("forward", "input"):
        changes = [
            not torch.equal(one[gradient], other[gradient]) for one, other in pairwise(choices)
        ]
        assert any(changes[:2]) and not any(changes[2:])


@pytest.mark.parametrize(("structure", "refresh"), [("none", 3), ("filter", 1)])
def test_weights_that_are_not_used_get_no_gradient(structure: str, refresh: int) -> None:
    masked = trainer(mask_gradient=True, structure=structure, refresh=refresh)
    plain = trainer(structure=structure, refresh=refresh)
    grads = []
    for model, call, _ in (masked, plain):
        call(batch(0)).square().sum().backward()
        grads.append([getattr(model, name).weight.grad for name in LAYERS])
    for mine, whole, name in zip(*grads, LAYERS, strict=True):
        with graphpass.sparse_weights(plain[0]):
            used = getattr(plain[0], name).weight != 0
        assert whole[~used].any() and not mine[~used].any()
        assert torch.equal(mine[used], whole[used])


def test_frozen_weights_and_masked_gradients_stay_the_same_set() -> None:
    model, call, optimizer = trainer(freeze_after=2, mask_gradient=True, lr=3.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=3.0)
    for number in range(2):
        step(number, model, call, optimizer)
    active = kept(model, "conv:forward")["active"]
    before = model.conv.weight.detach().clone()
    for number in range(2, 5):
        step(number, model, call, optimizer)
    assert torch.equal(model.conv.weight[~active], before[~active])
    assert not torch.equal(model.conv.weight[active], before[active])


def test_layers_exchange_density_by_momentum() -> None:
    model, call, optimizer = trainer(refresh=2, distribution="momentum")
    counts = {name: getattr(model, name).weight.numel() for name in LAYERS}
    densities = []
    for number in range(7):
        step(number, model, call, optimizer)
        found = {
            (name, g.value): float(kept(model, f"{name}:{g}")["density"])
            for name in LAYERS
            for g in Gradient
        }
        assert all(found[name, "forward"] == found[name, g] for name in LAYERS for g in Gradient)
        densities.append({name: found[name, "forward"] for name in LAYERS})
        active = sum(densities[-1][name] * counts[name] for name in LAYERS)
        assert active == pytest.approx(0.3 * sum(counts.values()))
    assert densities[0] == densities[1] == dict.fromkeys(LAYERS, pytest.approx(0.3))
    assert densities[2] == densities[3] != densities[1]
    assert densities[4] != densities[3]
    # Thresholds follow in the same step.
    used = step(6, model, call, optimizer)["conv"].abs()
    share = float((used >= kept(model, "conv:forward")["threshold"]).sum()) / used.numel()
    assert share == pytest.approx(densities[6]["conv"], abs=0.1)


def _site_state(name: str, count: int, density: float, contribution: float) -> SiteState:
    site = Site(
        name, name, Gradient.WEIGHT, "mm", name, None, 1, ((1, 1), (1, 1)), (count, 1), "float32", 4
    )
    numbers = {"density": density, "contribution": contribution}
    values = {key: torch.tensor(value, dtype=torch.float64) for key, value in numbers.items()}
    return SiteState(site, get_method("swat").params(distribution="momentum"), values)


def test_what_a_full_layer_cannot_take_goes_to_the_others() -> None:
    layers = [
        _site_state("small", 10, 0.9, 8.0),
        _site_state("large", 100, 0.4, 1.0),
        _site_state("other", 50, 0.2, 1.0),
    ]
    exchange(3, layers)
    # 9 + 40 + 10 active; each gives a fifth: 11.8 are shared out 8 : 1 : 1, and "small" has room
    # for 2.8 of its 9.44.
    density = [float(layer.kept["density"]) for layer in layers]
    excess, room = 9 * 0.8 + 9.44 - 10, (100 - 33.18, 50 - 9.18)
    assert density[0] == pytest.approx(1.0)
    assert density[1] == pytest.approx((33.18 + excess * room[0] / sum(room)) / 100)
    assert density[2] == pytest.approx((9.18 + excess * room[1] / sum(room)) / 50)
    before = [layer.kept["density"].clone() for layer in layers]
    for contribution in (0.0, float("nan")):
        for layer in layers:
            layer.kept["contribution"].fill_(contribution)
        exchange(4, layers)
        assert all(
            torch.equal(layer.kept["density"], old)
            for layer, old in zip(layers, before, strict=True)
        )
    exchange(0, layers)


def test_a_resumed_run_gives_the_same_bits() -> None:
    options = {"refresh": 3, "freeze_after": 5, "distribution": "momentum", "mask_gradient": True}
    straight = trainer(**options)
    for number in range(8):
        step(number, *straight)
    begun = trainer(**options)
    for number in range(4):
        step(number, *begun)
    saved = test_state._through_a_file(graphpass.session(begun[0]).state_dict())
    resumed = trainer(**options)
    resumed[0].load_state_dict(begun[0].state_dict())
    resumed[2].load_state_dict(begun[2].state_dict())
    graphpass.session(resumed[0]).load_state_dict(saved)
    for number in range(4, 8):
        step(number, *resumed)
    for one, other in zip(straight[0].parameters(), resumed[0].parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "params",
    [
        {"refresh": 2, "distribution": "momentum", "mask_gradient": True},
        {"freeze_after": 2},
        {"structure": "filter", "refresh": 2},
        {"structure": "channel", "refresh": 2},
    ],
)
def test_mixed_precision_channels_last_and_another_batch_size(params: dict[str, Any]) -> None:
    model, call, optimizer = trainer(0.5, lr=0.01, **params)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for number in range(4):
        optimizer.zero_grad()
        x = batch(number, size=4 + number).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            call(x).square().sum().backward()
        optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())
    assert graphpass.reports()[-1].approximated
    assert int(kept(model, "fc:forward")["refreshed"]) >= 2


@pytest.mark.parametrize(
    "params",
    [{}, {"refresh": 50}, {"structure": "filter"}, {"freeze_after": 2}, {"structure": "channel"}],
)
def test_evaluation_with_the_sparse_weights(params: dict[str, Any]) -> None:
    model, call, optimizer = trainer(0.5, **params)
    with (
        pytest.raises(ConfigError, match="no forward product of this model leaves weights out"),
        graphpass.sparse_weights(model),
    ):
        pass
    for number in range(4):
        step(number, model, call, optimizer)
    dense = copy.deepcopy(model.state_dict())
    state = copy.deepcopy(graphpass.session(model).state_dict())
    trained = call(batch(9)).detach()
    # As before that call.
    graphpass.session(model).load_state_dict(state)
    model.eval()
    with graphpass.sparse_weights(call):  # type: ignore[arg-type]
        torch.testing.assert_close(call(batch(9)), trained)
    torch.testing.assert_close(model.state_dict(), dense, rtol=0, atol=0)
    for one, other in zip(
        graphpass.session(model).state_dict()["kept"][0].values(),
        state["kept"][0].values(),
        strict=True,
    ):
        assert torch.equal(one, other)
    exported = graphpass.sparse_model(model)
    assert isinstance(exported, Net)
    torch.testing.assert_close(exported(batch(9)), trained)
    for name in LAYERS:
        weight = getattr(exported, name).weight
        density = float((weight != 0).sum()) / weight.numel()
        # An old threshold leaves what has grown since.
        assert 0.4 < density < (0.8 if "refresh" in params else 0.6)
    assert torch.equal(exported.first.weight, model.first.weight)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"refresh": 0}, "refresh=0; give an integer >= 1"),
        ({"refresh": True}, "refresh=True; give an integer >= 1"),
        ({"freeze_after": 0}, "freeze_after=0; give None or an integer >= 1"),
        ({"mask_gradient": 1}, "mask_gradient=1; give True or False"),
        ({"distribution": "erk"}, "distribution='erk'; give 'given' or 'momentum'"),
        (
            {"structure": "channel", "mask_gradient": True},
            "mask_gradient=True with structure='channel'; give structure='none' or 'filter'",
        ),
        ({"feedback": True, "mask_gradient": True}, "give one of the two"),
        (
            {"structure": "filter", "distribution": "momentum"},
            "distribution='momentum' with structure='filter'; give structure='none'",
        ),
    ],
)
def test_what_is_not_legal_is_explained(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        get_method("swat").make_params(given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_thresholds_are_the_same_with_and_without_waiting(dtype: torch.dtype) -> None:
    values = torch.randn(7, 9, dtype=dtype).t()
    old = torch.tensor(5.0, dtype=torch.promote_types(dtype, torch.float32))
    for stride in (1, 3):
        for count in (1, 7, 21):
            for due in (True, False):
                args = (values, stride, torch.tensor(count), old, torch.tensor(due))
                found = threshold.kept_threshold(*args)
                assert torch.equal(found, threshold._without_waiting(*args))
                wanted = values.flatten()[::stride].abs().sort(descending=True).values[count - 1]
                assert found == (wanted if due else old)
