"""Pixels in 8 bits: the weight gradient from sampled output pixels, rounded to 8 bits at random.

Output pixels are taken in proportion to the norms of their gradients, centred, as in `pixels`
(column-row sampling, Adelman, Silberstein 2018), and both factors are rounded as in `int8`
(Wu et al. 2018, arXiv:1802.04680):

    estimate = sum_r Q(g[i_r] / (R p[i_r])) (outer) (Q(patch(x)[i_r]) - mu)  +  dw(g, mu),

Q(v) = s * floor(v / s + u), u uniform in [0, 1), s the largest magnitude over 127: of the weighted
rows of g that were taken, and of all of x. By their weights the rows have one norm, so that one s
suits them all. The centre is taken out of the sums of rounded rows: x is rounded as it is, to the
bytes that `int8` multiplies in other products of the layer, once for all of them.

Unbiased: given the pixels, both Q are independent and keep the expectation, so that what is left is
the estimate of `pixels`, which is unbiased. The variance is that of `pixels` and, of rounding,

    sum_i R p[i] Var Q(g[i] / (R p[i])) (|patch - mu|^2 + Var Q(patch))
        + |g[i]|^2 / min(1, R p[i]) Var Q(patch),

less than a hundredth of it. Bytes are multiplied twice as fast as bfloat16, so it pays where that
saves more than rounding x costs: from about 64 channels on, from fewer where x is rounded already.
"""

from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from codegen import draws as random_draws
from codegen import int8
from codegen.kernel import call, kernels
from codegen.kernels import int8_sampled_rows
from codegen.kernels.sample_rows import choose
from cost_model import Cost, Dim, KernelCost, element_count
from graphpass import eight_bits
from graphpass.eight_bits import operands
from graphpass.errors import ConfigError, Reason, Rejected
from graphpass.kernels_of import layer_sizes, mover, product
from graphpass.method import Method, Prior, Sample, register
from graphpass.methods import pixels
from graphpass.rows import channel_means, pixel_energy, rows_of
from graphpass.site import Gradient, Site


