"""The fp8 method: where it applies, which operators it becomes, what it adds beside int8."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from codegen.gpu import build as gpu_build
from codegen.gpu import target
from graphpass.errors import ConfigError, Reason
from graphpass.method import get_method, salt_of
from graphpass.site import ConvGeometry, Gradient, Site

FP8, INT8 = get_method("fp8"), get_method("int8")
GEOMETRY = ConvGeometry((1, 1), (1, 1), (1, 1), False, (0, 0), 1)


def _site(gradient: Gradient, device: str = "cpu") -> Site:
    x, weight = (4, 16, 8, 8), (16, 16, 3, 3)
    result = weight if gradient is Gradient.WEIGHT else x
    return Site(
        "conv", "conv", gradient, "convolution", "node", None, 1, (x, weight, x), result,
        "float32", 4, GEOMETRY, device=device,
    )  # fmt: skip


def _noise(method: Any, site: Site, first: Tensor, second: Tensor, **params: Any) -> float:
    return float(method.noise(site, method.params(**params), first.double(), second.double()))


@pytest.mark.parametrize("gradient", list(Gradient))
def test_a_device_that_multiplies_no_8_bit_floats_is_a_reason(
    gradient: Gradient, monkeypatch: pytest.MonkeyPatch
) -> None:
    rejected = FP8.reject(_site(gradient), FP8.params())
    assert rejected is not None and rejected.reason is Reason.NO_HARDWARE
    assert str(rejected).endswith("a CPU multiplies no 8-bit floats")
    site = _site(gradient, "cuda")
    monkeypatch.setattr(target, "architecture", lambda: "sm_80")
    assert "sm_89 is the first" in str(FP8.reject(site, FP8.params()))
    assert FP8.reject(site, FP8.params(emulate=True)) is None
    monkeypatch.setattr(target, "architecture", lambda: "sm_90")
    assert FP8.reject(site, FP8.params()) is None


@pytest.mark.skipif(gpu_build.toolchain() is not None, reason="Triton is not here")
@pytest.mark.parametrize("gradient", list(Gradient))
@pytest.mark.parametrize("architecture", ["sm_90", "gfx942"])
def test_on_a_gpu_a_product_is_five_operators(
    gradient: Gradient, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target, "architecture", lambda: architecture)
    site = replace(_site(gradient, "cuda"), dtype="bfloat16", itemsize=2)
    with FakeTensorMode():
        x, weight = (
            torch.empty(shape, device="cuda", dtype=torch.bfloat16) for shape in site.shapes[:2]
        )
        seed = torch.empty((), dtype=torch.int64, device="cuda")
        operands = (x, x) if gradient is Gradient.WEIGHT else (x, weight)
        template = weight if gradient is Gradient.WEIGHT else x

        def lowered(*given: Tensor) -> Tensor:
            return FP8.lower(site, FP8.params("e5m2"), template, seed, salt_of(site), *given)

        graph = make_fx(lowered)(*operands).graph
    ours = [node for node in graph.nodes if getattr(node.target, "namespace", "") == "approx"]
    names = [node.target.name().removeprefix("approx::") for node in ours]
    assert names == ["absolute_max", "absolute_max", "fp8_round", "fp8_round", "fp8_product"]
    own = "fnuz" if architecture == "gfx942" else ""
    wide = getattr(torch, f"float8_e5m2{own}")
    narrow = torch.float8_e4m3fnuz if own else torch.float8_e4m3fn
    first = narrow if gradient is Gradient.FORWARD else wide
    assert [node.args[6] for node in ours[2:4]] == [first, narrow] == list(ours[4].args[4:6])


@pytest.mark.parametrize("gradient", [Gradient.INPUT, Gradient.WEIGHT])
def test_e5m2_adds_more_noise_than_e4m3(gradient: Gradient) -> None:
    """Four times the variance of gradients; the other operand is e4m3 either way."""
    random = torch.Generator().manual_seed(0)
    grad = torch.randn(4, 16, 8, 8, generator=random)
    other = torch.randn(_site(gradient).shapes[1 if gradient is Gradient.INPUT else 0])
    narrow, wide = (
        _noise(FP8, _site(gradient), grad, other, grad=name) for name in ("e4m3", "e5m2")
    )
    assert (4 + 1) / 2 * 0.9 < wide / narrow < (4 + 1) / 2 * 1.1


def test_beside_int8_it_depends_on_how_widely_values_are_spread() -> None:
    """Where the largest magnitude is ten times the root mean square, both add about the same."""
    random = torch.Generator().manual_seed(0)
    weight = torch.rand(16, 16, 3, 3, generator=random) - 0.5
    site = _site(Gradient.INPUT)
    even = torch.rand(4, 16, 8, 8, generator=random) - 0.5
    wide = torch.randn(4, 16, 8, 8, generator=random) * torch.exp(
        2 * torch.randn(4, 16, 8, 8, generator=random)
    )
    assert wide.abs().max() > 20 * wide.square().mean().sqrt()
    assert _noise(FP8, site, even, weight) > 2 * _noise(INT8, site, even, weight)
    # The weights are even in both; gradients' part of the noise is what differs.
    grads = [_noise(method, site, wide, torch.ones_like(weight)) for method in (FP8, INT8)]
    assert 1.5 * grads[0] < grads[1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"grad": "e3m4"}, "grad='e3m4'; give 'e4m3' or 'e5m2'"),
        ({"min_channels": 0}, "min_channels=0; give an integer >= 1"),
        ({"emulate": 1}, "emulate=1; give True or False"),
    ],
)
def test_parameters_out_of_range_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"method 'fp8': {message}"):
        FP8.params(**given)
