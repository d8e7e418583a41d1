"""Which prices are looked at again: close calls, what costs most if it is wrong first."""

from dataclasses import replace
from typing import Any

import pytest

from graphpass.candidates import Candidate, Menu
from graphpass.doubts import doubts
from graphpass.method import get_method
from graphpass.pricing import Price
from graphpass.propagation import Effect
from tests.graphpass.planning import conv_layer

INT8, PRUNE = get_method("int8"), get_method("prune")


def candidate(method: Any, seconds: float, error: float = 0.25) -> Candidate:
    return Candidate(method, method.params(), Price(seconds, {}, "calibrated", error), Effect(0, 0))


def menu(exact_s: float, *candidates: Candidate, layer: int = 1, error: float = 0.25) -> Menu:
    site = conv_layer(layer)[-1]
    return Menu(site, Price(exact_s, {}, "calibrated", error), candidates)


def named(menus: list[Menu], picks: list[Candidate | None]) -> list[tuple[int, str]]:
    return [
        (site.layer, method.name if method else "exact")
        for pair in doubts(menus, picks)
        for site, method, _ in pair
    ]


@pytest.mark.parametrize(
    ("seconds", "errors", "close"),
    [
        (0.5, (0.25, 0.25), False),
        (0.61, (0.25, 0.25), True),
        (0.61, (0.0, 0.4), True),
        (0.61, (0.0, 0.38), False),
        (0.1, (1.0, 1.0), True),
    ],
)
def test_a_call_is_close_if_errors_could_turn_it(
    seconds: float, errors: tuple[float, float], close: bool
) -> None:
    """Against exact, which takes 1."""
    chosen = candidate(INT8, seconds, errors[0])
    found = named([menu(1.0, chosen, error=errors[1])], [chosen])
    assert found == ([(1, "exact"), (1, "int8")] if close else [])


def test_a_product_left_exact_by_little_is_a_close_call() -> None:
    near, far = candidate(INT8, 1.1), candidate(PRUNE, 1.2)
    assert named([menu(1.0, far, near)], [None]) == [(1, "exact"), (1, "int8")]
    assert named([menu(1.0, candidate(INT8, 2.0))], [None]) == []


def test_what_is_known_is_not_doubted_nor_what_is_faster_and_too_noisy() -> None:
    known = candidate(INT8, 0.99, error=0.0)
    assert named([menu(1.0, known, error=0.0)], [known]) == []
    assert named([menu(1.0, candidate(INT8, 0.9))], [None]) == []


def test_what_costs_most_if_it_is_wrong_comes_first() -> None:
    small, large = candidate(INT8, 0.09), candidate(INT8, 9.0)
    menus = [menu(0.1, small), menu(10.0, large, layer=2)]
    assert named(menus, [small, large]) == [(2, "exact"), (2, "int8"), (1, "exact"), (1, "int8")]


def test_of_other_methods_the_next_best_is_looked_at_beside_exact() -> None:
    chosen, second, third = (candidate(m, s) for m, s in ((INT8, 0.8), (PRUNE, 0.82), (PRUNE, 0.9)))
    found = named([menu(1.0, chosen, replace(third), second)], [chosen])
    assert found == [(1, "exact"), (1, "int8"), (1, "prune"), (1, "exact"), (1, "int8")]
