"""Tiles in vector registers: the inner part of `int8_wgrad` for AVX-512 with VNNI."""

BODY = r"""
// [quad][16][4], and -128 times the sum.
static void pack_block(const uint8_t* grad, const Chunk& chunk, int8_t* into, int32_t* start) {
  __m512i sum = _mm512_setzero_si512();
  for (long b = 0; b < chunk.images; b++)
    for (long h = 0; h < chunk.rows; h++)
      for (long q = 0; q < chunk.quads; q++, into += 64) {
        __m512i values = pixels_of(grad, chunk, b, h, q);
        dot4(sum, _mm512_set1_epi8(1), values);
        _mm512_store_si512(into, values);
      }
  _mm512_store_si512(start, _mm512_mullo_epi32(sum, _mm512_set1_epi32(-128)));
}

// dw of M output channels by 16 * N columns, over one chunk.
template <long M, long N>
static inline void multiply(const Grad& packed, const uint8_t* input, const Chunk& chunk, long o,
                            long kh, float* dw, bool first) {
  __m512i sum[M][N];
#pragma GCC unroll 16
  for (long m = 0; m < M; m++)
#pragma GCC unroll 4
    for (long n = 0; n < N; n++) sum[m][n] = _mm512_set1_epi32(packed.start[o + m]);
  // Rows follow each other without a gap: only a chunk of a single row has less than QUADS in it.
  long quads = chunk.rows * chunk.quads;
  const int8_t* grad = packed.values[o / 16] + o % 16 * 4;
  for (long b = 0; b < chunk.images; b++) {
    long slot = (kh * DH % SH * IMAGES + b) * SLOTS + kh * DH / SH;
    const uint8_t* x = input + slot * QUADS * 64 * N;
    for (long q = 0; q < quads; q++, x += 64 * N, grad += 64) {
      __m512i values[N];
#pragma GCC unroll 4
      for (long n = 0; n < N; n++) values[n] = _mm512_load_si512(x + 64 * n);
#pragma GCC unroll 16
      for (long m = 0; m < M; m++) {
        int32_t four;
        std::memcpy(&four, grad + 4 * m, 4);
        __m512i pixels = _mm512_set1_epi32(four);
#pragma GCC unroll 4
        for (long n = 0; n < N; n++) dot4(sum[m][n], values[n], pixels);
      }
    }
  }
#pragma GCC unroll 16
  for (long m = 0; m < M; m++)
#pragma GCC unroll 4
    for (long n = 0; n < N; n++) {
      float* at = dw + (o + m) * 64 + 16 * n;
      __m512 value = _mm512_cvtepi32_ps(sum[m][n]);
      _mm512_store_ps(at, first ? value : _mm512_add_ps(_mm512_load_ps(at), value));
    }
}

// The `LEFT` output channels of a block from `o` on, in tiles of at most 24 registers.
template <long LEFT, long N>
static inline void block(const Grad& grad, const uint8_t* x, const Chunk& chunk, long o, long kh,
                         float* dw, bool first) {
  constexpr long TILES = (LEFT * N + 23) / 24, M = (LEFT + TILES - 1) / TILES;
  multiply<M, N>(grad, x, chunk, o, kh, dw, first);
  if constexpr (LEFT > M) block<LEFT - M, N>(grad, x, chunk, o + M, kh, dw, first);
}

// dw of all output channels by 16 * N columns of every row of the kernel, over one chunk.
template <long N>
static void contract(const Grad& grad, const uint8_t* x, const Chunk& chunk, float* dw,
                     bool first) {
  constexpr long LAST = OG - (BLOCKS - 1) * 16;
  for (long kh = 0; kh < KH; kh++, dw += OG * 64) {
    for (long o = 0; o < OG - LAST; o += 16) block<16, N>(grad, x, chunk, o, kh, dw, first);
    block<LAST, N>(grad, x, chunk, OG - LAST, kh, dw, first);
  }
}
"""
