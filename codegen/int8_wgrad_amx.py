"""Tiles of AMX: the inner part of `int8_wgrad` for processors that have it.

A step of the contraction is 16 quadruples of pixels, for which 16 output channels of g are turned
into rows of 64 bytes. A step may reach from one row or image into the next: g is packed with zeros
where x has the border between two images, and they do not count.
"""

from codegen import amx

BODY = (
    amx.TILES
    + r"""
// Quadruples from an image's first to the next one's, and steps of 16.
constexpr long NEXT = SLOTS * QUADS, STEPS = BLOCK / 16;

// Turn 16 rows of 16 quadruples.
static inline void turn(__m512i* r) {
  __m512i s[16];
  for (int i = 0; i < 16; i += 2) {
    s[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    s[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; j++) {
      r[i + 2 * j] = _mm512_unpacklo_epi64(s[i + j], s[i + j + 2]);
      r[i + 2 * j + 1] = _mm512_unpackhi_epi64(s[i + j], s[i + j + 2]);
    }
  for (int i = 0; i < 4; i++) {
    __m512i low = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    __m512i high = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xDD);
    __m512i low2 = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    __m512i high2 = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xDD);
    s[i] = _mm512_shuffle_i32x4(low, low2, 0x88);
    s[i + 4] = _mm512_shuffle_i32x4(high, high2, 0x88);
    s[i + 8] = _mm512_shuffle_i32x4(low, low2, 0xDD);
    s[i + 12] = _mm512_shuffle_i32x4(high, high2, 0xDD);
  }
  std::memcpy(r, s, sizeof s);
}

// [step][16][16 quadruples][4], and -128 times the sum.
static void pack_block(const uint8_t* grad, const Chunk& chunk, int8_t* into, int32_t* start) {
  __m512i sum = _mm512_setzero_si512();
  for (long at = 0; at < BLOCK; at += 16, into += 1024) {
    __m512i r[16];
    for (long i = 0; i < 16; i++) {
      long b = (at + i) / NEXT, h = (at + i) % NEXT / QUADS, q = (at + i) % QUADS;
      bool inside = b < chunk.images && h < chunk.rows && q < chunk.quads;
      r[i] = inside ? pixels_of(grad, chunk, b, h, q) : _mm512_setzero_si512();
      dot4(sum, _mm512_set1_epi8(1), r[i]);
    }
    turn(r);
    for (long i = 0; i < 16; i++) _mm512_store_si512(into + i * 64, r[i]);
  }
  _mm512_store_si512(start, _mm512_mullo_epi32(sum, _mm512_set1_epi32(-128)));
}

// M blocks of output channels by N vectors of columns, of which there are `EVERY` in a panel.
template <long M, long N, long EVERY>
static inline void multiply(const int8_t* grad, const uint8_t* x, int32_t* sums) {
  _tile_zero(0);
  if constexpr (N > 1) _tile_zero(1);
  if constexpr (M > 1) _tile_zero(2);
  if constexpr (M > 1 && N > 1) _tile_zero(3);
  for (long step = 0; step < STEPS; step++, grad += 1024, x += EVERY * 1024) {
    _tile_loadd(4, grad, 64);
    _tile_loadd(6, x, EVERY * 64);
    _tile_dpbsud(0, 4, 6);
    if constexpr (N > 1) {
      _tile_loadd(7, x + 64, EVERY * 64);
      _tile_dpbsud(1, 4, 7);
    }
    if constexpr (M > 1) {
      _tile_loadd(5, grad + BLOCK * 64, 64);
      _tile_dpbsud(2, 5, 6);
      if constexpr (N > 1) _tile_dpbsud(3, 5, 7);
    }
  }
  _tile_stored(0, sums, 128);
  if constexpr (N > 1) _tile_stored(1, sums + 16, 128);
  if constexpr (M > 1) _tile_stored(2, sums + 512, 128);
  if constexpr (M > 1 && N > 1) _tile_stored(3, sums + 528, 128);
  Tiles::fence();
}

template <long M, long N, long EVERY>
static inline void block(const Grad& grad, const uint8_t* x, long o, float* dw, bool first) {
  alignas(64) int32_t sums[32][32];
  multiply<M, N, EVERY>(grad.values[o / 16], x, sums[0]);
  for (long m = 0; m < std::min(16 * M, OG - o); m++)
    for (long n = 0; n < N; n++) {
      __m512i sum = _mm512_load_si512(sums[m] + 16 * n);
      sum = _mm512_add_epi32(sum, _mm512_set1_epi32(grad.start[o + m]));
      float* at = dw + (o + m) * 64 + 16 * n;
      __m512 value = _mm512_cvtepi32_ps(sum);
      _mm512_store_ps(at, first ? value : _mm512_add_ps(_mm512_load_ps(at), value));
    }
}

// dw of all output channels by 16 * N columns of every row of the kernel, over one chunk.
// Two blocks of g meet all columns of x before the next two: g may be larger than the cache.
template <long N>
static void contract(const Grad& grad, const uint8_t* packed, const Chunk&, float* dw, bool first) {
  Tiles registers;
  for (long o = 0; o < OG; o += 32)
    for (long kh = 0; kh < KH; kh++)
      for (long n = 0; n < N; n += 2) {
        const uint8_t* x = packed + (kh * DH % SH * IMAGES * NEXT + kh * DH / SH * QUADS) * 64 * N;
        float* into = dw + kh * OG * 64 + 16 * n;
        if (o + 16 < OG && n + 1 < N) block<2, 2, N>(grad, x + 64 * n, o, into, first);
        else if (o + 16 < OG) block<2, 1, N>(grad, x + 64 * n, o, into, first);
        else if (n + 1 < N) block<1, 2, N>(grad, x + 64 * n, o, into, first);
        else block<1, 1, N>(grad, x + 64 * n, o, into, first);
      }
}
"""
)
