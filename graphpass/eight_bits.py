"""Products of two operands that are rounded to 8 bits at random: what such methods share.

A method says how a value is rounded and what the variance of that is; here stand the problem as a
convolution of images, the draws, the exact product of what was rounded, cost and noise. Values are
rounded independently, so the noise of a product is the sum, over all products of a value a and a
value b that it adds up, of Var(a) b^2 + a^2 Var(b) + Var(a) Var(b).
"""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from codegen import draws as random_draws
from codegen import int8
from cost_model import Cost, Dim, KernelCost, element_count, reduce
from graphpass.errors import Reason, Rejected
from graphpass.kernels_of import mover, product, shared_name
from graphpass.site import Gradient, Site

aten = torch.ops.aten

Border = tuple[list[int], list[int]]

# Of the two operands of each product.
NAMES = {
    Gradient.FORWARD: ("input", "weight"),
    Gradient.INPUT: ("grad", "weight"),
    Gradient.WEIGHT: ("grad", "input"),
}
# One hashed uniform of about 25 integer operations, then a product, two conversions and a sum.
_FLOPS_PER_VALUE = 30
_IMAGE_AXES = 2
_CONV_RANK = 4


@dataclass(frozen=True, slots=True)
class Problem:
    """A site as a convolution of images: a linear layer is one of a single row, with 1x1 kernels.

    Attributes:
        first: the output gradient, [B, Co, OH, OW]; forward, the input [B, Ci, IH, IW].
        second: the input, or the weight [Co, Ci/groups, KH, KW].
        out_size: the output's size.
        size: the input's size.
        kernel: the kernel's spatial sizes.
        geometry: stride, padding and dilation.
        groups: groups of channels.
    """

    first: Tensor
    second: Tensor
    out_size: list[int]
    size: list[int]
    kernel: list[int]
    geometry: tuple[list[int], list[int], list[int]]
    groups: int

    @property
    def images(self) -> tuple[Tensor, Tensor]:
        """Both operands."""
        return self.first, self.second

    @property
    def sizes(self) -> tuple[Any, ...]:
        """What kernels are told of the problem."""
        return self.out_size, self.size, self.kernel, *self.geometry, self.groups

    def borders(self, gradient: Gradient) -> tuple[Border, Border]:
        """Return what kernels want the operands to be bordered with."""
        axes = self.size[2:], self.out_size[2:], self.kernel, *self.geometry
        grad, input_ = int8.grad_border(*axes), int8.input_border(*axes)
        none = ([0, 0], [0, 0])
        return {
            Gradient.FORWARD: (input_, none),
            Gradient.INPUT: (grad, none),
            Gradient.WEIGHT: (grad, input_),
        }[gradient]


def problem_of(site: Site, template: Tensor, first: Tensor, second: Tensor) -> Problem:
    """Return the problem of a site.

    Args:
        site: a product of a convolution or of a linear layer.
        template: the result's shape.
        first: the output gradient or the input, or the left factor.
        second: the input or the weight, or the right factor.
    """
    if site.conv is None:
        # [rows, channels] -> [1, channels, 1, rows]
        rows = first.t() if site.gradient is Gradient.WEIGHT else first
        image = rows.t()[None, :, None, :]
        # The weight is [Co, Ci]; as a factor it stands transposed in the forward product.
        other = {
            Gradient.FORWARD: lambda: second.t()[:, :, None, None],
            Gradient.INPUT: lambda: second[:, :, None, None],
            Gradient.WEIGHT: lambda: second.t()[None, :, None, :],
        }[site.gradient]()
        inner = first.shape[1] if site.gradient is Gradient.FORWARD else second.shape[1]
        outer = other.shape[0] if site.gradient is not Gradient.WEIGHT else image.shape[1]
        length = image.shape[3]
        plain = ([1, 1], [0, 0], [1, 1])
        return Problem(image, other, [1, outer, 1, length], [1, inner, 1, length], [1, 1], plain, 1)
    conv = site.conv
    x, w, y = {
        Gradient.FORWARD: (first, second, template),
        Gradient.INPUT: (template, second, first),
        Gradient.WEIGHT: (second, template, first),
    }[site.gradient]
    geometry = list(conv.stride), list(conv.padding), list(conv.dilation)
    sizes = list(y.shape), list(x.shape), list(w.shape[2:])
    return Problem(first, second, *sizes, geometry, conv.groups)


