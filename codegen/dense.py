"""Products of convolutions in plain torch, by the vendor's library.

For kernels that have no C++, as a CPU is served best by this: their references are made of it, and
traced in their place. A linear layer is the case of a 1x1 kernel over 1x1 maps. Letters: B batch,
Ci and Co channels.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def product(
    operand: Tensor,
    weight: Tensor,
    size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    forward: bool,
) -> Tensor:
    """Return a forward product or an input gradient, laid out as the vendor does.

    Args:
        operand: the input [B, Ci, *in]; for an input gradient the output gradient [B, Co, *out].
        weight: [Co, Ci/groups, *kernel].
        size: of the result.
        stride: one number a spatial axis.
        padding: one number a spatial axis.
        dilation: one number a spatial axis.
        groups: groups of channels.
        forward: whether this is a forward product.
    """
    geometry: Any = (stride, padding, dilation, False, [0] * len(stride), groups)
    if forward:
        result: Tensor = aten.convolution(operand, weight, None, *geometry)
    else:
        # Of the missing operand, only the shape is read; memory never touched costs nothing.
        missing = empty(size, operand)
        mask = [True, False, False]
        result = aten.convolution_backward(operand, missing, weight, None, *geometry, mask)[0]
    return result


def weight_gradient(
    grad: Tensor,
    x: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """Return a weight gradient [Co, Ci/groups, *kernel], laid out as the vendor does."""
    missing = empty([grad.shape[1], x.shape[1] // groups, *kernel], x)
    result: Tensor = aten.convolution_backward(
        grad, x, missing, None, stride, padding, dilation, False, [0] * len(stride), groups,
        [False, True, False],
    )[1]  # fmt: skip
    return result


def empty(size: Sequence[int], like: Tensor) -> Tensor:
    """Return an uninitialised image, its channels contiguous if those of `like` are."""
    last = like.dim() == 4 and like.stride(1) == 1
    layout = torch.channels_last if last else torch.contiguous_format
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=layout)


def laid_out(part: Tensor, like: Tensor) -> Tensor:
    """Return `part` with the channels of an image contiguous if those of `like` are.

    A vendor's convolution of what is gathered is up to twice as fast for it, and copies if it must.
    """
    last = like.dim() == 4 and like.stride(1) == 1
    layout = torch.channels_last if last else torch.contiguous_format
    # Not `part.contiguous(...)`, which wants a device: a fake tensor may have none.
    if part.is_contiguous(memory_format=layout):
        return part
    return part.clone(memory_format=layout)


def returned(result: Tensor, like: Tensor) -> Tensor:
    """Return a result with the very strides that `empty` gives it; itself, as a rule."""
    wanted = empty(result.shape, like)
    if result.stride() == wanted.stride():
        return result
    return wanted.copy_(result)
