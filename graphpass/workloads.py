"""What is run to calibrate a machine: each kernel of the cost model at shapes of many sizes.

The shapes are like those of training, and none that the benchmarks judge predictions by: images of
56, 28, 14, 7 and 3 pixels a side, batches of 96 and less, rows of 3000 and less.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from codegen.kernel import kernels
from cost_model import Cost, KernelCost
from graphpass import kernels_of
from graphpass.method import methods, salt_of
from graphpass.site import ConvGeometry, Gradient, Site

aten = torch.ops.aten
Run = Callable[[], object]
DTYPES = (torch.float32, torch.bfloat16)

# Batch, channels in and out, pixels a side, taps a side, stride, groups.
CONVOLUTIONS = (
    (96, 16, 16, 28, 3, 1, 1), (96, 16, 32, 28, 3, 2, 1), (96, 32, 32, 14, 3, 1, 1),
    (48, 64, 64, 28, 3, 1, 1), (96, 64, 64, 7, 3, 1, 1), (96, 128, 128, 14, 3, 1, 1),
    (96, 32, 64, 14, 3, 2, 1), (96, 128, 256, 14, 3, 2, 1), (96, 256, 256, 7, 3, 1, 1),
    (24, 512, 512, 7, 3, 1, 1), (96, 512, 512, 3, 3, 1, 1), (96, 3, 16, 28, 3, 1, 1),
    (96, 3, 64, 28, 3, 1, 1), (96, 256, 64, 14, 1, 1, 1), (48, 64, 256, 28, 1, 1, 1),
    (96, 256, 512, 14, 1, 2, 1), (96, 1024, 256, 7, 1, 1, 1), (96, 64, 64, 14, 5, 1, 1),
    (96, 16, 16, 56, 3, 1, 1), (96, 16, 16, 14, 3, 1, 1), (24, 128, 128, 28, 3, 1, 1),
    (96, 256, 256, 3, 3, 1, 1), (8, 64, 64, 14, 3, 1, 1), (96, 16, 64, 14, 1, 1, 1),
    (96, 64, 64, 28, 1, 1, 1), (48, 32, 128, 28, 3, 1, 1), (96, 64, 64, 14, 3, 1, 64),
    (24, 3, 64, 56, 7, 2, 1), (96, 512, 512, 2, 3, 2, 1), (24, 256, 256, 28, 1, 1, 1),
    (48, 512, 1024, 7, 1, 2, 1), (48, 64, 128, 28, 1, 2, 1), (48, 256, 1024, 7, 1, 1, 1),
)  # fmt: skip
# Those that our own kernels are measured at; each takes a compilation.
OUR_CONVOLUTIONS = (
    (96, 16, 16, 28, 3, 1, 1), (96, 32, 32, 14, 3, 1, 1), (48, 64, 64, 28, 3, 1, 1),
    (96, 64, 64, 7, 3, 1, 1), (96, 128, 128, 14, 3, 1, 1), (96, 128, 256, 14, 3, 2, 1),
    (24, 512, 512, 7, 3, 1, 1), (96, 512, 512, 3, 3, 1, 1), (48, 64, 256, 28, 1, 1, 1),
    (96, 1024, 256, 7, 1, 1, 1),
)  # fmt: skip
# Rows, inputs and outputs of linear layers.
LINEARS = (
    (96, 64, 10), (96, 512, 10), (96, 768, 768), (96, 3072, 1024), (1000, 192, 192),
    (3000, 192, 768), (3000, 768, 192), (3000, 384, 384), (1000, 768, 768), (3000, 64, 192),
    (96, 2048, 100), (1500, 384, 1536), (300, 384, 384),
)  # fmt: skip
OUR_LINEARS = ((3000, 192, 768), (1000, 768, 768), (96, 768, 768))
# Sequences, left rows, contracted and right columns of batches of products.
BATCHES = ((192, 48, 48, 48), (384, 48, 48, 24), (96, 192, 48, 192), (96, 192, 192, 48))
# Samples, heads, positions and channels a head of attention.
ATTENTIONS = ((96, 4, 48, 48), (96, 3, 96, 64), (24, 6, 192, 64), (8, 4, 512, 32))
# Bytes of what is only moved; none but the last is larger than a processor's cache.
MOVED_BYTES = (2**12, 2**16, 3 * 2**18, 3 * 2**21, 3 * 2**23, 3 * 2**25)


@dataclass(frozen=True, slots=True)
class Workload:
    """Something to be timed.

    Attributes:
        kernel: what it is to the cost model.
        run: runs it once.
    """

    kernel: KernelCost
    run: Run


def vendor(dtype: torch.dtype) -> Iterator[Callable[[], list[Workload]]]:
    """Yield, for every shape, what makes its products ready: operands are held one at a time."""
    for shape in CONVOLUTIONS:
        yield lambda shape=shape: _vendor(*convolution(*shape, dtype=dtype))
    for rows, into, out in LINEARS:
        yield lambda rows=rows, into=into, out=out: _vendor(*linear(rows, into, out, dtype))
    for batch, rows, inner, columns in BATCHES:
        shapes = (batch, rows, inner), (batch, inner, columns)
        yield lambda shapes=shapes: _batched(*shapes, dtype)
    for shape in ATTENTIONS:
        yield lambda shape=shape: _attention(shape, dtype)


def ours(dtype: torch.dtype) -> Iterator[Callable[[], list[Workload]]]:
    """Yield, for every shape, what makes the kernels of all methods ready."""
    for shape in OUR_CONVOLUTIONS:
        yield lambda shape=shape: _ours(*convolution(*shape, dtype=dtype))
    for rows, into, out in OUR_LINEARS:
        yield lambda rows=rows, into=into, out=out: _ours(*linear(rows, into, out, dtype))


def moving(dtype: torch.dtype) -> list[Workload]:
    """Return the kernels that move bytes and hardly compute, at every size."""
    name, size = str(dtype).removeprefix("torch."), dtype.itemsize
    other = torch.bfloat16 if dtype is torch.float32 else torch.float32
    made = []
    for count in MOVED_BYTES:
        numbers = max(1, count // size // 3)
        x, y, result = (torch.ones(numbers, dtype=dtype) for _ in range(3))
        converted = torch.ones(numbers, dtype=other)
        runs: dict[str, tuple[Cost, Run]] = {
            "elementwise": (
                Cost(numbers, 2 * numbers * size, numbers * size),
                lambda x=x, y=y, result=result: torch.add(x, y, out=result),
            ),
            "reduce": (Cost(numbers, numbers * size, size), lambda x=x: x.sum()),
            "fill": (Cost(0, 0, numbers * size), lambda x=x: x.fill_(1)),
            "convert": (
                Cost(0, numbers * size, numbers * other.itemsize),
                lambda x=x, converted=converted: converted.copy_(x),
            ),
        }
        made += [
            Workload(kernels_of.mover(kind, cost, name), run) for kind, (cost, run) in runs.items()
        ]
    return made


def convolution(
    batch: int, into: int, out: int, size: int, kernel: int, stride: int, groups: int,
    dtype: torch.dtype, memory_format: torch.memory_format = torch.channels_last,
) -> tuple[dict[str, Tensor], dict[Gradient, Site]]:  # fmt: skip
    """Return the operands of a convolution, and its three products."""
    padding = kernel // 2
    side = (size + 2 * padding - kernel) // stride + 1
    shapes = (batch, into, size, size), (out, into // groups, kernel, kernel), (
        batch, out, side, side,
    )  # fmt: skip
    x, weight, grad = (
        torch.randn(shape).to(dtype, memory_format=memory_format) for shape in shapes
    )
    geometry = ConvGeometry(
        (stride,) * 2, (padding,) * 2, (1, 1), False, (0, 0), groups
    )
    outputs = dict(zip(_GRADIENTS, (shapes[2], shapes[0], shapes[1]), strict=True))
    sites = {
        gradient: Site(
            "layer", "layer", gradient, "convolution", "node", None, 1, shapes, output,
            str(dtype).removeprefix("torch."), dtype.itemsize, geometry,
        )
        for gradient, output in outputs.items()
    }  # fmt: skip
    return {"input": x.relu(), "weight": weight, "grad": grad}, sites


def linear(
    rows: int, into: int, out: int, dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[Gradient, Site]]:
    """Return the operands of a linear layer, and its three products."""
    x, weight, grad = (
        torch.randn(shape).to(dtype) for shape in ((rows, into), (out, into), (rows, out))
    )
    factors = {
        Gradient.FORWARD: (x, weight.t()),
        Gradient.INPUT: (grad, weight),
        Gradient.WEIGHT: (grad.t(), x),
    }
    sites = {
        gradient: Site(
            "layer", "layer", gradient, "mm", "node", None, 1,
            (tuple(left.shape), tuple(right.shape)), (left.shape[0], right.shape[1]),
            str(dtype).removeprefix("torch."), dtype.itemsize,
        )
        for gradient, (left, right) in factors.items()
    }  # fmt: skip
    return {"input": x, "weight": weight, "grad": grad}, sites


_GRADIENTS = (Gradient.FORWARD, Gradient.INPUT, Gradient.WEIGHT)


def operands_of(
    site: Site, names: tuple[str, ...], operands: dict[str, Tensor]
) -> list[Tensor]:
    """Return the operands of a product, by the names that methods use."""
    if site.conv is not None:
        return [operands[name] for name in names]
    factors = {
        Gradient.FORWARD: (operands["input"], operands["weight"].t()),
        Gradient.INPUT: (operands["grad"], operands["weight"]),
        Gradient.WEIGHT: (operands["grad"].t(), operands["input"]),
    }[site.gradient]
    return [factors[("left", "right").index(name)] for name in names]


def exact_run(site: Site, operands: dict[str, Tensor]) -> Run:
    """Return what computes a product as Inductor has it computed: by the vendor's kernel."""
    if site.conv is None:
        left, right = operands_of(site, ("left", "right"), operands)
        return lambda: torch.mm(left, right)
    conv, grad, x, weight = site.conv, operands["grad"], operands["input"], operands["weight"]
    geometry = (
        conv.stride, conv.padding, conv.dilation, conv.transposed, conv.output_padding, conv.groups
    )  # fmt: skip
    if site.gradient is Gradient.FORWARD:
        return lambda: aten.convolution(x, weight, None, *geometry)
    mask = [site.gradient is Gradient.INPUT, site.gradient is Gradient.WEIGHT, False]
    return lambda: aten.convolution_backward(grad, x, weight, None, *geometry, mask)


