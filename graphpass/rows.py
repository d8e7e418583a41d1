"""The weight gradient as a sum over rows: output pixels, or the rows of a linear layer.

What methods that sample rows have in common. A linear layer is a convolution with a 1x1 kernel over
1x1 maps. Letters: B batch, Ci and Co channels; a row is a pixel of a sample, flat number
b * OH * OW + p.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from codegen.kernel import call, kernels
from cost_model import Cost, Dim, KernelCost, Shape, element_count, reduce
from graphpass.kernels_of import mover, product
from graphpass.site import Site

aten = torch.ops.aten

# A mean over this many samples, and pixels, is as good a centre as the mean over all.
_SAMPLES = 16
_PIXELS = 8192


@dataclass(frozen=True, slots=True)
class Rows:
    """The operands of a weight gradient, and its geometry.

    Attributes:
        grad: [B, Co, *out].
        x: [B, Ci, *in].
        kernel: the kernel's spatial sizes.
        stride: one number a spatial axis.
        padding: one number a spatial axis.
        dilation: one number a spatial axis.
        groups: groups of channels.
    """

    grad: Tensor
    x: Tensor
    kernel: list[int]
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int

    @property
    def geometry(self) -> tuple[list[int], ...]:
        """Input sizes, kernel, stride, padding and dilation."""
        return list(self.x.shape[2:]), self.kernel, self.stride, self.padding, self.dilation


def rows_of(site: Site, first: Tensor, second: Tensor) -> Rows:
    """Return the rows of a site.

    Args:
        site: the weight gradient of a convolution or of a linear layer.
        first: grad [B, Co, *out], or left [N, M].
        second: x [B, Ci, *in], or right [M, K].
    """
    conv = site.conv
    if conv is None:
        one, none = [1, 1], [0, 0]
        return Rows(as_maps(first.t()), as_maps(second), one, one, none, one, 1)
    kernel, stride = list(site.output[2:]), list(conv.stride)
    return Rows(first, second, kernel, stride, list(conv.padding), list(conv.dilation), conv.groups)


def as_maps(matrix: Tensor) -> Tensor:
    """Return the rows of a matrix [M, K] as images [M, K, 1, 1] of a single pixel."""
    # Not `matrix[..., None, None]`: Python's indexing wants a device, as below.
    return matrix.unsqueeze(-1).unsqueeze(-1)


def sampled_cost(site: Site, taken: Dim, channels: Dim, inputs: Shape) -> KernelCost:
    """Return the cost of the product over `taken` rows of `channels` output channels.

    It reads what is taken of g, and all of x, as the windows overlap; one FMA for each pair.
    """
    cost = Cost(
        2 * taken * element_count(site.output),
        (taken * channels + element_count(inputs)) * site.itemsize,
        element_count(site.output) * site.itemsize,
    )
    return product(site, "sampled_wgrad", cost, rows=taken)


def centre_cost(site: Site, inputs: Shape) -> KernelCost:
    """Return the cost of the channel means of x, [B, Ci, ...], over a part of the samples."""
    batch, pixels = inputs[0], element_count(inputs[2:])
    step = _step(batch, pixels)
    read = -(-batch // step) * element_count(inputs[1:])
    return mover("reduce", reduce(read, inputs[1], site.itemsize), site.dtype)


def channel_means(x: Tensor) -> Tensor:
    """Return the mean of every channel over a fixed part of the samples: [Ci], float32 or wider."""
    step = _step(x.shape[0], math.prod(x.shape[2:]))
    wide = torch.promote_types(x.dtype, torch.float32)
    # Not `x[::step]`: Python's indexing wants a device, and a fake tensor may have none.
    part: Tensor = torch.ops.aten.slice.Tensor(x, 0, 0, None, step)
    return part.mean((0, *range(2, x.dim())), dtype=wide)


def _step(batch: Dim, pixels: Dim) -> int:
    """Return which samples the channel means are taken over: every how many; all if not known."""
    if isinstance(batch, int) and isinstance(pixels, int):
        return max(1, min(batch // _SAMPLES, batch * pixels // _PIXELS))
    return 1


def sampled(
    rows: Rows,
    index: Tensor,
    weight: Tensor,
    center: Tensor | None,
    sums: Tensor | None,
    template: Tensor,
    narrow: bool = False,
) -> Tensor:
    """Return the weight gradient of the rows that are named, in the template's shape.

    Args:
        rows: the operands.
        index: [R], numbers of rows.
        weight: [R].
        center: [Ci], what is subtracted from x; None for nothing.
        sums: [Co, *kernel], sums of the gradient by tap, for the centre's own share.
        template: has the shape of the result.
        narrow: whether what is multiplied may be rounded to bfloat16.
    """
    tail = (rows.kernel, rows.stride, rows.padding, rows.dilation, rows.groups, narrow)
    dw: Tensor = call(
        kernels()["sampled_wgrad"], rows.grad, rows.x, index, weight, center, sums, *tail
    )
    return dw.reshape(template.shape)


def weighted(rows: Rows, weights: Tensor, center: Tensor | None) -> Tensor:
    """Return the exact weight gradient of the weighted output gradient and x less its centre.

    Args:
        rows: the operands.
        weights: one number a row; zero for those that are left out.
        center: [Ci] or None.
    """
    factors = weights.view(rows.grad.shape[0], 1, *rows.grad.shape[2:])
    x = rows.x if center is None else rows.x - _per_channel(rows, center)
    return _weight_grad(rows, rows.grad * factors, x)


def centre_share(rows: Rows, center: Tensor) -> Tensor:
    """Return the exact weight gradient for an input that is `center`, [Ci], everywhere."""
    return _weight_grad(rows, rows.grad, _per_channel(rows, center).expand(rows.x.shape))


def pixel_energy(rows: Rows, center: Tensor | None, block: int = 1) -> Tensor:
    """Return |sum of g (outer) patch|^2 over each block of rows: [rows / block].

    Args:
        rows: the operands.
        center: [Ci], subtracted from x inside the image; None for nothing.
        block: neighbouring rows that are summed.
    """
    x = rows.x if center is None else rows.x - _per_channel(rows, center)
    groups = rows.groups
    if block == 1:
        inputs = x.square().unflatten(1, (groups, -1)).sum(2)
        ones = torch.ones(groups, 1, *rows.kernel, dtype=x.dtype, device=x.device)
        none = [0] * len(rows.kernel)
        seen = aten.convolution(
            inputs, ones, None, rows.stride, rows.padding, rows.dilation, False, none, groups
        )
        energy: Tensor = (rows.grad.square().unflatten(1, (groups, -1)).sum(2) * seen).sum(1)
        return energy.flatten()
    patches = torch.nn.functional.unfold(
        x, tuple(rows.kernel), tuple(rows.dilation), tuple(rows.padding), tuple(rows.stride)
    )  # [B, Ci * taps, positions]
    # Blocks may span samples of one pixel, as the rows of a linear layer are.
    left, right = (
        part.unflatten(1, (groups, -1)).movedim(3, 1).flatten(0, 1).unflatten(0, (-1, block))
        for part in (rows.grad.flatten(2), patches)
    )
    grams = (torch.einsum("nigc,njgc->ngij", part, part) for part in (left, right))
    return torch.mul(*grams).sum((1, 2, 3))


def _per_channel(rows: Rows, values: Tensor) -> Tensor:
    return values.to(rows.x.dtype).view(1, -1, *([1] * (rows.x.dim() - 2)))


def _weight_grad(rows: Rows, grad: Tensor, x: Tensor) -> Tensor:
    shape = (grad.shape[1], x.shape[1] // rows.groups, *rows.kernel)
    missing = torch.empty(shape, dtype=x.dtype, device=x.device)
    # A convolution's three products are computed by one operator; the mask asks for dw alone.
    dw: Tensor = aten.convolution_backward(
        grad, x, missing, None, rows.stride, rows.padding, rows.dilation, False,
        [0] * len(rows.kernel), rows.groups, [False, True, False],
    )[1]  # fmt: skip
    return dw
