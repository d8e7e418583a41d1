"""crs: column-row sampling, scaled so that the expectation is the exact product.

Adelman, Silberstein, "Faster Neural Network Training with Approximate Tensor Operations", 2018
(arXiv:1805.08079), equation 1 for matrices and 6 for convolutions: of the n terms z[i] (outer
products of column and row; convolutions of one channel) that a product is the sum of, R are taken:

    estimate = sum_r weight[r] z[i_r].

Unbiased: a term's weights, summed over the times that it is taken, have expectation 1. With
replacement, i is drawn R times with probability p[i] and weight 1 / (R p[i]), so R p[i] / (R p[i]).
Uniform without replacement, it is taken with probability R / n and weight n / R. By norm without
replacement, given the R-th largest priority t of the *other* terms, it is taken if m[i] / u > t,
with probability min(1, m[i] / t), and weight max(1, t / m[i]) (see `graphpass.column_row`).

Variance with replacement (paper, lemma 1 and proposition 2): (sum |z[i]|^2 / p[i] - |sum z|^2) / R,
least for p[i] proportional to |z[i]|. For matrices that is the product of the norms of column and
row. For convolutions the product of the norms is taken as well; |z[i]| itself costs as much as the
product (`tests/graphpass/test_crs.py` compares). Pixels of a weight gradient have exact norms.

On a CPU what is gathered is multiplied by the vendor's library, as a smaller dense problem, so it
pays where the product costs more than reading both operands twice: not in thin or small layers. On
a GPU kernels follow the list to the operands, and nothing is gathered but weights.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from graphpass.column_row import (
    cost,
    draw,
    lower,
    noise,
    operands,
    reference,
    reject,
)
from graphpass.method import Method, Sample, register
from graphpass.sampling import Sampling
from graphpass.site import Gradient


@dataclass(frozen=True, slots=True)
class Params(Sampling):
    """Parameters of `Sampling`; sampling is "norm", in proportion to it, or "uniform"."""

    method: ClassVar[str] = "crs"
    legal: ClassVar[tuple[str, ...]] = ("norm", "uniform")
    scaled: ClassVar[bool] = True


def samples() -> tuple[Sample, ...]:
    """Return every kind of sampling, of every product, along every axis."""
    nn = torch.nn
    weight, input_, forward = Gradient.WEIGHT, Gradient.INPUT, Gradient.FORWARD
    return (
        Sample((9, 48), lambda: nn.Linear(48, 6), forward, Params(sampling="uniform", keep=0.9)),
        Sample((70, 64), lambda: nn.Linear(64, 12), weight, Params(keep=0.75)),
        Sample((9, 48), lambda: nn.Linear(48, 64), input_, Params(replacement=True, keep=0.75)),
        Sample((3, 44, 5, 6), lambda: nn.Conv2d(44, 4, 3, 2, 1), forward, Params(keep=0.95)),
        Sample(
            (2, 4, 7, 6),
            lambda: nn.Conv2d(4, 96, 3, padding=1, groups=2),
            input_,
            Params(keep=0.9, replacement=True),
        ),
        Sample(
            (5, 3, 9, 7),
            lambda: nn.Conv2d(3, 4, 3, padding=1),
            weight,
            Params(narrow=False, keep=0.3),
        ),
        Sample(
            (48, 3, 4, 4),
            lambda: nn.Conv2d(3, 4, 3),
            input_,
            Params(axis="samples", sampling="uniform", replacement=True, keep=0.9),
        ),
        Sample((2, 44, 5, 5), lambda: nn.Conv2d(44, 4, 3), input_, Params(0.95, axis="channels")),
        Sample((9, 48), lambda: nn.Linear(48, 6), input_, Params(0.75, axis="channels")),
        Sample(
            (3, 44, 5),
            lambda: nn.ConvTranspose1d(44, 4, 3, 2, bias=False),
            forward,
            Params(keep=1.0),
            exact=True,
        ),
        Sample((9, 10), lambda: nn.Linear(10, 6), forward, Params(), rejected=True),
    )


register(
    Method(
        name="crs",
        summary="columns and rows, or channels, sampled and scaled; a smaller dense product",
        source="Adelman, Silberstein 2018",
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
        kernels=("listed_wgrad", "sampled_channels"),
        fast_on_cpu=True,
        fast_on_gpu=False,
    )
)
