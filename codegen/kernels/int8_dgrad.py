"""The input gradient of a convolution of 8-bit numbers.

    dx = (g * grad_scale) G (w * weight_scale)

with the integer product exact; `codegen.int8_tiles` says how.
"""

import math
from typing import Any

import torch
from torch import Tensor

from codegen import int8, int8_tiles
from codegen.gpu import int8 as gpu_int8
from codegen.gpu.source import Program
from codegen.kernel import Kernel, Sample, Source, register

aten = torch.ops.aten


def reference(
    grad: Tensor,
    weight: Tensor,
    grad_scale: Tensor,
    weight_scale: Tensor,
    out_size: list[int],
    size: list[int],
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    """Return the input gradient.

    Args:
        grad: g [B, Co, OH, OW] in the layout of `codegen.int8`, with `grad_border`.
        weight: w [Co, Ci/groups, *kernel] in that layout, without a border.
        grad_scale: float, 0-d: what one step of `grad` is worth.
        weight_scale: the same of `weight`.
        out_size: [B, Co, OH, OW].
        size: [B, Ci, IH, IW].
        kernel: the kernel's spatial sizes.
        stride: one number a spatial axis.
        padding: one number a spatial axis.
        dilation: one number a spatial axis.
        groups: groups of channels.
        dtype: element type of the result.
        channels_last: memory format of the result.

    Returns:
        dx [B, Ci, IH, IW].
    """
    wide = grad_scale.dtype
    border = int8.grad_border(size[2:], out_size[2:], kernel, stride, padding, dilation)
    g = int8.from_bytes(grad, out_size, *border, wide)
    w = int8.from_bytes(weight, [out_size[1], size[1] // groups, *kernel], [0, 0], [0, 0], wide)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.empty(size, dtype=wide, device=g.device).contiguous(memory_format=layout)
    dx: Tensor = aten.convolution_backward(
        g, x, w, None, stride, padding, dilation, False, [0, 0], groups, [True, False, False]
    )[0]
    # In double precision, the element type only says how the result of a kernel is rounded.
    narrow = dtype if wide == torch.float32 else wide
    result = torch.empty(size, dtype=narrow, device=g.device, memory_format=layout)
    return result.copy_(dx * grad_scale * weight_scale)


def fake(
    grad: Tensor,
    weight: Tensor,
    grad_scale: Tensor,
    weight_scale: Tensor,
    out_size: list[int],
    size: list[int],
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    """Return an uninitialised input gradient."""
    del weight, grad_scale, weight_scale, out_size, kernel, stride, padding, dilation, groups
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(size, dtype=dtype, device=grad.device, memory_format=layout)


def emit_cpp(
    grad: Tensor,
    weight: Tensor,
    grad_scale: Tensor,
    weight_scale: Tensor,
    out_size: list[int],
    size: list[int],
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    dtype: torch.dtype,
    channels_last: bool,
) -> Source | str:
    """Return the source for convolutions of two spatial axes."""
    del grad, weight
    layout = torch.channels_last if channels_last else torch.contiguous_format
    result = torch.empty(size, dtype=dtype, device="meta", memory_format=layout)
    border = int8.grad_border(size[2:], out_size[2:], kernel, stride, padding, dilation)
    return int8_tiles.emit(
        result, (grad_scale, weight_scale), out_size, border, kernel, stride, padding, dilation,
        groups, forward=False,
    )  # fmt: skip


def emit_triton(
    grad: Tensor,
    weight: Tensor,
    grad_scale: Tensor,
    weight_scale: Tensor,
    out_size: list[int],
    size: list[int],
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    dtype: torch.dtype,
    channels_last: bool,
) -> Program | str:
    """Return the Triton for convolutions of two spatial axes."""
    del grad, weight
    layout = torch.channels_last if channels_last else torch.contiguous_format
    result = torch.empty(size, dtype=dtype, device="meta", memory_format=layout)
    border = int8.grad_border(size[2:], out_size[2:], kernel, stride, padding, dilation)
    return gpu_int8.product(
        "int8_dgrad", result, (grad_scale, weight_scale), out_size, border, kernel, stride,
        padding, dilation, groups, forward=False,
    )  # fmt: skip


def _sample(
    *problem: Any,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = True,
    scale: float = 0.01,
) -> Sample:
    example = int8.Example(*problem)

    def args() -> tuple[Any, ...]:
        grad, _, weight = example.operands()
        scales = torch.tensor(scale), torch.tensor(0.5)
        return grad, weight, *scales, *example.sizes(), dtype, channels_last

    return Sample(args, length=example.channels[1] * math.prod(example.kernel))


def samples() -> tuple[Sample, ...]:
    """Return convolutions of every geometry, both layouts and types, odd sizes, and NaN."""
    half = torch.bfloat16
    return (
        _sample(3, (17, 19), (9, 7), (3, 3), (1, 1, 1, 1)),
        _sample(2, (1, 1), (5, 5), (1, 1)),
        _sample(1, (3, 63), (9, 8), (5, 5), (2, 2, 1, 1)),
        _sample(2, (63, 3), (16, 15), (3, 3), (2, 1, 1, 1), dtype=half),
        _sample(2, (6, 4), (11, 10), (3, 2), (2, 3, 2, 2), channels_last=False),
        _sample(2, (8, 8), (9, 9), (7, 7), (1, 3, 1, 8)),
        _sample(2, (64, 32), (32, 18), (3, 3), (1, 1, 1, 1), dtype=half, channels_last=False),
        _sample(3, (80, 16), (4, 4), (3, 3), (1, 1, 1, 1)),
        _sample(1, (100, 36), (1, 305), (1, 1)),
        _sample(2, (8, 8), (6, 6), (1, 1), (2, 1, 1, 1)),
        _sample(2, (8, 8), (6, 6), (1, 1), (3, 0, 1, 1)),
        _sample(2, (8, 8), (5, 5), (3, 3), (1, 1, 1, 1), scale=float("nan")),
        _sample(2, (8, 8), (5, 5), (3, 3), (1, 1, 1, 1), scale=float("inf")),
    )


register(
    Kernel(
        name="int8_dgrad",
        schema="(Tensor grad, Tensor weight, Tensor grad_scale, Tensor weight_scale, "
        "int[] out_size, int[] size, int[] kernel, int[] stride, int[] padding, int[] dilation, "
        "int groups, ScalarType dtype, bool channels_last) -> Tensor",
        reference=reference,
        fake=fake,
        emit_cpp=emit_cpp,
        samples=samples,
        emit_triton=emit_triton,
    )
)
