"""Rounding to 8-bit floats at random, so that the expectation is kept.

    q = sign(x) * step * floor(|x| / scale / step + u),   u uniform in [0, 1)

with step the distance of the format's numbers at |x| / scale. E[q] * scale = x, exactly
for bfloat16, up to 1.5 * 2^-16 of a step for float32: `codegen.fp8` says why, and what the result
looks like.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from codegen import draws, fp8, int8
from codegen.gpu import rounding
from codegen.gpu.source import Program
from codegen.kernel import Kernel, Sample, register


def reference(
    x: Tensor,
    scale: Tensor,
    seed: Tensor,
    salt: int,
    before: list[int],
    after: list[int],
    stored: torch.dtype,
) -> Tensor:
    """Return x in units of `scale`, rounded at random to numbers of a format.

    Args:
        x: [B, C, H, W].
        scale: float, 0-d, a power of two: what 1 in the result is worth.
        seed: int64, 0-d.
        salt: tells apart the draws that share a seed.
        before: zeros before the first row and column.
        after: zeros after the last.
        stored: the format.

    Returns:
        uint8, flat, as described in `codegen.int8`; zeros are the byte 0.
    """
    batch, channels, height, width = x.shape
    uniform = draws.coarse(seed, x.numel(), salt).view(batch, height, width, channels)
    rounded = fp8.round_at_random(x, scale, uniform.permute(0, 3, 1, 2), stored)
    return fp8.to_bytes(rounded, before, after, stored)


def fake(
    x: Tensor,
    scale: Tensor,
    seed: Tensor,
    salt: int,
    before: list[int],
    after: list[int],
    stored: torch.dtype,
) -> Tensor:
    """Return uninitialised bytes."""
    del scale, seed, salt, stored
    batch, height, width, channels = int8.padded(list(x.shape), before, after)
    count = batch * height * width * channels + int8.SLACK
    return torch.empty(count, dtype=torch.uint8, device=x.device)


def emit_triton(
    x: Tensor,
    scale: Tensor,
    seed: Tensor,
    salt: int,
    before: list[int],
    after: list[int],
    stored: torch.dtype,
) -> Program | str:
    """Return the Triton."""
    del seed
    fraction, least = fp8.SHAPES[stored]
    constants = {
        "FRACTION": fraction, "LEAST": least, "LARGEST": torch.finfo(stored).max, "ZERO": 0,
    }  # fmt: skip
    return rounding.program("fp8_round", x, scale, salt, (before, after), constants, _TRITON)


# In units of the distance to its neighbours a number is an integer of FRACTION + 1 bits, and one
# more is carried into the exponent: so the byte is a sum, of subnormal numbers too.
_TRITON = """
@triton.jit
def rounded(value, scale, key, position):
    number = value.to(tl.float32) * tl.div_rn(1.0, scale)
    magnitude = tl.abs(number)
    magnitude = tl.where(magnitude <= LARGEST, magnitude, LARGEST)
    exponent = tl.maximum((magnitude.to(tl.int32, bitcast=True) >> 23) - 127, LEAST)
    places = (FRACTION + 16 + 127 - exponent) << 23
    fixed = magnitude * places.to(tl.float32, bitcast=True)
    whole = (nearest(fixed) + coarse(key, position)) >> 16
    byte = ((exponent - LEAST) << FRACTION) + whole
    return tl.where((number < 0) & (byte != 0), byte + 128, byte)
"""


def _sample(
    shape: tuple[int, int, int, int],
    border: tuple[int, int, int, int] = (0, 0, 0, 0),
    stored: torch.dtype = torch.float8_e4m3fn,
    dtype: torch.dtype = torch.float32,
    change: Callable[[Tensor], Tensor] = lambda x: x.contiguous(memory_format=torch.channels_last),
    scale: float = 2.0**-7,
) -> Sample:
    """Return a tensor to round; `border` is top, left, bottom and right."""

    def args() -> tuple[Any, ...]:
        random = torch.Generator().manual_seed(sum(shape))
        # Magnitudes from beyond the largest number down to the subnormal ones, and below them.
        x = torch.randn(shape, generator=random) * 10 ** torch.randn(shape, generator=random)
        x = change(x.to(dtype))
        top, left, bottom, right = border
        number, seed = torch.tensor(scale), torch.tensor(1234567)
        return x, number, seed, 77, [top, left], [bottom, right], stored

    return Sample(args, length=1)


def samples() -> tuple[Sample, ...]:
    """Return every format, both layouts and types, borders, strides of every kind, and NaN."""
    nan, half, wide = float("nan"), torch.bfloat16, torch.float8_e5m2

    def with_nan(x: Tensor) -> Tensor:
        x[0, 0, 0, 0], x[-1, -1, -1, -1], x[0, 1, 0, 0] = nan, float("-inf"), -0.0
        return x

    return (
        _sample((3, 17, 5, 6), (1, 1, 1, 1)),
        _sample((3, 17, 5, 6), (1, 1, 1, 1), wide, change=Tensor.contiguous, scale=2.0**-14),
        _sample((2, 64, 4, 4), (2, 0, 1, 3), dtype=half),
        _sample((2, 63, 9, 7), (0, 3, 0, 0), wide, half, Tensor.contiguous),
        _sample((1, 1, 1, 1)),
        _sample((1, 40, 1, 31), stored=torch.float8_e4m3fnuz, scale=2.0**-4),
        _sample((2, 3, 7, 6), (1, 2, 3, 0), torch.float8_e5m2fnuz, scale=1.0),
        _sample((2, 16, 6, 6), (1, 1, 1, 1), change=lambda x: x[:, :1, :1, :1].expand(x.shape)),
        _sample((2, 5, 6, 6), change=lambda x: x.flip(2).mT),
        _sample((2, 5, 6, 12), (1, 0, 0, 1), wide, change=lambda x: x[:, :, ::2, 1::3]),
        _sample((2, 5, 4, 4), change=with_nan),
        _sample((2, 5, 4, 4), scale=nan),
        _sample((2, 5, 4, 4), scale=float("inf")),
    )


register(
    Kernel(
        name="fp8_round",
        schema="(Tensor x, Tensor scale, Tensor seed, int salt, int[] before, int[] after, "
        "ScalarType stored) -> Tensor",
        reference=reference,
        fake=fake,
        samples=samples,
        emit_triton=emit_triton,
    )
)
