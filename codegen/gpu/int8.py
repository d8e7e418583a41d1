"""Products of 8-bit numbers in Triton, integers or floats: the three of a convolution."""

import math

import torch
from torch import Tensor

from codegen import int8
from codegen.gpu import products
from codegen.gpu import source as gpu
from codegen.gpu import weight_gradient as gradients

_INTEGERS = (torch.int8, torch.int8)


def product(
    name: str,
    result: Tensor,
    scales: tuple[Tensor, Tensor],
    shape: list[int],
    border: tuple[list[int], list[int]],
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    stored: tuple[torch.dtype, torch.dtype] = _INTEGERS,
    *,
    forward: bool,
) -> gpu.Program | str:
    """Return the program of a forward product or an input gradient.

    Args:
        name: of the primitive.
        result: what it fills, meta.
        scales: of both operands.
        shape: of the operand, without its border.
        border: of the operand, before and after.
        kernel: the kernel's spatial sizes.
        stride: one number a spatial axis.
        padding: one number a spatial axis.
        dilation: one number a spatial axis.
        groups: groups of channels.
        stored: what the bytes of both operands are.
        forward: whether this is a forward product.
    """
    reason = gpu.unsupported(result)
    if reason is not None or any(scale.dtype != torch.float32 for scale in scales):
        return reason or "the scales are no float32"
    _, height, width, contracted = int8.padded(shape, *border)
    depth = (shape[1] if forward else result.shape[1]) // groups
    # The weight's bytes are [Co, KH, KW, Ci/groups].
    weight_strides = (math.prod(kernel) * depth, 1, kernel[1] * depth, depth)
    parts = products.emit(
        products.Product(
            result, contracted, (height, width), border[0], weight_strides, kernel, stride,
            padding, dilation, groups, forward, *stored, zero=_zero(scales[0], stored[0]),
        )
    )  # fmt: skip
    if isinstance(parts, str):
        return parts
    head = "operand, weight, first_scale, second_scale, out"
    return _program(name, result, parts, head, "scales = first_scale, second_scale")


def weight_gradient(
    name: str,
    result: Tensor,
    scales: tuple[Tensor, Tensor],
    out_size: list[int],
    size: list[int],
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    stored: tuple[torch.dtype, torch.dtype] = _INTEGERS,
) -> gpu.Program | str:
    """Return the program of a weight gradient.

    Args:
        name: of the primitive.
        result: what it fills, meta.
        scales: of output gradient and input.
        out_size: of the output gradient, without its border.
        size: of the input, likewise.
        kernel: the kernel's spatial sizes.
        stride: one number a spatial axis.
        padding: one number a spatial axis.
        dilation: one number a spatial axis.
        groups: groups of channels.
        stored: what the bytes of output gradient and input are.
    """
    if any(scale.dtype != torch.float32 for scale in scales):
        return "the scales are no float32"
    axes = kernel, stride, padding, dilation
    grad_border = int8.grad_border(size[2:], out_size[2:], *axes)
    input_border = int8.input_border(size[2:], out_size[2:], *axes)
    _, high, wide, out_channels = int8.padded(out_size, *grad_border)
    _, height, width, channels = int8.padded(size, *input_border)
    grad_strides = (high * wide * out_channels, 1, wide * out_channels, out_channels)
    first = grad_border[0][0] * grad_strides[2] + grad_border[0][1] * grad_strides[3]
    x_strides = (height * width * channels, 1, width * channels, channels)
    corner = [padding[axis] - input_border[0][axis] for axis in range(2)]
    problem = gradients.Problem(
        result, out_size, [size[0], channels, height, width], grad_strides, x_strides, first,
        kernel, stride, corner, dilation, groups, *stored, bordered=True,
        zero=_zero(scales[0], stored[0]),
    )  # fmt: skip
    parts = gradients.emit(problem, math.prod(out_size) // out_size[1], gradients.BYTES)
    if isinstance(parts, str):
        return parts
    return _program(name, result, parts, "grad, x, grad_scale, input_scale, out")


def weight_gradient_program(
    grad: Tensor,
    x: Tensor,
    grad_scale: Tensor,
    input_scale: Tensor,
    out_size: list[int],
    size: list[int],
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    channels_last: bool,
) -> gpu.Program | str:
    """Return the program of `int8_wgrad`; arguments as those of the primitive."""
    del grad, x
    layout = torch.channels_last if channels_last else torch.contiguous_format
    shape = (out_size[1], size[1] // groups, *kernel)
    result = torch.empty(shape, device="meta", memory_format=layout)
    return weight_gradient(
        "int8_wgrad", result, (grad_scale, input_scale), out_size, size, kernel, stride, padding,
        dilation, groups,
    )  # fmt: skip


def _program(
    name: str, result: Tensor, parts: gpu.Parts, arguments: str, *lines: str
) -> gpu.Program:
    given = ", ".join((arguments, *parts.memory))
    run = [f"def run({given}):", *(f"    {line}" for line in (*lines, *parts.lines))]
    about = gpu.about(name, result=result)
    text, memory = parts.text + "\n" + "\n".join(run), tuple(parts.memory.values())
    return gpu.program(about, parts.constants, text, memory)


def _zero(scale: Tensor, stored: torch.dtype) -> int:
    """Return the byte that stands for 0."""
    return int8.zero_point(scale.device) if stored is torch.int8 else 0
