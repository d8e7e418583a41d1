"""Convolutions: FLOPs against a count of every multiplication and against torch, bytes too."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import sympy
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from cost_model import (
    ConvShape,
    Cost,
    Dim,
    Shape,
    convolution,
    convolution_input_grad,
    convolution_weight_grad,
)

aten = torch.ops.aten
FORMULAS = (convolution, convolution_input_grad, convolution_weight_grad)


@dataclass(frozen=True, slots=True)
class Case:
    """One call of `aten.convolution`; the tuples have one entry per spatial dimension."""

    x: tuple[int, ...]
    w: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    output_padding: tuple[int, ...]
    groups: int
    transposed: bool

    @property
    def settings(self) -> tuple[object, ...]:
        """The arguments after the bias, in the order both operators take them."""
        strides = (self.stride, self.padding, self.dilation)
        return (*strides, self.transposed, self.output_padding, self.groups)

    def tensors(self, device: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        """Return x, w, and a gradient of y's shape."""
        x, w = (torch.randn(s, device=device, dtype=dtype) for s in (self.x, self.w))
        return x, w, torch.randn_like(aten.convolution(x, w, None, *self.settings))

    def shape(self) -> ConvShape:
        """Return the record whose output shape torch computed."""
        x, w, y = (tuple(t.shape) for t in self.tensors("meta"))
        return ConvShape(x, w, y, self.groups, self.transposed)


def case(
    x: tuple[int, ...],
    w: tuple[int, ...],
    *,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    output_padding: int = 0,
    groups: int = 1,
    transposed: bool = False,
) -> Case:
    """Return a case with the same settings in every spatial dimension."""
    spatial = len(x) - 2
    return Case(
        x=x,
        w=w,
        stride=(stride,) * spatial,
        padding=(padding,) * spatial,
        dilation=(dilation,) * spatial,
        output_padding=(output_padding,) * spatial,
        groups=groups,
        transposed=transposed,
    )


CASES = {
    "1d": case((2, 3, 9), (4, 3, 3)),
    "2d": case((2, 3, 5, 4), (2, 3, 3, 2)),
    "3d": case((2, 2, 3, 4, 3), (3, 2, 2, 2, 2)),
    "batch_of_one": case((1, 3, 5, 5), (2, 3, 3, 3), padding=1),
    "pointwise": case((2, 3, 4, 4), (5, 3, 1, 1)),
    "strided": case((2, 3, 7, 6), (4, 3, 3, 3), stride=2),
    "strided_over_pixels": case((2, 3, 7, 6), (4, 3, 1, 1), stride=2),
    "padded": case((2, 3, 5, 5), (4, 3, 3, 3), padding=2),
    "dilated": case((2, 2, 7, 7), (3, 2, 3, 3), dilation=2, padding=1),
    "grouped": case((2, 4, 5, 5), (6, 2, 3, 3), groups=2, padding=1),
    "grouped_1d": case((1, 6, 7), (3, 2, 3), groups=3, stride=2),
    "depthwise": case((2, 3, 5, 5), (3, 1, 3, 3), groups=3, padding=1),
    "depthwise_multiplier": case((1, 3, 5, 5), (6, 1, 3, 3), groups=3, stride=2),
    "transposed": case((2, 3, 4, 4), (3, 2, 3, 3), stride=2, padding=1, transposed=True),
    "transposed_1d": case((1, 3, 5), (3, 2, 4), dilation=2, transposed=True),
    "transposed_3d": case((1, 2, 3, 2, 3), (2, 2, 2, 2, 2), stride=2, transposed=True),
    "transposed_output_padding": case(
        (2, 2, 3, 4), (2, 3, 3, 3), stride=2, padding=1, output_padding=1, transposed=True
    ),
    "transposed_grouped": case((2, 4, 3, 3), (4, 3, 2, 2), groups=2, stride=2, transposed=True),
    "transposed_depthwise": case((1, 3, 4, 4), (3, 1, 3, 3), groups=3, stride=2, transposed=True),
}
parametrize_cases = pytest.mark.parametrize("conv", CASES.values(), ids=CASES.keys())


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Small convolutions of every kind that produce at least one output."""
    spatial = draw(st.integers(1, 3))

    def per_dim(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(spatial))

    transposed = draw(st.booleans())
    groups, batch, outer, inner = (draw(st.integers(1, 4)) for _ in range(4))
    kernel, stride, dilation, padding = per_dim(1, 3), per_dim(1, 3), per_dim(1, 2), per_dim(0, 2)
    if transposed:
        channels = groups * outer
        # padding crops up to four positions, so five leave at least one
        size = per_dim(5, 8)
        # the operator wants output_padding below the stride or the dilation
        extra = tuple(
            draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)
        )
    else:
        channels = groups * inner
        # at least as large as the dilated kernel
        spare = per_dim(1, 7)
        size = tuple(s + d * (k - 1) for s, d, k in zip(spare, dilation, kernel, strict=True))
        extra = (0,) * spatial
    return Case(
        x=(batch, channels, *size),
        w=(groups * outer, inner, *kernel),
        stride=stride,
        padding=padding,
        dilation=dilation,
        output_padding=extra,
        groups=groups,
        transposed=transposed,
    )


def products(conv: Case, y: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], ...]]:
    """Yield the indices into x, w and y of every product the definition sums.

    With padding some indices lie outside x (outside y if transposed): those products are with
    zero, or are cropped. The dense algorithm computes them, and they count.

    A transposed convolution is written as the convolution from y to x, so that "outer" means the
    tensor whose positions are all visited, "inner" the one that a window slides over.
    """
    outer_shape, inner_shape = (conv.x, y) if conv.transposed else (y, conv.x)
    outer_channels = outer_shape[1] // conv.groups
    inner_channels = inner_shape[1] // conv.groups
    indices = (conv.x[0], conv.groups, outer_channels, inner_channels)
    for b, g, o, i in itertools.product(*map(range, indices)):
        for position in itertools.product(*map(range, outer_shape[2:])):
            for tap in itertools.product(*map(range, conv.w[2:])):
                steps = zip(position, conv.stride, tap, conv.dilation, conv.padding, strict=True)
                window = tuple(p * s + t * d - pad for p, s, t, d, pad in steps)
                outer = (b, g * outer_channels + o, *position)
                inner = (b, g * inner_channels + i, *window)
                w = (g * outer_channels + o, i, *tap)
                yield (outer, w, inner) if conv.transposed else (inner, w, outer)


def counted_flops(
    conv: Case, device: str = "meta", mask: tuple[bool, bool, bool] | None = None
) -> int:
    """Return torch's count for the convolution, or for the gradients selected by `mask`."""
    x, w, grad = conv.tensors(device)
    out_channels = grad.shape[1]
    with FlopCounterMode(display=False) as counter:
        if mask is None:
            aten.convolution(x, w, torch.empty(out_channels, device=device), *conv.settings)
        else:
            aten.convolution_backward(grad, x, w, [out_channels], *conv.settings, list(mask))
    return int(counter.get_total_flops())


