"""swat: products from the weights, or the activations, of largest magnitude.

Raihan, Aamodt, "Sparse Weight Activation Training", 2020 (arXiv:2001.01969). With top_K(v) the
tensor v of which all but the K values of largest magnitude are 0:

    y = x * top_K(w),     dx = g * top_K(w),     dw = g * top_K(x).

Forward and dx use the same weights, as they are chosen from the same tensor; the weight gradient is
dense, so all weights are updated and the choice can change from step to step. `refresh` keeps what
was chosen (a threshold, of structures the channels) for so many steps, `freeze_after` the weights
that are used in the last step before; `mask_gradient` leaves the others out of the gradient, too.
With `distribution="momentum"` (SWAT-M) layers exchange density: `graphpass.largest.exchange`. What
is kept for that is in the session; nothing is compiled again.

`structure` says what is chosen: "none", single values; "filter", whole input channels of each
filter by their L1 norm (of activations, single values); "channel", whole input channels for all
filters at once, by the L1 norm of their weights, or of their activations for dw. The last is a
smaller dense product and fast; the others are masks and a dense product, which cost more than the
exact one on hardware that multiplies zeros. On a GPU, values below a threshold are left out where
the product reads them.

Biased: what is left out has no share in the expectation. The error of top_K(v) is the norm of what
is left out, the least of all tensors with K values. The threshold of single values is the K-th
largest of a part of them, evenly spread.
"""

import sympy
import torch
from torch import Tensor

from codegen import magnitude
from codegen.kernel import call, kernels, unavailable
from cost_model import Cost, Dim, KernelCost, Shape, element_count, elementwise, gather, reduce
from graphpass.errors import Reason, Rejected
from graphpass.feedback import with_feedback
from graphpass.kernels_of import mover, product, vendor_kind
from graphpass.largest import (
    Choice,
    canonical,
    channels_of,
    exchange,
    kept_of,
    like_weight,
    names_of_weight,
    slots,
    watches_weight,
    weight_of,
)
from graphpass.method import Method, Sample, no_draw, register
from graphpass.outer_pairs import OuterChannels, of_columns
from graphpass.pairs import ChannelPairs, MatrixPairs, exact, placed, wide
from graphpass.rows import as_maps
from graphpass.site import Gradient, Site
from graphpass.sparsity import Params
from graphpass.state import State


def reference(
    site: Site,
    params: Params,
    template: Tensor,
    draws: None,
    *operands: Tensor,
    state: State | None = None,
) -> Tensor:
    """Return the exact product with the second operand masked.

    Args:
        site: a product of a convolution or of a linear layer.
        params: parameters of the method.
        template: the result's shape.
        draws: none.
        *operands: the input, the output gradient, or the left factor; the weight, the input, or the
            right factor; of a weight gradient that looks at the weight, what that is found from.
        state: what was chosen before; None where every call chooses for itself.
    """
    del draws
    choice, (first, second) = Choice(site, params, state), operands[:2]
    if site.gradient is Gradient.WEIGHT and params.structure != "channel":
        large = second.abs() >= choice.used(choice.threshold(second))
        result = exact(site, template, first, second * large.to(second.dtype))
        return _of_weight(site, params, choice, result, operands)
    return exact(site, template, first, _masked(site, params, choice, second))


def weights(site: Site, params: Params, second: Tensor, state: State | None = None) -> Tensor:
    """Return the second operand with zeros for what is left out."""
    return _masked(site, params, Choice(site, params, state), second)


def _masked(site: Site, params: Params, choice: Choice, second: Tensor) -> Tensor:
    whole = canonical(site, second)
    if params.structure != "channel":
        return canonical(site, whole * choice.used(choice.mask(whole)))
    norms = _channel_norms(site, second)
    mask = torch.zeros_like(norms).scatter(1, choice.used(choice.index(norms)), 1.0)
    # Channels of a group stand at axis 1 of the operand; of an image, those of all groups.
    groups, shape = mask.shape[0], [1, -1, *[1] * (whole.dim() - 2)]
    if groups == 1:
        return canonical(site, whole * mask.to(whole.dtype).view(shape))
    filters = whole.unflatten(0, (groups, -1)) * mask.to(whole.dtype).view(groups, *shape)
    masked: Tensor = filters.flatten(0, 1)
    return masked


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
    channels = channels_of(site)
    share = sympy.sympify(kept_of(channels, params)) / channels
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
    watched = site.gradient is Gradient.WEIGHT and watches_weight(params)
    if watched and site.conv is None and site.factor is None:
        return Rejected(Reason.UNSUPPORTED_SHAPE, "the weight of the layer is not known")
    if params.structure != "channel":
        return None
    if site.conv is not None and site.conv.groups > 1 and site.gradient is not Gradient.FORWARD:
        return Rejected(Reason.UNSUPPORTED_SHAPE, "channels of a convolution with groups")
    channels = channels_of(site)
    if params.sparsity and isinstance(channels, int) and kept_of(channels, params) == channels:
        return Rejected(Reason.NOT_CHEAPER, f"all {channels} channels would be kept")
    return None


