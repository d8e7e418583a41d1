"""Listed wgrad: the weight gradient of a convolution for some of its input channels.

    dw[:, r] = g (outer) patch(x[:, index[r]]), summed over pixels

On a GPU the list is followed where inputs are read. On a CPU the listed channels are gathered, and
the vendor's library multiplies them. Channels may be repeated. A linear layer is the case of a 1x1
kernel on 1x1 maps. Letters: B batch, Ci and Co channels, R channels listed.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from codegen import dense
from codegen.gpu import direct
from codegen.gpu import source as gpu
from codegen.gpu.weight_gradient import Form
from codegen.kernel import Kernel, Sample, register


def reference(
    grad: Tensor,
    x: Tensor,
    index: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> Tensor:
    """Return the weight gradient.

    Args:
        grad: [B, Co, *out].
        x: [B, Ci, *in].
        index: int64 [R], numbers of input channels.
        kernel: the kernel's spatial sizes.
        stride: one number a spatial axis.
        padding: one number a spatial axis.
        dilation: one number a spatial axis.

    Returns:
        dw [Co, R, *kernel], laid out in memory as x is.
    """
    listed = dense.laid_out(x.index_select(1, index), x)
    dw = dense.weight_gradient(grad, listed, kernel, stride, padding, dilation, 1)
    return dense.returned(dw, x)


def fake(
    grad: Tensor,
    x: Tensor,
    index: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> Tensor:
    """Return an uninitialised weight gradient."""
    del stride, padding, dilation
    return dense.empty([grad.shape[1], index.shape[0], *kernel], x)


def emit_triton(
    grad: Tensor,
    x: Tensor,
    index: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> gpu.Program | str:
    """Return the Triton for convolutions of two spatial axes."""
    result = fake(grad.to("meta"), x.to("meta"), index, kernel, stride, padding, dilation)
    form = Form(_TEXT, ("index",), channels=_CHANNELS)
    return direct.weight_gradient_program(
        "listed_wgrad", grad, x, result, stride, padding, dilation, 1, form, {"IS": index.stride(0)}
    )


_TEXT = """
@triton.jit
def pixel_of(number, inside, index):
    return number.to(INDEX)


@triton.jit
def left_of(at, mask, number, inside, index):
    return tl.load(at, mask=mask, other=0.0)


@triton.jit
def right_of(at, mask, channel, index):
    return tl.load(at, mask=mask, other=0.0)


@triton.jit
def finished(sum, o, tap, channel, inside):
    return sum

"""

_CHANNELS = """
@triton.jit
def channel_of(column, group, index):
    return tl.load(index + column % CG * IS).to(INDEX)

"""


def _sample(
    batch: int,
    channels: tuple[int, int],
    size: tuple[int, int],
    kernel: tuple[int, int],
    geometry: tuple[int, int, int] = (1, 0, 1),
    count: int = 5,
    *,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.channels_last,
) -> Sample:
    """Return a problem; `geometry` is stride, padding and dilation."""
    (in_channels, out_channels), (stride, padding, dilation) = channels, geometry
    out = [
        (side + 2 * padding - dilation * (taps - 1) - 1) // stride + 1
        for side, taps in zip(size, kernel, strict=True)
    ]

    def args() -> tuple[Any, ...]:
        random = torch.Generator().manual_seed(batch)
        x = torch.randn(batch, in_channels, *size, generator=random)
        grad = torch.randn(batch, out_channels, *out, generator=random)
        grad, x = (tensor.to(dtype, memory_format=memory_format) for tensor in (grad, x))
        index = torch.randint(in_channels, (count,), generator=random)
        return grad, x, index, list(kernel), [stride] * 2, [padding] * 2, [dilation] * 2

    return Sample(args, length=batch * math.prod(out))


def _with(sample: Sample, change: Callable[..., tuple[Any, ...]]) -> Sample:
    """Return the sample with its first three arguments changed."""

    def args() -> tuple[Any, ...]:
        grad, x, index, *rest = sample.args()
        return *change(grad, x, index), *rest

    return Sample(args, sample.length)


def _others_nan(grad: Tensor, x: Tensor, index: Tensor) -> tuple[Tensor, ...]:
    """Make NaN of the channels that are not listed."""
    others = sorted(set(range(x.shape[1])) - set(index.tolist()))
    return grad, x.index_fill(1, torch.tensor(others), torch.nan), index


def samples() -> tuple[Sample, ...]:
    """Return convolutions of every geometry, in both layouts and types, and odd sizes."""
    nchw, half = torch.contiguous_format, torch.bfloat16
    plain = _sample(2, (17, 19), (5, 4), (3, 3), (1, 1, 1), 9)
    return (
        plain,
        _sample(2, (1, 1), (5, 5), (1, 1), count=1),
        _sample(1, (63, 3), (7, 6), (5, 5), (2, 2, 1), 32),
        _sample(2, (6, 4), (9, 8), (3, 2), (2, 3, 2), 3, memory_format=nchw),
        _sample(2, (8, 8), (5, 5), (7, 7), (1, 3, 1), 4, dtype=half),
        _sample(3, (40, 5), (4, 5), (3, 3), (1, 1, 1), 16, dtype=half, memory_format=nchw),
        # A linear layer.
        _sample(70, (20, 17), (1, 1), (1, 1), count=11),
        _with(plain, _others_nan),
        # What a sum over the output hands back: one value, expanded.
        _with(
            plain, lambda g, x, i: (g[:, :1, :1, :1].expand(g.shape), x[:, :1].expand(x.shape), i)
        ),
        _with(plain, lambda g, x, i: (g.flip(2), x.mT.contiguous().mT, i[:1].expand(9))),
    )


register(
    Kernel(
        name="listed_wgrad",
        schema="(Tensor grad, Tensor x, Tensor index, int[] kernel, int[] stride, int[] padding, "
        "int[] dilation) -> Tensor",
        reference=reference,
        fake=fake,
        samples=samples,
        emit_triton=emit_triton,
    )
)
