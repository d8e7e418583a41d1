"""Sampled channels: a forward product or an input gradient from some of the contracted channels.

    result = sum_r factor[r] * (what channel index[r] of the operand contributes)

A forward product sums over the input's channels, an input gradient over the output gradient's; in
each group of a convolution, R of them are given. On a GPU both operands are read where they lie:
the list is followed where channels are read, and factors are multiplied into the weights as these
are put in order. On a CPU, what is listed is gathered, and the vendor's library multiplies it: a
smaller dense product. Channels may be repeated. A linear layer is the case of a 1x1 kernel on 1x1
maps. Letters: B batch, Ci and Co channels.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from codegen import dense
from codegen.gpu import direct, products
from codegen.gpu import source as gpu
from codegen.kernel import Kernel, Sample, register


def reference(
    operand: Tensor,
    weight: Tensor,
    index: Tensor,
    factors: Tensor | None,
    size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    forward: bool,
) -> Tensor:
    """Return the product over the named channels.

    Args:
        operand: the input [B, Ci, *in]; for an input gradient the output gradient [B, Co, *out].
        weight: [Co, Ci/groups, *kernel].
        index: int64 [groups, R], numbers of contracted channels within their group.
        factors: float32 [groups, R]; None for 1.
        size: of the result, [B, Co, *out] or [B, Ci, *in].
        stride: one number a spatial axis.
        padding: one number a spatial axis.
        dilation: one number a spatial axis.
        groups: groups of channels.
        forward: whether this is a forward product, not an input gradient.

    Returns:
        The product, laid out in memory as the operand is.
    """
    own = operand.shape[1] // groups
    first = torch.arange(groups, device=index.device).unsqueeze(1) * own
    channels = operand.index_select(1, (index + first).flatten())
    # [groups, Co/groups, Ci/groups, *kernel], contracted along `axis`
    axis = 2 if forward else 1
    filters = weight.unflatten(0, (groups, -1))
    shape = [1] * filters.dim()
    shape[0], shape[axis] = groups, -1
    if groups == 1:
        taken = weight.index_select(axis - 1, index.squeeze(0)).unsqueeze(0)
    else:
        taken = torch.take_along_dim(filters, index.view(shape), axis)
    if factors is not None:
        # The smaller operand is weighted.
        taken = (taken * factors.view(shape)).to(weight.dtype)
    channels = dense.laid_out(channels, operand)
    taken = dense.laid_out(taken.flatten(0, 1), weight)
    axes = (size, stride, padding, dilation)
    result = dense.product(channels, taken, *axes, groups, forward)
    return dense.returned(result, operand)


def fake(
    operand: Tensor,
    weight: Tensor,
    index: Tensor,
    factors: Tensor | None,
    size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    forward: bool,
) -> Tensor:
    """Return an uninitialised product."""
    del weight, index, factors, stride, padding, dilation, groups, forward
    return dense.empty(size, operand)


def emit_triton(
    operand: Tensor,
    weight: Tensor,
    index: Tensor,
    factors: Tensor | None,
    size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    forward: bool,
) -> gpu.Program | str:
    """Return the Triton for convolutions of two spatial axes."""
    if factors is not None and factors.dtype != torch.float32:
        return "the factors are not float32"
    names = ("index", "factors") if factors is not None else ("index",)
    given = "".join(f", {name}" for name in names)
    text = _TEXT + (_WEIGHTED if factors is not None else _PLAIN)
    form = products.Form(text.replace(", TENSORS", given), ("index",), names)
    steps = (0, 0) if factors is None else factors.stride()
    constants = dict(zip(("IS0", "IS1", "FS0", "FS1"), (*index.stride(), *steps), strict=True))
    return direct.product_program(
        "sampled_channels", operand, weight, dense.empty(size, operand.to("meta")), stride, padding,
        dilation, groups, form, forward=forward, taken=int(index.shape[1]), constants=constants,
    )  # fmt: skip


_TEXT = """
@triton.jit
def channel_of(number, group, inside, index):
    return tl.load(index + group * IS0 + number * IS1, mask=inside, other=0).to(INDEX)


@triton.jit
def filter_of(at, number, group, inside, TENSORS):
    channel = tl.load(index + group * IS0 + number * IS1, mask=inside, other=0)
    value = tl.load(at + channel * W_K, mask=inside)
