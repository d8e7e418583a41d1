"""Pixel norms: how large the output gradient is at every output pixel, and its sums by tap.

In one pass over g: norm[r] = sqrt(sum_o g[b, o, p]^2) for the pixels r = b * OH * OW + p,
or for runs of `block` neighbouring pixels, whose squares are summed; and

    sums[o, tap] = sum of g[b, o, p] over the pixels p from which that tap lies inside the image,

which is what the weight gradient of an input of ones would be. Letters: B batch, Co channels.
"""

import math
from typing import Any

import torch
from torch import Tensor

from codegen import cpp
from codegen.gpu.norms import program as emit_triton
from codegen.kernel import Kernel, Sample, Source, register

# Parts that a call is divided into, whatever the number of threads.
_TASKS = 16


def reference(
    grad: Tensor,
    size: list[int],
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    block: int,
) -> tuple[Tensor, Tensor]:
    """Return norms and sums of the output gradient.

    Args:
        grad: [B, Co, *out].
        size: spatial sizes of the convolution's input.
        kernel: the kernel's spatial sizes.
        stride: one number a spatial axis.
        padding: one number a spatial axis.
        dilation: one number a spatial axis.
        block: neighbouring pixels that share a norm; divides B * out.

    Returns:
        Norms [B * out / block] and sums [Co, *kernel], in float32 or wider.
    """
    wide = grad.to(torch.promote_types(grad.dtype, torch.float32))
    norms = wide.square().sum(1).view(-1, block).sum(1).sqrt()
    sums = wide.sum(0)
    for axis, length in enumerate(size):
        out = torch.arange(sums.shape[1], device=grad.device)[:, None] * stride[axis]
        tap = torch.arange(kernel[axis], device=grad.device) * dilation[axis]
        at = out + tap - padding[axis]
        inside = ((at >= 0) & (at < length)).to(sums.dtype)
        # The first spatial axis is contracted; its taps go to the end.
        sums = torch.tensordot(sums, inside, ([1], [0]))
    return norms, sums


