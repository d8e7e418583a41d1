"""Products of 8-bit numbers in Triton: programs for the three products of a convolution."""

import math

import torch
from torch import Tensor

from codegen import int8
from codegen.gpu import products, weight_gradient
from codegen.gpu import source as gpu


def product(
    name: str,
    result: Tensor,
    operand: Tensor,
    scales: tuple[Tensor, Tensor],
    shape: list[int],
    border: tuple[list[int], list[int]],
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    *,
    forward: bool,
) -> gpu.Program | str:
    """Return the program of a forward product or an input gradient.

    Args:
        name: of the primitive.
        result: what it fills, meta.
        operand: bytes of the input or of the output gradient.
        scales: of both operands.
        shape: of the operand, without its border.
        border: of the operand, before and after.
        kernel: the kernel's spatial sizes.
        stride: one number a spatial axis.
        padding: one number a spatial axis.
        dilation: one number a spatial axis.
        groups: groups of channels.
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
            padding, dilation, groups, forward, torch.int8, int8.zero_point(operand.device),
        )
    )  # fmt: skip
    if isinstance(parts, str):
        return parts
    scratch = ", arranged" if parts.scratch else ""
    run = [
        f"def run(operand, weight, first_scale, second_scale, out{scratch}):",
        "    scales = first_scale, second_scale",
        *(f"    {line}" for line in parts.lines),
    ]
    about = gpu.about(name, result=result)
    return gpu.program(about, parts.constants, parts.text + "\n" + "\n".join(run), parts.scratch)


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
    """Return the program of a weight gradient; arguments as those of the primitive."""
    del x
    if not grad_scale.dtype == input_scale.dtype == torch.float32:
        return "the scales are no float32"
    layout = torch.channels_last if channels_last else torch.contiguous_format
    shape = (out_size[1], size[1] // groups, *kernel)
    result = torch.empty(shape, device="meta", memory_format=layout)
    axes = kernel, stride, padding, dilation
    grad_border = int8.grad_border(size[2:], out_size[2:], *axes)
    input_border = int8.input_border(size[2:], out_size[2:], *axes)
    _, high, wide, out_channels = int8.padded(out_size, *grad_border)
    _, height, width, channels = int8.padded(size, *input_border)
    grad_strides = (high * wide * out_channels, 1, wide * out_channels, out_channels)
    first = grad_border[0][0] * grad_strides[2] + grad_border[0][1] * grad_strides[3]
    x_strides = (height * width * channels, 1, width * channels, channels)
    corner = [padding[axis] - input_border[0][axis] for axis in range(2)]
    problem = weight_gradient.Problem(
        result, out_size, [size[0], channels, height, width], grad_strides, x_strides, first,
        kernel, stride, corner, dilation, groups, torch.int8, bordered=True,
        zero=int8.zero_point(grad.device),
    )  # fmt: skip
    parts = weight_gradient.emit(problem, math.prod(out_size) // out_size[1], weight_gradient.BYTES)
    if isinstance(parts, str):
        return parts
    run = [
        "def run(grad, x, grad_scale, input_scale, out, sums):",
        *(f"    {line}" for line in parts.lines),
    ]
    about = gpu.about("int8_wgrad", result=result)
    return gpu.program(about, parts.constants, parts.text + "\n" + "\n".join(run), parts.scratch)
