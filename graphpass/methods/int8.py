"""int8: a product from operands rounded to 8 bits at random.

An operand v becomes s * floor(v / s + u) with s = max|v| / 127 and u uniform in [0, 1), one draw a
value; the product of the integers is exact, and scaled by both s. Wu et al., "Training and
Inference with Integers in Deep Neural Networks", 2018 (arXiv:1802.04680), and Banner et al.,
"Scalable Methods for 8-bit Training of Neural Networks", 2018 (arXiv:1805.11046), round gradients
so; the latter keeps the weight gradient's operands wider, which random rounding makes needless.

Unbiased: E[s * floor(v / s + u)] = v, and the two operands are rounded independently, so the
expectation of their product is the product of their expectations. With f the fractional part of
v / s, the variance of a value is s^2 f (1 - f), and that of the product of a and b is
Var(a) b^2 + a^2 Var(b) + Var(a) Var(b); values are rounded independently, so the noise is the sum
of that over all products that the result adds up.

Products of a layer round what they share in the same way, so a compiled graph rounds it once; their
noise is dependent, but each is unbiased. The forward product is unbiased too, but what follows it
is not linear, so that the step's gradient is not: it is only approximated where a plan says so. A
weight gradient from the very bytes that the forward product read is that of what was computed.

Bytes are multiplied four times as fast as float32 where there is VNNI, so it pays wherever the
products cost more than the rounding: from about 16 channels on for both gradients of a layer, from
32 for one.
"""

import zlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from codegen import draws as random_draws
from codegen import int8
from codegen.kernel import call, kernels
from cost_model import Cost, element_count, reduce
from graphpass.errors import ConfigError, Reason, Rejected
from graphpass.method import Method, Prior, Sample, register
from graphpass.site import Gradient, Site

aten = torch.ops.aten

# One hashed uniform of about 25 integer operations, then a product, two conversions and a sum.
_FLOPS_PER_VALUE = 30
_IMAGE_AXES = 2
_CONV_RANK = 4
# Of the two operands of each product.
_NAMES = {
    Gradient.FORWARD: ("input", "weight"),
    Gradient.INPUT: ("grad", "weight"),
    Gradient.WEIGHT: ("grad", "input"),
}


@dataclass(frozen=True, slots=True)
class Params:
    """Parameters of the int8 method.

    Attributes:
        min_channels: least number of channels in and out of a group; thinner layers, such as the
            first of a network, stay exact. 1 applies it everywhere.
    """

    min_channels: int = 8

    def __post_init__(self) -> None:
        """Check the range.

        Raises:
            ConfigError: if a value is out of range.
        """
        value = self.min_channels
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"method 'int8': min_channels={value!r}; give an integer >= 1")


@dataclass(frozen=True, slots=True)
class _Problem:
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
    def borders(self) -> tuple[tuple[list[int], list[int]], tuple[list[int], list[int]]]:
        """What the output gradient and the input are bordered with."""
        axes = self.size[2:], self.out_size[2:], self.kernel, *self.geometry
        return int8.grad_border(*axes), int8.input_border(*axes)


def draw(site: Site, params: Params, template: Tensor, seed: Tensor, salt: int) -> Tensor:
    """Return one uniform number for each value of the first operand, then of the second."""
    del params, salt
    counts = (element_count(shape) for shape in _read(site))
    return torch.cat(
        [
            random_draws.uniform(seed, int(count), salt)
            for count, salt in zip(counts, _salts(site), strict=True)
        ]
    ).to(template.device)


def reference(
    site: Site, params: Params, template: Tensor, draws: Tensor, first: Tensor, second: Tensor
) -> Tensor:
    """Return the exact product of the rounded operands.

    Args:
        site: a product of a convolution or of a linear layer.
        params: parameters of the method.
        template: the result's shape.
        draws: one uniform number for each value; those of an image in the order [B, H, W, C].
        first: the output gradient or the input, or the left factor.
        second: the input or the weight, or the right factor.
    """
    del params
    problem = _problem(site, template, first, second)
    rounded = []
    for value, uniform in zip(
        (problem.first, problem.second), draws.split([first.numel(), second.numel()]), strict=True
    ):
        batch, channels, *image = value.shape
        order = uniform.view(batch, *image, channels).permute(0, 3, 1, 2)
        scale = int8.scale_of(value.abs().amax())
        rounded.append(int8.round_at_random(value, scale, order).to(template.dtype) * scale)
    return _finish(site, template, _product(site, problem, rounded[0], rounded[1]))


