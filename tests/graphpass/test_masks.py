"""Masks of ReLUs come from the rounded copy that a bfloat16 product keeps anyway."""

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph

import graphpass
from graphpass import masks, rewrite

# The forward product makes the copy; the weight gradient keeps it.
ROUNDED = {"conv2": [{"name": "bf16", "gradient": which} for which in ("forward", "weight")]}


class Net(nn.Module):
    """A ReLU whose output feeds a convolution and a shortcut, and one that feeds a sum alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv1(x))
        return torch.relu(self.conv2(x) + x).sum()


# What is tested here are graphs, not the loops that Inductor writes for them.
pytestmark = pytest.mark.usefixtures("aten_only")


@pytest.fixture
def rewired(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    counts: list[int] = []

    def count(graph: Graph) -> int:
        counts.append(masks.settle_masks(graph))
        return counts[-1]

    monkeypatch.setattr(rewrite, "settle_masks", count)
    return counts


def _gradients(net: nn.Module, x: Tensor, methods: object) -> dict[str, Tensor]:
    net.zero_grad()
    options = {"methods": methods, "strict": True}
    with torch._functorch.config.patch(enable_autograd_cache=False):
        torch.compile(net, backend="approx", options=options)(x).backward()
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def test_a_mask_is_read_from_the_copy_and_not_kept(rewired: list[int]) -> None:
    torch.manual_seed(0)
    net, x = Net(), torch.randn(4, 3, 10, 9)
    _gradients(net, x, ROUNDED)
    assert rewired == [1]
    report = graphpass.reports()[-1]
    planned = report.planned_saved_bytes
    assert planned is not None
    # conv2's input is kept in two bytes an element instead of four, and no mask of it.
    assert report.exact_saved_bytes - planned == 2 * 4 * 8 * 10 * 9


def test_gradients_are_those_of_the_exact_mask(rewired: list[int]) -> None:
    torch.manual_seed(0)
    net, x = Net(), torch.randn(4, 3, 10, 9)
    net.conv2.weight.data.mul_(2**-20)
    exact = _gradients(net, x, {})
    rounded = _gradients(net, x, ROUNDED)
    assert rewired == [1]
    for name in ("conv1.weight", "conv1.bias"):
        torch.testing.assert_close(rounded[name], exact[name], rtol=1e-5, atol=1e-5)


def test_a_net_without_rounded_copies_is_left_alone(rewired: list[int]) -> None:
    _gradients(Net(), torch.randn(2, 3, 6, 6), {"conv2": "zero"})
    assert rewired == [0]


def _planned_beyond_exact() -> int:
    report = graphpass.reports()[-1]
    assert report.planned_saved_bytes is not None
    return report.planned_saved_bytes - report.exact_saved_bytes


@pytest.mark.skipif(torch.cuda.is_available(), reason="masks are kept on a GPU")
@pytest.mark.parametrize("method", ["int8", "zero"])
def test_on_a_cpu_outputs_are_kept_and_no_masks(rewired: list[int], method: str) -> None:
    gradients = [{"name": method, "gradient": which} for which in ("input", "weight")]
    _gradients(Net(), torch.randn(4, 3, 10, 9), {"conv2": gradients})
    assert rewired == [0]
    # Nothing but a few numbers, such as a maximum, is kept beside what exact training keeps.
    assert 0 <= _planned_beyond_exact() < 100
