"""meprop: gradients from the largest output gradients, of every example or of the whole batch.

Sun, Ren, Ma, Wang, "meProp: Sparsified Back Propagation for Accelerated Deep Learning with Reduced
Overfitting", 2017 (arXiv:1706.06197), for linear layers; Wei et al., "Minimal Effort Back
Propagation for Convolutional Neural Networks", 2017 (arXiv:1709.05804). With top_k(g) the output
gradient of which all but the largest magnitudes are 0:

    dx = top_k(g) * w,     dw = top_k(g) * x.

As the paper has it, the largest are chosen example by example, of a convolution among all channels
and pixels; that is a mask and a dense product, which costs more than the exact one on hardware that
multiplies zeros. With `unified`, the same channels are chosen for the whole batch, those of largest
L1 norm: the product is a smaller dense one, and the other channels' weights rest for that step.

Biased: what is left out has no share in the expectation.
"""

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import sympy
import torch
from torch import Tensor

from codegen.dense import laid_out
from cost_model import Cost, KernelCost, Shape, element_count, elementwise, gather, reduce
from graphpass.errors import ConfigError, Reason, Rejected
from graphpass.feedback import check_feedback, with_feedback
from graphpass.kernels_of import mover, product, vendor_kind
from graphpass.method import Method, Sample, no_draw, register
from graphpass.pairs import exact, scattered, wide
from graphpass.site import Gradient, Site