def operands(site: Site, params: Params) -> tuple[str, ...]:
    """Return the names of the operands; the second is made sparse."""
    weight = site.gradient is Gradient.WEIGHT
    more = names_of_weight(site) if weight and watches_weight(params) else ()
    if site.conv is None:
        return ("left", "right", *more)
    own = {
        Gradient.FORWARD: ("input", "weight"),
        Gradient.INPUT: ("grad", "weight"),
        Gradient.WEIGHT: ("grad", "input"),
    }[site.gradient]
    return (*own, *more)


def lower(
    site: Site,
    params: Params,
    template: Tensor,
    seed: Tensor,
    salt: int,
    *operands: Tensor,
    state: State | None = None,
) -> Tensor:
    """Return the product: a smaller one of the channels that are kept, or a masked one."""
    del seed, salt
    choice, (first, second) = Choice(site, params, state), operands[:2]
    if params.structure == "channel":
        index = choice.used(choice.index(_channel_norms(site, second)))
        return _of_channels(site, template, first, second, index)
    weight = site.gradient is Gradient.WEIGHT
    if not weight and (params.structure == "filter" or params.freeze_after is not None):
        whole = canonical(site, second)
        masked = whole * choice.used(choice.mask(whole))
        return exact(site, template, first, canonical(site, masked))
    threshold = choice.threshold(second if weight else canonical(site, second))
    result = _of_large(site, template, first, second, choice.used(threshold))
    return _of_weight(site, params, choice, result, operands)


def _of_weight(
    site: Site, params: Params, choice: Choice, result: Tensor, operands: tuple[Tensor, ...]
) -> Tensor:
    """Return what is made of a weight gradient where the method looks at the weight as well."""
    if site.gradient is not Gradient.WEIGHT or not watches_weight(params):
        return result
    grad = choice.of_weight(like_weight(site, result), weight_of(site, operands))
    return choice.used(like_weight(site, grad))


def _of_channels(
    site: Site, template: Tensor, first: Tensor, second: Tensor, index: Tensor
) -> Tensor:
    """Return the product of the channels that are named, [groups, R]."""
    if site.gradient is Gradient.FORWARD:
        kind = MatrixPairs if site.conv is None else ChannelPairs
        return kind(site, template, (first, second)).sampled(index, None, False)
    if site.conv is None:
        columns = index.squeeze(0)
        return placed(template, 1, columns, of_columns(site, first, second, columns))
    part = OuterChannels(site, template, (first, second, second)).part(index)
    return placed(template, 1, index.squeeze(0), part)


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


def _looked_at(count: Dim, params: Params) -> Dim:
    """Return the number of values that the threshold is taken from."""
    if params.threshold_from == 0:
        return count
    if isinstance(count, int):
        return min(count, params.threshold_from)
    return sympy.Min(count, params.threshold_from)


def _channel_norms(site: Site, second: Tensor) -> Tensor:
    """Return L1 norms of the operand's input channels: [groups, channels]."""
    groups = 1
    if site.conv is not None and site.gradient is not Gradient.WEIGHT:
        groups = site.conv.groups
    whole = canonical(site, second)
    parts = whole.unflatten(0, (groups, -1)) if groups > 1 else whole.unsqueeze(0)
    return parts.abs().sum([1, *range(3, parts.dim())], dtype=wide(second))


def _second(site: Site) -> Shape:
    if site.conv is None:
        return site.shapes[1]
    return site.shapes[0] if site.gradient is Gradient.WEIGHT else site.shapes[1]


def _first(site: Site) -> Shape:
    return site.shapes[0]


def samples() -> tuple[Sample, ...]:
    """Return every structure and every product, and what is rejected."""
    nn = torch.nn
    weight, input_, forward = Gradient.WEIGHT, Gradient.INPUT, Gradient.FORWARD
    half, filters = Params(0.5), Params(0.5, "filter")
    channel, masked = Params(0.5, "channel"), Params(0.5, refresh=2, mask_gradient=True)
    return (
        Sample((5, 3, 9, 7), lambda: nn.Conv2d(3, 4, 3, padding=1), input_, channel),
        Sample((3, 6, 8, 7), lambda: nn.Conv2d(6, 5, 3, padding=1), weight, channel),
        Sample((3, 8, 5, 6), lambda: nn.Conv2d(8, 6, 3, 2, groups=2), forward, channel),
        Sample((3, 6, 8, 7), lambda: nn.Conv2d(6, 4, 3, groups=2), forward, filters),
        Sample((3, 6, 8, 7), lambda: nn.Conv2d(6, 4, 3), weight, Params(0.8, threshold_from=100)),
        Sample((3, 6, 8, 7), lambda: nn.Conv2d(6, 4, 3), weight, Params(0.8, feedback=True)),
        Sample((7, 12), lambda: nn.Linear(12, 5), forward, filters),
        Sample((3, 6, 8, 7), lambda: nn.Conv2d(6, 4, 3), forward, Params(0.8, refresh=3)),
        Sample((3, 6, 8, 7), lambda: nn.Conv2d(6, 4, 3), weight, masked),
        Sample((7, 12), lambda: nn.Linear(12, 5), weight, masked),
        Sample((7, 12), lambda: nn.Linear(12, 5), input_, Params(0.5, freeze_after=1)),
        Sample((7, 12), lambda: nn.Linear(12, 5), weight, Params(0.5, distribution="momentum")),
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
            state=slots,
            settle=exchange,
            weights=weights,
            fast_on_cpu=False,
            fast_on_gpu=False,
        )
    )
)
