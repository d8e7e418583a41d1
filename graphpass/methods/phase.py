"""Phase: the weight gradient from every s-th output pixel of every t-th row.

The output pixels (h, w) of a map fall into s * t phases (h mod s, w mod t). On every step one phase
k is drawn, and a sample b of the batch gives its pixels of phase k, or k + b, modulo s * t:

    estimate = s t sum_b sum_(p in phase) g[b, p] (outer) patch(x - mu)[b, p]  +  dw(g, mu).

Each pixel is taken with probability 1 / (s t) and weighted with s t, and what the channel means mu
contribute is added exactly (see `pixels`): the estimator is unbiased, at the borders too. There are
only s t outcomes, so that the noise formula is no approximation: it computes them all. With the
same phase in every sample it is a dense convolution of s and t times the stride, which any library
can compute; neighbouring samples of different phases (`staggered`) cost the same here, and what all
samples have in common then averages out.

It pays for maps of 4x4 and more; smaller ones leave most phases empty.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from codegen import draws as random_draws
from codegen import phases
from codegen.kernel import call, kernels, unavailable
from cost_model import Dim, KernelCost, element_count, elementwise
from graphpass.errors import ConfigError, Reason, Rejected
from graphpass.kernels_of import product
from graphpass.method import Method, Prior, Sample, register
from graphpass.rows import (
    Rows,
    centre_cost,
    centre_share,
    channel_means,
    rows_of,
    sampled,
    sampled_cost,
    weighted,
)
from graphpass.site import Gradient, Site

# Fewer rows than this say too little (Adelman, Silberstein 2018, section 4).
_LEAST_ROWS = 10


@dataclass(frozen=True, slots=True)
class Params:
    """Parameters of phase sampling.

    Attributes:
        down: s, every how many rows of the map; >= 1.
        across: t, every how many pixels of a row; >= 1.
        staggered: whether neighbouring samples use different phases.
        centered: whether channel means are subtracted from x, and their share computed exactly.
    """

    down: int = 2
    across: int = 2
    staggered: bool = True
    centered: bool = True

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: if a value is out of range.
        """
        for name in ("down", "across"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ConfigError(f"method 'phase': {name}={value!r}; give an integer >= 1")
        for name in ("staggered", "centered"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise ConfigError(f"method 'phase': {name}={value!r}; give True or False")


def draw(site: Site, params: Params, template: Tensor, seed: Tensor, salt: int) -> Tensor:
    """Return the number that chooses the phase: float32 [1]."""
    del site, params, template
    return random_draws.uniform(seed, 1, salt)


def reference(
    site: Site, params: Params, template: Tensor, draws: Tensor, grad: Tensor, x: Tensor
) -> Tensor:
    """Return the exact products of the chosen gradient with x - mu, and of the gradient with mu.

    Args:
        site: the weight gradient of a convolution of two spatial axes.
        params: parameters of the method.
        template: [Co, Ci/groups, *kernel].
        draws: [1].
        grad: [B, Co, OH, OW].
        x: [B, Ci, H, W].
    """
    rows = rows_of(site, grad, x)
    phase = (draws.double() * (params.down * params.across)).long()
    return _estimate(rows, params, phase).reshape(template.shape)


def cost(site: Site, params: Params) -> tuple[KernelCost, ...]:
    """Return the cost of the product over one phase, and of the centre's share."""
    x, _, y = site.shapes
    taken = _taken(site, params)
    kernels = [sampled_cost(site, taken, y[1], x)]
    if params.centered:
        # Sums by tap are taken in one pass over g.
        sums = elementwise(element_count(y), 1, 0, site.itemsize)
        kernels = [product(site, "pixel_norms", sums), centre_cost(site, x), *kernels]
    return tuple(kernels)


def reject(site: Site, params: Params) -> Rejected | None:
    """Accept convolutions of two spatial axes whose maps hold every phase."""
    if site.conv is None:
        return Rejected(Reason.UNSUPPORTED_SHAPE, "a matrix product has no map of positions")
    if site.conv.transposed:
        return Rejected(Reason.UNSUPPORTED_SHAPE, "transposed convolution")
    sizes = site.shapes[2][2:]
    if len(sizes) != len((params.down, params.across)):
        return Rejected(Reason.UNSUPPORTED_SHAPE, f"{len(sizes)} spatial axes")
    for size, step in zip(sizes, (params.down, params.across), strict=True):
        if isinstance(size, int) and size < step:
            return Rejected(Reason.NOT_CHEAPER, f"{size} positions on an axis of {step} phases")
    taken = _taken(site, params)
    if isinstance(taken, int) and taken < _LEAST_ROWS:
        return Rejected(Reason.NOT_CHEAPER, f"{taken} rows taken, needs {_LEAST_ROWS}")
    return None


def lower(
    site: Site, params: Params, template: Tensor, seed: Tensor, salt: int, grad: Tensor, x: Tensor
) -> Tensor:
    """Return the estimate, by a kernel that knows the pixels of a phase, or by a list of them.

    The list has one length for all phases. As a dense problem for the vendor's operator, with g and
    x copied from the drawn offset on, it took at least twice as long in channels_last (one AVX-512
    core, 16 to 512 channels).
    """
    rows = rows_of(site, grad, x)
    number = params.down * params.across
    phase = (random_draws.uniform(seed, 1, salt) * number).long()
    center = sums = None
    if params.centered:
        center = channel_means(x)
        _, sums = call(kernels()["pixel_norms"], grad, *rows.geometry, 1)
    kernel, grid = kernels()["phase_wgrad"], (params.down, params.across, params.staggered)
    axes = (rows.kernel, rows.stride, rows.padding, rows.dilation)
    args = (grad, x, phase, center, sums, *axes, rows.groups, *grid)
    if unavailable(kernel, *args) is None:
        dw: Tensor = kernel.op(*args)
        return dw
    index, inside = phases.pixels(list(grad.shape), phase, *grid)
    weight = inside.to(torch.promote_types(grad.dtype, torch.float32)) * number
    return sampled(rows, index, weight, center, sums, template)


def noise(site: Site, params: Params, grad: Tensor, x: Tensor) -> Tensor:
    """Return the variance over all outcomes."""
    rows = rows_of(site, grad, x)
    numbers = torch.arange(params.down * params.across, device=grad.device)
    outcomes = torch.stack([_estimate(rows, params, number[None]) for number in numbers])
    # Every pixel belongs to one outcome: their mean is the exact product.
    return (outcomes - outcomes.mean(0)).square().sum() / len(numbers)


def _taken(site: Site, params: Params) -> Dim:
    """Return how many rows are read: those of the largest phase."""
    batch, _, height, width = site.shapes[2]
    rows, columns = phases.largest((height, width), params.down, params.across)
    return batch * rows * columns


def _estimate(rows: Rows, params: Params, phase: Tensor) -> Tensor:
    """Return the estimate for a phase, int64 [1], by exact products."""
    grid = (params.down, params.across, params.staggered)
    index, inside = phases.pixels(list(rows.grad.shape), phase, *grid)
    factors = inside.to(rows.grad.dtype) * (params.down * params.across)
    count = rows.grad.numel() // rows.grad.shape[1]
    weights = torch.zeros(count, dtype=factors.dtype, device=factors.device)
    weights = weights.index_add(0, index, factors)
    center = channel_means(rows.x) if params.centered else None
    dw = weighted(rows, weights, center)
    return dw if center is None else dw + centre_share(rows, center)


def ladder(site: Site) -> tuple[Params, ...]:
    """Return every second row, and one pixel of four."""
    del site
    return (Params(across=1), Params())


def prior(site: Site, params: Params) -> Prior:
    """Return what was measured with one pixel of four, in proportion to the phases left out."""
    del site
    quarter = 1.1 if params.centered else 1.35
    return Prior(quarter * (params.down * params.across - 1) / 3)


def samples() -> tuple[Sample, ...]:
    """Return convolutions of several geometries, the exact setting, and what is rejected."""
    nn, wanted = torch.nn, Gradient.WEIGHT
    return (
        Sample((5, 3, 9, 7), lambda: nn.Conv2d(3, 4, 3, padding=1), wanted, Params(3)),
        Sample(
            (3, 6, 12, 11),
            lambda: nn.Conv2d(6, 4, (3, 2), (2, 1), (2, 0), (1, 2), groups=2),
            wanted,
            Params(down=3, staggered=False),
        ),
        Sample(
            (4, 16, 8, 8),
            lambda: nn.Conv2d(16, 4, 3, padding=1),
            wanted,
            Params(down=1, across=8, centered=False),
        ),
        Sample(
            (3, 4, 5, 5), lambda: nn.Conv2d(4, 3, 3), wanted, Params(down=1, across=1), exact=True
        ),
        Sample((5, 3, 3, 9), lambda: nn.Conv2d(3, 4, 3), wanted, Params(), rejected=True),
        Sample((2, 3, 9, 9), lambda: nn.ConvTranspose2d(3, 5, 3), wanted, Params(), rejected=True),
        Sample((70, 10), lambda: nn.Linear(10, 6), wanted, Params(), rejected=True),
    )


register(
    Method(
        name="phase",
        summary="one phase of a grid of output pixels, drawn on every step, x centred",
        source="systematic sampling of the contraction over output pixels",
        unbiased=True,
        gradients=(Gradient.WEIGHT,),
        params=Params,
        reject=reject,
        cost=cost,
        operands=lambda site, params: ("grad", "input"),
        draw=draw,
        reference=reference,
        lower=lower,
        samples=samples,
        noise=noise,
        ladder=ladder,
        prior=prior,
        fast_on_cpu=True,
        fast_on_gpu=False,
    )
)
