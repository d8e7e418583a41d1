"""The weight gradient of sampled output pixels, from 8-bit numbers.

    dw = sum_r rows[r] (outer) patch(x - center)[b_r, p_r] + sums (outer) center

for output pixels with flat numbers b * OH * OW + p, as in `sampled_wgrad`: rows and x are bytes,
and their products exact but for the rounding of sums over hundreds of pixels to float32. A centre
counts inside the image only, and is taken out of the sums: sum g (x - mu) is sum g x - (sum g) mu,
for every tap with the rows whose tap lies inside.

x has a border, so no tap is tested: a row's taps are where its pixel is, plus what is the same for
all rows. The bytes of x are those that an 8-bit forward product reads. Nothing that is gathered
outlives a chunk of rows and 64 columns, 32 KB (see `codegen.int8_panels`).
"""

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor

from codegen import cpp, int8, int8_panels, int8_wgrad_amx, int8_wgrad_vnni
from codegen.kernel import Kernel, Sample, Source, register

# Quadruples of rows in a chunk, for the L1 cache.
_QUADS = 128
# Sums of so many bytes fit into 32 bits.
_MOST_ROWS = 1 << 24
# Tasks that sum the rows, however many threads there are.
_TALLIES = 8


def reference(
    rows: Tensor,
    x: Tensor,
    rows_scale: Tensor,
    input_scale: Tensor,
    index: Tensor,
    center: Tensor,
    sums: Tensor,
    out_size: list[int],
    size: list[int],
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    channels_last: bool,
) -> Tensor:
    """Return the weight gradient of the named pixels.

    Args:
        rows: g of those, weighted: [1, Co, 1, R] in the layout of `codegen.int8`, no border.
        x: [B, Ci, IH, IW] in that layout, with `input_border`.
        rows_scale: float, 0-d: what one step of `rows` is worth.
        input_scale: the same of `x`.
        index: [R], flat numbers of output pixels.
        center: [Ci].
        sums: [Co, *kernel]: what g sums to where a tap lies inside the image.
        out_size: [B, Co, OH, OW].
        size: [B, Ci, IH, IW].
        kernel: the kernel's spatial sizes.
        stride: one number a spatial axis.
        padding: one number a spatial axis.
        dilation: one number a spatial axis.
        groups: groups of channels.
        channels_last: memory format of the result.

    Returns:
        dw [Co, Ci/groups, *kernel], of the scales' type.
    """
    wide, (batch, filters, *image) = rows_scale.dtype, out_size
    axes = kernel, stride, padding, dilation
    flat, none = [1, filters, 1, index.shape[0]], [0, 0]
    g = int8.from_bytes(rows, flat, none, none, wide)[0, :, 0] * rows_scale
    border = int8.input_border(size[2:], image, *axes)
    values = int8.from_bytes(x, size, *border, wide) * input_scale
    center, sums = center.to(wide), sums.to(wide)
    dense = g.new_zeros(filters, batch * prod(image)).index_add(1, index.long(), g)
    result = fake(
        rows, x, rows_scale, input_scale, index, center, sums, out_size, size, *axes, groups,
        channels_last,
    )  # fmt: skip
    dw: Tensor = torch.ops.aten.convolution_backward(
        dense.view(filters, batch, *image).transpose(0, 1), values - center.view(1, -1, 1, 1),
        torch.empty_like(result), None, stride, padding, dilation, False, none, groups,
        [False, True, False],
    )[1]  # fmt: skip
    share = sums.view(groups, -1, 1, *kernel) * center.view(groups, 1, -1, 1, 1)
    return result.copy_(dw + share.flatten(0, 1))


