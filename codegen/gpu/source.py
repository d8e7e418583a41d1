"""What emitted Triton has in common: constants, element types, index types, random numbers.

A program is a Python module of its own. It begins with constants, which carry everything that is
known when it is emitted: shapes, strides, geometry, tiles. Kernels follow, and a function `run`
that launches them. Kernels take nothing but tensors, so one source is one binary. The draws are
those of `codegen.draws`, to the bit.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from codegen import draws

# Types that kernels read and write; they add up in float32.
ELEMENTS = {torch.float32: "tl.float32", torch.bfloat16: "tl.bfloat16", torch.float16: "tl.float16"}
# What bytes may be that are multiplied.
BYTES = {
    torch.int8: "tl.int8", torch.float8_e4m3fn: "tl.float8e4nv", torch.float8_e5m2: "tl.float8e5",
    torch.float8_e4m3fnuz: "tl.float8e4b8", torch.float8_e5m2fnuz: "tl.float8e5b16",
}  # fmt: skip
# Of an H100, for which grids are cut where there is no GPU.
_MULTIPROCESSORS = 132

_DRAWS = f"""
@triton.jit
def mix(bits):
    for _ in tl.static_range(2):
        bits = ((bits ^ (bits >> 16)) * {draws._MULTIPLIER}) & {draws._MASK}
    return bits


@triton.jit
def draw_key(seed):
    return mix((tl.load(seed).to(tl.uint32) ^ SALTED) & {draws._MASK})


@triton.jit
def draw_hash(key, position):
    bits = mix((position.to(tl.uint32) ^ key) & {draws._MASK})
    bits = ((bits ^ (bits >> 15)) * {draws._FINAL_MULTIPLIER}) & {draws._MASK}
    return bits ^ (bits >> 16)


@triton.jit
def uniform(key, position):
    bits = (draw_hash(key, position) & {draws._RESOLUTION - 1}).to(tl.int32)
    return (bits.to(tl.float32) + 0.5) * {1.0 / draws._RESOLUTION!r}


@triton.jit
def coarse(key, position):
    # In units of 2**-16; one hash serves two positions.
    place = position.to(tl.uint32)
    bits = draw_hash(key, (place >> 5 << 4) + (place & 15))
    half = tl.where((place & 16) != 0, bits >> 15, bits << 1)
    return ((half & 0xFFFF) | 1).to(tl.int32)

"""


@dataclass(frozen=True, slots=True)
class Scratch:
    """Uninitialised memory that a program needs beside operands and results."""

    elements: int
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True, slots=True)
class Program:
    """Emitted Triton.

    Attributes:
        text: a module whose `run` takes the tensor arguments in order, the results, the scratch.
        scratch: flat memory, in order.
    """

    text: str
    scratch: tuple[Scratch, ...] = ()


@dataclass(frozen=True, slots=True)
class Parts:
    """Emitted pieces of a program, for who writes its `run`.

    Attributes:
        constants: what the text needs to know.
        text: kernels.
        lines: of `run`; they name operands and results as whoever emitted them says.
        memory: scratch memory, by the names that the lines have for it.
    """

    constants: dict[str, Any]
    text: str
    lines: list[str]
    memory: dict[str, Scratch]


def program(
    about: str,
    constants: Mapping[str, Any],
    body: str,
    scratch: tuple[Scratch, ...] = (),
) -> Program:
    """Return a program.

    Args:
        about: what it is, for who reads the file.
        constants: names in the body, of numbers and texts; texts stand for expressions of Triton's,
            such as types. With `SALT` among them, the body can draw.
        body: kernels, and `run`.
        scratch: what `run` needs at its end.
    """
    given = dict(constants)
    prelude = ""
    if "SALT" in given:
        salt = int(given.pop("SALT"))
        given["SALTED"] = (salt * draws._GOLDEN + 0x7F4A7C1) & draws._MASK
        prelude = _DRAWS
    lines = [f"{name} = tl.constexpr({value})" for name, value in given.items()]
    head = f'"""{about}"""\n\nimport triton\nimport triton.language as tl\n'
    return Program("\n".join((head, *lines, prelude, body.strip(), "")), scratch)


def about(name: str, **tensors: Tensor) -> str:
    """Return a line that names a primitive and what it was specialised to."""
    described = (
        f"{key} {str(x.dtype).removeprefix('torch.')} {list(x.shape)} strides {list(x.stride())}"
        for key, x in tensors.items()
    )
    return f"torch.ops.approx.{name}: {'; '.join(described)}."


def unsupported(*tensors: Tensor) -> str | None:
    """Return why tensors of these element types cannot be read by a kernel; None if they can."""
    names = [str(x.dtype).removeprefix("torch.") for x in tensors if x.dtype not in ELEMENTS]
    return f"no Triton kernel for {names[0]}" if names else None


def strides(prefix: str, tensor: Tensor) -> dict[str, int]:
    """Return constants `<prefix>0`, `<prefix>1`, ... that hold a tensor's strides in elements."""
    return {f"{prefix}{axis}": int(step) for axis, step in enumerate(tensor.stride())}