@dataclass(frozen=True, slots=True)
class Params:
    """Parameters of meProp.

    Attributes:
        share: part of the values, or of the channels, that is used, in (0, 1].
        unified: whether the same channels are used for the whole batch.
        feedback: whether a weight gradient is given later what it was not given (error feedback).
    """

    share: float = 0.1
    unified: bool = True
    feedback: bool = False

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: if a value is out of range.
        """
        number = isinstance(self.share, int | float) and not isinstance(self.share, bool)
        if not (number and 0 < self.share <= 1):
            raise ConfigError(f"method 'meprop': share={self.share!r}; give a number in (0, 1]")
        if not isinstance(self.unified, bool):
            raise ConfigError(f"method 'meprop': unified={self.unified!r}; give True or False")
        check_feedback("meprop", self.feedback)


def reference(
    site: Site, params: Params, template: Tensor, draws: None, grad: Tensor, other: Tensor
) -> Tensor:
    """Return the exact product of the masked output gradient.

    Args:
        site: a gradient of a convolution or of a linear layer.
        params: parameters of the method.
        template: the result's shape.
        draws: none.
        grad: the output gradient; of a linear layer's weight gradient transposed, [N, M].
        other: the input, the weight, or the right factor.
    """
    del draws
    axis = _channel_axis(site)
    if not params.unified:
        return exact(site, template, grad * _largest_of_examples(site, params, grad), other)
    shape = [1] * grad.dim()
    shape[axis] = grad.shape[axis]
    mask = torch.zeros(shape, dtype=grad.dtype, device=grad.device)
    mask = mask.index_fill(axis, _channels(site, params, grad), 1.0)
    return exact(site, template, grad * mask, other)


def cost(site: Site, params: Params) -> tuple[KernelCost, ...]:
    """Return the kernels that choose, and the product."""
    whole, size, count = site.cost, site.itemsize, element_count(_grad_shape(site))
    if not params.unified:
        return (
            # The values of every example are read for its threshold, ...
            mover("reduce", reduce(count, 1, size), site.dtype),
            # ... all are compared with it and written, ...
            mover("elementwise", elementwise(count, 1, 1, size), site.dtype),
            # ... and the product is the dense one.
            product(site, vendor_kind(site), whole),
        )
    channels = _grad_shape(site)[_channel_axis(site)]
    share = sympy.sympify(_kept(channels, params)) / channels
    copied = gather(channels * share, count / sympy.sympify(channels), size)
    if site.gradient is Gradient.INPUT:
        # The filters that belong to them are copied too.
        copied += gather(channels * share, element_count(site.shapes[1]) / channels, size)
    return (
        # The output gradient is read for the norms of its channels, ...
        mover("reduce", reduce(count, channels, size), site.dtype),
        # ... those that are taken are copied, ...
        mover("convert", copied, site.dtype),
        # ... and multiplied; the whole result is written.
        product(
            site,
            vendor_kind(site),
            Cost(whole.flops * share, whole.bytes_read * share, whole.bytes_written),
        ),
    )


def reject(site: Site, params: Params) -> Rejected | None:
    """Accept convolutions and linear layers with more channels than are used."""
    if site.conv is None and site.op not in {"mm", "addmm"}:
        return Rejected(Reason.UNSUPPORTED_SHAPE, f"{site.op} has no output gradient of a layer")
    if site.conv is not None and (site.conv.transposed or site.conv.groups > 1):
        return Rejected(Reason.UNSUPPORTED_SHAPE, "transposed or grouped convolution")
    if any(dim == 0 for shape in site.shapes for dim in shape):
        return Rejected(Reason.NOT_CHEAPER, "an operand is empty")
    if not params.unified:
        return None
    channels = _grad_shape(site)[_channel_axis(site)]
    if params.share < 1 and isinstance(channels, int) and _kept(channels, params) == channels:
        return Rejected(Reason.NOT_CHEAPER, f"all {channels} channels would be used")
    return None


def operands(site: Site, params: Params) -> tuple[str, ...]:
    """Return the names of the operands, the output gradient first."""
    del params
    if site.conv is None:
        return ("left", "right")
    return ("grad", "input" if site.gradient is Gradient.WEIGHT else "weight")


def lower(
    site: Site,
    params: Params,
    template: Tensor,
    seed: Tensor,
    salt: int,
    grad: Tensor,
    other: Tensor,
) -> Tensor:
    """Return the product: a smaller one of the channels that are used, or a masked one."""
    if not params.unified:
        del seed, salt
        return reference(site, params, template, None, grad, other)
    index, axis = _channels(site, params, grad).sort().values, _channel_axis(site)
    part = grad.index_select(axis, index)
    if site.gradient is Gradient.WEIGHT:
        smaller = template[: index.shape[0]]
        if site.conv is not None:
            part = laid_out(part, grad)
        return scattered(template, 0, index, exact(site, smaller, part, other))
    filters = other.index_select(0, index)
    if site.conv is not None:
        part, filters = laid_out(part, grad), laid_out(filters, other)
    return exact(site, template, part, filters)


def _channels(site: Site, params: Params, grad: Tensor) -> Tensor:
    """Return the channels of largest L1 norm, in any order."""
    axis = _channel_axis(site)
    others = [at for at in range(grad.dim()) if at != axis]
    norms = grad.abs().sum(others, dtype=wide(grad))
    return norms.topk(_kept(norms.shape[0], params)).indices


def _largest_of_examples(site: Site, params: Params, grad: Tensor) -> Tensor:
    """Return 1 where a value is among the largest of its example, and 0 elsewhere."""
    transposed = site.conv is None and site.gradient is Gradient.WEIGHT
    examples = (grad.t() if transposed else grad).flatten(1).abs()
    count = examples.shape[1]
    least = examples.kthvalue(count - _kept(count, params) + 1, dim=1, keepdim=True).values
    mask = (examples >= least).to(grad.dtype)
    return mask.t() if transposed else mask.view(grad.shape)


def _channel_axis(site: Site) -> int:
    """Return where the output channels stand in the output gradient."""
    return 0 if site.conv is None and site.gradient is Gradient.WEIGHT else 1


def _grad_shape(site: Site) -> Shape:
    return site.shapes[0] if site.conv is None else site.shapes[2]


def _kept(count: Any, params: Params) -> Any:
    """Return how many of `count` are used: `share` of them, rounded up."""
    share = Fraction(str(params.share))
    return -(-count * share.numerator // share.denominator)


def samples() -> tuple[Sample, ...]:
    """Return both ways to choose, for both gradients, and what is rejected."""
    nn = torch.nn
    weight, input_ = Gradient.WEIGHT, Gradient.INPUT
    half, examples = Params(0.5), Params(0.3, unified=False)
    return (
        Sample((5, 3, 9, 7), lambda: nn.Conv2d(3, 4, 3, padding=1), weight, half),
        Sample((3, 5, 8, 7), lambda: nn.Conv2d(5, 6, 3, 2, 1), input_, half),
        Sample((7, 12), lambda: nn.Linear(12, 10), weight, examples),
        Sample((7, 12), lambda: nn.Linear(12, 10), input_, half),
        Sample((3, 5, 8, 7), lambda: nn.Conv2d(5, 6, 3), input_, examples),
        Sample((5, 3, 9, 7), lambda: nn.Conv2d(3, 4, 3, 2), weight, Params(0.5, feedback=True)),
        Sample((3, 6, 8, 7), lambda: nn.Conv2d(6, 4, 3, groups=2), weight, half, rejected=True),
        Sample(
            (7, 12), lambda: nn.Linear(12, 10), input_, Params(0.5, feedback=True), rejected=True
        ),
    )


register(
    with_feedback(
        Method(
            name="meprop",
            summary="the largest output gradients, or their channels of largest norm; others 0",
            source="Sun et al. 2017",
            unbiased=False,
            gradients=(Gradient.WEIGHT, Gradient.INPUT),
            params=Params,
            reject=reject,
            cost=cost,
            operands=operands,
            draw=no_draw,
            reference=reference,
            lower=lower,
            samples=samples,
            fast_on_cpu=True,
        )
    )
)
