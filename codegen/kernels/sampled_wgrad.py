"""Sampled weight gradient: a convolution's dw from some of its output pixels, each with a weight.

The weight gradient is a sum over the output pixels of all samples, flat numbers b * OH * OW + p.
Of those, R are given, with weights; patch(x)[b, p] is what the kernel sees from pixel p:

    dw = sum_r weight[r] * g[b_r, :, p_r] (outer) patch(x - center)[b_r, p_r]
       + sums (outer) center

A centre (channel means, usually) is subtracted inside the image only, padding stays 0, and its own
share of dw is added back: sums[o, tap] is what g[o] sums to where that tap lies inside the image.
With `narrow` what is multiplied may be rounded to bfloat16, gradients after weighting and patches
after centring, where the processor multiplies pairs of those: twice as fast, and 2^-9 of a sampled
value is nothing beside the noise of sampling. Patches that are bfloat16 are not rounded: their
centre is taken out of the sums (`codegen.patch_tiles`). Pixels may be repeated. Only rows of x and
g that are named are read, and no patch outlives a block of 128 rows (256 in bfloat16). A Linear
layer is the case of a 1x1 kernel on 1x1 maps. Letters: B batch, Ci and Co channels, R rows.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from codegen import build, channels_last, cpp, patch_tiles
from codegen.gpu.sampled import weight_gradient_program as emit_triton
from codegen.kernel import Kernel, Sample, Source, register

# Which taps of a row lie inside the image is one bit each of a 64-bit word.
_MAX_TAPS = 64
# Tasks that a call is divided into, however many threads there are, so that results do not depend
# on their number; and how much memory partial sums may take before columns are divided instead.
_TASKS = 8
_PARTIAL_BYTES = 1 << 23


def reference(
    grad: Tensor,
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    center: Tensor | None,
    sums: Tensor | None,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    narrow: bool,
) -> Tensor:
    """Return the weight gradient of the named pixels.

    Args:
        grad: [B, Co, *out].
        x: [B, Ci, *in].
        index: [R], flat numbers of output pixels.
        weight: float32 [R].
        center: float32 [Ci]; None for zero.
        sums: float32 [Co, *kernel]; None to leave the centre's own share out.
        kernel: the kernel's spatial sizes.
        stride: one number a spatial axis.
        padding: one number a spatial axis.
        dilation: one number a spatial axis.
        groups: groups of channels.
        narrow: whether what is multiplied may be rounded to bfloat16; here nothing is.

    Returns:
        dw [Co, Ci/groups, *kernel], laid out in memory as x is.
    """
    positions, wide = math.prod(grad.shape[2:]), torch.promote_types(grad.dtype, torch.float32)
    sample, pixel = index.long() // positions, index.long() % positions
    taps = torch.arange(math.prod(kernel), device=x.device)
    inside: Any = True
    at = []
    corners, steps = _unravel(pixel, grad.shape[2:]), _unravel(taps, kernel)
    for axis, size in enumerate(x.shape[2:]):
        where = corners[axis][:, None] * stride[axis] + steps[axis] * dilation[axis] - padding[axis]
        inside = inside & (where >= 0) & (where < size)
        at.append(where.clamp(0, size - 1))
    patches = x.movedim(1, -1)[(sample[:, None], *at)].to(wide)  # [R, taps, Ci]
    if center is not None:
        patches = patches - center
    patches = torch.where(inside[..., None], patches, 0.0)
    rows = grad.flatten(2)[sample, :, pixel].to(wide) * weight.to(wide)[:, None]  # [R, Co]
    rows, patches = rows.unflatten(1, (groups, -1)), patches.unflatten(2, (groups, -1))
    dw = torch.einsum("rgo,rtgc->goct", rows, patches).flatten(0, 1)  # [Co, Ci/groups, taps]
    if center is not None and sums is not None:
        dw = dw + (sums.view(groups, -1, 1, len(taps)) * center.view(groups, 1, -1, 1)).flatten(
            0, 1
        )
    result = fake(
        grad, x, index, weight, center, sums, kernel, stride, padding, dilation, groups, narrow
    )
    return result.copy_(dw.view(result.shape))


def fake(
    grad: Tensor,
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    center: Tensor | None,
    sums: Tensor | None,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    narrow: bool,
) -> Tensor:
    """Return an uninitialised weight gradient."""
    del index, weight, center, sums, stride, padding, dilation, narrow
    shape = (grad.shape[1], x.shape[1] // groups, *kernel)
    last = len(kernel) == 2 and x.stride(1) == 1
    layout = torch.channels_last if last else torch.contiguous_format
    return torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=layout)


def emit_cpp(
    grad: Tensor,
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    center: Tensor | None,
    sums: Tensor | None,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    narrow: bool,
) -> Source | str:
    """Return the source for convolutions of two spatial axes."""
    if len(kernel) != 2 or math.prod(kernel) > _MAX_TAPS:
        return f"no kernel for a window of {'x'.join(map(str, kernel))}"
    if (reason := cpp.unsupported(grad, x)) is not None or grad.dtype != x.dtype:
        return reason or "operands of two types"
    small = [tensor for tensor in (weight, center, sums) if tensor is not None]
    if any(tensor.dtype != torch.float32 for tensor in small) or x.numel() == 0:
        return "weights are not float32" if x.numel() else "x is empty"
    if sums is not None and (center is None or not sums.is_contiguous()):
        return "sums without a centre, or not contiguous"
    result = fake(
        grad.to("meta"), x.to("meta"), index, weight, center, sums, kernel, stride, padding,
        dilation, groups, narrow,
    )  # fmt: skip
    batch, out_channels, out_height, out_width = grad.shape
    tools = build.toolchain()
    fast = narrow and not isinstance(tools, str) and tools.bf16
    pairs = fast or grad.dtype is torch.bfloat16
    tile = patch_tiles.tile(kernel, x.shape[1] // groups, out_channels // groups, pairs)
    rows = index.shape[0]
    # Rows are divided among tasks as long as their partial sums are small: into a power of two, as
    # blocks and threads are, or some threads would have a block more than others.
    partial = groups * tile["PANELS"] * tile["TILES"] * tile["TILE"] * 4
    blocks = max(1, -(-rows // tile["BLOCK"]))
    splits = _power_below(max(1, min(_TASKS, _PARTIAL_BYTES // partial, blocks)))
    slabs = max(1, min(_TASKS // splits, tile["PANELS"]))
    # The vector path reads 16 neighbouring channels at once: other layouts are copied first, and
    # the gradient where every range of columns would read it again.
    whole = (x.shape[1] // groups) % 16 == 0
    copies = [
        channels_last.plan(x, "x", "x_copy") if whole and x.stride(1) != 1 else None,
        channels_last.plan(grad, "grad", "grad_copy")
        if grad.stride(1) != 1 and slabs > 1
        else None,
    ]
    x_strides, grad_strides = (
        tensor.stride() if copy is None else copy.strides
        for tensor, copy in zip((x, grad), copies, strict=True)
    )
    constants: dict[str, Any] = {
        "T": cpp.ELEMENTS[grad.dtype], "Index": cpp.INDICES[index.dtype],
        "B": batch, "CO": out_channels, "CI": x.shape[1], "GROUPS": groups,
        "OH": out_height, "OW": out_width, "IH": x.shape[2], "IW": x.shape[3],
        "KH": kernel[0], "KW": kernel[1], "SH": stride[0], "SW": stride[1],
        "PH": padding[0], "PW": padding[1], "DH": dilation[0], "DW": dilation[1],
        "R": rows, "IS": index.stride(0), "WS": weight.stride(0),
        "CENTERED": center is not None, "CS": 0 if center is None else center.stride(0),
        "SUMS": sums is not None, "PAIRS": pairs, "WHOLE": whole and x_strides[1] == 1,
        **tile, "SPLITS": splits, "SLABS": slabs,
        **{f"XS{axis}": step for axis, step in enumerate(x_strides)},
        **{f"GS{axis}": step for axis, step in enumerate(grad_strides)},
        **cpp.strides("RS", result),
    }  # fmt: skip
    sizes = [0 if copy is None else -(-copy.size_bytes // 64) * 64 for copy in copies]
    constants["X_COPY_BYTES"] = sizes[0]
    # Sums of gradients, of every tap and of all pixels, in whole lines.
    late = center is not None and grad.dtype is torch.bfloat16
    tallies = splits * groups * (1 + math.prod(kernel)) * tile["TILES"] * 8
    constants["TALLIES"] = -(-tallies // 16) * 16 if late else 0
    scratch = splits * partial + splits * slabs * tile["BUFFER"] + sum(sizes)
    scratch += constants["TALLIES"] * 4
    made = [
        f"{copy.call}\n  {name} = {name}_copy;"
        for copy, name in zip(copies, ("x", "grad"), strict=True)
        if copy is not None
    ]
    body = _BODY.replace("MAKE_COPIES", "\n  ".join(made))
    return Source(
        cpp.source(constants, channels_last.TEXT + patch_tiles.TEXT + body), scratch_bytes=scratch
    )


def _power_below(count: int) -> int:
    """Return the largest power of two that is not more."""
    return 1 << (count.bit_length() - 1)


def _unravel(flat: Tensor, sizes: Any) -> list[Tensor]:
    """Return the coordinate along each axis of flat positions in a map of `sizes`."""
    coordinates = []
    for size in reversed(sizes):
        coordinates.append(flat % size)
        flat = flat // size
    return coordinates[::-1]


_BODY = r"""static void kernel(void* const* t) {
  const T* grad = static_cast<const T*>(t[0]);
  const T* x = static_cast<const T*>(t[1]);
  const Index* index = static_cast<const Index*>(t[2]);
  const float* weight = static_cast<const float*>(t[3]);
  const float* center = static_cast<const float*>(t[4]);
  const float* sums = static_cast<const float*>(t[4 + CENTERED]);
  T* result = static_cast<T*>(t[4 + CENTERED + SUMS]);
  float* parts = static_cast<float*>(t[5 + CENTERED + SUMS]);  // [SPLITS][GROUPS][PART]
  Buffers* buffers = reinterpret_cast<Buffers*>(parts + SPLITS * GROUPS * PART);  // one a thread
  float* tallies = reinterpret_cast<float*>(  // [SPLITS][GROUPS][TALLY]
      reinterpret_cast<char*>(buffers) + SPLITS * SLABS * BUFFER);
  T* x_copy = reinterpret_cast<T*>(tallies + TALLIES);
  T* grad_copy = reinterpret_cast<T*>(reinterpret_cast<char*>(x_copy) + X_COPY_BYTES);

  find_borders();
  MAKE_COPIES
  // A task has a range of rows and a range of columns: nobody else writes its sums.
  parallel(SPLITS * SLABS, [&](long task) {
    Buffers& mine = buffers[omp_get_thread_num()];
    long split = task / SLABS, slab = task % SLABS;
    long begin = split * BLOCKS / SPLITS, end = (split + 1) * BLOCKS / SPLITS;
    for (long block = begin; block < end; block++) {
      long words = find_rows(index, block * BLOCK, mine.rows);
      if (slab == 0) sweep_block(grad, x, index, block);
      for (long g = 0; g < GROUPS; g++) {
        const float* mu = CENTERED ? center + g * CG * CS : nullptr;
        float* part = parts + (split * GROUPS + g) * PART;
        pack_grads(grad + g * OG * GS1, index, weight, block * BLOCK, mine.grads);
        if (LATE && slab == 0) {
          float* sum = tallies + (split * GROUPS + g) * TALLY;
          if (block == begin) std::fill(sum, sum + TALLY, 0.0f);
          tally(mine.grads, mine.rows, words, (v8*)sum);
        }
        for (long n = slab * PANELS / SLABS; n < (slab + 1) * PANELS / SLABS; n++) {
          (WHOLE ? fill_vectors : fill_columns)(x + g * CG * XS1, mu, mine.rows, words, n,
                                                mine.panel);
          for (long o = 0; o < TILES; o++)
            multiply(mine.grads + o * NEXT, mine.panel, words, block > begin,
                     (v16*)(part + (n * TILES + o) * TILE));
        }
      }
    }
  });

  parallel(CO, [&](long o) {
    alignas(64) float sum[PANELS * WIDTH];
    long g = o / OG, tile = o % OG / M;
    std::fill(sum, sum + PANELS * WIDTH, 0.0f);
    for (long split = 0; split < (R > 0 ? SPLITS : 0); split++)
      for (long n = 0; n < PANELS; n++) {
        const float* part = parts + (split * GROUPS + g) * PART + (n * TILES + tile) * TILE;
        for (long l = 0; l < WIDTH; l++) sum[n * WIDTH + l] += part[o % OG % M * WIDTH + l];
      }
    for (long tap = 0; tap < TAPS; tap++) {
      T* to = result + o * RS0 + tap / KW * RS2 + tap % KW * RS3;
      float share = SUMS ? sums[o * TAPS + tap] : 0.0f;
      for (long split = 0; LATE && split < (R > 0 ? SPLITS : 0); split++) {
        const float* of = tallies + (split * GROUPS + g) * TALLY + o % OG;
        share += of[(1 + tap) * TILES * M] - of[0];
      }
      for (long c = 0; c < CG; c++) {
        float value = sum[tap * CG + c];
        store(to + c * RS1, SUMS || LATE ? value + share * center[(g * CG + c) * CS] : value);
      }
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
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.channels_last,
    centered: bool = True,
    narrow: bool = False,
) -> Sample:
    """Return a problem; `geometry` is stride, padding, dilation and groups."""
    (in_channels, out_channels), (stride, padding, dilation, groups) = channels, geometry
    out = [
        (side + 2 * padding - dilation * (taps - 1) - 1) // stride + 1
        for side, taps in zip(size, kernel, strict=True)
    ]

    def args() -> tuple[Any, ...]:
        random = torch.Generator().manual_seed(batch + rows)
        x = torch.randn(batch, in_channels, *size, generator=random).add(1)
        grad = torch.randn(batch, out_channels, *out, generator=random)
        grad, x = (tensor.to(dtype, memory_format=memory_format) for tensor in (grad, x))
        index = torch.randint(batch * out[0] * out[1], (rows,), generator=random)
        weight = torch.rand(rows, generator=random)
        center = torch.randn(in_channels, generator=random) if centered else None
        sums = torch.randn(out_channels, *kernel, generator=random) if centered else None
        axes = [[stride] * 2, [padding] * 2, [dilation] * 2]
        return grad, x, index, weight, center, sums, list(kernel), *axes, groups, narrow

    # What is contracted is rounded to the operands' type once it is weighted and centred.
    lost = rows * torch.finfo(torch.bfloat16).eps / torch.finfo(torch.float32).eps
    return Sample(args, length=rows + 1 + int(lost if narrow or dtype is torch.bfloat16 else 0))


def _with(sample: Sample, change: Callable[..., tuple[Any, ...]]) -> Sample:
    """Return the sample with its first four arguments changed."""

    def args() -> tuple[Any, ...]:
        grad, x, index, weight, *rest = sample.args()
        return *change(grad, x, index, weight), *rest

    return Sample(args, sample.length)


def samples() -> tuple[Sample, ...]:
    """Return convolutions of every geometry, in both layouts and types, and odd sizes."""
    nchw, half = torch.contiguous_format, torch.bfloat16
    plain = _sample(3, (17, 19), (9, 7), (3, 3), (1, 1, 1, 1))
    wide = _sample(3, (32, 24), (9, 7), (3, 3), (1, 1, 1, 1), rows=300)
    return (
        plain,
        wide,
        _sample(3, (16, 16), (9, 7), (3, 3), (1, 1, 1, 1), rows=300, memory_format=nchw),
        _sample(2, (1, 1), (5, 5), (1, 1), centered=False),
        _sample(1, (3, 63), (9, 8), (5, 5), (2, 2, 1, 1)),
        _sample(4, (6, 4), (11, 10), (3, 2), (2, 3, 2, 2), memory_format=nchw),
        _sample(4, (32, 20), (11, 10), (3, 2), (2, 3, 2, 2), rows=129),
        _sample(2, (8, 8), (9, 9), (7, 7), (1, 3, 1, 8)),
        _sample(3, (17, 5), (8, 8), (3, 3), (1, 1, 1, 1), rows=41, dtype=half),
        _sample(3, (17, 5), (8, 8), (3, 3), (1, 1, 1, 1), rows=41, narrow=True),
        _sample(3, (32, 33), (8, 8), (3, 3), (1, 1, 1, 1), rows=263, narrow=True),
        _sample(3, (16, 33), (8, 8), (3, 3), (1, 1, 1, 1), rows=261, dtype=half),
        _sample(3, (48, 32), (8, 8), (3, 3), (1, 1, 1, 1), dtype=half, memory_format=nchw),
        _sample(3, (16, 9), (8, 8), (3, 3), (1, 1, 1, 1), dtype=half, centered=False),
        # A linear layer.
        _sample(70, (64, 17), (1, 1), (1, 1), rows=33),
        _sample(2, (3, 4), (5, 5), (3, 3), rows=0),
        _with(plain, lambda g, x, i, w: (g.index_fill(1, torch.tensor([2]), torch.nan), x, i, w)),
        _with(wide, lambda g, x, i, w: (g, x.index_fill(2, torch.tensor([4]), torch.inf), i, w)),
        # What a sum over the output hands back: one value, expanded.
        _with(plain, lambda g, x, i, w: (g[:, :1, :1, :1].expand(g.shape), x, i, w)),
        _with(wide, lambda g, x, i, w: (g.flip(3), x[:, :1].expand(x.shape), i.int(), w)),
        _with(
            wide, lambda g, x, i, w: (g, x.mT.contiguous().mT, i[:1].expand(300), w[:1].expand(300))
        ),
    )


register(
    Kernel(
        name="sampled_wgrad",
        schema="(Tensor grad, Tensor x, Tensor index, Tensor weight, Tensor? center, Tensor? sums, "
        "int[] kernel, int[] stride, int[] padding, int[] dilation, int groups, bool narrow) "
        "-> Tensor",
        reference=reference,
        fake=fake,
        emit_cpp=emit_cpp,
        samples=samples,
        emit_triton=emit_triton,
    )
)
