"""Weight gradients as matrix products over output pixels, in Triton.

A tile is BM output channels by BN columns; a column is a tap and an input channel, in that order.
What is contracted is output pixels, all of them, those of a list or of a phase, BK at a time. Few
filters make few tiles: the pixels are shared out among SPLITS programs a tile, each writes its own
sums, and another kernel adds them up in order, so that the same call gives the same bits.

Or operands are gathered first, and multiplied by the vendor's library (`codegen.gpu.gathered`).
"""

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from codegen.gpu import gathered, tiles
from codegen.gpu import source as gpu

_MOST = 1 << 31


@dataclass(frozen=True, slots=True)
class Problem:
    """One weight gradient, for `emit`.

    Attributes:
        result: where it is put: [Co, Ci/groups, KH, KW], meta.
        out_size: of the output gradient: [B, Co, OH, OW].
        size: of the input: [B, Ci, IH, IW], border included.
        grad_strides: of the output gradient.
        x_strides: of the input.
        first: elements before the output gradient's first.
        kernel: the kernel's spatial sizes.
        stride: one number a spatial axis.
        corner: rows and columns before the input's first that the first tap looks at.
        dilation: one number a spatial axis.
        groups: groups of channels.
        dtype: of the output gradient, and of the input unless that has another.
        x_dtype: of the input; None for `dtype`.
        bordered: whether no tap falls outside.
        zero: the byte that stands for zero.
        narrow: whether float32 may be multiplied as tf32 whatever torch's settings say.
    """

    result: Tensor
    out_size: list[int]
    size: list[int]
    grad_strides: tuple[int, ...]
    x_strides: tuple[int, ...]
    first: int
    kernel: list[int]
    stride: list[int]
    corner: list[int]
    dilation: list[int]
    groups: int
    dtype: torch.dtype
    x_dtype: torch.dtype | None = None
    bordered: bool = False
    zero: int = 0
    narrow: bool = False


@dataclass(frozen=True, slots=True)
class Form:
    """What one kind of weight gradient puts into the common text.

    Attributes:
        text: the functions `pixel_of`, `left_of`, `right_of` and `finished`. The first may return a
            negative number for a pixel that does not exist.
        operands: names of tensors that the first three take at their end.
        finish: names of those that the last takes.
        channels: the function `channel_of` a column, which takes `operands` at its end.
    """

    text: str
    operands: tuple[str, ...] = ()
    finish: tuple[str, ...] = ()
    channels: str = """
@triton.jit
def channel_of(column, group, OPERANDS):
    return group * CG + column % CG

"""


