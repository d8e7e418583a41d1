"""Forward products and input gradients as matrix products over pixels, in Triton.

A tile is BM pixels of the result by BN of its channels. What is contracted is taps and channels,
tap by tap: for a tap, the pixels that a tile reads are the tile's own, moved. The operand has a
border, so that no tap falls outside, or is read where it lies, and what falls outside is 0. An
input gradient with stride S is S x S problems, one for each remainder of the pixel's coordinates,
and each of them knows the few taps that reach it. The weights are put in the order [channel of the
result, tap, contracted channel] first, unless they have it: tensor cores want bytes that are
contracted to be neighbours. A `Form` says which channels are contracted, and what becomes of the
weights on the way.
"""

from dataclasses import dataclass
from math import gcd, prod
from typing import Any

import torch
from torch import Tensor

from codegen.gpu import source as gpu
from codegen.gpu import target, tiles

# Pixels that tiles are cut from are numbered in 32 bits, and so are sums of products of bytes.
_MOST = 1 << 31
# Contracted channels of a tile, by bytes of a value: what tensor cores take at once, or more.
_DEPTHS = {1: (32, 64), 2: (16, 64), 4: (16, 32)}


@dataclass(frozen=True, slots=True)
class Product:
    """One product, for `emit`.

    Attributes:
        result: where it is put: [B, N, height, width], meta.
        contracted: channels of the other operand, all groups.
        operand: its height and width, border included.
        before: its border before the first row and column.
        weight_strides: of the weight, as [Co, Ci/groups, KH, KW].
        kernel: the kernel's spatial sizes.
        stride: one number a spatial axis.
        padding: one number a spatial axis.
        dilation: one number a spatial axis.
        groups: groups of channels.
        forward: whether this is a forward product, not an input gradient.
        dtype: of the other operand, and of the weight unless that has another; those of
            `source.BYTES` have scales.
        weight_dtype: of the weight; None for `dtype`.
        zero: the byte that stands for zero.
        operand_strides: of the other operand, [B, C, H, W]; None for channels last.
        bordered: whether no tap falls outside.
        taken: how many channels of a group are contracted; None for all.
    """

    result: Tensor
    contracted: int
    operand: tuple[int, int]
    before: list[int]
    weight_strides: tuple[int, ...]
    kernel: list[int]
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int
    forward: bool
    dtype: torch.dtype
    weight_dtype: torch.dtype | None = None
    zero: int = 0
    operand_strides: tuple[int, ...] | None = None
    bordered: bool = True
    taken: int | None = None

    @property
    def own(self) -> int:
        """Channels of the other operand, of a group."""
        return self.contracted // self.groups

    @property
    def depth(self) -> int:
        """Contracted channels of a group."""
        return self.own if self.taken is None else self.taken

    @property
    def arranged(self) -> bool:
        """Whether the weight has the order that tiles are read in already."""
        depth, taps = self.depth, prod(self.kernel)
        wanted = (taps * depth, 1, self.kernel[1] * depth, depth)
        return self.forward and tuple(self.weight_strides) == wanted


@dataclass(frozen=True, slots=True)
class Form:
    """What one kind of product puts into the common text.

    Attributes:
        text: the functions `channel_of`, of the operand, and `filter_of`, of the weight: the n-th
            that is contracted.
        channels: names of tensors that the first takes at its end.
        filters: names of those that the second takes.
    """

    text: str
    channels: tuple[str, ...] = ()
    filters: tuple[str, ...] = ()


# All channels, with weights as they are.
PLAIN = Form(
    """
@triton.jit
def channel_of(number, group, inside):
    return number


@triton.jit
def filter_of(at, number, group, inside):
    return tl.load(at + number * W_K, mask=inside)

"""
)