@parametrize_cases
def test_flops_are_the_products_of_the_definition(conv: Case) -> None:
    """Sum every product by hand: that gives torch's results, and its length is the count.

    The count is independent of formula and counter, and the check of the results shows that the
    very same products, no fewer and no more, make up y, dx and dw.
    """
    x, w, grad = conv.tensors("cpu", torch.float64)
    y = aten.convolution(x, w, None, *conv.settings)
    dx, dw, _ = aten.convolution_backward(grad, x, w, None, *conv.settings, [True, True, False])

    flops = 0
    sum_y, sum_dx, sum_dw = torch.zeros_like(y), torch.zeros_like(x), torch.zeros_like(w)
    for at_x, at_w, at_y in products(conv, tuple(y.shape)):
        flops += 2
        if inside(at_x, x) and inside(at_y, y):
            sum_y[at_y] += x[at_x] * w[at_w]
            sum_dx[at_x] += grad[at_y] * w[at_w]
            sum_dw[at_w] += grad[at_y] * x[at_x]

    torch.testing.assert_close((sum_y, sum_dx, sum_dw), (y, dx, dw))
    for formula in FORMULAS:
        assert formula(conv.shape(), itemsize=8).flops == flops


def inside(index: tuple[int, ...], tensor: Tensor) -> bool:
    """Tell whether `index` is an element of `tensor`."""
    return all(0 <= i < size for i, size in zip(index, tensor.shape, strict=True))


@parametrize_cases
def test_flops_equal_torch_counter(conv: Case) -> None:
    """On real tensors, forward with a bias and each combination of gradients."""
    check_against_counter(conv, "cpu")


@given(cases())
def test_flops_equal_torch_counter_on_any_shape(conv: Case) -> None:
    """The same on shapes drawn at random, without computing them."""
    check_against_counter(conv, "meta")


