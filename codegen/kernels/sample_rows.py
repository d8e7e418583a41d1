"""Sample rows: a fixed number of rows, each with probability proportional to its mass.

The masses m[i] of a segment of rows add up to M. The interval [0, M) is cut into R strata of equal
length, one point is drawn uniformly in each, and the row is taken whose share of the interval the
point falls into, with weight M / (R m[i]):

    E[number of times i is taken] = R m[i] / M,     so     E[sum of weights of i] = 1.

A row is taken R m[i] / M times, give or take less than two: the variance is less than that of
independent draws. Segments of equal length are sampled one by one. Rows come in ascending order.
Masses of zero are never taken; where all are zero, weights are zero. If a mass is NaN or infinite,
weights of the segment are NaN: what is sampled shows it.
"""

import math
from typing import Any

import torch
from torch import Tensor

from codegen import cpp, draws
from codegen.gpu import source as gpu
from codegen.kernel import Kernel, Sample, Source, register


def reference(
    mass: Tensor, seed: Tensor, salt: int, segments: int, count: int
) -> tuple[Tensor, Tensor]:
    """Return numbers and weights of the rows that are taken.

    Args:
        mass: [n], not negative.
        seed: int64, 0-d.
        salt: tells apart the draws that share a seed.
        segments: S, divides n.
        count: R, rows taken of every segment.

    Returns:
        int64 [S * R], ascending, and weights [S * R] of the type of `mass`.
    """
    points = draws.uniform(seed, segments * count, salt).double().view(segments, count)
    return choose(mass, points, segments, count)


def choose(mass: Tensor, points: Tensor, segments: int, count: int) -> tuple[Tensor, Tensor]:
    """Return the same from the points' positions in their strata, float64 [S, R] in (0, 1)."""
    masses = mass.view(segments, -1).double()
    ends = masses.cumsum(1)
    total = ends[:, -1:]
    strata = torch.arange(count, device=mass.device) + points
    sound = total.isfinite() & (total > 0)
    # A segment that cannot be sampled is walked through evenly.
    rows = masses.shape[1]
    even = torch.arange(1, rows + 1, device=mass.device, dtype=torch.float64).expand_as(ends)
    ends = torch.where(sound, ends, even)
    length = torch.where(sound, total, float(rows)) / count
    local = torch.searchsorted(ends.contiguous(), strata * length, right=True)
    local = local.clamp(max=rows - 1)
    taken = masses.gather(1, local)
    weight = torch.where(taken > 0, length / taken, 0.0)
    weight = torch.where(sound | (total == 0), weight, math.nan)
    first = torch.arange(segments, device=mass.device)[:, None] * rows
    return (local + first).flatten(), weight.to(mass.dtype).flatten()


def fake(mass: Tensor, seed: Tensor, salt: int, segments: int, count: int) -> tuple[Tensor, Tensor]:
    """Return uninitialised numbers and weights."""
    del seed, salt
    index = torch.empty(segments * count, dtype=torch.int64, device=mass.device)
    return index, torch.empty(segments * count, dtype=mass.dtype, device=mass.device)


def emit_cpp(mass: Tensor, seed: Tensor, salt: int, segments: int, count: int) -> Source | str:
    """Return the source for masses in float32."""
    del seed
    if mass.dtype != torch.float32 or not mass.is_contiguous():
        return "masses are not float32, or not contiguous"
    if max(mass.shape[0], segments * count) >= 1 << 31:
        return "more rows than the draws tell apart"
    constants = {
        "SALT": salt, "SEGMENTS": segments, "R": count, "N": mass.shape[0] // segments,
    }  # fmt: skip
    return Source(cpp.source(constants, _BODY))


def emit_triton(
    mass: Tensor, seed: Tensor, salt: int, segments: int, count: int
) -> gpu.Program | str:
    """Return the Triton for masses in float32."""
    del seed
    if mass.dtype != torch.float32 or not mass.is_contiguous():
        return "masses are not float32, or not contiguous"
    if max(mass.shape[0], segments * count) >= 1 << 30:
        return "more rows than the draws tell apart"
    rows = mass.shape[0] // segments
    block = gpu.power(gpu.ceil_div(rows, gpu.multiprocessors()), 256, 4096)
    pieces = gpu.ceil_div(rows, block)
    constants = {
        "SALT": salt, "SEGMENTS": segments, "R": count, "N": rows, "BLOCK": block,
        "PIECES": pieces, "POWER": gpu.power(pieces), "STEPS": rows.bit_length(),
    }  # fmt: skip
    scratch = (
        gpu.Scratch(segments * pieces, torch.float64), gpu.Scratch(segments * rows, torch.float64)
    )  # fmt: skip
    return gpu.program(gpu.about("sample_rows", mass=mass), constants, _TRITON, scratch)


