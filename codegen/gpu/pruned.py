"""Products of a stochastically pruned output gradient in Triton.

The gradient is pruned once, into scratch memory with channels last and the border that the product
needs; tensor cores then multiply what is left as if it were dense. Pruning in the loads would save
that copy, and draw every number once a tap and a tile again. No tile is skipped: with a quarter of
the blocks left here and there, of 16 channels each, 64 pixels by 64 channels hold 256 of them, and
are next to never all zero. A draw for a whole tile would be sampling of pixels by their norm, which
adds the more noise.
"""

import math

import torch
from torch import Tensor

from codegen import int8
from codegen.gpu import products, weight_gradient
from codegen.gpu import source as gpu


def input_gradient_program(
    grad: Tensor,
    weight: Tensor,
    threshold: Tensor,
    seed: Tensor,
    size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    salt: int,
    block: int,
) -> gpu.Program | str:
    """Return the program for two spatial axes; arguments as those of `pruned_dgrad`."""
    del seed
    kernel = list(weight.shape[2:])
    if (reason := _unsupported(grad, weight, threshold, kernel, groups, block)) is not None:
        return reason
    layout = torch.channels_last if grad.stride(1) == 1 else torch.contiguous_format
    result = torch.empty(size, dtype=grad.dtype, device="meta", memory_format=layout)
    out = list(grad.shape)
    border = int8.grad_border(size[2:], out[2:], kernel, stride, padding, dilation)
    _, high, wide, channels = int8.padded(out, *border)
    parts = products.emit(
        products.Product(
            result, channels, (high, wide), border[0], weight.stride(), kernel, stride, padding,
            dilation, groups, False, grad.dtype,
        )
    )  # fmt: skip
    if isinstance(parts, str):
        return parts
    given = ", ".join(("grad", "weight", "threshold", "seed", "out", *parts.memory, "operand"))
    run = (
        f"def run({given}):",
        "    prune[PRUNE_GRID.value](grad, threshold, seed, operand)",
        "    scales = ()",
        *(f"    {line}" for line in parts.lines),
    )
    constants = {**_constants(grad, border, salt, block), **parts.constants}
    scratch = (*parts.memory.values(), gpu.Scratch(out[0] * high * wide * channels, grad.dtype))
    about = gpu.about("pruned_dgrad", grad=grad, weight=weight)
    return gpu.program(about, constants, _PRUNE + parts.text + "\n" + "\n".join(run), scratch)


def weight_gradient_program(
    grad: Tensor,
    x: Tensor,
    threshold: Tensor,
    seed: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    salt: int,
    block: int,
) -> gpu.Program | str:
    """Return the program for two spatial axes; arguments as those of `pruned_wgrad`."""
    del seed
    if (reason := _unsupported(grad, x, threshold, kernel, groups, block)) is not None:
        return reason
    out = list(grad.shape)
    layout = torch.channels_last if x.stride(1) == 1 else torch.contiguous_format
    shape = (out[1], x.shape[1] // groups, *kernel)
    result = torch.empty(shape, dtype=grad.dtype, device="meta", memory_format=layout)
    strides = (math.prod(out[1:]), 1, out[3] * out[1], out[1])
    problem = weight_gradient.Problem(
        result, out, list(x.shape), strides, x.stride(), 0, kernel, stride, padding, dilation,
        groups, grad.dtype,
    )  # fmt: skip
    parts = weight_gradient.emit(problem, grad.numel() // out[1], weight_gradient.PLAIN)
    if isinstance(parts, str):
        return parts
    run = (
        f"def run(given, x, threshold, seed, out, {', '.join(parts.memory)}, grad):",
        "    prune[PRUNE_GRID.value](given, threshold, seed, grad)",
        *(f"    {line}" for line in parts.lines),
    )
    given = _constants(grad, ([0, 0], [0, 0]), salt, block)
    constants = {**given, **parts.constants}
    scratch = (*parts.memory.values(), gpu.Scratch(grad.numel(), grad.dtype))
    about = gpu.about("pruned_wgrad", grad=grad, x=x)
    return gpu.program(about, constants, _PRUNE + parts.text + "\n".join(run), scratch)


def _unsupported(
    grad: Tensor, other: Tensor, threshold: Tensor, kernel: list[int], groups: int, block: int
) -> str | None:
    if len(kernel) != 2:
        return f"no kernel for {len(kernel)} spatial axes"
    if (reason := gpu.unsupported(grad, other)) is not None:
        return reason
    if grad.dtype != other.dtype or threshold.dtype != torch.float32:
        return "operands of several types, or a threshold that is not float32"
    if block & (block - 1) or (grad.shape[1] // groups) % block:
        return f"blocks of {block} channels out of {grad.shape[1] // groups}"
    return None


def _constants(
    grad: Tensor, border: tuple[list[int], list[int]], salt: int, block: int
) -> dict[str, int | str]:
    """Return what the pruning needs to know; its names differ from those of the products."""
    batch, channels, height, width = grad.shape
    _, high, wide, _ = int8.padded(list(grad.shape), *border)
    across = gpu.power(channels // block, 1, max(1, 64 // block))
    along = max(1, 2048 // (across * block))
    grid = gpu.ceil_div(batch * high * wide, along), gpu.ceil_div(channels, across * block)
    return {
        "SALT": salt, "PRUNED": channels, "PRUNED_H": height, "PRUNED_W": width,
        "TOP": border[0][0], "LEFT": border[0][1], "HP": high, "WP": wide,
        "PRUNED_PIXELS": batch * high * wide, "BLOCK": block, "ACROSS": across, "ALONG": along,
        "PRUNE_GRID": str(grid),
        "PRUNED_INDEX": gpu.index_type(grad, batch * high * wide * channels),
        **gpu.strides("PS", grad),
    }  # fmt: skip


_PRUNE = """
@triton.jit
def prune(grad, threshold, seed, out):
    # [pixels with the border, blocks of channels, channels of a block]
    pixel = (tl.program_id(0) * ALONG + tl.arange(0, ALONG))[:, None, None]
    block = (tl.program_id(1) * ACROSS + tl.arange(0, ACROSS))[None, :, None]
    channel = block * BLOCK + tl.arange(0, BLOCK)[None, None, :]
    column = pixel % WP - LEFT
    row = pixel // WP % HP - TOP
    image = (pixel // (WP * HP)).to(PRUNED_INDEX)
    mask = (pixel < PRUNED_PIXELS) & (channel < PRUNED)
    inside = (column >= 0) & (column < PRUNED_W) & (row >= 0) & (row < PRUNED_H) & mask
    at = image * PS0 + channel * PS1 + row * PS2 + column * PS3
    given = tl.load(grad + at, mask=inside, other=0.0)
    value = given.to(tl.float32)
    if BLOCK == 1:
        norm = tl.abs(value)
    else:
        norm = tl.sqrt_rn(tl.sum(value * value, axis=2))[:, :, None]
    # A threshold that is not finite prunes nothing.
    limit = tl.load(threshold)
    limit = tl.where(tl.abs(limit) < float("inf"), limit, 0.0)
    position = ((image * PRUNED_H + row) * PRUNED_W + column) * (PRUNED // BLOCK) + block
    kept = uniform(draw_key(seed), position) * limit < norm
    drawn = tl.where(kept, value * (limit / norm), 0.0)
    left = tl.where(norm < limit, drawn, value).to(given.dtype)
    tl.store(out + pixel.to(PRUNED_INDEX) * PRUNED + channel, left, mask=mask)

"""
