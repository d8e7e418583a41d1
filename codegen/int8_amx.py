"""Tiles of AMX: the inner part of `codegen.int8_tiles` for processors that have it.

A step of the contraction is 64 bytes of every pixel: channels of one tap, or, as taps that are
neighbours in memory make one run of bytes, of several. 32 pixels by 32 channels stay in four tile
registers. Where 16 of the result's pixels lie in one row, they are read where they are; smaller
images are gathered first, in the order of the steps, a chunk at a time.
"""

from codegen import amx

BODY = (
    amx.TILES
    + r"""
// At most so many steps of 64 bytes, over all phases: every tap belongs to one of them.
constexpr long MOST = TAPS * ((QUADS + 15) / 16), ALL = GROUPS * VECTORS;
constexpr bool IN_PLACE = OUT_W % (16 * SW) == 0;
// Tiles of 16 pixels that one task computes: what is gathered of them takes half of an L2 cache.
constexpr long CHUNK = IN_PLACE ? 64 : std::max(2L, std::min(64L, 1024 / MOST) / 2 * 2);
constexpr long PIXELS = B * ((OUT_H + SH - 1) / SH) * ((OUT_W + SW - 1) / SW);
constexpr long CHUNKS = (PIXELS + CHUNK * 16 - 1) / (CHUNK * 16);
// Channels in panels of 32; where there are few chunks, tasks share one.
constexpr long PANELS = (VECTORS + 1) / 2;
constexpr long SLICES = std::min(PANELS, std::max(1L, 8 / (CHUNKS * PHASES * GROUPS)));

// 64 contracted bytes: from quadruple `quad` on of the `quads` that begin with tap number `tap`.
struct Step { long tap, quad, quads; };
struct Steps {
  Phase phase;
  long before, count = 0;  // steps of the phases before, and of this one
  long offset[MOST + 1];
  Step step[MOST + 1];
};
static Steps steps_of(long p, long before) {
  Steps steps{phase_of(p / SW, p % SW), before};
  const Phase& phase = steps.phase;
  for (long tap = 0, taps; tap < phase.taps; tap += taps) {
    taps = 1;
    while (GROUPS == 1 && IN % 4 == 0 && tap + taps < phase.taps
           && phase.offset[tap + taps] == phase.offset[tap + taps - 1] + IN) taps++;
    for (long quad = 0; quad < taps * QUADS; quad += 16) {
      steps.offset[steps.count] = phase.offset[tap] + 4 * quad;
      steps.step[steps.count++] = {tap, quad, taps * QUADS};
    }
  }
  return steps;
}

// The tiles of weights for 16 channels of the result, one for each step.
static inline int8_t* tiles_of(int8_t* packed, const Steps& steps, long vector) {
  return packed + (steps.before * ALL + vector * steps.count) * 1024;
}
static void pack(const uint8_t* weight, long vector, int8_t* packed, int32_t* start,
                 const Steps* phases) {
  for (long p = 0; p < PHASES; p++) {
    const Steps& steps = phases[p];
    int8_t* into = tiles_of(packed, steps, vector);
    __m512i sum = _mm512_setzero_si512();
    for (long s = 0; s < steps.count; s++)
      for (long i = 0; i < 16; i++, into += 64) {
        const Step& step = steps.step[s];
        long quad = step.quad + i;
        __m512i values = _mm512_setzero_si512();
        if (quad < step.quads)
          values = quadruples(weight, vector / VECTORS, vector % VECTORS,
                              steps.phase.tap[step.tap + quad / QUADS], quad % QUADS);
        _mm512_storeu_si512(into, values);
        dot4(sum, _mm512_set1_epi8(1), values);
      }
    sum = _mm512_mullo_epi32(sum, _mm512_set1_epi32(-128));
    _mm512_storeu_si512(start + (p * ALL + vector) * 16, sum);
  }
}

struct Chunk {
  const uint8_t* from[CHUNK * 16];  // what the first tap of every pixel reads
  T* into[CHUNK * 16];
  long offset[MOST + 1];            // of a step within what is read of a pixel
  alignas(64) int32_t sums[32][32];
  alignas(64) uint8_t gathered[IN_PLACE ? 64 : CHUNK * MOST * 1024];
};

static void locate(const Phase& phase, long first, long tiles, const uint8_t* in, T* out,
                   Chunk& chunk) {
  long last = B * phase.height * phase.width - 1, image = phase.height * phase.width;
  long b = first / image, h = first % image / phase.width, w = first % phase.width;
  for (long m = 0; m < tiles * 16; m++) {
    chunk.from[m] = in + ((b * IN_H + h * STEP_H) * IN_W + w * STEP_W) * IN_C;
    chunk.into[m] = out + b * RS0 + h * SH * RS2 + w * SW * RS3;
    // The last tile is filled up with its last pixel, which is written once.
    if (first + m >= last) continue;
    if (++w == phase.width) {
      w = 0;
      if (++h == phase.height) h = 0, b++;
    }
  }
}

static void gather(const Steps& steps, long tiles, Chunk& chunk) {
  for (long s = 0; s < steps.count; s++) chunk.offset[s] = IN_PLACE ? steps.offset[s] : s * 1024;
  if constexpr (IN_PLACE) return;
  uint8_t* into = chunk.gathered;
  for (long tile = 0; tile < tiles; tile++, into += steps.count * 1024)
    for (long m = 0; m < 16; m++) {
      const uint8_t* from = chunk.from[tile * 16 + m];
      for (long s = 0; s < steps.count; s++)
        _mm512_store_si512(into + s * 1024 + m * 64, _mm512_loadu_si512(from + steps.offset[s]));
    }
}

// M tiles of pixels by N of channels.
template <long M, long N>
static inline void multiply(const uint8_t* in, long next, const long* offset, long steps,
                            const int8_t* weight, const int32_t* start, int32_t* sums) {
  constexpr long PIXEL = IN_PLACE ? STEP_W * IN_C : 64;
  const int8_t* second = weight + steps * 1024;
  // The rows of a tile begin with the same sums.
  _tile_loadd(0, start, 0);
  if constexpr (N > 1) _tile_loadd(1, start + 16, 0);
  if constexpr (M > 1) _tile_loadd(2, start, 0);
  if constexpr (M > 1 && N > 1) _tile_loadd(3, start + 16, 0);
  for (long s = 0; s < steps; s++) {
    _tile_loadd(6, weight + s * 1024, 64);
    _tile_loadd(4, in + offset[s], PIXEL);
    _tile_dpbusd(0, 4, 6);
    if constexpr (N > 1) {
      _tile_loadd(7, second + s * 1024, 64);
      _tile_dpbusd(1, 4, 7);
    }
    if constexpr (M > 1) {
      _tile_loadd(5, in + next + offset[s], PIXEL);
      _tile_dpbusd(2, 5, 6);
      if constexpr (N > 1) _tile_dpbusd(3, 5, 7);
    }
  }
  _tile_stored(0, sums, 128);
  if constexpr (N > 1) _tile_stored(1, sums + 16, 128);
  if constexpr (M > 1) _tile_stored(2, sums + 512, 128);
  if constexpr (M > 1 && N > 1) _tile_stored(3, sums + 528, 128);
  Tiles::fence();
}

// The sums of up to 32 pixels by up to 32 channels, of which `channel` is the group's first.
static inline void finish(const Chunk& chunk, T* const* into, long pixels, long group, long channel,
                          float scale, float weight_scale) {
  long channels = std::min(32L, OUT - channel), c = group * OUT + channel;
  if constexpr (RS1 == 1) {
    for (long m = 0; m < pixels; m++)
      for (long n = 0; n < channels; n += 16) {
        __m512 value = _mm512_cvtepi32_ps(_mm512_load_si512(chunk.sums[m] + n));
        value = _mm512_mul_ps(value, _mm512_set1_ps(scale));
        value = _mm512_mul_ps(value, _mm512_set1_ps(weight_scale));
        long left = std::min(16L, channels - n);
        write(into[m] + c + n, value, __mmask16((1u << left) - 1));
      }
  } else {
    for (long n = 0; n < channels; n++)
      for (long m = 0; m < pixels; m++)
        store(into[m] + (c + n) * RS1, float(chunk.sums[m][n]) * scale * weight_scale);
  }
}

template <long M, long N>
static inline void block(const Steps& steps, Chunk& chunk, long tile, const int8_t* weight,
                         const int32_t* start) {
  const uint8_t* first = IN_PLACE ? chunk.from[tile * 16]
                                  : chunk.gathered + tile * steps.count * 1024;
  const uint8_t* second = IN_PLACE ? chunk.from[(tile + M - 1) * 16] : first + steps.count * 1024;
  multiply<M, N>(first, second - first, chunk.offset, steps.count, weight, start, chunk.sums[0]);
}

static void kernel(void* const* t) {
  const uint8_t* in = static_cast<const uint8_t*>(t[0]);
  const uint8_t* weight = static_cast<const uint8_t*>(t[1]);
  float scale = *static_cast<const float*>(t[2]);
  float weight_scale = *static_cast<const float*>(t[3]);
  T* out = static_cast<T*>(t[4]);
  int8_t* packed = static_cast<int8_t*>(t[5]);
  int32_t* start = reinterpret_cast<int32_t*>(packed + MOST * ALL * 1024);

  static thread_local Steps phases[PHASES];
  const Steps* all = phases;
  for (long p = 0, before = 0; p < PHASES; before += phases[p++].count)
    phases[p] = steps_of(p, before);
  parallel(ALL, [&](long vector) { pack(weight, vector, packed, start, all); });

  parallel(CHUNKS * PHASES * GROUPS * SLICES, [&](long i) {
    long slice = i % SLICES, group = i / SLICES % GROUPS, p = i / SLICES / GROUPS % PHASES;
    const Steps& steps = all[p];
    long first = i / SLICES / GROUPS / PHASES * CHUNK * 16;
    long pixels = B * steps.phase.height * steps.phase.width - first;
    if (pixels <= 0) return;
    pixels = std::min(pixels, CHUNK * 16);
    long tiles = (pixels + 15) / 16;
    static thread_local Chunk chunk;
    locate(steps.phase, first, tiles, in + group * IN, out + p / SW * RS2 + p % SW * RS3, chunk);
    gather(steps, tiles, chunk);
    Tiles registers;
    for (long panel = slice * PANELS / SLICES; panel < (slice + 1) * PANELS / SLICES; panel++) {
      long vector = group * VECTORS + panel * 2;
      const int8_t* packed_panel = tiles_of(packed, steps, vector);
      const int32_t* starts = start + (p * ALL + vector) * 16;
      for (long tile = 0; tile < tiles; tile += 2) {
        bool two = tile + 1 < tiles, wide = panel * 2 + 1 < VECTORS;
        if (two && wide) block<2, 2>(steps, chunk, tile, packed_panel, starts);
        else if (two) block<2, 1>(steps, chunk, tile, packed_panel, starts);
        else if (wide) block<1, 2>(steps, chunk, tile, packed_panel, starts);
        else block<1, 1>(steps, chunk, tile, packed_panel, starts);
        finish(chunk, chunk.into + tile * 16, std::min(32L, pixels - tile * 16), group, panel * 32,
               scale, weight_scale);
      }
    }
  });
}
"""
)