def check_against_counter(conv: Case, device: str) -> None:
    """Compare forward, dx, dw, and both gradients in one call, each with and without a bias."""
    shape = conv.shape()
    forward, dx, dw = (int(formula(shape, itemsize=4).flops) for formula in FORMULAS)
    # The counter treats dw as a convolution of all input with all output channels. A grouped
    # convolution pairs channels only within a group, so it over-counts by the number of groups,
    # as test_flops_are_the_products_of_the_definition shows.
    counted_dw = conv.groups * dw

    assert counted_flops(conv, device) == forward
    for bias in (False, True):
        assert counted_flops(conv, device, (True, False, bias)) == dx
        assert counted_flops(conv, device, (False, True, bias)) == counted_dw
        assert counted_flops(conv, device, (True, True, bias)) == dx + counted_dw


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@parametrize_cases
def test_bytes_are_those_of_the_tensors(conv: Case, dtype: torch.dtype) -> None:
    """Every operand read once, every result written once."""
    x, w, y = conv.tensors("meta", dtype)
    shape, itemsize = conv.shape(), dtype.itemsize
    bias = torch.empty(y.shape[1], dtype=dtype, device="meta")

    expected = {
        convolution: ((x, w), y),
        convolution_input_grad: ((y, w), x),
        convolution_weight_grad: ((y, x), w),
    }
    for formula, (operands, result) in expected.items():
        cost = formula(shape, itemsize)
        assert cost.bytes_read == sum(t.nbytes for t in operands)
        assert cost.bytes_written == result.nbytes

    with_bias = convolution(shape, itemsize, bias_elements=bias.numel())
    assert with_bias == convolution(shape, itemsize) + Cost(0, bias.nbytes, 0)


@given(cases(), st.integers(1, 1000))
def test_symbolic_batch(conv: Case, batch: int) -> None:
    """Formulas written for a symbolic batch give, once it is known, the concrete ones."""
    symbol = sympy.Symbol("B", integer=True, positive=True)
    shape = conv.shape()

    def with_batch(size: Dim) -> ConvShape:
        x, y = (size, *shape.x[1:]), (size, *shape.y[1:])
        return ConvShape(x, shape.w, y, shape.groups, shape.transposed)

    for formula in FORMULAS:
        symbolic = formula(with_batch(symbol), itemsize=4)
        assert symbolic.flops.free_symbols == {symbol}
        assert symbolic.subs({symbol: batch}) == formula(with_batch(batch), itemsize=4)


@pytest.mark.parametrize(
    ("shapes", "groups", "transposed", "message"),
    [
        (((2, 3), (4, 3), (2, 4)), 1, False, "rank >= 3"),
        (((2, 3, 5, 5), (4, 3, 3), (2, 4, 3, 3)), 1, False, "one rank"),
        (((2, 3, 5), (4, 3, 3), (2, 4, 3, 3)), 1, False, "one rank"),
        (((2, 3, 5), (4, 3, 3), (2, 4, 3)), 0, False, "groups must be >= 1"),
        (((2, 3, -5), (4, 3, 3), (2, 4, 3)), 1, False, "dimensions must be >= 0"),
        (((2, 3, 5), (4, 3, 3), (1, 4, 3)), 1, False, "batch of x and y"),
        (((2, 3, 5), (4, 3, 3), (2, 5, 3)), 1, False, r"channels and w\[0\]"),
        (((2, 3, 5), (4, 2, 3), (2, 4, 3)), 1, False, r"channels and groups \* w\[1\]"),
        (((2, 4, 5), (3, 2, 3), (2, 3, 3)), 2, False, r"w\[0\] and a multiple of groups"),
        (((2, 4, 5), (3, 4, 3), (2, 3, 3)), 1, True, r"channels and w\[0\]"),
    ],
)
def test_impossible_shapes_are_rejected(
    shapes: tuple[Shape, Shape, Shape], groups: int, transposed: bool, message: str
) -> None:
    """The message says what disagrees and shows the shapes."""
    with pytest.raises(ValueError, match=message) as error:
        ConvShape(*shapes, groups, transposed)
    assert str(shapes[0]) in str(error.value)


def test_symbolic_shapes_are_rejected_only_if_provably_wrong() -> None:
    """Two symbols may turn out equal; a symbol and its successor may not."""
    a, b = sympy.symbols("a b", integer=True, positive=True)
    assert ConvShape((a, 3, 5), (4, 3, 3), (b, 4, 3)).flops == 2 * b * 3 * 4 * 3 * 3
    with pytest.raises(ValueError, match="batch of x and y"):
        ConvShape((a, 3, 5), (4, 3, 3), (a + 1, 4, 3))
