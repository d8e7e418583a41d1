"""One convolution and its gradients, alone: what benchmarks of layers on a CPU and a GPU share."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import graphpass
from graphpass.method import Method, salt_of
from graphpass.site import ConvGeometry, Gradient, Site

Run = Callable[[], object]
# Channels in and out, side of the input, kernel, stride.
Shape = tuple[int, int, int, int, int]
BATCH = 128
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Table 1 of Wang, Nelaturu and Amarasinghe 2019.
GA: tuple[Shape, ...] = (
    (256, 256, 8, 3, 1), (128, 128, 16, 3, 1), (512, 512, 4, 3, 1), (512, 512, 2, 3, 1),
    (64, 64, 32, 3, 1), (16, 16, 32, 3, 1), (32, 32, 16, 3, 1), (64, 64, 8, 3, 1),
)  # fmt: skip
# ResNet-50 on 224 x 224 pixels.
RESNET50: tuple[Shape, ...] = (
    (64, 64, 56, 1, 1), (64, 64, 56, 3, 1), (64, 256, 56, 1, 1), (256, 64, 56, 1, 1),
    (256, 128, 56, 1, 1), (128, 128, 56, 3, 2), (128, 512, 28, 1, 1), (256, 512, 56, 1, 2),
    (512, 128, 28, 1, 1), (128, 128, 28, 3, 1), (512, 256, 28, 1, 1), (256, 256, 28, 3, 2),
    (256, 1024, 14, 1, 1), (512, 1024, 28, 1, 2), (1024, 256, 14, 1, 1), (256, 256, 14, 3, 1),
    (1024, 512, 14, 1, 1), (512, 512, 14, 3, 2), (512, 2048, 7, 1, 1), (1024, 2048, 14, 1, 2),
    (2048, 512, 7, 1, 1), (512, 512, 7, 3, 1),
)  # fmt: skip
# Of WRN-28-10 and ResNet-50: most of what a GPU computes, and where it is busy with products.
WIDE: tuple[Shape, ...] = (
    (640, 640, 8, 3, 1), (320, 320, 16, 3, 1), (160, 160, 32, 3, 1), (256, 256, 14, 3, 1),
    (1024, 256, 14, 1, 1),
)  # fmt: skip
# By the names they have in tables of a GPU, in order of worth, as time may be over before the end:
# methods, and parameters that are not the default ones.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "pixels": ("pixels", {}),
    "int8": ("int8", {}),
    "fp8": ("fp8", {}),
    "phase": ("phase", {}),
    "prune": ("prune", {}),
    "topk": ("topk", {}),
    "crs": ("crs", {}),
    "swat": ("swat", {}),
    "swat channels": ("swat", {"structure": "channel", "sparsity": 0.5}),
}
GRADIENTS = (Gradient.WEIGHT, Gradient.INPUT, Gradient.FORWARD)
# To try the flow.
TINY: tuple[Shape, ...] = ((16, 16, 8, 3, 1), (16, 32, 8, 3, 2))
# What has the size of a product.
_RESULT = {Gradient.FORWARD: "grad", Gradient.INPUT: "input", Gradient.WEIGHT: "weight"}
NAMED = {"ga": GA, "resnet50": RESNET50, "wide": WIDE, "tiny": TINY}


def sizes(shape: Shape, batch: int) -> dict[str, tuple[int, int, int, int]]:
    """Return the sizes of input, weight and output gradient."""
    channels, filters, side, kernel, stride = shape
    out = (side + 2 * (kernel // 2) - kernel) // stride + 1
    return {
        "grad": (batch, filters, out, out),
        "input": (batch, channels, side, side),
        "weight": (filters, channels, kernel, kernel),
    }


def operands(shape: Shape, batch: int, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Return what training shows: activations behind a ReLU, gradients of uneven channels."""
    torch.manual_seed(0)
    made = {name: torch.randn(size, device=device) for name, size in sizes(shape, batch).items()}
    made["input"].relu_()
    made["grad"] *= torch.rand(1, shape[1], 1, 1, device=device)
    return {name: x.to(dtype, memory_format=torch.channels_last) for name, x in made.items()}


def geometry(shape: Shape) -> ConvGeometry:
    """Return strides and padding: as much as keeps the size, but for the stride."""
    padding, stride = shape[3] // 2, shape[4]
    return ConvGeometry((stride,) * 2, (padding,) * 2, (1, 1), False, (0, 0), 1)


def site(shape: Shape, given: dict[str, Tensor], gradient: Gradient) -> Site:
    """Return the site of a gradient."""
    grad, x, weight = given["grad"], given["input"], given["weight"]
    shapes = (tuple(x.shape), tuple(weight.shape), tuple(grad.shape))
    # Of what `convolution_backward` returns.
    place = {Gradient.INPUT: 0, Gradient.WEIGHT: 1}.get(gradient)
    result = tuple(given[_RESULT[gradient]].shape)
    return Site(
        "conv", "conv", gradient, "convolution", "node", place, 1, shapes, result,
        str(grad.dtype).removeprefix("torch."), grad.dtype.itemsize, geometry(shape),
        device=grad.device.type,
    )  # fmt: skip


def parameters(method: Method) -> Any:
    """Return a method's own parameters, without its limit on small layers."""
    return _everywhere(method.params())


def method_of(name: str) -> tuple[Method, Any]:
    """Return a method of the table, and its parameters."""
    registered, given = METHODS[name]
    method = graphpass.methods()[registered]
    return method, _everywhere(method.make_params(given))


def _everywhere(params: Any) -> Any:
    return replace(params, min_positions=1) if hasattr(params, "min_positions") else params


def has_form(method: Method, of: Site, params: Any) -> bool:
    """Return whether a method can compute a gradient, be it slower than the vendor."""
    if of.gradient not in method.gradients:
        return False
    rejected = method.reject(of, params)
    return rejected is None or rejected.reason.name == "NOT_CHEAPER"


def lower(method: Method, params: Any, of: Site, given: dict[str, Tensor], seed: Tensor) -> Tensor:
    """Return a gradient by a method."""
    template = given[_RESULT[of.gradient]]
    values = [given[name] for name in method.operands(of, params)]
    return method.lower(of, params, template, seed, salt_of(of), *values)


def exact(shape: Shape, given: dict[str, Tensor], gradients: Sequence[Gradient]) -> Run:
    """Return what computes gradients, or the forward product, by the vendor's library."""
    grad, x, weight = given["grad"], given["input"], given["weight"]
    mask = [Gradient.INPUT in gradients, Gradient.WEIGHT in gradients, False]
    conv = geometry(shape)
    if Gradient.FORWARD in gradients:
        return lambda: torch.ops.aten.convolution(
            x, weight, None, conv.stride, conv.padding, conv.dilation, False, [0, 0], 1
        )
    return lambda: torch.ops.aten.convolution_backward(
        grad, x, weight, None, conv.stride, conv.padding, conv.dilation, False, [0, 0], 1, mask
    )