def _vendor(operands: dict[str, Tensor], sites: dict[Gradient, Site]) -> list[Workload]:
    return [
        Workload(kernel, exact_run(site, operands))
        for site in sites.values()
        for kernel in kernels_of.exact(site)
    ]


def _batched(left: tuple[int, ...], right: tuple[int, ...], dtype: torch.dtype) -> list[Workload]:
    first, second = torch.randn(left).to(dtype), torch.randn(right).to(dtype)
    site = Site(
        "layer", "layer", Gradient.FORWARD, "bmm", "node", None, 1, (left, right),
        (*left[:2], right[2]), str(dtype).removeprefix("torch."), dtype.itemsize,
    )  # fmt: skip
    return [Workload(kernel, lambda: torch.bmm(first, second)) for kernel in kernels_of.exact(site)]


def _attention(shape: tuple[int, ...], dtype: torch.dtype) -> list[Workload]:
    query, key, value, grad = (torch.randn(shape).to(dtype) for _ in range(4))
    name = str(dtype).removeprefix("torch.")
    forward, backward = (
        Site(
            "layer", "layer", gradient, "attention", "node", None, 1, (shape,) * 3, shape, name,
            dtype.itemsize,
        )
        for gradient in (Gradient.FORWARD, Gradient.INPUT)
    )  # fmt: skip
    attend = aten._scaled_dot_product_flash_attention_for_cpu
    out, statistics = attend(query, key, value)
    runs = {
        forward: lambda: attend(query, key, value),
        backward: lambda: aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, query, key, value, out, statistics, 0.0, False
        ),
    }
    return [Workload(kernel, run) for site, run in runs.items() for kernel in kernels_of.exact(site)]


