"""Phase sampling: on a GPU the kernel computes which pixels belong to a phase."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from codegen import phases
from codegen.gpu import build as gpu_build
from codegen.kernel import kernels
from graphpass.dry_run import analyses
from graphpass.method import get_method, salt_of
from graphpass.site import Gradient


@pytest.mark.skipif(
    gpu_build.toolchain() is not None, reason=gpu_build.toolchain() or "Triton is here"
)
def test_on_a_gpu_no_list_of_pixels_is_made() -> None:
    model = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1))
    (analysis,) = analyses(model, torch.empty(4, 8, 8, 8))
    (site,) = (s for s in analysis.sites if s.path == "1" and s.gradient is Gradient.WEIGHT)
    method = get_method("phase")
    params = method.make_params({})
    with FakeTensorMode(), torch.device("cuda"):
        grad, x = torch.empty(4, 16, 8, 8), torch.empty(4, 16, 8, 8)
        template = torch.empty(site.output)
        seed = torch.empty((), dtype=torch.int64)
        traced = make_fx(
            lambda seed, *pair: method.lower(site, params, template, seed, salt_of(site), *pair)
        )(seed, grad, x)
    values = {node.target: node.meta["val"] for node in traced.graph.nodes if node.op != "output"}
    assert kernels()["phase_wgrad"].op in values
    assert kernels()["sampled_wgrad"].op not in values
    integers = [
        value for value in values.values()
        if isinstance(value, torch.Tensor) and value.dtype is torch.int64
    ]  # fmt: skip
    assert integers and all(value.numel() == 1 for value in integers)


@pytest.mark.parametrize("staggered", [True, False])
@pytest.mark.parametrize(("down", "across"), [(2, 2), (3, 1), (1, 4)])
def test_every_pixel_belongs_to_one_phase(down: int, across: int, staggered: bool) -> None:
    shape = [3, 2, 7, 5]
    seen = torch.zeros(3 * 7 * 5, dtype=torch.int64)
    for phase in range(down * across):
        index, inside = phases.pixels(shape, torch.tensor([phase]), down, across, staggered)
        seen += torch.bincount(index[inside], minlength=len(seen))
    assert (seen == 1).all()
