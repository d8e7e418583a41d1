"""Pruned wgrad: the weight gradient of a convolution from a stochastically pruned output gradient.

    dw[o, :, kh, kw] = sum over samples b and non-zero values v of pruned(g)[b, o]
                       of v * x[b, :, h, w],   (h, w) where the tap looks from the value's pixel

`codegen.pruning` defines `pruned`. For a tile of output pixels, the non-zeros of every output
channel are listed with the place of their patch in a zero-padded copy of the tile's input, which
stays in the first-level cache. One loop over the list of a channel adds up its patches: the sums of
all taps and of one or two vectors of input channels stay in registers. Letters: B batch, Ci and Co
channels.
"""

from math import prod
from typing import Any

import torch
from torch import Tensor

from codegen import cpp, pruning
from codegen import pruned_convolution as convolution
from codegen.gpu.pruned import weight_gradient_program as emit_triton
from codegen.kernel import Kernel, Sample, Source, register
from codegen.pruned_convolution import MAX_SUMS, Problem

aten = torch.ops.aten

# Vectors of sums that were fastest: with more, the input of a tile is too large.
_WANTED_SUMS = 18
# Output pixels of a tile: the longer the lists, the fewer times sums are loaded and stored.
_TILE_PIXELS = 256
# Values of g that are listed before they are used: each chunk of input channels reads them again.
_LISTED = 128 * 1024
# Up to this size every thread has sums of its own, for its share of the samples; above it, the
# threads share out the output channels.
_PRIVATE_BYTES = 1024 * 1024


def reference(
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
) -> Tensor:
    """Return the weight gradient of the pruned output gradient.

    Args:
        grad: [B, Co, *out].
        x: [B, Ci, *in].
        threshold: 0-d; float32.
        seed: 0-d; int64.
        kernel: the kernel's spatial sizes.
        stride: one number a spatial axis.
        padding: one number a spatial axis.
        dilation: one number a spatial axis.
        groups: groups of channels.
        salt: tells apart the draws that share a seed.
        block: channels that are pruned together; divides Co.

    Returns:
        dw [Co, Ci/groups, *kernel], laid out in memory as x is.
    """
    pruned = pruning.prune(grad, threshold, pruning.uniforms(grad, seed, salt, block), block)
    result = fake(grad, x, threshold, seed, kernel, stride, padding, dilation, groups, salt, block)
    dw: Tensor = aten.convolution_backward(
        pruned, x, result, None, stride, padding, dilation, False, [0] * len(stride), groups,
        [False, True, False],
    )[1]  # fmt: skip
    return torch.empty_like(result).copy_(dw)


def fake(
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
) -> Tensor:
    """Return an uninitialised weight gradient."""
    del threshold, seed, stride, padding, dilation, salt, block
    shape = (grad.shape[1], x.shape[1] // groups, *kernel)
    last = len(kernel) == 2 and x.stride(1) == 1
    layout = torch.channels_last if last else torch.contiguous_format
    return torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=layout)


def emit_cpp(
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
) -> Source | str:
    """Return the source for convolutions of two spatial axes."""
    if reason := convolution.unsupported(grad, x, threshold, kernel, groups, block):
        return reason
    result = fake(
        grad.to("meta"), x.to("meta"), threshold, seed, kernel, stride, padding, dilation, groups,
        salt, block,
    )  # fmt: skip
    geometry = (kernel, stride, padding, dilation, groups, salt, block)
    constants = {
        **convolution.constants(grad, x.shape, *geometry),
        **_blocking(grad, x, kernel, groups),
        **cpp.strides("XS", x), **cpp.strides("RS", result),
    }  # fmt: skip
    return Source(cpp.source(constants, pruning.CPP + _BODY))


