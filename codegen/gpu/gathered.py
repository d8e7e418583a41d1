"""Weight gradients whose operands are gathered first, and multiplied by the vendor's library.

A program that reads operands through a list, weights and centres them, and multiplies, waits for
one after the other: on an H200, it took 33 us for a quarter of the pixels of 256 channels, all of
which the vendor's library multiplied in 24. Here one kernel writes both operands as matrices, a row
a pixel, weighted and centred; what is left is a plain matrix product. It costs memory, and for taps
more bytes than the image has, so it is one of the ways that are timed.
"""

from typing import Any

import torch
from torch import Tensor

from codegen.gpu import source as gpu

# Of both matrices.
_MOST_BYTES = 1 << 29
# Values that a program copies.
_BLOCK = 4096


def unsuitable(
    dtype: torch.dtype, precision: str, groups: int, rows: int, columns: int
) -> str | None:
    """Return why operands are not gathered; None if they may be.

    Args:
        dtype: of the operands.
        precision: how float32 is to be multiplied, as `tl.dot` says it.
        groups: groups of channels.
        rows: pixels.
        columns: of both matrices.
    """
    if dtype not in gpu.ELEMENTS or groups > 1:
        return "bytes" if groups == 1 else "several groups"
    if rows == 0 or rows * columns * dtype.itemsize > _MOST_BYTES:
        return "no pixels" if rows == 0 else "too large"
    if dtype is torch.float32 and gpu.tf32_settings()[1] != ("tf32" in precision):
        return "matrix products have another precision"
    return None


def constants(own: int, depth: int, taps: int) -> dict[str, Any]:
    """Return how the matrices are cut: GR rows by GC columns a program.

    Args:
        own: filters.
        depth: input channels.
        taps: of the kernel.
    """
    wide = gpu.power(max(own, depth), 16, 128)
    left, channels = gpu.ceil_div(own, wide), gpu.ceil_div(depth, wide)
    return {
        "GR": _BLOCK // wide, "GC": wide, "LEFT_PARTS": left, "CHANNEL_PARTS": channels,
        "PARTS": left + taps * channels,
    }  # fmt: skip


def scratch(rows: int, own: int, columns: int, dtype: torch.dtype) -> dict[str, gpu.Scratch]:
    """Return the memory of both matrices and their product."""
    return {
        "left": gpu.Scratch(rows * own, dtype), "right": gpu.Scratch(rows * columns, dtype),
        "sums": gpu.Scratch(own * columns),
    }  # fmt: skip


def multiply(left: Tensor, right: Tensor, sums: Tensor, rows: int) -> None:
    """Write the product of the first, turned, by the second, as float32.

    Args:
        left: [rows * own], flat.
        right: [rows * columns], flat.
        sums: [own * columns], flat.
        rows: of both.
    """
    if sums.device.type == "meta":
        return
    turned, other = left.view(rows, -1).t(), right.view(rows, -1)
    out = sums.view(turned.shape[0], other.shape[1])
    if left.dtype is torch.float32:
        torch.mm(turned, other, out=out)
    elif left.device.type == "cuda":
        torch.ops.aten.mm.dtype_out(turned, other, torch.float32, out=out)
    else:
        torch.mm(turned.float(), other.float(), out=out)


LINES = (
    "gather[(triton.cdiv(PIXELS.value, GR.value), PARTS.value)]"
    "(grad, x{operands}, left, right, num_warps=4)",
    "multiply(left, right, sums, PIXELS.value)",
)

TEXT = """
from codegen.gpu.gathered import multiply


@triton.jit
def gather(grad, x, OPERANDS, left, right):
    number = tl.program_id(0) * GR + tl.arange(0, GR)
    inside = number < PIXELS
    within = inside[:, None]
    pixel = pixel_of(number, inside, OPERANDS)
    inside = inside & (pixel >= 0)
    image = pixel // (OH * OW)
    row = pixel // OW % OH
    line = pixel % OW
    part = tl.program_id(1)
    if part < LEFT_PARTS:
        o = part * GC + tl.arange(0, GC)
        at = FIRST + image * GS0 + row * GS2 + line * GS3
        at = grad + at[:, None] + (o * GS1)[None, :]
        value = left_of(at, inside[:, None] & (o < OG)[None, :], number, inside, OPERANDS)
        at = left + number.to(INDEX)[:, None] * OG + o[None, :]
        tl.store(at, value, mask=within & (o < OG)[None, :])
    else:
        tap = (part - LEFT_PARTS) // CHANNEL_PARTS
        own = (part - LEFT_PARTS) % CHANNEL_PARTS * GC + tl.arange(0, GC)
        channel = channel_of(tap * CG + own, 0, OPERANDS)
        y = row * SH - PH + tap // KW * DH
        z = line * SW - PW + tap % KW * DW
        if not BORDERED:
            inside = inside & (y >= 0) & (y < IH) & (z >= 0) & (z < IW)
        mask = inside[:, None] & (own < CG)[None, :]
        at = x + (image * XS0 + y * XS2 + z * XS3)[:, None] + (channel * XS1)[None, :]
        value = right_of(at, mask, channel, OPERANDS)
        at = right + number.to(INDEX)[:, None] * COLUMNS + (tap * CG + own)[None, :]
        tl.store(at, value, mask=within & (own < CG)[None, :])
"""
