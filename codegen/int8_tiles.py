"""C++ for convolutions of 8-bit numbers: the forward product, and the input gradient.

Either is computed straight from bordered pixels (see `codegen.int8`): a tile of the result's pixels
by some of its channels stays in registers while taps and contracted channels are run through, in
vector registers (`codegen.int8_vnni`) or, where the processor has them, in AMX's (`int8_amx`).
What is read is unsigned bytes, value + 128; what the 128 adds is the same for every pixel and is
what the sums start from. An input gradient of stride s is s convolutions an axis, one for each
phase of its pixels, with some of the taps; a forward product of stride s reads every s-th pixel.
"""

from typing import Any

import torch
from torch import Tensor

from codegen import cpp, int8, int8_amx, int8_vnni
from codegen.kernel import Source


def emit(
    result: Tensor,
    scales: tuple[Tensor, Tensor],
    in_size: list[int],
    border: tuple[list[int], list[int]],
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    forward: bool,
) -> Source | str:
    """Return the source of a kernel (in, weight, scale, weight scale) -> result, or why not.

    Args:
        result: [B, C, H, W], of which type and strides are read too.
        scales: what one step of the operands is worth.
        in_size: [B, C, H, W] of what is read, without its border.
        border: the border of what is read.
        kernel: the kernel's spatial sizes.
        stride: one number a spatial axis.
        padding: one number a spatial axis.
        dilation: one number a spatial axis.
        groups: groups of channels.
        forward: whether it is the forward product; else the input gradient.
    """
    if (reason := int8.unsupported()) is not None:
        return reason
    if result.dtype not in cpp.ELEMENTS or any(scale.dtype != torch.float32 for scale in scales):
        return "no kernel for these types"
    batch, out_channels, height, width = result.shape
    _, padded_height, padded_width, _ = int8.padded(in_size, *border)
    vectors = -(-(out_channels // groups) // 16)
    phases = 1 if forward else stride[0] * stride[1]
    quads, taps = -(-(in_size[1] // groups) // 4), kernel[0] * kernel[1]
    if int8.in_tiles():
        body, tile, quads = int8_amx.BODY, {}, -(-quads // 16) * 16
    else:
        body, tile = (
            int8_vnni.BODY,
            int8_vnni.tile(width if forward else -(-width // stride[1]), vectors),
        )
    constants: dict[str, Any] = {
        "T": cpp.ELEMENTS[result.dtype], "FORWARD": forward,
        "B": batch, "OUT_C": out_channels, "OUT_H": height, "OUT_W": width, "GROUPS": groups,
        "IN_C": in_size[1], "IN_H": padded_height, "IN_W": padded_width,
        "TOP": border[0][0], "LEFT": border[0][1],
        "KH": kernel[0], "KW": kernel[1], "STRIDE_H": stride[0], "STRIDE_W": stride[1],
        "PH": padding[0], "PW": padding[1], "DH": dilation[0], "DW": dilation[1],
        "VECTORS": vectors, **tile,
        **cpp.strides("RS", result),
    }  # fmt: skip
    weight_bytes, start_bytes = groups * vectors * taps * quads * 64, groups * vectors * 64 * phases
    text = cpp.source(constants, int8.INTERLEAVE + _COMMON + body)
    return Source(text, weight_bytes + start_bytes)


_COMMON = r"""
// `OUT` channels of the result, `IN` channels that are contracted, both of one group.
constexpr long OUT = OUT_C / GROUPS, IN = IN_C / GROUPS, QUADS = (IN + 3) / 4, TAPS = KH * KW;
// The result's pixels fall into phases, each computed from every `STEP`-th pixel of what is read.
constexpr long SH = FORWARD ? 1 : STRIDE_H, SW = FORWARD ? 1 : STRIDE_W, PHASES = SH * SW;
constexpr long STEP_H = FORWARD ? STRIDE_H : 1, STEP_W = FORWARD ? STRIDE_W : 1;

// Which taps reach the result's pixels (SH * i + a, SW * j + b), and what they read for i = j = 0.
struct Phase {
  long height, width, taps = 0;
  long tap[TAPS], offset[TAPS];
};
static Phase phase_of(long a, long b) {
  Phase phase;
  phase.height = (OUT_H - a + SH - 1) / SH;
  phase.width = (OUT_W - b + SW - 1) / SW;
  for (long kh = 0; kh < KH; kh++)
    for (long i = 0; i < KW; i++) {
      // In the order in which pixels lie.
      long kw = FORWARD ? i : KW - 1 - i;
      long h = FORWARD ? kh * DH - PH : a + PH - kh * DH;
      long w = FORWARD ? kw * DW - PW : b + PW - kw * DW;
      if (h % SH != 0 || w % SW != 0) continue;
      phase.tap[phase.taps] = kh * KW + kw;
      phase.offset[phase.taps++] = ((TOP + h / SH) * IN_W + LEFT + w / SW) * IN_C;
    }
  return phase;
}

// Quadruple `quad` of contracted channels, for the 16 channels of the result in `vector`.
static inline __m512i quadruples(const uint8_t* weight, long group, long vector, long tap,
                                 long quad) {
  const __m512i sign = _mm512_set1_epi8(char(0x80));
  if constexpr (!FORWARD) {
    const uint8_t* rows[4];
    for (long i = 0; i < 4; i++) {
      long c = quad * 4 + i;
      rows[i] = c < IN ? weight + ((group * IN + c) * TAPS + tap) * OUT + vector * 16 : ZEROS;
    }
    return _mm512_xor_si512(interleave16(rows), sign);
  }
  // Four channels lie side by side; what is beyond the last one counts as zero.
  long left = std::min(16L, OUT - vector * 16), bytes = std::min(4L, IN - quad * 4);
  alignas(64) uint32_t words[16] = {};
  const uint8_t* from = weight + ((group * OUT + vector * 16) * TAPS + tap) * IN + quad * 4;
  for (long l = 0; l < left; l++) std::memcpy(words + l, from + l * TAPS * IN, 4);
  __m512i values = _mm512_xor_si512(_mm512_load_si512(words), sign);
  __m512i used = _mm512_set1_epi32(int32_t(0xFFFFFFFFu >> (32 - 8 * bytes)));
  return _mm512_maskz_and_epi32(__mmask16((1u << left) - 1), values, used);
}

static inline void write(float* at, __m512 value, __mmask16 mask) {
  _mm512_mask_storeu_ps(at, mask, value);
}
static inline void write(bf16* at, __m512 value, __mmask16 mask) {
#if defined(__AVX512BF16__)
  // Rounds to nearest too, and takes what is smaller than every normal number to 0.
  _mm256_mask_storeu_epi16(at, mask, (__m256i)_mm512_cvtneps_pbh(value));
#else
  __m512i bits = _mm512_castps_si512(value);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
  __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  up = _mm512_mask_mov_epi32(_mm512_srli_epi32(up, 16), nan, _mm512_set1_epi32(0x7FC0));
  _mm256_mask_storeu_epi16(at, mask, _mm512_cvtepi32_epi16(up));
#endif
}
"""
