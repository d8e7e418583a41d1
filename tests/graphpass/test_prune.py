"""What is peculiar to pruning: the share of the output gradient that it leaves."""

import pytest
import torch

from codegen import pruning
from graphpass.methods.prune import Params, density, threshold


@pytest.mark.parametrize("block", [1, 4])
def test_density_is_the_share_that_is_left(block: int) -> None:
    """Of single values and of blocks, with values that a mask has set to zero among them."""
    random = torch.Generator().manual_seed(0)
    grad = torch.randn(8, 16, 12, 12, generator=random, dtype=torch.float64).relu()
    params = Params(block=block, min_channels=1)
    uniform = torch.rand(8, 16 // block, 12, 12, generator=random, dtype=torch.float64)
    pruned = pruning.prune(grad, threshold(grad, params), uniform, block)
    left = pruning.norms(pruned, block).ne(0).double()
    expected = float(density(grad, params))
    assert 0 < expected < 1
    # Blocks are drawn independently: five standard errors.
    assert abs(float(left.mean()) - expected) < 5 * float(left.std()) / left.numel() ** 0.5
