"""swat: products from the weights, or the activations, of largest magnitude.

Raihan, Aamodt, "Sparse Weight Activation Training", 2020 (arXiv:2001.01969). With top_K(v) the
tensor v of which all but the K values of largest magnitude are 0:

    y = x * top_K(w),     dx = g * top_K(w),     dw = g * top_K(x).

Forward and dx use the same weights, as they are chosen from the same tensor; the weight gradient is
dense, so all weights are updated and the choice can change from step to step.

`structure` says what is chosen: "none", single values; "filter", whole input channels of each
filter by their L1 norm (of activations, single values); "channel", whole input channels for all
filters at once, by the L1 norm of their weights, or of their activations for dw. The last is a
smaller dense product and fast; the others are masks and a dense product, which cost more than the
exact one on hardware that multiplies zeros. On a GPU, values below a threshold are left out where
the product reads them.

Biased: what is left out has no share in the expectation. The error of top_K(v) is the norm of what
is left out, the least of all tensors with K values. The threshold of single values is the K-th
largest of a part of them, evenly spread; paper, section 3.3.3, keeps one for up to 1000 steps.
"""

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import sympy
import torch
from torch import Tensor

from codegen import magnitude
from codegen.kernel import call, kernels, unavailable
from cost_model import Cost, Dim, KernelCost, Shape, element_count, elementwise, gather, reduce
from graphpass.errors import ConfigError, Reason, Rejected
from graphpass.feedback import check_feedback, with_feedback
from graphpass.kernels_of import mover, product, vendor_kind
from graphpass.method import Method, Sample, no_draw, register
from graphpass.outer_pairs import OuterChannels, of_columns
from graphpass.pairs import ChannelPairs, MatrixPairs, exact, scattered, wide
from graphpass.rows import as_maps
from graphpass.site import Gradient, Site

STRUCTURES = ("none", "filter", "channel")


