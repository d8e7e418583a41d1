"""Spend a budget: choose for every site one of its candidates, or that it stays exact."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from graphpass.budget import AccuracyDrop, Budget, Speedup
from graphpass.candidates import Candidate, Menu, layers_of, seconds_of
from graphpass.errors import ConfigError, Reason, Rejected
from graphpass.frontier import Choice, Point, fastest, frontier, point_of, quietest

# The least predicted gain for which "auto" approximates anything: below it, predictions are no
# better than a guess.
LEAST_GAIN = 0.02
# Combinations of one layer's candidates that are looked at before candidates are dropped.
_COMBINATIONS = 600
# What a unit of bias is worth, in parts of all there is to gain: the prices that are tried.
_BIAS_PRICES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
_MICRO = 1e6

Layers = list[list[Choice]]


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
    chosen = _Spending(layers, max_bias, rest_s, noise_ratio).spend(budget)
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
            savings = _savings(layer_menus, layer_picks, place)
            others[i] = _other_texts(menus[i], picks[i], savings)
            if picks[i] is None:
                reasons[i] = _reason(menus[i], savings, chosen.small_gain)
    return Selection(tuple(picks), tuple(reasons), tuple(others), points)


@dataclass(frozen=True, slots=True)
class _Chosen:
    """A selection, and what the best plan would have gained where that is too little."""

    selection: tuple[int, ...]
    small_gain: float | None = None


@dataclass(frozen=True, slots=True)
class _Spending:
    """The layers of a graph, and what limits the choice among their choices."""

    layers: Layers
    max_bias: float
    rest_s: float
    noise_ratio: float

    def spend(self, budget: Budget) -> _Chosen:
        if isinstance(budget, Speedup):
            return _Chosen(self._quietest(budget))
        if isinstance(budget, AccuracyDrop):
            return _Chosen(self._fastest(budget.tau))
        if isinstance(budget, str):
            return self._auto()
        return _Chosen(self._fastest(budget))

    def _fastest(self, tau: float) -> tuple[int, ...]:
        def solve(layers: Layers) -> tuple[int, ...] | None:
            solution = fastest(layers, tau)
            return None if solution is None else solution.selection

        return self._least(solve, lambda point: point.seconds) or self._exact

    def _quietest(self, budget: Speedup) -> tuple[int, ...]:
        exact_s = point_of(self.layers, self._exact).seconds + self.rest_s

        def solve(layers: Layers) -> tuple[int, ...] | None:
            solution = quietest(layers, exact_s / budget.factor - self.rest_s)
            return None if solution is None else solution.selection

        selection = self._least(solve, lambda point: point.tau, priced="tau")
        if selection is not None:
            return selection
        best = point_of(self.layers, self._fastest(math.inf))
        possible = exact_s / (best.seconds + self.rest_s) if exact_s > 0 else 1.0
        raise ConfigError(
            f"budget=Speedup({budget.factor:g}): the best that is possible here is predicted to be "
            # Rounded down: it is to be possible.
            f"Speedup({math.floor(possible * 100) / 100:g}), at noise tau = {best.tau:.3g}; "
            "ask for less, or let the planner use more methods"
        )

    def _auto(self) -> _Chosen:
        growth = self.noise_ratio / (1 + self.noise_ratio) if self.noise_ratio < math.inf else 1.0

        def cost(point: Point) -> float:
            return (self.rest_s + point.seconds) * (1 + growth * point.tau)

        def solve(layers: Layers) -> tuple[int, ...]:
            corners = frontier(layers)
            costs = [cost(point) for point in corners.points]
            return corners.selection(costs.index(min(costs)))

        exact = cost(point_of(self.layers, self._exact))
        selection = self._least(solve, cost) or self._exact
        gain = 1 - cost(point_of(self.layers, selection)) / exact if exact > 0 else 0.0
        return _Chosen(self._exact, gain) if gain < LEAST_GAIN else _Chosen(selection)

    @property
    def _exact(self) -> tuple[int, ...]:
        return (0,) * len(self.layers)

    def _least(
        self,
        solve: Callable[[Layers], tuple[int, ...] | None],
        cost: Callable[[Point], float],
        priced: str = "seconds",
    ) -> tuple[int, ...] | None:
        """Return the least costly selection within the limit of the bias.

        Bias is a second limit, and only the first is solved for exactly: bias is given one price
        after the other instead, in the quantity that is to be least, and the best selection that
        keeps the limit is taken. Where bias does not matter that is the optimum.
        """
        best, least = None, math.inf
        for layers in self._priced(priced):
            selection = solve(layers)
            if selection is None:
                continue
            point = point_of(self.layers, selection)
            if point.bias <= self.max_bias and cost(point) < least:
                best, least = selection, cost(point)
            if layers is self.layers and best is not None:
                break
        return best

    def _priced(self, quantity: str) -> Iterator[Layers]:
        yield self.layers
        if self.max_bias > 0:
            whole = sum(getattr(layer[0], quantity) for layer in self.layers) or 1.0
            for price in _BIAS_PRICES:
                rate = price * whole / self.max_bias
                yield [[_dearer(choice, quantity, rate) for choice in c] for c in self.layers]
        unbiased = [[i for i, c in enumerate(layer) if not c.bias] for layer in self.layers]
        # Positions must stay what they are: a choice with bias becomes that of staying exact.
        yield [
            [choice if i in free else layer[0] for i, choice in enumerate(layer)]
            for layer, free in zip(self.layers, map(set, unbiased), strict=True)
        ]


def _dearer(choice: Choice, quantity: str, rate: float) -> Choice:
    raised = getattr(choice, quantity) + rate * choice.bias
    return replace(choice, **{quantity: raised}) if choice.bias else choice


def _choices(menus: Sequence[Menu]) -> list[Choice]:
    """Return the ways to compute the products of a layer; the first is exact."""
    options = [_options(menu) for menu in menus]
    if math.prod(map(len, options)) > _COMBINATIONS:
        options = [_best(menu, numbers) for menu, numbers in zip(menus, options, strict=True)]
    found = [_choice(menus, picks) for picks in product(*options)]
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
    """Return the candidates that no other one is better than in every respect."""

    def figures(number: int | None) -> tuple[float, float, float]:
        choice = _choice([menu], (number,))
        return choice.seconds, choice.tau, choice.bias

    known = {number: figures(number) for number in numbers}
    return [
        number
        for number in numbers
        if number is None
        or not any(
            known[other] != known[number]
            and all(a <= b for a, b in zip(known[other], known[number], strict=True))
            for other in numbers
        )
    ]


def _choice(menus: Sequence[Menu], picks: tuple[int | None, ...]) -> Choice:
    chosen = [
        None if pick is None else menu.candidates[pick]
        for menu, pick in zip(menus, picks, strict=True)
    ]
    some = [candidate for candidate in chosen if candidate is not None]
    return Choice(
        _seconds(menus, chosen),
        math.fsum(candidate.effect.tau for candidate in some),
        # What an unbiased method was measured to add is what is left of its noise.
        math.fsum(c.effect.bias for c in some if not c.method.unbiased),
        picks,
    )


def _seconds(menus: Sequence[Menu], chosen: Sequence[Candidate | None]) -> float:
    return seconds_of(
        menu.exact if candidate is None else candidate.price
        for menu, candidate in zip(menus, chosen, strict=True)
    )


def _savings(menus: Sequence[Menu], chosen: Sequence[Candidate | None], place: int) -> list[float]:
    """Return the seconds that each candidate of one menu would save, the others as they are."""
    now = _seconds(menus, chosen)
    return [
        now - _seconds(menus, [*chosen[:place], candidate, *chosen[place + 1 :]])
        for candidate in menus[place].candidates
    ]


def _other_texts(menu: Menu, pick: Candidate | None, savings: Sequence[float]) -> tuple[str, ...]:
    texts = [
        f"{candidate}: would {_change(saved)}, tau {candidate.effect.tau:.2g}"
        for candidate, saved in zip(menu.candidates, savings, strict=True)
        if candidate is not pick
    ]
    return (*texts, *(f"{text}: {rejected}" for text, rejected in menu.refused))


def _reason(menu: Menu, savings: Sequence[float], small_gain: float | None) -> Rejected:
    if menu.obstacle is not None:
        return menu.obstacle
    if not menu.candidates:
        return Rejected(Reason.NO_CANDIDATE, "; ".join(f"{t}: {r}" for t, r in menu.refused[:2]))
    saved, best = max(zip(savings, menu.candidates, strict=True), key=lambda pair: pair[0])
    if saved <= 0:
        return Rejected(Reason.NO_GAIN, f"{best} would {_change(saved)}")
    detail = f"{best} would {_change(saved)} for tau {best.effect.tau:.2g}"
    if small_gain is not None:
        percent = f"{100 * small_gain:.1f} of {100 * LEAST_GAIN:g} %"
        return Rejected(Reason.SMALL_GAIN, f"{percent}; {detail}")
    return Rejected(Reason.NOISE_TOO_DEAR, detail)


def _change(saved_s: float) -> str:
    verb = "save" if saved_s > 0 else "cost"
    return f"{verb} {abs(saved_s) * _MICRO:.1f} us"
