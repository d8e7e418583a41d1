"""Which values `swat` uses: the largest of a weight or an activation, and for how many steps.

A choice is a threshold on single values, a mask of each filter's input channels, or a list of
channels. It is made anew on every step; or every so many steps, and kept in between (paper, section
3.3.3); that of a weight, until a step from which on its topology is frozen (section 4.5). Steps are
counted by the session and a choice is made again in the first call of a period, so that all calls
of a step, and all products of a layer, choose alike.

Weights are looked at as [Co, Ci / groups, *kernel], whatever product they are in.
"""

from collections.abc import Sequence
from fractions import Fraction
from math import prod
from typing import Any

import torch
from torch import Tensor

import codegen.threshold  # noqa: F401  (registers the operator below)
from graphpass.pairs import wide
from graphpass.site import FACTORS, Gradient, Site
from graphpass.sparsity import Params
from graphpass.state import SiteState, Slot, State

# What is kept of the mean gradient from call to call: the momentum of the paper's optimizer.
_MOMENTUM = 0.9
# The share of its weights that every layer gives up (Dettmers, Zettlemoyer 2019: 0.2 or 0.5).
_EXCHANGED = 0.2


def slots(site: Site, params: Params) -> tuple[Slot, ...]:
    """Return what is kept of a site, where anything is."""
    if params.refresh == 1 and params.freeze_after is None and params.distribution != "momentum":
        return ()
    found = [Slot("refreshed", (), torch.int64, -1)]
    gradient = site.gradient is Gradient.WEIGHT
    dtype = torch.promote_types(getattr(torch, site.dtype), torch.float32)
    if params.distribution == "momentum":
        found.append(Slot("density", (), torch.float64, 1 - params.sparsity))
    if params.structure == "channel":
        groups = 1 if site.conv is None or gradient else site.conv.groups
        return (*found, Slot("index", (groups, kept_of(channels_of(site), params)), torch.int64))
    if gradient or params.structure == "none":
        found.append(Slot("threshold", (), dtype))
    if gradient and watches_weight(params) and params.structure == "none":
        found.append(Slot("weight_threshold", (), dtype))
    if not gradient or watches_weight(params):
        shape = weight_shape(site)
        if params.structure == "filter":
            found.append(Slot("active", shape[:2], torch.bool))
        elif params.freeze_after is not None:
            found.append(Slot("active", shape, torch.bool))
    if gradient and params.distribution == "momentum":
        found += [Slot("momentum", weight_shape(site), dtype), Slot("contribution", (), dtype)]
    return tuple(found)


def watches_weight(params: Params) -> bool:
    """Return whether a weight gradient looks at the weight as well."""
    return bool(params.mask_gradient or params.distribution == "momentum")