@dataclass(frozen=True, slots=True)
class Params:
    """Parameters of SWAT.

    Attributes:
        sparsity: share of the weights, activations or channels that is left out, in [0, 1).
        structure: "none", "filter" or "channel".
        threshold_from: number of values that the threshold is taken from; 0 for all.
        feedback: whether a weight gradient is given later what it was not given (error feedback).
    """

    sparsity: float = 0.9
    structure: str = "none"
    threshold_from: int = 65536
    feedback: bool = False

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: if a value is out of range.
        """
        number = isinstance(self.sparsity, int | float) and not isinstance(self.sparsity, bool)
        checks = {
            "sparsity": (number and 0 <= self.sparsity < 1, "a number in [0, 1)"),
            "structure": (self.structure in STRUCTURES, " or ".join(map(repr, STRUCTURES))),
            "threshold_from": (
                type(self.threshold_from) is int and self.threshold_from >= 0,
                "an integer >= 0",
            ),
        }
        for name, (good, wanted) in checks.items():
            if not good:
                raise ConfigError(f"method 'swat': {name}={getattr(self, name)!r}; give {wanted}")
        check_feedback("swat", self.feedback)


def reference(
    site: Site, params: Params, template: Tensor, draws: None, first: Tensor, second: Tensor
) -> Tensor:
    """Return the exact product with the second operand masked.

    Args:
        site: a product of a convolution or of a linear layer.
        params: parameters of the method.
        template: the result's shape.
        draws: none.
        first: the input, the output gradient, or the left factor.
        second: the weight, the input, or the right factor.
    """
    del draws
    if params.structure == "channel":
        norms, axis = _channel_norms(site, second)
        chosen = norms.topk(_kept(norms.shape[1], params), dim=1).indices
        mask = torch.zeros_like(norms).scatter(1, chosen, 1.0)
        shape = [1] * second.dim()
        # Channels of a group stand at `axis` of the operand; of an image, those of all groups.
        shape[axis] = -1
        groups = mask.shape[0]
        if groups > 1:
            shape[0] = groups
            return exact(site, template, first, _by_group(second, mask.view(shape)))
        return exact(site, template, first, second * mask.view(shape))
    return exact(site, template, first, second * _mask(site, params, second))


def cost(site: Site, params: Params) -> tuple[KernelCost, ...]:
    """Return the kernels that choose, and the product."""
    whole, count, size = site.cost, element_count(_second(site)), site.itemsize
    if params.structure != "channel":
        return (
            # A part of the values is read for the threshold, ...
            mover("reduce", reduce(_looked_at(count, params), 1, size), site.dtype),
            # ... all are compared with it and written, ...
            mover("elementwise", elementwise(count, 1, 1, size), site.dtype),
            # ... and the product is the dense one.
            product(site, vendor_kind(site), whole),
        )
    channels = _channels(site)
    share = sympy.sympify(_kept(channels, params)) / channels
    copied = gather(channels * share, count / sympy.sympify(channels), size)
    if site.gradient is Gradient.FORWARD:
        # Forward, the channels of the input are copied too.
        copied += gather(channels * share, element_count(_first(site)) / channels, size)
    return (
        # The operand is read for the norms of its channels, ...
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
    """Accept convolutions and linear layers with more channels than are kept."""
    if site.conv is None and site.op not in {"mm", "addmm"}:
        return Rejected(Reason.UNSUPPORTED_SHAPE, f"{site.op} has no weight")
    if site.conv is not None and site.conv.transposed:
        return Rejected(Reason.UNSUPPORTED_SHAPE, "transposed convolution")
    if any(dim == 0 for shape in site.shapes for dim in shape):
        return Rejected(Reason.NOT_CHEAPER, "an operand is empty")
    if params.structure != "channel":
        return None
    if site.conv is not None and site.conv.groups > 1 and site.gradient is not Gradient.FORWARD:
        return Rejected(Reason.UNSUPPORTED_SHAPE, "channels of a convolution with groups")
    channels = _channels(site)
    if params.sparsity and isinstance(channels, int) and _kept(channels, params) == channels:
        return Rejected(Reason.NOT_CHEAPER, f"all {channels} channels would be kept")
    return None


def operands(site: Site, params: Params) -> tuple[str, ...]:
    """Return the names of the operands; the second is made sparse."""
    del params
    if site.conv is None:
        return ("left", "right")
    return {
        Gradient.FORWARD: ("input", "weight"),
        Gradient.INPUT: ("grad", "weight"),
        Gradient.WEIGHT: ("grad", "input"),
    }[site.gradient]


def lower(
    site: Site,
    params: Params,
    template: Tensor,
    seed: Tensor,
    salt: int,
    first: Tensor,
    second: Tensor,
) -> Tensor:
    """Return the product: a smaller one of the channels that are kept, or a masked one."""
    del seed, salt
    if _by_filter(site, params):
        return exact(site, template, first, second * _mask(site, params, second))
    if params.structure != "channel":
        return _of_large(site, template, first, second, _threshold(params, second))
    norms, _ = _channel_norms(site, second)
    index = norms.topk(_kept(norms.shape[1], params), dim=1).indices.sort(1).values
    if site.gradient is Gradient.FORWARD:
        kind = MatrixPairs if site.conv is None else ChannelPairs
        return kind(site, template, (first, second)).sampled(index, None, False)
    if site.conv is None:
        columns = index.squeeze(0)
        return scattered(template, 1, columns, of_columns(site, first, second, columns))
    return OuterChannels(site, template, (first, second, second)).sampled(index, None, False)


def _of_large(
    site: Site, template: Tensor, first: Tensor, second: Tensor, threshold: Tensor
) -> Tensor:
    """Return the product without the second operand's values below the threshold, 0-d."""
    weight, conv = site.gradient is Gradient.WEIGHT, site.conv
    kernel = kernels()["masked_wgrad" if weight else "masked_product"]
    if conv is not None:
        axes = map(list, (conv.stride, conv.padding, conv.dilation))
        sizes = list(template.shape[2:] if weight else template.shape)
        side = () if weight else (site.gradient is Gradient.FORWARD,)
        result: Tensor = call(kernel, first, second, threshold, sizes, *axes, conv.groups, *side)
        return result
    # A product of matrices is a forward product of single pixels, or a weight gradient of those.
    one, none = [1, 1], [0, 0]
    maps = map(as_maps, (first.t(), second) if weight else (first, second.t()))
    sizes, side = (one, ()) if weight else ([*template.shape, 1, 1], (True,))
    args = (*maps, threshold, sizes, one, none, one, 1, *side)
    if unavailable(kernel, *args) is None:
        result = kernel.op(*args).flatten(1)
        return result
    return torch.mm(first, magnitude.large(second, threshold))


def _by_filter(site: Site, params: Params) -> bool:
    """Return whether whole filters of a weight are chosen."""
    return params.structure == "filter" and site.gradient is not Gradient.WEIGHT


def _mask(site: Site, params: Params, value: Tensor) -> Tensor:
    """Return 1 for the values that are kept and 0 for others."""
    if _by_filter(site, params):
        # [Co, Ci / groups, taps]; a linear layer's weight stands transposed in the forward product
        filters = value.flatten(2) if site.conv is not None else value.unsqueeze(-1)
        axis = 0 if site.conv is None and site.gradient is Gradient.FORWARD else 1
        norms = filters.abs().sum(2, dtype=wide(value))
        kept = norms.topk(_kept(norms.shape[axis], params), dim=axis).indices
        mask = torch.zeros_like(norms).scatter(axis, kept, 1.0).to(value.dtype)
        return mask.view(*mask.shape, *[1] * (value.dim() - 2))
    return (value.abs() >= _threshold(params, value)).to(value.dtype)


