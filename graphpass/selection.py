"""Spend a budget: choose for every site one of its candidates, or that it stays exact."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from graphpass.budget import Budget
from graphpass.candidates import Candidate, Menu, biases, layers_of, seconds_of
from graphpass.errors import Reason, Rejected
from graphpass.frontier import Choice, Point, frontier, point_of
from graphpass.spending import LEAST_GAIN, Spending

# Combinations of one layer's candidates that are looked at before candidates are dropped.
_COMBINATIONS = 600
_MICRO = 1e6


@dataclass(frozen=True, slots=True)
class Selection:
    """What was chosen.

    Attributes:
        picks: candidate of each menu; None for exact.
        reasons: why a menu's site is exact, None where it is not.
        others: for each menu, what was considered and not chosen, and why, as text.
        frontier: corners of the frontier, seconds of all products.
    """

    picks: tuple[Candidate | None, ...]
    reasons: tuple[Rejected | None, ...]
    others: tuple[tuple[str, ...], ...]
    frontier: tuple[Point, ...]


def select(
    menus: Sequence[Menu], budget: Budget, max_bias: float, rest_s: float, noise_ratio: float
) -> Selection:
    """Return the choice that a budget asks for.

    Args:
        menus: what can be chosen for each site.
        budget: a form of the option `budget`.
        max_bias: squared bias that may be added, relative to the squared gradient.
        rest_s: seconds of a step that are spent on no site.
        noise_ratio: r = V / |E g|^2.

    Raises:
        ConfigError: if the budget cannot be met, or nothing is known of accuracy.
    """
    members = layers_of(menus)
    layers = [_choices([menus[i] for i in numbers]) for numbers in members]
    corners, exact = frontier(layers), point_of(layers, [0] * len(layers))
    chosen = Spending(layers, max_bias, rest_s, noise_ratio).spend(budget)
    points = corners.points if corners.points[0] == exact else (exact, *corners.points)
    picks: list[Candidate | None] = [None] * len(menus)
    for numbers, layer, number in zip(members, layers, chosen.selection, strict=True):
        for i, pick in zip(numbers, layer[number].picks, strict=True):
            picks[i] = None if pick is None else menus[i].candidates[pick]
    reasons: list[Rejected | None] = [None] * len(menus)
    others: list[tuple[str, ...]] = [()] * len(menus)
    for numbers in members:
        layer_menus, layer_picks = [menus[i] for i in numbers], [picks[i] for i in numbers]
        for place, i in enumerate(numbers):
            saved = savings(layer_menus, layer_picks, place, menus[i].candidates)
            others[i] = _other_texts(menus[i], picks[i], saved)
            if picks[i] is None:
                reasons[i] = _reason(menus[i], saved, chosen.small_gain)
    return Selection(tuple(picks), tuple(reasons), tuple(others), points)


def _choices(menus: Sequence[Menu]) -> list[Choice]:
    """Return the ways to compute the products of a layer; the first is exact."""
    options = [_options(menu) for menu in menus]
    if math.prod(map(len, options)) > _COMBINATIONS:
        options = [_best(menu, numbers) for menu, numbers in zip(menus, options, strict=True)]
    found = [choice_of(menus, picks) for picks in product(*options)]
    if any(choice.bias for choice in found):
        return found
    kept, least = [found[0]], found[0].seconds
    for choice in sorted(found[1:], key=lambda choice: (choice.tau, choice.seconds)):
        if choice.seconds < least:
            kept.append(choice)
            least = choice.seconds
    return kept


def _options(menu: Menu) -> list[int | None]:
    return [None, *range(len(menu.candidates))]


def _best(menu: Menu, numbers: Sequence[int | None]) -> list[int | None]:
    """Return the candidates that no other one is better than, were what they share for nothing."""

    def figures(number: int | None, shared: bool) -> tuple[float, float, float]:
        choice = choice_of([menu], (number,))
        if number is None or not shared:
            return choice.seconds, choice.tau, choice.bias
        saved = sum(menu.candidates[number].price.shared.values())
        return choice.seconds - saved, choice.tau, choice.bias

    alone = {number: figures(number, shared=False) for number in numbers}
    together = {number: figures(number, shared=True) for number in numbers}
    return [
        number
        for number in numbers
        if number is None
        or not any(
            alone[other] != together[number]
            and all(a <= b for a, b in zip(alone[other], together[number], strict=True))
            for other in numbers
            if other != number
        )
    ]


def choice_of(menus: Sequence[Menu], picks: tuple[int | None, ...]) -> Choice:
    """Return what it takes, and adds, to compute the products of a layer in one way.

    Args:
        menus: those of the layer.
        picks: candidate of each; None for exact.
    """
    chosen = [
        None if pick is None else menu.candidates[pick]
        for menu, pick in zip(menus, picks, strict=True)
    ]
    some = [candidate for candidate in chosen if candidate is not None]
    return Choice(
        _seconds(menus, chosen),
        math.fsum(candidate.effect.tau for candidate in some),
        # What an unbiased method was measured to add is what is left of its noise.
        math.fsum(
            candidate.effect.bias
            for menu, candidate in zip(menus, chosen, strict=True)
            if candidate is not None and biases(candidate.method, menu.site)
        ),
        picks,
    )


def _seconds(menus: Sequence[Menu], chosen: Sequence[Candidate | None]) -> float:
    return seconds_of(
        menu.exact if candidate is None else candidate.price
        for menu, candidate in zip(menus, chosen, strict=True)
    )


def savings(
    menus: Sequence[Menu],
    chosen: Sequence[Candidate | None],
    place: int,
    others: Sequence[Candidate | None],
) -> list[float]:
    """Return the seconds that other ways to compute a product would save, the rest as it is.

    Args:
        menus: those of the layer.
        chosen: what was chosen of each.
        place: the product's.
        others: what could be chosen of it instead; None for exact.
    """
    now = _seconds(menus, chosen)
    return [
        now - _seconds(menus, [*chosen[:place], other, *chosen[place + 1 :]]) for other in others
    ]


def _other_texts(menu: Menu, pick: Candidate | None, gains: Sequence[float]) -> tuple[str, ...]:
    texts = [
        f"{candidate}: would {_change(saved)} for {candidate.effect}"
        for candidate, saved in zip(menu.candidates, gains, strict=True)
        if candidate is not pick
    ]
    return (*texts, *(f"{text}: {rejected}" for text, rejected in menu.refused))


def _reason(menu: Menu, gains: Sequence[float], small_gain: float | None) -> Rejected:
    if menu.obstacle is not None:
        return menu.obstacle
    if not menu.candidates:
        # That a method is biased says less than why an unbiased one does not fit.
        told = sorted(menu.refused, key=lambda pair: pair[1].reason is Reason.BIASED)
        return Rejected(Reason.NO_CANDIDATE, "; ".join(f"{text}: {why}" for text, why in told[:2]))
    saved, best = max(zip(gains, menu.candidates, strict=True), key=lambda pair: pair[0])
    if saved <= 0:
        return Rejected(Reason.NO_GAIN, f"{best} would {_change(saved)}")
    detail = f"{best} would {_change(saved)} for {best.effect}"
    if small_gain is not None:
        percent = f"{100 * small_gain:.1f} of {100 * LEAST_GAIN:g} %"
        return Rejected(Reason.SMALL_GAIN, f"{percent}; {detail}")
    return Rejected(Reason.NOISE_TOO_DEAR, detail)


def _change(saved_s: float) -> str:
    verb = "save" if saved_s > 0 else "cost"
    return f"{verb} {abs(saved_s) * _MICRO:.1f} us"