def _blocking(grad: Tensor, x: Tensor, kernel: list[int], groups: int) -> dict[str, int | bool]:
    """Return how the problem is cut into pieces that stay in registers and caches.

    CC vectors of input channels and HK rows of the kernel are summed together; a tile is R rows of
    output pixels of TN images; SUPER tiles are listed before they are used.
    """
    vectors = -(-(x.shape[1] // groups) // 16)
    rows = kernel[0] if kernel[0] * kernel[1] <= MAX_SUMS else 1
    chunks = -(-vectors // max(1, _WANTED_SUMS // (rows * kernel[1])))
    per_chunk = -(-vectors // chunks)
    batch, out_channels, height, width = grad.shape
    tile_rows = max(1, min(height, _TILE_PIXELS // width))
    images = max(1, min(batch, _TILE_PIXELS // (height * width))) if tile_rows == height else 1
    tile = images * tile_rows * width * out_channels
    sums = 4 * out_channels * chunks * per_chunk * 16 * kernel[0] * kernel[1]
    return {
        "CC": per_chunk, "CHUNKS": chunks, "HK": rows, "TN": images, "R": tile_rows,
        "SUPER": max(1, _LISTED // tile), "PRIVATE": sums <= _PRIVATE_BYTES,
    }  # fmt: skip


_BODY = r"""
constexpr long CG = CI / GROUPS, OG = CO / GROUPS, WIDTH = CC * 16, TAPS = KH * KW;
constexpr long P = TN * R * OW;  // pixels of a tile
constexpr long XR = (R - 1) * SH + (KH - 1) * DH + 1, XW = (OW - 1) * SW + (KW - 1) * DW + 1;
constexpr long STRIPS = (OH + R - 1) / R, TILES = (B + TN - 1) / TN * STRIPS;
constexpr long SETS = CC * HK * KW >= 8 ? 1 : 4;  // of sums, so that none waits for another
constexpr long CAPACITY = P + 16, SUM = TAPS * WIDTH;  // entries of a list; sums of a channel

struct Tile {
  long b, h, images, rows;
  explicit Tile(long i)
      : b(i / STRIPS * TN), h(i % STRIPS * R), images(std::min(TN, B - b)),
        rows(std::min(R, OH - h)) {}
  // Pixels in the order of images, rows, columns; a tile of several images has all their rows.
  long pixels() const { return images * rows * OW; }
};

struct Memory : Workspace {
  static constexpr long X = TN * XR * XW * WIDTH, LISTS = SUPER * CO;
  Memory() : Workspace(4 * (X + 16 + 2 * LISTS * CAPACITY + LISTS)) {}
  float* x() { return reinterpret_cast<float*>(memory); }
  float* values(long tile, long o) { return x() + X + 16 + (tile * CO + o) * CAPACITY; }
  int32_t* entries(long tile, long o) {
    return reinterpret_cast<int32_t*>(values(tile, o) + LISTS * CAPACITY);
  }
  int32_t& count(long tile, long o) {
    return *(reinterpret_cast<int32_t*>(x() + X + 16 + 2 * LISTS * CAPACITY) + tile * CO + o);
  }
};

// Turns 16 pixels of 16 channels into 16 channels of 16 pixels.
static inline void transpose(f32x16 (&v)[16]) {
#pragma GCC unroll 4
  for (int step = 0; step < 4; step++)
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++)
      if (const int d = 1 << step; (i & d) == 0) {
        i32x16 low = (LANE & d) == 0 ? LANE : (LANE - d + 16);
        i32x16 high = (LANE & d) == 0 ? (LANE + d) : (LANE + 16);
        f32x16 a = __builtin_shuffle(v[i], v[i + d], low);
        v[i + d] = __builtin_shuffle(v[i], v[i + d], high);
        v[i] = a;
      }
}

// Where the pixels of a tile are in g, and their patches in the copy of the input.
struct Places {
  int64_t grad[P + 16];
  int32_t patch[P + 16];
  Places() {
    for (long p = 0; p < P + 16; p++) {
      long i = TN > 1 ? p / (R * OW) : 0, h = p / OW - i * R, w = p % OW;
      grad[p] = i * GS0 + h * GS2 + w * GS3;
      patch[p] = int32_t(((i * XR + h * SH) * XW + w * SW) * WIDTH);
    }
  }
};

__attribute__((noinline)) static void list_tile(const T* grad, const Tile& tile, long o0, long o1,
                                                const Places& places, long index, Memory& memory,
                                                const Pruner& prune, bool all) {
  long pixels = tile.pixels();
  uint32_t pixel = uint32_t((tile.b * OH + tile.h) * OW);
  const T* from = grad + tile.b * GS0 + tile.h * GS2;
  for (long o = o0; o < o1; o++) memory.count(index, o) = 0;
  for (long p = 0; p < pixels; p += 16) {
    i32x16 entry;
    std::memcpy(&entry, places.patch + p, 64);
    long count = std::min(16L, pixels - p);
    // Channels inside pixels: g is read in the order in which it lies in memory.
    for (long o = o0; o < o1; o += 16) {
      f32x16 v[16] = {};
      for (long i = 0; i < count; i++) {
        // No prefetcher follows these steps: without a hint, half of the time was spent waiting.
        __builtin_prefetch(from + o * GS1 + places.grad[p + i + 16]);
        v[i] = prune(read16(from + o * GS1 + places.grad[p + i], GS1, CO - o),
                     pixel + uint32_t(p + i), o);
      }
      transpose(v);
      float* values = memory.values(index, o);
      int32_t *entries = memory.entries(index, o), *n = &memory.count(index, o);
      for (long i = 0; i < std::min(16L, o1 - o); i++) {
        long at = i * CAPACITY + n[i];
        n[i] += int32_t(append(v[i], entry, count, all, values + at, entries + at));
      }
    }
  }
}

// Copies the input of a tile, and says whether all of it is finite.
__attribute__((noinline)) static bool copy_input(const T* x, const Tile& tile, long c0, long count,
                                                 float* to) {
  f32x16 zeros = {}, zero = {};
  for (long i = 0; i < tile.images; i++)
    for (long r = 0; r < XR; r++)
      for (long s = 0; s < XW; s++, to += WIDTH) {
        long h = tile.h * SH - PH + r, w = s - PW;
        bool inside = h >= 0 && h < IH && w >= 0 && w < IW;
        const T* from = x + (tile.b + i) * XS0 + c0 * XS1 + h * XS2 + w * XS3;
        for (long v = 0; v < CC; v++) {
          __builtin_prefetch(from + 16 * XS3 + v * 16 * XS1);
          bool some = inside && v * 16 < count;
          f32x16 value = some ? read16(from + v * 16 * XS1, XS1, count - v * 16) : zero;
          zeros += value * 0.0f;  // NaN from what is not finite
          store16(to + v * 16, value);
        }
      }
  i32x16 wrong = zeros != zero;
  for (int i = 0; i < 16; i++) if (wrong[i]) return false;
  return true;
}

// Adds to one channel's sums of HK rows of the kernel, from row FIRST on.
static inline void add_patches(const float* x, const float* values, const int32_t* entries,
                               long count, long first, float* sums) {
  f32x16 sum[SETS][HK * KW][CC] = {};
  auto each = [&](auto&& act) {
#pragma GCC unroll 32
    for (long k = 0; k < HK * KW; k++)
#pragma GCC unroll 32
      for (long v = 0; v < CC; v++) act(k, v);
  };
  auto add = [&](long i, long set) {
    const float* patch = x + first * DH * XW * WIDTH + entries[i];
    float value = values[i];
    each([&](long k, long v) {
      long at = (k / KW * DH * XW + k % KW * DW) * WIDTH + v * 16;
      sum[set][k][v] += value * load16(patch + at);
    });
  };
  sums += first * KW * WIDTH;
  each([&](long k, long v) { sum[0][k][v] = load16(sums + k * WIDTH + v * 16); });
  long i = 0;
  if (SETS > 1)
    for (; i + SETS <= count; i += SETS)
#pragma GCC unroll 8
      for (long set = 0; set < SETS; set++) add(i + set, set);
  for (; i < count; i++) add(i, 0);
  each([&](long k, long v) {
#pragma GCC unroll 8
    for (long set = 1; set < SETS; set++) sum[0][k][v] += sum[set][k][v];
    store16(sums + k * WIDTH + v * 16, sum[0][k][v]);
  });
}

__attribute__((noinline)) static void add_tile(Memory& memory, long index, long o0, long o1,
                                               float* sums) {
  for (long o = o0; o < o1; o++)
    for (long first = 0; first < KH; first += HK)
      add_patches(memory.x(), memory.values(index, o), memory.entries(index, o),
                  memory.count(index, o), first, sums + o * SUM);
}

// Adds to sums [CHUNKS, CO, TAPS, WIDTH] what channels o0..o1 get from tiles t0..t1.
static void accumulate(const T* grad, const T* x, const Pruner& prune, long o0, long o1, long t0,
                       long t1, float* sums) {
  Memory memory;
  const Places places;
  for (; t0 < t1; t0 += SUPER) {
    long tiles = std::min(SUPER, t1 - t0);
    for (long i = 0; i < tiles; i++)
      list_tile(grad, Tile(t0 + i), o0, o1, places, i, memory, prune, false);
    for (long group = o0 / OG; group < GROUPS && group * OG < o1; group++)
      for (long chunk = 0; chunk < CHUNKS; chunk++)
        for (long i = 0; i < tiles; i++) {
          Tile tile(t0 + i);
          long c = chunk * WIDTH;
          bool finite = copy_input(x, tile, group * CG + c, CG - c, memory.x());
          // Zero times infinity is not zero: no value may be left out.
          if (!finite) list_tile(grad, tile, o0, o1, places, i, memory, prune, true);
          add_tile(memory, i, std::max(o0, group * OG), std::min(o1, (group + 1) * OG),
                   sums + chunk * CO * SUM);
        }
  }
}

static void kernel(void* const* t) {
  const T* grad = static_cast<const T*>(t[0]);
  const T* x = static_cast<const T*>(t[1]);
  const Pruner prune(static_cast<const float*>(t[2]), static_cast<const int64_t*>(t[3]));
  T* result = static_cast<T*>(t[4]);
  constexpr long COUNT = CHUNKS * CO * SUM, SPANS = (CO + 15) / 16;
  long workers = std::min<long>(at::get_num_threads(), PRIVATE ? TILES : SPANS);
  long copies = PRIVATE ? workers : 1;
  Workspace memory(4 * COUNT * copies);
  float* sums = reinterpret_cast<float*>(memory.memory);
  parallel(workers, [&](long i) {
    auto share = [&](long of, long j) { return j * of / workers; };
    if (PRIVATE) {
      std::fill(sums + i * COUNT, sums + (i + 1) * COUNT, 0.0f);
      accumulate(grad, x, prune, 0, CO, share(TILES, i), share(TILES, i + 1), sums + i * COUNT);
    } else {
      long o0 = share(SPANS, i) * 16, o1 = std::min(CO, share(SPANS, i + 1) * 16);
      for (long chunk = 0; chunk < CHUNKS; chunk++)
        std::fill(sums + (chunk * CO + o0) * SUM, sums + (chunk * CO + o1) * SUM, 0.0f);
      accumulate(grad, x, prune, o0, o1, 0, TILES, sums);
    }
  });
  parallel(CO, [&](long o) {
    for (long c = 0; c < CG; c++)
      for (long k = 0; k < TAPS; k++) {
        const float* from = sums + (c / WIDTH * CO + o) * SUM + k * WIDTH + c % WIDTH;
        float sum = 0;
        for (long copy = 0; copy < copies; copy++) sum += from[copy * COUNT];
        store(result + o * RS0 + c * RS1 + k / KW * RS2 + k % KW * RS3, sum);
      }
  });
}
"""


def samples() -> tuple[Sample, ...]:
    """Return convolutions of every geometry, in both layouts and types, and odd sizes."""

    def args(problem: Problem) -> tuple[Any, ...]:
        grad, x, _, threshold = problem.operands()
        *axes, groups = problem.geometry
        lists = (list(problem.kernel), *([axis] * 2 for axis in axes))
        return grad, x, threshold, torch.tensor(5), *lists, groups, 77, problem.block

    # No less than the output pixels of all samples.
    return convolution.samples(args, lambda problem: 4 * problem.batch * prod(problem.size))


register(
    Kernel(
        name="pruned_wgrad",
        schema="(Tensor grad, Tensor x, Tensor threshold, Tensor seed, int[] kernel, int[] stride, "
        "int[] padding, int[] dilation, int groups, int salt, int block) -> Tensor",
        reference=reference,
        fake=fake,
        emit_cpp=emit_cpp,
        samples=samples,
        emit_triton=emit_triton,
    )
)
