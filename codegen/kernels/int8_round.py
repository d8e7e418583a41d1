"""Rounding to 8 bits at random, so that the expectation is kept.

    q = floor(x / scale + u),   u uniform in [0, 1),   clamped to [-128, 127]

E[q] * scale = x for |x| <= 127 * scale, up to 2^-16 of a step: `codegen.int8.round_at_random` says
why, and `codegen.int8` what the result looks like. NaN becomes 127: who computes the scale from the
tensor's maximum has NaN there, and in every product with it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from codegen import cpp, draws, int8
from codegen.gpu import rounding
from codegen.gpu import source as gpu
from codegen.kernel import Kernel, Sample, Source, register


def reference(
    x: Tensor, scale: Tensor, seed: Tensor, salt: int, before: list[int], after: list[int]
) -> Tensor:
    """Return x in units of `scale`, rounded at random to integers.

    Args:
        x: [B, C, H, W].
        scale: float, 0-d: what one step of the result is worth.
        seed: int64, 0-d.
        salt: tells apart the draws that share a seed.
        before: zeros before the first row and column.
        after: zeros after the last.

    Returns:
        uint8, flat, as described in `codegen.int8`.
    """
    batch, channels, height, width = x.shape
    uniform = draws.coarse(seed, x.numel(), salt).view(batch, height, width, channels)
    rounded = int8.round_at_random(x, scale, uniform.permute(0, 3, 1, 2))
    return int8.to_bytes(rounded, before, after)


def fake(
    x: Tensor, scale: Tensor, seed: Tensor, salt: int, before: list[int], after: list[int]
) -> Tensor:
    """Return uninitialised bytes."""
    del scale, seed, salt
    batch, height, width, channels = int8.padded(list(x.shape), before, after)
    count = batch * height * width * channels + int8.SLACK
    return torch.empty(count, dtype=torch.uint8, device=x.device)


def emit_cpp(
    x: Tensor, scale: Tensor, seed: Tensor, salt: int, before: list[int], after: list[int]
) -> Source | str:
    """Return the source."""
    del seed
    if (reason := cpp.unsupported(x, scale) or int8.unsupported()) is not None:
        return reason
    if scale.dtype != torch.float32:
        return "the scale is no float32"
    batch, channels, height, width = x.shape
    constants: dict[str, Any] = {
        "T": cpp.ELEMENTS[x.dtype], "SALT": salt, "LARGEST": int8.LARGEST, "SLACK": int8.SLACK,
        "B": batch, "C": channels, "H": height, "W": width,
        "TOP": before[0], "LEFT": before[1],
        "HP": before[0] + height + after[0], "WP": before[1] + width + after[1],
        **cpp.strides("XS", x),
    }  # fmt: skip
    return Source(cpp.source(constants, int8.INTERLEAVE + _BODY))


def emit_triton(
    x: Tensor, scale: Tensor, seed: Tensor, salt: int, before: list[int], after: list[int]
) -> gpu.Program | str:
    """Return the Triton."""
    del seed
    constants = {"LARGEST": int8.LARGEST, "ZERO": int8.zero_point(x.device)}
    return rounding.program("int8_round", x, scale, salt, (before, after), constants, _TRITON)


_TRITON = """
@triton.jit
def rounded(value, scale, key, position):
    fixed = value.to(tl.float32) * tl.div_rn(65536.0, scale)
    fixed = tl.where(fixed == fixed, tl.minimum(fixed, 65536.0 * LARGEST), 65536.0 * LARGEST)
    fixed = tl.maximum(fixed, -65536.0 * 128)
    return ((nearest(fixed) + coarse(key, position)) >> 16) + ZERO
"""

_BODY = r"""
constexpr bool PIXELS = XS1 == 1 && (XS3 == C || W == 1);  // a row is contiguous, channels inside
constexpr bool MAPS = XS3 == 1 && (XS2 == W || H == 1);    // a map is contiguous

static inline __m512 read(const float* at, __mmask16 mask) {
  return _mm512_maskz_loadu_ps(mask, at);
}
static inline __m512 read(const bf16* at, __mmask16 mask) {
  __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, at));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

