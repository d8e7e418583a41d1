"""Masked product: a forward product or an input gradient with the weights of large magnitude.

    y = x conv w',   dx = g (transposed conv) w',   w' = w where |w| >= threshold, 0 elsewhere

The threshold is a number in memory: another one takes no other kernel. On a GPU weights are masked
as they are put in the order of the product, and the operand is read where it lies. On a CPU, what
masks is fused into what made the weights, and the vendor's library multiplies. A linear layer is
the case of a 1x1 kernel on 1x1 maps. Letters: B batch, Ci and Co channels.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from codegen import dense, magnitude
from codegen.gpu import direct, products
from codegen.gpu import source as gpu
from codegen.kernel import Kernel, Sample, register


def reference(
    operand: Tensor,
    weight: Tensor,
    threshold: Tensor,
    size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    forward: bool,
) -> Tensor:
    """Return the product.

    Args:
        operand: the input [B, Ci, *in]; for an input gradient the output gradient [B, Co, *out].
        weight: [Co, Ci/groups, *kernel].
        threshold: 0-d; float32, or the type of the weight.
        size: of the result, [B, Co, *out] or [B, Ci, *in].
        stride: one number a spatial axis.
        padding: one number a spatial axis.
        dilation: one number a spatial axis.
        groups: groups of channels.
        forward: whether this is a forward product, not an input gradient.

    Returns:
        The product, laid out in memory as the operand is.
    """
    masked = magnitude.large(weight, threshold)
    axes = (size, stride, padding, dilation)
    return dense.returned(dense.product(operand, masked, *axes, groups, forward), operand)


def fake(
    operand: Tensor,
    weight: Tensor,
    threshold: Tensor,
    size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    forward: bool,
) -> Tensor:
    """Return an uninitialised product."""
    del weight, threshold, stride, padding, dilation, groups, forward
    return dense.empty(size, operand)


def emit_triton(
    operand: Tensor,
    weight: Tensor,
    threshold: Tensor,
    size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    forward: bool,
) -> gpu.Program | str:
    """Return the Triton for convolutions of two spatial axes."""
    if (reason := gpu.unsupported(threshold)) is not None:
        return reason
    form = products.Form(magnitude.TRITON + _TEXT, filters=("threshold",))
    result = dense.empty(size, operand.to("meta"))
    axes = (stride, padding, dilation)
    return direct.product_program(
        "masked_product", operand, weight, result, *axes, groups, form, forward=forward
    )


_TEXT = """
@triton.jit
def channel_of(number, group, inside):
    return number


@triton.jit
def filter_of(at, number, group, inside, threshold):
    return large(tl.load(at + number * W_K, mask=inside), threshold)

"""


def _sample(
    batch: int,
    channels: tuple[int, int],
    size: tuple[int, int],
    kernel: tuple[int, int],
    geometry: tuple[int, int, int, int] = (1, 0, 1, 1),
    *,
    forward: bool = True,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.channels_last,
) -> Sample:
    """Return a problem; `geometry` is stride, padding, dilation and groups."""
    (in_channels, out_channels), (stride, padding, dilation, groups) = channels, geometry
    out = [
        (side + 2 * padding - dilation * (taps - 1) - 1) // stride + 1
        for side, taps in zip(size, kernel, strict=True)
    ]

    def args() -> tuple[Any, ...]:
        random = torch.Generator().manual_seed(batch)
        shapes = ([batch, in_channels, *size], [batch, out_channels, *out])
        given, wanted = shapes if forward else reversed(shapes)
        operand = torch.randn(given, generator=random)
        weight = torch.randn(out_channels, in_channels // groups, *kernel, generator=random)
        operand, weight = (x.to(dtype, memory_format=memory_format) for x in (operand, weight))
        # One of the values, as a method takes it: the least that is kept.
        threshold = weight.flatten().abs().median()
        axes = [[stride] * 2, [padding] * 2, [dilation] * 2]
        return operand, weight, threshold, wanted, *axes, groups, forward

    contracted = (in_channels if forward else out_channels) // groups
    return Sample(args, length=contracted * math.prod(kernel))


def _with(sample: Sample, change: Callable[..., tuple[Any, ...]]) -> Sample:
    """Return the sample with its first three arguments changed."""

    def args() -> tuple[Any, ...]:
        operand, weight, threshold, *rest = sample.args()
        return *change(operand, weight, threshold), *rest

    return Sample(args, sample.length)


def samples() -> tuple[Sample, ...]:
    """Return both products of every geometry, in both layouts and types, and odd sizes."""
    nchw, half = torch.contiguous_format, torch.bfloat16
    plain = _sample(2, (17, 19), (5, 4), (3, 3), (1, 1, 1, 1))
    return (
        plain,
        _sample(2, (19, 17), (5, 4), (3, 3), (1, 1, 1, 1), forward=False),
        _sample(1, (1, 3), (5, 5), (1, 1)),
        _sample(1, (3, 63), (7, 6), (5, 5), (2, 2, 1, 1)),
        _sample(1, (63, 3), (7, 6), (5, 5), (2, 2, 1, 1), forward=False),
        _sample(2, (6, 4), (9, 8), (3, 2), (2, 3, 2, 2), memory_format=nchw),
        _sample(2, (6, 4), (9, 8), (3, 2), (2, 3, 2, 2), forward=False, memory_format=nchw),
        _sample(2, (32, 16), (6, 6), (3, 3), (1, 1, 1, 1), dtype=half),
        _sample(2, (8, 16), (4, 4), (7, 7), (1, 3, 1, 2), forward=False, dtype=half),
        # A linear layer.
        _sample(20, (70, 17), (1, 1), (1, 1)),
        _with(plain, lambda x, w, t: (x, w.index_fill(2, torch.tensor([1]), torch.nan), t)),
        _with(plain, lambda x, w, t: (x[:, :1, :1, :1].expand(x.shape), w.flip(3), t * 1e30)),
        _with(plain, lambda x, w, t: (x, w, torch.zeros_like(t))),
    )


register(
    Kernel(
        name="masked_product",
        schema="(Tensor operand, Tensor weight, Tensor threshold, int[] size, int[] stride, "
        "int[] padding, int[] dilation, int groups, bool forward) -> Tensor",
        reference=reference,
        fake=fake,
        samples=samples,
        emit_triton=emit_triton,
    )
)
