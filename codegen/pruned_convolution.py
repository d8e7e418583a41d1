"""What the kernels of both gradients of a pruned convolution share: constants, limits, samples."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from codegen import cpp, pruning
from codegen.kernel import Sample

# Vectors of sums that fit into 32 registers beside what is added to them.
MAX_SUMS = 27


def unsupported(
    grad: Tensor, other: Tensor, threshold: Tensor, kernel: Sequence[int], groups: int, block: int
) -> str | None:
    """Return why no C++ is emitted for these arguments of a kernel; None if it is."""
    if len(kernel) != 2:
        return f"no kernel for {len(kernel)} spatial axes"
    if (reason := cpp.unsupported(grad, other)) is not None:
        return reason
    if grad.dtype != other.dtype or threshold.dtype != torch.float32:
        return "operands of several types, or a threshold that is not float32"
    if kernel[1] > MAX_SUMS:
        return f"a kernel {kernel[1]} pixels wide"
    return pruning.unsupported(grad.shape[1], groups, block)


def constants(
    grad: Tensor,
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    salt: int,
    block: int,
) -> dict[str, Any]:
    """Return the constants of a convolution's geometry; `size` is the input's shape."""
    return {
        "T": cpp.ELEMENTS[grad.dtype],
        "B": size[0], "CO": grad.shape[1], "CI": size[1], "GROUPS": groups,
        "OH": grad.shape[2], "OW": grad.shape[3], "IH": size[2], "IW": size[3],
        "KH": kernel[0], "KW": kernel[1], "SH": stride[0], "SW": stride[1],
        "PH": padding[0], "PW": padding[1], "DH": dilation[0], "DW": dilation[1],
        "SALT": salt, "BLOCK": block, **cpp.strides("GS", grad),
    }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Problem:
    """A convolution; `geometry` is stride, padding, dilation and groups.

    Attributes:
        batch: samples.
        channels: of the input and of the output.
        size: of the input.
        kernel: its size.
        geometry: stride, padding and dilation of both axes; groups.
        block: channels that are pruned together.
        dtype: of the operands.
        layout: of the operands.
    """

    batch: int
    channels: tuple[int, int]
    size: tuple[int, int]
    kernel: tuple[int, int]
    geometry: tuple[int, int, int, int] = (1, 0, 1, 1)
    block: int = 1
    dtype: torch.dtype = torch.float32
    layout: torch.memory_format = torch.channels_last

    def operands(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return output gradient, input, weight and threshold."""
        (in_channels, out_channels), (stride, padding, dilation, groups) = (
            self.channels,
            self.geometry,
        )
        out = [
            (side + 2 * padding - dilation * (taps - 1) - 1) // stride + 1
            for side, taps in zip(self.size, self.kernel, strict=True)
        ]
        random = torch.Generator().manual_seed(self.batch)
        grad = torch.randn(self.batch, out_channels, *out, generator=random)
        x = torch.randn(self.batch, in_channels, *self.size, generator=random)
        weight = torch.randn(out_channels, in_channels // groups, *self.kernel, generator=random)
        threshold = 1.5 * pruning.norms(grad, self.block).mean()
        grad, x, weight = (
            tensor.to(self.dtype, memory_format=self.layout) for tensor in (grad, x, weight)
        )
        return grad, x, weight, threshold


def samples(
    args: Callable[[Problem], tuple[Any, ...]], length: Callable[[Problem], int]
) -> tuple[Sample, ...]:
    """Return convolutions of every geometry, in both layouts and types, and odd sizes.

    Args:
        args: the arguments of a kernel: output gradient, other operand, threshold, ...
        length: how many products the longest sum of a result has.
    """
    nchw, half = torch.contiguous_format, torch.bfloat16
    plain = Problem(3, (17, 19), (9, 7), (3, 3), (1, 1, 1, 1))

    def sample(problem: Problem) -> Sample:
        return Sample(lambda: args(problem), length(problem))

    def changed(number: int, change: Callable[[Tensor], Tensor]) -> Sample:
        def given() -> tuple[Any, ...]:
            before = args(plain)
            return (*before[:number], change(before[number]), *before[number + 1 :])

        return Sample(given, length(plain))

    problems = (
        plain,
        Problem(2, (1, 1), (5, 5), (1, 1)),
        Problem(1, (3, 63), (9, 8), (5, 5), (2, 2, 1, 1)),
        Problem(4, (6, 4), (11, 10), (3, 2), (2, 3, 2, 2), layout=nchw),
        Problem(2, (8, 8), (9, 9), (7, 7), (1, 3, 1, 8)),
        Problem(2, (40, 64), (16, 16), (3, 3), (1, 1, 1, 1), block=8),
        Problem(2, (300, 120), (5, 4), (3, 3), (1, 1, 1, 1), block=4),
        Problem(70, (32, 160), (4, 4), (1, 1), (2, 0, 1, 1), block=16, dtype=half),
        Problem(3, (17, 5), (8, 8), (3, 3), (1, 1, 1, 1), dtype=half),
        Problem(3, (4, 33), (8, 8), (3, 3), (1, 2, 1, 1), dtype=half, layout=nchw),
    )
    return (
        *map(sample, problems),
        changed(0, _not_finite),
        changed(1, _not_finite),
        changed(2, lambda _: torch.tensor(torch.inf)),
        changed(2, lambda _: torch.tensor(1e30)),
        # What a sum over the output hands back: one value, expanded.
        changed(0, lambda grad: grad[:, :1, :1, :1].expand(grad.shape)),
        changed(0, lambda grad: grad.flip(3).transpose(2, 3).contiguous().mT),
        changed(1, lambda other: other.flip(3).transpose(2, 3).contiguous().mT),
    )


def _not_finite(x: Tensor) -> Tensor:
    x = x.clone()
    x[1, 2, 1, 2], x[2, 3, 2, 1] = torch.nan, torch.inf
    return x