"""

_WEIGHTED = """\
    factor = tl.load(factors + group * FS0 + number * FS1, mask=inside)
    return (value.to(tl.float32) * factor).to(value.dtype)

"""

_PLAIN = """\
    return value

"""


def _sample(
    batch: int,
    channels: tuple[int, int],
    size: tuple[int, int],
    kernel: tuple[int, int],
    geometry: tuple[int, int, int, int] = (1, 0, 1, 1),
    count: int = 5,
    *,
    forward: bool = True,
    weighted: bool = True,
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
        random = torch.Generator().manual_seed(batch + count)
        shapes = ([batch, in_channels, *size], [batch, out_channels, *out])
        given, wanted = shapes if forward else reversed(shapes)
        operand = torch.randn(given, generator=random)
        weight = torch.randn(out_channels, in_channels // groups, *kernel, generator=random)
        operand, weight = (x.to(dtype, memory_format=memory_format) for x in (operand, weight))
        index = torch.randint(given[1] // groups, (groups, count), generator=random)
        factors = torch.rand(groups, count, generator=random) if weighted else None
        axes = [[stride] * 2, [padding] * 2, [dilation] * 2]
        return operand, weight, index, factors, wanted, *axes, groups, forward

    return Sample(args, length=count * math.prod(kernel))


def _with(sample: Sample, change: Callable[..., tuple[Any, ...]]) -> Sample:
    """Return the sample with its first four arguments changed."""

    def args() -> tuple[Any, ...]:
        operand, weight, index, factors, *rest = sample.args()
        return *change(operand, weight, index, factors), *rest

    return Sample(args, sample.length)


def _others_nan(x: Tensor, w: Tensor, index: Tensor, factors: Tensor) -> tuple[Any, ...]:
    """Make NaN of channels that are not listed, and of the weights that belong to them."""
    x, w = x.clone(), w.clone()
    for channel in set(range(x.shape[1])) - set(index.flatten().tolist()):
        x[:, channel], w[:, channel] = torch.nan, torch.nan
    return x, w, index, factors


def samples() -> tuple[Sample, ...]:
    """Return both products of every geometry, in both layouts and types, and odd sizes."""
    nchw, half = torch.contiguous_format, torch.bfloat16
    plain = _sample(2, (17, 19), (5, 4), (3, 3), (1, 1, 1, 1), 9)
    back = _sample(2, (19, 17), (5, 4), (3, 3), (1, 1, 1, 1), 9, forward=False)
    return (
        plain,
        back,
        _sample(1, (1, 3), (5, 5), (1, 1), count=1),
        _sample(1, (63, 3), (7, 6), (5, 5), (2, 2, 1, 1), 20, weighted=False),
        _sample(1, (3, 63), (7, 6), (5, 5), (2, 2, 1, 1), 20, forward=False),
        _sample(2, (6, 4), (9, 8), (3, 2), (2, 3, 2, 2), 2, memory_format=nchw),
        _sample(2, (6, 4), (9, 8), (3, 2), (2, 3, 2, 2), 1, forward=False, memory_format=nchw),
        _sample(1, (8, 8), (4, 4), (7, 7), (1, 3, 1, 2), 2),
        _sample(2, (33, 16), (6, 6), (3, 3), (1, 1, 1, 1), 32, dtype=half),
        _sample(2, (32, 48), (4, 4), (1, 1), (2, 0, 1, 1), 16, forward=False, dtype=half),
        _sample(2, (4, 40), (4, 5), (3, 3), (1, 1, 1, 1), 7, dtype=half, memory_format=nchw),
        # A linear layer.
        _sample(20, (70, 17), (1, 1), (1, 1), count=33),
        _with(plain, _others_nan),
        _with(plain, lambda x, w, i, f: (x.flip(3).mT.contiguous().mT, w.mT.contiguous().mT, i, f)),
        # What a sum over the output hands back: one value, expanded.
        _with(
            back, lambda g, w, i, f: (g[:, :1, :1, :1].expand(g.shape), w, i, f[:, :1].expand_as(f))
        ),
    )


register(
    Kernel(
        name="sampled_channels",
        schema="(Tensor operand, Tensor weight, Tensor index, Tensor? factors, int[] size, "
        "int[] stride, int[] padding, int[] dilation, int groups, bool forward) -> Tensor",
        reference=reference,
        fake=fake,
        samples=samples,
        emit_triton=emit_triton,
    )
)
