"""What is run to calibrate a machine: each kernel of the cost model at shapes of many sizes.

The shapes are like those of training, and none that the benchmarks judge predictions by: images of
56, 28, 14, 7 and 3 pixels a side, batches of 96 and less, rows of 3000 and less.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch._inductor.compile_fx import compile_fx
from torch.fx.experimental.proxy_tensor import make_fx

from codegen.kernel import kernels
from cost_model import Cost, KernelCost, Shape
from graphpass import kernels_of, traffic, trial
from graphpass.method import methods
from graphpass.site import ConvGeometry, Gradient, Site
from graphpass.timing import fill_caches, fill_caches_but, nothing
from graphpass.trial import Run

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
    (96, 32, 32, 28, 3, 1, 1), (96, 64, 128, 14, 3, 1, 1), (96, 256, 512, 7, 3, 2, 1),
    (96, 128, 512, 14, 1, 1, 1), (96, 512, 128, 14, 1, 1, 1), (96, 128, 256, 28, 1, 2, 1),
    (96, 16, 32, 28, 1, 2, 1), (48, 16, 128, 28, 3, 1, 1), (48, 64, 64, 56, 3, 1, 1),
    (24, 256, 64, 56, 1, 1, 1), (96, 1024, 2048, 7, 1, 2, 1), (96, 512, 512, 3, 1, 1, 1),
    (96, 2048, 512, 3, 1, 1, 1), (48, 256, 256, 14, 3, 2, 1), (96, 128, 128, 7, 3, 1, 1),
    (24, 64, 256, 56, 1, 1, 1), (48, 128, 128, 28, 3, 2, 1),
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
    (96, 2048, 100), (1500, 384, 1536), (300, 384, 384), (6000, 192, 768), (6000, 768, 192),
    (12000, 192, 192), (6000, 384, 384), (6000, 128, 384), (96, 1000, 10), (96, 100, 10),
)  # fmt: skip
OUR_LINEARS = ((3000, 192, 768), (1000, 768, 768), (96, 768, 768))
# Sequences, left rows, contracted and right columns of batches of products.
BATCHES = ((192, 48, 48, 48), (384, 48, 48, 24), (96, 192, 48, 192), (96, 192, 192, 48))
# Samples, heads, positions and channels a head of attention.
ATTENTIONS = ((96, 4, 48, 48), (96, 3, 96, 64), (24, 6, 192, 64), (8, 4, 512, 32))
# Maps that are normalised, larger and smaller than a processor's cache, and what is found there:
# other data, or the maps. Of several kernels in a row only the first meets other data, so that of
# smaller maps more would be promised than an exact step keeps.
NORMALISED = {
    kernels_of.FUSED_COLD: ((96, 64, 28, 28), (96, 64, 7, 7)),
    kernels_of.FUSED_WARM: (
        (96, 64, 28, 28), (96, 16, 56, 56), (96, 16, 28, 28), (96, 32, 14, 14), (96, 64, 7, 7),
    ),
}  # fmt: skip
# Bytes of what is only moved, from what a call costs more than to what no cache holds.
MOVED_BYTES = tuple(3 * 2**power for power in range(11, 28, 2))


@dataclass(frozen=True, slots=True)
class Workload:
    """Kernels to be timed, which are run one after the other.

    Attributes:
        kernels: what each is to the cost model.
        runs: runs each once.
        count: how many such kernels each of them runs.
        before: what is done before: what is in the caches then.
    """

    kernels: tuple[KernelCost, ...]
    runs: tuple[Run, ...]
    count: int = 1
    before: Run = fill_caches


Make = Callable[[], list[Workload]]


def vendor(dtype: torch.dtype) -> list[Make]:
    """Return what makes the vendor's products ready, shape by shape; each holds its operands."""
    return [
        *(partial(_products, _vendor, _convolution, shape, dtype) for shape in CONVOLUTIONS),
        *(partial(_products, _vendor, _linear, shape, dtype) for shape in LINEARS),
        *(partial(_products, _vendor, _batch, shape, dtype) for shape in BATCHES),
        *(partial(_products, _vendor, _attention, (shape,), dtype) for shape in ATTENTIONS),
    ]


def ours(dtype: torch.dtype) -> list[Make]:
    """Return what makes the kernels of all methods ready, shape by shape."""
    return [
        *(partial(_products, _ours, _convolution, shape, dtype) for shape in OUR_CONVOLUTIONS),
        *(partial(_products, _ours, _linear, shape, dtype) for shape in OUR_LINEARS),
    ]


def _products(
    ready: Callable[[list[Site]], list[Workload]],
    sites: Callable[..., list[Site]],
    shape: tuple[Any, ...],
    dtype: torch.dtype,
) -> list[Workload]:
    return ready(sites(*shape, dtype))