_TRITON = """
@triton.jit
def piece_sums(mass, sums):
    segment = tl.program_id(0) // PIECES
    row = tl.program_id(0) % PIECES * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(mass + segment * N + row, mask=row < N, other=0.0)
    tl.store(sums + tl.program_id(0), tl.sum(value.to(tl.float64), axis=0))


@triton.jit
def piece_ends(mass, sums, ends):
    # Where each row's share of the segment ends: what came before its piece, and its running sum.
    segment = tl.program_id(0) // PIECES
    piece = tl.program_id(0) % PIECES
    row = piece * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(mass + segment * N + row, mask=row < N, other=0.0).to(tl.float64)
    other = tl.arange(0, POWER)
    before = tl.load(sums + segment * PIECES + other, mask=other < piece, other=0.0)
    end = tl.sum(before, axis=0) + tl.cumsum(value, axis=0)
    tl.store(ends + segment * N + row, end, mask=row < N)


@triton.jit
def choose(mass, seed, ends, index, weight):
    i = tl.program_id(0) * 256 + tl.arange(0, 256)
    inside = i < SEGMENTS * R
    segment = i // R
    total = tl.load(ends + segment * N + N - 1, mask=inside, other=1.0)
    sound = (total > 0) & (total <= 1.7e308)
    # A segment that cannot be sampled is walked through evenly.
    length = tl.where(sound, total, N) / R
    point = ((i % R).to(tl.float64) + uniform(draw_key(seed), i).to(tl.float64)) * length
    # The first row that ends behind the point, by halving.
    low = tl.zeros([256], dtype=tl.int32)
    high = tl.full([256], N, dtype=tl.int32)
    for _ in range(0, STEPS):
        middle = (low + high) // 2
        end = tl.load(ends + segment * N + middle, mask=inside & (middle < N), other=0.0)
        end = tl.where(sound, end, (middle + 1).to(tl.float64))
        further = (end <= point) & (low < high)
        low = tl.where(further, middle + 1, low)
        high = tl.where(further, high, tl.maximum(low, tl.minimum(high, middle)))
    row = segment * N + tl.minimum(low, N - 1)
    size = tl.load(mass + row, mask=inside, other=1.0).to(tl.float64)
    scaled = tl.where(size > 0, length / size, 0.0)
    scaled = tl.where(sound | (total == 0), scaled, float("nan"))
    tl.store(index + i, row.to(tl.int64), mask=inside)
    tl.store(weight + i, scaled.to(tl.float32), mask=inside)


def run(mass, seed, index, weight, sums, ends):
    pieces = SEGMENTS.value * PIECES.value
    piece_sums[(pieces,)](mass, sums)
    piece_ends[(pieces,)](mass, sums, ends)
    if R.value > 0:
        choose[(triton.cdiv(SEGMENTS.value * R.value, 256),)](mass, seed, ends, index, weight)
"""

_BODY = r"""
constexpr long GROUP = 16;

// How many of the points lie below `end`, in units of strata: those of the strata below, and its
// own stratum's if that comes before.
static inline int32_t points_below(double end, uint32_t key, uint32_t first) {
  int32_t stratum = int32_t(end);
  int32_t count = stratum + (double(uniform(key, first + uint32_t(stratum))) < end - stratum);
  return std::min(count, int32_t(R));
}

static double sum(const float* mass) {
  double lanes[GROUP] = {}, total = 0;
  for (long i = 0; i + GROUP <= N; i += GROUP)
    for (long l = 0; l < GROUP; l++) lanes[l] += mass[i + l];
  for (long i = N / GROUP * GROUP; i < N; i++) total += mass[i];
  for (long l = 0; l < GROUP; l++) total += lanes[l];
  return total;
}

static void kernel(void* const* t) {
  const float* masses = static_cast<const float*>(t[0]);
  uint32_t key = draw_key(*static_cast<const int64_t*>(t[1]), SALT);
  int64_t* indices = static_cast<int64_t*>(t[2]);
  float* weights = static_cast<float*>(t[3]);

  parallel(SEGMENTS, [&](long segment) {
    const float* mass = masses + segment * N;
    int64_t* index = indices + segment * R;
    double total = sum(mass), end = 0;
    bool sound = total > 0 && total <= 1.7e308;
    double length = (sound ? total : double(N)) / R, strata = 1 / length;
    int32_t taken = 0;
    for (long i = 0; i < N; i += GROUP) {
      double ends[GROUP];
      int32_t below[GROUP];
      for (long l = 0; l < GROUP; l++) {
        if (i + l < N) end += sound ? mass[i + l] : 1.0;
        ends[l] = end * strata;
      }
      for (long l = 0; l < GROUP; l++)
        below[l] = points_below(ends[l], key, uint32_t(segment * R));
      // Rows are taken once or not at all, mostly: the first copy is written without asking.
      for (long l = 0; l < GROUP && taken < R; l++) {
        index[taken] = segment * N + i + l;
        for (long k = taken + 1; k < below[l]; k++) index[k] = segment * N + i + l;
        taken = below[l];
      }
    }
    for (; taken < R; taken++) index[taken] = segment * N + N - 1;
    for (long j = 0; j < R; j++) {
      double size = masses[index[j]];
      double weight = size > 0 ? length / size : 0;
      weights[segment * R + j] = float(sound || total == 0 ? weight : NAN);
    }
  });
}
"""


def _sample(rows: int, segments: int, count: int, zeros: int = 0, odd: float = 0.0) -> Sample:
    def args() -> tuple[Any, ...]:
        mass = torch.rand(rows, generator=torch.Generator().manual_seed(rows))
        mass[rows - zeros :] = 0
        if odd:
            mass[1] = odd
        return mass, torch.tensor(1234 + rows), 5, segments, count

    return Sample(args, length=rows)


def samples() -> tuple[Sample, ...]:
    """Return one and several segments, few and many rows taken, and masses that cannot be used."""
    return (
        _sample(1000, 1, 250),
        _sample(63, 1, 100),
        _sample(120, 4, 7),
        _sample(17, 1, 0),
        _sample(1, 1, 3),
        _sample(100, 5, 10, zeros=30),
        _sample(60, 3, 9, odd=math.nan),
        _sample(60, 3, 9, odd=math.inf),
    )


register(
    Kernel(
        name="sample_rows",
        schema="(Tensor mass, Tensor seed, int salt, int segments, int count) -> (Tensor, Tensor)",
        reference=reference,
        fake=fake,
        emit_cpp=emit_cpp,
        samples=samples,
        emit_triton=emit_triton,
    )
)