@dataclass(frozen=True, slots=True)
class Params:
    """Parameters of sampling in 8 bits.

    Attributes:
        keep: share of the output pixels that is taken, in (0, 1].
        min_channels: least number of channels in and out of a group.
    """

    keep: float = 0.25
    min_channels: int = 8

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: if a value is out of range.
        """
        keep, least = self.keep, self.min_channels
        number = isinstance(keep, int | float) and not isinstance(keep, bool)
        if not number or not 0 < keep <= 1:
            raise ConfigError(f"method 'pixels_int8': keep={keep!r}; give a number in (0, 1]")
        if type(least) is not int or least < 1:
            raise ConfigError(f"method 'pixels_int8': min_channels={least!r}; give an integer >= 1")


def draw(site: Site, params: Params, template: Tensor, seed: Tensor, salt: int) -> Tensor:
    """Return a uniform number for each pixel taken, for each of their values, and for each of x."""
    (choice, rows, x), (taken, filters, count) = _salts(site, salt), _counts(site, params)
    return torch.cat(
        [
            random_draws.uniform(seed, int(taken), choice),
            random_draws.uniform(seed, int(taken * filters), rows),
            random_draws.coarse(seed, int(count), x),
        ]
    ).to(template.device)


def reference(
    site: Site, params: Params, template: Tensor, draws: Tensor, *operands: Tensor
) -> Tensor:
    """Return the product of the rounded rows with x rounded, and of the gradient with mu.

    Args:
        site: the weight gradient of a convolution or of a linear layer.
        params: parameters of the method.
        template: [Co, Ci/groups, *kernel], or [N, K].
        draws: as `draw` returns them; those of x in the order [B, H, W, C].
        operands: grad [B, Co, *out] and x [B, Ci, *in]; or left [N, M] and right [M, K].
    """
    problem = eight_bits.problem_of(site, template, operands[0], operands[1])
    rows, wide = rows_of(site, *operands), torch.promote_types(template.dtype, torch.float32)
    taken, filters, count = (int(number) for number in _counts(site, params))
    points, of_rows, of_x = draws.split([taken, taken * filters, count])
    norms, sums = kernels()["pixel_norms"].reference(rows.grad, *rows.geometry, 1)
    index, weight = choose(norms, points.double()[None], 1, taken)
    g, g_scale = int8_sampled_rows.rounded(rows.grad, index, weight, of_rows.view(taken, filters))
    x, x_scale = problem.second, int8.scale_of(operands[1].abs().amax())
    batch, channels, *image = x.shape
    order = of_x.view(batch, *image, channels).permute(0, 3, 1, 2)
    rounded = int8.to_bytes(int8.round_at_random(x, x_scale, order), *_border(problem))
    dw: Any = kernels()["int8_sampled_wgrad"].reference(
        g, rounded, g_scale.to(wide), x_scale.to(wide), index, channel_means(rows.x), sums,
        *problem.sizes, False,
    )  # fmt: skip
    return eight_bits.finished(site, template, dw)


def cost(site: Site, params: Params) -> tuple[KernelCost, ...]:
    """Return the cost of choosing pixels, of rounding both factors, and of the product of bytes."""
    taken, filters, count = _counts(site, params)
    # Norms of all rows, the choice among them, and the centre: all but the product of `pixels`.
    *choosing, _ = pixels.cost(site, _sampling(params))
    # Rows are read for their largest magnitude, and to be rounded.
    rows = eight_bits.rounding_cost(taken * filters, site.itemsize)
    rows += Cost(0, taken * filters * site.itemsize, 0)
    # It reads what is taken of g, and all of x, as the windows overlap.
    flops = 2 * taken * element_count(site.output)
    bytes_ = Cost(flops, taken * filters + count, site.cost.bytes_written)
    return (
        *choosing,
        mover("int8_sampled_rows", rows, site.dtype),
        *eight_bits.bytes_of(site, "int8", "input", count),
        product(site, "int8_sampled_wgrad", bytes_, "int8", taken),
    )


def reject(site: Site, params: Params) -> Rejected | None:
    """Accept what both `pixels` and `int8` do, on a CPU."""
    if site.device != "cpu":
        return Rejected(Reason.NO_HARDWARE, "no kernel for a GPU")
    rejected = pixels.reject(site, _sampling(params))
    return rejected or eight_bits.reject(site, params.min_channels)


def lower(
    site: Site, params: Params, template: Tensor, seed: Tensor, salt: int, *operands: Tensor
) -> Tensor:
    """Return the estimate, by kernels where this machine has them."""
    problem = eight_bits.problem_of(site, template, operands[0], operands[1])
    rows, wide = rows_of(site, *operands), torch.promote_types(template.dtype, torch.float32)
    known, (of_choice, of_rows, of_x) = kernels(), _salts(site, salt)
    norms, sums = call(known["pixel_norms"], rows.grad, *rows.geometry, 1)
    taken, *_ = _counts(site, params)
    index, weight = call(known["sample_rows"], norms, seed, of_choice, 1, taken)
    g, g_scale = call(known["int8_sampled_rows"], rows.grad, index, weight, seed, of_rows)
    # As `int8` rounds it, to share the bytes.
    x_scale = int8.scale_of(call(known["absolute_max"], operands[1]))
    x = call(known["int8_round"], problem.second, x_scale, seed, of_x, *_border(problem))
    dw = call(
        known["int8_sampled_wgrad"], g, x, g_scale.to(wide), x_scale.to(wide), index,
        channel_means(rows.x), sums, *problem.sizes, problem.second.stride(1) == 1,
    )  # fmt: skip
    return eight_bits.finished(site, template, dw)


def noise(site: Site, params: Params, *operands: Tensor) -> Tensor:
    """Return the variance of the estimate, as the module's text has it."""
    rows = rows_of(site, *operands)
    taken, *_ = _counts(site, params)
    norms = rows.grad.square().sum(1, keepdim=True).sqrt()
    times = (norms * (taken / norms.sum().clamp_min(1e-300))).clamp_min(1e-300)
    center = channel_means(rows.x).to(rows.x.dtype).view(1, -1, *[1] * (rows.x.dim() - 2))
    of_g, of_x = _spread(rows.grad / times), _spread(rows.x)
    from_g = replace(rows, grad=(times * of_g).sqrt(), x=((rows.x - center).square() + of_x).sqrt())
    from_x = replace(rows, grad=rows.grad / times.clamp_max(1.0).sqrt(), x=of_x.sqrt())
    rounding = sum(pixel_energy(part, None).sum() for part in (from_g, from_x))
    return pixels.noise(site, _sampling(params), *operands) + rounding


