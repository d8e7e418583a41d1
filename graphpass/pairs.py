"""What column-row sampling samples: the terms that a product is a sum of.

A product is a sum over n terms, of which S independent products have n each (groups of a
convolution, matrices of a batch). What the terms are:

* `MatrixPairs`: column i of the left and row i of the right factor;
* `ChannelPairs`: channel i of a convolution's input, or output gradient, and of the weight;
* `PixelPairs`: an output pixel and the patch it looks at, of a convolution's weight gradient;
* `SamplePairs`: a sample of the batch, of either gradient;
* those of `graphpass.outer_pairs`: the part of either gradient that belongs to input channel i.

Each knows the norm of its terms (`masses`), the product of some terms with weights, as a smaller
dense product (`sampled`), and the product of all terms with weights, plainly (`weighted`). The
result with weights w is linear in them; terms of the last two touch different results or the same.
Letters: B batch, M rows, K contracted, N columns, Ci and Co channels, R terms taken.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from codegen.dense import laid_out
from codegen.kernel import call, kernels, unavailable
from graphpass.rows import as_maps, pixel_energy, rows_of, sampled, weighted
from graphpass.site import ConvGeometry, Gradient, Site

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Pairs(ABC):
    """The terms of one product.

    Attributes:
        site: the product.
        template: has shape, dtype and device of the result.
        operands: as the class reads them.
    """

    site: Site
    template: Tensor
    operands: tuple[Tensor, ...]

    @abstractmethod
    def masses(self) -> Tensor:
        """Return the norm of each term, or what stands for it: [S, n], float32 or wider."""

    @abstractmethod
    def sampled(self, index: Tensor, weight: Tensor | None, narrow: bool) -> Tensor:
        """Return the sum of the terms `index`, [S, R], times `weight`, [S, R] or None for 1."""

    @abstractmethod
    def weighted(self, weights: Tensor) -> Tensor:
        """Return the sum of all terms times `weights`, [S, n]."""

    def split(self, result: Tensor) -> Tensor:
        """Return the result by independent product: [S, values]."""
        return result.reshape(1, -1)

    def energies(self) -> Tensor:
        """Return the squared norm of every term: [S, n]; one term at a time."""
        unit = torch.eye(self.masses().shape[1], dtype=self.template.dtype)
        segments = self.masses().shape[0]
        parts = (self.weighted(row.expand(segments, -1)) for row in unit.to(self.template.device))
        return torch.stack([self.split(part).square().sum(1) for part in parts], dim=1)


class MatrixPairs(Pairs):
    """Left [M, K] times right [K, N], or a batch of those: pairs along K."""

    __slots__ = ()

    def masses(self) -> Tensor:
        """Return the products of the norms of columns and rows: [S, K]."""
        left, right = self._factors()
        return norm(left, (1,)) * norm(right, (2,))

    def sampled(self, index: Tensor, weight: Tensor | None, narrow: bool) -> Tensor:
        """Return the product of the named columns and rows, which are gathered on a CPU."""
        single = self.site.op in {"mm", "addmm"}
        on_gpu = self.template.device.type == "cuda"
        if single and on_gpu and self.site.gradient is Gradient.WEIGHT:
            # Few results and long sums, which only this kernel shares out among processors.
            pixels = PixelPairs(self.site, self.template, self.operands)
            return pixels.sampled(index, weight, narrow)
        left, right = self._factors()
        if single:
            # The forward product of images of a single pixel.
            kernel, one, none = kernels()["sampled_channels"], [1, 1], [0, 0]
            maps = map(as_maps, (left.squeeze(0), right.squeeze(0).t()))
            size = [*self.template.shape, 1, 1]
            args = (*maps, index, weight, size, one, none, one, 1, True)
            if unavailable(kernel, *args) is None:
                product: Tensor = kernel.op(*args).flatten(1)
                return product
        columns, rows = take(left, index, 2), take(right, index, 1)
        if weight is not None:
            columns = (columns * weight[:, None, :]).to(left.dtype)
        return torch.mm(columns[0], rows[0]) if single else torch.bmm(columns, rows)

    def weighted(self, weights: Tensor) -> Tensor:
        """Return the product of weighted columns and all rows."""
        left, right = self._factors()
        return torch.bmm(left * weights[:, None, :], right).view(self.template.shape)

    def split(self, result: Tensor) -> Tensor:
        """Return one matrix a row."""
        return result.reshape(self._factors()[0].shape[0], -1)

    def energies(self) -> Tensor:
        """Return the squared norms, which factor."""
        return self.masses().square()

    def _factors(self) -> tuple[Tensor, Tensor]:
        left, right = self.operands
        return (left.unsqueeze(0), right.unsqueeze(0)) if left.dim() == 2 else (left, right)


class ChannelPairs(Pairs):
    """A convolution's forward product (pairs along Ci) or input gradient (along Co), by group."""

    __slots__ = ()

    def masses(self) -> Tensor:
        """Return the products of the norms of channels and filters: [groups, channels]."""
        first, _ = self.operands
        filters, axis = self._filters()
        groups = filters.shape[0]
        others = tuple(at for at in range(1, filters.dim()) if at != axis)
        channels = norm(first, (0, *range(2, first.dim()))).view(groups, -1)
        return channels * norm(filters, others)

    def sampled(self, index: Tensor, weight: Tensor | None, narrow: bool) -> Tensor:
        """Return the convolution of the named channels."""
        del narrow
        conv = geometry_of(self.site)
        # A transposed convolution's forward product is an input gradient, and the other way round.
        forward = (self.site.gradient is Gradient.FORWARD) is not conv.transposed
        axes = map(list, (self.template.shape, conv.stride, conv.padding, conv.dilation))
        result: Tensor = call(
            kernels()["sampled_channels"],
            *self.operands,
            index,
            weight,
            *axes,
            conv.groups,
            forward,
        )
        return result

    def weighted(self, weights: Tensor) -> Tensor:
        """Return the convolution with all filters, weighted."""
        filters, axis = self._filters()
        scaled = (filters * along(weights, filters, axis)).flatten(0, 1)
        return self._convolve(self.operands[0], scaled)

    def split(self, result: Tensor) -> Tensor:
        """Return the results of a group a row."""
        groups = geometry_of(self.site).groups
        parts: Tensor = result.unflatten(1, (groups, -1)).movedim(1, 0).reshape(groups, -1)
        return parts

    def _filters(self) -> tuple[Tensor, int]:
        """Return the weight as [groups, ?, ?, *kernel], and the axis that is contracted."""
        conv = geometry_of(self.site)
        forward = self.site.gradient is Gradient.FORWARD
        # [Co, Ci / groups], or [Ci, Co / groups] of a transposed convolution
        axis = 2 if forward is not conv.transposed else 1
        return self.operands[1].unflatten(0, (conv.groups, -1)), axis

    def _convolve(self, first: Tensor, weight: Tensor) -> Tensor:
        if self.site.gradient is Gradient.FORWARD:
            return convolve(self.site, first, weight)
        return input_grad(self.site, first, weight, list(self.template.shape))


