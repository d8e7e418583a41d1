"""Masks of ReLUs: from the copy that a bfloat16 product keeps anyway, and as bytes on a CPU."""

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph

import graphpass
from graphpass import masks, rewrite

# The forward product makes the copy; the weight gradient keeps it.
# Of conv2's input, the output of a ReLU.
ELEMENTS = 4 * 8 * 10 * 9
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
pytestmark = pytest.mark.usefixtures("interpreted")


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
    _gradients(Net(), torch.randn(4, 3, 10, 9), ROUNDED)
    assert rewired == [2]
    # conv2's input is kept in two bytes an element instead of four, and no mask of it.
    assert _planned_beyond_exact() == -2 * ELEMENTS


def test_gradients_are_those_of_the_exact_mask(rewired: list[int]) -> None:
    torch.manual_seed(0)
    net, x = Net(), torch.randn(4, 3, 10, 9)
    net.conv2.weight.data.mul_(2**-20)
    exact = _gradients(net, x, {})
    rounded = _gradients(net, x, ROUNDED)
    assert rewired == [2]
    for name in ("conv1.weight", "conv1.bias"):
        torch.testing.assert_close(rounded[name], exact[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("odd", [0.0, -0.0, 1e-45, torch.inf, torch.nan])
def test_bytes_are_the_mask_to_the_bit(rewired: list[int], odd: float) -> None:
    """Zeros of both signs, the smallest number there is, and what is no number."""
    torch.manual_seed(0)
    net, x = Net(), torch.randn(4, 3, 10, 9)
    x[0, 0, 0, 0] = odd
    exact = _gradients(net, x, {})
    planned = _gradients(net, x, {"conv2": "zero"})
    assert rewired == [2]
    for name in ("conv1.weight", "conv1.bias", "conv2.bias"):
        torch.testing.assert_close(planned[name], exact[name], rtol=0, atol=0, equal_nan=True)


def _planned_beyond_exact() -> int:
    report = graphpass.reports()[-1]
    assert report.planned_saved_bytes is not None
    return report.planned_saved_bytes - report.exact_saved_bytes


@pytest.mark.skipif(torch.cuda.is_available(), reason="bytes are kept on a CPU")
def test_without_its_products_an_output_is_kept_as_bytes(rewired: list[int]) -> None:
    gradients = [{"name": "zero", "gradient": which} for which in ("input", "weight")]
    _gradients(Net(), torch.randn(4, 3, 10, 9), {"conv2": gradients})
    assert rewired == [2]
    assert _planned_beyond_exact() == (1 - 4) * ELEMENTS


@pytest.mark.skipif(torch.cuda.is_available(), reason="bytes are kept on a CPU")
def test_what_is_kept_anyway_is_the_mask_too(rewired: list[int]) -> None:
    _gradients(Net(), torch.randn(4, 3, 10, 9), {"conv2": {"name": "zero", "gradient": "input"}})
    assert rewired == [2]
    # Less the weight, which only the input gradient needs.
    assert -4 * 8 * 8 * 9 <= _planned_beyond_exact() <= 0