def _sampling(params: Params) -> pixels.Params:
    return pixels.Params(keep=params.keep)


def _counts(site: Site, params: Params) -> tuple[Dim, Dim, Dim]:
    """Return how many pixels are taken, the values of each, and those of x."""
    keep, sizes = Fraction(str(params.keep)), layer_sizes(site)
    taken = -(-sizes["rows"] * keep.numerator // keep.denominator)
    inputs = site.shapes[0] if site.conv is not None else site.shapes[1]
    return taken, site.output[0], element_count(inputs)


def _salts(site: Site, salt: int) -> tuple[int, int, int]:
    """Return what tells apart the draws of the choice, of its rows, and of x."""
    return 2 * salt, 2 * salt + 1, eight_bits.salts(site)[1]


def _border(problem: eight_bits.Problem) -> eight_bits.Border:
    return problem.borders(Gradient.WEIGHT)[1]


def _spread(values: Tensor) -> Tensor:
    """Return the variance of rounding each value, if the largest one is taken."""
    scale = int8.scale_of(values.abs().amax()).to(values.dtype)
    fraction = values / scale - (values / scale).floor()
    return scale.square() * fraction * (1 - fraction)


def ladder(site: Site) -> tuple[Params, ...]:
    """Return the shares that `pixels` is tried with."""
    return tuple(Params(keep=params.keep) for params in pixels.ladder(site))


def prior(site: Site, params: Params) -> Prior | None:
    """Return that of `pixels`: what rounding adds to it is less than a hundredth."""
    return pixels.prior(site, _sampling(params))


def samples() -> tuple[Sample, ...]:
    """Return convolutions and a linear layer, and what is rejected."""
    nn, wanted = torch.nn, Gradient.WEIGHT
    return (
        Sample((5, 8, 9, 7), lambda: nn.Conv2d(8, 12, 3, padding=1), wanted, Params()),
        Sample(
            (3, 6, 12, 11),
            lambda: nn.Conv2d(6, 4, (3, 2), (2, 1), (2, 0), (1, 2), groups=2),
            wanted,
            Params(keep=0.4, min_channels=1),
        ),
        Sample((4, 17, 6, 6), lambda: nn.Conv2d(17, 9, 1), wanted, Params(keep=1.0)),
        Sample((70, 10), lambda: nn.Linear(10, 17), wanted, Params(keep=0.5)),
        Sample((4, 3, 9, 9), lambda: nn.Conv2d(3, 8, 3), wanted, Params(), rejected=True),
        Sample((2, 8, 4, 4), lambda: nn.Conv2d(8, 8, 3), wanted, Params(), rejected=True),
        Sample((2, 8, 11), lambda: nn.Conv1d(8, 8, 3), wanted, Params(0.5), rejected=True),
    )


register(
    Method(
        name="pixels_int8",
        summary="output pixels sampled as by `pixels`, rounded to 8 bits at random",
        source="Adelman, Silberstein 2018, applied to output pixels; Wu et al. 2018",
        unbiased=True,
        gradients=(Gradient.WEIGHT,),
        params=Params,
        reject=reject,
        cost=cost,
        operands=operands,
        draw=draw,
        reference=reference,
        lower=lower,
        samples=samples,
        noise=noise,
        ladder=ladder,
        prior=prior,
        fast_on_cpu=True,
    )
)