def index_type(*sizes: Tensor | int) -> str:
    """Return the integers that reach every element of these tensors, or of memory of these sizes.

    A masked-out position may lie a block beyond the end.
    """
    extents = (
        size
        if isinstance(size, int)
        else 1 + sum((n - 1) * step for n, step in zip(size.shape, size.stride(), strict=True))
        for size in sizes
    )
    return "tl.int64" if max(extents) >= (1 << 31) - (1 << 20) else "tl.int32"


def power(number: int, least: int = 1, most: int = 1 << 30) -> int:
    """Return the least power of two that is no less than a number, within limits."""
    return min(most, max(least, 1 << (max(1, number) - 1).bit_length()))


def added(dtype: torch.dtype) -> str:
    """Return the function of that name, which adds a product of two tiles to a sum.

    Tensor cores of NVIDIA's before Blackwell keep 14 bits of a sum of 8-bit floats, and cut the
    rest off: thousands of products in a row would be off by percents. So the products of each
    tile are summed up there, and the tiles in float32. Triton does that itself if the sum is given
    to `tl.dot` (`max_num_imprecise_acc`), but on Hopper only, and version 3.7 then reads tensor
    cores' results without waiting for them.
    """
    return _ADDED_APART if dtype in BYTES and dtype.is_floating_point else _ADDED


_ADDED = """
@triton.jit
def added(sum, left, right):
    return tl.dot(left, right, sum, input_precision=PRECISION, out_dtype=SUM)

"""
_ADDED_APART = """
@triton.jit
def added(sum, left, right):
    return sum + tl.dot(left, right, out_dtype=SUM, max_num_imprecise_acc=BK)

"""


def ceil_div(number: int, divisor: int) -> int:
    """Return how many pieces of a size a number is cut into."""
    return -(-number // divisor)


@cache
def multiprocessors() -> int:
    """Return how many multiprocessors there are to share work out among."""
    if not torch.cuda.is_available():
        return _MULTIPROCESSORS
    return int(torch.cuda.get_device_properties(0).multi_processor_count)


def tf32_settings() -> tuple[bool, bool]:
    """Return whether float32 may be multiplied as tf32: by convolutions, by matrix products."""
    # Asking the older `allow_tf32` raises where a program has used the newer name.
    settings: Any = torch.backends.cudnn
    return settings.conv.fp32_precision == "tf32", torch.get_float32_matmul_precision() != "highest"


def precision(dtype: torch.dtype, maps: bool) -> str:
    """Return how float32 operands are multiplied, as `tl.dot` says it.

    Args:
        dtype: of the operands; of no account if it is not float32.
        maps: whether it is a convolution of maps; a layer of single pixels is a matrix product.
    """
    allowed = tf32_settings()[0 if maps else 1]
    return "'tf32'" if allowed or dtype is not torch.float32 else "'ieee'"
