"""Column-row sampling: which terms of a product are taken, with which weights.

Adelman, Silberstein, "Faster Neural Network Training with Approximate Tensor Operations", 2018
(arXiv:1805.08079): a product is a sum of n terms z[i], and R of them are taken. With m[i] the
masses (norms of terms, or 1) and u uniform in (0, 1):

* with replacement: R independent terms, i with probability p[i] = m[i] / sum m and weight
  1 / (R p[i]);
* uniform, without replacement: the R smallest u[i], weight n / R;
* by norm, without replacement: the R largest priorities m[i] / u[i]. With t the next largest one,
  the weight is max(1, t / m[i]) (Duffield, Lund, Thorup 2007, "Priority sampling for estimation of
  arbitrary subset sums"). The paper draws so too, but weights 1 / (R p[i]), as if it had replaced:
  that is biased;
* top: the R largest masses, without any weight.

What the two methods `crs` and `crs_unscaled` share: choice, cost, reference, lowering; their
parameters are in `graphpass.sampling`.
Letters: S independent products of n terms each, R terms taken of each.
"""

import zlib
from fractions import Fraction
from typing import Any

import sympy
import torch
from torch import Tensor

from codegen import draws as random_draws
from cost_model import (
    Cost,
    Dim,
    KernelCost,
    Shape,
    element_count,
    elementwise,
    gather,
    reduce,
)
from graphpass.errors import Reason, Rejected
from graphpass.kernels_of import mover, product, vendor_kind
from graphpass.outer_pairs import Outer, OuterChannels, OuterFeatures
from graphpass.pairs import (
    ChannelPairs,
    MatrixPairs,
    Pairs,
    PixelPairs,
    SamplePairs,
    forward_of,
)
from graphpass.site import FACTORS, Gradient, Site


def draw(site: Site, params: Any, template: Tensor, seed: Tensor, salt: int) -> Tensor | None:
    """Return one uniform number for each term, or each that is taken with replacement: [S, .]."""
    segments, terms = extent(site, params.axis)
    return _draw(params, seed, _salt(site, params, salt), segments, terms, template.device)


def reference(
    site: Site, params: Any, template: Tensor, draws: Tensor | None, *operands: Tensor
) -> Tensor:
    """Return the exact product of all terms, each times the weight with which it was taken.

    Args:
        site: any product.
        params: parameters of the method.
        template: shape of the result.
        draws: [S, n] or, with replacement, [S, R].
        operands: those that `operands` names.
    """
    pairs = pairs_of(site, params, template, operands)
    masses = pairs.masses()
    index, weight = choose(params, masses, draws, taken(masses.shape[1], params))
    factors = torch.ones_like(index, dtype=masses.dtype) if weight is None else weight
    weights = torch.zeros_like(masses).scatter_add(1, index, factors)
    if params.again == 1:
        return pairs.weighted(weights)
    assert isinstance(pairs, Outer)
    inner = pairs.masked(weights)
    masses = inner.masses()
    index = _largest(masses, _count(masses.shape[1], params.again, params.least))
    return inner.weighted(torch.zeros_like(masses).scatter(1, index, 1.0))


def lower(
    site: Site, params: Any, template: Tensor, seed: Tensor, salt: int, *operands: Tensor
) -> Tensor:
    """Return the product of the terms that are taken: a smaller dense one of what is gathered."""
    pairs = pairs_of(site, params, template, operands)
    masses = pairs.masses()
    segments, terms = masses.shape
    draws = _draw(params, seed, _salt(site, params, salt), segments, terms, masses.device)
    index, weight = choose(params, masses, draws, taken(terms, params))
    if params.again == 1:
        result = pairs.sampled(index, weight, params.narrow)
    else:
        assert isinstance(pairs, Outer)
        inner = pairs.terms(index)
        masses = inner.masses()
        again = _largest(masses, _count(masses.shape[1], params.again, params.least))
        part = inner.sampled(again, None, params.narrow)
        result = pairs.put(index, part.view(inner.template.shape))
    return result.view(template.shape).to(template.dtype)


def noise(site: Site, params: Any, *operands: Tensor) -> Tensor:
    """Return E|approximate - exact|^2 (paper, lemma 1 summed over the result, before equation 14).

    Without replacement, weights of different terms are uncorrelated by norm (priority sampling);
    the formula then takes the threshold t for a number: the one that R terms pass on average.
    """
    template = torch.empty((), dtype=operands[0].dtype).expand(tuple(map(int, site.output)))
    pairs = pairs_of(site, params, template, operands)
    masses, energies = pairs.masses(), pairs.energies()
    n = masses.shape[1]
    count = taken(n, params)
    totals = pairs.split(pairs.weighted(torch.ones_like(masses))).square().sum(1)
    if params.sampling == "uniform":
        masses = torch.ones_like(masses)
    if params.replacement:
        shares = masses / masses.sum(1, keepdim=True)
        parts = torch.where(masses > 0, energies / shares.clamp_min(1e-300), 0.0)
        variance: Tensor = (parts.sum(1) - totals) / count
        return variance.sum()
    if params.sampling == "uniform":
        spread: Tensor = (energies.sum(1) - totals / n) / max(n - 1, 1)
        spread = spread * (n * (n - count) / count)
        return spread.sum()
    excess = (_threshold(masses, count) / masses.clamp_min(1e-300) - 1).clamp_min(0)
    added: Tensor = torch.where(masses > 0, energies * excess, 0.0)
    return added.sum()