class PixelPairs(Pairs):
    """A convolution's weight gradient: output pixels of all samples, and the patches they see."""

    __slots__ = ()

    def masses(self) -> Tensor:
        """Return the products of the norms of pixels and patches: [1, pixels]."""
        return self.energies().sqrt()

    def sampled(self, index: Tensor, weight: Tensor | None, narrow: bool) -> Tensor:
        """Return the weight gradient of the named pixels."""
        rows = rows_of(self.site, *self.operands)
        taken, dtype = index.squeeze(0), wide(rows.grad)
        factors = torch.ones_like(taken, dtype=dtype) if weight is None else weight.squeeze(0)
        return sampled(rows, taken, factors.to(dtype), None, None, self.template, narrow)

    def weighted(self, weights: Tensor) -> Tensor:
        """Return the weight gradient of the weighted output gradient."""
        return weighted(rows_of(self.site, *self.operands), weights[0], None)

    def energies(self) -> Tensor:
        """Return the squared norms, which factor where there is one group."""
        first, second = (operand.to(wide(operand)) for operand in self.operands)
        return pixel_energy(rows_of(self.site, first, second), None).unsqueeze(0)


class SamplePairs(Pairs):
    """Samples of the batch: of a weight gradient's sum, or of an input gradient's result."""

    __slots__ = ()

    def masses(self) -> Tensor:
        """Return the norms of the samples, of both operands where both have them: [1, B]."""
        first, second = self.operands
        masses = norm(first, tuple(range(1, first.dim())))
        if self.site.gradient is Gradient.WEIGHT:
            masses = masses * norm(second, tuple(range(1, second.dim())))
        return masses[None]

    def sampled(self, index: Tensor, weight: Tensor | None, narrow: bool) -> Tensor:
        """Return the gradient of the named samples; those of others are zero."""
        del narrow
        first, second = self.operands
        part = laid_out(first.index_select(0, index[0]), first)
        if weight is not None:
            part = (part * along(weight, part[None], 1)[0]).to(first.dtype)
        if self.site.gradient is Gradient.WEIGHT:
            return self._product(part, laid_out(second.index_select(0, index[0]), second))
        return scattered(self.template, 0, index[0], self._product(part, second))

    def weighted(self, weights: Tensor) -> Tensor:
        """Return the gradient of the weighted output gradient."""
        first, second = self.operands
        return self._product(first * along(weights, first[None], 1)[0], second)

    def _product(self, first: Tensor, second: Tensor) -> Tensor:
        if self.site.conv is None:
            return torch.mm(first, second)
        if self.site.gradient is Gradient.WEIGHT:
            return weight_grad(self.site, first, second, list(self.template.shape))
        size = [first.shape[0], *self.template.shape[1:]]
        return input_grad(self.site, first, second, size)


