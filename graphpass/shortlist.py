"""Which candidates are measured: those that may yet be chosen.

A probe takes half a second and more to compile for each candidate in it, and most candidates lose
by far: another way to compute the products of the layer takes no longer, and is supposed to add
much less. Those are left out. They cannot be chosen then, as what is supposed of them may be too
little. They come back once the other way was measured and adds about as much as they should.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, product

from graphpass import prior
from graphpass.candidates import Candidate, Menu, biases, layers_of
from graphpass.capture import Analysis
from graphpass.dependence import reach_of
from graphpass.method import Prior
from graphpass.noise import Key, LocalNoise, NoiseTable, key_of
from graphpass.pricing import Pricing
from graphpass.products import Replacement
from graphpass.propagation import Propagation
from graphpass.selection import choice_of
from graphpass.site import Gradient

# How many times as much a way must be supposed to add to be left out for another. Of 164 pairs of
# candidates for one product of ResNet-20 whose priors are at least 4 times apart, one was measured
# to be closer than that by more than this factor (8.3), and nine in ten by less than 4.2.
MARGIN = 8.0
# The same once the other way was measured: one figure of the two may be wrong then, and not both.
KNOWN_MARGIN = math.sqrt(MARGIN)
# What a method without a prior is supposed to add in all layers together: about what `prune` does.
UNKNOWN = 0.1
# Ways to compute the products of one layer that are compared; of a layer with more, all are left.
_WAYS = 5000

# Candidate of each product of a layer, by its place in the menu; None for exact.
_Way = tuple[int | None, ...]
# Noise and bias.
_Added = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Shortlist:
    """The candidates of a graph, of which those that may be chosen are measured.

    Attributes:
        analysis: what the graph holds.
        offers: all its candidates; those of forward products, which are never measured, share work
            with others.
        pricing: prices of products.
    """

    analysis: Analysis
    offers: tuple[Replacement, ...]
    pricing: Pricing

    def keys(self, table: NoiseTable, unknown: float = UNKNOWN) -> frozenset[Key]:
        """Return the candidates to be measured.

        Args:
            table: what was measured; without entries where nothing was.
            unknown: noise that a method without a prior is supposed to add in all layers.
        """
        base = table if table.variance else prior.noise_table(self.analysis, {})
        propagation = Propagation(base, reach_of(self.analysis.flow, self.analysis.sites))
        found: dict[str, list[Candidate]] = {site.id: [] for site in self.analysis.sites}
        for offer in self.offers:
            local = base.entries.get(_key(offer)) or _supposed(offer, base, unknown)
            effect = propagation.effect(offer.site, local)
            if effect is not None:
                price = self.pricing.approximate(offer.site, offer.method, offer.params)
                found[offer.site.id].append(Candidate(offer.method, offer.params, price, effect))
        menus = [
            Menu(site, self.pricing.exact(site), tuple(found[site.id]))
            for site in self.analysis.sites
        ]
        chosen = promising(menus, KNOWN_MARGIN if table.entries else MARGIN)
        pairs = ((menus[i].site, menus[i].candidates[place]) for i, place in chosen)
        return frozenset(key_of(site.id, c.method.name, c.params) for site, c in pairs)

    def labelled(self, table: NoiseTable) -> NoiseTable:
        """Return a table of what was measured with what is supposed of the other candidates."""
        left_out = {
            _key(offer): _supposed(offer, table, UNKNOWN) if _has_prior(offer) else None
            for offer in self.offers
            if offer.site.gradient is not Gradient.FORWARD and _key(offer) not in table.entries
        }
        return replace(table, left_out=left_out)


def promising(menus: Sequence[Menu], margin: float) -> frozenset[tuple[int, int]]:
    """Return the candidates that may be chosen, although their effects are only supposed.

    A layer's products can be computed in many ways. One is left out if another is clearly
    preferable: it takes no longer, and either differs in a single product, or is compared in all
    of them, and adds less there by the margin, in noise and in bias. Candidates of what is left
    are promising; so are the cheapest and the least noisy one of every site. If everything is as
    supposed, none of the others makes a plan faster within any limits of noise and bias.

    Args:
        menus: the candidates of every site, with what is supposed of their effects.
        margin: at least 1.

    Returns:
        Numbers of menus and of candidates in them; none of forward products.
    """
    kept = set[tuple[int, int]]()
    for numbers in layers_of(menus):
        layer = [menus[number] for number in numbers]
        places = [i for i, menu in enumerate(layer) if menu.site.gradient is not Gradient.FORWARD]
        options = [(None, *range(len(menu.candidates))) for menu in layer]
        few = math.prod(map(len, options)) <= _WAYS
        ways = _left(layer, options, places, margin) if few else []
        for place in places:
            picks = {way[place] for way in ways} if few else set(options[place])
            picks.update(_extremes(layer[place]))
            kept.update((numbers[place], pick) for pick in picks if pick is not None)
    return frozenset(kept)


def _key(offer: Replacement) -> Key:
    return key_of(offer.site.id, offer.method.name, offer.params)


def _has_prior(offer: Replacement) -> bool:
    return prior.local_noise(offer.site, offer.method, offer.params) is not None


def _supposed(offer: Replacement, table: NoiseTable, unknown: float) -> LocalNoise:
    """Return what is supposed of a candidate, in the units of a table.

    The relative error is that of the prior; it is supposed to reach the weights without correction.
    """
    site = offer.site
    nothing_known = Prior(unknown, unknown if biases(offer.method, site) else 0.0)
    local = prior.local_noise(site, offer.method, offer.params)
    local = local or prior.of_site(site, nothing_known)
    square = 1.0
    if site.gradient is Gradient.WEIGHT:
        square = table.variance.get(site.id, 0.0) + table.square.get(site.id, 0.0)
    correction = table.correction if site.gradient is Gradient.INPUT else 1.0
    factor = square / local.square / correction
    return LocalNoise(local.noise * factor, local.bias * factor, square)


def _left(
    layer: Sequence[Menu], options: Sequence[_Way], places: Sequence[int], margin: float
) -> list[_Way]:
    """Return the ways to compute a layer to which no other is clearly preferable.

    Args:
        layer: its menus.
        options: what can be picked of each.
        places: of the menus in which ways are compared; the others must agree.
        margin: as for `promising`.
    """
    ways: list[_Way] = list(product(*options))
    added = {
        place: {pick: _added(layer[place], pick) for pick in options[place]} for place in places
    }
    seconds = {way: choice_of(layer, way).seconds for way in ways}
    total = {way: _sum([added[place][way[place]] for place in places]) for way in ways}
    # No way is preferable to one before it.
    ways.sort(key=lambda way: (seconds[way], total[way]))
    rank = {way: number for number, way in enumerate(ways)}
    before: dict[_Way, list[_Added]] = {}
    left = []
    for way in ways:
        totals = before.setdefault(tuple(pick for i, pick in enumerate(way) if i not in added), [])
        whole = ((other, total[way]) for other in totals)
        single = (
            (added[place][pick], added[place][way[place]])
            for place in places
            for pick in options[place]
            if rank[(*way[:place], pick, *way[place + 1 :])] < rank[way]
        )
        if not any(_is_less(one, other, margin) for one, other in chain(single, whole)):
            left.append(way)
        totals.append(total[way])
    return left


def _added(menu: Menu, pick: int | None) -> _Added:
    """Return what a candidate adds; bias only where its method makes one."""
    if pick is None:
        return 0.0, 0.0
    candidate = menu.candidates[pick]
    bias = candidate.effect.bias if biases(candidate.method, menu.site) else 0.0
    return candidate.effect.tau, bias


def _sum(parts: Sequence[_Added]) -> _Added:
    return math.fsum(tau for tau, _ in parts), math.fsum(bias for _, bias in parts)


def _is_less(one: _Added, other: _Added, margin: float) -> bool:
    return all(a * margin <= b for a, b in zip(one, other, strict=True))


def _extremes(menu: Menu) -> Iterator[int]:
    """Yield the cheapest and the least noisy candidate of a site, if it has any."""
    places = range(len(menu.candidates))
    if places:
        yield min(places, key=lambda place: menu.candidates[place].price.seconds)
        yield min(places, key=lambda place: _added(menu, place))
