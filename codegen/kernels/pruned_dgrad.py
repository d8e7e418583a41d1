"""Pruned dgrad: the input gradient of a convolution from a stochastically pruned output gradient.

    dx[b, :, h, w] = sum over taps (kh, kw) and non-zero values v of pruned(g)[b, o, h', w']
                     of v * weight[o, :, kh, kw],   (h', w') the pixel that tap looks from

`codegen.pruning` defines `pruned`. The non-zeros of a block of output channels are listed row by
row; a list entry is the value and where its weights stand, relative to the input pixel. With stride
1 the entries of all taps of a kernel row are neighbours in the list, so one loop runs over them.
The sums of one input pixel stay in registers: a fused multiply-add for each vector of input
channels, its weights read from the first-level cache. Letters: B batch, Ci and Co channels.
"""

from math import prod
from typing import Any

import torch
from torch import Tensor

from codegen import cpp, pruning
from codegen import pruned_convolution as convolution
from codegen.gpu.pruned import input_gradient_program as emit_triton
from codegen.kernel import Kernel, Sample, Source, register
from codegen.pruned_convolution import MAX_SUMS, Problem

aten = torch.ops.aten

# Bytes of the weights that are in use at a time: most of a first-level cache. The fewer slices, the
# fewer times sums are loaded and stored.
_SLICE_BYTES = 40 * 1024
# Vectors of sums that are enough to hide the latency of an addition.
_FEW_SUMS = 12


def reference(
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
) -> Tensor:
    """Return the input gradient of the pruned output gradient.

    Args:
        grad: [B, Co, *out].
        weight: [Co, Ci/groups, *kernel].
        threshold: 0-d; float32.
        seed: 0-d; int64.
        size: the input's shape, [B, Ci, *in].
        stride: one number a spatial axis.
        padding: one number a spatial axis.
        dilation: one number a spatial axis.
        groups: groups of channels.
        salt: tells apart the draws that share a seed.
        block: channels that are pruned together; divides Co.

    Returns:
        dx [B, Ci, *in], laid out in memory as g is.
    """
    pruned = pruning.prune(grad, threshold, pruning.uniforms(grad, seed, salt, block), block)
    result = fake(
        grad, weight, threshold, seed, size, stride, padding, dilation, groups, salt, block
    )
    dx: Tensor = aten.convolution_backward(
        pruned, result, weight, None, stride, padding, dilation, False, [0] * len(stride), groups,
        [True, False, False],
    )[0]  # fmt: skip
    return torch.empty_like(result).copy_(dx)


def fake(
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
) -> Tensor:
    """Return an uninitialised input gradient."""
    del weight, threshold, seed, stride, padding, dilation, groups, salt, block
    last = len(size) == 4 and grad.stride(1) == 1
    layout = torch.channels_last if last else torch.contiguous_format
    return torch.empty(size, dtype=grad.dtype, device=grad.device, memory_format=layout)


def emit_cpp(
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
) -> Source | str:
    """Return the source for convolutions of two spatial axes."""
    kernel = weight.shape[2:]
    if reason := convolution.unsupported(grad, weight, threshold, kernel, groups, block):
        return reason
    result = fake(
        grad.to("meta"), weight, threshold, seed, size, stride, padding, dilation, groups, salt,
        block,
    )  # fmt: skip
    geometry = (kernel, stride, padding, dilation, groups, salt, block)
    constants = {
        **convolution.constants(grad, size, *geometry),
        **_blocking(grad, weight, size, groups),
        **cpp.strides("WS", weight), **cpp.strides("RS", result),
    }  # fmt: skip
    weights = constants["CBS"] * constants["CB"] * constants["CHUNKS"] * constants["CC"] * 16
    scratch = 4 * groups * weights * kernel[0] * kernel[1] + 64
    return Source(cpp.source(constants, pruning.CPP + _BODY), scratch_bytes=scratch)


