"""The input gradient of a convolution of 8-bit numbers.

    dx = (g * grad_scale) G (w * weight_scale)

with the integer product exact. For each phase of the stride, dx is a convolution of g with some of
the taps, computed straight from g's bordered pixels: a tile of pixels by 16 to 64 input channels
stays in registers while taps and output channels are run through. g is read as unsigned bytes,
value + 128; what the 128 adds is the same for every pixel and is what the sums start from.
"""

import math
from typing import Any

import torch
from torch import Tensor

from codegen import cpp, int8
from codegen.kernel import Kernel, Sample, Source, register

aten = torch.ops.aten


def reference(
    grad: Tensor,
    weight: Tensor,
    grad_scale: Tensor,
    weight_scale: Tensor,
    out_size: list[int],
    size: list[int],
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    """Return the input gradient.

    Args:
        grad: g [B, Co, OH, OW] in the layout of `codegen.int8`, with `grad_border`.
        weight: w [Co, Ci/groups, *kernel] in that layout, without a border.
        grad_scale: float, 0-d: what one step of `grad` is worth.
        weight_scale: the same of `weight`.
        out_size: [B, Co, OH, OW].
        size: [B, Ci, IH, IW].
        kernel: the kernel's spatial sizes.
        stride: one number a spatial axis.
        padding: one number a spatial axis.
        dilation: one number a spatial axis.
        groups: groups of channels.
        dtype: element type of the result.
        channels_last: memory format of the result.

    Returns:
        dx [B, Ci, IH, IW].
    """
    wide = grad_scale.dtype
    border = int8.grad_border(size[2:], out_size[2:], kernel, stride, padding, dilation)
    g = int8.from_bytes(grad, out_size, *border, wide)
    w = int8.from_bytes(weight, [out_size[1], size[1] // groups, *kernel], [0, 0], [0, 0], wide)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.empty(size, dtype=wide, device=g.device).contiguous(memory_format=layout)
    dx: Tensor = aten.convolution_backward(
        g, x, w, None, stride, padding, dilation, False, [0, 0], groups, [True, False, False]
    )[0]
    # In double precision, the element type only says how the result of a kernel is rounded.
    narrow = dtype if wide == torch.float32 else wide
    result = torch.empty(size, dtype=narrow, device=g.device, memory_format=layout)
    return result.copy_(dx * grad_scale * weight_scale)


def fake(
    grad: Tensor,
    weight: Tensor,
    grad_scale: Tensor,
    weight_scale: Tensor,
    out_size: list[int],
    size: list[int],
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    """Return an uninitialised input gradient."""
    del weight, grad_scale, weight_scale, out_size, kernel, stride, padding, dilation, groups
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(size, dtype=dtype, device=grad.device, memory_format=layout)


def emit_cpp(
    grad: Tensor,
    weight: Tensor,
    grad_scale: Tensor,
    weight_scale: Tensor,
    out_size: list[int],
    size: list[int],
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    dtype: torch.dtype,
    channels_last: bool,
) -> Source | str:
    """Return the source for convolutions of two spatial axes."""
    del grad, weight
    if (reason := int8.unsupported()) is not None:
        return reason
    if dtype not in cpp.ELEMENTS or not grad_scale.dtype == weight_scale.dtype == torch.float32:
        return "no kernel for these types"
    border = int8.grad_border(size[2:], out_size[2:], kernel, stride, padding, dilation)
    batch, out_channels, _, _ = out_size
    _, in_channels, height, width = size
    _, padded_height, padded_width, _ = int8.padded(out_size, *border)
    result = torch.empty(
        size,
        device="meta",
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
    )
    vectors = -(-(in_channels // groups) // 16)
    pixels, rows, panel = _tile(-(-width // stride[1]), vectors)
    quads, taps = -(-(out_channels // groups) // 4), kernel[0] * kernel[1]
    weight_bytes = groups * vectors * taps * quads * 64
    constants: dict[str, Any] = {
        "T": cpp.ELEMENTS[dtype],
        "B": batch, "CO": out_channels, "CI": in_channels, "GROUPS": groups,
        "IH": height, "IW": width, "GHP": padded_height, "GWP": padded_width,
        "TOP": border[0][0], "LEFT": border[0][1],
        "KH": kernel[0], "KW": kernel[1], "SH": stride[0], "SW": stride[1],
        "PH": padding[0], "PW": padding[1], "DH": dilation[0], "DW": dilation[1],
        "TILE_W": pixels, "TILE_H": rows, "PANEL": panel, "VECTORS": vectors,
        **cpp.strides("RS", result),
    }  # fmt: skip
    start_bytes = groups * vectors * 64 * stride[0] * stride[1]
    return Source(cpp.source(constants, int8.INTERLEAVE + _BODY), weight_bytes + start_bytes)


def _tile(width: int, vectors: int) -> tuple[int, int, int]:
    """Return pixels in a row, rows, and vectors of channels of a tile: at most 24 registers."""
    if width >= 12:
        panel = min(vectors, 4)
        return {4: 6, 3: 8, 2: 12, 1: 12}[panel], 1, panel
    panel = min(vectors, 3 if vectors % 3 == 0 or vectors > 4 else 2)
    pixels = min(width, 8)
    return pixels, max(1, 8 // pixels), panel


_BODY = r"""
constexpr long CG = CI / GROUPS, OG = CO / GROUPS, QUADS = (OG + 3) / 4, TAPS = KH * KW;
constexpr long PANELS = (VECTORS + PANEL - 1) / PANEL, PHASES = SH * SW;
constexpr long LAST = VECTORS - (PANELS - 1) * PANEL;  // vectors in the last panel
constexpr long STRIP = 16;                             // tiles in a row that one task computes
// Where channels are not contiguous, a task's pixels are transposed from a buffer in the L1 cache:
// 16 channels of one pixel may lie a page apart, all in one set of the cache.
constexpr bool DIRECT = RS1 == 1;
constexpr long STEP_W = DIRECT ? SW * RS3 : 16 * PANEL;
constexpr long STEP_H = DIRECT ? SH * RS2 : STRIP * TILE_W * STEP_W;

// Which taps reach the input pixels (SH * i + a, SW * j + b), and where g is for i = j = 0.
struct Phase {
  long height, width, taps = 0;
  long tap[TAPS], offset[TAPS];
};
static Phase phase_of(long a, long b) {
  Phase phase;
  phase.height = (IH - a + SH - 1) / SH;
  phase.width = (IW - b + SW - 1) / SW;
  for (long kh = 0; kh < KH; kh++)
    for (long kw = 0; kw < KW; kw++) {
      long h = a + PH - kh * DH, w = b + PW - kw * DW;
      if (h % SH != 0 || w % SW != 0) continue;
      phase.tap[phase.taps] = kh * KW + kw;
      phase.offset[phase.taps++] = ((TOP + h / SH) * GWP + LEFT + w / SW) * CO;
    }
  return phase;
}

// A panel holds, for all taps and quadruples of output channels, `N` vectors of 16 quadruples.
static inline int8_t* panel_at(int8_t* packed, long group, long panel) {
  return packed + (group * VECTORS + panel * PANEL) * TAPS * QUADS * 64;
}

static void pack(const uint8_t* weight, long group, long panel, int8_t* packed, int32_t* start,
                 const Phase* phases) {
  long count = panel == PANELS - 1 ? LAST : PANEL;
  int8_t* into = panel_at(packed, group, panel);
  __m512i sums[TAPS];
  for (long n = 0; n < count; n++) {
    for (long tap = 0; tap < TAPS; tap++) {
      sums[tap] = _mm512_setzero_si512();
      for (long quad = 0; quad < QUADS; quad++) {
        const uint8_t* rows[4];
        for (long i = 0; i < 4; i++) {
          long o = quad * 4 + i;
          const uint8_t* row = weight + ((group * OG + o) * TAPS + tap) * CG;
          rows[i] = o < OG ? row + (panel * PANEL + n) * 16 : ZEROS;
        }
        __m512i values = _mm512_xor_si512(interleave16(rows), _mm512_set1_epi8(char(0x80)));
        _mm512_storeu_si512(into + ((tap * QUADS + quad) * count + n) * 64, values);
        dot4(sums[tap], _mm512_set1_epi8(1), values);
      }
    }
    for (long p = 0; p < PHASES; p++) {
      __m512i sum = _mm512_setzero_si512();
      for (long i = 0; i < phases[p].taps; i++)
        sum = _mm512_add_epi32(sum, sums[phases[p].tap[i]]);
      sum = _mm512_mullo_epi32(sum, _mm512_set1_epi32(-128));
      long at = (group * PHASES + p) * VECTORS + panel * PANEL + n;
      _mm512_storeu_si512(start + at * 16, sum);
    }
  }
}

static inline void write(float* at, __m512 value, __mmask16 mask) {
  _mm512_mask_storeu_ps(at, mask, value);
}
static inline void write(bf16* at, __m512 value, __mmask16 mask) {
  __m512i bits = _mm512_castps_si512(value);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
  __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  up = _mm512_mask_mov_epi32(_mm512_srli_epi32(up, 16), nan, _mm512_set1_epi32(0x7FC0));
  _mm256_mask_storeu_epi16(at, mask, _mm512_cvtepi32_epi16(up));
}

struct Task {
  const Phase* phase;
  const int8_t* weight;
  const int32_t* start;
  float grad_scale, weight_scale;
  long channels;  // from the panel's first to the group's last
};

// W pixels of each of H rows by 16 * N channels.
template <long W, long H, long N>
static inline void multiply(const Task& task, const uint8_t* grad, T* out) {
  // The sums are registers only if every loop over them is unrolled.
  __m512i sum[W * H][N];
#pragma GCC unroll 16
  for (long m = 0; m < W * H; m++)
#pragma GCC unroll 4
    for (long n = 0; n < N; n++) sum[m][n] = _mm512_loadu_si512(task.start + 16 * n);
  for (long i = 0; i < task.phase->taps; i++) {
    const uint8_t* g = grad + task.phase->offset[i];
    const int8_t* weight = task.weight + task.phase->tap[i] * QUADS * N * 64;
    for (long quad = 0; quad < QUADS; quad++, g += 4, weight += 64 * N) {
      __m512i values[N];
#pragma GCC unroll 4
      for (long n = 0; n < N; n++) values[n] = _mm512_loadu_si512(weight + 64 * n);
#pragma GCC unroll 16
      for (long m = 0; m < W * H; m++) {
        int32_t four;
        std::memcpy(&four, g + ((m / W) * GWP + m % W) * CO, 4);
        __m512i pixel = _mm512_set1_epi32(four);
#pragma GCC unroll 4
        for (long n = 0; n < N; n++) dot4(sum[m][n], pixel, values[n]);
      }
    }
  }
#pragma GCC unroll 16
  for (long m = 0; m < W * H; m++)
#pragma GCC unroll 4
    for (long n = 0; n < N; n++) {
      __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(sum[m][n]), _mm512_set1_ps(task.grad_scale));
      value = _mm512_mul_ps(value, _mm512_set1_ps(task.weight_scale));
      long left = std::min(16L, task.channels - 16 * n);
      write(out + (m / W) * STEP_H + (m % W) * STEP_W + 16 * n, value,
            __mmask16((1u << left) - 1));
    }
}

// A strip of H rows: whole tiles, then the pixels that are left, of which there are one of two
// numbers, as the phases' widths differ by one at most.
template <long H, long N>
static inline void strip(const Task& task, const uint8_t* grad, T* out, long width) {
  constexpr long WIDER = (IW + SW - 1) / SW % TILE_W, NARROWER = IW / SW % TILE_W;
  for (; width >= TILE_W; width -= TILE_W, grad += TILE_W * CO, out += TILE_W * STEP_W)
    multiply<TILE_W, H, N>(task, grad, out);
  if constexpr (WIDER > 0) if (width == WIDER) return multiply<WIDER, H, N>(task, grad, out);
  if constexpr (NARROWER > 0) if (width == NARROWER) multiply<NARROWER, H, N>(task, grad, out);
}

template <long N>
static inline void rows(const Task& task, const uint8_t* grad, T* out, long height, long width) {
  if (height >= TILE_H) return strip<TILE_H, N>(task, grad, out, width);
  for (long h = 0; h < height; h++)
    strip<1, N>(task, grad + h * GWP * CO, out + h * STEP_H, width);
}

static void transpose(const T* from, T* into, long channels, long height, long width) {
  for (long c = 0; c < channels; c++)
    for (long h = 0; h < height; h++)
      for (long w = 0; w < width; w++)
        into[c * RS1 + h * SH * RS2 + w * SW * RS3] = from[h * STEP_H + w * STEP_W + c];
}

static void kernel(void* const* t) {
  const uint8_t* grad = static_cast<const uint8_t*>(t[0]);
  const uint8_t* weight = static_cast<const uint8_t*>(t[1]);
  float grad_scale = *static_cast<const float*>(t[2]);
  float weight_scale = *static_cast<const float*>(t[3]);
  T* out = static_cast<T*>(t[4]);
  int8_t* packed = static_cast<int8_t*>(t[5]);
  int32_t* start = reinterpret_cast<int32_t*>(packed + GROUPS * VECTORS * TAPS * QUADS * 64);

  Phase phases[PHASES];
  for (long p = 0; p < PHASES; p++) phases[p] = phase_of(p / SW, p % SW);
  parallel(GROUPS * PANELS, [&](long i) {
    pack(weight, i / PANELS, i % PANELS, packed, start, phases);
  });

  constexpr long HEIGHT = (IH + SH - 1) / SH, WIDTH = (IW + SW - 1) / SW;
  constexpr long STRIPS = (WIDTH + STRIP * TILE_W - 1) / (STRIP * TILE_W);
  constexpr long BANDS = (HEIGHT + TILE_H - 1) / TILE_H, ALL = GROUPS * PANELS;
  parallel(B * ALL * PHASES * BANDS * STRIPS, [&](long i) {
    long w = i % STRIPS * STRIP * TILE_W, h = i / STRIPS % BANDS * TILE_H;
    long p = i / (STRIPS * BANDS) % PHASES, rest = i / (STRIPS * BANDS * PHASES);
    // All panels of one image: weights come from a cache, and pixels of dx are written whole.
    long b = rest / ALL, group = rest % ALL / PANELS, panel = rest % PANELS;
    const Phase& phase = phases[p];
    long height = std::min(TILE_H, phase.height - h);
    long width = std::min(STRIP * TILE_W, phase.width - w);
    if (height <= 0 || width <= 0) return;
    Task task{&phase, panel_at(packed, group, panel),
              start + ((group * PHASES + p) * VECTORS + panel * PANEL) * 16,
              grad_scale, weight_scale, CG - panel * PANEL * 16};
    const uint8_t* g = grad + ((b * GHP + h) * GWP + w) * CO + group * OG;
    T* into = out + b * RS0 + (group * CG + panel * PANEL * 16) * RS1
              + (h * SH + p / SW) * RS2 + (w * SW + p % SW) * RS3;
    alignas(64) static thread_local T buffer[DIRECT ? 1 : TILE_H * STEP_H];
    T* tile = DIRECT ? into : buffer;
    if (panel < PANELS - 1) rows<PANEL>(task, g, tile, height, width);
    else rows<LAST>(task, g, tile, height, width);
    if (DIRECT) return;
    transpose(buffer, into, std::min(PANEL * 16, task.channels), height, width);
  });
}
"""


def _sample(
    *problem: Any,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = True,
    scale: float = 0.01,
) -> Sample:
    example = int8.Example(*problem)

    def args() -> tuple[Any, ...]:
        grad, _, weight = example.operands()
        scales = torch.tensor(scale), torch.tensor(0.5)
        return grad, weight, *scales, *example.sizes(), dtype, channels_last

    return Sample(args, length=example.channels[1] * math.prod(example.kernel))


def samples() -> tuple[Sample, ...]:
    """Return convolutions of every geometry, both layouts and types, odd sizes, and NaN."""
    half = torch.bfloat16
    return (
        _sample(3, (17, 19), (9, 7), (3, 3), (1, 1, 1, 1)),
        _sample(2, (1, 1), (5, 5), (1, 1)),
        _sample(1, (3, 63), (9, 8), (5, 5), (2, 2, 1, 1)),
        _sample(2, (63, 3), (16, 15), (3, 3), (2, 1, 1, 1), dtype=half),
        _sample(2, (6, 4), (11, 10), (3, 2), (2, 3, 2, 2), channels_last=False),
        _sample(2, (8, 8), (9, 9), (7, 7), (1, 3, 1, 8)),
        _sample(2, (64, 32), (32, 18), (3, 3), (1, 1, 1, 1), dtype=half, channels_last=False),
        _sample(3, (80, 16), (4, 4), (3, 3), (1, 1, 1, 1)),
        _sample(1, (100, 36), (1, 305), (1, 1)),
        _sample(2, (8, 8), (6, 6), (1, 1), (2, 1, 1, 1)),
        _sample(2, (8, 8), (6, 6), (1, 1), (3, 0, 1, 1)),
        _sample(2, (8, 8), (5, 5), (3, 3), (1, 1, 1, 1), scale=float("nan")),
        _sample(2, (8, 8), (5, 5), (3, 3), (1, 1, 1, 1), scale=float("inf")),
    )


register(
    Kernel(
        name="int8_dgrad",
        schema="(Tensor grad, Tensor weight, Tensor grad_scale, Tensor weight_scale, "
        "int[] out_size, int[] size, int[] kernel, int[] stride, int[] padding, int[] dilation, "
        "int groups, ScalarType dtype, bool channels_last) -> Tensor",
        reference=reference,
        fake=fake,
        emit_cpp=emit_cpp,
        samples=samples,
    )
)
