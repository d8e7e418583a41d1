"""bf16: the product of operands rounded to bfloat16, accumulated in float32.

Rounding to 8 significant bits changes each operand by at most 2^-9 of itself; the errors of single
values are nearly independent, so a product of n terms is off by about 2^-9 / sqrt(3) of the norm of
its terms. Rounding to nearest is deterministic, so the estimator is biased, but by no more than
that. Micikevicius et al., "Mixed Precision Training", 2018, train whole networks in this way; here
it is one product, and everything around it stays in the model's precision.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from cost_model import Cost, KernelCost, element_count
from graphpass.errors import Reason, Rejected
from graphpass.kernels_of import (
    layer_name,
    mover,
    operand_shape,
    product,
    shared_name,
    vendor_kind,
)
from graphpass.method import Method, Prior, Sample, no_draw, register
from graphpass.site import Gradient, Site

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Params:
    """bf16 has no parameters."""


def reference(
    site: Site, params: Params, template: Tensor, draws: None, *operands: Tensor
) -> Tensor:
    """Return the exact product of the rounded operands."""
    del params, draws
    rounded = [operand.to(torch.bfloat16).to(template.dtype) for operand in operands]
    return _product(site, template, *rounded)


def cost(site: Site, params: Params) -> tuple[KernelCost, ...]:
    """Return the cost of rounding both operands, and of the product of half as many bytes."""
    names = operands(site, params)
    exact, half = site.cost, torch.bfloat16.itemsize / site.itemsize
    # The result is converted as it is written.
    cost = Cost(exact.flops, exact.bytes_read * half, exact.bytes_written)
    multiplied = product(site, vendor_kind(site), cost, "bfloat16")
    # Each operand is read once as it is and written once rounded.
    return (*(_rounding(site, name) for name in names), multiplied)


def _rounding(site: Site, name: str) -> KernelCost:
    count = element_count(operand_shape(site, name))
    cost = Cost(0, count * site.itemsize, count * torch.bfloat16.itemsize)
    return mover("convert", cost, site.dtype, shared_name("bf16", site, layer_name(site, name)))


def reject(site: Site, params: Params) -> Rejected | None:
    """Accept what is held in more than 16 bits."""
    del params
    if site.itemsize <= torch.bfloat16.itemsize:
        return Rejected(Reason.NOT_CHEAPER, f"the operands are {site.dtype} already")
    return None


def lower(
    site: Site, params: Params, template: Tensor, seed: Tensor, salt: int, *operands: Tensor
) -> Tensor:
    """Return the product in bfloat16; both conversions fuse with what stands around them."""
    del params, seed, salt
    rounded = [operand.to(torch.bfloat16) for operand in operands]
    return _product(site, template, *rounded).to(template.dtype)


def operands(site: Site, params: Params) -> tuple[str, ...]:
    """Return the names of the two operands."""
    del params
    if site.conv is None:
        return ("left", "right")
    return {
        Gradient.FORWARD: ("input", "weight"),
        Gradient.INPUT: ("grad", "weight"),
        Gradient.WEIGHT: ("grad", "input"),
    }[site.gradient]


def _product(site: Site, template: Tensor, first: Tensor, second: Tensor) -> Tensor:
    if site.conv is None:
        return torch.matmul(first, second)
    conv = site.conv
    geometry = (
        conv.stride, conv.padding, conv.dilation, conv.transposed, conv.output_padding, conv.groups
    )  # fmt: skip
    if site.gradient is Gradient.FORWARD:
        result: Tensor = aten.convolution(first, second, None, *geometry)
        return result
    index = 0 if site.gradient is Gradient.INPUT else 1
    # Only the shape of the missing operand is read; memory that is never touched costs nothing.
    missing = torch.empty(template.shape, dtype=first.dtype, device=first.device)
    if template.dim() == 4 and second.stride(1) == 1:
        missing = missing.contiguous(memory_format=torch.channels_last)
    x, w = (missing, second) if index == 0 else (second, missing)
    mask = [index == 0, index == 1, False]
    product: Tensor = aten.convolution_backward(first, x, w, None, *geometry, mask)[index]
    return product


def prior(site: Site, params: Params) -> Prior:
    """Return what was measured: of the gradients nothing that could be told from 0 to 5 digits."""
    del params
    return Prior(0.0, bias=0.0017 if site.gradient is Gradient.FORWARD else 1e-5)


def samples() -> tuple[Sample, ...]:
    """Return every product of convolutions and linear layers."""
    nn, half = torch.nn, torch.bfloat16
    every = (Gradient.FORWARD, Gradient.INPUT, Gradient.WEIGHT)
    return (
        *(
            Sample(
                (5, 3, 9, 7), lambda: nn.Conv2d(3, 4, 3, 2, 1), gradient, Params(), computes_in=half
            )
            for gradient in every
        ),
        *(
            Sample((7, 10), lambda: nn.Linear(10, 6), gradient, Params(), computes_in=half)
            for gradient in every
        ),
        Sample(
            (2, 3, 11),
            lambda: nn.ConvTranspose1d(3, 5, 4, 2),
            Gradient.INPUT,
            Params(),
            computes_in=half,
        ),
    )


register(
    Method(
        name="bf16",
        summary="operands rounded to bfloat16, accumulated in float32",
        source="Micikevicius et al. 2018",
        unbiased=False,
        gradients=(Gradient.WEIGHT, Gradient.INPUT, Gradient.FORWARD),
        params=Params,
        reject=reject,
        cost=cost,
        operands=operands,
        draw=no_draw,
        reference=reference,
        lower=lower,
        samples=samples,
        prior=prior,
        fast_on_cpu=True,
    )
)