// The draws of `codegen.draws.coarse`, in units of 2^-16, at 16 positions ...
static inline __m512i draw16(uint32_t key, uint32_t position, uint32_t step) {
  alignas(64) uint32_t numbers[16];
  for (uint32_t lane = 0; lane < 16; lane++) {
    uint32_t at = position + lane * step, bits = hash(key, (at >> 5 << 4) + (at & 15));
    numbers[lane] = ((at & 16 ? bits >> 15 : bits << 1) & 0xFFFF) | 1;
  }
  return _mm512_load_si512(numbers);
}
// ... and at the 32 positions from a multiple of 32.
struct Draws { __m512i low, high; };
static inline Draws draw32(uint32_t key, uint32_t position) {
  alignas(64) uint32_t numbers[16];
  for (uint32_t lane = 0; lane < 16; lane++) numbers[lane] = hash(key, position / 2 + lane);
  __m512i bits = _mm512_load_si512(numbers), one = _mm512_set1_epi32(1);
  __m512i low = _mm512_and_si512(_mm512_slli_epi32(bits, 1), _mm512_set1_epi32(0xFFFF));
  return {_mm512_or_si512(low, one), _mm512_or_si512(_mm512_srli_epi32(bits, 15), one)};
}

struct Rounding {
  __m512 inverse;
  uint32_t key;
  // 16 integers, which saturating conversions take to bytes.
  __m512i operator()(__m512 value, __m512i random) const {
    // NaN is not less than anything: the minimum is its second operand.
    __m512 fixed = _mm512_mul_ps(value, inverse);
    fixed = _mm512_min_ps(fixed, _mm512_set1_ps(65536.0f * LARGEST));
    return _mm512_srai_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(fixed), random), 16);
  }
  __m128i few(__m512 value, long position, long step) const {
    __m128i bytes = _mm512_cvtsepi32_epi8((*this)(value, draw16(key, position, step)));
    return _mm_xor_si128(bytes, _mm_set1_epi8(char(0x80)));
  }
};

static inline __mmask16 first(long count) {
  return count >= 16 ? __mmask16(0xFFFF) : __mmask16((1u << count) - 1);
}
static inline uint8_t* pixel(uint8_t* out, long b, long p) {
  return out + ((b * HP + TOP + p / W) * WP + LEFT + p % W) * C;
}

// Rows of `run` values that are contiguous on both sides.
static void round_pixels(const T* x, uint8_t* out, Rounding rounding) {
  constexpr long ROW = W * C, PIECE = 8192, PIECES = (ROW + PIECE - 1) / PIECE;
  parallel(B * H * PIECES, [&](long unit) {
    long row = unit / PIECES, from = unit % PIECES * PIECE, to = std::min(ROW, from + PIECE);
    const T* in = x + row / H * XS0 + row % H * XS2;
    uint8_t* into = pixel(out, row / H, row % H * W);
    // Packing works within 128-bit lanes; this puts the lanes' quarters in order.
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    long i = from;
    for (; i + 64 <= to; i += 64) {
      __m512i q[4];
      for (long n = 0; n < 4; n += 2) {
        long at = row * ROW + i + 16 * n;
        Draws draws = ROW % 32 == 0 ? draw32(rounding.key, at)
                                    : Draws{draw16(rounding.key, at, 1),
                                            draw16(rounding.key, at + 16, 1)};
        q[n] = rounding(read(in + i + 16 * n, 0xFFFF), draws.low);
        q[n + 1] = rounding(read(in + i + 16 * n + 16, 0xFFFF), draws.high);
      }
      __m512i bytes = _mm512_packs_epi16(_mm512_packs_epi32(q[0], q[1]),
                                         _mm512_packs_epi32(q[2], q[3]));
      bytes = _mm512_xor_si512(bytes, _mm512_set1_epi8(char(0x80)));
      _mm512_storeu_si512(into + i, _mm512_permutexvar_epi32(order, bytes));
    }
    for (; i < to; i += 16) {
      __mmask16 mask = first(to - i);
      __m128i bytes = rounding.few(read(in + i, mask), row * ROW + i, 1);
      _mm_mask_storeu_epi8(into + i, mask, bytes);
    }
  });
}

// 16 channels by 16 pixels are transposed in registers.
static void round_maps(const T* x, uint8_t* out, Rounding rounding) {
  constexpr long PIECE = 64, PIECES = (H * W + PIECE - 1) / PIECE;
  parallel(B * PIECES, [&](long unit) {
    long b = unit / PIECES, from = unit % PIECES * PIECE, to = std::min(H * W, from + PIECE);
    for (long p = from; p < to; p += 16)
      for (long c = 0; c < C; c += 16) {
        __m128i r[16], s[16];
        __mmask16 mask = first(to - p);
        for (long i = 0; i < 16; i++) {
          r[i] = _mm_setzero_si128();
          if (c + i >= C) continue;
          __m512 values = read(x + b * XS0 + (c + i) * XS1 + p, mask);
          r[i] = rounding.few(values, (b * H * W + p) * C + c + i, C);
        }
        for (int round = 0; round < 4; round++) {
          for (int i = 0; i < 8; i++) {
            s[2 * i] = _mm_unpacklo_epi8(r[i], r[i + 8]);
            s[2 * i + 1] = _mm_unpackhi_epi8(r[i], r[i + 8]);
          }
          std::memcpy(r, s, sizeof r);
        }
        for (long i = 0; i < std::min(16L, to - p); i++)
          _mm_mask_storeu_epi8(pixel(out, b, p + i) + c, first(C - c), r[i]);
      }
  });
}