def _threshold(params: Params, value: Tensor) -> Tensor:
    """Return the K-th largest magnitude, of a part of the values if there are many: 0-d."""
    count, wanted = value.numel(), params.threshold_from
    magnitudes = value.flatten().abs()
    # Of a dynamic batch all are taken: how many there are is only known when it runs.
    if isinstance(count, int) and 0 < wanted < count:
        # An odd step meets all columns of an image and all channels, which are often powers of 2.
        # Not by Python's indexing, which wants a device: a fake tensor may have none.
        step = (count // wanted) | 1
        magnitudes = torch.ops.aten.slice.Tensor(magnitudes, 0, 0, None, step)
    size = magnitudes.shape[0]
    threshold: Tensor = magnitudes.kthvalue(size - _kept(size, params) + 1).values
    return threshold


def _looked_at(count: Dim, params: Params) -> Dim:
    """Return the number of values that the threshold is taken from."""
    if params.threshold_from == 0:
        return count
    if isinstance(count, int):
        return min(count, params.threshold_from)
    return sympy.Min(count, params.threshold_from)


def _channel_norms(site: Site, second: Tensor) -> tuple[Tensor, int]:
    """Return L1 norms of the operand's input channels, [groups, channels], and their axis."""
    axis = 0 if site.conv is None and site.gradient is Gradient.FORWARD else 1
    groups = 1
    if site.conv is not None and site.gradient is not Gradient.WEIGHT:
        groups = site.conv.groups
    parts = second.unflatten(0, (groups, -1)) if groups > 1 else second.unsqueeze(0)
    others = [at for at in range(1, parts.dim()) if at != axis + 1]
    return parts.abs().sum(others, dtype=wide(second)), axis


def _by_group(weight: Tensor, mask: Tensor) -> Tensor:
    """Return the filters of every group, masked by the group's channels."""
    masked: Tensor = weight.unflatten(0, (mask.shape[0], -1)) * mask[:, None]
    return masked.flatten(0, 1)


def _kept(count: Any, params: Params) -> Any:
    """Return how many of `count` are kept: all but `sparsity` of them, rounded up."""
    return (
        count
        - count
        * Fraction(str(params.sparsity)).numerator
        // Fraction(str(params.sparsity)).denominator
    )


def _second(site: Site) -> Shape:
    if site.conv is None:
        return site.shapes[1]
    return site.shapes[0] if site.gradient is Gradient.WEIGHT else site.shapes[1]


def _first(site: Site) -> Shape:
    return site.shapes[0]


def _channels(site: Site) -> Dim:
    """Return the number of input channels, of a group of a weight."""
    if site.conv is None:
        return site.shapes[1][0 if site.gradient is Gradient.FORWARD else 1]
    return _second(site)[1]


def samples() -> tuple[Sample, ...]:
    """Return every structure and every product, and what is rejected."""
    nn = torch.nn
    weight, input_, forward = Gradient.WEIGHT, Gradient.INPUT, Gradient.FORWARD
    half, filters = Params(0.5), Params(0.5, "filter")
    channel = Params(0.5, "channel")
    return (
        Sample((5, 3, 9, 7), lambda: nn.Conv2d(3, 4, 3, padding=1), input_, channel),
        Sample((3, 6, 8, 7), lambda: nn.Conv2d(6, 5, 3, padding=1), weight, channel),
        Sample((3, 8, 5, 6), lambda: nn.Conv2d(8, 6, 3, 2, groups=2), forward, channel),
        Sample((3, 6, 8, 7), lambda: nn.Conv2d(6, 4, 3, groups=2), forward, filters),
        Sample((3, 6, 8, 7), lambda: nn.Conv2d(6, 4, 3), weight, Params(0.8, threshold_from=100)),
        Sample((3, 6, 8, 7), lambda: nn.Conv2d(6, 4, 3), weight, Params(0.8, feedback=True)),
        Sample((7, 12), lambda: nn.Linear(12, 5), forward, filters),
        Sample((7, 12), lambda: nn.Linear(12, 5), input_, channel),
        Sample((2, 3, 9, 9), lambda: nn.ConvTranspose2d(3, 5, 3), forward, half, rejected=True),
    )


register(
    with_feedback(
        Method(
            name="swat",
            summary="weights (forward, dx) and activations (dw) of largest magnitude, others 0",
            source="Raihan, Aamodt 2020",
            unbiased=False,
            gradients=(Gradient.WEIGHT, Gradient.INPUT, Gradient.FORWARD),
            params=Params,
            reject=reject,
            cost=cost,
            operands=operands,
            draw=no_draw,
            reference=reference,
            lower=lower,
            samples=samples,
            kernels=("listed_wgrad", "masked_product", "masked_wgrad", "sampled_channels"),
        )
    )
)