def cost(site: Site, params: Params) -> Cost:
    """Return the cost of rounding both operands, and of the product of bytes."""
    del params
    exact = site.cost
    counts = [element_count(shape) for shape in _read(site)]
    # Operands are read as bytes; the result is written as it always is.
    product = Cost(exact.flops, sum(counts), exact.bytes_written)
    for count in counts:
        # Each is read for its largest magnitude, ...
        product += reduce(count, 1, site.itemsize)
        # ... and once more to be written as bytes.
        product += Cost(count * _FLOPS_PER_VALUE, count * site.itemsize, count)
    return product


def reject(site: Site, params: Params) -> Rejected | None:
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
    thin = [count for count in channels if isinstance(count, int) and count < params.min_channels]
    if thin:
        return Rejected(Reason.NOT_CHEAPER, f"{thin[0]} channels, needs {params.min_channels}")
    return None


def operands(site: Site, params: Params) -> tuple[str, ...]:
    """Return the names of the two operands."""
    del params
    if site.conv is None:
        return ("left", "right")
    return _NAMES[site.gradient]


def lower(
    site: Site,
    params: Params,
    template: Tensor,
    seed: Tensor,
    salt: int,
    first: Tensor,
    second: Tensor,
) -> Tensor:
    """Return the product, by kernels where this machine has them."""
    del params, salt
    problem = _problem(site, template, first, second)
    grad_border, input_border = problem.borders
    no_border = ([0, 0], [0, 0])
    borders = {
        Gradient.FORWARD: (input_border, no_border),
        Gradient.INPUT: (grad_border, no_border),
        Gradient.WEIGHT: (grad_border, input_border),
    }[site.gradient]
    largest, rounding = kernels()["absolute_max"], kernels()["int8_round"]
    scales = [int8.scale_of(call(largest, operand)) for operand in (first, second)]
    images = problem.first, problem.second
    left, right = (
        call(rounding, image, scale, seed, salt, *border)
        for image, scale, salt, border in zip(images, scales, _salts(site), borders, strict=True)
    )
    # The integers are scaled in float32, or wider if the result is.
    wide = [scale.to(torch.promote_types(template.dtype, torch.float32)) for scale in scales]
    sizes = problem.out_size, problem.size, problem.kernel, *problem.geometry, problem.groups
    last = [image.stride(1) == 1 for image in images]
    if site.gradient is Gradient.WEIGHT:
        result = call(kernels()["int8_wgrad"], left, right, *wide, *sizes, last[1])
    else:
        kernel = "int8_dgrad" if site.gradient is Gradient.INPUT else "int8_forward"
        result = call(kernels()[kernel], left, right, *wide, *sizes, template.dtype, any(last))
    return _finish(site, template, result)


def noise(site: Site, params: Params, first: Tensor, second: Tensor) -> Tensor:
    """Return the sum over the result of the variances, as the module's text has them.

    Summed over the channels that only the result has, a product needs one channel of either side.
    """
    del params
    template = torch.empty(()).expand(tuple(map(int, site.output)))
    problem = _problem(site, template, first, second)
    square, variance = [], []
    for value in (problem.first, problem.second):
        scale = int8.scale_of(value.abs().amax()).to(value.dtype)
        fraction = value / scale - (value / scale).floor()
        square.append(value.square())
        variance.append(scale.square() * fraction * (1 - fraction))
    with_first = _product(site, problem, variance[0], square[1] + variance[1])
    return with_first.sum() + _product(site, problem, square[0], variance[1]).sum()


def _salts(site: Site) -> tuple[int, int]:
    """Return numbers that tell apart the draws of the layer's tensors, whatever the gradient."""
    number = f".{site.number}" if site.number > 1 else ""
    names = (f"{site.name}:{name}{number}" for name in _NAMES[site.gradient])
    first_salt, second_salt = (zlib.crc32(name.encode()) & 0x3FFFFFFF for name in names)
    return first_salt, second_salt


