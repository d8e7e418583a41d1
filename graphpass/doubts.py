"""Close calls: prices that a plan turns on, and that are not known well enough.

How a product is computed was decided against the next best way, by the difference of two prices.
Either may be off by its error. Where both together are larger than the difference, the other way
may be the faster one; what the decision costs then, at most, is at stake. A way that was turned
down although it is faster, for its noise, is no close call.
"""

from collections.abc import Sequence

from graphpass.candidates import Candidate, Menu, layers_of
from graphpass.selection import savings
from graphpass.timings import Way


def doubts(menus: Sequence[Menu], picks: Sequence[Candidate | None]) -> list[tuple[Way, ...]]:
    """Return ways whose prices should be known better, decision by decision, the dearest first.

    Exact is among them throughout: what is timed at one time is compared with its like.

    Args:
        menus: what can be chosen for each site.
        picks: what was chosen; None for exact.
    """
    stakes: list[tuple[float, int, Candidate | None]] = []
    for numbers in layers_of(menus):
        layer, chosen = [menus[i] for i in numbers], [picks[i] for i in numbers]
        for place, number in enumerate(numbers):
            menu, pick = layer[place], chosen[place]
            for gain, rival in _rivals(layer, chosen, place):
                stakes.append((_error(menu, pick) + _error(menu, rival) + gain, number, rival))
    close = sorted((entry for entry in stakes if entry[0] > 0), key=lambda entry: -entry[0])
    return [
        tuple(_way(menus[number], way) for way in (None, *_given(picks[number], rival)))
        for _, number, rival in close
    ]


def _given(*ways: Candidate | None) -> list[Candidate]:
    return [way for way in ways if way is not None]


def _rivals(
    layer: Sequence[Menu], chosen: Sequence[Candidate | None], place: int
) -> list[tuple[float, Candidate | None]]:
    """Return the ways that were found slower: the next best one and exact, and what they gain."""
    menu, pick = layer[place], chosen[place]
    others = [way for way in (None, *menu.candidates) if way is not pick]
    gains = savings(layer, chosen, place, others)
    slower = [pair for pair in zip(gains, others, strict=True) if pair[0] <= 0]
    best = max(slower, key=lambda pair: pair[0], default=None)
    return [pair for pair in slower if pair is best or pair[1] is None]


def _error(menu: Menu, candidate: Candidate | None) -> float:
    """Return by how many seconds a price may be off."""
    price = menu.exact if candidate is None else candidate.price
    return price.seconds * price.error


def _way(menu: Menu, candidate: Candidate | None) -> Way:
    if candidate is None:
        return menu.site, None, None
    return menu.site, candidate.method, candidate.params
