"""C++ that copies a tensor into channels-last order, 16 channels of 16 pixels at a time.

For kernels that read neighbouring channels of single pixels: in the usual order those are a map
apart, and one copy costs less than many strided reads. The text needs the element type `T`.
"""

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Copy:
    """A copy that a kernel makes of a tensor [B, C, H, W] before it reads it.

    Attributes:
        call: C++ that makes it, from `from` to `to`.
        size_bytes: its size.
        strides: its strides.
    """

    call: str
    size_bytes: int
    strides: tuple[int, ...]


def plan(tensor: Tensor, source: str, target: str) -> Copy | None:
    """Return the copy of a tensor; None where the text has no form for its layout.

    Args:
        tensor: [B, C, H, W], C a multiple of 16, pixels evenly spaced in every map.
        source: C++ name of the pointer to it.
        target: C++ name of the pointer to the copy.
    """
    batch, channels, height, width = tensor.shape
    outer, between, row, step = tensor.stride()
    if channels % 16 != 0 or (height > 1 and row != width * step):
        return None
    pixels = height * width
    call = (
        f"parallel({batch}, [&](long b) {{ copy_last<{channels}, {pixels}, {between}, {step}>("
        f"{source} + b * {outer}, {target} + b * {pixels * channels}); }});"
    )
    strides = (pixels * channels, 1, width * channels, channels)
    return Copy(call, math.prod(tensor.shape) * tensor.dtype.itemsize, strides)


TEXT = r"""
typedef float lanes16 __attribute__((vector_size(64)));
typedef uint32_t bits16 __attribute__((vector_size(64)));
typedef float lanes16u __attribute__((vector_size(64), aligned(4)));
typedef uint16_t half16u __attribute__((vector_size(32), aligned(2)));

static inline lanes16 read16(const float* at) { return *(const lanes16u*)at; }
static inline lanes16 read16(const bf16* at) {
  return (lanes16)__builtin_convertvector(*(const half16u*)at, bits16);
}
// The same as floats.
static inline lanes16 floats(const float* at) { return read16(at); }
static inline lanes16 floats(const bf16* at) { return (lanes16)((bits16)read16(at) << 16); }
static inline void write16(float* at, lanes16 value) { *(lanes16u*)at = value; }
static inline void write16(bf16* at, lanes16 value) {
  *(half16u*)at = __builtin_convertvector((bits16)value, half16u);
}

#define LIST(...) __VA_ARGS__
#define EXCHANGE(STEP, LOW, HIGH)                                        \
  for (int i = 0; i < 16; i++)                                           \
    if (!(i & STEP)) {                                                   \
      lanes16 a = v[i], b = v[i + STEP];                                 \
      v[i] = __builtin_shufflevector(a, b, LOW);                         \
      v[i + STEP] = __builtin_shufflevector(a, b, HIGH);                 \
    }
static inline void transpose16(lanes16* v) {
  EXCHANGE(1, LIST(0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30),
           LIST(1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31))
  EXCHANGE(2, LIST(0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29),
           LIST(2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31))
  EXCHANGE(4, LIST(0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27),
           LIST(4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31))
  EXCHANGE(8, LIST(0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23),
           LIST(8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31))
}

// C channels BETWEEN apart, P pixels STEP apart.
template <long C, long P, long BETWEEN, long STEP> static void copy_last(const T* from, T* to) {
  for (long p = 0; p < P; p += 16)
    for (long c = 0; c < C; c += 16) {
      const T* at = from + c * BETWEEN + p * STEP;
      T* into = to + p * C + c;
      if (STEP == 1 && p + 16 <= P) {
        lanes16 v[16];
        for (long i = 0; i < 16; i++) v[i] = read16(at + i * BETWEEN);
        transpose16(v);
        for (long i = 0; i < 16; i++) write16(into + i * C, v[i]);
      } else {
        for (long q = 0; q < std::min(16L, P - p); q++)
          for (long i = 0; i < 16; i++) into[q * C + i] = at[i * BETWEEN + q * STEP];
      }
    }
}
"""
