"""A product of a convolution, of operands that are 8-bit floats: forward, or one of the gradients.

    result = (first * first_scale) . (second * second_scale)

with products exact, sums and scaling in float32. Only GPUs have such products. NVIDIA's tensor
cores up to Hopper's keep 14 bits of a sum, so it is taken out of them every few dozen products
(`codegen.gpu.source.added`).
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from codegen import fp8, int8
from codegen.gpu import int8 as gpu_int8
from codegen.gpu.source import Program
from codegen.kernel import Kernel, Sample, register

aten = torch.ops.aten

# Of the two operands of each product.
_OPERANDS = {
    "forward": ("input", "weight"), "input": ("grad", "weight"), "weight": ("grad", "input"),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Call:
    """The operator's arguments, in their order.

    Attributes:
        first: g [B, Co, OH, OW], or forward x [B, Ci, IH, IW], as `codegen.fp8.to_bytes` lays it
            out, with the border that `operand` says.
        second: the weight [Co, Ci/groups, *kernel], or for its gradient x, likewise.
        first_scale: float, 0-d: what 1 in `first` is worth.
        second_scale: the same of `second`.
        first_format: what the bytes of `first` are.
        second_format: the same of `second`.
        product: "forward", or what the gradient is of: "input" or "weight".
        out_size: [B, Co, OH, OW].
        size: [B, Ci, IH, IW].
        kernel: the kernel's spatial sizes.
        stride: one number a spatial axis.
        padding: one number a spatial axis.
        dilation: one number a spatial axis.
        groups: groups of channels.
        dtype: element type of the result.
        channels_last: memory format of the result.
    """

    first: Tensor
    second: Tensor
    first_scale: Tensor
    second_scale: Tensor
    first_format: torch.dtype
    second_format: torch.dtype
    product: str
    out_size: list[int]
    size: list[int]
    kernel: list[int]
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int
    dtype: torch.dtype
    channels_last: bool

    @property
    def geometry(self) -> tuple[list[int], list[int], list[int]]:
        """Stride, padding and dilation."""
        return self.stride, self.padding, self.dilation

    def shape(self, name: str) -> list[int]:
        """Return the shape of "grad", "input" or "weight"."""
        weight = [self.out_size[1], self.size[1] // self.groups, *self.kernel]
        return {"grad": self.out_size, "input": self.size, "weight": weight}[name]

    def border(self, name: str) -> tuple[list[int], list[int]]:
        """Return the border of "grad", "input" or "weight", before and after."""
        axes = self.size[2:], self.out_size[2:], self.kernel, *self.geometry
        if name == "weight":
            return [0, 0], [0, 0]
        return int8.grad_border(*axes) if name == "grad" else int8.input_border(*axes)

    def result(self, dtype: torch.dtype, device: torch.device | str) -> Tensor:
        """Return an uninitialised result."""
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        shape = self.shape("grad" if self.product == "forward" else self.product)
        return torch.empty(shape, dtype=dtype, device=device, memory_format=layout)


def reference(*args: Any) -> Tensor:
    """Return the product; arguments as `Call` names them."""
    call = Call(*args)
    wide = call.first_scale.dtype
    names = _OPERANDS[call.product]
    bytes_, formats = (call.first, call.second), (call.first_format, call.second_format)
    values = {
        name: int8.from_bytes(x, call.shape(name), *call.border(name), wide, stored)
        for name, x, stored in zip(names, bytes_, formats, strict=True)
    }
    rest: Any = (*call.geometry, False, [0, 0], call.groups)
    # In double precision, the element type only says how the result of a kernel is rounded.
    result = call.result(call.dtype if wide == torch.float32 else wide, call.first.device)
    if call.product == "forward":
        product: Tensor = aten.convolution(values["input"], values["weight"], None, *rest)
    else:
        missing = values["grad"].new_empty(call.shape(call.product))
        x, w = values.get("input", missing), values.get("weight", missing)
        mask = [call.product == "input", call.product == "weight", False]
        both = aten.convolution_backward(values["grad"], x, w, None, *rest, mask)
        product = both[mask.index(True)]
    return result.copy_(product * call.first_scale * call.second_scale)


def fake(*args: Any) -> Tensor:
    """Return an uninitialised result."""
    call = Call(*args)
    return call.result(call.dtype, call.first.device)


def emit_triton(*args: Any) -> Program | str:
    """Return the Triton for convolutions of two spatial axes, where the GPU has such products."""
    call = Call(*args)
    if (reason := fp8.unsupported("cuda")) is not None:
        return reason
    scales, formats = (
        (call.first_scale, call.second_scale),
        (call.first_format, call.second_format),
    )
    axes = (call.kernel, *call.geometry, call.groups)
    result = call.result(call.dtype, "meta")
    if call.product == "weight":
        return gpu_int8.weight_gradient(
            "fp8_product", result, scales, call.out_size, call.size, *axes, formats
        )
    name = _OPERANDS[call.product][0]
    forward = call.product == "forward"
    return gpu_int8.product(
        "fp8_product", result, scales, call.shape(name), call.border(name), *axes, formats,
        forward=forward,
    )  # fmt: skip


# Subnormal numbers among those of e4m3, from 2^-9 on; Triton's interpreter misreads e5m2's.
_SIZES = {torch.float8_e4m3fn: 2.0**-5, torch.float8_e5m2: 16.0}


def _sample(
    product: str,
    *problem: Any,
    formats: tuple[torch.dtype, torch.dtype] = (torch.float8_e4m3fn, torch.float8_e4m3fn),
    dtype: torch.dtype = torch.float32,
    channels_last: bool = True,
    scale: float = 0.25,
) -> Sample:
    example = int8.Example(*problem)
    inner, outer = example.channels

    def args() -> tuple[Any, ...]:
        random = torch.Generator().manual_seed(inner)
        scales, nothing = (torch.tensor(scale), torch.tensor(8.0)), torch.empty(0)
        rest: Any = (*scales, *formats, product, *example.sizes(), dtype, channels_last)
        given = Call(nothing, nothing, *rest)
        bytes_ = (
            fp8.to_bytes(
                torch.randn(given.shape(name), generator=random).mul(_SIZES[stored]),
                *given.border(name),
                stored,
            )
            for name, stored in zip(_OPERANDS[product], formats, strict=True)
        )
        return (*bytes_, *rest)

    batch, out = example.batch, example.axes[0]
    lengths = {"weight": batch * math.prod(out), "forward": inner, "input": outer}
    taps = 1 if product == "weight" else math.prod(example.kernel)
    return Sample(args, length=lengths[product] * taps)


def samples() -> tuple[Sample, ...]:
    """Return every product, both formats and layouts, geometries of every kind, and NaN."""
    narrow, wide, half = torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16
    strange = (2, (6, 4), (11, 10), (3, 2), (2, 3, 2, 2))
    return (
        _sample("input", 3, (17, 19), (9, 7), (3, 3), (1, 1, 1, 1), formats=(wide, narrow)),
        _sample("weight", 3, (17, 19), (9, 7), (3, 3), (1, 1, 1, 1), formats=(wide, narrow)),
        _sample("forward", 3, (17, 19), (9, 7), (3, 3), (1, 1, 1, 1), dtype=half),
        *(_sample(product, *strange, channels_last=False) for product in _OPERANDS),
        _sample("input", 2, (63, 3), (8, 7), (3, 3), (2, 1, 1, 1), dtype=half),
        _sample("weight", 2, (63, 3), (8, 7), (3, 3), (2, 1, 1, 1), dtype=half),
        _sample("weight", 1, (1, 3), (9, 8), (5, 5), (2, 2, 1, 1)),
        _sample("input", 1, (4, 4), (5, 6), (7, 7), (1, 3, 1, 2)),
        _sample("weight", 1, (64, 36), (1, 205), (1, 1)),
        _sample("forward", 1, (36, 64), (1, 105), (1, 1)),
        _sample("input", 2, (8, 8), (5, 5), (3, 3), (1, 1, 1, 1), scale=float("nan")),
        _sample("weight", 2, (8, 8), (5, 5), (3, 3), (1, 1, 1, 1), scale=float("inf")),
    )


register(
    Kernel(
        name="fp8_product",
        schema="(Tensor first, Tensor second, Tensor first_scale, Tensor second_scale, "
        "ScalarType first_format, ScalarType second_format, str product, int[] out_size, "
        "int[] size, int[] kernel, int[] stride, int[] padding, int[] dilation, int groups, "
        "ScalarType dtype, bool channels_last) -> Tensor",
        reference=reference,
        fake=fake,
        samples=samples,
        emit_triton=emit_triton,
    )
)
