"""Sampled rows of the output gradient, weighted and rounded to 8 bits at random.

    q[r, o] = floor(weight[r] * g[b_r, o, p_r] / scale + u),     u uniform in [0, 1),

for output pixels with flat numbers b * OH * OW + p, as in `sampled_wgrad`. Where rows are taken in
proportion to their norms, the weights make the norms equal: one scale suits all rows. It maps the
largest magnitude to 127. NaN or infinity in a row makes the scale the same, and with it every
product. Only the rows that are named are read.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from codegen import cpp, draws, int8
from codegen.kernel import Kernel, Sample, Source, register

# Rows of a piece of work.
_PIECE = 64


def reference(
    grad: Tensor, index: Tensor, weight: Tensor, seed: Tensor, salt: int
) -> tuple[Tensor, Tensor]:
    """Return rounded rows, and what one step of them is worth.

    Args:
        grad: [B, Co, OH, OW].
        index: [R], flat numbers of output pixels.
        weight: [R].
        seed: int64, 0-d.
        salt: tells apart the draws that share a seed.

    Returns:
        uint8, flat, in the layout of `codegen.int8` as an image [1, Co, 1, R] without a border, and
        the scale, 0-d: a float32 number, of a wider type where `grad` has one.
    """
    uniform = draws.uniform(seed, index.shape[0] * grad.shape[1], salt)
    return rounded(grad, index, weight, uniform.view(-1, grad.shape[1]))


def rounded(grad: Tensor, index: Tensor, weight: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Return the same from the draws, float32 [R, Co]."""
    positions = grad.shape[2] * grad.shape[3]
    flat = index.long()
    rows = grad.flatten(2)[flat // positions, :, flat % positions].float() * weight.float()[:, None]
    # The added 0 is the maximum of no values.
    scale = int8.scale_of(torch.cat([rows.abs().flatten(), rows.new_zeros(1)]).amax())
    values = int8.round_at_random(rows, scale, uniform)
    wide = torch.promote_types(grad.dtype, torch.float32)
    return int8.to_bytes(values.t()[None, :, None, :], [0, 0], [0, 0]), scale.to(wide)


def fake(
    grad: Tensor, index: Tensor, weight: Tensor, seed: Tensor, salt: int
) -> tuple[Tensor, Tensor]:
    """Return uninitialised bytes and scale."""
    del weight, seed, salt
    count = index.shape[0] * grad.shape[1] + int8.SLACK
    wide = torch.promote_types(grad.dtype, torch.float32)
    scale = torch.empty((), dtype=wide, device=grad.device)
    return torch.empty(count, dtype=torch.uint8, device=grad.device), scale


def emit_cpp(grad: Tensor, index: Tensor, weight: Tensor, seed: Tensor, salt: int) -> Source | str:
    """Return the source."""
    del seed
    if (reason := cpp.unsupported(grad) or int8.unsupported()) is not None:
        return reason
    if weight.dtype != torch.float32:
        return "the weights are no float32"
    _, channels, height, width = grad.shape
    rows = index.shape[0]
    constants: dict[str, Any] = {
        "T": cpp.ELEMENTS[grad.dtype], "Index": cpp.INDICES[index.dtype], "SALT": salt,
        "LARGEST": int8.LARGEST, "LEAST_SCALE": int8.LEAST_SCALE, "SLACK": int8.SLACK,
        "R": rows, "IS": index.stride(0), "WS": weight.stride(0), "PIECE": _PIECE,
        "CO": channels, "OH": height, "OW": width, **cpp.strides("GS", grad),
    }  # fmt: skip
    return Source(cpp.source(constants, _BODY), scratch_bytes=4 * (-(-rows // _PIECE)))


_BODY = r"""
constexpr long POSITIONS = OH * OW, PIECES = (R + PIECE - 1) / PIECE;

static inline __m512 read(const float* at, __mmask16 mask) {
  return _mm512_maskz_loadu_ps(mask, at);
}
static inline __m512 read(const bf16* at, __mmask16 mask) {
  __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, at));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

static inline const T* row_of(const T* grad, const Index* index, long r) {
  uint64_t at = uint64_t(index[r * IS]), p = at % POSITIONS;
  return grad + at / POSITIONS * GS0 + p / OW * GS2 + p % OW * GS3;
}

// Rows are short and lie here and there: they are fetched before they are read. A quarter of the
// pixels of 64 channels at 32x32 took half of the time then.
constexpr long AHEAD = 16;
static inline void fetch(const T* row) {
  if constexpr (GS1 == 1)
    for (long o = 0; o < CO; o += 64 / long(sizeof(T))) __builtin_prefetch(row + o);
}

// Calls body(row, channel, 16 channels' weighted values, which of them there are) in a piece.
template <typename Body>
static inline void visit(const T* grad, const Index* index, const float* weight, long piece,
                         Body body) {
  for (long r = piece * PIECE; r < std::min(R, (piece + 1) * PIECE); r++) {
    if (r + AHEAD < R) fetch(row_of(grad, index, r + AHEAD));
    const T* row = row_of(grad, index, r);
    for (long o = 0; o < CO; o += 16) {
      __mmask16 mask = CO - o >= 16 ? 0xFFFF : (1u << (CO - o)) - 1;
      __m512 values;
      if constexpr (GS1 == 1) values = read(row + o, mask);
      else {
        float apart[16] = {};
        for (long c = 0; c < std::min(16L, CO - o); c++) apart[c] = load(row[(o + c) * GS1]);
        values = _mm512_loadu_ps(apart);
      }
      body(r, o, _mm512_mul_ps(values, _mm512_set1_ps(weight[r * WS])), mask);
    }
  }
}

// 16 draws of `codegen.draws.uniform`, in units of 2^-16.
static inline __m512i draw16(uint32_t key, uint32_t position) {
  alignas(64) uint32_t numbers[16];
  for (uint32_t lane = 0; lane < 16; lane++)
    numbers[lane] = (hash(key, position + lane) & 0x7FFFFF) >> 7;
  return _mm512_load_si512(numbers);
}

static void kernel(void* const* t) {
  const T* grad = static_cast<const T*>(t[0]);
  const Index* index = static_cast<const Index*>(t[1]);
  const float* weight = static_cast<const float*>(t[2]);
  int64_t seed = *static_cast<const int64_t*>(t[3]);
  uint8_t* out = static_cast<uint8_t*>(t[4]);
  float* result = static_cast<float*>(t[5]);
  uint32_t* largest = static_cast<uint32_t*>(t[6]);

  // Bits of magnitudes are in the order of the magnitudes, with NaN above infinity.
  parallel(PIECES, [&](long piece) {
    __m512i most = _mm512_setzero_si512();
    visit(grad, index, weight, piece, [&](long, long, __m512 values, __mmask16 mask) {
      __m512i bits = _mm512_and_si512(_mm512_castps_si512(values), _mm512_set1_epi32(0x7FFFFFFF));
      most = _mm512_mask_max_epu32(most, mask, most, bits);
    });
    largest[piece] = _mm512_reduce_max_epu32(most);
  });
  uint32_t bits = 0;
  for (long piece = 0; piece < PIECES; piece++) bits = std::max(bits, largest[piece]);
  float scale;
  std::memcpy(&scale, &bits, 4);
  scale /= LARGEST;
  if (scale < LEAST_SCALE) scale = LEAST_SCALE;
  *result = scale;

  const __m512 inverse = _mm512_set1_ps(65536.0f / scale);
  const uint32_t key = draw_key(seed, SALT);
  parallel(PIECES, [&](long piece) {
    visit(grad, index, weight, piece, [&](long r, long o, __m512 values, __mmask16 mask) {
      // NaN is not less than anything: the minimum is its second operand.
      __m512 fixed = _mm512_min_ps(_mm512_mul_ps(values, inverse),
                                   _mm512_set1_ps(65536.0f * LARGEST));
      __m512i drawn = _mm512_add_epi32(_mm512_cvtps_epi32(fixed), draw16(key, r * CO + o));
      __m128i bytes = _mm512_cvtsepi32_epi8(_mm512_srai_epi32(drawn, 16));
      bytes = _mm_xor_si128(bytes, _mm_set1_epi8(char(0x80)));
      _mm_mask_storeu_epi8(out + r * CO + o, mask, bytes);
    });
  });
  std::memset(out + R * CO, 128, SLACK);
}
"""


def _sample(
    shape: tuple[int, int, int, int],
    rows: int = 40,
    dtype: torch.dtype = torch.float32,
    change: Callable[[Tensor], Tensor] = lambda g: g.contiguous(memory_format=torch.channels_last),
    weights: float = 1.0,
) -> Sample:
    """Return rows of a gradient, some of them twice."""

    def args() -> tuple[Any, ...]:
        random = torch.Generator().manual_seed(sum(shape))
        grad = change(torch.randn(shape, generator=random).to(dtype))
        index = torch.randint(shape[0] * shape[2] * shape[3], (rows,), generator=random)
        weight = torch.rand(rows, generator=random) * weights
        return grad, index, weight, torch.tensor(1234567), 77

    return Sample(args, length=1)


def _strided() -> Sample:
    """Return a list that is every other entry of another, of a narrow type."""
    plain = _sample((3, 33, 5, 6), 80)

    def args() -> tuple[Any, ...]:
        grad, index, weight, *rest = plain.args()
        return grad, index.int()[::2], weight[::2], *rest

    return Sample(args, length=1)


def samples() -> tuple[Sample, ...]:
    """Return both layouts and types, odd sizes, strides of every kind, NaN and nothing."""
    nan, half = float("nan"), torch.bfloat16

    def with_odd(value: float) -> Callable[[Tensor], Tensor]:
        return lambda g: g.index_fill(1, torch.tensor([2]), value)

    return (
        _sample((3, 17, 5, 6)),
        _sample((3, 64, 4, 4), 129, dtype=half),
        _sample((3, 17, 5, 6), change=Tensor.contiguous),
        _sample((2, 63, 9, 7), 200, dtype=half, change=Tensor.contiguous),
        _sample((70, 5, 1, 1)),
        _sample((1, 1, 1, 1), 3),
        _sample((2, 5, 6, 6), change=lambda g: g[:, :1, :1, :1].expand(g.shape)),
        _sample((2, 5, 6, 6), change=lambda g: g.flip(2).mT),
        _sample((2, 5, 4, 4), change=with_odd(nan)),
        _sample((2, 5, 4, 4), change=with_odd(float("inf"))),
        _sample((2, 5, 4, 4), weights=0.0),
        _sample((2, 5, 4, 4), weights=nan),
        _sample((2, 5, 4, 4), rows=0),
        _strided(),
    )


register(
    Kernel(
        name="int8_sampled_rows",
        schema="(Tensor grad, Tensor index, Tensor weight, Tensor seed, int salt) "
        "-> (Tensor, Tensor)",
        reference=reference,
        fake=fake,
        emit_cpp=emit_cpp,
        samples=samples,
    )
)