def fake(
    grad: Tensor,
    size: list[int],
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    block: int,
) -> tuple[Tensor, Tensor]:
    """Return uninitialised norms and sums."""
    del size, stride, padding, dilation
    wide = torch.promote_types(grad.dtype, torch.float32)
    rows = grad.shape[0] * math.prod(grad.shape[2:])
    norms = torch.empty(rows // block, dtype=wide, device=grad.device)
    return norms, torch.empty((grad.shape[1], *kernel), dtype=wide, device=grad.device)


def emit_cpp(
    grad: Tensor,
    size: list[int],
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    block: int,
) -> Source | str:
    """Return the source for two spatial axes."""
    if len(kernel) != 2:
        return f"no kernel for {len(kernel)} spatial axes"
    if (reason := cpp.unsupported(grad)) is not None:
        return reason
    batch, channels, out_height, out_width = grad.shape
    constants: dict[str, Any] = {
        "T": cpp.ELEMENTS[grad.dtype], "B": batch, "CO": channels,
        "OH": out_height, "OW": out_width, "IH": size[0], "IW": size[1],
        "KH": kernel[0], "KW": kernel[1], "SH": stride[0], "SW": stride[1],
        "PH": padding[0], "PW": padding[1], "DH": dilation[0], "DW": dilation[1],
        "BLOCK": block, "TASKS": min(_TASKS, batch), **cpp.strides("GS", grad),
    }  # fmt: skip
    kinds = _kinds(out_height, size[0], kernel[0], stride[0], padding[0], dilation[0])
    constants |= {"KINDS": max(kinds) + 1, "KIND": kinds}
    constants["FIRST"] = [kinds.index(kind) for kind in range(max(kinds) + 1)]
    taps = math.prod(kernel)
    # Squares of all pixels; of every task, sums by tap, and those of rows of a kind.
    scratch = batch * out_height * out_width + min(_TASKS, batch) * channels * (
        taps + out_width * (max(kinds) + 1)
    )
    return Source(cpp.source(constants, _BODY), scratch_bytes=4 * scratch)


def _kinds(out: int, size: int, taps: int, stride: int, padding: int, dilation: int) -> list[int]:
    """Return a number for each position of an axis; equal ones see the same taps inside."""
    seen: dict[tuple[bool, ...], int] = {}
    views = (
        tuple(0 <= at * stride + tap * dilation - padding < size for tap in range(taps))
        for at in range(out)
    )
    return [seen.setdefault(view, len(seen)) for view in views]


_BODY = r"""
typedef float v16 __attribute__((vector_size(64)));
typedef float anywhere __attribute__((vector_size(64), aligned(4)));
typedef uint32_t w16 __attribute__((vector_size(64)));
typedef uint16_t halves __attribute__((vector_size(32), aligned(2)));

constexpr long POSITIONS = OH * OW, TAPS = KH * KW, LANES = 16, WHOLE = CO / LANES * LANES;
// Channels next to each other in memory: vectors of channels; else vectors of pixels.
constexpr bool LAST = GS1 == 1 && CO > 1;

static inline bool inside(long out, long tap, long stride, long padding, long dilation, long size) {
  long at = out * stride + tap * dilation - padding;
  return at >= 0 && at < size;
}
static inline v16 load16(const float* at) { return *(const anywhere*)at; }
static inline v16 load16(const bf16* at) {
  return (v16)(__builtin_convertvector(*(const halves*)at, w16) << 16);
}

// In lane i of the result, the sum over the lanes of the i-th vector.
#define SUM_PAIRS(STEP, LOW, HIGH)                                       \
  for (int i = 0; i < LANES; i += 2 * STEP)                              \
    v[i] = __builtin_shufflevector(v[i], v[i + STEP], LOW) +             \
           __builtin_shufflevector(v[i], v[i + STEP], HIGH);
#define LIST(...) __VA_ARGS__
static inline v16 sum_lanes(v16* v) {
  SUM_PAIRS(1, LIST(0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30),
            LIST(1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31))
  SUM_PAIRS(2, LIST(0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29),
            LIST(2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31))
  SUM_PAIRS(4, LIST(0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27),
            LIST(4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31))
  SUM_PAIRS(8, LIST(0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23),
            LIST(8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31))
  return v[0];
}

// Squares of one row of pixels, and the row added to `sums` [OW][CO].
static void row_last(const T* g, float* square, float* sums) {
  for (long first = 0; first < OW; first += LANES) {
    long count = std::min(LANES, OW - first);
    v16 lanes[LANES] = {};
    float rest[LANES] = {};
    for (long i = 0; i < count; i++) {
      const T* pixel = g + (first + i) * GS3;
      float* sum = sums + (first + i) * CO;
      v16 squares = {};
      for (long o = 0; o < WHOLE; o += LANES) {
        v16 value = load16(pixel + o);
        squares += value * value;
        *(anywhere*)(sum + o) = *(anywhere*)(sum + o) + value;
      }
      lanes[i] = squares;
      for (long o = WHOLE; o < CO; o++) {
        float value = load(pixel[o]);
        rest[i] += value * value;
        sum[o] += value;
      }
    }
    v16 total = sum_lanes(lanes);
    for (long i = 0; i < count; i++) square[first + i] = total[i] + rest[i];
  }
}

// The same, channel by channel; `sums` is [CO][OW].
static void row_first(const T* g, float* square, float* sums) {
  std::fill(square, square + OW, 0.0f);
  for (long o = 0; o < CO; o++)
    for (long w = 0; w < OW; w++) {
      float value = load(g[o * GS1 + w * GS3]);
      square[w] += value * value;
      sums[o * OW + w] += value;
    }
}

// Adds the sum of all rows like row h, `line`, to the taps that see the image from there.
static void add_line(long h, const float* line, float* taps) {
  for (long o = 0; o < CO; o++)
    for (long kw = 0; kw < KW; kw++) {
      float sum = 0;
      for (long w = 0; w < OW; w++)
        if (inside(w, kw, SW, PW, DW, IW)) sum += line[LAST ? w * CO + o : o * OW + w];
      for (long kh = 0; kh < KH; kh++)
        if (inside(h, kh, SH, PH, DH, IH)) taps[o * TAPS + kh * KW + kw] += sum;
    }
}

static void kernel(void* const* t) {
  const T* grad = static_cast<const T*>(t[0]);
  float* norms = static_cast<float*>(t[1]);
  float* sums = static_cast<float*>(t[2]);
  float* squares = static_cast<float*>(t[3]);  // [B, OH, OW]
  float* parts = squares + B * POSITIONS;      // [TASKS][CO][TAPS]
  float* lines = parts + TASKS * CO * TAPS;    // [TASKS][KINDS][OW * CO]

  // A task has a range of samples. Rows that see the image with the same taps are summed first.
  parallel(TASKS, [&](long task) {
    float *part = parts + task * CO * TAPS, *line = lines + task * KINDS * OW * CO;
    std::fill(part, part + CO * TAPS, 0.0f);
    std::fill(line, line + KINDS * OW * CO, 0.0f);
    for (long b = task * B / TASKS; b < (task + 1) * B / TASKS; b++)
      for (long h = 0; h < OH; h++)
        (LAST ? row_last : row_first)(grad + b * GS0 + h * GS2, squares + b * POSITIONS + h * OW,
                                      line + KIND[h] * OW * CO);
    for (long kind = 0; kind < KINDS; kind++) add_line(FIRST[kind], line + kind * OW * CO, part);
  });
  parallel(CO, [&](long o) {
    for (long tap = 0; tap < TAPS; tap++) {
      float sum = 0;
      for (long task = 0; task < TASKS; task++) sum += parts[(task * CO + o) * TAPS + tap];
      sums[o * TAPS + tap] = sum;
    }
  });
  for (long r = 0; r < B * POSITIONS / BLOCK; r++) {
    float sum = 0;
    for (long i = 0; i < BLOCK; i++) sum += squares[r * BLOCK + i];
    norms[r] = std::sqrt(sum);
  }
}
"""


def _sample(
    shape: tuple[int, int, int, int],
    size: tuple[int, int],
    kernel: tuple[int, int] = (3, 3),
    geometry: tuple[int, int, int] = (1, 1, 1),
    block: int = 1,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.channels_last,
    flip: bool = False,
    odd: float = 0.0,
) -> Sample:
    """Return an output gradient and a geometry: stride, padding, dilation."""

    def args() -> tuple[Any, ...]:
        grad = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
        grad = grad.to(dtype, memory_format=memory_format)
        if flip:
            grad = grad.mT[:, :1].expand(shape)
        if odd:
            grad[0, 0, 1, 1] = odd
        axes = [[number] * 2 for number in geometry]
        return grad, list(size), list(kernel), *axes, block

    return Sample(args, length=math.prod(shape) // shape[1] + shape[1])


def samples() -> tuple[Sample, ...]:
    """Return gradients of every layout and type, odd sizes and geometries."""
    nchw, half = torch.contiguous_format, torch.bfloat16
    return (
        _sample((3, 17, 9, 7), (9, 7)),
        _sample((20, 32, 8, 8), (8, 8), block=4),
        _sample((3, 63, 9, 7), (9, 7), memory_format=nchw),
        _sample((2, 1, 5, 5), (5, 5), (1, 1), (1, 0, 1)),
        _sample((1, 3, 4, 3), (9, 8), (5, 5), (2, 2, 1)),
        _sample((4, 4, 5, 4), (11, 10), (3, 2), (2, 3, 2), block=5, memory_format=nchw),
        _sample((2, 16, 9, 9), (9, 9), (7, 7), (1, 3, 1), dtype=half),
        _sample((2, 16, 6, 6), (6, 6), dtype=half, memory_format=nchw),
        _sample((70, 17, 1, 1), (1, 1), (1, 1), (1, 0, 1)),
        _sample((2, 5, 6, 6), (6, 6), flip=True),
        _sample((2, 5, 6, 6), (6, 6), odd=math.nan),
        _sample((2, 5, 6, 6), (6, 6), odd=math.inf),
    )


register(
    Kernel(
        name="pixel_norms",
        schema="(Tensor grad, int[] size, int[] kernel, int[] stride, int[] padding, "
        "int[] dilation, int block) -> (Tensor, Tensor)",
        reference=reference,
        fake=fake,
        emit_cpp=emit_cpp,
        samples=samples,
        emit_triton=emit_triton,
    )
)
