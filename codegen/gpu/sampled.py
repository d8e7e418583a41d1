"""The weight gradient of sampled output pixels in Triton: weights and centring in the loads."""

import math

import torch
from torch import Tensor

from codegen.gpu import source as gpu
from codegen.gpu import weight_gradient


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
    """Return the program for two spatial axes; arguments as those of the primitive."""
    if len(kernel) != 2:
        return f"no kernel for {len(kernel)} spatial axes"
    if (reason := gpu.unsupported(grad, x)) is not None or grad.dtype != x.dtype:
        return reason or "operands of two types"
    small = [tensor for tensor in (weight, center, sums) if tensor is not None]
    if any(tensor.dtype != torch.float32 for tensor in small) or x.numel() == 0:
        return "weights are not float32" if x.numel() else "x is empty"
    if sums is not None and (center is None or not sums.is_contiguous()):
        return "sums without a centre, or not contiguous"
    layout = torch.channels_last if x.stride(1) == 1 else torch.contiguous_format
    shape = (grad.shape[1], x.shape[1] // groups, *kernel)
    result = torch.empty(shape, dtype=grad.dtype, device="meta", memory_format=layout)
    problem = weight_gradient.Problem(
        result, list(grad.shape), list(x.shape), grad.stride(), x.stride(), 0, kernel, stride,
        padding, dilation, groups, grad.dtype, narrow=narrow,
    )  # fmt: skip
    operands = ("index", "weight", *(("center",) if center is not None else ()))
    shares = ("center", "center_sums") if sums is not None else ()
    text = _TEXT + (_CENTRED if center is not None else _PLAIN)
    text += _SHARES if sums is not None else _NO_SHARES
    form = weight_gradient.Form(text.replace(", TENSORS", _names(operands)), operands, shares)
    parts = weight_gradient.emit(problem, index.shape[0], form)
    if isinstance(parts, str):
        return parts
    constants = {
        **parts.constants, "IS": index.stride(0), "WS": weight.stride(0),
        "CS": 0 if center is None else center.stride(0), "TAPS": math.prod(kernel),
    }  # fmt: skip
    given = _names((*operands, *shares[1:]))
    run = [f"def run(grad, x{given}, out, sums):", *(f"    {line}" for line in parts.lines)]
    about = gpu.about("sampled_wgrad", grad=grad, x=x, index=index)
    return gpu.program(about, constants, parts.text + "\n".join(run), parts.scratch)


def _names(names: tuple[str, ...]) -> str:
    return "".join(f", {name}" for name in names)


_TEXT = """
@triton.jit
def pixel_of(number, inside, TENSORS):
    return tl.load(index + number * IS, mask=inside, other=0).to(INDEX)


@triton.jit
def left_of(at, mask, number, inside, TENSORS):
    value = tl.load(at, mask=mask, other=0.0)
    weighted = value.to(tl.float32) * tl.load(weight + number * WS, mask=inside, other=0.0)[:, None]
    return weighted.to(value.dtype)


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
    return sum + mean * tl.load(center_sums + o * TAPS + tap, mask=inside, other=0.0)

"""

_NO_SHARES = """
@triton.jit
def finished(sum, o, tap, channel, inside):
    return sum

"""
