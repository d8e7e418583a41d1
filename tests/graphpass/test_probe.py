"""The probe: what it computes, beside gradients that stay what they are."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters

from benchmarks.laboratory import Laboratory
from graphpass.sheet import Probe, Reading

SPECS: list[dict[str, Any]] = [
    {"name": "prune", "gradient": "weight", "min_channels": 1},
    {"name": "prune", "gradient": "input", "min_channels": 1},
    {"name": "zero", "gradient": "weight"},
    {"name": "zero", "gradient": "input"},
    {"name": "random", "gradient": "weight", "std": 0.5},
]
PATHS = ("first", "second", "head")


class Net(nn.Module):
    """Two convolutions, the second behind a norm and beside a shortcut, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x + self.second(F.relu(self.norm(x)))
        result: Tensor = self.head(F.relu(x).mean((2, 3)))
        return result


class Bench:
    """A compiled net, and what one step of it is to run."""

    def __init__(self, batch: int = 6) -> None:
        self.model = Net()
        self.laboratory = Laboratory()
        self.call = torch.compile(self.model, backend=self.laboratory)
        self.x = torch.randn(batch, 3, 5, 5)
        self.step()

    def loss(self) -> Tensor:
        result: Tensor = self.call(self.x).square().sum()
        return result

    def step(self) -> list[Tensor]:
        """Return the gradients of one step, in the order of the parameters."""
        self.model.zero_grad()
        self.loss().backward()
        return [p.grad.clone() for p in self.model.parameters() if p.grad is not None]

    def probe(self, specs: list[dict[str, Any]] = SPECS) -> tuple[Probe, list[Tensor], Reading]:
        """Return a probe of everything, its gradients, and what it found."""
        candidates = self.laboratory.numbers(specs, PATHS)
        plan = self.laboratory.numbers(SPECS[:2], PATHS[:2])
        probe = self.laboratory.running = Probe(candidates, plan)
        gradients = self.step()
        return probe, gradients, self.laboratory.reading()


def squared(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).square().sum())


@pytest.mark.usefixtures("interpreted")
def test_gradients_stay_exact_and_errors_are_those_of_the_plan() -> None:
    bench = Bench()
    exact = bench.step()
    probe, gradients, reading = bench.probe()
    assert all(map(torch.equal, gradients, exact))
    bench.laboratory.running = probe.plan
    # The same draws: a call is as good as its number.
    bench.laboratory.calls -= 1
    planned = bench.step()
    errors = [squared(a, b) for a, b in zip(planned, exact, strict=True)]
    found = [reading.total[p] for p in sorted(reading.total)]
    assert found == pytest.approx(errors, rel=1e-3, abs=1e-9)
    assert errors[0] > 0 and errors[2] > 0


@pytest.mark.usefixtures("interpreted")
def test_every_candidate() -> None:
    bench = Bench()
    exact = bench.step()
    bench.probe()
    names, draws = bench.laboratory.names(), 40
    readings = [bench.probe()[2] for _ in range(draws)]
    found = {}
    for place, number in enumerate(sorted(names.candidates)):
        several = [reading.local[place] for reading in readings]
        means = [sum(v) / draws for v in zip(*((e.noise, e.bias) for e in several), strict=True)]
        found[names.candidates[number][:2]] = (*means, several[0].square)
    weights = dict(zip(("first", "second", "head"), (exact[0], exact[4], exact[6]), strict=True))
    for name, grad in weights.items():
        square = float(grad.square().sum())
        assert found[f"{name}:weight", "zero"] == pytest.approx((0.0, square, square), rel=1e-4)
        noise, bias, _ = found[f"{name}:weight", "random"]
        # Normal draws of deviation 0.5 that have nothing to do with the gradient.
        assert noise == pytest.approx(0.25 * grad.numel(), rel=0.2)
        assert bias == pytest.approx(square, rel=0.5, abs=0.5 * noise)
    # Pruning is unbiased: what it was seen to add is noise.
    noise, bias, _ = found["second:weight", "prune"]
    assert bias == 0 and noise > 0
    # So is the share of the output gradient that is left; a method without any keeps it whole.
    densities = {names.candidates[number][:2]: entry.density for number, entry in
                 zip(sorted(names.candidates), readings[0].local, strict=True)}  # fmt: skip
    assert 0.05 < densities["second:weight", "prune"] < 0.4
    assert densities["second:weight", "prune"] == pytest.approx(densities["second:input", "prune"])
    assert densities["second:weight", "zero"] == 1
    bench.laboratory.running = bench.laboratory.numbers(SPECS[:1], PATHS[1:2])
    errors = [squared(bench.step()[4], exact[4]) for _ in range(draws)]
    assert noise == pytest.approx(sum(errors) / draws, rel=0.4)


@pytest.mark.usefixtures("interpreted")
def test_bad_steps() -> None:
    bench = Bench()
    torch.nn.init.zeros_(bench.model.head.weight)
    torch.nn.init.zeros_(bench.model.head.bias)
    _, _, without_gradient = bench.probe()
    assert without_gradient.is_finite and without_gradient.propagated[0] == 0
    assert min(entry.square for entry in without_gradient.local) == 0
    bench.x[0, 0, 0, 0] = torch.nan
    assert not bench.probe()[2].is_finite


@pytest.mark.usefixtures("interpreted")
def test_a_batch_of_one() -> None:
    _, gradients, reading = Bench(batch=1).probe()
    assert reading.is_finite and any(reading.total.values())
    assert all(gradient.isfinite().all() for gradient in gradients)


@torch._functorch.config.patch(donated_buffer=False)
@pytest.mark.usefixtures("aten_only")
def test_backward_may_run_again_and_notes_come_from_cached_graphs_too() -> None:
    found = []
    # Where the graph was analysed just before, keys of the cache are others than later on.
    for _ in range(3):
        before = counters["aot_autograd"]["autograd_cache_hit"]
        torch._dynamo.reset()
        torch.manual_seed(1)
        bench = Bench()
        bench.probe(SPECS[:2])
        loss = bench.loss()
        loss.backward(retain_graph=True)
        loss.backward()
        found.append(bench.laboratory.reading())
    assert counters["aot_autograd"]["autograd_cache_hit"] >= before + 2
    assert found[0] == found[1] and found[0].is_finite
