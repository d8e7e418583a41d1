"""Pixels: the weight gradient from a sample of the output pixels.

A weight gradient is a sum over the output pixels i of all samples (of a linear layer: over its
rows), dw = sum_i g[i] (outer) patch(x)[i]. Column-row sampling (Adelman, Silberstein 2018, "Faster
Neural Network Training with Approximate Tensor Operations") takes R of them, i with probability
proportional to p[i], and weights what it takes:

    estimate = sum_r g[i_r] (outer) patch(x - mu)[i_r] / (R p[i_r])  +  dw(g, mu).

p is proportional to |g[i]|, or uniform. It is unbiased: i is taken R p[i] times on average, and
what mu, the channel means of x inside the image, contributes is linear in x and added exactly: it
is the sum of g over the pixels that see a tap inside, times mu. Behind BatchNorm that sum is small
and x after ReLU has a large mean, so centring takes away a third to two thirds of the variance. Any
mu that does not depend on the draws will do; it is the mean of a part of the samples.

Sampling is systematic: one pixel for each of R strata of equal probability, whose shares of pixel i
are q[s, i]. With z[i] = g[i] (outer) patch[i] / (R p[i]) the variance is

    sum_s (sum_i q[s, i] |z[i]|^2 - |sum_i q[s, i] z[i]|^2);

the noise formula leaves out the inner products of different pixels (within a block they are in):

    sum_i |z[i]|^2 sum_s (q[s, i] - q[s, i]^2).

What is taken may be rounded to bfloat16 (`narrow`), to nearest: 2^-9 of single values, nothing
beside the noise of sampling, at twice the speed. Without, the kernel runs at the speed of the exact
product.
"""

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from codegen import draws as random_draws
from codegen.kernel import call, kernels
from codegen.kernels.sample_rows import choose
from cost_model import Dim, KernelCost, element_count, elementwise
from graphpass.errors import ConfigError, Reason, Rejected
from graphpass.kernels_of import mover, product
from graphpass.method import Method, Prior, Sample, register
from graphpass.rows import (
    centre_cost,
    centre_share,
    channel_means,
    pixel_energy,
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
    """Parameters of pixel sampling.

    Attributes:
        keep: share of the output pixels that is taken, in (0, 1].
        sampling: "norm", proportional to the norm of the output gradient, or "uniform".
        block: neighbouring pixels that are taken together.
        per_sample: whether every sample of the batch gives the same number of pixels.
        top: share of the taken pixels that are those of largest norm, with weight 1; in [0, 1).
        centered: whether channel means are subtracted from x, and their share computed exactly.
        narrow: whether what was taken may be rounded to bfloat16 in float32 training, where the
            processor multiplies that faster.
    """

    keep: float = 0.25
    sampling: str = "norm"
    block: int = 1
    per_sample: bool = False
    top: float = 0.0
    centered: bool = True
    narrow: bool = True

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: if a value is out of range.
        """
        legal = {
            "keep": (_is_number(self.keep) and 0 < self.keep <= 1, "a number in (0, 1]"),
            "sampling": (self.sampling in {"norm", "uniform"}, "'norm' or 'uniform'"),
            "block": (type(self.block) is int and self.block >= 1, "an integer >= 1"),
            "per_sample": (isinstance(self.per_sample, bool), "True or False"),
            "top": (_is_number(self.top) and 0 <= self.top < 1, "a number in [0, 1)"),
            "centered": (isinstance(self.centered, bool), "True or False"),
            "narrow": (isinstance(self.narrow, bool), "True or False"),
        }
        for name, (good, wanted) in legal.items():
            if not good:
                raise ConfigError(f"method 'pixels': {name}={getattr(self, name)!r}; give {wanted}")
        if self.top and self.sampling == "uniform":
            raise ConfigError("method 'pixels': top needs sampling='norm'; give top=0")


def draw(site: Site, params: Params, template: Tensor, seed: Tensor, salt: int) -> Tensor:
    """Return one uniform number for each pixel or block that is sampled: float32, flat."""
    del template
    segments, _, _, rest = _counts(site, params)
    return random_draws.uniform(seed, segments * rest, salt)


def reference(
    site: Site, params: Params, template: Tensor, draws: Tensor, *operands: Tensor
) -> Tensor:
    """Return the exact products of the weighted gradient with x - mu, and of the gradient with mu.

    Args:
        site: the weight gradient of a convolution or of a linear layer.
        params: parameters of the method.
        template: [Co, Ci/groups, *kernel], or [N, K].
        draws: positions in the strata, flat.
        operands: grad [B, Co, *out] and x [B, Ci, *in]; or left [N, M] and right [M, K].
    """
    rows = rows_of(site, *operands)
    segments, _, top, rest = _counts(site, params)
    norms = rows.grad.square().sum(1).view(-1, params.block).sum(1).sqrt()

    def pick(mass: Tensor) -> tuple[Tensor, Tensor]:
        return choose(mass, draws.double().view(segments, rest), segments, rest)

    index, weight = _select(params, norms, segments, top, pick)
    weights = torch.zeros(norms.numel() * params.block, dtype=weight.dtype)
    weights = weights.to(weight.device).index_add(0, index, weight)
    center = channel_means(rows.x) if params.centered else None
    dw = weighted(rows, weights, center)
    if center is not None:
        dw = dw + centre_share(rows, center)
    return dw.reshape(template.shape)


def cost(site: Site, params: Params) -> tuple[KernelCost, ...]:
    """Return the cost of choosing pixels and of the product over those."""
    segments, blocks, top, rest = _counts(site, params)
    gradient, inputs = _shapes(site)
    taken = segments * (top + rest) * params.block
    number = torch.float32.itemsize
    # Squares, their sum and the sum by tap are taken in one pass over g; a number a block is left.
    norms = elementwise(element_count(gradient), 1, 0, site.itemsize, flops_per_element=3)
    norms += elementwise(segments * blocks, 0, 1, number)
    # Those are read to choose; what is taken gets a place and a weight.
    chosen = elementwise(segments * blocks, 1, 0, number) + elementwise(taken, 0, 3, number)
    kernels = [product(site, "pixel_norms", norms), mover("sample_rows", chosen, "float32")]
    if params.centered:
        kernels.append(centre_cost(site, inputs))
    return (*kernels, sampled_cost(site, taken, gradient[1], inputs))


def reject(site: Site, params: Params) -> Rejected | None:
    """Accept convolutions and linear layers with enough rows."""
    if site.conv is None and site.op != "mm":
        return Rejected(Reason.UNSUPPORTED_SHAPE, f"{site.op} is not one product of two matrices")
    if site.conv is not None and site.conv.transposed:
        return Rejected(Reason.UNSUPPORTED_SHAPE, "transposed convolution")
    gradient, _ = _shapes(site)
    positions = element_count(gradient[2:])
    unit = gradient[0] if site.conv is None else positions
    if isinstance(unit, int) and unit % params.block != 0:
        return Rejected(Reason.UNSUPPORTED_SHAPE, f"{unit} rows in blocks of {params.block}")
    segments, _, top, rest = _counts(site, params)
    taken = segments * (top + rest) * params.block
    if isinstance(taken, int) and taken < _LEAST_ROWS:
        return Rejected(Reason.NOT_CHEAPER, f"{taken} rows taken, needs {_LEAST_ROWS}")
    return None


def operands(site: Site, params: Params) -> tuple[str, ...]:
    """Return the names of the two operands."""
    del params
    return ("grad", "input") if site.conv is not None else ("left", "right")


def lower(
    site: Site, params: Params, template: Tensor, seed: Tensor, salt: int, *operands: Tensor
) -> Tensor:
    """Return the estimate, made by three kernels: norms, choice, product."""
    rows = rows_of(site, *operands)
    segments, _, top, rest = _counts(site, params)
    norms, sums = call(kernels()["pixel_norms"], rows.grad, *rows.geometry, params.block)

    def pick(mass: Tensor) -> tuple[Tensor, Tensor]:
        chosen: tuple[Tensor, Tensor] = call(
            kernels()["sample_rows"], mass, seed, salt, segments, rest
        )
        return chosen

    index, weight = _select(params, norms, segments, top, pick)
    center = channel_means(rows.x) if params.centered else None
    kept = sums if params.centered else None
    return sampled(rows, index, weight, center, kept, template, params.narrow)


def noise(site: Site, params: Params, *operands: Tensor) -> Tensor:
    """Return the variance of the estimate, without inner products of different pixels' terms."""
    rows = rows_of(site, *operands)
    segments, _, top, rest = _counts(site, params)
    center = channel_means(rows.x) if params.centered else None
    energy = pixel_energy(rows, center, params.block).view(segments, -1)
    norms = rows.grad.square().sum(1).view(-1, params.block).sum(1).sqrt().view(segments, -1)
    mass = norms if params.sampling == "norm" else torch.ones_like(norms)
    if top:
        mass = mass.scatter(1, mass.topk(top, dim=1).indices, 0.0)
    # The expected number of times, R p, as an interval in units of strata: whole ones are certain.
    ends = mass.cumsum(1) * (rest / mass.sum(1, keepdim=True).clamp_min(1e-300))
    share = mass * (rest / mass.sum(1, keepdim=True).clamp_min(1e-300))
    first = ends - share
    whole = (ends.floor() - first.ceil()).clamp_min(0)
    crossed = ends.floor() > first.floor()
    parts = (first.ceil() - first).square() + (ends - ends.floor()).square() + whole
    uncertain = share - torch.where(crossed, parts, share.square())
    terms = torch.where(share > 0, energy / share.square().clamp_min(1e-300) * uncertain, 0.0)
    return terms.sum()


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shapes(site: Site) -> tuple[Any, Any]:
    """Return the shapes of output gradient and input, as those of a convolution."""
    if site.conv is not None:
        return site.shapes[2], site.shapes[0]
    (columns, rows), (_, inner) = site.shapes
    return (rows, columns, 1), (rows, inner, 1)


def _counts(site: Site, params: Params) -> tuple[Dim, Dim, Dim, Dim]:
    """Return segments, and of each: blocks, those taken for their norm, and those sampled."""
    gradient, _ = _shapes(site)
    positions = element_count(gradient[2:])
    single = params.per_sample and site.conv is not None
    segments = gradient[0] if single else 1
    blocks = (positions if single else positions * gradient[0]) // params.block
    keep, top = Fraction(str(params.keep)), Fraction(str(params.top))
    taken = -((-blocks * keep.numerator) // keep.denominator)
    largest = taken * top.numerator // top.denominator
    return segments, blocks, largest, taken - largest


def _select(
    params: Params, norms: Tensor, segments: Dim, top: Dim, pick: Any
) -> tuple[Tensor, Tensor]:
    """Return the flat numbers of the pixels that are taken, and their weights."""
    if params.sampling == "uniform":
        index, weight = pick(torch.ones_like(norms))
    elif params.top == 0:
        index, weight = pick(norms)
    else:
        masses = norms.view(segments, -1)
        largest = masses.topk(top, dim=1).indices
        index, weight = pick(masses.scatter(1, largest, 0.0).flatten())
        first = torch.arange(segments, device=norms.device)[:, None] * masses.shape[1]
        index = torch.cat([(largest + first).flatten(), index])
        weight = torch.cat([torch.ones_like(largest, dtype=weight.dtype).flatten(), weight])
    if params.block > 1:
        steps = torch.arange(params.block, device=norms.device)
        index = (index[:, None] * params.block + steps).flatten()
        weight = weight[:, None].expand(-1, params.block).flatten()
    return index, weight


def ladder(site: Site) -> tuple[Params, ...]:
    """Return a half, a quarter and a tenth of the pixels."""
    del site
    return tuple(Params(keep=keep) for keep in (0.5, 0.25, 0.1))


def prior(site: Site, params: Params) -> Prior | None:
    """Return what was measured with a quarter of the pixels, carried over to other shares.

    A tenth added four times as much, where 1 / keep - 1 is three times as large. Rows of a linear
    layer are whole samples, which differ more.
    """
    if params.top or params.block > 1 or params.per_sample:
        return None
    quarter = {
        ("norm", True): 0.29, ("norm", False): 0.42, ("uniform", True): 1.0, ("uniform", False): 1.5
    }[params.sampling, params.centered]  # fmt: skip
    if site.conv is None:
        quarter *= 3.8 / 0.29
    return Prior(quarter * ((1 / params.keep - 1) / 3) ** 1.3)


def samples() -> tuple[Sample, ...]:
    """Return convolutions and a linear layer, every kind of sampling, and what is rejected."""
    nn, wanted = torch.nn, Gradient.WEIGHT
    return (
        Sample(
            (5, 3, 9, 7),
            lambda: nn.Conv2d(3, 4, 3, padding=1),
            wanted,
            Params(),
            computes_in=torch.bfloat16,
        ),
        Sample(
            (3, 6, 12, 11),
            lambda: nn.Conv2d(6, 4, (3, 2), (2, 1), (2, 0), (1, 2), groups=2),
            wanted,
            Params(keep=0.4, per_sample=True, narrow=False),
        ),
        Sample(
            (4, 16, 8, 8),
            lambda: nn.Conv2d(16, 4, 3, padding=1),
            wanted,
            Params(keep=0.5, sampling="uniform", block=2, centered=False, narrow=False),
        ),
        Sample(
            (4, 3, 7, 8),
            lambda: nn.Conv2d(3, 5, 3),
            wanted,
            Params(keep=0.3, top=0.2, narrow=False),
        ),
        Sample(
            (3, 4, 5, 5),
            lambda: nn.Conv2d(4, 3, 3),
            wanted,
            Params(keep=1.0, sampling="uniform", narrow=False),
            exact=True,
        ),
        Sample((70, 10), lambda: nn.Linear(10, 6), wanted, Params(narrow=False)),
        Sample((2, 3, 4, 4), lambda: nn.Conv2d(3, 4, 3), wanted, Params(), rejected=True),
        Sample((2, 3, 9, 9), lambda: nn.ConvTranspose2d(3, 5, 3), wanted, Params(), rejected=True),
    )


register(
    Method(
        name="pixels",
        summary="output pixels sampled by the norm of their gradient, x centred",
        source="Adelman, Silberstein 2018, applied to output pixels",
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
        fast_on_gpu=False,
    )
)
