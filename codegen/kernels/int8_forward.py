"""The forward product of a convolution of 8-bit numbers.

    y = (x * x_scale) conv (w * weight_scale)

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
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor,
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
    """Return the product.

    Args:
        x: [B, Ci, IH, IW] in the layout of `codegen.int8`, with `input_border`.
        weight: w [Co, Ci/groups, *kernel] in that layout, without a border.
        x_scale: float, 0-d: what one step of `x` is worth.
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
        y [B, Co, OH, OW].
    """
    wide = x_scale.dtype
    border = int8.input_border(size[2:], out_size[2:], kernel, stride, padding, dilation)
    values = int8.from_bytes(x, size, *border, wide)
    w = int8.from_bytes(weight, [out_size[1], size[1] // groups, *kernel], [0, 0], [0, 0], wide)
    y: Tensor = aten.convolution(values, w, None, stride, padding, dilation, False, [0, 0], groups)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    # In double precision, the element type only says how the result of a kernel is rounded.
    narrow = dtype if wide == torch.float32 else wide
    result = torch.empty(out_size, dtype=narrow, device=x.device, memory_format=layout)
    result.copy_(y * x_scale * weight_scale)
    return result


def fake(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor,
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
    """Return an uninitialised product."""
    del weight, x_scale, weight_scale, size, kernel, stride, padding, dilation, groups
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(out_size, dtype=dtype, device=x.device, memory_format=layout)


def emit_cpp(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor,
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
    del x, weight
    layout = torch.channels_last if channels_last else torch.contiguous_format
    result = torch.empty(out_size, dtype=dtype, device="meta", memory_format=layout)
    border = int8.input_border(size[2:], out_size[2:], kernel, stride, padding, dilation)
    return int8_tiles.emit(
        result, (x_scale, weight_scale), size, border, kernel, stride, padding, dilation, groups,
        forward=True,
    )  # fmt: skip


def emit_triton(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor,
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
    del x, weight
    layout = torch.channels_last if channels_last else torch.contiguous_format
    result = torch.empty(out_size, dtype=dtype, device="meta", memory_format=layout)
    border = int8.input_border(size[2:], out_size[2:], kernel, stride, padding, dilation)
    return gpu_int8.product(
        "int8_forward", result, (x_scale, weight_scale), size, border, kernel, stride,
        padding, dilation, groups, forward=True,
    )  # fmt: skip


def _sample(
    *problem: Any,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = True,
    scale: float = 0.01,
) -> Sample:
    example = int8.Example(*problem)

    def args() -> tuple[Any, ...]:
        _, x, weight = example.operands()
        scales = torch.tensor(scale), torch.tensor(0.5)
        return x, weight, *scales, *example.sizes(), dtype, channels_last

    return Sample(args, length=example.channels[0] * math.prod(example.kernel))


def samples() -> tuple[Sample, ...]:
    """Return convolutions of every geometry, both layouts and types, odd sizes, and NaN."""
    half = torch.bfloat16
    return (
        _sample(3, (17, 19), (9, 7), (3, 3), (1, 1, 1, 1)),
        _sample(1, (3, 63), (9, 8), (5, 5), (2, 2, 1, 1)),
        _sample(2, (63, 3), (16, 15), (3, 3), (2, 1, 1, 1), dtype=half),
        _sample(2, (6, 4), (11, 10), (3, 2), (2, 3, 2, 2), channels_last=False),
        _sample(2, (8, 8), (9, 9), (7, 7), (1, 3, 1, 8)),
        _sample(2, (32, 64), (32, 18), (3, 3), (1, 1, 1, 1), dtype=half, channels_last=False),
        _sample(3, (16, 80), (4, 4), (3, 3), (1, 1, 1, 1)),
        _sample(1, (36, 100), (1, 305), (1, 1)),
        _sample(2, (8, 8), (6, 6), (1, 1), (3, 0, 1, 1)),
        _sample(2, (8, 8), (5, 5), (3, 3), (1, 1, 1, 1), scale=float("nan")),
    )


register(
    Kernel(
        name="int8_forward",
        schema="(Tensor x, Tensor weight, Tensor x_scale, Tensor weight_scale, "
        "int[] out_size, int[] size, int[] kernel, int[] stride, int[] padding, int[] dilation, "
        "int groups, ScalarType dtype, bool channels_last) -> Tensor",
        reference=reference,
        fake=fake,
        emit_cpp=emit_cpp,
        samples=samples,
        emit_triton=emit_triton,
    )
)
