"""Find the selection of a frontier that a budget asks for, within a limit of the bias."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from graphpass.budget import AccuracyDrop, Budget, Speedup
from graphpass.errors import ConfigError
from graphpass.frontier import Choice, Point, fastest, frontier, point_of, quietest
from graphpass.noise import steps_inflation

# The least predicted gain for which "auto" approximates anything: below it, predictions are no
# better than a guess.
LEAST_GAIN = 0.02
# What a unit of bias is worth, in parts of all there is to gain: the prices that are tried.
_BIAS_PRICES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
# Sums of the same numbers in another order differ by less.
_TOLERANCE = 1e-9

Layers = list[list[Choice]]


@dataclass(frozen=True, slots=True)
class Chosen:
    """A selection.

    Attributes:
        selection: choice of each layer.
        small_gain: what the best plan would have gained, where that was too little for it.
    """

    selection: tuple[int, ...]
    small_gain: float | None = None


@dataclass(frozen=True, slots=True)
class Spending:
    """The layers of a graph, and what limits the choice among their choices.

    Attributes:
        layers: choices of each layer; the first of each is exact.
        max_bias: squared bias that may be added, relative to the squared gradient.
        rest_s: seconds of a step that are spent on no layer.
        noise_ratio: r = V / |E g|^2.
    """

    layers: Layers
    max_bias: float
    rest_s: float
    noise_ratio: float

    def spend(self, budget: Budget) -> Chosen:
        """Return the selection that a budget asks for.

        Args:
            budget: a form of the option `budget`.

        Raises:
            ConfigError: if the budget cannot be met, or nothing is known of accuracy.
        """
        if isinstance(budget, Speedup):
            return Chosen(self._quietest(budget))
        if isinstance(budget, AccuracyDrop):
            return Chosen(self._fastest(budget.tau))
        if isinstance(budget, str):
            return self._auto()
        return Chosen(self._fastest(budget))

    def _fastest(self, tau: float) -> tuple[int, ...]:
        def solve(layers: Layers) -> tuple[int, ...] | None:
            solution = fastest(layers, tau)
            return None if solution is None else solution.selection

        within = tau * (1 + _TOLERANCE)
        return (
            self._least(solve, lambda p: p.seconds if p.tau <= within else math.inf) or self._exact
        )

    def _quietest(self, budget: Speedup) -> tuple[int, ...]:
        exact_s = point_of(self.layers, self._exact).seconds + self.rest_s
        limit = exact_s / budget.factor - self.rest_s
        within = limit + _TOLERANCE * exact_s

        def solve(layers: Layers) -> tuple[int, ...] | None:
            solution = quietest(layers, limit)
            return None if solution is None else solution.selection

        selection = self._least(
            solve, lambda p: p.tau if p.seconds <= within else math.inf, priced="tau"
        )
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

    def _auto(self) -> Chosen:
        def cost(point: Point) -> float:
            return (self.rest_s + point.seconds) * steps_inflation(point.tau, self.noise_ratio)

        def solve(layers: Layers) -> tuple[int, ...]:
            corners = frontier(layers)
            costs = [cost(point) for point in corners.points]
            return corners.selection(costs.index(min(costs)))

        exact = cost(point_of(self.layers, self._exact))
        selection = self._least(solve, cost) or self._exact
        gain = 1 - cost(point_of(self.layers, selection)) / exact if exact > 0 else 0.0
        return Chosen(self._exact, gain) if gain < LEAST_GAIN else Chosen(selection)

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
        keeps the limit is improved, layer by layer. Where bias does not matter that is the optimum.

        Args:
            solve: returns the least selection where bias has a price.
            cost: what is to be least; infinite beyond the other limit.
            priced: the quantity that bias is priced in.
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
                return best
        return None if best is None else self._improved(best, cost)

    def _improved(
        self, selection: tuple[int, ...], cost: Callable[[Point], float]
    ) -> tuple[int, ...]:
        """Return a selection in which no change of a single layer, in their order, is better."""
        chosen, here = list(selection), point_of(self.layers, selection)
        for number, layer in enumerate(self.layers):
            old, least = layer[chosen[number]], cost(here)
            base = here
            for i, new in enumerate(layer):
                point = Point(
                    base.seconds + new.seconds - old.seconds,
                    base.tau + new.tau - old.tau,
                    base.bias + new.bias - old.bias,
                )
                if point.bias <= self.max_bias and cost(point) < least:
                    chosen[number], here, least = i, point, cost(point)
        return tuple(chosen)

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
