"""Phase wgrad: a convolution's weight gradient from one phase of its output pixels.

    dw = down * across * sum_(pixels of the phase) g[b, :, p] (outer) patch(x - center)[b, p]
       + sums (outer) center

`codegen.phases` says which pixels those are, and `sampled_wgrad` what centre and sums are about.
The phase is a number in memory: no kernel is made for each, and no list of pixels. A CPU has no
kernel of its own for it: `sampled_wgrad` on a list of pixels, which takes no time to make beside
the product. Letters: B batch, Ci and Co channels.
"""

from typing import Any

import torch
from torch import Tensor

from codegen import phases
from codegen.gpu.sampled import phase_gradient_program as emit_triton
from codegen.kernel import Kernel, Sample, register
from codegen.kernels import sampled_wgrad


def reference(
    grad: Tensor,
    x: Tensor,
    phase: Tensor,
    center: Tensor | None,
    sums: Tensor | None,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    down: int,
    across: int,
    staggered: bool,
) -> Tensor:
    """Return the weight gradient of a phase, scaled to that of all pixels.

    Args:
        grad: [B, Co, OH, OW].
        x: [B, Ci, IH, IW].
        phase: int64 [1], below down * across.
        center: float32 [Ci]; None for zero.
        sums: float32 [Co, *kernel]; None to leave the centre's own share out.
        kernel: the kernel's spatial sizes.
        stride: one number a spatial axis.
        padding: one number a spatial axis.
        dilation: one number a spatial axis.
        groups: groups of channels.
        down: every how many rows of the map.
        across: every how many pixels of a row.
        staggered: whether neighbouring samples use different phases.

    Returns:
        dw [Co, Ci/groups, *kernel], laid out in memory as x is.
    """
    index, inside = phases.pixels(list(grad.shape), phase, down, across, staggered)
    weight = torch.full(index.shape, float(down * across), device=grad.device)
    # Those that do not exist are left out, not weighted with 0, which keeps NaN.
    return sampled_wgrad.reference(
        grad, x, index[inside], weight[inside], center, sums, kernel, stride, padding, dilation,
        groups, False,
    )  # fmt: skip


def fake(
    grad: Tensor,
    x: Tensor,
    phase: Tensor,
    center: Tensor | None,
    sums: Tensor | None,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    down: int,
    across: int,
    staggered: bool,
) -> Tensor:
    """Return an uninitialised weight gradient."""
    del down, across, staggered
    return sampled_wgrad.fake(
        grad, x, phase, phase, center, sums, kernel, stride, padding, dilation, groups, False
    )


def _sample(
    batch: int,
    channels: tuple[int, int],
    size: tuple[int, int],
    kernel: tuple[int, int],
    geometry: tuple[int, int, int, int] = (1, 0, 1, 1),
    *,
    chosen: tuple[int, int, int, bool] = (1, 2, 2, True),
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.channels_last,
    centered: bool = True,
    broken: bool = False,
) -> Sample:
    """Return a problem.

    Args:
        batch: samples.
        channels: of the input and of the output.
        size: of the input.
        kernel: its size.
        geometry: stride, padding, dilation and groups.
        chosen: phase, rows and pixels of a step, whether staggered.
        dtype: of the operands.
        memory_format: of the operands.
        centered: whether there is a centre.
        broken: whether a row of the gradient and one of the input are not numbers.
    """
    (in_channels, out_channels), (stride, padding, dilation, groups) = channels, geometry
    phase, down, across, staggered = chosen
    out = [
        (side + 2 * padding - dilation * (taps - 1) - 1) // stride + 1
        for side, taps in zip(size, kernel, strict=True)
    ]

    def args() -> tuple[Any, ...]:
        random = torch.Generator().manual_seed(batch)
        x = torch.randn(batch, in_channels, *size, generator=random).add(1)
        grad = torch.randn(batch, out_channels, *out, generator=random)
        if broken:
            grad[:, 0, 1], x[:, :, -1] = torch.nan, torch.inf
        grad, x = (tensor.to(dtype, memory_format=memory_format) for tensor in (grad, x))
        center = torch.randn(in_channels, generator=random) if centered else None
        sums = torch.randn(out_channels, *kernel, generator=random) if centered else None
        axes = [list(kernel), [stride] * 2, [padding] * 2, [dilation] * 2]
        number = torch.tensor([phase])
        return grad, x, number, center, sums, *axes, groups, down, across, staggered

    rows, columns = phases.largest(out, down, across)
    # What is contracted is rounded to the operands' type once it is centred.
    half = torch.finfo(torch.bfloat16).eps / torch.finfo(torch.float32).eps
    return Sample(args, length=int(batch * rows * columns * (half if dtype.itemsize == 2 else 1)))


def samples() -> tuple[Sample, ...]:
    """Return convolutions of every geometry, in both layouts and types, and odd sizes."""
    nchw, half = torch.contiguous_format, torch.bfloat16
    same = (1, 1, 1, 1)
    return (
        # The last phase of both axes is smaller.
        _sample(3, (17, 19), (9, 7), (3, 3), same, chosen=(3, 2, 2, False)),
        _sample(3, (16, 24), (9, 7), (3, 3), same, memory_format=nchw),
        _sample(2, (1, 1), (5, 5), (1, 1), chosen=(0, 1, 1, True), centered=False),
        _sample(1, (3, 63), (9, 8), (5, 5), (2, 2, 1, 1), chosen=(1, 2, 1, True)),
        _sample(5, (6, 4), (11, 10), (3, 2), (2, 3, 2, 2), chosen=(5, 3, 2, True)),
        _sample(2, (8, 8), (9, 9), (7, 7), (1, 3, 1, 8), chosen=(4, 1, 5, False)),
        _sample(3, (17, 5), (8, 8), (3, 3), same, dtype=half),
        _sample(3, (16, 9), (8, 8), (3, 3), same, dtype=half, memory_format=nchw, centered=False),
        _sample(4, (3, 5), (9, 8), (3, 3), same, broken=True),
    )


register(
    Kernel(
        name="phase_wgrad",
        schema="(Tensor grad, Tensor x, Tensor phase, Tensor? center, Tensor? sums, int[] kernel, "
        "int[] stride, int[] padding, int[] dilation, int groups, int down, int across, "
        "bool staggered) -> Tensor",
        reference=reference,
        fake=fake,
        samples=samples,
        emit_triton=emit_triton,
    )
)
