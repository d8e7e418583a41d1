"""fp8: a product from operands rounded to 8-bit floats at random, added up in float32.

An operand v is divided by the least power of two s by which it fits into the format, and becomes
s * t * floor(|v| / s / t + u) with v's sign, u uniform in [0, 1), one draw a value; t is the
distance between the format's numbers at |v| / s. Wang et al., "Training Deep Neural Networks with
8-bit Floating Point Numbers", 2018 (arXiv:1812.08011), and Micikevicius et al., "FP8 Formats for
Deep Learning", 2022 (arXiv:2209.05433), train in 8-bit floats and round them to nearest, the latter
in these formats.

Unbiased: both multiples of t around |v| / s are numbers of the format (where the upper one begins a
binade, and among the subnormal numbers too), and the scale keeps |v| / s from its end, so nothing
saturates. So E[t * floor(|v| / s / t + u)] = |v| / s; the two operands are rounded independently,
and the expectation of their product is the product of their expectations. Tensor cores add in
float32, but for NVIDIA's up to Hopper's, which within a tile of up to 128 products cut sums off
after 14 bits: some 2^-12 of a sum, the one bias there is. With f the fractional part of
|v| / s / t, the variance of a value is (s t)^2 f (1 - f); `graphpass.eight_bits` says what the
noise of the product is.

Which format: e4m3 errs by half as much as e5m2, a quarter of the variance, down to 2^-14 of the
largest magnitude, and as steps stay at 2^-17 of it below, by no more down to 2^-15. Rounding at
random loses no smaller values, and they would have to be nearly all of a tensor for e5m2 to add
less noise. So gradients take e4m3 as well, unless `grad` says otherwise. int8's steps are 1 / 127
of the largest magnitude everywhere: it adds less where that is below about ten times the root mean
square, and more where values are spread wider.

It pays like int8, on GPUs that multiply 8-bit floats: twice as fast as bfloat16.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from codegen import fp8
from codegen.kernel import call, kernels
from cost_model import KernelCost
from graphpass import eight_bits
from graphpass.eight_bits import draw, operands
from graphpass.errors import ConfigError, Reason, Rejected
from graphpass.method import Method, Sample, register
from graphpass.site import Gradient, Site

_FORMATS = ("e4m3", "e5m2")
_KERNELS = dict.fromkeys(Gradient, "fp8_product")


@dataclass(frozen=True, slots=True)
class Params:
    """Parameters of the fp8 method.

    Attributes:
        grad: format of output gradients, "e4m3" or "e5m2"; inputs and weights are e4m3.
        min_channels: least number of channels in and out of a group; thinner layers, such as the
            first of a network, stay exact. 1 applies it everywhere.
        emulate: whether it applies on devices without such products as well, in plain torch: to see
            what it does to training, not to save time.
    """

    grad: str = "e4m3"
    min_channels: int = 8
    emulate: bool = False

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: if a value is out of range.
        """
        least = self.min_channels
        checks = {
            "grad": (self.grad in _FORMATS, " or ".join(map(repr, _FORMATS))),
            "min_channels": (type(least) is int and least >= 1, "an integer >= 1"),
            "emulate": (isinstance(self.emulate, bool), "True or False"),
        }
        for name, (good, wanted) in checks.items():
            if not good:
                raise ConfigError(f"method 'fp8': {name}={getattr(self, name)!r}; give {wanted}")


def reference(
    site: Site, params: Params, template: Tensor, draws: Tensor, first: Tensor, second: Tensor
) -> Tensor:
    """Return the exact product of the rounded operands, as `eight_bits.reference` takes them."""

    def rounded(name: str, value: Tensor, uniform: Tensor) -> Tensor:
        stored = _format(site, params, name)
        scale = fp8.scale_of(value.abs().amax(), stored)
        return fp8.round_at_random(value, scale, uniform, stored) * scale

    return eight_bits.reference(site, template, draws, (first, second), rounded)


