"""What a site could be computed by: every method, with a ladder of parameters, and what it costs.

A candidate has a price in seconds and an effect on the gradient. What cannot be used is kept as
well, with the reason.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graphpass import prior
from graphpass.capture import Analysis
from graphpass.dependence import reach_of
from graphpass.errors import Reason, Rejected
from graphpass.method import Method, methods
from graphpass.noise import NoiseTable, key_of
from graphpass.parameters import text_of
from graphpass.pricing import Price, Pricing
from graphpass.propagation import Effect, Propagation
from graphpass.site import Gradient, Site

Offer = tuple[Method, Any]


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to approximate the product of a site.

    Attributes:
        method: the method.
        params: its parameters.
        price: what it costs in time.
        effect: what it adds to the noise and the bias of the gradient.
    """

    method: Method
    params: Any
    price: Price
    effect: Effect

    def __str__(self) -> str:
        """Return the method with the parameters that are not the default ones."""
        return text_of(self.method, self.params)


@dataclass(frozen=True, slots=True)
class Menu:
    """Everything that was considered for one site.

    Attributes:
        site: the site.
        exact: price of the exact product.
        candidates: what can be used.
        refused: what cannot, as text, and why.
        obstacle: why nothing was considered at all; None if it was.
    """

    site: Site
    exact: Price
    candidates: tuple[Candidate, ...] = ()
    refused: tuple[tuple[str, Rejected], ...] = ()
    obstacle: Rejected | None = None


def ladder(site: Site, names: Collection[str] | None = None) -> tuple[Offer, ...]:
    """Return every method and parameters worth considering for a site; none that keeps state.

    Args:
        site: the site.
        names: names of the methods that may be used; None for all.
    """
    offers = []
    for name, method in methods().items():
        if site.gradient in method.gradients and (names is None or name in names):
            rungs = (method.params(),) if method.ladder is None else method.ladder(site)
            # What a method that keeps something adds cannot be told from a single step.
            offers += [(method, p) for p in dict.fromkeys(rungs) if not method.state(site, p)]
    return tuple(offers)


def menus(
    analysis: Analysis,
    obstacles: Mapping[str, Rejected],
    names: Collection[str] | None,
    max_bias: float,
    noise: NoiseTable | None,
    pricing: Pricing,
) -> tuple[tuple[Menu, ...], Propagation]:
    """Return what can be chosen for every site, in their order, and how their errors travel.

    Args:
        analysis: what the graph holds.
        obstacles: why a site must stay exact, by its id.
        names: names of the methods that may be used; None for all.
        max_bias: squared bias that may be added; with 0, biased methods are refused.
        noise: what was measured; None for what is supposed before.
        pricing: prices of products.
    """
    offered = {site.id: ladder(site, names) for site in analysis.sites if site.id not in obstacles}
    table = prior.noise_table(analysis, offered) if noise is None else noise
    propagation = Propagation(table, reach_of(analysis.flow, analysis.sites))
    found = [
        Menu(site, pricing.exact(site), obstacle=obstacles[site.id])
        if site.id in obstacles
        else _menu(site, offered[site.id], max_bias, table, propagation, pricing)
        for site in analysis.sites
    ]
    return tuple(found), propagation


def _menu(
    site: Site,
    offers: Iterable[Offer],
    max_bias: float,
    table: NoiseTable,
    propagation: Propagation,
    pricing: Pricing,
) -> Menu:
    candidates: list[Candidate] = []
    refused: list[tuple[str, Rejected]] = []
    for method, params in offers:
        effect = _effect(site, method, params, max_bias, table, propagation)
        if isinstance(effect, Rejected):
            refused.append((text_of(method, params), effect))
        else:
            price = pricing.approximate(site, method, params)
            candidates.append(Candidate(method, params, price, effect))
    return Menu(site, pricing.exact(site), tuple(candidates), tuple(refused))


def _effect(
    site: Site,
    method: Method,
    params: Any,
    max_bias: float,
    table: NoiseTable,
    propagation: Propagation,
) -> Effect | Rejected:
    """Return what a candidate adds to the gradient, or why it cannot be used."""
    if max_bias == 0 and biases(method, site):
        return Rejected(Reason.BIASED)
    rejected = method.reject(site, params)
    if rejected is not None:
        return rejected
    effect = effect_of(site, method, params, table, propagation)
    return effect or _not_measured(site, method, params, table, propagation)


def _not_measured(
    site: Site, method: Method, params: Any, table: NoiseTable, propagation: Propagation
) -> Rejected:
    """Return that a candidate's noise is not known, and why it was not measured, if it was not."""
    key = key_of(site.id, method.name, params)
    if key not in table.left_out:
        return Rejected(Reason.NOISE_UNKNOWN)
    local = table.left_out[key]
    supposed = None if local is None else propagation.effect(site, local)
    why = "not measured, as another way takes no longer and should add far less"
    return Rejected(Reason.NOISE_UNKNOWN, f"prior {supposed or 'none'}; {why}")


def biases(method: Method, site: Site) -> bool:
    """Return whether a method biases the gradient: in a forward product every one does.

    The gradient is no linear function of that.
    """
    return site.gradient is Gradient.FORWARD or not method.unbiased


def effect_of(
    site: Site, method: Method, params: Any, table: NoiseTable, propagation: Propagation
) -> Effect | None:
    """Return what a method adds to the gradient at a site; None where that is not known."""
    local = table.entries.get(key_of(site.id, method.name, params))
    if local is None and site.gradient is Gradient.FORWARD:
        # Never measured: probes compare gradients of one and the same forward pass.
        local = prior.local_noise(site, method, params)
    return None if local is None else propagation.effect(site, local)


def layers_of(menus: Sequence[Menu]) -> list[list[int]]:
    """Return the positions of the sites of each layer: products of one use of a module."""
    layers: dict[str, list[int]] = {}
    for number, menu in enumerate(menus):
        layers.setdefault(menu.site.name, []).append(number)
    return list(layers.values())


def seconds_of(prices: Iterable[Price]) -> float:
    """Return the seconds of several products; work that they share is done once."""
    total, seen = 0.0, set[str]()
    for price in prices:
        total += price.seconds - sum(s for name, s in price.shared.items() if name in seen)
        seen.update(price.shared)
    return total
