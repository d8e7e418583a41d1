"""Rounding to 8 bits at random in Triton: the pass over a tensor, whatever its bytes stand for."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from codegen import int8
from codegen.gpu import source as gpu


def program(
    name: str,
    x: Tensor,
    scale: Tensor,
    salt: int,
    border: tuple[list[int], list[int]],
    constants: Mapping[str, Any],
    rounded: str,
) -> gpu.Program | str:
    """Return the program that rounds a tensor, in the layout of `codegen.int8`.

    Args:
        name: of the primitive.
        x: [B, C, H, W].
        scale: what the tensor is divided by, 0-d.
        salt: tells apart the draws that share a seed.
        border: zeros before the first row and column, and after the last.
        constants: those of `rounded`, and `ZERO`, the byte that stands for 0.
        rounded: a function of that name: (value, scale, key, position) -> byte, as an integer.
    """
    if (reason := gpu.unsupported(x)) is not None or scale.dtype != torch.float32:
        return reason or "the scale is no float32"
    batch, channels, height, width = x.shape
    before, after = border
    _, high, wide, _ = int8.padded(list(x.shape), before, after)
    maps = x.stride(3) == 1 and x.stride(1) != 1 and channels > 1
    # In NCHW, a tile of channels by pixels is turned within a program.
    across = gpu.power(channels, 1, 32) if maps else 1
    along = 2048 // across
    pieces = gpu.ceil_div(high * wide, along) if maps else 0
    given = {
        "SALT": salt, **constants, "SLACK": int8.SLACK, "B": batch, "C": channels, "H": height,
        "W": width, "TOP": before[0], "LEFT": before[1], "HP": high, "WP": wide,
        "BYTES": batch * high * wide * channels,
        "ACROSS": across, "ALONG": along, "PIECES": pieces,
        "INDEX": gpu.index_type(x, batch * high * wide * channels + int8.SLACK),
        **gpu.strides("XS", x),
    }  # fmt: skip
    dense = x.is_contiguous(memory_format=torch.channels_last) and not any(map(any, border))
    body = _NEAREST + rounded + (_MAPS if maps else _DENSE if dense else _PIXELS)
    return gpu.program(gpu.about(name, x=x), given, body)


# To the nearest integer, ties to the even one. Programs are compiled without fused operations: a
# sum of products is rounded twice by the reference.
_NEAREST = """
@triton.jit
def nearest(fixed):
    below = tl.floor(fixed)
    whole = below.to(tl.int32)
    rest = fixed - below
    return whole + ((rest > 0.5) | ((rest == 0.5) & ((whole & 1) == 1))).to(tl.int32)

"""

# Bytes lie as values do: finding a value's place takes longer than rounding it.
_DENSE = """

@triton.jit
def round_dense(x, scale, seed, out):
    i = tl.program_id(0).to(INDEX) * ALONG + tl.arange(0, ALONG)
    inside = i < BYTES
    value = tl.load(x + i, mask=inside, other=0.0)
    byte = rounded(value, tl.load(scale), draw_key(seed), i)
    byte = tl.where(inside, byte, ZERO).to(tl.uint8)
    tl.store(out + i, byte, mask=i < BYTES + SLACK)


def run(x, scale, seed, out):
    count = BYTES.value + SLACK.value
    grid = (triton.cdiv(count, ALONG.value),)
    round_dense[grid](x, scale, seed, out, num_warps=4, enable_fp_fusion=False)
"""

_PIXELS = """

@triton.jit
def round_pixels(x, scale, seed, out):
    i = tl.program_id(0).to(INDEX) * ALONG + tl.arange(0, ALONG)
    channel = i % C
    column = i // C % WP - LEFT
    row = i // (C * WP) % HP - TOP
    image = i // (C * WP * HP)
    inside = (column >= 0) & (column < W) & (row >= 0) & (row < H) & (i < BYTES)
    at = x + image * XS0 + channel * XS1 + row * XS2 + column * XS3
    value = tl.load(at, mask=inside, other=0.0)
    position = ((image * H + row) * W + column) * C + channel
    byte = rounded(value, tl.load(scale), draw_key(seed), position)
    byte = tl.where(inside, byte, ZERO).to(tl.uint8)
    tl.store(out + i, byte, mask=i < BYTES + SLACK)


def run(x, scale, seed, out):
    count = BYTES.value + SLACK.value
    grid = (triton.cdiv(count, ALONG.value),)
    round_pixels[grid](x, scale, seed, out, num_warps=4, enable_fp_fusion=False)
"""

_MAPS = """

@triton.jit
def round_maps(x, scale, seed, out):
    image = (tl.program_id(0) // PIECES).to(INDEX)
    pixel = tl.program_id(0) % PIECES * ALONG + tl.arange(0, ALONG)[None, :]
    channel = tl.program_id(1) * ACROSS + tl.arange(0, ACROSS)[:, None]
    column = pixel % WP - LEFT
    row = pixel // WP - TOP
    mask = (pixel < HP * WP) & (channel < C)
    inside = (column >= 0) & (column < W) & (row >= 0) & (row < H) & mask
    at = x + image * XS0 + channel * XS1 + row * XS2 + column * XS3
    value = tl.load(at, mask=inside, other=0.0)
    position = ((image * H + row) * W + column) * C + channel
    byte = rounded(value, tl.load(scale), draw_key(seed), position)
    byte = tl.where(inside, byte, ZERO).to(tl.uint8)
    tl.store(out + (image * HP * WP + pixel) * C + channel, byte, mask=mask)
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        i = tl.arange(0, SLACK)
        tl.store(out + BYTES + i, tl.full([SLACK], ZERO, dtype=tl.uint8))


def run(x, scale, seed, out):
    grid = (B.value * PIECES.value, triton.cdiv(C.value, ACROSS.value))
    round_maps[grid](x, scale, seed, out, num_warps=4, enable_fp_fusion=False)
"""
