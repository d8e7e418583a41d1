"""Weight gradients of 8-bit numbers, cut into panels: what such kernels have in common.

Pixels are contracted in chunks. Of a chunk, g is packed once, and one panel after the other of up
to 64 columns of x: taps and channels that lie side by side in x are a segment, cut into panels. The
inner part, in vector registers (`codegen.int8_wgrad_vnni`) or AMX's (`int8_wgrad_amx`), multiplies
the two. A kernel puts its chunks between `HEAD` and the inner part: `Chunk`, made from `Pixels` and
a number, and `pixels_of`; and what it reads of x between that and `REST`: `pack_input` and
`segment_at`.
"""

# The work is cut into about this many pieces, whatever the number of threads.
_TASKS = 8
# Partial sums may take this much memory.
_PARTIAL_BYTES = 2 << 20


def cut(dw_bytes: int, chunks: int, panels: int) -> dict[str, int]:
    """Return into how many parts chunks and panels are shared out: constants of the text.

    Args:
        dw_bytes: size of one task's sums of all panels.
        chunks: how many there are.
        panels: of all groups of channels.
    """
    splits = max(1, min(chunks, _TASKS, _PARTIAL_BYTES // dw_bytes))
    return {"SPLITS": splits, "PARTS": min(panels, -(-_TASKS // splits))}


HEAD = r"""
constexpr long CG = CI / GROUPS, OG = CO / GROUPS, BLOCKS = (OG + 15) / 16;
// Panels of four vectors, and how many vectors the last panel has if it has fewer.
constexpr long FULL = (LENGTH + 15) / 64, REST = (std::max(0L, LENGTH - FULL * 64) + 15) / 16;
constexpr long EACH = FULL + (REST > 0), PANELS = SEGMENTS * EACH;

// A chunk of g, for blocks of 16 output channels.
struct Grad {
  alignas(64) int8_t values[BLOCKS][BLOCK * 64];
  alignas(64) int32_t start[BLOCKS * 16];  // -128 times the sum of g
};

// Four pixels of a panel of x, side by side; the pointers are moved on.
template <long N> static inline void pack_pixels(const uint8_t** rows, uint8_t* to) {
  if constexpr (N == 4 && FULL > 0) interleave64(rows, to);
  else
    for (long n = 0; n < N; n++) {
      _mm512_store_si512(to + 64 * n, interleave16(rows));
      for (long i = 0; i < 4; i++) rows[i] += 16;
    }
}
"""

REST = r"""
template <long N>
static void panel(const uint8_t* x, const Chunk& chunk, const Grad& grad, uint8_t* packed,
                  float* sums, bool first) {
  pack_input<N>(x, chunk, packed);
  contract<N>(grad, packed, chunk, sums, first);
}

// Partial sums: [split][group][panel][kh][OG][64].
static inline float* partial(float* sums, long split, long which, long kh) {
  return sums + ((split * GROUPS * PANELS + which) * KH + kh) * OG * 64;
}

// Packed g is shared where several tasks contract the same pixels: [group][chunk].
constexpr bool SHARED = PARTS > 1;
static inline void pack_grad(const uint8_t* grad, long group, const Chunk& chunk, long block,
                             Grad& into) {
  const uint8_t* from = grad + group * OG + block * 16;
  pack_block(from, chunk, into.values[block], into.start + block * 16);
}

static void accumulate(const uint8_t* grad, const uint8_t* x, Pixels pixels, const Grad* shared,
                       float* sums, long task) {
  alignas(64) static thread_local uint8_t packed[PANEL_BYTES];
  alignas(64) static thread_local uint8_t own[SHARED ? 64 : sizeof(Grad)];
  long split = task / PARTS, part = task % PARTS, all = GROUPS * PANELS;
  long begin = part * all / PARTS, end = (part + 1) * all / PARTS;
  long from = split * CHUNKS / SPLITS, to = (split + 1) * CHUNKS / SPLITS;
  for (long i = from; i < to; i++) {
    Chunk chunk(pixels, i);
    for (long which = begin; which < end; which++) {
      long group = which / PANELS, segment = which % PANELS / EACH, block = which % EACH;
      Grad& mine = *reinterpret_cast<Grad*>(own);
      if (!SHARED && (which == begin || which % PANELS == 0))
        for (long o = 0; o < BLOCKS; o++) pack_grad(grad, group, chunk, o, mine);
      const Grad& g = SHARED ? shared[group * CHUNKS + i] : mine;
      const uint8_t* columns = x + segment_at(segment) * CI + group * CG + block * 64;
      float* into = partial(sums, split, which, 0);
      if (block < FULL) panel<4>(columns, chunk, g, packed, into, i == from);
      else if constexpr (REST > 0) panel<REST>(columns, chunk, g, packed, into, i == from);
    }
  }
}

// All partial sums; behind them is the memory for what is shared.
static void accumulate_all(const uint8_t* grad, const uint8_t* x, Pixels pixels, float* sums) {
  Grad* shared = reinterpret_cast<Grad*>(partial(sums, SPLITS, 0, 0));
  if constexpr (SHARED)
    parallel(GROUPS * CHUNKS * BLOCKS, [&](long i) {
      long group = i / (CHUNKS * BLOCKS), chunk = i / BLOCKS % CHUNKS;
      pack_grad(grad, group, Chunk(pixels, chunk), i % BLOCKS, shared[group * CHUNKS + chunk]);
    });
  parallel(SPLITS * PARTS, [&](long task) { accumulate(grad, x, pixels, shared, sums, task); });
}

// One panel of a filter, added up, scaled, and put in order: [KH][SEGMENTS][LENGTH].
static void finish(float* sums, long o, long panel, long kh, float grad_scale, float input_scale,
                   float* filter) {
  long block = panel % EACH, vectors = block < FULL ? 4 : REST;
  float* into = filter + (kh * SEGMENTS + panel / EACH) * LENGTH + block * 64;
  for (long q = 0; q < 4 * vectors && 4 * q < LENGTH - block * 64; q++) {
    // interleave64 leaves four columns of each 128-bit lane in one vector.
    long from = (block < FULL ? q % 4 * 16 + q / 4 * 4 : q * 4) + o % OG * 64;
    __m128 sum = _mm_setzero_ps();
    for (long s = 0; s < SPLITS; s++)
      sum = _mm_add_ps(sum, _mm_load_ps(partial(sums, s, o / OG * PANELS + panel, kh) + from));
    sum = _mm_mul_ps(_mm_mul_ps(sum, _mm_set1_ps(grad_scale)), _mm_set1_ps(input_scale));
    long left = std::min(4L, LENGTH - block * 64 - 4 * q);
    _mm_mask_storeu_ps(into + 4 * q, __mmask8((1u << left) - 1), sum);
  }
}

// Filter by filter, what `change` makes of (filter, [taps][CG]), in the layout of the result.
template <typename Change>
static void finish_all(float* sums, float grad_scale, float input_scale, float* out,
                       Change change) {
  constexpr long SIZE = KH * SEGMENTS * LENGTH, TAPS = SIZE / CG;
  parallel(CO, [&](long o) {
    static thread_local float row[SIZE];
    float* filter = out + o * SIZE;
    float* into = CHANNELS_LAST ? filter : row;
    for (long i = 0; i < KH * PANELS; i++)
      finish(sums, o, i % PANELS, i / PANELS, grad_scale, input_scale, into);
    change(o, into);
    if constexpr (!CHANNELS_LAST)
      for (long c = 0; c < CG; c++)
        for (long tap = 0; tap < TAPS; tap++) filter[c * TAPS + tap] = row[tap * CG + c];
  });
}
"""