class Choice:
    """What is chosen in one call of a site."""

    def __init__(self, site: Site, params: Params, state: State | None) -> None:
        """Choose nothing yet.

        Args:
            site: the product.
            params: parameters of `swat`.
            state: what was chosen before; None where every call chooses for itself.
        """
        self._site, self._params, self._state = site, params, state
        self._written: dict[str, Tensor] = {}
        if state is None:
            return
        before, period = state.before["refreshed"], params.refresh
        new = before < 0
        self._due = new | (state.step // period != before // period)
        self._may_move = self._due
        if params.freeze_after is not None:
            open_ = new | (state.step < params.freeze_after)
            self._may_move, self._open = self._due & open_, open_
        self._written["refreshed"] = torch.where(self._due, state.step, before)

    def threshold(self, value: Tensor, name: str = "threshold") -> Tensor:
        """Return the K-th largest magnitude, of a part of the values if there are many: 0-d."""
        count, wanted = value.numel(), self._params.threshold_from
        stride = 1
        # Of a dynamic batch all are taken: how many there are is only known when it runs.
        if isinstance(count, int) and 0 < wanted < count:
            # An odd step meets all columns of an image and all channels, often powers of 2.
            stride = (count // wanted) | 1
        size = -(-count // stride)
        if self._state is None:
            # Not by Python's indexing, which wants a device: a fake tensor may have none.
            part = torch.ops.aten.slice.Tensor(value.flatten().abs(), 0, 0, None, stride)
            found: Tensor = part.kthvalue(size - kept_of(size, self._params) + 1).values
            return found
        if self._params.distribution == "momentum":
            density = self._state.before["density"]
            kept = (density * size).ceil().clamp(1, size).to(torch.int64)
        else:
            # A number where the state is: a copy from the host would be waited for.
            refreshed = self._state.before["refreshed"]
            kept = torch.full_like(refreshed, kept_of(size, self._params))
        old = self._state.before[name]
        found = torch.ops.approx.kept_threshold(value, stride, kept, old, self._due)
        self._written[name] = found
        return found.to(value.dtype)

    def mask(self, weight: Tensor, name: str = "threshold") -> Tensor:
        """Return 1 for the weights that are used and 0 for others, in the shape of the weight."""
        if self._params.structure == "filter":
            norms = weight.flatten(2) if weight.dim() > 2 else weight.unsqueeze(-1)
            norms = norms.abs().sum(2, dtype=wide(weight))
            chosen = norms.topk(kept_of(norms.shape[1], self._params), dim=1).indices
            active = torch.zeros_like(norms).scatter(1, chosen, 1.0).bool()
            if self._state is not None:
                active = torch.where(self._may_move, active, self._state.before["active"])
                self._written["active"] = active
            return active.to(weight.dtype).view(*active.shape, *[1] * (weight.dim() - 2))
        active = weight.abs() >= self.threshold(weight, name)
        if self._state is not None and self._params.freeze_after is not None:
            active = torch.where(self._open, active, self._state.before["active"])
            self._written["active"] = active
        return active.to(weight.dtype)

    def index(self, norms: Tensor) -> Tensor:
        """Return the channels of largest norm in each group, ascending: int64 [groups, R]."""
        index = norms.topk(kept_of(norms.shape[1], self._params), dim=1).indices.sort(1).values
        if self._state is not None:
            of_weight = self._site.gradient is not Gradient.WEIGHT
            due = self._may_move if of_weight else self._due
            index = torch.where(due, index, self._state.before["index"])
            self._written["index"] = index
        return index

    def of_weight(self, grad: Tensor, weight: Tensor) -> Tensor:
        """Return a weight gradient as the options want it, and keep its momentum.

        Args:
            grad: the gradient, in the shape of the weight.
            weight: the weight.
        """
        mask = self.mask(weight, "weight_threshold")
        if self._params.distribution == "momentum":
            assert self._state is not None
            mean = self._state.before["momentum"] * _MOMENTUM + grad * (1 - _MOMENTUM)
            active = mask.expand(weight.shape).to(mean.dtype)
            contribution = (mean.abs() * active).sum() / active.sum().clamp_min(1)
            self._written |= {"momentum": mean, "contribution": contribution}
        return grad * mask if self._params.mask_gradient else grad

    def used(self, carrier: Tensor) -> Tensor:
        """Return what the product is computed from, or the product; keep what was chosen."""
        written, self._written = self._written, {}
        return self._state.write(carrier, **written) if self._state and written else carrier


def exchange(step: int, sites: Sequence[SiteState]) -> None:
    """Let layers exchange density, where `distribution` is "momentum" and a choice is due.

    Dettmers, Zettlemoyer 2019, "Sparse networks from scratch" (arXiv:1907.04840): every layer gives
    up the same share of its active weights, and of all those it gets what is in proportion to the
    mean magnitude of its active weights' momentum. What a full layer gets beyond that goes to
    others, by the room they have. The number of active weights stays the same in all. SWAT, section
    3.3.2, names them as its model and gives no formula; activations of a layer get its density.

    Args:
        step: the step that begins.
        sites: all that keep anything.
    """
    taking = [s for s in sites if s.params.distribution == "momentum"]
    for refresh in sorted({s.params.refresh for s in taking}):
        if step and step % refresh == 0:
            _exchange([s for s in taking if s.params.refresh == refresh])


def _exchange(sites: Sequence[SiteState]) -> None:
    layers = [s for s in sites if "contribution" in s.kept]
    if not layers:
        return
    contributions = torch.stack([s.kept["contribution"] for s in layers]).double()
    density = torch.stack([s.kept["density"] for s in layers])
    counts = density.new_tensor([prod(weight_shape(s.site)) for s in layers])
    active = density * counts
    # Nothing is known before the first gradient, and nothing sensible after one that is not finite.
    known = contributions.isfinite().all() & (contributions.sum() > 0)
    share = contributions / contributions.sum()
    wanted = (1 - _EXCHANGED) * active + _EXCHANGED * active.sum() * share
    filled = wanted.minimum(counts)
    room = counts - filled
    filled = filled + (wanted - filled).sum() * room / room.sum().clamp_min(1)
    found = torch.where(known, filled / counts, density)
    for number, layer in enumerate(layers):
        for site in sites:
            if site.site.name == layer.site.name:
                site.kept["density"].copy_(found[number])


def canonical(site: Site, second: Tensor) -> Tensor:
    """Return the weight that is the second operand of a product, output channels first."""
    return second.t() if site.conv is None and site.gradient is Gradient.FORWARD else second


def weight_of(site: Site, operands: tuple[Tensor, ...]) -> Tensor:
    """Return the weight among the operands of a weight gradient, output channels first."""
    if site.conv is not None:
        return operands[2]
    weight = operands[3 - (site.factor or 0)]
    return weight.t() if site.factor == 0 else weight


def like_weight(site: Site, grad: Tensor) -> Tensor:
    """Return a weight gradient with output channels first, or such a one as it was."""
    return grad.t() if site.conv is None and site.outer == 0 else grad


def names_of_weight(site: Site) -> tuple[str, ...]:
    """Return the operands to add to a weight gradient's own, for `weight_of`."""
    return ("weight",) if site.conv is not None else FACTORS


def weight_shape(site: Site) -> tuple[int, ...]:
    """Return the shape of a layer's weight, output channels first."""
    shape = site.output if site.gradient is Gradient.WEIGHT else site.shapes[1]
    turned = site.conv is None and (site.gradient is Gradient.FORWARD or site.outer == 0)
    return tuple(map(int, reversed(shape) if turned else shape))


def channels_of(site: Site) -> Any:
    """Return the number of input channels, of a group of a weight."""
    if site.conv is None:
        return site.shapes[1][0 if site.gradient is Gradient.FORWARD else 1]
    return site.shapes[0 if site.gradient is Gradient.WEIGHT else 1][1]


def kept_of(count: Any, params: Params) -> Any:
    """Return how many of `count` are kept: all but `sparsity` of them, rounded up."""
    share = Fraction(str(params.sparsity))
    return count - count * share.numerator // share.denominator