def emit(problem: Problem, pixels: int, form: Form) -> gpu.Parts | str:
    """Return the pieces of the program for a weight gradient, or why there are none.

    The lines of `run` name `grad`, `x`, the tensors of the form, and `out`.

    Args:
        problem: the weight gradient.
        pixels: output pixels that are contracted.
        form: where they come from, and what becomes of operands and sums.
    """
    filters, depth = int(problem.result.shape[0]), int(problem.result.shape[1])
    own, columns = filters // problem.groups, depth * prod(problem.kernel)
    extents = (
        1 + sum((n - 1) * step for n, step in zip(size, strides, strict=True))
        for size, strides in (
            (problem.out_size, problem.grad_strides), (problem.size, problem.x_strides)
        )
    )  # fmt: skip
    tile, splits = _cut(own, columns, problem.groups, pixels, problem.dtype)
    count = gpu.ceil_div(own, tile["BM"]) * gpu.ceil_div(columns, tile["BN"])
    steps = gpu.ceil_div(gpu.ceil_div(pixels, tile["BK"]), splits)
    byte, integer = problem.dtype in gpu.BYTES, problem.dtype is torch.int8
    if filters * columns >= _MOST or prod(problem.out_size) // filters >= _MOST:
        return "weights or images that are too large"
    if integer and steps * tile["BK"] << 14 >= _MOST:
        return "sums that are too long"
    maps = max(problem.out_size[2:]) > 1
    constants: dict[str, Any] = {
        "OG": own, "CG": depth, "GROUPS": problem.groups, "COLUMNS": columns, "CO": filters,
        "OH": problem.out_size[2], "OW": problem.out_size[3],
        "IH": problem.size[2], "IW": problem.size[3], "KW": problem.kernel[1],
        "SH": problem.stride[0], "SW": problem.stride[1],
        "PH": problem.corner[0], "PW": problem.corner[1],
        "DH": problem.dilation[0], "DW": problem.dilation[1],
        "PIXELS": pixels, "STEPS": steps, "SPLITS": splits, **tile,
        "M_TILES": gpu.ceil_div(own, tile["BM"]),
        # A tile of columns within a tap has one place in the image a pixel, not one a column.
        "ONE_TAP": depth % tile["BN"] == 0, "BORDERED": problem.bordered,
        "FIRST": problem.first, "ZERO": problem.zero,
        "GRAD_TYPE": gpu.BYTES.get(problem.dtype),
        "X_TYPE": gpu.BYTES.get(problem.x_dtype or problem.dtype),
        "SUM": "tl.int32" if integer else "tl.float32",
        "PRECISION": "'tf32'" if problem.narrow else gpu.precision(problem.dtype, maps),
        "INDEX": gpu.index_type(*extents, splits * filters * columns),
        **{f"GS{axis}": step for axis, step in enumerate(problem.grad_strides)},
        **{f"XS{axis}": step for axis, step in enumerate(problem.x_strides)},
        **gpu.strides("RS", problem.result),
    }  # fmt: skip
    operands, finish = (
        "".join(f", {name}" for name in names) for names in (form.operands, form.finish)
    )
    refused = gathered.unsuitable(
        problem.dtype, constants["PRECISION"], problem.groups, pixels, own + columns
    )
    if tiles.gathering() and refused is None:
        constants |= {"SPLITS": 1, **gathered.constants(own, depth, prod(problem.kernel))}
        memory = gathered.scratch(pixels, own, columns, problem.dtype)
        lines = [line.format(operands=operands) for line in gathered.LINES]
        text = gathered.TEXT
    else:
        # Bytes that are turned around take registers too: with 4 warps, too many from 128 by 64 on.
        warps = 8 if tile["BM"] * tile["BN"] >= (128 * 64 if byte else 128 * 128) else 4
        wide = torch.int32 if integer else torch.float32
        memory = {"sums": gpu.Scratch(splits * filters * columns, wide)}
        grid = f"({count}, {splits}, {problem.groups})"
        lines = [f"product[{grid}](grad, x{operands}, sums, num_warps={warps}, num_stages=3)"]
        text = gpu.added(problem.dtype) + _PRODUCT
    # Sums of many programs are read at a time: each round waits for memory.
    summed = gpu.power(constants["SPLITS"], 1, 32)
    constants |= {"SUMMED": summed, "ENDED": max(32, 256 // summed)}
    lines.append(
        f"finish[(triton.cdiv(CO.value * COLUMNS.value, ENDED.value),)](sums{finish}, out)"
    )
    text = form.text + form.channels + text + _FINISH
    text = text.replace(", OPERANDS", operands).replace(", FINISH", finish)
    return gpu.Parts(constants, text, lines, memory)


def _cut(
    own: int, columns: int, groups: int, pixels: int, dtype: torch.dtype
) -> tuple[dict[str, int], int]:
    """Return the tile, and how many programs share its pixels."""
    deep = {1: 128, 2: 64, 4: 32}[dtype.itemsize]
    steps = gpu.ceil_div(pixels, deep)
    tile = tiles.best(
        tiles.Work(
            own, columns, steps, deep, groups, dtype.itemsize, least=64, turned=True, shared=True
        )
    )
    return {"BM": tile.high, "BN": tile.wide, "BK": deep}, tile.splits


# Bytes of all pixels, of operands with a border. Both are read as they lie in memory, channels
# side by side, which is across what tensor cores contract.
BYTES = Form(
    """
@triton.jit
def pixel_of(number, inside):
    return number.to(INDEX)


@triton.jit
def read(at, mask, TYPE: tl.constexpr):
    # The conversion costs nothing, and makes of the load one that Triton pipelines.
    byte = tl.load(at, mask=mask, other=ZERO)
    if ZERO != 0:
        byte = byte ^ ZERO
    return byte.to(TYPE, bitcast=True)


@triton.jit
def left_of(at, mask, number, inside):
    return read(at, mask, GRAD_TYPE)


@triton.jit
def right_of(at, mask, channel):
    return read(at, mask, X_TYPE)


@triton.jit
def finished(sum, o, tap, channel, inside, grad_scale, input_scale):
    return sum * tl.load(grad_scale) * tl.load(input_scale)

""",
    finish=("grad_scale", "input_scale"),
)

# Floats of all pixels, as they are.
PLAIN = Form(
    """
@triton.jit
def pixel_of(number, inside):
    return number.to(INDEX)


@triton.jit
def left_of(at, mask, number, inside):
    return tl.load(at, mask=mask, other=0.0)


@triton.jit
def right_of(at, mask, channel):
    return tl.load(at, mask=mask, other=0.0)


@triton.jit
def finished(sum, o, tap, channel, inside):
    return sum

"""
)

_PRODUCT = """
@triton.jit
def product(grad, x, OPERANDS, sums):
    group = tl.program_id(2)
    first = tl.program_id(0) // M_TILES * BN
    o = tl.program_id(0) % M_TILES * BM + tl.arange(0, BM)
    column = first + tl.arange(0, BN)
    tap = (first // CG) if ONE_TAP else (column // CG)[None, :]
    tap_y = tap // KW * DH
    tap_x = tap % KW * DW
    channel = channel_of(column, group, OPERANDS)
    sum = tl.zeros([BM, BN], dtype=SUM)
    for step in range(0, STEPS):
        number = (tl.program_id(1) * STEPS + step) * BK + tl.arange(0, BK)
        inside = number < PIXELS
        pixel = pixel_of(number, inside, OPERANDS)
        inside = inside & (pixel >= 0)
        image = pixel // (OH * OW)
        row = pixel // OW % OH
        line = pixel % OW
        left_at = FIRST + image * GS0 + row * GS2 + line * GS3
        left_at = grad + left_at[:, None] + ((group * OG + o) * GS1)[None, :]
        left = left_of(left_at, inside[:, None] & (o < OG)[None, :], number, inside, OPERANDS)
        y = (row * SH - PH)[:, None] + tap_y
        z = (line * SW - PW)[:, None] + tap_x
        mask = inside[:, None] & (column < COLUMNS)[None, :]
        if not BORDERED:
            mask = mask & (y >= 0) & (y < IH) & (z >= 0) & (z < IW)
        right_at = (image * XS0)[:, None] + y * XS2 + z * XS3
        right_at = x + right_at + (channel * XS1)[None, :]
        right = right_of(right_at, mask, channel, OPERANDS)
        sum = added(sum, tl.trans(left), right)
    at = (tl.program_id(1) * CO + group * OG + o).to(INDEX)[:, None] * COLUMNS + column[None, :]
    tl.store(sums + at, sum, mask=(o < OG)[:, None] & (column < COLUMNS)[None, :])
"""

_FINISH = """

@triton.jit
def finish(sums, FINISH, out):
    i = tl.program_id(0).to(INDEX) * ENDED + tl.arange(0, ENDED)
    inside = i < CO * COLUMNS
    parts = tl.zeros([SUMMED, ENDED], dtype=tl.float32)
    for first in range(0, SPLITS, SUMMED):
        split = first + tl.arange(0, SUMMED)
        at = sums + i[None, :] + split[:, None].to(INDEX) * (CO * COLUMNS)
        mask = inside[None, :] & (split < SPLITS)[:, None]
        parts += tl.load(at, mask=mask, other=0).to(tl.float32)
    sum = tl.sum(parts, axis=0)
    o = i // COLUMNS
    tap = i % COLUMNS // CG
    channel = i % CG
    value = finished(sum, o, tap, channel, inside, FINISH)
    out_at = o * RS0 + channel * RS1 + tap // KW * RS2 + tap % KW * RS3
    tl.store(out + out_at, value.to(out.dtype.element_ty), mask=inside)


"""
