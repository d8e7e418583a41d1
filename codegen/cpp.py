"""What emitted C++ has in common: constants, element types, threads, random numbers, products.

A kernel's source is a preamble of constants, which carry everything that is known when it is
emitted, and a body that is ordinary C++ over them: loops over constants are what compilers unroll
and vectorise. The draws are those of `codegen.draws`, to the bit.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from codegen import draws
from codegen.build import HEADERS

Number = int | float | bool

# Element types that kernels read and write; they compute in float.
ELEMENTS = {torch.float32: "float", torch.bfloat16: "bf16"}
# Types of lists of rows.
INDICES = {torch.int64: "int64_t", torch.int32: "int32_t"}


def source(constants: Mapping[str, Number | Sequence[int] | str], body: str) -> str:
    """Return a translation unit.

    Args:
        constants: names in the body; sequences become arrays, texts become type names.
        body: C++ that defines `kernel(void* const* t)` in terms of them.
    """
    lines = [_constant(name, value) for name, value in constants.items()]
    return "\n".join((_PRELUDE, *lines, body, _ENTRY))


def strides(prefix: str, tensor: Tensor) -> dict[str, int]:
    """Return constants `<prefix>0`, `<prefix>1`, ... that hold a tensor's strides in elements."""
    return {f"{prefix}{axis}": int(step) for axis, step in enumerate(tensor.stride())}


def unsupported(*tensors: Tensor) -> str | None:
    """Return why tensors of these element types cannot be read by a kernel; None if they can."""
    names = [str(x.dtype).removeprefix("torch.") for x in tensors if x.dtype not in ELEMENTS]
    return f"no kernel for {names[0]}" if names else None


def _constant(name: str, value: Number | Sequence[int] | str) -> str:
    if isinstance(value, str):
        return f"using {name} = {value};"
    if isinstance(value, bool):
        return f"constexpr bool {name} = {str(value).lower()};"
    if isinstance(value, int):
        return f"constexpr long {name} = {value};"
    if isinstance(value, float):
        return f"constexpr float {name} = {value.hex()}f;"
    return f"constexpr long {name}[] = {{{', '.join(map(str, value))}}};"


_PRELUDE = f"""\
{HEADERS}
// torch's own functions, declared here because its headers take longer to compile than kernels do.
namespace c10 {{ struct BFloat16; }}
namespace at {{
int get_num_threads();
namespace native::cpublas {{
// C[M,N] (+)= A[M,K] B[K,N], row-major with leading dimensions. `vnni`: B is packed so that the 2
// (bf16) or 4 (int8) values that are contracted together are neighbours.
void brgemm(int64_t M, int64_t N, int64_t K, int64_t lda, int64_t ldb, int64_t ldc, bool add,
            const float* A, const float* B, float* C, bool vnni);
void brgemm(int64_t M, int64_t N, int64_t K, int64_t lda, int64_t ldb, int64_t ldc, bool add,
            const c10::BFloat16* A, const c10::BFloat16* B, float* C, bool vnni);
void brgemm(int64_t M, int64_t N, int64_t K, int64_t lda, int64_t ldb, int64_t ldc, bool add,
            const unsigned char* A, const signed char* B, int32_t* C, bool vnni);
void brgemm_release(bool vnni);
}}
}}

struct bf16 {{ uint16_t bits; }};
static inline float load(float value) {{ return value; }}
static inline float load(bf16 value) {{
  uint32_t bits = uint32_t(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}}
static inline void store(float* at, float value) {{ *at = value; }}
static inline void store(bf16* at, float value) {{
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  // Round to nearest, ties to even; NaN stays NaN.
  at->bits = value != value ? 0x7FC0 : uint16_t((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}}

// The hash of codegen/draws.py: it keeps 31 bits, which the low 32 bits of a product decide.
constexpr uint32_t MASK = {draws._MASK}u;
static inline uint32_t mix_bits(uint32_t bits) {{
  for (int i = 0; i < 2; i++) bits = ((bits ^ (bits >> 16)) * {draws._MULTIPLIER}u) & MASK;
  return bits;
}}
static inline uint32_t draw_key(int64_t seed, int64_t salt) {{
  uint32_t salted = uint32_t(salt * {draws._GOLDEN} + 0x7F4A7C1) & MASK;
  return mix_bits((uint32_t(seed) ^ salted) & MASK);
}}
static inline uint32_t hash(uint32_t key, uint32_t position) {{
  uint32_t bits = mix_bits((position ^ key) & MASK);
  bits = ((bits ^ (bits >> 15)) * {draws._FINAL_MULTIPLIER}u) & MASK;
  return bits ^ (bits >> 16);
}}
static inline float uniform(uint32_t key, uint32_t position) {{
  uint32_t bits = hash(key, position) & {draws._RESOLUTION - 1}u;
  return (float(int32_t(bits)) + 0.5f) * {(1.0 / draws._RESOLUTION).hex()}f;
}}

// body(i) for i in [0, count), on torch's threads; each thread has a contiguous range.
template <typename Body>
static inline void parallel(long count, Body body) {{
  int threads = int(std::min<long>(at::get_num_threads(), count));
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (long i = 0; i < count; i++) body(i);
}}
"""

_ENTRY = """
extern "C" void graphpass_kernel(void* const* t) { kernel(t); }
"""