def moving(dtype: torch.dtype) -> list[Workload]:
    """Return the kernels that move bytes and hardly compute, at every size."""
    name, size = str(dtype).removeprefix("torch."), dtype.itemsize
    other = torch.bfloat16 if dtype is torch.float32 else torch.float32
    made = []
    for count in MOVED_BYTES:
        numbers = max(1, count // size // 3)
        x, y, result = (torch.ones(numbers, dtype=dtype) for _ in range(3))
        converted = torch.ones(numbers, dtype=other)
        moved = numbers * size
        runs: dict[str, tuple[Cost, Run]] = {
            "elementwise": (Cost(numbers, 2 * moved, moved), partial(torch.add, x, y, out=result)),
            "reduce": (Cost(numbers, moved, size), x.sum),
            "fill": (Cost(0, 0, moved), partial(x.fill_, 1)),
            "convert": (Cost(0, moved, numbers * other.itemsize), partial(converted.copy_, x)),
        }
        for kind, (cost, run) in runs.items():
            made.append(Workload((kernels_of.mover(kind, cost, name),), (run,)))
    return made


def fused(dtype: torch.dtype) -> list[Workload]:
    """Return batch normalisation with ReLU, forward and backward, as Inductor compiles it.

    It stands for all that a step computes and that is no product: several kernels that read large
    tensors point by point and reduce them. Each counts as one of their mean size. What is in the
    caches before makes a difference: see `HardwarePricing.rest`.

    Args:
        dtype: of what is normalised; it is computed in float32, as autocast has it.
    """
    made = []
    for shape in dict.fromkeys(chain.from_iterable(NORMALISED.values())):
        x, grad = (
            torch.randn(shape).to(dtype, memory_format=torch.channels_last) for _ in range(2)
        )
        with torch.no_grad():
            traced = make_fx(_normalised)(x, grad)
            run: Any = compile_fx(traced, [x, grad])
            run(x, grad)
        moved = traffic.kernel_bytes(traced.graph)
        large = [count for count in moved if count > x.nbytes]
        cost = Cost(0, sum(moved) // len(large), 0)
        for kind in (kind for kind, shapes in NORMALISED.items() if shape in shapes):
            kernel = kernels_of.mover(kind, cost, str(dtype).removeprefix("torch."))
            before = nothing if kind == kernels_of.FUSED_WARM else fill_caches
            made.append(Workload((kernel,), (partial(run, x, grad),), len(large), before))
    return made


def _normalised(x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    axes, count = (0, 2, 3), x.numel() // x.shape[1]
    wide = x.float()
    variance, mean = torch.var_mean(wide, axes, correction=0, keepdim=True)
    scale = (variance + 1e-5).rsqrt()
    normal = (wide - mean) * scale
    masked = torch.where(normal > 0, grad.float(), 0.0)
    total, aligned = masked.sum(axes, keepdim=True), (masked * normal).sum(axes, keepdim=True)
    back = scale * (masked - (total + normal * aligned) / count)
    return normal.relu().to(x.dtype), back.to(x.dtype)


def _convolution(
    batch: int, into: int, out: int, size: int, kernel: int, stride: int, groups: int,
    dtype: torch.dtype,
) -> list[Site]:  # fmt: skip
    """Return the three products of a convolution."""
    padding = kernel // 2
    side = (size + 2 * padding - kernel) // stride + 1
    x, y = (batch, into, size, size), (batch, out, side, side)
    weight = (out, into // groups, kernel, kernel)
    geometry = ConvGeometry((stride,) * 2, (padding,) * 2, (1, 1), False, (0, 0), groups)
    outputs = {Gradient.FORWARD: y, Gradient.INPUT: x, Gradient.WEIGHT: weight}
    return [
        _site("convolution", gradient, (x, weight, y), output, dtype, geometry)
        for gradient, output in outputs.items()
    ]


def _linear(rows: int, into: int, out: int, dtype: torch.dtype) -> list[Site]:
    """Return the three products of a linear layer."""
    factors = {
        Gradient.FORWARD: ((rows, into), (into, out)),
        Gradient.INPUT: ((rows, out), (out, into)),
        Gradient.WEIGHT: ((out, rows), (rows, into)),
    }
    return [
        _site("mm", gradient, (left, right), (left[0], right[1]), dtype)
        for gradient, (left, right) in factors.items()
    ]


def _batch(batch: int, rows: int, inner: int, columns: int, dtype: torch.dtype) -> list[Site]:
    left, right = (batch, rows, inner), (batch, inner, columns)
    output = (batch, rows, columns)
    return [_site("bmm", Gradient.FORWARD, (left, right), output, dtype)]


def _attention(shape: tuple[int, ...], dtype: torch.dtype) -> list[Site]:
    gradients = (Gradient.FORWARD, Gradient.INPUT)
    return [_site("attention", gradient, (shape,) * 3, shape, dtype) for gradient in gradients]


def _site(
    op: str, gradient: Gradient, shapes: tuple[Shape, ...], output: Shape, dtype: torch.dtype,
    conv: ConvGeometry | None = None,
) -> Site:  # fmt: skip
    name = str(dtype).removeprefix("torch.")
    return Site(
        "layer", "layer", gradient, op, "node", None, 1, shapes, output, name, dtype.itemsize, conv
    )


def _vendor(sites: list[Site]) -> list[Workload]:
    # The products of a convolution have one set of operands.
    shared = trial.operands(sites[0])
    return [
        Workload(
            kernels_of.exact(site),
            (trial.exact(site, shared if site.conv else trial.operands(site)),),
        )
        for site in sites
    ]


def _ours(sites: list[Site]) -> list[Workload]:
    """Return our kernels at the arguments that the methods call them with, product by product."""
    made: list[Workload] = []
    known: set[str] = set()
    shared = trial.operands(sites[0])
    for site in sites:
        given = shared if site.conv else trial.operands(site)
        before = partial(fill_caches_but, trial.just_computed(site, given))
        for method in methods().values():
            params = method.params()
            if site.gradient not in method.gradients or method.reject(site, params) is not None:
                continue
            costs = method.cost(site, params)
            if not any(cost.kind in kernels() for cost in costs):
                continue
            # Costs stand in the order of the calls.
            calls = trial.kernel_calls(site, method, params, given)
            chain = [(cost, calls[cost.kind].pop(0)) for cost in costs if calls.get(cost.kind)]
            # What several products and methods have in common is timed once.
            new = {f"{cost.kind} {cost.cost}" for cost, _ in chain} - known
            if new:
                timed, runs = zip(*chain, strict=True)
                made.append(Workload(timed, runs, before=before))
                known |= new
    return made