def emit(problem: Product, form: Form = PLAIN) -> gpu.Parts | str:
    """Return the pieces of the program for a product, or why there are none.

    The lines of `run` name `operand`, `weight`, `scales` (a tuple, empty for floats), the tensors
    of the form, and `out`.
    """
    result, groups = problem.result, problem.groups
    batch, channels, *size = (int(number) for number in result.shape)
    columns, depth = channels // groups, problem.depth
    if batch * prod(size) >= _MOST or prod(problem.kernel) * depth << 14 >= _MOST:
        return "sums or images that are too long"
    phases = _phases(problem, size)
    taps, byte = prod(problem.kernel), problem.dtype in gpu.BYTES
    least, most = _DEPTHS[problem.dtype.itemsize]
    # Channels of a list have an address each: a deep tile's would not fit into registers.
    most = 128 if byte and target.is_large() else most
    deep = _deep(depth, least, most if problem.taken is None else most // 2)
    tile = _cut(batch, columns, deep, problem, phases[0])
    sizes = (batch, problem.contracted, *problem.operand)
    operand_strides = problem.operand_strides or _channels_last(sizes)
    reach = 1 + sum((n - 1) * step for n, step in zip(sizes, operand_strides, strict=True))
    maps = max(*problem.kernel, *problem.operand) > 1
    whole = depth % tile["BK"] == 0
    strides = problem.weight_strides
    constants: dict[str, Any] = {
        "B": batch, "N": columns, "DEPTH": depth, "OWN": problem.own, "GROUPS": groups,
        "TAPS": taps, "KW": problem.kernel[1],
        "HEIGHT": problem.operand[0], "WIDTH": problem.operand[1], "BORDERED": problem.bordered,
        "ARRANGED": channels * taps * depth,
        "WALK_Y": problem.stride[0] if problem.forward else 1,
        "WALK_X": problem.stride[1] if problem.forward else 1,
        "OUT_Y": 1 if problem.forward else problem.stride[0],
        "OUT_X": 1 if problem.forward else problem.stride[1],
        **{f"OS{axis}": step for axis, step in enumerate(operand_strides)},
        **{f"WS{axis}": step for axis, step in enumerate(strides)},
        **gpu.strides("RS", result), **tile,
        "N_TILES": gpu.ceil_div(columns, tile["BN"]),
        "WHOLE": whole, "FREE": whole and problem.bordered, "ZERO": problem.zero,
        "OPERAND_TYPE": gpu.BYTES.get(problem.dtype),
        "WEIGHT_TYPE": gpu.BYTES.get(problem.weight_dtype or problem.dtype),
        "SUM": "tl.int32" if problem.dtype is torch.int8 else "tl.float32",
        "PRECISION": gpu.precision(problem.dtype, maps),
        "INDEX": gpu.index_type(result, reach, channels * taps * depth),
    }  # fmt: skip
    # The weight's two channel axes: that of the result, and that which is contracted.
    inner, outer = ("WS0", "WS1") if problem.forward else ("WS1", "WS0")
    constants |= {"W_N": constants[inner], "W_K": constants[outer]}
    constants["W_GROUP"] = constants["WS0"] * (channels if problem.forward else problem.contracted)
    constants["W_GROUP"] //= groups
    lines: list[str] = []
    memory: dict[str, gpu.Scratch] = {}
    filters = "weight"
    of_channels, of_filters = (
        "".join(f", {name}" for name in names) for names in (form.channels, form.filters)
    )
    if form is not PLAIN or not problem.arranged:
        dtype = torch.uint8 if byte else problem.dtype
        memory["arranged"] = gpu.Scratch(channels * taps * depth, dtype)
        grid = "(triton.cdiv(ARRANGED.value, 1024),)"
        lines.append(f"arrange[{grid}](weight{of_filters}, arranged)")
        filters = "arranged"
    for phase in phases:
        pixels = batch * phase["ROWS"] * phase["COLUMNS"]
        programs = gpu.ceil_div(pixels, tile["BM"]) * constants["N_TILES"]
        # Parameters, not constants: the interpreter divides loop counters by nothing but numbers.
        numbers = {**phase, "BLOCKS": gpu.ceil_div(depth, tile["BK"])}
        given = ", ".join(f"{name}={value}" for name, value in numbers.items())
        lines.append(
            f"product[({programs}, {groups})](\n"
            f"        operand, {filters}, *scales{of_channels}, out, "
            f"{given}, {_options(tile)}\n    )"
        )
    text = (_BYTES if byte else _FLOATS) + form.text + gpu.added(problem.dtype) + _TEXT
    scales = ", first_scale, second_scale" if byte else ""
    names = {", SCALES": scales, ", CHANNELS": of_channels, ", FILTERS": of_filters}
    for place, given_names in names.items():
        text = text.replace(place, given_names)
    return gpu.Parts(constants, text, lines, memory)


def _channels_last(sizes: tuple[int, ...]) -> tuple[int, ...]:
    _, channels, height, width = sizes
    return height * width * channels, 1, width * channels, channels


def _deep(depth: int, least: int, most: int) -> int:
    """Return how many channels are contracted at a time: many, and few beyond the last one."""
    powers = [number for number in (16, 32, 64, 128) if least <= number <= most]
    # A step takes a fixed time too, that of a quarter of the most.
    return min(powers[::-1], key=lambda deep: gpu.ceil_div(depth, deep) * (deep + most // 4))


def _cut(
    batch: int, columns: int, deep: int, problem: Product, phase: dict[str, int]
) -> dict[str, int]:
    """Return the tile of a product, all of whose phases have the same one."""
    rows = batch * phase["ROWS"] * phase["COLUMNS"]
    steps = phase["TAPS_Y"] * phase["TAPS_X"] * gpu.ceil_div(problem.depth, deep)
    itemsize = problem.dtype.itemsize
    widest = 256 if target.is_large() and problem.taken is None else 128
    tile = tiles.best(
        tiles.Work(rows, columns, steps, deep, problem.groups, itemsize, least=32, widest=widest)
    )
    return {"BM": tile.high, "BN": tile.wide, "BK": deep}


def _options(tile: dict[str, int]) -> str:
    large = tile["BM"] * tile["BN"] >= 128 * 128
    return f"num_warps={8 if large else 4}, num_stages={4 if tile['BM'] < 128 else 3}"


def _phases(problem: Product, size: list[int]) -> list[dict[str, int]]:
    """Return the constants of each of the problems that a product consists of."""
    if problem.forward:
        axes = [_forward_axis(problem, axis, size[axis]) for axis in range(2)]
        return [_phase(*axes)]
    rows, columns = (
        [_input_axis(problem, axis, size[axis], rest) for rest in range(problem.stride[axis])]
        for axis in range(2)
    )
    return [_phase(row, column) for row in rows for column in columns if row[0] and column[0]]


def _phase(row: tuple[int, ...], column: tuple[int, ...]) -> dict[str, int]:
    names = ("{}S", "REST_{}", "TAPS_{}", "TAP_{}", "NEXT_{}", "AT_{}", "MOVE_{}")
    pairs = (("ROW", "Y", row), ("COLUMN", "X", column))
    return {
        name.format(long if name == "{}S" else short): number
        for long, short, axis in pairs
        for name, number in zip(names, axis, strict=True)
    }


def _forward_axis(problem: Product, axis: int, length: int) -> tuple[int, ...]:
    """Return what a product needs to know of an axis.

    Returns:
        Pixels, their remainder, taps, the first tap and the step to the next one, where the first
        tap of the first pixel looks, and how far the next tap looks from there.
    """
    at = problem.before[axis] - problem.padding[axis]
    return length, 0, problem.kernel[axis], 0, 1, at, problem.dilation[axis]


def _input_axis(problem: Product, axis: int, length: int, rest: int) -> tuple[int, ...]:
    """Return the same for the pixels of an input gradient with this remainder."""
    stride, dilation = problem.stride[axis], problem.dilation[axis]
    shifted = rest + problem.padding[axis]
    reach = [tap for tap in range(problem.kernel[axis]) if (shifted - tap * dilation) % stride == 0]
    pixels = gpu.ceil_div(length - rest, stride) if length > rest else 0
    # Taps that reach these pixels are evenly spaced, and each looks a bit further back.
    step = stride // gcd(stride, dilation)
    first = reach[0] if reach else 0
    at = (shifted - first * dilation) // stride + problem.before[axis]
    return pixels, rest, len(reach), first, step, at, -(step * dilation // stride)


_BYTES = """
@triton.jit
def read(at, mask, free: tl.constexpr, TYPE: tl.constexpr):
    # With a zero point of 0 a byte is the number: it goes to the tensor cores as it is.
    if ZERO == 0:
        at = at.to(tl.pointer_type(TYPE), bitcast=True)
        return tl.load(at) if free else tl.load(at, mask=mask, other=0.0)
    else:
        byte = tl.load(at) if free else tl.load(at, mask=mask, other=ZERO)
        return (byte ^ ZERO).to(TYPE, bitcast=True)


@triton.jit
def scaled(sum, first_scale, second_scale):
    return sum.to(tl.float32) * tl.load(first_scale) * tl.load(second_scale)

"""

_FLOATS = """
@triton.jit
def read(at, mask, free: tl.constexpr, TYPE: tl.constexpr):
    return tl.load(at) if free else tl.load(at, mask=mask, other=0.0)


@triton.jit
def scaled(sum):
    return sum

"""

_TEXT = """
@triton.jit
def arrange(weight, FILTERS, arranged):
    i = tl.program_id(0) * 1024 + tl.arange(0, 1024)
    inside = i < ARRANGED
    channel = i // (DEPTH * TAPS)
    tap = i // DEPTH % TAPS
    at = channel // N * W_GROUP + channel % N * W_N + tap // KW * WS2 + tap % KW * WS3
    value = filter_of(weight + at, i % DEPTH, channel // N, inside, FILTERS)
    tl.store(arranged + i, value, mask=inside)


@triton.jit
def product(
    operand, weight, SCALES, CHANNELS, out,
    ROWS: tl.constexpr, REST_Y: tl.constexpr, TAPS_Y: tl.constexpr, TAP_Y: tl.constexpr,
    NEXT_Y: tl.constexpr, AT_Y: tl.constexpr, MOVE_Y: tl.constexpr,
    COLUMNS: tl.constexpr, REST_X: tl.constexpr, TAPS_X: tl.constexpr, TAP_X: tl.constexpr,
    NEXT_X: tl.constexpr, AT_X: tl.constexpr, MOVE_X: tl.constexpr, BLOCKS: tl.constexpr,
):
    group = tl.program_id(1)
    n = tl.program_id(0) % N_TILES * BN + tl.arange(0, BN)
    m = tl.program_id(0) // N_TILES * BM + tl.arange(0, BM)
    k = tl.arange(0, BK)
    # Beyond the ends, any pixel and any filter will do: they are not stored.
    pixel = m % (B * ROWS * COLUMNS)
    column = pixel % COLUMNS
    row = pixel // COLUMNS % ROWS
    image = (pixel // (COLUMNS * ROWS)).to(INDEX)
    top = row * WALK_Y + AT_Y
    side = column * WALK_X + AT_X
    corner = image * OS0 + top * OS2 + side * OS3 + (group * OWN).to(INDEX) * OS1
    filters = (group * N + n % N) * (TAPS * DEPTH)
    sum = tl.zeros([BM, BN], dtype=SUM)
    for step in range(0, TAPS_Y * TAPS_X * BLOCKS):
        y = step // BLOCKS // TAPS_X
        x = step // BLOCKS % TAPS_X
        number = step % BLOCKS * BK + k
        inside = number < DEPTH
        channel = channel_of(number, group, inside, CHANNELS)
        move = y * (MOVE_Y * OS2) + x * (MOVE_X * OS3)
        tap = ((TAP_Y + y * NEXT_Y) * KW + TAP_X + x * NEXT_X) * DEPTH
        mask = inside[None, :]
        if not BORDERED:
            at_y = top + y * MOVE_Y
            at_x = side + x * MOVE_X
            seen = ((at_y >= 0) & (at_y < HEIGHT) & (at_x >= 0) & (at_x < WIDTH))[:, None]
            mask = seen if WHOLE else seen & mask
        left_at = operand + corner[:, None] + (move + channel * OS1)[None, :]
        left = read(left_at, mask, FREE, OPERAND_TYPE)
        right_at = weight + filters[None, :] + (tap + number)[:, None]
        right = read(right_at, inside[:, None], WHOLE, WEIGHT_TYPE)
        sum = added(sum, left, right)
    value = scaled(sum, SCALES).to(out.dtype.element_ty)
    at = image * RS0 + (row * OUT_Y + REST_Y) * RS2 + (column * OUT_X + REST_X) * RS3
    mask = (m < B * ROWS * COLUMNS)[:, None] & (n < N)[None, :]
    tl.store(out + at[:, None] + ((group * N + n) * RS1)[None, :], value, mask=mask)
"""
