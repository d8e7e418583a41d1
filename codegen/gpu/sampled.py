"""The weight gradient of sampled output pixels in Triton: weights and centring in the loads.

The pixels are those of a list with a weight each, or those of a phase, whose numbers the kernel
computes itself.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from codegen import phases
from codegen.gpu import source as gpu
from codegen.gpu import weight_gradient


@dataclass(frozen=True, slots=True)
class _Pixels:
    """Which pixels are contracted.

    Attributes:
        count: how many, at most.
        text: the functions `pixel_of` and `left_of`.
        operands: names of the tensors that say which.
        constants: what the text needs to know.
        scale: factor on the sums.
    """

    count: int
    text: str
    operands: tuple[str, ...]
    constants: dict[str, Any]
    scale: int = 1


def weight_gradient_program(
    grad: Tensor,
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    center: Tensor | None,
    sums: Tensor | None,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    narrow: bool,
) -> gpu.Program | str:
    """Return the program for two spatial axes; arguments as those of `sampled_wgrad`."""
    if weight.dtype != torch.float32:
        return "weights are not float32"
    strides = {"IS": index.stride(0), "WS": weight.stride(0)}
    pixels = _Pixels(index.shape[0], _LIST, ("index", "weight"), strides)
    axes = (kernel, stride, padding, dilation)
    return _program("sampled_wgrad", pixels, grad, x, center, sums, axes, groups, narrow)


def phase_gradient_program(
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
) -> gpu.Program | str:
    """Return the program for two spatial axes; arguments as those of `phase_wgrad`."""
    if phase.dtype != torch.int64:
        return "a phase that is not int64"
    if len(kernel) != 2:
        return f"no kernel for {len(kernel)} spatial axes"
    rows, columns = phases.largest(list(grad.shape[2:]), down, across)
    constants = {
        "DOWN": down, "ACROSS": across, "STAGGERED": staggered, "ROWS": rows, "LINES": columns,
    }  # fmt: skip
    count = int(grad.shape[0]) * rows * columns
    pixels = _Pixels(count, _PHASE, ("phase",), constants, down * across)
    axes = (kernel, stride, padding, dilation)
    return _program("phase_wgrad", pixels, grad, x, center, sums, axes, groups, narrow=False)


def _program(
    name: str,
    pixels: _Pixels,
    grad: Tensor,
    x: Tensor,
    center: Tensor | None,
    sums: Tensor | None,
    axes: tuple[list[int], list[int], list[int], list[int]],
    groups: int,
    narrow: bool,
) -> gpu.Program | str:
    """Return the program; `axes` are kernel, stride, padding and dilation."""
    kernel = axes[0]
    if len(kernel) != 2:
        return f"no kernel for {len(kernel)} spatial axes"
    if (reason := gpu.unsupported(grad, x)) is not None or grad.dtype != x.dtype:
        return reason or "operands of two types"
    small = [tensor for tensor in (center, sums) if tensor is not None]
    if any(tensor.dtype != torch.float32 for tensor in small) or x.numel() == 0:
        return "a centre that is not float32" if x.numel() else "x is empty"
    if sums is not None and (center is None or not sums.is_contiguous()):
        return "sums without a centre, or not contiguous"
    layout = torch.channels_last if x.stride(1) == 1 else torch.contiguous_format
    shape = (grad.shape[1], x.shape[1] // groups, *kernel)
    result = torch.empty(shape, dtype=grad.dtype, device="meta", memory_format=layout)
    problem = weight_gradient.Problem(
        result, list(grad.shape), list(x.shape), grad.stride(), x.stride(), 0, *axes, groups,
        grad.dtype, narrow=narrow,
    )  # fmt: skip
    operands = (*pixels.operands, *(("center",) if center is not None else ()))
    shares = ("center", "center_sums") if sums is not None else ()
    text = pixels.text + _RIGHT + (_CENTRED if center is not None else _PLAIN)
    text += _SHARES if sums is not None else _NO_SHARES
    form = weight_gradient.Form(text.replace(", TENSORS", _names(operands)), operands, shares)
    parts = weight_gradient.emit(problem, pixels.count, form)
    if isinstance(parts, str):
        return parts
    constants = {
        **parts.constants, **pixels.constants, "SCALE": pixels.scale,
        "CS": 0 if center is None else center.stride(0), "TAPS": math.prod(kernel),
    }  # fmt: skip
    given = _names((*operands, *shares[1:]))
    given += _names(("out", *parts.memory))
    run = [f"def run(grad, x{given}):", *(f"    {line}" for line in parts.lines)]
    about = gpu.about(name, grad=grad, x=x)
    return gpu.program(about, constants, parts.text + "\n".join(run), tuple(parts.memory.values()))


def _names(names: tuple[str, ...]) -> str:
    return "".join(f", {name}" for name in names)


_LIST = """
@triton.jit
def pixel_of(number, inside, TENSORS):
    return tl.load(index + number * IS, mask=inside, other=0).to(INDEX)


@triton.jit
def left_of(at, mask, number, inside, TENSORS):
    value = tl.load(at, mask=mask, other=0.0)
    weighted = value.to(tl.float32) * tl.load(weight + number * WS, mask=inside, other=0.0)[:, None]
    return weighted.to(value.dtype)

"""

_PHASE = """
@triton.jit
def pixel_of(number, inside, TENSORS):
    image = number // (ROWS * LINES)
    chosen = tl.load(phase).to(tl.int32)
    if STAGGERED:
        chosen = (chosen + image) % (DOWN * ACROSS)
    row = number // LINES % ROWS * DOWN + chosen // ACROSS
    line = number % LINES * ACROSS + chosen % ACROSS
    pixel = (image.to(INDEX) * OH + row) * OW + line
    # Where the map ends within a step, the last phases are smaller.
    return tl.where((row < OH) & (line < OW), pixel, -1)


@triton.jit
def left_of(at, mask, number, inside, TENSORS):
    return tl.load(at, mask=mask, other=0.0)

"""

_RIGHT = """
@triton.jit
def right_of(at, mask, channel, TENSORS):
    value = tl.load(at, mask=mask, other=0.0)
"""

_CENTRED = """\
    # Outside the image x stays 0.
    centred = value.to(tl.float32) - tl.load(center + channel * CS)[None, :]
    return tl.where(mask, centred, 0.0).to(value.dtype)

"""

_PLAIN = """\
    return value

"""

_SHARES = """
@triton.jit
def finished(sum, o, tap, channel, inside, center, center_sums):
    mean = tl.load(center + (o // OG * CG + channel) * CS, mask=inside, other=0.0)
    return SCALE * sum + mean * tl.load(center_sums + o * TAPS + tap, mask=inside, other=0.0)

"""

_NO_SHARES = """
@triton.jit
def finished(sum, o, tap, channel, inside):
    return SCALE * sum

"""
