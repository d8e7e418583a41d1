"""int8: a product from operands rounded to 8 bits at random.

An operand v becomes s * floor(v / s + u) with s = max|v| / 127 and u uniform in [0, 1), one draw a
value; the product of the integers is exact, and scaled by both s. Wu et al., "Training and
Inference with Integers in Deep Neural Networks", 2018 (arXiv:1802.04680), and Banner et al.,
"Scalable Methods for 8-bit Training of Neural Networks", 2018 (arXiv:1805.11046), round gradients
so; the latter keeps the weight gradient's operands wider, which random rounding makes needless.

Unbiased: E[s * floor(v / s + u)] = v, and the two operands are rounded independently, so the
expectation of their product is the product of their expectations. With f the fractional part of
v / s, the variance of a value is s^2 f (1 - f); `graphpass.eight_bits` says what the noise of the
product is.

Products of a layer round what they share in the same way, so a compiled graph rounds it once; their
noise is dependent, but each is unbiased. The forward product is unbiased too, but what follows it
is not linear, so that the step's gradient is not: it is only approximated where a plan says so. A
weight gradient from the very bytes that the forward product read is that of what was computed.

Bytes are multiplied four times as fast as float32 where there is VNNI, so it pays wherever the
products cost more than the rounding: from about 16 channels on for both gradients of a layer, from
32 for one.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from codegen import int8
from codegen.kernel import call, kernels
from cost_model import KernelCost
from graphpass import eight_bits
from graphpass.eight_bits import draw, operands
from graphpass.errors import ConfigError, Rejected
from graphpass.method import Method, Prior, Sample, register
from graphpass.site import Gradient, Site

_KERNELS = {
    Gradient.FORWARD: "int8_forward",
    Gradient.INPUT: "int8_dgrad",
    Gradient.WEIGHT: "int8_wgrad",
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


def reference(
    site: Site, params: Params, template: Tensor, draws: Tensor, first: Tensor, second: Tensor
) -> Tensor:
    """Return the exact product of the rounded operands, as `eight_bits.reference` takes them."""
    del params

    def rounded(_: str, value: Tensor, uniform: Tensor) -> Tensor:
        scale = int8.scale_of(value.abs().amax())
        return int8.round_at_random(value, scale, uniform).to(template.dtype) * scale

    return eight_bits.reference(site, template, draws, (first, second), rounded)


def cost(site: Site, params: Params) -> tuple[KernelCost, ...]:
    """Return the cost of rounding both operands, and of the product of bytes."""
    del params
    return eight_bits.cost(site, "int8", _KERNELS, "int8")


def reject(site: Site, params: Params) -> Rejected | None:
    """Accept products of linear layers and of convolutions of images, with channels enough."""
    return eight_bits.reject(site, params.min_channels)


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
    problem = eight_bits.problem_of(site, template, first, second)
    borders, salts = problem.borders(site.gradient), eight_bits.salts(site)
    largest, rounding = kernels()["absolute_max"], kernels()["int8_round"]
    scales = [int8.scale_of(call(largest, operand)) for operand in (first, second)]
    left, right = (
        call(rounding, image, scale, seed, salt, *border)
        for image, scale, salt, border in zip(problem.images, scales, salts, borders, strict=True)
    )
    # The integers are scaled in float32, or wider if the result is.
    wide = [scale.to(torch.promote_types(template.dtype, torch.float32)) for scale in scales]
    last = [image.stride(1) == 1 for image in problem.images]
    kernel = kernels()[_KERNELS[site.gradient]]
    if site.gradient is Gradient.WEIGHT:
        result = call(kernel, left, right, *wide, *problem.sizes, last[1])
    else:
        result = call(kernel, left, right, *wide, *problem.sizes, template.dtype, any(last))
    return eight_bits.finished(site, template, result)


def noise(site: Site, params: Params, first: Tensor, second: Tensor) -> Tensor:
    """Return the sum over the result of the variances."""
    del params

    def variance(_: str, value: Tensor) -> Tensor:
        scale = int8.scale_of(value.abs().amax()).to(value.dtype)
        fraction = value / scale - (value / scale).floor()
        return scale.square() * fraction * (1 - fraction)

    return eight_bits.noise(site, (first, second), variance)


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
        fast_on_cpu=True,
        fast_on_gpu=False,
    )
)
