"""Patches of the k largest output gradients of every map, in Triton.

One launch selects, one sums patches up. In a single one, each range of columns would select again,
and the few programs that an output channel has would go through all samples, one selection after
the other; sharing out the samples takes sums that another launch adds up. The sums have one order:
the same call gives the same bits.
"""

import torch
from torch import Tensor

from codegen.gpu import source as gpu


def top_patches_program(
    grad: Tensor,
    x: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    k: int,
    scale: float,
) -> gpu.Program | str:
    """Return the program for two spatial axes; arguments as those of the primitive."""
    if len(kernel) != 2:
        return f"no kernel for {len(kernel)} spatial axes"
    if (reason := gpu.unsupported(grad, x)) is not None or grad.dtype != x.dtype:
        return reason or "operands of two types"
    batch, out_channels, height, width = (int(size) for size in grad.shape)
    kept = batch * out_channels * k
    if max(kept, height * width << 1) >= 1 << 30:
        return "maps that are too many or too large"
    layout = torch.channels_last if x.stride(1) == 1 else torch.contiguous_format
    shape = (out_channels, x.shape[1] // groups, *kernel)
    result = torch.empty(shape, dtype=grad.dtype, device="meta", memory_format=layout)
    columns = result.shape[1] * kernel[0] * kernel[1]
    constants = {
        "B": batch, "CO": out_channels, "OG": out_channels // groups, "CG": result.shape[1],
        "OW": width, "POSITIONS": height * width, "IH": x.shape[2], "IW": x.shape[3],
        "KW": kernel[1], "SH": stride[0], "SW": stride[1], "PH": padding[0], "PW": padding[1],
        "DH": dilation[0], "DW": dilation[1], "SCALE": float(scale), "COLUMNS": columns, "K": k,
        "P": gpu.power(height * width, 1, 64), "ACROSS": gpu.power(out_channels, 1, 32),
        "WIDE": gpu.power(columns, 1, 256), "ENTRIES": gpu.power(batch * k, 1, 8),
        "INDEX": gpu.index_type(grad, x),
        **gpu.strides("GS", grad), **gpu.strides("XS", x), **gpu.strides("RS", result),
    }  # fmt: skip
    scratch = (
        gpu.Scratch(kept, torch.int32), gpu.Scratch(kept), gpu.Scratch(batch * out_channels)
    )  # fmt: skip
    return gpu.program(gpu.about("top_patches", grad=grad, x=x), constants, _TRITON, scratch)


_TRITON = """
@triton.jit
def select(grad, position, weight, rest):
    image = tl.program_id(0)
    o = tl.program_id(1) * ACROSS + tl.arange(0, ACROSS)
    found = tl.full([ACROSS], 0x7FFFFFFFFFFFFFFF, dtype=tl.int64)
    total = tl.zeros([ACROSS], dtype=tl.float32)
    kept = tl.zeros([ACROSS], dtype=tl.float32)
    # A pass for every value that is kept: the largest below the one before. What pays keeps few,
    # and only the first pass reads from memory.
    for number in range(0, K):
        best = tl.zeros([ACROSS], dtype=tl.int64)
        total = tl.zeros([ACROSS], dtype=tl.float32)
        for first in range(0, POSITIONS, P):
            p = first + tl.arange(0, P)
            at = image.to(INDEX) * GS0 + p // OW * GS2 + p % OW * GS3
            mask = (p < POSITIONS)[:, None] & (o < CO)[None, :]
            value = tl.load(grad + at[:, None] + (o * GS1)[None, :], mask=mask, other=0.0)
            value = value.to(tl.float32)
            total += tl.sum(value, axis=0)
            # The bits of magnitudes are in the order of the magnitudes, NaN on top; below them the
            # position, so that of equal ones the first wins, and the sign.
            bits = value.to(tl.int32, bitcast=True)
            low = ((0x3FFFFFFF - p) << 1)[:, None] | ((bits >> 31) & 1)
            key = ((bits & 0x7FFFFFFF).to(tl.int64) << 32) | low
            best = tl.maximum(best, tl.max(tl.where(key < found[None, :], key, 0), axis=0))
        found = best
        low = (best & 0x7FFFFFFF).to(tl.int32)
        value = ((best >> 32).to(tl.int32) | (low << 31)).to(tl.float32, bitcast=True)
        kept += value
        at = (image * K + number) * CO + o
        tl.store(position + at, 0x3FFFFFFF - (low >> 1), mask=o < CO)
        tl.store(weight + at, total if K == 1 else value, mask=o < CO)
    if K > 1:
        tl.store(rest + image * CO + o, (total - kept) / K, mask=o < CO)


@triton.jit
def gather(x, position, weight, rest, out):
    o = tl.program_id(0)
    column = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    tap = column // CG
    channel = o // OG * CG + column % CG
    sum = tl.zeros([ENTRIES, WIDE], dtype=tl.float32)
    for first in range(0, B * K, ENTRIES):
        entry = first + tl.arange(0, ENTRIES)
        image = entry // K
        p = tl.load(position + entry * CO + o, mask=image < B, other=0)
        value = tl.load(weight + entry * CO + o, mask=image < B, other=0.0)
        if K > 1:
            value += tl.load(rest + image * CO + o, mask=image < B, other=0.0)
        y = (p // OW * SH - PH)[:, None] + (tap // KW * DH)[None, :]
        z = (p % OW * SW - PW)[:, None] + (tap % KW * DW)[None, :]
        mask = (image < B)[:, None] & (column < COLUMNS)[None, :]
        mask = mask & (y >= 0) & (y < IH) & (z >= 0) & (z < IW)
        at = image.to(INDEX)[:, None] * XS0 + y * XS2 + z * XS3 + (channel * XS1)[None, :]
        sum += value[:, None] * tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    result = tl.sum(sum, axis=0) * SCALE
    at = o * RS0 + column % CG * RS1 + tap // KW * RS2 + tap % KW * RS3
    tl.store(out + at, result.to(out.dtype.element_ty), mask=column < COLUMNS)


def run(grad, x, out, position, weight, rest):
    select[(B.value, triton.cdiv(CO.value, ACROSS.value))](grad, position, weight, rest)
    gather[(CO.value, triton.cdiv(COLUMNS.value, WIDE.value))](x, position, weight, rest, out)
"""