def draw(site: Site, params: Any, template: Tensor, seed: Tensor, salt: int) -> Tensor:
    """Return one uniform number for each value of the first operand, then of the second."""
    del params, salt
    counts = (element_count(shape) for shape in _read(site))
    return torch.cat(
        [
            random_draws.coarse(seed, int(count), salt)
            for count, salt in zip(counts, salts(site), strict=True)
        ]
    ).to(template.device)


def salts(site: Site) -> tuple[int, int]:
    """Return numbers that tell apart the draws of the layer's tensors, whatever the gradient."""
    number = f".{site.number}" if site.number > 1 else ""
    names = (f"{site.name}:{name}{number}" for name in NAMES[site.gradient])
    first_salt, second_salt = (zlib.crc32(name.encode()) & 0x3FFFFFFF for name in names)
    return first_salt, second_salt


def reference(
    site: Site,
    template: Tensor,
    draws: Tensor,
    operands: tuple[Tensor, Tensor],
    rounded: Callable[[str, Tensor, Tensor], Tensor],
) -> Tensor:
    """Return the exact product of the rounded operands.

    Args:
        site: a product of a convolution or of a linear layer.
        template: the result's shape.
        draws: one uniform number for each value; those of an image in the order [B, H, W, C].
        operands: as `problem_of` takes them.
        rounded: (name of the operand, values, one draw a value) -> values.
    """
    problem = problem_of(site, template, *operands)
    values = []
    for name, value, uniform in zip(
        NAMES[site.gradient],
        problem.images,
        draws.split([operand.numel() for operand in operands]),
        strict=True,
    ):
        batch, channels, *image = value.shape
        order = uniform.view(batch, *image, channels).permute(0, 3, 1, 2)
        values.append(rounded(name, value, order).to(template.dtype))
    return finished(site, template, _product(site, problem, *values))


def cost(
    site: Site, method: str, kinds: Mapping[Gradient, str], dtype: str
) -> tuple[KernelCost, ...]:
    """Return the cost of rounding both operands, and of the product of bytes.

    Args:
        site: a product of a convolution or of a linear layer.
        method: its name, which begins that of the rounding kernel.
        kinds: what computes each product.
        dtype: what that multiplies.
    """
    exact, rounding = site.cost, list[KernelCost]()
    counts = [element_count(shape) for shape in _read(site)]
    for name, count in zip(NAMES[site.gradient], counts, strict=True):
        rounding += bytes_of(site, method, name, count)
    # Operands are read as bytes; the result is written as it always is.
    cost = Cost(exact.flops, sum(counts), exact.bytes_written)
    return (*rounding, product(site, kinds[site.gradient], cost, dtype))


def bytes_of(site: Site, method: str, name: str, count: Dim) -> tuple[KernelCost, KernelCost]:
    """Return the cost of making bytes of an operand, by its name, of so many values."""
    # It is read for its largest magnitude, ...
    largest = reduce(count, 1, site.itemsize)
    shared = shared_name(f"{method} maximum", site, name)
    maximum = mover("absolute_max", largest, site.dtype, shared)
    # ... and once more to be written as bytes.
    shared = shared_name(f"{method} bytes", site, name)
    rounding = rounding_cost(count, site.itemsize)
    return maximum, mover(f"{method}_round", rounding, site.dtype, shared)


def rounding_cost(count: Dim, itemsize: int) -> Cost:
    """Return the cost of rounding so many values to bytes."""
    return Cost(count * _FLOPS_PER_VALUE, count * itemsize, count)


