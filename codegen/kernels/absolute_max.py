"""The largest magnitude of a tensor, in one pass at the speed of memory.

max |x|; NaN if x has one, infinity if it has one and no NaN. The bits of magnitudes, read as
integers, are in the order of the magnitudes, with NaN above infinity: so integers are compared, and
the result depends on no order. Inductor's reduction of the same took 10 times as long as reading
the tensor (channels_last, AVX-512, torch 2.13).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from codegen import cpp
from codegen.gpu import source as gpu
from codegen.kernel import Kernel, Sample, Source, register

_MAX_RANK = 4
_BITS = {torch.float32: "uint32_t", torch.bfloat16: "uint16_t"}
# Elements of a piece of work.
_PIECE = 1 << 16


def reference(x: Tensor) -> Tensor:
    """Return max |x|, 0 for an empty x: 0-d, float32 or wider."""
    wide = torch.promote_types(x.dtype, torch.float32)
    # The added 0 is the maximum of no values.
    values = torch.cat([x.reshape(-1).abs().to(wide), x.new_zeros(1, dtype=wide)])
    return values.amax()


def fake(x: Tensor) -> Tensor:
    """Return an uninitialised number."""
    return torch.empty((), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)


def emit_cpp(x: Tensor) -> Source | str:
    """Return the source for up to four axes."""
    if (reason := cpp.unsupported(x)) is not None:
        return reason
    merged = _axes(x)
    if len(merged) > _MAX_RANK:
        return f"more than {_MAX_RANK} axes"
    inner = 0 if x.numel() == 0 else merged[0][1]
    outer = merged[1][1] * merged[2][1] * merged[3][1]
    pieces = -(-inner // _PIECE) * outer if inner * outer > _PIECE else 1
    constants: dict[str, Any] = {
        "T": cpp.ELEMENTS[x.dtype], "BITS": _BITS[x.dtype],
        "INNER": inner, "OUTER": outer, "PIECE": _PIECE,
        "S0": merged[0][0], "N1": merged[1][1], "S1": merged[1][0],
        "N2": merged[2][1], "S2": merged[2][0], "S3": merged[3][0],
    }  # fmt: skip
    return Source(cpp.source(constants, _BODY), scratch_bytes=4 * max(1, pieces))


def _axes(x: Tensor) -> list[tuple[int, int]]:
    """Return steps and sizes of the axes, the innermost in memory first, as few as there can be.

    Values that are repeated are read once.
    """
    axes = sorted((step, size) for step, size in zip(x.stride(), x.shape, strict=True) if step > 0)
    merged: list[tuple[int, int]] = []
    for step, size in axes:
        if merged and step == merged[-1][0] * merged[-1][1]:
            merged[-1] = merged[-1][0], merged[-1][1] * size
        elif size > 1:
            merged.append((step, size))
    return merged + [(0, 1)] * (_MAX_RANK - len(merged))


def emit_triton(x: Tensor) -> gpu.Program | str:
    """Return the Triton for up to four axes."""
    if (reason := gpu.unsupported(x)) is not None:
        return reason
    axes = _axes(x)
    if len(axes) > _MAX_RANK:
        return f"more than {_MAX_RANK} axes"
    count = 0 if x.numel() == 0 else axes[0][1] * axes[1][1] * axes[2][1] * axes[3][1]
    block = 4096
    programs = max(1, min(4 * gpu.multiprocessors(), gpu.ceil_div(count, block)))
    constants = {
        "COUNT": count, "BLOCK": block, "PROGRAMS": programs, "POWER": gpu.power(programs),
        "INDEX": gpu.index_type(x, count),
        **{f"N{axis}": size for axis, (_, size) in enumerate(axes)},
        **{f"S{axis}": step for axis, (step, _) in enumerate(axes)},
    }  # fmt: skip
    scratch = (gpu.Scratch(programs, torch.int32),)
    return gpu.program(gpu.about("absolute_max", x=x), constants, _TRITON, scratch)


_TRITON = """
@triton.jit
def offset_of(i):
    inner = i % N0 * S0 + i // N0 % N1 * S1
    return inner + i // (N0 * N1) % N2 * S2 + i // (N0 * N1 * N2) * S3


