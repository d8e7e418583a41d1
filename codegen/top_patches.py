"""C++ of `kernels/top_patches.py`: finds the largest values of maps, and adds weighted patches.

The text needs the constants of that kernel and the text of `channels_last` before it.
"""

TEXT = r"""
constexpr long POSITIONS = OH * OW, CG = CI / GROUPS, OG = CO / GROUPS;
constexpr long BLOCK = 16;  // output channels that are scanned together

// Where the k largest values of one map are, and what each of them weighs.
static void keep_many(const T* g, int32_t* position, float* weight) {
  static thread_local float values[POSITIONS];
  static thread_local int32_t order[POSITIONS];
  float total = 0, kept = 0;
  for (long p = 0; p < POSITIONS; p++) {
    values[p] = load(g[(p / OW) * GS2 + (p % OW) * GS3]);
    order[p] = int32_t(p);
    total += values[p];
  }
  // NaN counts as the largest value, as in the reference.
  auto larger = [&](int32_t a, int32_t b) {
    float x = std::fabs(values[a]), y = std::fabs(values[b]);
    return (x != x && y == y) || x > y;
  };
  if (K < POSITIONS) std::nth_element(order, order + K, order + POSITIONS, larger);
  for (long i = 0; i < K; i++) kept += values[order[i]];
  for (long i = 0; i < K; i++) {
    position[i] = order[i];
    weight[i] = (values[order[i]] + (total - kept) / K) * SCALE;
  }
}

// The same for k = 1 and up to BLOCK neighbouring channels: one pass, vectors of channels.
static void keep_one(const T* g, long channels, int32_t* position, float* weight) {
  float best[BLOCK], total[BLOCK];
  int32_t where[BLOCK];
  for (long c = 0; c < BLOCK; c++) best[c] = -1, total[c] = 0, where[c] = 0;
  auto scan = [&](long count) {
    for (long h = 0; h < OH; h++)
      for (long w = 0; w < OW; w++) {
        const T* row = g + h * GS2 + w * GS3;
        int32_t here = int32_t(h * OW + w);
        for (long c = 0; c < count; c++) {
          float value = load(row[c * GS1]), size = std::fabs(value);
          total[c] += value;
          // Written so that the first NaN wins and stays.
          bool better = !(size <= best[c]) && best[c] == best[c];
          best[c] = better ? size : best[c];
          where[c] = better ? here : where[c];
        }
      }
  };
  if (channels == BLOCK) scan(BLOCK); else scan(channels);
  for (long c = 0; c < channels; c++) {
    position[c] = where[c];
    weight[c] = total[c] * SCALE;
  }
}

// The same for 16 channels that are neighbours in memory. Magnitudes are compared as integers, in
// whose order they are: each waits for the one before a cycle, not seven. Every NaN counts as one
// number above infinity.
static void keep_vector(const T* g, int32_t* position, float* weight) {
  bits16 best = {}, where = {};
  lanes16 total = {};
  for (long h = 0; h < OH; h++)
    for (long w = 0; w < OW; w++) {
      lanes16 value = floats(g + h * GS2 + w * GS3);
      total += value;
      bits16 size = (bits16)value & 0x7FFFFFFFu, nan = bits16{} + 0x7F800001u;
      size = size < nan ? size : nan;
      where = size > best ? bits16{} + uint32_t(h * OW + w) : where;
      best = size > best ? size : best;
    }
  for (long c = 0; c < BLOCK; c++) {
    position[c] = int32_t(where[c]);
    weight[c] = total[c] * SCALE;
  }
}

// Adds the weighted patches of filter o to sum [TAPS][CG].
static void add_any(const T* group, const int32_t* positions, const float* weights, long o,
                    float* sum) {
  for (long b = 0; b < B; b++)
    for (long i = 0; i < K; i++) {
      long p = positions[(b * CO + o) * K + i];
      float weight = weights[(b * CO + o) * K + i];
      for (long kh = 0; kh < KH; kh++) {
        long h = p / OW * SH + kh * DH - PH;
        if (h < 0 || h >= IH) continue;
        for (long kw = 0; kw < KW; kw++) {
          long w = p % OW * SW + kw * DW - PW;
          if (w < 0 || w >= IW) continue;
          const T* pixel = group + b * XS0 + h * XS2 + w * XS3;
          float* into = sum + (kh * KW + kw) * CG;
          for (long c = 0; c < CG; c++) into[c] += weight * load(pixel[c * XS1]);
        }
      }
    }
}

// N vectors of one tap of listed pixels, in registers throughout.
struct Pixel { const T* at; float weight; };
template <long N> static inline void add_pixels(const Pixel* list, long count, long c, float* sum) {
  lanes16 part[N];
#pragma GCC unroll 16
  for (long n = 0; n < N; n++) part[n] = floats(sum + c + n * 16);
  for (long i = 0; i < count; i++)
#pragma GCC unroll 16
    for (long n = 0; n < N; n++) part[n] += floats(list[i].at + c + n * 16) * list[i].weight;
#pragma GCC unroll 16
  for (long n = 0; n < N; n++) write16(sum + c + n * 16, part[n]);
}

// The same in vectors of channels. A tap's pixels are listed first, those outside left out: no sum
// goes through memory for every patch, and no branch has to be guessed.
static void add_vectors(const T* group, const int32_t* positions, const float* weights, long o,
                        float* sum) {
  constexpr long LISTED = 256, COUNT = B * K, WIDE = CG / 256 * 256;
  struct Corner { const T* at; float weight; int32_t h, w; } corners[LISTED];
  Pixel list[LISTED + 1];
  for (long first = 0; first < COUNT; first += LISTED) {
    long patches = std::min(COUNT - first, LISTED), count = 0;
    for (long i = first; i < first + patches; i++) {
      long at = (i / K * CO + o) * K + i % K, p = positions[at];
      int32_t h = int32_t(p / OW * SH - PH), w = int32_t(p % OW * SW - PW);
      const T* corner = group + i / K * XS0 + h * XS2 + w * XS3;
      corners[i - first] = {corner, weights[at], h, w};
    }
    for (long tap = 0; tap < KH * KW; tap++, count = 0) {
      uint32_t down = tap / KW * DH, right = tap % KW * DW;
      for (long i = 0; i < patches; i++) {
        list[count] = {corners[i].at + down * XS2 + right * XS3, corners[i].weight};
        // What is negative is large as an unsigned number.
        count += (corners[i].h + down < uint32_t(IH)) & (corners[i].w + right < uint32_t(IW));
      }
      for (long c = 0; c < WIDE; c += 256) add_pixels<16>(list, count, c, sum + tap * CG);
      if (CG > WIDE) add_pixels<(CG - WIDE) / 16>(list, count, WIDE, sum + tap * CG);
    }
  }
}
"""