def cost(site: Site, params: Any) -> tuple[KernelCost, ...]:
    """Return the kernels that choose terms, gather them, and multiply them."""
    segments, terms = extent(site, params.axis)
    count = taken(terms, params)
    exact, share = site.cost, sympy.sympify(count) / terms
    if params.again < 1:
        own = extent(site, "terms")[1]
        share = share * _count(own, params.again, params.least) / own
    shapes = _shapes(site, params)
    kernels = []
    if params.sampling != "uniform":
        for shape in shapes:
            # An operand is read for the norms of its columns, rows, channels or samples, ...
            norms = reduce(element_count(shape), segments * terms, site.itemsize)
            kernels.append(mover("reduce", norms, site.dtype))
    # ... one number a term is drawn, read and compared, ...
    chosen = elementwise(segments * terms, 1, 1, torch.float32.itemsize)
    kernels.append(mover("elementwise", chosen, "float32"))
    # ... and the terms' product takes FLOPs in proportion, reads what was gathered, writes it all.
    cost = Cost(exact.flops * share, exact.bytes_read * share, exact.bytes_written)
    if params.axis == "terms" and site.conv is not None and site.gradient is Gradient.WEIGHT:
        # Pixels are read where they are.
        return (*kernels, product(site, "sampled_wgrad", cost, rows=count))
    for shape in shapes:
        # What is taken of an operand is copied before that.
        copied = gather(segments * count, element_count(shape) * share / count, site.itemsize)
        kernels.append(mover("convert", copied, site.dtype))
    return (*kernels, product(site, vendor_kind(site), cost))


def reject(site: Site, params: Any) -> Rejected | None:
    """Accept every product that has the axis, and more terms than are taken."""
    weight, forward = site.gradient is Gradient.WEIGHT, site.gradient is Gradient.FORWARD
    if site.op == "attention":
        return Rejected(Reason.UNSUPPORTED_SHAPE, f"no form for {site.op}")
    if params.axis == "samples" and (forward or site.op in {"bmm", "baddbmm"}):
        return Rejected(Reason.UNSUPPORTED_SHAPE, f"no samples to leave out of {site.id}")
    if params.axis == "channels":
        whole = site.conv.groups == 1 if site.conv is not None else site.outer is not None
        if forward or not whole:
            return Rejected(Reason.UNSUPPORTED_SHAPE, "no gradient of one convolution or layer")
    needs_plain = params.axis == "channels" or (weight and params.axis == "terms")
    if site.conv is not None and site.conv.transposed and needs_plain:
        return Rejected(Reason.UNSUPPORTED_SHAPE, "transposed convolution")
    segments, terms = extent(site, params.axis)
    count = taken(terms, params)
    if isinstance(terms, int) and (terms == 0 or segments == 0):
        return Rejected(Reason.NOT_CHEAPER, "an operand is empty")
    if count == terms and params.keep < 1:
        return Rejected(Reason.NOT_CHEAPER, f"{terms} terms, takes at least {params.least}")
    return None


def operands(site: Site, params: Any) -> tuple[str, ...]:
    """Return the names of the operands."""
    if site.conv is None:
        return ("left", "right", *(FACTORS if params.axis == "channels" else ()))
    if params.axis == "channels":
        return ("grad", "input", "weight")
    return {
        Gradient.FORWARD: ("input", "weight"),
        Gradient.INPUT: ("grad", "weight"),
        Gradient.WEIGHT: ("grad", "input"),
    }[site.gradient]


def pairs_of(site: Site, params: Any, template: Tensor, given: tuple[Tensor, ...]) -> Pairs:
    """Return the terms of a site along the axis that is sampled."""
    if params.axis == "channels":
        return (OuterFeatures if site.conv is None else OuterChannels)(site, template, given)
    if params.axis == "samples" and (site.conv is not None or site.gradient is Gradient.INPUT):
        return SamplePairs(site, template, given)
    if site.conv is None:
        return MatrixPairs(site, template, given)
    kind = PixelPairs if site.gradient is Gradient.WEIGHT else ChannelPairs
    return kind(site, template, given)


def extent(site: Site, axis: str) -> tuple[Dim, Dim]:
    """Return the number of independent products, and of terms of each."""
    if site.conv is None:
        left = site.shapes[0]
        if axis == "channels" and site.outer is not None:
            return 1, site.output[site.outer]
        if axis == "samples" and site.gradient is Gradient.INPUT:
            return 1, left[0]
        return element_count(left[:-2]), left[-1]
    x, _, y = site.shapes
    groups = site.conv.groups
    if axis == "samples":
        return 1, x[0]
    if axis == "channels" or site.gradient is Gradient.FORWARD:
        return groups, _divided(x[1], groups)
    if site.gradient is Gradient.INPUT:
        return groups, _divided(y[1], groups)
    return 1, y[0] * element_count(y[2:])


