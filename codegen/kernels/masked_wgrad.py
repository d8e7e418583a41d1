"""Masked wgrad: the weight gradient of a convolution with the inputs of large magnitude.

    dw = g (outer) patch(x'), summed over pixels;   x' = x where |x| >= threshold, 0 elsewhere

The threshold is a number in memory: another one takes no other kernel. On a GPU inputs are masked
where they are read, and never written. On a CPU what masks is fused into what stands around it, and
the vendor's library multiplies. A linear layer is the case of a 1x1 kernel on 1x1 maps. Letters: B
batch, Ci and Co channels.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from codegen import dense, magnitude
from codegen.gpu import direct
from codegen.gpu import source as gpu
from codegen.gpu.weight_gradient import Form
from codegen.kernel import Kernel, Sample, register


def reference(
    grad: Tensor,
    x: Tensor,
    threshold: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """Return the weight gradient.

    Args:
        grad: [B, Co, *out].
        x: [B, Ci, *in].
        threshold: 0-d; float32, or the type of x.
        kernel: the kernel's spatial sizes.
        stride: one number a spatial axis.
        padding: one number a spatial axis.
        dilation: one number a spatial axis.
        groups: groups of channels.

    Returns:
        dw [Co, Ci/groups, *kernel], laid out in memory as x is.
    """
    masked = magnitude.large(x, threshold)
    dw = dense.weight_gradient(grad, masked, kernel, stride, padding, dilation, groups)
    return dense.returned(dw, x)


def fake(
    grad: Tensor,
    x: Tensor,
    threshold: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """Return an uninitialised weight gradient."""
    del threshold, stride, padding, dilation
    return dense.empty([grad.shape[1], x.shape[1] // groups, *kernel], x)


def emit_triton(
    grad: Tensor,
    x: Tensor,
    threshold: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> gpu.Program | str:
    """Return the Triton for convolutions of two spatial axes."""
    if (reason := gpu.unsupported(threshold)) is not None:
        return reason
    form = Form(magnitude.TRITON + _TEXT, ("threshold",))
    result = fake(
        grad.to("meta"), x.to("meta"), threshold, kernel, stride, padding, dilation, groups
    )
    return direct.weight_gradient_program(
        "masked_wgrad", grad, x, result, stride, padding, dilation, groups, form
    )


_TEXT = """
@triton.jit
def pixel_of(number, inside, threshold):
    return number.to(INDEX)


@triton.jit
def left_of(at, mask, number, inside, threshold):
    return tl.load(at, mask=mask, other=0.0)


@triton.jit
def right_of(at, mask, channel, threshold):
    return large(tl.load(at, mask=mask, other=0.0), threshold)


@triton.jit
def finished(sum, o, tap, channel, inside):
    return sum

"""


def _sample(
    batch: int,
    channels: tuple[int, int],
    size: tuple[int, int],
    kernel: tuple[int, int],
    geometry: tuple[int, int, int, int] = (1, 0, 1, 1),
    *,
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
        x = torch.randn(batch, in_channels, *size, generator=random)
        grad = torch.randn(batch, out_channels, *out, generator=random)
        grad, x = (tensor.to(dtype, memory_format=memory_format) for tensor in (grad, x))
        # One of the values, as a method takes it: the least that is kept.
        threshold = x.flatten().abs().median()
        axes = [[stride] * 2, [padding] * 2, [dilation] * 2]
        return grad, x, threshold, list(kernel), *axes, groups

    return Sample(args, length=batch * math.prod(out))


def _with(sample: Sample, change: Callable[..., tuple[Any, ...]]) -> Sample:
    """Return the sample with its first three arguments changed."""

    def args() -> tuple[Any, ...]:
        grad, x, threshold, *rest = sample.args()
        return *change(grad, x, threshold), *rest

    return Sample(args, sample.length)


def samples() -> tuple[Sample, ...]:
    """Return convolutions of every geometry, in both layouts and types, and odd sizes."""
    nchw, half = torch.contiguous_format, torch.bfloat16
    plain = _sample(2, (17, 19), (5, 4), (3, 3), (1, 1, 1, 1))
    return (
        plain,
        _sample(2, (1, 1), (5, 5), (1, 1)),
        _sample(1, (3, 63), (7, 6), (5, 5), (2, 2, 1, 1)),
        _sample(2, (6, 4), (9, 8), (3, 2), (2, 3, 2, 2), memory_format=nchw),
        _sample(2, (8, 8), (5, 5), (7, 7), (1, 3, 1, 8), dtype=half),
        _sample(3, (17, 5), (6, 6), (3, 3), (1, 1, 1, 1), dtype=half, memory_format=nchw),
        # A linear layer.
        _sample(70, (20, 17), (1, 1), (1, 1)),
        _with(plain, lambda g, x, t: (g, x.index_fill(2, torch.tensor([1]), torch.nan), t)),
        _with(plain, lambda g, x, t: (g[:, :1, :1, :1].expand(g.shape), x.flip(3), t * 1e30)),
        _with(plain, lambda g, x, t: (g, x[:, :1].expand(x.shape), torch.zeros_like(t))),
    )


register(
    Kernel(
        name="masked_wgrad",
        schema="(Tensor grad, Tensor x, Tensor threshold, int[] kernel, int[] stride, "
        "int[] padding, int[] dilation, int groups) -> Tensor",
        reference=reference,
        fake=fake,
        samples=samples,
        emit_triton=emit_triton,
    )
)
