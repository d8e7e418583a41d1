"""What a graph on a GPU is made of, seen on fake tensors: kernels of ours, and no copies."""

from functools import cache

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from codegen.gpu import build as gpu_build
from codegen.kernel import kernels
from graphpass.dry_run import analyses
from graphpass.method import get_method, salt_of
from graphpass.site import FACTORS, Gradient, Site

pytestmark = pytest.mark.skipif(
    gpu_build.toolchain() is not None, reason=gpu_build.toolchain() or "Triton is here"
)

FORWARD, INPUT, WEIGHT = Gradient.FORWARD, Gradient.INPUT, Gradient.WEIGHT
# What copies a part of an operand, or all of it.
COPIES = ("index_select", "take_along_dim", "gather", "clone", "copy_", "_to_copy")
CASES = [
    ("crs", {}, FORWARD, "sampled_channels"),
    ("crs", {"replacement": True}, INPUT, "sampled_channels"),
    ("crs_unscaled", {}, INPUT, "sampled_channels"),
    ("crs", {}, WEIGHT, "sampled_wgrad"),
    ("swat", {}, FORWARD, "masked_product"),
    ("swat", {}, INPUT, "masked_product"),
    ("swat", {}, WEIGHT, "masked_wgrad"),
    ("swat", {"structure": "channel"}, FORWARD, "sampled_channels"),
    ("swat", {"structure": "channel"}, WEIGHT, "listed_wgrad"),
    ("crs", {"axis": "channels"}, WEIGHT, "listed_wgrad"),
]


@cache
def sites(layer: str) -> dict[Gradient, Site]:
    """Return the products of the second layer of a network."""
    if layer == "linear":
        model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
        (analysis,) = analyses(model, torch.empty(64, 32))
    else:
        model = nn.Sequential(*(nn.Conv2d(32, 32, 3, padding=1) for _ in range(2)))
        (analysis,) = analyses(model, torch.empty(4, 32, 8, 8))
    return {site.gradient: site for site in analysis.sites if site.path == "1"}


@pytest.mark.parametrize("layer", ["convolution", "linear"])
@pytest.mark.parametrize(("name", "given", "gradient", "kernel"), CASES)
def test_a_method_on_a_gpu_is_a_kernel_that_reads_operands_where_they_lie(
    layer: str, name: str, given: dict[str, object], gradient: Gradient, kernel: str
) -> None:
    method, site = get_method(name), sites(layer)[gradient]
    params = method.make_params(given)
    assert method.reject(site, params) is None
    factors = (*site.shapes, *sites(layer)[FORWARD].shapes)
    shapes = dict(zip(("left", "right", *FACTORS), factors, strict=False))
    if site.conv is not None:
        shapes = dict(zip(("input", "weight", "grad"), site.shapes, strict=True))
    with FakeTensorMode(), torch.device("cuda"):
        operands = [torch.empty(shapes[each]) for each in method.operands(site, params)]
        template, seed = torch.empty(site.output), torch.empty((), dtype=torch.int64)
        traced = make_fx(
            lambda seed, *values: method.lower(site, params, template, seed, salt_of(site), *values)
        )(seed, *operands)
    (called,) = (node for node in traced.graph.nodes if node.target is kernels()[kernel].op)
    given_to_it = [arg for arg in called.args if isinstance(arg, torch.fx.Node)][:2]
    while given_to_it:
        node = given_to_it.pop()
        assert not any(copy in str(node.target) for copy in COPIES), node.format_node()
        given_to_it += node.all_input_nodes
