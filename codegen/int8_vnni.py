"""Tiles in vector registers: the inner part of `codegen.int8_tiles` for AVX-512 with VNNI."""


def tile(width: int, vectors: int) -> dict[str, int]:
    """Return pixels in a row, rows, and vectors of channels of a tile: at most 24 registers."""
    if width >= 12:
        panel = min(vectors, 4)
        pixels, rows = {4: 6, 3: 8, 2: 12, 1: 12}[panel], 1
    else:
        panel = min(vectors, 3 if vectors % 3 == 0 or vectors > 4 else 2)
        pixels = min(width, 8)
        rows = max(1, 8 // pixels)
    return {"TILE_W": pixels, "TILE_H": rows, "PANEL": panel}


BODY = r"""
constexpr long PANELS = (VECTORS + PANEL - 1) / PANEL;
constexpr long LAST = VECTORS - (PANELS - 1) * PANEL;  // vectors in the last panel
constexpr long STRIP = 16;                             // tiles in a row that one task computes
// Where channels are not contiguous, a task's pixels are transposed from a buffer in the L1 cache:
// 16 channels of one pixel may lie a page apart, all in one set of the cache.
constexpr bool DIRECT = RS1 == 1;
constexpr long NEXT_W = DIRECT ? SW * RS3 : 16 * PANEL;
constexpr long NEXT_H = DIRECT ? SH * RS2 : STRIP * TILE_W * NEXT_W;

// A panel holds, for all taps and quadruples of contracted channels, `N` vectors of 16 quadruples.
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
        __m512i values = quadruples(weight, group, panel * PANEL + n, tap, quad);
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

struct Task {
  const Phase* phase;
  const int8_t* weight;
  const int32_t* start;
  float scale, weight_scale;
  long channels;  // from the panel's first to the group's last
};

// W pixels of each of H rows by 16 * N channels.
template <long W, long H, long N>
static inline void multiply(const Task& task, const uint8_t* in, T* out) {
  // The sums are registers only if every loop over them is unrolled.
  __m512i sum[W * H][N];
#pragma GCC unroll 16
  for (long m = 0; m < W * H; m++)
#pragma GCC unroll 4
    for (long n = 0; n < N; n++) sum[m][n] = _mm512_loadu_si512(task.start + 16 * n);
  for (long i = 0; i < task.phase->taps; i++) {
    const uint8_t* from = in + task.phase->offset[i];
    const int8_t* weight = task.weight + task.phase->tap[i] * QUADS * N * 64;
    for (long quad = 0; quad < QUADS; quad++, from += 4, weight += 64 * N) {
      __m512i values[N];
#pragma GCC unroll 4
      for (long n = 0; n < N; n++) values[n] = _mm512_loadu_si512(weight + 64 * n);
#pragma GCC unroll 16
      for (long m = 0; m < W * H; m++) {
        int32_t four;
        std::memcpy(&four, from + ((m / W) * STEP_H * IN_W + m % W * STEP_W) * IN_C, 4);
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
      __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(sum[m][n]), _mm512_set1_ps(task.scale));
      value = _mm512_mul_ps(value, _mm512_set1_ps(task.weight_scale));
      long left = std::min(16L, task.channels - 16 * n);
      write(out + (m / W) * NEXT_H + (m % W) * NEXT_W + 16 * n, value,
            __mmask16((1u << left) - 1));
    }
}

// A strip of H rows: whole tiles, then the pixels that are left, of which there are one of two
// numbers, as the phases' widths differ by one at most.
template <long H, long N>
static inline void strip(const Task& task, const uint8_t* in, T* out, long width) {
  constexpr long WIDER = (OUT_W + SW - 1) / SW % TILE_W, NARROWER = OUT_W / SW % TILE_W;
  for (; width >= TILE_W; width -= TILE_W) {
    multiply<TILE_W, H, N>(task, in, out);
    in += TILE_W * STEP_W * IN_C;
    out += TILE_W * NEXT_W;
  }
  if constexpr (WIDER > 0) if (width == WIDER) return multiply<WIDER, H, N>(task, in, out);
  if constexpr (NARROWER > 0) if (width == NARROWER) multiply<NARROWER, H, N>(task, in, out);
}

template <long N>
static inline void rows(const Task& task, const uint8_t* in, T* out, long height, long width) {
  if (height >= TILE_H) return strip<TILE_H, N>(task, in, out, width);
  for (long h = 0; h < height; h++)
    strip<1, N>(task, in + h * STEP_H * IN_W * IN_C, out + h * NEXT_H, width);
}

static void transpose(const T* from, T* into, long channels, long height, long width) {
  for (long c = 0; c < channels; c++)
    for (long h = 0; h < height; h++)
      for (long w = 0; w < width; w++)
        into[c * RS1 + h * SH * RS2 + w * SW * RS3] = from[h * NEXT_H + w * NEXT_W + c];
}

static void kernel(void* const* t) {
  const uint8_t* in = static_cast<const uint8_t*>(t[0]);
  const uint8_t* weight = static_cast<const uint8_t*>(t[1]);
  float scale = *static_cast<const float*>(t[2]);
  float weight_scale = *static_cast<const float*>(t[3]);
  T* out = static_cast<T*>(t[4]);
  int8_t* packed = static_cast<int8_t*>(t[5]);
  int32_t* start = reinterpret_cast<int32_t*>(packed + GROUPS * VECTORS * TAPS * QUADS * 64);

  Phase phases[PHASES];
  for (long p = 0; p < PHASES; p++) phases[p] = phase_of(p / SW, p % SW);
  parallel(GROUPS * PANELS, [&](long i) {
    pack(weight, i / PANELS, i % PANELS, packed, start, phases);
  });

  constexpr long HEIGHT = (OUT_H + SH - 1) / SH, WIDTH = (OUT_W + SW - 1) / SW;
  constexpr long STRIPS = (WIDTH + STRIP * TILE_W - 1) / (STRIP * TILE_W);
  constexpr long BANDS = (HEIGHT + TILE_H - 1) / TILE_H, ALL = GROUPS * PANELS;
  parallel(B * ALL * PHASES * BANDS * STRIPS, [&](long i) {
    long w = i % STRIPS * STRIP * TILE_W, h = i / STRIPS % BANDS * TILE_H;
    long p = i / (STRIPS * BANDS) % PHASES, rest = i / (STRIPS * BANDS * PHASES);
    // All panels of one image: weights come from a cache, and pixels are written whole.
    long b = rest / ALL, group = rest % ALL / PANELS, panel = rest % PANELS;
    const Phase& phase = phases[p];
    long height = std::min(TILE_H, phase.height - h);
    long width = std::min(STRIP * TILE_W, phase.width - w);
    if (height <= 0 || width <= 0) return;
    Task task{&phase, panel_at(packed, group, panel),
              start + ((group * PHASES + p) * VECTORS + panel * PANEL) * 16,
              scale, weight_scale, OUT - panel * PANEL * 16};
    const uint8_t* from = in + ((b * IN_H + h * STEP_H) * IN_W + w * STEP_W) * IN_C + group * IN;
    T* into = out + b * RS0 + (group * OUT + panel * PANEL * 16) * RS1
              + (h * SH + p / SW) * RS2 + (w * SW + p % SW) * RS3;
    alignas(64) static thread_local T buffer[DIRECT ? 1 : TILE_H * NEXT_H];
    T* tile = DIRECT ? into : buffer;
    if (panel < PANELS - 1) rows<PANEL>(task, from, tile, height, width);
    else rows<LAST>(task, from, tile, height, width);
    if (DIRECT) return;
    transpose(buffer, into, std::min(PANEL * 16, task.channels), height, width);
  });
}
"""