class _Recorder(TorchDispatchMode):
    """Writes down the calls of our kernels, and lets everything happen."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, list[tuple[Any, ...]]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "approx":
            self.calls.setdefault(func._schema.name.split("::")[1], []).append(args)
        return func(*args, **(kwargs or {}))


def _ours(operands: dict[str, Tensor], sites: dict[Gradient, Site]) -> list[Workload]:
    """Return our kernels at the arguments that the methods call them with."""
    made: dict[tuple[str, str], Workload] = {}
    for method in methods().values():
        for gradient in method.gradients:
            site, params = sites[gradient], method.params()
            if method.reject(site, params) is not None:
                continue
            names = method.operands(site, params)
            recorder = _Recorder()
            template = torch.empty(site.output, dtype=operands["grad"].dtype)
            given = operands_of(site, names, operands)
            with recorder:
                method.lower(site, params, template, torch.tensor(0), salt_of(site), *given)
            costs = [kernel for kernel in method.cost(site, params) if kernel.kind in kernels()]
            for kernel in costs:
                # Costs stand in the order of the calls; what two products share is timed once.
                calls = recorder.calls.get(kernel.kind, [])
                if calls:
                    args, op = calls.pop(0), kernels()[kernel.kind].op
                    key = (kernel.kind, str(kernel.cost))
                    made.setdefault(
                        key, Workload(kernel, lambda op=op, args=args: op(*args))
                    )
    return list(made.values())