def _blocking(grad: Tensor, weight: Tensor, size: list[int], groups: int) -> dict[str, int]:
    """Return how channels and pixels are cut into pieces that stay in a cache.

    CC vectors of input channels, CB output channels and TN images are computed together, and R rows
    of output pixels share one reading of weights; all KH rows of the kernel at once, or HK = 1.
    """
    out_channels, in_channels = grad.shape[1] // groups, weight.shape[1]
    height, width = weight.shape[2:]
    vectors = -(-in_channels // 16)
    # All taps at once read the lists once; with many channels, long vectors of few taps are faster.
    together = height * width * vectors <= MAX_SUMS
    chunks = 1 if together else -(-vectors // max(1, _FEW_SUMS // width))
    taps = height * width if together else width
    per_chunk = -(-vectors // chunks)
    blocks = -(-out_channels * taps * per_chunk * 64 // _SLICE_BYTES)
    channels = min(out_channels, -(-out_channels // blocks // 16) * 16)
    # The more weights there are, the more pixels have to share one reading of them.
    pixels = 128 if 4 * weight.numel() <= 512 * 1024 else 512
    rows = max(1, min(grad.shape[2], pixels // grad.shape[3]))
    whole = rows == grad.shape[2]
    images = max(1, min(size[0], pixels // (rows * grad.shape[3]))) if whole else 1
    return {
        "CC": per_chunk, "CHUNKS": chunks, "CB": channels, "CBS": -(-out_channels // channels),
        "TN": images, "R": rows, "HK": height if together else 1,
    }  # fmt: skip


_BODY = r"""
constexpr long CG = CI / GROUPS, OG = CO / GROUPS, WIDTH = CC * 16, LISTS = GROUPS * CBS;
// Floats: the weights of a kernel row, and those that are in use at a time.
constexpr long PIXEL = KW * WIDTH, SLICE = CB * HK * PIXEL;
constexpr long CAPACITY = OW * CB + 16, STARTS = OW + 1;
// Input pixels of a row with the padding that taps reach, and of an image.
constexpr long TW = std::max(IW + PW, (OW - 1) * SW + (KW - 1) * DW + 1), TILE = IH * TW * WIDTH;

// [GROUPS, CHUNKS, CBS, KH / HK, CB, HK, KW, WIDTH]: input channels contiguous, zeros beyond them.
static void pack(const T* weight, float* packed, long list, bool* finite) {
  long group = list / CBS, o0 = group * OG + list % CBS * CB;
  f32x16 zeros = {};
  for (long chunk = 0; chunk < CHUNKS; chunk++) {
    float* to = packed + ((group * CHUNKS + chunk) * CBS + list % CBS) * (KH / HK) * SLICE;
    for (long kh0 = 0; kh0 < KH; kh0 += HK)
      for (long o = 0; o < CB; o++)
        for (long k = 0; k < HK * KW; k++)
          for (long v = 0; v < CC; v++, to += 16) {
            long c = chunk * WIDTH + v * 16;
            bool inside = list % CBS * CB + o < OG && c < CG;
            const T* from =
                weight + (o0 + o) * WS0 + c * WS1 + (kh0 + k / KW) * WS2 + k % KW * WS3;
            f32x16 w = inside ? read16(from, WS1, CG - c) : f32x16{};
            zeros += w * 0.0f;  // NaN from what is not finite
            store16(to, w);
          }
  }
  f32x16 zero = {};
  i32x16 wrong = zeros != zero;
  for (int i = 0; i < 16; i++) if (wrong[i]) *finite = false;
}

struct Lists {  // of one row of pixels and one block of channels
  float* values;
  int32_t* entries;
  int32_t* starts;
};

struct Memory : Workspace {
  static constexpr long ROWS = TN * OH * LISTS;
  Memory() : Workspace(4 * (2 * ROWS * CAPACITY + ROWS * STARTS + TN * TILE) + 256) {}
  float* tile() { return reinterpret_cast<float*>(memory); }
  Lists at(long image, long row, long list) {
    long i = (image * OH + row) * LISTS + list;
    float* values = tile() + TN * TILE;
    int32_t* entries = reinterpret_cast<int32_t*>(values + ROWS * CAPACITY);
    return {values + i * CAPACITY, entries + i * CAPACITY, entries + ROWS * CAPACITY + i * STARTS};
  }
};

__attribute__((noinline)) static void list_row(const T* grad, long b, long h, Lists to, long list,
                                               const Pruner& prune, bool all) {
  long o0 = list / CBS * OG + list % CBS * CB, count = std::min(CB, OG - list % CBS * CB), n = 0;
  const T* row = grad + b * GS0 + h * GS2 + o0 * GS1;
  for (long w = 0; w < OW; w++) {
    to.starts[w] = int32_t(n);
    for (long c = 0; c < count; c += 16) {
      f32x16 v = prune(read16(row + w * GS3 + c * GS1, GS1, count - c),
                       uint32_t((b * OH + h) * OW + w), o0 + c);
      i32x16 entry = (LANE + int32_t(c)) * int32_t(HK * PIXEL);
      n += append(v, entry, count - c, all, to.values + n, to.entries + n);
    }
  }
  to.starts[OW] = int32_t(n);
}

// Adds one row of output pixels through ROWS rows of the kernel. The sums of the input pixels that
// an output pixel reaches stay in registers, and move on with it.
template <long ROWS>
__attribute__((noinline)) static void add_row(const Lists from, const float* weights, float* to) {
  constexpr long KEPT = SW == 1 && DW == 1 ? KW - 1 : 0;  // columns the next pixel reaches too
  auto at = [&](long row, long k, long v) {
    return to + (row * DH * TW + k * DW) * WIDTH + v * 16;
  };
  f32x16 sum[ROWS][KW][CC];
  auto each = [&](long first, long last, auto&& act) {
#pragma GCC unroll 32
    for (long row = 0; row < ROWS; row++)
#pragma GCC unroll 32
      for (long k = first; k < last; k++)
#pragma GCC unroll 32
        for (long v = 0; v < CC; v++) act(row, k, v);
  };
  auto fetch = [&](long row, long k, long v) { sum[row][k][v] = load16(at(row, k, v)); };
  each(0, KEPT, fetch);
  long i = 0;
  for (long w = 0; w < OW; w++, to += SW * WIDTH) {
    each(KEPT, KW, fetch);
    for (long end = from.starts[w + 1]; i < end; i++) {
      const float* weight = weights + from.entries[i];
      float value = from.values[i];
      each(0, KW, [&](long row, long k, long v) {
        sum[row][k][v] += value * load16(weight + row * PIXEL + k * WIDTH + v * 16);
      });
    }
    each(0, KW - KEPT, [&](long row, long k, long v) { store16(at(row, k, v), sum[row][k][v]); });
    if (KEPT > 0)
      each(0, KW - 1, [&](long row, long k, long v) { sum[row][k][v] = sum[row][k + 1][v]; });
  }
  to -= SW * WIDTH;
  if (KEPT > 0)
    each(0, KEPT, [&](long row, long k, long v) { store16(at(row, k + 1, v), sum[row][k][v]); });
}

// Adds row h of the output through the rows of the kernel from kh on whose weights are given.
static void add_rows(const Lists& from, const float* weights, float* tile, long h, long kh) {
  long first = h * SH - PH + kh * DH, last = first + (HK - 1) * DH;
  if (first >= 0 && last < IH) return add_row<HK>(from, weights, tile + first * TW * WIDTH);
  for (long k = 0; k < HK; k++)
    if (long row = first + k * DH; row >= 0 && row < IH)
      add_row<1>(from, weights + k * PIXEL, tile + row * TW * WIDTH);
}

__attribute__((noinline)) static void write(const float* tile, T* result, long c0) {
  long count = std::min(WIDTH, CG - c0 % CG);
  result += c0 * RS1;
  for (long h = 0; h < IH; h++) {
    const float* from = tile + (h * TW + PW) * WIDTH;
    T* to = result + h * RS2;
    if (RS1 == 1) {
      for (long w = 0; w < IW; w++)
        for (long c = 0; c < count; c++) store(to + c + w * RS3, from[w * WIDTH + c]);
    } else {
      for (long c = 0; c < count; c++)
        for (long w = 0; w < IW; w++) store(to + c * RS1 + w * RS3, from[w * WIDTH + c]);
    }
  }
}

static void compute(const float* packed, T* result, Memory& memory, long b, long images) {
  for (long group = 0; group < GROUPS; group++)
    for (long chunk = 0; chunk < CHUNKS; chunk++) {
      std::fill(memory.tile(), memory.tile() + images * TILE, 0.0f);
      for (long h0 = 0; h0 < OH; h0 += R)
        for (long block = 0; block < CBS; block++)
          for (long kh = 0; kh < KH; kh += HK) {
            const float* weights =
                packed + (((group * CHUNKS + chunk) * CBS + block) * KH + kh) / HK * SLICE;
            for (long i = 0; i < images; i++)
              for (long h = h0; h < std::min(h0 + R, OH); h++)
                add_rows(memory.at(i, h, group * CBS + block), weights, memory.tile() + i * TILE,
                         h, kh);
          }
      for (long i = 0; i < images; i++)
        write(memory.tile() + i * TILE, result + (b + i) * RS0, group * CG + chunk * WIDTH);
    }
}

static void kernel(void* const* t) {
  const T* grad = static_cast<const T*>(t[0]);
  const T* weight = static_cast<const T*>(t[1]);
  const Pruner prune(static_cast<const float*>(t[2]), static_cast<const int64_t*>(t[3]));
  T* result = static_cast<T*>(t[4]);
  float* packed = static_cast<float*>(t[5]);
  // Zero times infinity is not zero: with such a weight, no value may be left out.
  bool finite = true;
  parallel(LISTS, [&](long list) {
    bool mine = true;
    pack(weight, packed, list, &mine);
    if (!mine) {
#pragma omp atomic write
      finite = false;
    }
  });
  long tiles = (B + TN - 1) / TN, workers = std::min<long>(at::get_num_threads(), tiles);
  parallel(workers, [&](long worker) {
    Memory memory;
    for (long i = worker * tiles / workers; i < (worker + 1) * tiles / workers; i++) {
      long b = i * TN, images = std::min(TN, B - b);
      for (long n = 0; n < images; n++)
        for (long h = 0; h < OH; h++)
          for (long list = 0; list < LISTS; list++)
            list_row(grad, b + n, h, memory.at(n, h, list), list, prune, !finite);
      compute(packed, result, memory, b, images);
    }
  });
}
"""


def samples() -> tuple[Sample, ...]:
    """Return convolutions of every geometry, in both layouts and types, and odd sizes."""

    def args(problem: Problem) -> tuple[Any, ...]:
        grad, x, weight, threshold = problem.operands()
        *axes, groups = problem.geometry
        lists = (list(x.shape), *([axis] * 2 for axis in axes))
        return grad, weight, threshold, torch.tensor(5), *lists, groups, 77, problem.block

    return convolution.samples(args, lambda problem: problem.channels[1] * prod(problem.kernel))


register(
    Kernel(
        name="pruned_dgrad",
        schema="(Tensor grad, Tensor weight, Tensor threshold, Tensor seed, int[] size, "
        "int[] stride, int[] padding, int[] dilation, int groups, int salt, int block) -> Tensor",
        reference=reference,
        fake=fake,
        emit_cpp=emit_cpp,
        samples=samples,
        emit_triton=emit_triton,
    )
)
