"""Terms of gradients that lie along what a forward product sums over.

Where a forward product takes some of its input channels, or features, only those have gradients:
a smaller problem, whose own sum can be sampled again.
"""

from abc import abstractmethod

import torch
from torch import Tensor

from codegen.dense import laid_out
from codegen.kernel import call, kernels, unavailable
from graphpass.pairs import (
    ChannelPairs,
    MatrixPairs,
    Pairs,
    PixelPairs,
    along,
    channels_of,
    exact,
    forward_of,
    geometry_of,
    scattered,
)
from graphpass.rows import as_maps
from graphpass.site import Gradient, Site


class Outer(Pairs):
    """Gradients of what a forward product takes: of its terms, those that were sampled forward.

    Sampled with the forward product's masses and draws, gradients are those of the sampled forward
    product: what it left out gets none. What is left is a smaller gradient, a sum over terms of its
    own (`terms`), which can be sampled again.
    """

    __slots__ = ()

    @property
    @abstractmethod
    def axis(self) -> int:
        """The axis of the result along which it has what the forward product sums over."""

    @abstractmethod
    def terms(self, index: Tensor) -> Pairs:
        """Return the terms of the gradient of what `index`, [1, R], names."""

    @abstractmethod
    def masked(self, weights: Tensor) -> Pairs:
        """Return the same of all, times `weights`, [1, n]: where those are 0, so is the result."""

    def sampled(self, index: Tensor, weight: Tensor | None, narrow: bool) -> Tensor:
        """Return the gradient of what is named; that of the others is zero."""
        del narrow
        part = self.part(index)
        if weight is not None:
            part = (part * along(weight, part.unsqueeze(0), self.axis + 1).squeeze(0)).to(
                part.dtype
            )
        return self.put(index, part)

    def part(self, index: Tensor) -> Tensor:
        """Return the exact gradient of what is named."""
        terms = self.terms(index)
        return exact(self.site, terms.template, *terms.operands)

    def put(self, index: Tensor, part: Tensor) -> Tensor:
        """Return zeros in the shape of the result, with a part of it in its place."""
        return scattered(self.template, self.axis, index.squeeze(0), part)

    def weighted(self, weights: Tensor) -> Tensor:
        """Return the exact gradient, weighted."""
        of = self.masked(torch.ones_like(weights))
        whole = exact(self.site, self.template, *of.operands)
        return whole * along(weights, whole[None], self.axis + 1)[0]

    def _template(self, index: Tensor) -> Tensor:
        size = list(self.template.shape)
        size[self.axis] = index.shape[1]
        return torch.empty((), dtype=self.template.dtype, device=self.template.device).expand(size)


class OuterChannels(Outer):
    """Input channels of a convolution. Operands: output gradient, input, weight."""

    __slots__ = ()

    @property
    def axis(self) -> int:
        """Channels of the input, or of the filters."""
        return 1

    def masses(self) -> Tensor:
        """Return the masses of the forward product: [1, Ci]."""
        _, x, weight = self.operands
        forward = forward_of(self.site)
        return ChannelPairs(forward, self.template, (x, weight)).masses()

    def terms(self, index: Tensor) -> Pairs:
        """Return output pixels, or output channels, with the named input channels."""
        grad, x, filters = self.operands
        if self.site.gradient is Gradient.WEIGHT:
            return PixelPairs(self.site, self._template(index), (grad, channels_of(x, index)))
        taken = laid_out(filters.index_select(1, index.squeeze(0)), filters)
        return ChannelPairs(self.site, self._template(index), (grad, taken))

    def part(self, index: Tensor) -> Tensor:
        """Return the exact gradient of the named input channels."""
        if self.site.gradient is not Gradient.WEIGHT:
            return Outer.part(self, index)
        grad, x, _ = self.operands
        conv = geometry_of(self.site)
        axes = map(list, (self.template.shape[2:], conv.stride, conv.padding, conv.dilation))
        result: Tensor = call(kernels()["listed_wgrad"], grad, x, index.squeeze(0), *axes)
        return result

    def masked(self, weights: Tensor) -> Pairs:
        """Return output pixels, or output channels, with weighted input channels."""
        grad, x, filters = self.operands
        if self.site.gradient is Gradient.WEIGHT:
            return PixelPairs(self.site, self.template, (grad, x * along(weights, x[None], 2)[0]))
        scaled = filters * along(weights, filters[None], 2)[0]
        return ChannelPairs(self.site, self.template, (grad, scaled))


class OuterFeatures(Outer):
    """Input features of a linear layer.

    Operands: the gradient's own factors, then those of the forward product.
    """

    __slots__ = ()

    @property
    def axis(self) -> int:
        """As found in the graph: the gradient or its transpose is computed there."""
        assert self.site.outer is not None, self.site.id
        return self.site.outer

    def masses(self) -> Tensor:
        """Return the masses of the forward product: [1, features]."""
        *_, left, right = self.operands
        return MatrixPairs(self.site, self.template, (left, right)).masses()

    def terms(self, index: Tensor) -> Pairs:
        """Return columns and rows, with the named features."""
        factors = list(self.operands[:2])
        factors[self.axis] = factors[self.axis].index_select(self.axis, index.squeeze(0))
        return MatrixPairs(self.site, self._template(index), (factors[0], factors[1]))

    def part(self, index: Tensor) -> Tensor:
        """Return the exact gradient of the named features."""
        if self.axis == 1:
            left, right, *_ = self.operands
            return of_columns(self.site, left, right, index.squeeze(0))
        return Outer.part(self, index)

    def masked(self, weights: Tensor) -> Pairs:
        """Return columns and rows, with weighted features."""
        factors = list(self.operands[:2])
        scaled = factors[self.axis]
        factors[self.axis] = scaled * along(weights, scaled[None], self.axis + 1)[0]
        return MatrixPairs(self.site, self.template, (factors[0], factors[1]))


def of_columns(site: Site, left: Tensor, right: Tensor, index: Tensor) -> Tensor:
    """Return the product of two matrices, of the right one the named columns: [M, R].

    Of an input gradient these are columns of a weight, few to gather.
    """
    if site.gradient is Gradient.WEIGHT:
        kernel, one, none = kernels()["listed_wgrad"], [1, 1], [0, 0]
        args = (as_maps(left.t()), as_maps(right), index, one, one, none, one)
        if unavailable(kernel, *args) is None:
            result: Tensor = kernel.op(*args)
            return result.flatten(1)
    return torch.mm(left, right.index_select(1, index))
