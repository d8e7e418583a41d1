"""One product run alone, on made-up operands: what calibration and measuring a site have in common.

Operands are what training shows: activations behind a ReLU, gradients of very different channels;
images are channels_last, as Inductor has them on a CPU whatever the model's format is.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, partial
from typing import Any

import sympy
import torch
from torch import Tensor
from torch._inductor.compile_fx import compile_fx
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from cost_model import Shape
from graphpass.method import Method, salt_of
from graphpass.site import FACTORS, Gradient, Site
from graphpass.state import State, with_state

aten = torch.ops.aten
Run = Callable[[], object]

_IMAGE_RANK = 4
# A number that no size of a tensor divides.
_POOL = 1_000_003


def bound(site: Site, hints: Mapping[str, int]) -> Site:
    """Return a site with the value of every symbolic size in its place.

    Raises:
        KeyError: if a symbol has no value.
    """

    def known(shape: Shape) -> Shape:
        return tuple(
            int(dim.xreplace({s: sympy.Integer(hints[str(s)]) for s in dim.free_symbols}))
            if isinstance(dim, sympy.Expr)
            else dim
            for dim in shape
        )

    return replace(site, shapes=tuple(map(known, site.shapes)), output=known(site.output))


def operands(site: Site, device: str = "cpu") -> dict[str, Tensor]:
    """Return operands by the names that methods use: of a convolution, those of all its products.

    Args:
        site: a product whose sizes are all known.
        device: where they are to be.
    """
    dtype = getattr(torch, site.dtype)
    random = partial(_numbers, device)
    if site.conv is not None:
        x, weight, grad = (random(shape) for shape in site.shapes)
        made = {"input": x.relu(), "weight": weight, "grad": grad * _scales(grad)}
        return {name: _laid_out(tensor.to(dtype)) for name, tensor in made.items()}
    if len(site.shapes) != 2:
        return {
            name: random(shape).to(dtype)
            for name, shape in zip(("query", "key", "value"), site.shapes, strict=True)
        }
    left, right = (random(shape).to(dtype) for shape in site.shapes)
    # A layer holds x and the gradient as [rows, channels], and its weight as [out, in].
    if site.gradient is Gradient.WEIGHT:
        left = left.mT.contiguous().mT
    elif site.gradient is Gradient.FORWARD:
        right = right.mT.contiguous().mT
    made = {"left": left, "right": right}
    if site.outer is not None:
        contracted, inner = site.shapes[0][1], site.output[site.outer]
        rows, columns = site.output[1 - site.outer], contracted
        if site.gradient is Gradient.WEIGHT:
            rows, columns = columns, rows
        factors = random((rows, inner)), random((columns, inner)).mT
        made |= {name: of.to(dtype) for name, of in zip(FACTORS, factors, strict=True)}
    return made


def just_computed(site: Site, given: Mapping[str, Tensor]) -> Tensor:
    """Return the operand that a step has computed last: the output gradient, forward the input."""
    if site.conv is None:
        return next(iter(given.values()))
    return given["input" if site.gradient is Gradient.FORWARD else "grad"]


def exact(site: Site, given: Mapping[str, Tensor]) -> Run:
    """Return what computes a product as Inductor has it computed: by the vendor's kernel.

    Args:
        site: the product.
        given: its operands.
    """
    if site.op == "attention":
        return _attention(site, *given.values())
    if site.conv is None:
        left, right = given["left"], given["right"]
        return lambda: torch.matmul(left, right)
    conv, grad, x, weight = site.conv, given["grad"], given["input"], given["weight"]
    geometry = (
        conv.stride, conv.padding, conv.dilation, conv.transposed, conv.output_padding, conv.groups
    )  # fmt: skip
    if site.gradient is Gradient.FORWARD:
        return lambda: aten.convolution(x, weight, None, *geometry)
    mask = [site.gradient is Gradient.INPUT, site.gradient is Gradient.WEIGHT, False]
    return lambda: aten.convolution_backward(grad, x, weight, None, *geometry, mask)


def approximate(site: Site, method: Method, params: Any, given: Mapping[str, Tensor]) -> Run:
    """Return what computes a product by a method, compiled as it is in a step."""
    lowered, seed, values = _lowered(site, method, params, given)
    with torch.no_grad():
        # Traced as it is in a training step: Dynamo would break it into many small graphs.
        traced = make_fx(lowered)(seed, *values)
        compiled: Any = compile_fx(traced, [seed, *values])

    def run() -> object:
        with torch.no_grad():
            return compiled(seed, *values)

    return run


def uncompiled(site: Site, method: Method, params: Any, given: Mapping[str, Tensor]) -> Run:
    """Return what computes a product by a method, one operation after the other.

    Nothing has to be compiled for it but kernels of ours, which a step needs anyway. What plain
    torch does around them is not fused, so it takes rather longer than in a step.
    """
    lowered, seed, values = _lowered(site, method, params, given)

    def run() -> object:
        with torch.no_grad():
            return lowered(seed, *values)

    return run


def kernel_calls(
    site: Site, method: Method, params: Any, given: Mapping[str, Tensor]
) -> dict[str, list[Run]]:
    """Return what calls each kernel of ours that a method is lowered to, by kind, in their order.

    Arguments are those that the kernels get from each other; on fake tensors nothing is run, but
    the kernels begin to be built.
    """
    lowered, seed, values = _lowered(site, method, params, given)
    recorder = _Recorder()
    with torch.no_grad(), recorder:
        lowered(seed, *values)
    return recorder.calls


class _Recorder(TorchDispatchMode):
    """Writes down the calls of our kernels, and lets everything happen."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, list[Run]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "approx":
            name = func._schema.name.split("::")[1]
            self.calls.setdefault(name, []).append(partial(func, *args))
        return func(*args, **(kwargs or {}))