def reject(site: Site, min_channels: int) -> Rejected | None:
    """Accept products of linear layers and of convolutions of images, with channels enough."""
    if site.conv is None and site.op not in {"mm", "addmm"}:
        return Rejected(Reason.UNSUPPORTED_SHAPE, f"no form for {site.op}")
    if site.conv is not None and (site.conv.transposed or len(site.shapes[0]) != _CONV_RANK):
        return Rejected(Reason.UNSUPPORTED_SHAPE, "no convolution of images")
    if any(dim == 0 for shape in _read(site) for dim in shape):
        return Rejected(Reason.NOT_CHEAPER, "an operand is empty")
    if site.conv is None:
        # Of three axes, the one that is contracted is long, or else the two others are.
        channels = [site.output[1], site.shapes[0][0 if site.gradient is Gradient.WEIGHT else 1]]
    else:
        channels = [shape[1] // site.conv.groups for shape in (site.shapes[0], site.shapes[2])]
    thin = [count for count in channels if isinstance(count, int) and count < min_channels]
    if thin:
        return Rejected(Reason.NOT_CHEAPER, f"{thin[0]} channels, needs {min_channels}")
    return None


def operands(site: Site, params: Any) -> tuple[str, ...]:
    """Return the names of the two operands."""
    del params
    if site.conv is None:
        return ("left", "right")
    return NAMES[site.gradient]


def noise(
    site: Site, operands: tuple[Tensor, Tensor], variance: Callable[[str, Tensor], Tensor]
) -> Tensor:
    """Return the sum over the result of the variances, as the module's text has them.

    Summed over the channels that only the result has, a product needs one channel of either side.

    Args:
        site: a product of a convolution or of a linear layer.
        operands: as `problem_of` takes them.
        variance: (name of the operand, values) -> that of each value's rounding.
    """
    template = torch.empty(()).expand(tuple(map(int, site.output)))
    problem = problem_of(site, template, *operands)
    names = NAMES[site.gradient]
    square = [value.square() for value in problem.images]
    spread = [variance(name, x) for name, x in zip(names, problem.images, strict=True)]
    with_first = _product(site, problem, spread[0], square[1] + spread[1])
    return with_first.sum() + _product(site, problem, square[0], spread[1]).sum()


def finished(site: Site, template: Tensor, result: Tensor) -> Tensor:
    """Return the result of the convolution as the site has it."""
    if site.conv is None:
        # [N, K, 1, 1] or [1, K, 1, M]
        result = result[:, :, 0, 0] if site.gradient is Gradient.WEIGHT else result[0, :, 0].t()
    return result.to(template.dtype)


def _read(site: Site) -> tuple[Any, ...]:
    """Return the shapes of the operands."""
    if site.conv is None:
        return site.shapes
    x, w, y = site.shapes
    shapes = {"input": x, "weight": w, "grad": y}
    return tuple(shapes[name] for name in NAMES[site.gradient])


def _product(site: Site, problem: Problem, first: Tensor, second: Tensor) -> Tensor:
    """Return the exact product of two operands."""
    if site.gradient is Gradient.FORWARD:
        result: Tensor = aten.convolution(
            first, second, None, *problem.geometry, False, [0] * _IMAGE_AXES, problem.groups
        )
        return result
    weight = site.gradient is Gradient.WEIGHT
    size = problem.size
    if weight:
        size = [problem.out_size[1], problem.size[1] // problem.groups, *problem.kernel]
    missing = torch.empty(size, dtype=first.dtype, device=first.device)
    x, w = (second, missing) if weight else (missing, second)
    gradient: Tensor = aten.convolution_backward(
        first, x, w, None, *problem.geometry, False, [0] * _IMAGE_AXES, problem.groups,
        [not weight, weight, False],
    )[1 if weight else 0]  # fmt: skip
    return gradient