def taken(terms: Any, params: Any) -> Any:
    """Return how many of the terms are taken; `terms` may be symbolic, in graphs or formulas."""
    return _count(terms, params.keep, params.least)


def _count(terms: Any, share: float, least: int) -> Any:
    keep = Fraction(str(share))
    count = -((-terms * keep.numerator) // keep.denominator)
    if isinstance(terms, torch.SymInt):
        return torch.sym_min(torch.sym_max(count, least), terms)
    if isinstance(terms, int):
        return min(max(count, least), terms)
    return sympy.Min(sympy.Max(count, least), terms)


def choose(
    params: Any, masses: Tensor, draws: Tensor | None, count: int
) -> tuple[Tensor, Tensor | None]:
    """Return numbers and weights of the terms that are taken.

    Args:
        params: parameters of the method.
        masses: [S, n].
        draws: [S, n]; with replacement, [S, R]; None for the largest.
        count: R.

    Returns:
        int64 [S, R], and [S, R], or None for weights of 1.
    """
    terms = masses.shape[1]
    if draws is None:
        return _largest(masses, count), None
    draws = draws.to(masses.dtype)
    if params.sampling == "uniform":
        masses = torch.ones_like(masses)
    if params.replacement:
        ends = masses.double().cumsum(1)
        total = ends.narrow(1, terms - 1, 1)
        drawn = torch.searchsorted(ends, draws * total, right=True).clamp(max=terms - 1)
        index = _ascending(drawn)
        weight = (total / count).to(masses.dtype) / masses.gather(1, index)
    elif params.sampling == "uniform":
        index = _ascending(draws.topk(count, dim=1, largest=False).indices)
        weight = torch.ones_like(index, dtype=draws.dtype) * (terms / count)
    else:
        # One more than is taken is the threshold. Where all are taken there is none: the one that
        # is put behind them comes after terms of mass 0 too, and makes every weight 1.
        last = torch.full_like(masses.narrow(1, 0, 1), -1)
        priorities = torch.cat([masses / draws, last], dim=1)
        best = priorities.topk(count + 1, dim=1)
        index = _ascending(best.indices.narrow(1, 0, count))
        weight = (best.values.narrow(1, count, 1) / masses.gather(1, index)).clamp_min(1)
    if not params.scaled:
        return index, None
    # Terms of mass 0 are taken where there are no others; they are 0 with any weight.
    return index, torch.where(masses.gather(1, index) == 0, 0.0, weight)


def _largest(masses: Tensor, count: int) -> Tensor:
    return _ascending(masses.topk(count, dim=1).indices)


def _ascending(index: Tensor) -> Tensor:
    # Memory is read in order, and all terms are summed in the order of the exact product.
    return index.sort(1).values


def _draw(
    params: Any, seed: Tensor, salt: int, segments: Any, terms: Any, device: torch.device
) -> Tensor | None:
    if params.sampling == "top":
        return None
    count = taken(terms, params) if params.replacement else terms
    return random_draws.uniform(seed, segments * count, salt).view(segments, count).to(device)


def _salt(site: Site, params: Any, salt: int) -> int:
    """Return the site's salt; that of the forward product where its draws are used again."""
    if params.axis != "channels":
        return salt
    return zlib.crc32(forward_of(site).id.encode()) & 0x3FFFFFFF


def _shapes(site: Site, params: Any) -> tuple[Shape, ...]:
    """Return the shapes of the operands that are sampled."""
    if site.conv is None and params.axis == "channels" and site.outer is not None:
        # The factor that it shares with the forward product, and the other one, which has the
        # shape of the result.
        shapes: tuple[Shape, ...] = (site.shapes[site.outer], site.output)
    elif site.conv is None:
        shapes = site.shapes
    else:
        x, w, y = site.shapes
        by_name = {"input": x, "weight": w, "grad": y}
        shapes = tuple(by_name[name] for name in operands(site, params))
        if params.axis == "channels":
            shapes = shapes[1:]
    alone = params.axis == "samples" and site.gradient is Gradient.INPUT
    return shapes[:1] if alone else shapes


def _divided(channels: Dim, groups: int) -> Dim:
    return channels // groups if isinstance(channels, int) else channels / groups


def _threshold(masses: Tensor, count: int) -> Tensor:
    """Return t with sum(min(1, m / t)) = R, in each row: [S, 1]."""
    ordered = masses.sort(1, descending=True).values
    # With the j largest certain, the others pass (sum of theirs) / t: R - j of them.
    rest = ordered.flip(1).cumsum(1).flip(1)[:, :count]
    free = torch.arange(count, 0, -1, dtype=masses.dtype, device=masses.device)
    thresholds = rest / free
    # The first that leaves all others below it.
    fits = ordered[:, :count] <= thresholds
    first = torch.where(fits.any(1), fits.to(torch.int64).argmax(1), count - 1)
    return thresholds.gather(1, first[:, None])