static void round_any(const T* x, uint8_t* out, Rounding rounding) {
  parallel(B * H, [&](long row) {
    long b = row / H, h = row % H;
    for (long w = 0; w < W; w++)
      for (long c = 0; c < C; c++) {
        __m512 value = _mm512_set1_ps(load(x[b * XS0 + c * XS1 + h * XS2 + w * XS3]));
        __m128i bytes = rounding.few(value, (row * W + w) * C + c, 0);
        pixel(out, b, h * W + w)[c] = uint8_t(_mm_cvtsi128_si32(bytes));
      }
  });
}

static void kernel(void* const* t) {
  const T* x = static_cast<const T*>(t[0]);
  float scale = *static_cast<const float*>(t[1]);
  int64_t seed = *static_cast<const int64_t*>(t[2]);
  uint8_t* out = static_cast<uint8_t*>(t[3]);
  Rounding rounding{_mm512_set1_ps(65536.0f / scale),
                    draw_key(seed, SALT)};
  if constexpr (HP > H || WP > W)
    parallel(B * HP, [&](long row) {
      uint8_t* into = out + row * WP * C;
      long h = row % HP - TOP;
      if (h < 0 || h >= H) {
        std::memset(into, 128, WP * C);
        return;
      }
      std::memset(into, 128, LEFT * C);
      std::memset(into + (LEFT + W) * C, 128, (WP - LEFT - W) * C);
    });
  std::memset(out + B * HP * WP * C, 128, SLACK);
  if constexpr (PIXELS) round_pixels(x, out, rounding);
  else if constexpr (MAPS) round_maps(x, out, rounding);
  else round_any(x, out, rounding);
}
"""


def _sample(
    shape: tuple[int, int, int, int],
    border: tuple[int, int, int, int] = (0, 0, 0, 0),
    dtype: torch.dtype = torch.float32,
    change: Callable[[Tensor], Tensor] = lambda x: x.contiguous(memory_format=torch.channels_last),
    scale: float = 3 / 127,
) -> Sample:
    """Return a tensor to round; `border` is top, left, bottom and right."""

    def args() -> tuple[Any, ...]:
        random = torch.Generator().manual_seed(sum(shape))
        x = change(torch.randn(shape, generator=random).to(dtype))
        top, left, bottom, right = border
        return x, torch.tensor(scale), torch.tensor(1234567), 77, [top, left], [bottom, right]

    return Sample(args, length=1)


def samples() -> tuple[Sample, ...]:
    """Return both layouts and types, borders, odd sizes, strides of every kind, and NaN."""
    nan, half = float("nan"), torch.bfloat16

    def with_nan(x: Tensor) -> Tensor:
        x[0, 0, 0, 0], x[-1, -1, -1, -1] = nan, float("inf")
        return x

    return (
        _sample((3, 17, 5, 6), (1, 1, 1, 1)),
        _sample((3, 17, 5, 6), (1, 1, 1, 1), change=Tensor.contiguous),
        _sample((2, 64, 4, 4), (2, 0, 1, 3), dtype=half),
        _sample((2, 63, 9, 7), (0, 3, 0, 0), dtype=half, change=Tensor.contiguous),
        _sample((1, 1, 1, 1)),
        _sample((1, 40, 1, 301)),
        _sample((2, 3, 17, 16), (1, 2, 3, 0), change=Tensor.contiguous),
        _sample((2, 16, 6, 6), (1, 1, 1, 1), change=lambda x: x[:, :1, :1, :1].expand(x.shape)),
        _sample((2, 5, 6, 6), change=lambda x: x.flip(2).mT),
        _sample((2, 5, 6, 12), (1, 0, 0, 1), change=lambda x: x[:, :, ::2, 1::3]),
        _sample((2, 5, 4, 4), change=with_nan),
        _sample((2, 5, 4, 4), scale=nan),
        _sample((2, 5, 4, 4), scale=float("inf")),
    )


register(
    Kernel(
        name="int8_round",
        schema="(Tensor x, Tensor scale, Tensor seed, int salt, int[] before, int[] after) "
        "-> Tensor",
        reference=reference,
        fake=fake,
        emit_cpp=emit_cpp,
        samples=samples,
        emit_triton=emit_triton,
    )
)