def cost(site: Site, params: Params) -> tuple[KernelCost, ...]:
    """Return the cost of rounding both operands, and of the product of bytes."""
    del params
    return eight_bits.cost(site, "fp8", _KERNELS, "float8")


def reject(site: Site, params: Params) -> Rejected | None:
    """Accept what int8 accepts, where the device multiplies 8-bit floats."""
    reason = None if params.emulate else fp8.unsupported(site.device)
    if reason is not None:
        return Rejected(Reason.NO_HARDWARE, reason)
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
    del salt
    problem = eight_bits.problem_of(site, template, first, second)
    largest, rounding = kernels()["absolute_max"], kernels()["fp8_round"]
    formats = [_format(site, params, name) for name in eight_bits.NAMES[site.gradient]]
    scales = [
        fp8.scale_of(call(largest, operand), stored)
        for operand, stored in zip((first, second), formats, strict=True)
    ]
    rounded = (
        call(rounding, image, scale, seed, salt, *border, stored)
        for image, scale, salt, border, stored in zip(
            problem.images, scales, eight_bits.salts(site), problem.borders(site.gradient), formats,
            strict=True,
        )
    )  # fmt: skip
    # Sums are scaled in float32, or wider if the result is.
    wide = [scale.to(torch.promote_types(template.dtype, torch.float32)) for scale in scales]
    last = [image.stride(1) == 1 for image in problem.images]
    result = call(
        kernels()["fp8_product"], *rounded, *wide, *formats, site.gradient.value, *problem.sizes,
        template.dtype, last[1] if site.gradient is Gradient.WEIGHT else any(last),
    )  # fmt: skip
    return eight_bits.finished(site, template, result)


def noise(site: Site, params: Params, first: Tensor, second: Tensor) -> Tensor:
    """Return the sum over the result of the variances."""

    def variance(name: str, value: Tensor) -> Tensor:
        stored = _format(site, params, name)
        scale = fp8.scale_of(value.abs().amax(), stored).to(value.dtype)
        step = fp8.step_of(value.abs() / scale, stored).to(value.dtype) * scale
        fraction = value.abs() / step - (value.abs() / step).floor()
        return step.square() * fraction * (1 - fraction)

    return eight_bits.noise(site, (first, second), variance)


def _format(site: Site, params: Params, operand: str) -> torch.dtype:
    return fp8.format_of(params.grad if operand == "grad" else "e4m3", site.device)


def samples() -> tuple[Sample, ...]:
    """Return products of convolutions and linear layers, and what must be rejected."""
    nn = torch.nn
    weight, input_, forward = Gradient.WEIGHT, Gradient.INPUT, Gradient.FORWARD
    here, wide = Params(emulate=True), Params("e5m2", min_channels=1, emulate=True)
    return (
        Sample((5, 8, 9, 7), lambda: nn.Conv2d(8, 12, 3, padding=1), input_, here),
        Sample((5, 8, 9, 7), lambda: nn.Conv2d(8, 12, 3, padding=1), weight, here),
        Sample((3, 6, 8, 11), lambda: nn.Conv2d(6, 4, (3, 2), 2, 1, groups=2), weight, wide),
        Sample((3, 6, 8, 11), lambda: nn.Conv2d(6, 4, (3, 2), 2, 1, groups=2), forward, wide),
        Sample((21, 10), lambda: nn.Linear(10, 17), weight, wide),
        Sample((21, 10), lambda: nn.Linear(10, 17), input_, here),
        Sample((21, 10), lambda: nn.Linear(10, 17), forward, here),
        Sample((4, 3, 9, 9), lambda: nn.Conv2d(3, 8, 3), weight, here, rejected=True),
        Sample((5, 8, 9, 7), lambda: nn.Conv2d(8, 12, 3), weight, Params(), rejected=True),
    )


register(
    Method(
        name="fp8",
        summary="operands rounded to 8-bit floats at random, added up in float32",
        source="Wang et al. 2018; Micikevicius et al. 2022",
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
        fast_on_gpu=False,
    )
)
