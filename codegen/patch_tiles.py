"""C++ that multiplies gradients with patches of an input: a block of output pixels at a time.

The text needs that of `channels_last` and the constants of a convolution, of its rows and of `tile`
before it (see `kernels/sampled_wgrad.py`). A block of 128 rows (256 in bfloat16) is packed twice:
its gradients as [tiles of 8 output channels][rows][8], its patches as panels [rows][NV vectors of
16 columns], a column being a tap and an input channel. A panel of 128 rows and 3 vectors is 24 KB:
it stays in the first cache while all gradients pass. The product of one tile and one panel stays in
registers.

oneDNN's micro-kernels want the left factor transposed, here the gradients; these read it as it is.
"""

import math


def tile(kernel: list[int], in_channels: int, out_channels: int, pairs: bool) -> dict[str, int]:
    """Return how dw is cut into register tiles: constants of the text.

    Args:
        kernel: the kernel's spatial sizes.
        in_channels: of one group.
        out_channels: of one group.
        pairs: whether two rows of a column are packed into a word, as bfloat16.
    """
    vectors = -(-math.prod(kernel) * in_channels // 16)
    # 24 accumulators leave room for the operands; at most 1/16 of the work may be on padding.
    width = min((3, 2, 1), key=lambda n: (-(-vectors // n) * n > vectors + vectors // 16, -n))
    return {
        "NV": width,
        "PANELS": -(-vectors // width),
        "TILES": -(-out_channels // 8),
        "TILE": 8 * width * 16,
        "BLOCK": 256 if pairs else 128,
        "BUFFER": 128 * width * 64 + -(-out_channels // 8) * (128 * 32 + 64) + 16 * 256,
    }


TEXT = r"""
typedef float v16 __attribute__((vector_size(64)));
typedef uint32_t w16 __attribute__((vector_size(64)));
typedef float v8 __attribute__((vector_size(32)));
typedef uint32_t w8 __attribute__((vector_size(32)));
typedef uint16_t halves __attribute__((vector_size(32), aligned(2)));

constexpr long POSITIONS = OH * OW, CG = CI / GROUPS, OG = CO / GROUPS, TAPS = KH * KW;
constexpr long COLUMNS = TAPS * CG, WIDTH = NV * 16, M = 8;
// PAIRS, in bfloat16: a word holds the same column of two rows, which one instruction contracts.
constexpr long PACK = PAIRS ? 2 : 1, WORDS = BLOCK / PACK;
constexpr long BLOCKS = (R + BLOCK - 1) / BLOCK, PART = PANELS * TILES * TILE;
// Patches of bfloat16 are multiplied as they are: no value is rounded, and packing takes a fifth of
// the instructions. Their centre is taken out of the sums instead: sum g (x - mu) is
// sum g x - (sum g) mu, for every tap with the gradients whose tap lies inside.
constexpr bool LATE = CENTERED && sizeof(T) == 2;
constexpr bool EARLY = CENTERED && !LATE;
// What gradients sum to: all [TILES][M], then those whose tap lies outside [TAPS][TILES][M].
constexpr long TALLY = LATE ? (1 + TAPS) * TILES * M : 0;

// Where the windows of a block's rows begin, and a bit for each tap that is inside the image.
struct Rows { long at[BLOCK]; uint64_t inside[BLOCK]; };
// Gradients of the same row are a line more than a power of two apart: they share no cache set.
constexpr long NEXT = WORDS * M + 16;
struct alignas(64) Buffers {
  uint32_t panel[WORDS * WIDTH];
  uint32_t grads[TILES * NEXT];
  Rows rows;
};
static_assert(sizeof(Buffers) <= BUFFER);
static uint64_t inside_h[OH], inside_w[OW];

static inline uint32_t word(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
// To bfloat16, in the low half. A NaN keeps its upper bits: they come from bfloat16 or are 0x7FC0.
template <typename W> static inline W rounded(W bits) {
  return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
}

static void find_borders() {
  auto mark = [](uint64_t* of, long outs, long size, long stride, long padding, long dilation,
                 auto axis) {
    for (long i = 0; i < outs; i++) {
      of[i] = 0;
      for (long tap = 0; tap < TAPS; tap++) {
        long at = i * stride + axis(tap) * dilation - padding;
        of[i] |= uint64_t(at >= 0 && at < size) << tap;
      }
    }
  };
  mark(inside_h, OH, IH, SH, PH, DH, [](long tap) { return tap / KW; });
  mark(inside_w, OW, IW, SW, PW, DW, [](long tap) { return tap % KW; });
}

// Rows that fill up the last block have no tap inside, and gradients of zero.
static long find_rows(const Index* index, long first, Rows& rows) {
  long count = std::min(BLOCK, R - first), padded = (count + PACK - 1) / PACK * PACK;
  for (long i = 0; i < count; i++) {
    uint64_t r = uint64_t(index[(first + i) * IS]);
    long b = r / POSITIONS, p = r % POSITIONS, h = p / OW, w = p % OW;
    rows.at[i] = b * XS0 + (h * SH - PH) * XS2 + (w * SW - PW) * XS3;
    rows.inside[i] = inside_h[h] & inside_w[w];
  }
  for (long i = count; i < padded; i++) rows.at[i] = 0, rows.inside[i] = 0;
  return padded / PACK;
}

// Fetch memory in order that is about to be read here and there: the hardware fetches ahead of the
// one, and waits at every pixel of the other. With a quarter of the pixels and 32 channels at 16x16
// that took a third of the time away. Rows that are far apart, in no order, are left alone.
constexpr long SWEEP_BYTES = 600000;
static void sweep(const T* data, long first, long last, long size) {
  first = std::max(first, 0L);
  last = std::min(last, size);
  if ((last - first) * long(sizeof(T)) > SWEEP_BYTES) return;
  for (long i = first; i < last; i += 64 / long(sizeof(T))) __builtin_prefetch(data + i, 0, 2);
}
static void sweep_block(const T* grad, const T* x, const Index* index, long block) {
  long first = B * POSITIONS, last = -1;
  for (long i = block * BLOCK; i < std::min((block + 1) * BLOCK, R); i++) {
    first = std::min(first, long(index[i * IS]));
    last = std::max(last, long(index[i * IS]));
  }
  auto at = [](long r, long sample, long row) {
    return r / POSITIONS * sample + r % POSITIONS / OW * row;
  };
  if (XS1 == 1 && XS3 == CI && XS2 == IW * CI && XS0 == IH * XS2)
    sweep(x, at(first, XS0, SH * XS2) - PH * XS2, at(last, XS0, SH * XS2) + KH * DH * XS2, B * XS0);
  // Gradients of several lines a pixel are fetched line by line well enough.
  if (GS1 == 1 && GS3 == CO && GS2 == OW * CO && GS0 == OH * GS2 && CO * sizeof(T) <= 64)
    sweep(grad, at(first, GS0, GS2), at(last, GS0, GS2) + GS2, B * GS0);
}

// Floats of two rows as bfloat16, in the halves of words.
static inline w16 joined(v16 one, v16 two) {
#if defined(__AVX512BF16__)
  const __m512i order = _mm512_set_epi16(
      31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19,
      3, 18, 2, 17, 1, 16, 0);
  __m512bh both = _mm512_cvtne2ps_pbh((__m512)two, (__m512)one);
  return (w16)_mm512_permutexvar_epi16(order, (__m512i)both);
#else
  return rounded((w16)one) | rounded((w16)two) << 16;
#endif
}

// The weighted gradients of a block: [tiles][words][M], tiles NEXT words apart.
static void pack_grads(const T* grad, const Index* index, const float* weight, long first,
                       uint32_t* into) {
  auto row = [&](long i) {
    uint64_t r = i < R ? uint64_t(index[i * IS]) : 0;
    long p = r % POSITIONS;
    return grad + r / POSITIONS * GS0 + p / OW * GS2 + p % OW * GS3;
  };
  auto factor = [&](long i) { return i < R ? weight[i * WS] : 0.0f; };
  long count = std::min(BLOCK, R - first);
  for (long i = 0; i < count; i += PACK) {
    long one = first + i, two = one + PACK - 1;
    bool half = two >= R;
    const T *g = row(one), *next = row(half ? one : two);
    float f = factor(one), other = factor(two);
    uint32_t* at = into + i / PACK * M;
    if (GS1 == 1 && OG % 16 == 0) {
      for (long t = 0; t < TILES; t += 2, at += 2 * NEXT) {
        v16 values = floats(g + t * M) * f;
        w16 bits = (w16)values;
        if (PAIRS) bits = joined(values, half ? v16{} : floats(next + t * M) * other);
        std::memcpy(at, &bits, M * 4);
        std::memcpy(at + NEXT, (const uint32_t*)&bits + M, M * 4);
      }
      continue;
    }
    for (long t = 0; t < TILES; t++, at += NEXT) {
      auto pack = [&](long channels) {
        for (long m = 0; m < channels; m++) {
          long o = (t * M + m) * GS1;
          if (!PAIRS) at[m] = word(load(g[o]) * f);
          else at[m] = rounded(word(load(g[o]) * f)) |
                       (half ? 0 : rounded(word(load(next[o]) * other)) << 16);
        }
      };
      if (OG % M == 0 || t + 1 < TILES) pack(M);
      else {
        std::memset(at, 0, M * 4);
        pack(OG % M);
      }
    }
  }
}

// Adds what the packed gradients of a block sum to, see TALLY.
static void tally(const uint32_t* grads, const Rows& rows, long words, v8* sum) {
  constexpr uint64_t EVERY = ~uint64_t(0) >> (64 - TAPS);
  auto at = [&](long t, long i) { return *(const w8*)(grads + t * NEXT + i * M); };
  for (long t = 0; t < TILES; t++) {
    v8 even = {}, odd = {};
    for (long i = 0; i < words; i++) {
      even += (v8)(at(t, i) << 16);
      odd += (v8)(at(t, i) & 0xFFFF0000u);
    }
    sum[t] += even + odd;
  }
  for (long r = 0; r < words * PACK; r++)
    for (uint64_t out = ~rows.inside[r] & EVERY; out != 0; out &= out - 1) {
      v8* of_tap = sum + (1 + __builtin_ctzll(out)) * TILES;
      for (long t = 0; t < TILES; t++)
        of_tap[t] += (v8)(r % PACK ? at(t, r / PACK) & 0xFFFF0000u : at(t, r / PACK) << 16);
    }
}

static inline w16 only(bool inside, w16 bits) { return bits & (w16{} - uint32_t(inside)); }

// 16 neighbouring channels of one tap of a row, or of two rows, less their centre.
static inline w16 fetch(const float* x, const Rows& rows, long r, long offset, long tap, v16 mu) {
  auto of_row = [&](long i) {
    bool inside = rows.inside[i] >> tap & 1;
    v16 value = floats(x + (rows.at[i] + offset & -long(inside)));
    return only(inside, (w16)(EARLY ? value - mu : value));
  };
  return PAIRS ? joined((v16)of_row(r), (v16)of_row(r + 1)) : of_row(r);
}
static inline w16 fetch(const bf16* x, const Rows& rows, long r, long offset, long tap, v16) {
  alignas(32) static const bf16 zeros[16] = {};
  auto of_row = [&](long i) {
    return *(const halves*)(rows.inside[i] >> tap & 1 ? x + rows.at[i] + offset : zeros);
  };
  return (w16)__builtin_shufflevector(of_row(r), of_row(r + 1), 0, 16, 1, 17, 2, 18, 3, 19, 4, 20,
                                      5, 21, 6, 22, 7, 23, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28,
                                      13, 29, 14, 30, 15, 31);
}

// One panel of the block's patches, [words][WIDTH]: columns are ordered by tap, then channel.
static void fill_vectors(const T* x, const float* center, const Rows& rows, long words,
                         long panel, uint32_t* into) {
  for (long v = 0; v < NV; v++) {
    long column = (panel * NV + v) * 16, tap = column / CG, channel = column % CG;
    w16* to = (w16*)(into + v * 16);
    if (column >= COLUMNS) {
      for (long i = 0; i < words; i++) to[i * NV] = w16{};
      continue;
    }
    long offset = tap / KW * DH * XS2 + tap % KW * DW * XS3 + channel;
    v16 mu = {};
    if (EARLY) for (long c = 0; c < 16; c++) mu[c] = center[(channel + c) * CS];
    for (long i = 0; i < words; i++) to[i * NV] = fetch(x, rows, i * PACK, offset, tap, mu);
  }
}

// The same for any number of channels in any layout.
static void fill_columns(const T* x, const float* center, const Rows& rows, long words,
                         long panel, uint32_t* into) {
  for (long l = 0; l < WIDTH; l++) {
    long column = panel * WIDTH + l, tap = column / CG, channel = column % CG;
    bool used = column < COLUMNS;
    long offset = tap / KW * DH * XS2 + tap % KW * DW * XS3 + channel * XS1;
    float mu = EARLY && used ? center[channel * CS] : 0.0f;
    auto value = [&](long r) {
      bool inside = used && (rows.inside[r] >> tap & 1);
      return inside ? word(load(x[rows.at[r] + offset]) - mu) : 0u;
    };
    for (long i = 0; i < words; i++) {
      long r = i * PACK;
      into[i * WIDTH + l] = PAIRS ? rounded(value(r)) | rounded(value(r + PACK - 1)) << 16
                                  : value(r);
    }
  }
}

static inline v16 contract(v16 sum, w16 patch, uint32_t grad) {
  if (!PAIRS) {
    float value;
    std::memcpy(&value, &grad, 4);
    return sum + (v16)patch * value;
  }
#if defined(__AVX512BF16__)
  return (v16)_mm512_dpbf16_ps((__m512)sum, (__m512bh)patch, (__m512bh)_mm512_set1_epi32(grad));
#else
  w16 both = w16{} + grad;
  sum += (v16)(patch << 16) * (v16)(both << 16);
  return sum + (v16)(patch & 0xFFFF0000u) * (v16)(both & 0xFFFF0000u);
#endif
}

// sum [M][NV] (+)= grads [words][M]^T panel [words][NV], in registers throughout.
static void multiply(const uint32_t* grads, const uint32_t* panel, long words, bool add, v16* sum) {
  v16 part[M][NV];
#pragma GCC unroll 8
  for (long m = 0; m < M; m++)
#pragma GCC unroll 3
    for (long v = 0; v < NV; v++) part[m][v] = add ? sum[m * NV + v] : v16{};
  for (long i = 0; i < words; i++) {
    const w16* patch = (const w16*)(panel + i * WIDTH);
#pragma GCC unroll 8
    for (long m = 0; m < M; m++)
#pragma GCC unroll 3
      for (long v = 0; v < NV; v++)
        part[m][v] = contract(part[m][v], patch[v], grads[i * M + m]);
  }
#pragma GCC unroll 8
  for (long m = 0; m < M; m++)
#pragma GCC unroll 3
    for (long v = 0; v < NV; v++) sum[m * NV + v] = part[m][v];
}
"""
