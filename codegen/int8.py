"""Tensors of 8-bit numbers: their layout, and the C++ that several kernels over them share.

A tensor [B, C, H, W] is kept as bytes in the order [B, H, W, C], each value plus `zero_point`, with
a border of zeros (that is, of zero points) around every image, so that the taps of a convolution
need no test. After the last value follow `SLACK` bytes, so that a vector may be read from where the
last pixel begins.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from codegen import build

SLACK = 64
# A tensor's scale maps its largest magnitude to this; -128 only ever comes from rounding.
LARGEST = 127
# The inverse of this is finite; of zeros alone, any scale is right.
LEAST_SCALE = 2.0**-100


def zero_point(device: torch.device) -> int:
    """Return the byte that stands for 0: a CPU multiplies unsigned bytes, tensor cores signed ones.

    With 0, a byte is the value's two's complement.
    """
    return 0 if device.type == "cuda" else 128


def padded(size: list[int], before: list[int], after: list[int]) -> tuple[int, int, int, int]:
    """Return [B, H, W, C] with the border, of a tensor of size [B, C, H, W]."""
    batch, channels, height, width = size
    return batch, before[0] + height + after[0], before[1] + width + after[1], channels


def scale_of(largest: Tensor) -> Tensor:
    """Return what one step of the integers is worth that stand for a tensor: float32, 0-d.

    Args:
        largest: the tensor's largest magnitude, 0-d. If it is NaN or infinite, so is the scale, and
            what is multiplied with it.
    """
    return (largest.to(torch.float32) / LARGEST).clamp_min(LEAST_SCALE)


def round_at_random(x: Tensor, scale: Tensor, uniform: Tensor) -> Tensor:
    """Return floor(x / scale + uniform) in [-128, 127].

    Both terms are taken to 16 binary places, which makes the sum an integer one, the same to the
    bit in every implementation; x / scale is rounded to the nearest of these.

    Args:
        x: float.
        scale: float, 0-d.
        uniform: in (0, 1), of x's shape.

    Returns:
        int32, of x's shape.
    """
    largest, least = 65536.0 * LARGEST, -65536.0 * (LARGEST + 1)
    fixed = x.to(torch.float32) * (65536.0 / scale.to(torch.float32))
    fixed = fixed.nan_to_num(largest, largest, least).clamp(least, largest)
    random = (uniform * 65536.0).to(torch.int32)
    return (fixed.round().to(torch.int32) + random) >> 16


def to_bytes(
    values: Tensor, before: list[int], after: list[int], zero: int | None = None
) -> Tensor:
    """Return the layout above of integers in [-128, 127]: [B, C, H, W] -> uint8, flat.

    Args:
        values: the integers, or any bytes where `zero` is given.
        before: zeros before the first row and column.
        after: zeros after the last.
        zero: the byte that stands for 0; None for `zero_point`.
    """
    border = [before[1], after[1], before[0], after[0]]
    zero = zero_point(values.device) if zero is None else zero
    # Negative numbers wrap around to their two's complement.
    biased = (values + zero) & 0xFF
    pixels = torch.nn.functional.pad(biased, border, value=zero).permute(0, 2, 3, 1)
    return torch.nn.functional.pad(pixels.to(torch.uint8).reshape(-1), [0, SLACK], value=zero)


def from_bytes(
    bytes_: Tensor,
    size: list[int],
    before: list[int],
    after: list[int],
    dtype: torch.dtype,
    stored: torch.dtype = torch.int8,
) -> Tensor:
    """Return the numbers, without border: uint8, flat -> [B, C, H, W] of `dtype`.

    Args:
        bytes_: as `to_bytes` returns them.
        size: [B, C, H, W].
        before: zeros before the first row and column.
        after: zeros after the last.
        dtype: of the result.
        stored: what the bytes are.
    """
    shape = padded(size, before, after)
    values = bytes_[: math.prod(shape)].view(shape).permute(0, 3, 1, 2)
    zero = zero_point(bytes_.device) if stored is torch.int8 else 0
    pixels = values.to(dtype) - zero if zero else values.view(stored).to(dtype)
    inside = pixels[:, :, before[0] : before[0] + size[2], before[1] : before[1] + size[3]]
    return inside.contiguous(memory_format=torch.channels_last)


def input_border(
    size: list[int],
    out: list[int],
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> tuple[list[int], list[int]]:
    """Return the border that the input of a convolution needs, before and after each axis.

    Args:
        size: the input's spatial sizes.
        out: the output's.
        kernel: the kernel's.
        stride: one number an axis.
        padding: one number an axis.
        dilation: one number an axis.
    """
    after = [
        max(0, (out[i] - 1) * stride[i] + (kernel[i] - 1) * dilation[i] - padding[i] - size[i] + 1)
        for i in range(2)
    ]
    return list(padding), after


def grad_border(
    size: list[int],
    out: list[int],
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> tuple[list[int], list[int]]:
    """Return the border that the output gradient needs, for the input gradient to be computed."""
    before = [max(0, ((kernel[i] - 1) * dilation[i] - padding[i]) // stride[i]) for i in range(2)]
    after = [max(0, (size[i] - 1 + padding[i]) // stride[i] - out[i] + 1) for i in range(2)]
    return before, after


@dataclass(frozen=True, slots=True)
class Example:
    """A convolution of random 8-bit numbers, for the kernels' samples.

    Attributes:
        batch: images.
        channels: in and out.
        size: the input's spatial sizes.
        kernel: the kernel's.
        geometry: stride, padding, dilation and groups.
    """

    batch: int
    channels: tuple[int, int]
    size: tuple[int, int]
    kernel: tuple[int, int]
    geometry: tuple[int, int, int, int] = (1, 0, 1, 1)

    @property
    def axes(self) -> tuple[list[int], list[int], list[int], list[int], list[int]]:
        """Spatial sizes of the output and the kernel; stride, padding and dilation."""
        stride, padding, dilation, _ = self.geometry
        out = [
            (side + 2 * padding - dilation * (taps - 1) - 1) // stride + 1
            for side, taps in zip(self.size, self.kernel, strict=True)
        ]
        return out, list(self.kernel), [stride] * 2, [padding] * 2, [dilation] * 2

    def operands(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return output gradient, input and weight, in the layout above."""
        random = torch.Generator().manual_seed(self.batch)
        (inner, outer), size, axes = self.channels, list(self.size), self.axes
        shapes = [
            (self.batch, outer, *axes[0]),
            (self.batch, inner, *size),
            (outer, inner // self.geometry[3], *self.kernel),
        ]
        borders = [grad_border(size, *axes), input_border(size, *axes), ([0, 0], [0, 0])]
        grad, x, weight = (
            to_bytes(torch.randint(-127, 128, shape, generator=random), *border)
            for shape, border in zip(shapes, borders, strict=True)
        )
        return grad, x, weight

    def sizes(self) -> tuple[Any, ...]:
        """Return the arguments that follow operands and scales."""
        (inner, outer), (out, *axes) = self.channels, self.axes
        return (
            [self.batch, outer, *out], [self.batch, inner, *self.size], *axes, self.geometry[3]
        )  # fmt: skip


def unsupported() -> str | None:
    """Return why this machine cannot multiply bytes; None if it can."""
    tools = build.toolchain()
    if isinstance(tools, str):
        return tools
    return None if tools.avx512 and tools.vnni else "the processor has no AVX-512 VNNI"


def in_tiles() -> bool:
    """Return whether this machine multiplies bytes in AMX's tiles."""
    tools = build.toolchain()
    return isinstance(tools, build.Toolchain) and tools.amx


# Interleaving makes neighbours of the four values that one VNNI instruction contracts.
INTERLEAVE = r"""
alignas(64) static const uint8_t ZEROS[64] = {
    128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128,
    128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128,
    128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128,
    128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128};

// sum += four products a lane. As an intrinsic, GCC 12 moves the sum through another register, and
// tiles that fill the register file are spilled: half the speed.
static inline void dot4(__m512i& sum, __m512i unsigned_bytes, __m512i signed_bytes) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(unsigned_bytes), "v"(signed_bytes));
}

// 16 bytes of each of four rows -> 16 quadruples, in order.
static inline __m512i interleave16(const uint8_t* const* row) {
  __m128i r[4];
  for (int i = 0; i < 4; i++) r[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row[i]));
  __m128i low01 = _mm_unpacklo_epi8(r[0], r[1]), low23 = _mm_unpacklo_epi8(r[2], r[3]);
  __m128i high01 = _mm_unpackhi_epi8(r[0], r[1]), high23 = _mm_unpackhi_epi8(r[2], r[3]);
  __m512i result = _mm512_castsi128_si512(_mm_unpacklo_epi16(low01, low23));
  result = _mm512_inserti32x4(result, _mm_unpackhi_epi16(low01, low23), 1);
  result = _mm512_inserti32x4(result, _mm_unpacklo_epi16(high01, high23), 2);
  return _mm512_inserti32x4(result, _mm_unpackhi_epi16(high01, high23), 3);
}

// The same of 64 bytes, in the order that unpacking within 128-bit lanes leaves them.
static inline void interleave64(const uint8_t* const* row, uint8_t* into) {
  __m512i r[4];
  for (int i = 0; i < 4; i++) r[i] = _mm512_loadu_si512(row[i]);
  __m512i low01 = _mm512_unpacklo_epi8(r[0], r[1]), low23 = _mm512_unpacklo_epi8(r[2], r[3]);
  __m512i high01 = _mm512_unpackhi_epi8(r[0], r[1]), high23 = _mm512_unpackhi_epi8(r[2], r[3]);
  _mm512_store_si512(into, _mm512_unpacklo_epi16(low01, low23));
  _mm512_store_si512(into + 64, _mm512_unpackhi_epi16(low01, low23));
  _mm512_store_si512(into + 128, _mm512_unpacklo_epi16(high01, high23));
  _mm512_store_si512(into + 192, _mm512_unpackhi_epi16(high01, high23));
}
"""