def geometry_of(site: Site) -> ConvGeometry:
    """Return the geometry of a convolution."""
    assert site.conv is not None, site.id
    return site.conv


def forward_of(site: Site) -> Site:
    """Return the forward product that a gradient's site belongs to, as far as its name goes."""
    return replace(site, gradient=Gradient.FORWARD, number=1)


def wide(value: Tensor) -> torch.dtype:
    """Return float32, or the type of `value` if that is wider."""
    return torch.promote_types(value.dtype, torch.float32)


def norm(value: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Return the norm over some axes, float32 or wider."""
    result: Tensor = torch.linalg.vector_norm(value, dim=axes, dtype=wide(value))
    return result


def along(weights: Tensor, value: Tensor, axis: int) -> Tensor:
    """Return `weights`, [S, n], shaped to multiply `value`, [S, ..., n at `axis`, ...]."""
    shape = [1] * value.dim()
    shape[0], shape[axis] = weights.shape[0], weights.shape[1]
    return weights.view(shape)


def take(value: Tensor, index: Tensor, axis: int) -> Tensor:
    """Return what `index`, [S, R], names along `axis` of `value`, [S, ...]."""
    if isinstance(value.shape[0], int) and value.shape[0] == 1:
        return value.squeeze(0).index_select(axis - 1, index.squeeze(0)).unsqueeze(0)
    return torch.take_along_dim(value, along(index, value, axis), axis)


def channels_of(value: Tensor, index: Tensor) -> Tensor:
    """Return the channels that `index`, [groups, R], names in each group of [B, C, ...]."""
    groups = index.shape[0]
    first = torch.arange(groups, device=index.device).unsqueeze(1) * (value.shape[1] // groups)
    return laid_out(value.index_select(1, (index + first).flatten()), value)


def scattered(template: Tensor, axis: int, index: Tensor, part: Tensor) -> Tensor:
    """Return zeros in the template's shape with `part` added at `index` along `axis`."""
    zeros = torch.zeros(template.shape, dtype=part.dtype, device=part.device)
    return zeros.index_add(axis, index, part)


def placed(template: Tensor, axis: int, index: Tensor, part: Tensor) -> Tensor:
    """Return the same of numbers that are all different, read in the order of the result.

    Channels of an image are added up element by element: 128 images of 64 channels at 32x32 took
    3.5 times as long that way on a CPU, and reading fuses with what follows.
    """
    count, taken = template.shape[axis], torch.arange(index.shape[0], device=index.device)
    at = torch.zeros(count, dtype=torch.int64, device=index.device)
    there = at.bool().scatter(0, index, True)
    values = part.index_select(axis, at.scatter(0, index, taken))
    shape = [1] * part.dim()
    shape[axis] = -1
    return torch.where(there.view(shape), values, 0.0)


def exact(site: Site, template: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Return the exact product of two operands, of a linear layer or a convolution."""
    if site.conv is None:
        return torch.mm(first, second)
    if site.gradient is Gradient.FORWARD:
        return convolve(site, first, second)
    gradient = input_grad if site.gradient is Gradient.INPUT else weight_grad
    return gradient(site, first, second, list(template.shape))


def convolve(site: Site, x: Tensor, weight: Tensor) -> Tensor:
    """Return the forward product, whatever the number of channels."""
    conv = geometry_of(site)
    result: Tensor = aten.convolution(
        x, weight, None, conv.stride, conv.padding, conv.dilation, conv.transposed,
        conv.output_padding, conv.groups,
    )  # fmt: skip
    return result


def input_grad(site: Site, grad: Tensor, weight: Tensor, size: list[int]) -> Tensor:
    """Return the input gradient, of `size`."""
    # Only the shape of the missing operand is read; memory that is never touched costs nothing.
    return _backward(site, grad, _missing(size, grad), weight, 0)


def weight_grad(site: Site, grad: Tensor, x: Tensor, size: list[int]) -> Tensor:
    """Return the weight gradient, of `size`."""
    return _backward(site, grad, x, _missing(size, grad), 1)


def _missing(size: list[int], like: Tensor) -> Tensor:
    last = like.dim() == 4 and like.stride(1) == 1
    layout = torch.channels_last if last else torch.contiguous_format
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=layout)


def _backward(site: Site, grad: Tensor, x: Tensor, weight: Tensor, which: int) -> Tensor:
    conv: Any = geometry_of(site)
    result: Tensor = aten.convolution_backward(
        grad, x, weight, None, conv.stride, conv.padding, conv.dilation, conv.transposed,
        conv.output_padding, conv.groups, [which == 0, which == 1, False],
    )[which]  # fmt: skip
    return result
