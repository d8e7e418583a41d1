"""Norms of pixels and sums by tap in Triton, in one pass over the output gradient.

Which taps lie inside the image is a matrix of zeros and ones, pixels by taps: its product with the
gradient is what sums by tap are. A program has a run of pixels, and its own sums.
"""

import math

from torch import Tensor

from codegen.gpu import source as gpu

# What a program has at a time, in bytes: of a pixel's channels, and of a channel's pixels. Twice as
# many of either are more than registers hold, on every target.
_CHANNEL_BYTES, _PIXEL_BYTES = 256, 128


def program(
    grad: Tensor,
    size: list[int],
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    block: int,
) -> gpu.Program | str:
    """Return the program for two spatial axes; arguments as those of the primitive."""
    if len(kernel) != 2:
        return f"no kernel for {len(kernel)} spatial axes"
    if (reason := gpu.unsupported(grad)) is not None:
        return reason
    batch, channels, height, width = grad.shape
    pixels, taps = batch * height * width, math.prod(kernel)
    run = _PIXEL_BYTES // grad.itemsize
    steps = gpu.ceil_div(gpu.ceil_div(pixels, run), 4 * gpu.multiprocessors())
    programs = gpu.ceil_div(pixels, run * steps)
    across = gpu.power(channels, 16, _CHANNEL_BYTES // grad.itemsize)
    constants = {
        "CO": channels, "OH": height, "OW": width, "IH": size[0], "IW": size[1],
        "KW": kernel[1], "SH": stride[0], "SW": stride[1], "PH": padding[0], "PW": padding[1],
        "DH": dilation[0], "DW": dilation[1], "TAPS": taps, "TAP_ROWS": gpu.power(taps, 16),
        "NORMS": pixels // block, "RUN": block, "PIXELS": pixels, "P": run, "STEPS": steps,
        "PROGRAMS": programs, "ACROSS": across, "PARTS": gpu.ceil_div(channels, across),
        # Programs whose sums are added up at a time: many, as each round waits for memory.
        "ADDED": gpu.power(programs, 1, 256),
        "INDEX": gpu.index_type(grad, programs * channels * taps),
        **gpu.strides("GS", grad),
    }  # fmt: skip
    scratch = (gpu.Scratch(pixels), gpu.Scratch(programs * channels * taps))
    return gpu.program(gpu.about("pixel_norms", grad=grad), constants, _TEXT, scratch)


_TEXT = """
@triton.jit
def scan(grad, squares, sums):
    tap = tl.arange(0, TAP_ROWS)
    tap_y = (tap // KW * DH)[:, None]
    tap_x = (tap % KW * DW)[:, None]
    for part in range(0, PARTS):
        channel = part * ACROSS + tl.arange(0, ACROSS)
        sum = tl.zeros([TAP_ROWS, ACROSS], dtype=tl.float32)
        for step in range(0, STEPS):
            pixel = (tl.program_id(0) * STEPS + step) * P + tl.arange(0, P)
            row = pixel // OW % OH
            line = pixel % OW
            at = (pixel // (OH * OW)).to(INDEX) * GS0 + row * GS2 + line * GS3
            mask = (pixel < PIXELS)[:, None] & (channel < CO)[None, :]
            at = grad + at[:, None] + (channel * GS1)[None, :]
            value = tl.load(at, mask=mask, other=0.0)
            wide = value.to(tl.float32)
            square = tl.sum(wide * wide, axis=1)
            if part > 0:
                square += tl.load(squares + pixel, mask=pixel < PIXELS, other=0.0)
            tl.store(squares + pixel, square, mask=pixel < PIXELS)
            y = row[None, :] * SH - PH + tap_y
            x = line[None, :] * SW - PW + tap_x
            inside = (y >= 0) & (y < IH) & (x >= 0) & (x < IW)
            # Zeros and ones are exact in every type; float32 stays float32.
            sum = tl.dot(inside.to(value.dtype), value, sum, input_precision="ieee")
        at = (tl.program_id(0) * CO + channel).to(INDEX)[None, :] * TAPS + tap[:, None]
        tl.store(sums + at, sum, mask=(tap < TAPS)[:, None] & (channel < CO)[None, :])
        # Squares that one thread wrote, another one reads.
        tl.debug_barrier()


@triton.jit
def roots(squares, norms):
    i = tl.program_id(0) * 1024 + tl.arange(0, 1024)
    sum = tl.zeros([1024], dtype=tl.float32)
    for step in range(0, RUN):
        sum += tl.load(squares + i * RUN + step, mask=i < NORMS, other=0.0)
    tl.store(norms + i, tl.sqrt_rn(sum), mask=i < NORMS)


@triton.jit
def add(sums, result):
    i = tl.program_id(0) * 16 + tl.arange(0, 16)
    number = tl.arange(0, ADDED)
    sum = tl.zeros([ADDED, 16], dtype=tl.float32)
    for first in range(0, PROGRAMS, ADDED):
        at = (first + number).to(INDEX)[:, None] * (CO * TAPS) + i[None, :]
        mask = (first + number < PROGRAMS)[:, None] & (i < CO * TAPS)[None, :]
        sum += tl.load(sums + at, mask=mask, other=0.0)
    tl.store(result + i, tl.sum(sum, axis=0), mask=i < CO * TAPS)


def run(grad, norms, result, squares, sums):
    scan[(PROGRAMS.value,)](grad, squares, sums)
    roots[(triton.cdiv(NORMS.value, 1024),)](squares, norms)
    add[(triton.cdiv(CO.value * TAPS.value, 16),)](sums, result)
"""
