"""crs_unscaled: column-row sampling without scaling; by default, the terms of largest norm.

Adelman, Silberstein, "Faster Neural Network Training with Approximate Tensor Operations", 2018
(arXiv:1805.08079), section 3.1: of the n terms that a product is the sum of, R are summed as they
are. `sampling="top"` takes those of largest norm, without any draw ("deterministic top-k", which
all of the paper's large experiments use); "norm" and "uniform" draw as `crs` does. What the terms
are, which of a layer's products they belong to, and what it costs is the same as for `crs`.

Biased: a term that is taken with probability q has expectation q z, not z. Where the terms are
random with mean zero the unscaled sum is nevertheless closer to the product than the scaled one:
of terms of equal size it misses (1 - R / n) of the energy instead of (n / R - 1) of it.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from graphpass.column_row import cost, draw, lower, operands, reference, reject
from graphpass.feedback import check_feedback, with_feedback
from graphpass.method import Method, Sample, register
from graphpass.sampling import Sampling
from graphpass.site import Gradient


@dataclass(frozen=True, slots=True)
class Params(Sampling):
    """Parameters of `Sampling`; sampling is "top", "norm" or "uniform".

    Attributes:
        sampling: how terms are chosen.
        feedback: whether a weight gradient is given later what it was not given (error feedback).
    """

    sampling: str = "top"
    feedback: bool = False

    method: ClassVar[str] = "crs_unscaled"
    legal: ClassVar[tuple[str, ...]] = ("top", "norm", "uniform")
    scaled: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: if a value is out of range.
        """
        Sampling.__post_init__(self)
        check_feedback(self.method, self.feedback)


def samples() -> tuple[Sample, ...]:
    """Return the largest, and every kind of draw."""
    nn = torch.nn
    weight, input_, forward = Gradient.WEIGHT, Gradient.INPUT, Gradient.FORWARD
    return (
        Sample((9, 44), lambda: nn.Linear(44, 6), forward, Params(keep=0.95)),
        Sample((9, 4), lambda: nn.Linear(4, 64), input_, Params(0.75, "norm")),
        Sample((5, 3, 6, 7), lambda: nn.Conv2d(3, 4, 3), weight, Params(0.5, narrow=False)),
        Sample((3, 44, 5, 6), lambda: nn.Conv2d(44, 4, 3), forward, Params(0.95, "uniform", True)),
        Sample((9, 44), lambda: nn.Linear(44, 6), weight, Params(axis="channels")),
        Sample((9, 44), lambda: nn.Linear(44, 36), input_, Params(axis="channels", again=0.4)),
        Sample(
            (2, 44, 5, 6),
            lambda: nn.Conv2d(44, 4, 3),
            weight,
            Params(axis="channels", again=0.5, narrow=False),
        ),
        Sample((9, 44), lambda: nn.Linear(44, 6), weight, Params(axis="channels", feedback=True)),
        Sample((9, 10), lambda: nn.Linear(10, 6), forward, Params(), rejected=True),
    )


register(
    with_feedback(
        Method(
            name="crs_unscaled",
            summary="the columns and rows, or channels, of largest norm; a smaller dense product",
            source="Adelman, Silberstein 2018, deterministic top-k",
            unbiased=False,
            gradients=(Gradient.WEIGHT, Gradient.INPUT, Gradient.FORWARD),
            params=Params,
            reject=reject,
            cost=cost,
            operands=operands,
            draw=draw,
            reference=reference,
            lower=lower,
            samples=samples,
            kernels=("listed_wgrad", "sampled_channels"),
            fast_on_cpu=True,
        )
    )
)