def _lowered(
    site: Site, method: Method, params: Any, given: Mapping[str, Tensor]
) -> tuple[Callable[..., tuple[Tensor]], Tensor, list[Tensor]]:
    """Return a method's lowering, a seed and its operands."""
    values = [given[name] for name in method.operands(site, params)]
    device = values[0].device if values else torch.device("cpu")
    template, seed = template_of(site, device), torch.zeros((), dtype=torch.int64, device=device)

    def lowered(seed: Tensor, *values: Tensor) -> tuple[Tensor]:
        # The step is the first one, whose number is the seed's.
        slots = method.state(site, params)
        lower = with_state(method.lower, State.fresh(slots, seed) if slots else None)
        return (lower(site, params, template, seed, salt_of(site), *values),)

    return lowered, seed, values


def template_of(site: Site, device: torch.device | str = "cpu") -> Tensor:
    """Return a tensor of the result's shape and layout, without values."""
    dtype = getattr(torch, site.dtype)
    return _laid_out(torch.empty(_ints(site.output), dtype=dtype, device=device))


def _attention(site: Site, query: Tensor, key: Tensor, value: Tensor) -> Run:
    attend = aten._scaled_dot_product_flash_attention_for_cpu
    if site.gradient is Gradient.FORWARD:
        return lambda: attend(query, key, value)
    out, statistics = attend(query, key, value)
    return lambda: aten._scaled_dot_product_flash_attention_for_cpu_backward(
        out, query, key, value, out, statistics, 0.0, False
    )


def _numbers(device: str, shape: Shape) -> Tensor:
    """Return normal values; they recur, as drawing them takes longer than most products."""
    count = math.prod(_ints(shape))
    pool = _pool(device)
    return pool.expand(-(-count // len(pool)), -1).reshape(-1)[:count].view(_ints(shape))


@cache
def _pool(device: str) -> Tensor:
    # It outlives the mode that operands may be made in, to compile for them.
    with unset_fake_temporarily():
        return torch.randn(_POOL, generator=torch.Generator().manual_seed(0)).to(device)


def _scales(grad: Tensor) -> Tensor:
    # Not drawn by torch's own generator, which is the training's.
    return _numbers(grad.device.type, (1, grad.shape[1], *[1] * (grad.dim() - 2))).abs()


def _laid_out(tensor: Tensor) -> Tensor:
    if tensor.dim() == _IMAGE_RANK:
        return tensor.contiguous(memory_format=torch.channels_last)
    return tensor


def _ints(shape: Shape) -> list[int]:
    return [int(dim) for dim in shape]
