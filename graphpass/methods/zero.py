"""Zero: the gradient is not computed and counts as zero.

Wang, Nelaturu, Amarasinghe, "Accelerated CNN Training Through Gradient Approximation", 2019,
section 2.1: passing back zero freezes the layer's filter for that step. Estimator: 0. Biased, with
bias -dw, so the squared relative bias is 1. Nothing of the layer has to be kept for backward.

As an input gradient, zero cuts off every layer in front of it, along this path, for that step.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from cost_model import KernelCost, element_count, fill
from graphpass.errors import Rejected
from graphpass.kernels_of import mover
from graphpass.method import Method, Prior, Sample, no_draw, register
from graphpass.site import Gradient, Site


@dataclass(frozen=True, slots=True)
class Params:
    """Zero has no parameters."""


def reference(site: Site, params: Params, template: Tensor, draws: None) -> Tensor:
    """Return zeros of the template's shape."""
    del site, params, draws
    return torch.zeros(template.shape, dtype=template.dtype, device=template.device)


def cost(site: Site, params: Params) -> tuple[KernelCost, ...]:
    """Return the cost of writing the zeros."""
    del params
    # The result is written once.
    return (mover("fill", fill(element_count(site.output), site.itemsize), site.dtype),)


def reject(site: Site, params: Params) -> Rejected | None:
    """Accept every gradient."""
    del site, params
    return None


def lower(site: Site, params: Params, template: Tensor, seed: Tensor, salt: int) -> Tensor:
    """Return the reference: the compiler turns it into a fill."""
    del seed, salt
    return reference(site, params, template, None)


def prior(site: Site, params: Params) -> Prior | None:
    """Return that the layer's weight gradient is lost: 19 of 20, if the first layer's is kept.

    An input gradient takes with it what lies before: how much depends on the layer.
    """
    del params
    return Prior(0.0, bias=19 / 20) if site.gradient is Gradient.WEIGHT else None


def samples() -> tuple[Sample, ...]:
    """Return convolutions and linear layers of several kinds."""
    nn = torch.nn
    return (
        Sample((5, 3, 9, 7), lambda: nn.Conv2d(3, 4, 3, padding=1), Gradient.WEIGHT, Params()),
        Sample((2, 4, 8, 7), lambda: nn.Conv2d(4, 6, 3, 2, 1, groups=2), Gradient.INPUT, Params()),
        Sample((2, 3, 11), lambda: nn.ConvTranspose1d(3, 5, 4, 2), Gradient.WEIGHT, Params()),
        Sample((7, 10), lambda: nn.Linear(10, 6, bias=False), Gradient.WEIGHT, Params()),
        Sample((7, 10), lambda: nn.Linear(10, 6), Gradient.INPUT, Params()),
    )


register(
    Method(
        name="zero",
        summary="the gradient counts as zero; the layer's weight rests for that step",
        source="Wang, Nelaturu, Amarasinghe 2019, section 2.1",
        unbiased=False,
        gradients=(Gradient.WEIGHT, Gradient.INPUT),
        params=Params,
        reject=reject,
        cost=cost,
        operands=lambda site, params: (),
        draw=no_draw,
        reference=reference,
        lower=lower,
        samples=samples,
        prior=prior,
        fast_on_cpu=True,
    )
)
