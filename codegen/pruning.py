"""Stochastic pruning, as torch and as C++: what the kernels of pruned gradients have in common.

The output gradient g is cut into blocks of neighbouring channels of one pixel; 1 channel a block is
the element-wise form. With the norm |b| of a block, the threshold tau and u uniform in (0, 1):

    pruned(b) = b              if |b| >= tau
                b tau / |b|    if |b| <  tau and u tau < |b|,   which has probability |b| / tau
                0              otherwise

so that E pruned(b) = b. A threshold that is not finite prunes nothing.

The kernels prune while they read g: the draws are a hash of the position, so the kernels of both
products see one and the same pruned g, and it is never stored. Writing a compact form once and
reading it twice moves more bytes than the second hash costs time.
"""

import torch
from torch import Tensor

from codegen import draws

# Channels that C++ prunes together: what one vector of floats holds.
LANES = 16


def uniforms(grad: Tensor, seed: Tensor, salt: int, block: int) -> Tensor:
    """Return a draw a block: [B, C / block, *out], counted in the order of pixels, then blocks.

    Args:
        grad: [B, C, *out].
        seed: int64, 0-d.
        salt: tells apart the draws that share a seed.
        block: channels a block.
    """
    batch, channels, *out = grad.shape
    numbers = draws.uniform(seed, grad.numel() // block, salt)
    return numbers.view(batch, *out, channels // block).movedim(-1, 1)


def norms(grad: Tensor, block: int) -> Tensor:
    """Return the norms of the blocks: [B, C, *out] -> [B, C / block, *out]."""
    if block == 1:
        return grad.abs()
    blocks: Tensor = grad.unflatten(1, (grad.shape[1] // block, block))
    return blocks.square().sum(2).sqrt()


def prune(grad: Tensor, threshold: Tensor, uniform: Tensor, block: int) -> Tensor:
    """Return g pruned, as the module says.

    Args:
        grad: [B, C, *out].
        threshold: 0-d.
        uniform: [B, C / block, *out], in (0, 1).
        block: channels a block; divides C.
    """
    norm = norms(grad, block)
    small = (norm < threshold) & threshold.isfinite()
    kept = uniform * threshold < norm
    scale = torch.where(kept, threshold / norm, 0.0)
    if block > 1:
        small, scale = (each.repeat_interleave(block, 1) for each in (small, scale))
    result: Tensor = torch.where(small, grad * scale, grad).to(grad.dtype)
    return result


def unsupported(channels: int, groups: int, block: int) -> str | None:
    """Return why C++ cannot prune blocks of this size; None if it can."""
    if block < 1 or LANES % block or (channels // groups) % block:
        return f"blocks of {block} channels out of {channels // groups}"
    return None


# C++ over the constants T (element type of g), CO (its channels), BLOCK (channels a block), SALT.
CPP = f"""\
#include <cstdlib>

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
constexpr i32x16 LANE = {{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}};

static inline f32x16 load16(const float* at) {{ f32x16 v; std::memcpy(&v, at, 64); return v; }}
static inline f32x16 load16(const bf16* at) {{
  u16x16 bits;
  std::memcpy(&bits, at, 32);
  return (f32x16)(__builtin_convertvector(bits, u32x16) << 16);
}}
static inline void store16(float* at, f32x16 v) {{ std::memcpy(at, &v, 64); }}

// Up to 16 values; zeros beyond `count`.
static inline f32x16 read16(const T* at, long step, long count) {{
  if (step == 1 && count >= 16) return load16(at);
  f32x16 v = {{}};
  if (count >= 16) for (long i = 0; i < 16; i++) v[i] = load(at[i * step]);
  else for (long i = 0; i < count; i++) v[i] = load(at[i * step]);
  return v;
}}

static inline f32x16 square_root(f32x16 v) {{
#if defined(__AVX512F__)
  return (f32x16)_mm512_sqrt_ps((__m512)v);
#else
  for (int i = 0; i < 16; i++) v[i] = std::sqrt(v[i]);
  return v;
#endif
}}

static inline u32x16 mix_bits(u32x16 bits) {{
  for (int i = 0; i < 2; i++) bits = ((bits ^ (bits >> 16)) * {draws._MULTIPLIER}u) & MASK;
  return bits;
}}
static inline f32x16 uniform(uint32_t key, u32x16 position) {{
  u32x16 bits = mix_bits((position ^ key) & MASK);
  bits = ((bits ^ (bits >> 15)) * {draws._FINAL_MULTIPLIER}u) & MASK;
  bits = (bits ^ (bits >> 16)) & {draws._RESOLUTION - 1}u;
  f32x16 number = __builtin_convertvector((i32x16)bits, f32x16);
  return (number + 0.5f) * {(1.0 / draws._RESOLUTION).hex()}f;
}}

struct Pruner {{
  float tau;
  uint32_t key;
  Pruner(const float* threshold, const int64_t* seed)
      : tau(std::isfinite(*threshold) ? *threshold : 0), key(draw_key(*seed, SALT)) {{}}

  // 16 neighbouring channels of a pixel, from channel c on.
  f32x16 operator()(f32x16 v, uint32_t pixel, long c) const {{
    f32x16 size = (f32x16)((i32x16)v & 0x7FFFFFFF);
    u32x16 position = (u32x16)((LANE + int32_t(c)) / int32_t(BLOCK)) + pixel * uint32_t(CO / BLOCK);
    if (BLOCK > 1) {{
      f32x16 sum = v * v;
      for (int d = 1; d < BLOCK; d *= 2) sum += __builtin_shuffle(sum, LANE ^ d);
      size = square_root(sum);
    }}
    f32x16 zero = {{}}, limit = zero + tau;
    i32x16 kept = uniform(key, position) * limit < size;
    f32x16 drawn = BLOCK == 1 ? (f32x16)(((i32x16)v & INT32_MIN) | (i32x16)limit)
                              : v * (limit / size);
    return size < limit ? (kept ? drawn : zero) : v;
  }}
}};

// Appends the non-zero values among the first `count`, or all of them, and returns how many. Both
// lists are written 16 entries beyond their end.
static inline long append(f32x16 v, i32x16 entry, long count, bool all, float* values,
                          int32_t* entries) {{
#if defined(__AVX512F__)
  __mmask16 mask = _mm512_cmp_ps_mask((__m512)v, _mm512_setzero_ps(), _CMP_NEQ_UQ);
  mask = __mmask16((all ? 0xFFFF : mask) & (count >= 16 ? 0xFFFF : (1 << count) - 1));
  _mm512_storeu_ps(values, _mm512_maskz_compress_ps(mask, (__m512)v));
  _mm512_storeu_si512(entries, _mm512_maskz_compress_epi32(mask, (__m512i)entry));
  return __builtin_popcount(mask);
#else
  long n = 0;
  for (long i = 0; i < std::min(count, 16L); i++)
    if (all || v[i] != 0) values[n] = v[i], entries[n++] = entry[i];
  return n;
#endif
}}

// Memory of one thread, aligned for vectors. The allocator keeps it from call to call.
struct Workspace {{
  char* memory;
  explicit Workspace(size_t bytes)
      : memory(static_cast<char*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64))) {{}}
  ~Workspace() {{ std::free(memory); }}
}};
"""