@triton.jit
def maxima(x, partial):
    # Programs take turns along the memory, and so end together.
    largest = tl.zeros([BLOCK], dtype=tl.int32)
    here = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    for start in range(0, COUNT, BLOCK * PROGRAMS):
        i = here + start
        value = tl.load(x + offset_of(i), mask=i < COUNT, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, value.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    tl.store(partial + tl.program_id(0), tl.max(largest, axis=0))


@triton.jit
def maximum(partial, out):
    i = tl.arange(0, POWER)
    bits = tl.max(tl.load(partial + i, mask=i < PROGRAMS, other=0), axis=0)
    tl.store(out, bits.to(tl.float32, bitcast=True))


def run(x, out, partial):
    maxima[(PROGRAMS.value,)](x, partial, num_warps=8)
    maximum[(1,)](partial, out, num_warps=4)
"""

_BODY = r"""
constexpr BITS MAGNITUDE = BITS(~BITS(0)) >> 1;
constexpr long CUTS = std::max(1L, (INNER + PIECE - 1) / PIECE);
// Short runs are taken together, long ones apart.
constexpr bool WHOLE = INNER * OUTER <= PIECE;
constexpr long PIECES = WHOLE ? 1 : OUTER * CUTS;

static BITS largest(const BITS* x, long outer, long from, long to) {
  const BITS* run = x + outer % N1 * S1 + outer / N1 % N2 * S2 + outer / N1 / N2 * S3;
  BITS result = 0;
  for (long i = from; i < to; i++) result = std::max(result, BITS(run[i * S0] & MAGNITUDE));
  return result;
}

static void kernel(void* const* t) {
  const BITS* x = static_cast<const BITS*>(t[0]);
  BITS* of_piece = static_cast<BITS*>(t[2]);
  parallel(PIECES, [&](long piece) {
    BITS result = 0;
    if (WHOLE)
      for (long i = 0; i < OUTER; i++) result = std::max(result, largest(x, i, 0, INNER));
    else
      result = largest(x, piece / CUTS, piece % CUTS * PIECE,
                       std::min(INNER, (piece % CUTS + 1) * PIECE));
    of_piece[piece] = result;
  });
  T result;
  BITS bits = *std::max_element(of_piece, of_piece + PIECES);
  std::memcpy(&result, &bits, sizeof bits);
  *static_cast<float*>(t[1]) = load(result);
}
"""


def _sample(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    change: Callable[[Tensor], Tensor] = lambda x: x,
) -> Sample:
    def args() -> tuple[Any, ...]:
        random = torch.Generator().manual_seed(len(shape))
        return (change(torch.randn(shape, generator=random).to(dtype)),)

    return Sample(args, length=1)


def samples() -> tuple[Sample, ...]:
    """Return dense and other layouts, sizes from none to several pieces, NaN and infinity."""
    half, last = torch.bfloat16, torch.channels_last

    def with_value(value: float) -> Callable[[Tensor], Tensor]:
        def put(x: Tensor) -> Tensor:
            x.view(-1)[5] = value
            return x

        return put

    return (
        _sample((3, 17, 5, 6)),
        _sample((3, 17, 63, 100), change=lambda x: x.contiguous(memory_format=last)),
        _sample((3, 17, 63, 100), half, lambda x: x.contiguous(memory_format=last)),
        _sample((63, 128), change=lambda x: x.t()),
        _sample((6, 8, 10, 12), change=lambda x: x[::2, 1::3, :, ::5]),
        _sample((6, 8, 100, 120), half, lambda x: x[:, 1::3, ::2]),
        _sample((2, 5, 6), change=lambda x: x[:, :1].expand(x.shape)),
        _sample((1,), change=lambda x: x.expand(3, 4)),
        _sample((3, 0, 2)),
        _sample(()),
        _sample((70000,), change=lambda x: -x.abs()),
        _sample((3, 4, 5), change=with_value(float("nan"))),
        _sample((3, 4, 5), half, with_value(float("-inf"))),
        _sample((3, 4, 5), half, with_value(float("nan"))),
    )


register(
    Kernel(
        name="absolute_max",
        schema="(Tensor x) -> Tensor",
        reference=reference,
        fake=fake,
        emit_cpp=emit_cpp,
        samples=samples,
        emit_triton=emit_triton,
    )
)