def _read(site: Site) -> tuple[Any, ...]:
    """Return the shapes of the operands."""
    if site.conv is None:
        return site.shapes
    x, w, y = site.shapes
    shapes = {"input": x, "weight": w, "grad": y}
    return tuple(shapes[name] for name in _NAMES[site.gradient])


def _problem(site: Site, template: Tensor, first: Tensor, second: Tensor) -> _Problem:
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
        return _Problem(
            image, other, [1, outer, 1, length], [1, inner, 1, length], [1, 1], plain, 1
        )
    conv = site.conv
    x, w, y = {
        Gradient.FORWARD: (first, second, template),
        Gradient.INPUT: (template, second, first),
        Gradient.WEIGHT: (second, template, first),
    }[site.gradient]
    geometry = list(conv.stride), list(conv.padding), list(conv.dilation)
    sizes = list(y.shape), list(x.shape), list(w.shape[2:])
    return _Problem(first, second, *sizes, geometry, conv.groups)


def _product(site: Site, problem: _Problem, first: Tensor, second: Tensor) -> Tensor:
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


def _finish(site: Site, template: Tensor, result: Tensor) -> Tensor:
    """Return the result of the convolution as the site has it."""
    if site.conv is None:
        # [N, K, 1, 1] or [1, K, 1, M]
        result = result[:, :, 0, 0] if site.gradient is Gradient.WEIGHT else result[0, :, 0].t()
    return result.to(template.dtype)


def prior(site: Site, params: Params) -> Prior:
    """Return what was measured with this product of every layer but the first in 8 bits."""
    del params
    return {
        Gradient.WEIGHT: Prior(0.002),
        Gradient.INPUT: Prior(0.001),
        Gradient.FORWARD: Prior(0.015, bias=0.0056),
    }[site.gradient]


def samples() -> tuple[Sample, ...]:
    """Return products of convolutions and linear layers, and what must be rejected."""
    nn = torch.nn
    weight, input_, forward = Gradient.WEIGHT, Gradient.INPUT, Gradient.FORWARD
    free = Params(min_channels=1)
    return (
        Sample((5, 8, 9, 7), lambda: nn.Conv2d(8, 12, 3, padding=1), input_, Params()),
        Sample((5, 8, 9, 7), lambda: nn.Conv2d(8, 12, 3, padding=1), weight, Params()),
        Sample((3, 6, 8, 11), lambda: nn.Conv2d(6, 4, (3, 2), 2, 1, groups=2), weight, free),
        Sample((3, 6, 8, 11), lambda: nn.Conv2d(6, 4, (3, 2), 2, 1, groups=2), input_, free),
        Sample((21, 10), lambda: nn.Linear(10, 17), weight, Params()),
        Sample((21, 10), lambda: nn.Linear(10, 17), input_, Params()),
        Sample((5, 8, 9, 7), lambda: nn.Conv2d(8, 12, 3, padding=1), forward, Params()),
        Sample((3, 6, 8, 11), lambda: nn.Conv2d(6, 4, (3, 2), 2, 1, groups=2), forward, free),
        Sample((21, 10), lambda: nn.Linear(10, 17), forward, Params()),
        Sample((4, 3, 9, 9), lambda: nn.Conv2d(3, 8, 3), weight, Params(), rejected=True),
        Sample((2, 8, 11), lambda: nn.Conv1d(8, 8, 3), weight, Params(), rejected=True),
        Sample((2, 8, 6, 6), lambda: nn.ConvTranspose2d(8, 8, 3), input_, Params(), rejected=True),
    )


register(
    Method(
        name="int8",
        summary="operands rounded to 8 bits at random, their product exact",
        source="Wu et al. 2018; Banner et al. 2018",
        unbiased=True,
        gradients=(Gradient.WEIGHT, Gradient.INPUT, Gradient.FORWARD),
        params=Params,
        reject=reject,
        cost=cost,
        operands=operands,
        draw=draw,
        reference=reference,
        lower=lower,
        samples=samples,
        noise=noise,
        prior=prior,
    )
)
