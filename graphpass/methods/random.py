"""Random: fresh normal values stand in for the weight gradient.

Wang, Nelaturu, Amarasinghe, "Accelerated CNN Training Through Gradient Approximation", 2019,
section 2.2: every value is drawn anew on every step from N(0, std^2), std = 1 / batch. Estimator:
std * z. Biased: its expectation is 0, so the squared relative bias is 1; its variance is
std^2 times the number of weights. The layer's input and output gradient are not read.

Inductor draws and writes the values in one kernel. Arithmetic bounds it: on a GPU (sm_90) 129
instructions a value, of which memory would allow 25; with 32-bit hashes and a polynomial for the
cosine a kernel of its own still has 82, so that there is none.
"""

import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from codegen import draws as random_draws
from cost_model import KernelCost, element_count, elementwise
from graphpass.errors import ConfigError, Rejected
from graphpass.kernels_of import mover
from graphpass.method import Method, Sample, register
from graphpass.site import Gradient, Site

# Two hashed uniforms of about 25 integer operations each, then log, sqrt, cos and two products.
_FLOPS_PER_DRAW = 55


@dataclass(frozen=True, slots=True)
class Params:
    """Parameters of the random method.

    Attributes:
        std: standard deviation of a value; None for 1 / batch (rows, for a linear layer).
    """

    std: float | None = None

    def __post_init__(self) -> None:
        """Check the range.

        Raises:
            ConfigError: if `std` is not a positive finite number.
        """
        if self.std is None:
            return
        is_number = isinstance(self.std, (int, float)) and not isinstance(self.std, bool)
        # Also refuses NaN, and integers larger than every floating-point number.
        if not is_number or not 0 < self.std <= sys.float_info.max:
            raise ConfigError(f"method 'random': std={self.std!r}; give a positive number or None")


def draw(site: Site, params: Params, template: Tensor, seed: Tensor, salt: int) -> Tensor:
    """Return one standard normal number for each weight: float32, flat."""
    del site, params
    return random_draws.normal(seed, template.numel(), salt)


def reference(
    site: Site, params: Params, template: Tensor, draws: Tensor, *operands: Tensor
) -> Tensor:
    """Return std times the draws, in the template's shape.

    `operands` is what says how large the batch is: the output gradient [B, ...] of a convolution,
    or the left factor [M, K] of a matrix product, which is contracted over the batch K.
    """
    std = params.std
    if std is None:
        (operand,) = operands
        std = 1.0 / (operand.shape[0] if site.conv is not None else operand.shape[-1])
    return (draws * std).view(template.shape).to(template.dtype)


def cost(site: Site, params: Params) -> tuple[KernelCost, ...]:
    """Return the cost of drawing and writing every value."""
    del params
    elements = element_count(site.output)
    # The draws are computed and written in one pass; nothing is read.
    drawn = elementwise(elements, 0, 1, site.itemsize, flops_per_element=_FLOPS_PER_DRAW)
    return (mover("draw", drawn, site.dtype),)


def reject(site: Site, params: Params) -> Rejected | None:
    """Accept every weight gradient."""
    del site, params
    return None


def operands(site: Site, params: Params) -> tuple[str, ...]:
    """Name the operand that tells the size of the batch, where it is needed."""
    if params.std is not None:
        return ()
    return ("grad",) if site.conv is not None else ("left",)


def lower(
    site: Site, params: Params, template: Tensor, seed: Tensor, salt: int, *operands: Tensor
) -> Tensor:
    """Return the reference on draws made in the graph."""
    return reference(site, params, template, draw(site, params, template, seed, salt), *operands)


def samples() -> tuple[Sample, ...]:
    """Return convolutions and linear layers of several kinds."""
    nn = torch.nn
    return (
        Sample((5, 3, 9, 7), lambda: nn.Conv2d(3, 4, 3, padding=1), Gradient.WEIGHT, Params()),
        Sample((3, 4, 6, 5, 4), lambda: nn.Conv3d(4, 4, 2), Gradient.WEIGHT, Params(std=0.5)),
        Sample((2, 3, 11), lambda: nn.ConvTranspose1d(3, 5, 4, 2), Gradient.WEIGHT, Params()),
        Sample((7, 10), lambda: nn.Linear(10, 6), Gradient.WEIGHT, Params()),
        Sample((7, 10), lambda: nn.Linear(10, 6), Gradient.INPUT, Params(), rejected=True),
    )


register(
    Method(
        name="random",
        summary="fresh normal values stand in for the weight gradient",
        source="Wang, Nelaturu, Amarasinghe 2019, section 2.2",
        unbiased=False,
        gradients=(Gradient.WEIGHT,),
        params=Params,
        reject=reject,
        cost=cost,
        operands=operands,
        draw=draw,
        reference=reference,
        lower=lower,
        samples=samples,
    )
)
