"""Top patches: the weight gradient from the k largest output gradients of every map.

For each sample b and output channel o, the k positions p with the largest |g[b, o, p]| are kept;
what the others sum to is shared out among them, so that the map's sum is kept:

    dw[o] = scale * sum_b sum_kept (g[b, o, p] + rest / k) * patch(x[b], p)

Wang, Nelaturu, Amarasinghe 2019, Algorithm 1, is k = 1. Letters: B batch, Ci and Co channels.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from codegen import channels_last, cpp, top_patches
from codegen.gpu.top_patches import top_patches_program as emit_triton
from codegen.kernel import Kernel, Sample, Source, register

aten = torch.ops.aten


def reference(
    grad: Tensor,
    x: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    k: int,
    scale: float,
) -> Tensor:
    """Return the weight gradient of the output gradient with all but k values of a map dropped.

    Args:
        grad: [B, Co, *out].
        x: [B, Ci, *in].
        kernel: the kernel's spatial sizes.
        stride: one number a spatial axis.
        padding: one number a spatial axis.
        dilation: one number a spatial axis.
        groups: groups of channels.
        k: values kept of every map.
        scale: factor on the result.

    Returns:
        dw [Co, Ci/groups, *kernel], laid out in memory as x is.
    """
    maps = grad.flatten(2)
    positions = maps.abs().topk(k, dim=2).indices if k > 1 else maps.abs().argmax(2, keepdim=True)
    values = maps.gather(2, positions)
    total = maps.sum(2, keepdim=True)
    values = values + (total - values.sum(2, keepdim=True)) / k if k > 1 else total
    kept = torch.zeros_like(maps).scatter(2, positions, values).view_as(grad)
    weight = fake(grad, x, kernel, stride, padding, dilation, groups, k, scale)
    # A convolution's three products are computed by one operator; the mask asks for dw alone.
    dw: Tensor = aten.convolution_backward(
        kept, x, weight, None, stride, padding, dilation, False, [0] * len(kernel), groups,
        [False, True, False],
    )[1]  # fmt: skip
    return dw * scale


def fake(
    grad: Tensor,
    x: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    k: int,
    scale: float,
) -> Tensor:
    """Return an uninitialised weight gradient."""
    del stride, padding, dilation, k, scale
    shape = (grad.shape[1], x.shape[1] // groups, *kernel)
    last = len(kernel) == 2 and x.stride(1) == 1
    layout = torch.channels_last if last else torch.contiguous_format
    return torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=layout)


def emit_cpp(
    grad: Tensor,
    x: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    k: int,
    scale: float,
) -> Source | str:
    """Return the source for convolutions of two spatial axes."""
    if len(kernel) != 2:
        return f"no kernel for {len(kernel)} spatial axes"
    if (reason := cpp.unsupported(grad, x)) is not None or grad.dtype != x.dtype:
        return reason or "operands of two types"
    batch, out_channels, out_height, out_width = grad.shape
    result = fake(
        grad.to("meta"), x.to("meta"), kernel, stride, padding, dilation, groups, k, scale
    )
    constants: dict[str, Any] = {
        "T": cpp.ELEMENTS[grad.dtype],
        "B": batch, "CO": out_channels, "CI": x.shape[1], "GROUPS": groups,
        "OH": out_height, "OW": out_width, "IH": x.shape[2], "IW": x.shape[3],
        "KH": kernel[0], "KW": kernel[1], "SH": stride[0], "SW": stride[1],
        "PH": padding[0], "PW": padding[1], "DH": dilation[0], "DW": dilation[1],
        "K": k, "SCALE": float(scale),
        **cpp.strides("GS", grad), **cpp.strides("XS", x), **cpp.strides("RS", result),
    }  # fmt: skip
    kept = batch * out_channels * k
    return Source(
        cpp.source(constants, channels_last.TEXT + top_patches.TEXT + _BODY), scratch_bytes=8 * kept
    )


_BODY = r"""static void kernel(void* const* t) {
  const T* grad = static_cast<const T*>(t[0]);
  const T* x = static_cast<const T*>(t[1]);
  T* result = static_cast<T*>(t[2]);
  int32_t* positions = static_cast<int32_t*>(t[3]);  // [B, CO, K]
  float* weights = reinterpret_cast<float*>(positions + B * CO * K);

  parallel(B, [&](long b) {
    for (long o = 0; o < CO; o += K == 1 ? BLOCK : 1) {
      const T* g = grad + b * GS0 + o * GS1;
      long at = (b * CO + o) * K;
      if (K == 1 && GS1 == 1 && o + BLOCK <= CO) keep_vector(g, positions + at, weights + at);
      else if (K == 1) keep_one(g, std::min(BLOCK, CO - o), positions + at, weights + at);
      else keep_many(g, positions + at, weights + at);
    }
  });

  // Each filter belongs to one thread: the sum does not depend on their number.
  parallel(CO, [&](long o) {
    alignas(64) float sum[KH * KW * CG];
    std::fill(sum, sum + KH * KW * CG, 0.0f);
    const T* group = x + (o / OG) * CG * XS1;
    (XS1 == 1 && CG % 16 == 0 ? add_vectors : add_any)(group, positions, weights, o, sum);
    for (long c = 0; c < CG; c++)
      for (long kh = 0; kh < KH; kh++)
        for (long kw = 0; kw < KW; kw++)
          store(result + o * RS0 + c * RS1 + kh * RS2 + kw * RS3, sum[(kh * KW + kw) * CG + c]);
  });
}
"""


def _sample(
    batch: int,
    channels: tuple[int, int],
    size: tuple[int, int],
    kernel: tuple[int, int],
    geometry: tuple[int, int, int, int] = (1, 0, 1, 1),
    k: int = 1,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.channels_last,
) -> Sample:
    """Return a problem; `geometry` is stride, padding, dilation and groups."""
    (in_channels, out_channels), (stride, padding, dilation, groups) = channels, geometry
    out = [
        (side + 2 * padding - dilation * (taps - 1) - 1) // stride + 1
        for side, taps in zip(size, kernel, strict=True)
    ]

    def args() -> tuple[Any, ...]:
        random = torch.Generator().manual_seed(batch)
        x = torch.randn(batch, in_channels, *size, generator=random)
        # Magnitudes differ within a map, so that the largest are the same in every type.
        order = torch.rand(batch, out_channels, out[0] * out[1], generator=random).argsort(-1)
        sign = torch.rand(order.shape, generator=random).sub(0.5).sign()
        grad = (sign * (1 + order / 128)).view(batch, out_channels, *out)
        grad, x = (tensor.to(dtype, memory_format=memory_format) for tensor in (grad, x))
        axes = [[stride] * 2, [padding] * 2, [dilation] * 2]
        return grad, x, list(kernel), *axes, groups, k, 0.5

    return Sample(args, length=batch * k + out[0] * out[1])


def _with(sample: Sample, change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Sample:
    def args() -> tuple[Any, ...]:
        grad, x, *rest = sample.args()
        return *change(grad, x), *rest

    return Sample(args, sample.length)


def samples() -> tuple[Sample, ...]:
    """Return convolutions of every geometry, in both layouts and types, and odd sizes."""
    nchw, half = torch.contiguous_format, torch.bfloat16
    plain = _sample(3, (17, 19), (9, 7), (3, 3), (1, 1, 1, 1))
    wide = _sample(3, (32, 24), (9, 7), (3, 3), (1, 1, 1, 1))

    def not_a_number(grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        grad = grad.clone()
        grad[:, 2, 4, 3], grad[:, 5, 3, 2] = torch.nan, torch.inf
        return grad, x

    return (
        plain,
        _sample(2, (1, 1), (5, 5), (1, 1)),
        _sample(1, (3, 63), (9, 8), (5, 5), (2, 2, 1, 1), k=3),
        _sample(4, (6, 4), (11, 10), (3, 2), (2, 3, 2, 2), k=2, memory_format=nchw),
        _sample(2, (8, 8), (9, 9), (7, 7), (1, 3, 1, 8)),
        _sample(3, (17, 5), (8, 8), (3, 3), (1, 1, 1, 1), dtype=half),
        _sample(3, (4, 33), (8, 8), (3, 3), (1, 1, 1, 1), dtype=half, memory_format=nchw),
        # Vectors of channels: several to a pixel, more than registers hold, in groups.
        wide,
        _sample(2, (272, 16), (3, 3), (3, 3), (1, 1, 1, 1), k=2, dtype=half),
        _sample(70, (64, 36), (7, 5), (3, 2), (2, 1, 1, 2), k=5),
        _sample(2, (3, 4), (5, 5), (3, 3), k=9),
        _sample(3, (8, 6), (8, 8), (3, 3), (1, 1, 1, 2), k=4, dtype=half),
        _with(plain, not_a_number),
        _with(wide, not_a_number),
        # What a sum over the output hands back: one value, expanded.
        _with(plain, lambda grad, x: (grad[:, :1, :1, :1].expand(grad.shape), x)),
        _with(plain, lambda grad, x: (grad.flip(3), x.transpose(2, 3).contiguous().mT)),
    )


register(
    Kernel(
        name="top_patches",
        schema="(Tensor grad, Tensor x, int[] kernel, int[] stride, int[] padding, int[] dilation, "
        "int groups, int k, float scale) -> Tensor",
        reference=reference,
        fake=fake,
        emit_cpp=emit_cpp,
        samples=samples,
        emit_triton=emit_triton,
    )
)