def fake(
    rows: Tensor,
    x: Tensor,
    rows_scale: Tensor,
    input_scale: Tensor,
    index: Tensor,
    center: Tensor,
    sums: Tensor,
    out_size: list[int],
    size: list[int],
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    channels_last: bool,
) -> Tensor:
    """Return an uninitialised weight gradient."""
    del x, input_scale, index, center, sums, stride, padding, dilation
    layout = torch.channels_last if channels_last else torch.contiguous_format
    shape = (out_size[1], size[1] // groups, *kernel)
    return torch.empty(shape, dtype=rows_scale.dtype, device=rows.device, memory_format=layout)


def emit_cpp(
    rows: Tensor,
    x: Tensor,
    rows_scale: Tensor,
    input_scale: Tensor,
    index: Tensor,
    center: Tensor,
    sums: Tensor,
    out_size: list[int],
    size: list[int],
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    channels_last: bool,
) -> Source | str:
    """Return the source for convolutions of two spatial axes."""
    del rows, x
    if (reason := int8.unsupported()) is not None:
        return reason
    if any(one.dtype != torch.float32 for one in (rows_scale, input_scale, center, sums)):
        return "scales, centre or sums are no float32"
    count, own = index.shape[0], out_size[1] // groups
    if count > _MOST_ROWS:
        return f"more than {_MOST_ROWS} rows"
    border = int8.input_border(size[2:], out_size[2:], kernel, stride, padding, dilation)
    _, height, width, channels = int8.padded(size, *border)
    # Within a row of the kernel, taps and channels are contiguous; else every tap is for itself.
    wide = dilation[1] == 1 and groups == 1
    segments = kernel[0] if wide else prod(kernel)
    length = kernel[1] * channels if wide else channels // groups
    panels, blocks = groups * segments * -(-length // 64), -(-own // 16)
    # A chunk is whole steps of AMX's tiles.
    quads = min(_QUADS, max(16, -(-count // 64) * 16))
    chunks = max(1, -(-count // (4 * quads)))
    shares = int8_panels.cut(panels * own * 256, chunks, panels)
    tallies = min(_TALLIES, chunks)
    sum_bytes = shares["SPLITS"] * panels * own * 256
    packed_bytes = groups * chunks * blocks * (quads + 1) * 64 if shares["PARTS"] > 1 else 0
    constants: dict[str, Any] = {
        "Index": cpp.INDICES[index.dtype], "R": count, "IS": index.stride(0),
        "CS": center.stride(0), "SUM_O": sums.stride(0), "SUM_H": sums.stride(1),
        "SUM_W": sums.stride(2), "CO": out_size[1], "CI": channels, "GROUPS": groups,
        "OH": out_size[2], "OW": out_size[3], "IH": size[2], "IW": size[3],
        "XHP": height, "XWP": width, "TAPS_H": kernel[0], "TAPS_W": kernel[1],
        "STRIDE_H": stride[0], "STRIDE_W": stride[1], "PH": padding[0], "PW": padding[1],
        "GAP_H": dilation[0], "GAP_W": dilation[1], "WIDE": wide, "SEGMENTS": segments,
        "LENGTH": length, "BLOCK": quads, "CHUNKS": chunks, **shares, "TALLIES": tallies,
        "SUM_BYTES": sum_bytes, "PACKED_BYTES": packed_bytes, "CHANNELS_LAST": channels_last,
    }  # fmt: skip
    inner = int8_wgrad_amx.BODY if int8.in_tiles() else int8_wgrad_vnni.BODY
    body = int8.INTERLEAVE + int8_panels.HEAD + _CHUNKS + inner + _INPUT + int8_panels.REST
    scratch = sum_bytes + packed_bytes + tallies * groups * blocks * prod(kernel) * 64 + 8 * count
    return Source(cpp.source(constants, body + _KERNEL), scratch)


_CHUNKS = r"""
// To the inner part a chunk is one row of one image, and a kernel has one row: its own rows lie
// apart in x like its other taps.
constexpr long KH = 1, DH = 1, SH = 1, IMAGES = 1, SLOTS = 1, QUADS = BLOCK;

using Pixels = const int64_t*;  // where the first tap of every row lies in x
struct Chunk {
  long first, count, quads, images = 1, rows = 1;
  Pixels pixels;
  Chunk(Pixels all, long i)
      : first(i * 4 * BLOCK), count(std::min(4 * BLOCK, R - first)), quads((count + 3) / 4),
        pixels(all + first) {}
};

// Quadruple `q` of a chunk: four rows of 16 channels.
static inline __m512i pixels_of(const uint8_t* grad, const Chunk& chunk, long, long, long q) {
  const uint8_t* rows[4];
  for (long i = 0; i < 4; i++)
    rows[i] = 4 * q + i < chunk.count ? grad + (chunk.first + 4 * q + i) * CO : ZEROS;
  return _mm512_xor_si512(interleave16(rows), _mm512_set1_epi8(char(0x80)));
}
"""

_INPUT = r"""
// [quad][64][4]; a product may read beyond, where g is 0.
constexpr long PANEL_BYTES = BLOCK * 256;
static inline long segment_at(long segment) {
  return WIDE ? segment * GAP_H * XWP
              : segment / TAPS_W * GAP_H * XWP + segment % TAPS_W * GAP_W;
}

template <long N>
static void pack_input(const uint8_t* x, const Chunk& chunk, uint8_t* to) {
  for (long q = 0; q < chunk.quads; q++, to += 64 * N) {
    const uint8_t* rows[4];
    // Past the last row g is 0: any pixel will do.
    for (long i = 0; i < 4; i++) rows[i] = x + chunk.pixels[std::min(4 * q + i, chunk.count - 1)];
    pack_pixels<N>(rows, to);
  }
}
"""

_KERNEL = r"""
constexpr long TAPS = TAPS_H * TAPS_W;
struct Place { long image, row, column; };
static inline Place place_of(const Index* index, long r) {
  uint64_t at = uint64_t(index[r * IS]), p = at % (OH * OW);
  return {long(at / (OH * OW)), long(p / OW) * STRIDE_H, long(p % OW) * STRIDE_W};
}

// What rows of a range of chunks sum to where a tap lies inside: [GROUPS][BLOCKS][TAPS][16].
static void tally(const uint8_t* grad, const Index* index, Pixels pixels, long task,
                  int32_t* sums) {
  // A byte for each row of a quadruple: 1 is inside.
  static thread_local uint8_t inside[BLOCK][TAPS][4];
  std::memset(sums, 0, GROUPS * BLOCKS * TAPS * 64);
  for (long i = task * CHUNKS / TALLIES; i < (task + 1) * CHUNKS / TALLIES; i++) {
    Chunk chunk(pixels, i);
    for (long n = 0; n < chunk.count; n++) {
      Place place = place_of(index, chunk.first + n);
      for (long tap = 0; tap < TAPS; tap++) {
        uint64_t h = place.row + tap / TAPS_W * GAP_H - PH;
        uint64_t w = place.column + tap % TAPS_W * GAP_W - PW;
        inside[n / 4][tap][n % 4] = h < IH && w < IW;
      }
    }
    for (long block = 0; block < GROUPS * BLOCKS; block++) {
      const uint8_t* from = grad + block / BLOCKS * OG + block % BLOCKS * 16;
      int32_t* into = sums + block * TAPS * 16;
      __m512i sum[TAPS];
      for (long tap = 0; tap < TAPS; tap++) sum[tap] = _mm512_load_si512(into + tap * 16);
      for (long q = 0; q < chunk.quads; q++) {
        __m512i values = pixels_of(from, chunk, 0, 0, q);
        for (long tap = 0; tap < TAPS; tap++) {
          int32_t four;
          std::memcpy(&four, inside[q][tap], 4);
          dot4(sum[tap], _mm512_set1_epi32(four), values);
        }
      }
      for (long tap = 0; tap < TAPS; tap++) _mm512_store_si512(into + tap * 16, sum[tap]);
    }
  }
}

static void kernel(void* const* t) {
  const uint8_t* rows = static_cast<const uint8_t*>(t[0]);
  const uint8_t* x = static_cast<const uint8_t*>(t[1]);
  float rows_scale = *static_cast<const float*>(t[2]);
  float input_scale = *static_cast<const float*>(t[3]);
  const Index* index = static_cast<const Index*>(t[4]);
  const float* center = static_cast<const float*>(t[5]);
  const float* center_sums = static_cast<const float*>(t[6]);
  float* out = static_cast<float*>(t[7]);
  float* sums = static_cast<float*>(t[8]);
  int32_t* tallies = static_cast<int32_t*>(t[8]) + (SUM_BYTES + PACKED_BYTES) / 4;
  int64_t* pixels = reinterpret_cast<int64_t*>(tallies + TALLIES * GROUPS * BLOCKS * TAPS * 16);

  parallel(CHUNKS, [&](long i) {
    for (long r = i * 4 * BLOCK; r < std::min(R, (i + 1) * 4 * BLOCK); r++) {
      Place place = place_of(index, r);
      pixels[r] = ((place.image * XHP + place.row) * XWP + place.column) * CI;
    }
  });
  parallel(TALLIES, [&](long task) {
    tally(rows, index, pixels, task, tallies + task * GROUPS * BLOCKS * TAPS * 16);
  });
  accumulate_all(rows, x, pixels, sums);
  finish_all(sums, rows_scale, input_scale, out, [&](long o, float* filter) {
    long block = o / OG * BLOCKS + o % OG / 16;
    for (long tap = 0; tap < TAPS; tap++) {
      int32_t seen = 0;
      for (long task = 0; task < TALLIES; task++)
        seen += tallies[((task * GROUPS * BLOCKS + block) * TAPS + tap) * 16 + o % OG % 16];
      float all = center_sums[o * SUM_O + tap / TAPS_W * SUM_H + tap % TAPS_W * SUM_W];
      float share = all - rows_scale * float(seen);
      for (long c = 0; c < CG; c++) filter[tap * CG + c] += share * center[(o / OG * CG + c) * CS];
    }
  });
}
"""


def _sample(
    batch: int,
    channels: tuple[int, int],
    size: tuple[int, int],
    kernel: tuple[int, int],
    geometry: tuple[int, int, int, int] = (1, 0, 1, 1),
    rows: int = 40,
    channels_last: bool = True,
    scale: float = 0.01,
) -> Sample:
    """Return a problem; `geometry` is stride, padding, dilation and groups."""
    example = int8.Example(batch, channels, size, kernel, geometry)

    def args() -> tuple[Any, ...]:
        random = torch.Generator().manual_seed(batch + rows)
        (filters, pixels), x = (channels[1], batch * prod(example.axes[0])), example.operands()[1]
        g = torch.randint(-127, 128, (1, filters, 1, rows), generator=random)
        scales = torch.tensor(scale), torch.tensor(0.5)
        index = torch.randint(pixels, (rows,), generator=random)
        center = torch.randn(channels[0], generator=random)
        sums = torch.randn(filters, *kernel, generator=random)
        listed = int8.to_bytes(g, [0, 0], [0, 0]), x, *scales, index, center, sums
        return *listed, *example.sizes(), channels_last

    return Sample(args, length=rows + 2)


def _with(sample: Sample, change: Callable[..., tuple[Any, ...]]) -> Sample:
    """Return the sample with its list, centre and sums changed."""

    def args() -> tuple[Any, ...]:
        given = sample.args()
        return *given[:4], *change(*given[4:7]), *given[7:]

    return Sample(args, sample.length)


def samples() -> tuple[Sample, ...]:
    """Return convolutions of every geometry, both layouts, odd sizes, and NaN."""
    plain = _sample(3, (17, 19), (9, 7), (3, 3), (1, 1, 1, 1))
    return (
        plain,
        _sample(2, (1, 1), (5, 5), (1, 1)),
        _sample(1, (3, 63), (9, 8), (5, 5), (2, 2, 1, 1), rows=33),
        _sample(2, (63, 3), (16, 15), (3, 3), (2, 1, 1, 1), rows=201),
        _sample(2, (6, 4), (11, 10), (3, 2), (2, 3, 2, 2), channels_last=False),
        _sample(2, (8, 8), (9, 9), (7, 7), (1, 3, 1, 8)),
        _sample(2, (64, 32), (33, 34), (3, 3), (1, 1, 1, 1), 1100, channels_last=False),
        _sample(40, (80, 16), (4, 4), (3, 3), (1, 1, 1, 1), rows=3000),
        # A linear layer.
        _sample(1, (100, 36), (1, 705), (1, 1), rows=177),
        _sample(2, (8, 8), (6, 6), (1, 1), (3, 0, 1, 1), rows=1),
        _sample(2, (3, 4), (5, 5), (3, 3), rows=0),
        _sample(2, (8, 8), (5, 5), (3, 3), (1, 1, 1, 1), scale=float("nan")),
        _with(plain, lambda index, c, s: (index.int(), c, s.contiguous().mT.contiguous().mT)),
        _with(plain, lambda index, c, s: (index[:1].expand(40), c[:1].expand(17), s)),
        _with(plain, lambda index, c, s: (index, c.index_fill(0, index[:1] % 17, torch.nan), s)),
    )


register(
    Kernel(
        name="int8_sampled_wgrad",
        schema="(Tensor rows, Tensor x, Tensor rows_scale, Tensor input_scale, Tensor index, "
        "Tensor center, Tensor sums, int[] out_size, int[] size, int[] kernel, int[] stride, "
        "int[] padding, int[] dilation, int groups, bool channels_last) -> Tensor",
        reference=reference,
        fake=fake,
        emit_cpp=emit_cpp,
        samples=samples,
    )
)
