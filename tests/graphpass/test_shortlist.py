"""Which candidates are measured: none that a plan would need, by what is supposed or measured."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphpass import Options, prior
from graphpass.candidates import Candidate, Menu, ladder, layers_of
from graphpass.method import Method, get_method
from graphpass.noise import Key, LocalNoise, NoiseTable, key_of
from graphpass.planner import make_plan
from graphpass.pricing import Price
from graphpass.products import Replacement
from graphpass.propagation import Effect
from graphpass.selection import choice_of
from graphpass.shortlist import KNOWN_MARGIN, MARGIN, UNKNOWN, Shortlist, promising
from graphpass.site import Gradient, Site
from tests.graphpass.planning import Prices, chain, conv_layer

UNBIASED, BIASED = get_method("int8"), get_method("bf16")
FORWARD, INPUT, WEIGHT = conv_layer(2)
NETWORK = chain([conv_layer(number) for number in range(1, 6)])
GRADIENTS = ("weight", "input")


def candidate(
    seconds: float, tau: float, bias: float | None = None, shared: float = 0.0
) -> Candidate:
    """Return a candidate, of a biased method where a bias is given; it shares its kernels "g"."""
    price = Price(seconds, {"g": shared} if shared else {}, "calibrated")
    method = UNBIASED if bias is None else BIASED
    return Candidate(method, method.params(), price, Effect(tau, bias or 0.0))


def menu(site: Site, *candidates: Candidate, exact: float = 10.0) -> Menu:
    return Menu(site, Price(exact, {}, "calibrated"), candidates)


def kept(menus: Sequence[Menu], margin: float = MARGIN) -> list[tuple[int, int]]:
    return sorted(promising(menus, margin))


# One product at a time.


def test_what_is_slower_and_far_noisier_is_left_out() -> None:
    fine, near, far = candidate(4.0, 0.01), candidate(5.0, 0.07), candidate(5.0, 0.08)
    assert kept([menu(WEIGHT, fine, near, far)]) == [(0, 0), (0, 1)]
    assert kept([menu(WEIGHT, fine, near, far)], margin=2.0) == [(0, 0)]
    # Faster, it is worth its noise; slower than the exact product nothing is.
    fast, slow = candidate(3.9, 9.0), candidate(11.0, 0.001)
    assert kept([menu(WEIGHT, fine, fast)]) == [(0, 0), (0, 1)]
    assert kept([menu(WEIGHT, fine, fast, slow)]) == [(0, 0), (0, 1), (0, 2)]
    assert kept([menu(WEIGHT, fine, fast, candidate(11.0, 0.5))]) == [(0, 0), (0, 1)]


def test_noise_and_bias_both_count() -> None:
    fine, biased = candidate(4.0, 0.01), candidate(5.0, 0.0, bias=0.1)
    assert kept([menu(WEIGHT, fine, biased)]) == [(0, 0), (0, 1)]
    assert kept([menu(WEIGHT, fine, candidate(5.0, 0.1, bias=0.1))]) == [(0, 0)]
    # What is biased is never preferable to what is not.
    fast = candidate(1.0, 0.0, bias=1e-9)
    assert kept([menu(WEIGHT, fast, candidate(5.0, 0.2), candidate(5.0, 0.1))]) == [(0, 0)] + [
        (0, i) for i in (1, 2)
    ]


def test_the_cheapest_and_the_least_noisy_of_every_site_stay() -> None:
    # With what both share done once, the second candidates cost 3 and 4: better than all others.
    inputs = menu(INPUT, candidate(4.5, 1.0), candidate(5.0, 0.001, shared=2.0))
    weights = menu(WEIGHT, candidate(4.6, 1.0), candidate(6.0, 0.001, shared=2.0))
    others = candidate(4.8, 2.0)
    found = [replace(m, candidates=(*m.candidates, others)) for m in (inputs, weights)]
    assert kept(found) == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_a_noisy_neighbour_does_not_hide_that_another_way_is_preferable() -> None:
    free = candidate(0.1, 50.0)
    pair = candidate(4.0, 0.01), candidate(5.0, 0.1)
    assert kept([menu(INPUT, free), menu(WEIGHT, *pair)]) == [(0, 0), (1, 0)]


def test_forward_products_are_never_measured_but_share_their_work() -> None:
    shares = candidate(6.0, 0.001, bias=0.001, shared=4.0)
    weights = menu(WEIGHT, candidate(6.0, 0.1, shared=4.0), candidate(5.0, 0.01))
    assert kept([weights]) == [(0, 1)]
    assert kept([menu(FORWARD, shares), weights]) == [(1, 0), (1, 1)]
    assert kept([menu(FORWARD, shares)]) == []


def test_of_layers_with_too_many_ways_all_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = menu(WEIGHT, candidate(4.0, 0.01), candidate(5.0, 0.1))
    assert kept([weights]) == [(0, 0)]
    monkeypatch.setattr("graphpass.shortlist._WAYS", 2)
    assert kept([weights]) == [(0, 0), (0, 1)]


# Plans by what is supposed.

figures = st.sampled_from([0.0, 0.001, 0.004, 0.01, 0.03, 0.1, 0.5])
candidates = st.builds(
    candidate,
    seconds=st.integers(3, 12).map(float),
    tau=figures,
    bias=st.none() | figures,
    shared=st.sampled_from([0.0, 1.0, 2.0]),
)
layers = st.tuples(
    *(st.lists(candidates, max_size=4).map(lambda c, s=site: menu(s, *c))  # type: ignore[misc]
      for site in (FORWARD, INPUT, WEIGHT)),
)  # fmt: skip


def some_of(menu: Menu, number: int, left: frozenset[tuple[int, int]]) -> tuple[Candidate, ...]:
    """Return the candidates of a menu that are left, and all of a forward product."""
    forward = menu.site.gradient is Gradient.FORWARD
    return tuple(c for i, c in enumerate(menu.candidates) if forward or (number, i) in left)


def fastest(menus: Sequence[Menu], tau: float, bias: float) -> float:
    """Return the seconds of the fastest plan within limits, by trying all."""
    (numbers,) = layers_of(menus)
    layer = [menus[number] for number in numbers]
    options = [(None, *range(len(menu.candidates))) for menu in layer]
    ways = (choice_of(layer, picks) for picks in product(*options))
    return min(way.seconds for way in ways if way.tau <= tau and way.bias <= bias)


@given(layers, st.sampled_from([1.0, KNOWN_MARGIN, MARGIN]), figures, figures)
def test_the_fastest_plan_needs_none_that_is_left_out(
    menus: Sequence[Menu], margin: float, tau: float, bias: float
) -> None:
    left = promising(menus, margin)
    assert left == promising(menus, margin)
    some = [replace(menu, candidates=some_of(menu, n, left)) for n, menu in enumerate(menus)]
    # Sums of the same effects in another order.
    limits = tau * (1 + 1e-12), bias * (1 + 1e-12)
    assert fastest(some, *limits) == fastest(menus, *limits)


def offers(names: Sequence[str] | None = None, unbiased: bool = True) -> tuple[Replacement, ...]:
    """Return every candidate for the gradients of the network."""
    return tuple(
        Replacement(site, method, params)
        for site in NETWORK.sites
        if site.gradient.value in GRADIENTS
        for method, params in ladder(site, names)
        if (method.unbiased or not unbiased) and method.reject(site, params) is None
    )


def supposed(candidates_of: Sequence[Replacement]) -> NoiseTable:
    """Return what is supposed of candidates."""
    by_site: dict[str, list[tuple[Method, Any]]] = {}
    for offer in candidates_of:
        by_site.setdefault(offer.site.id, []).append((offer.method, offer.params))
    return prior.noise_table(NETWORK, by_site)


def shortlist(prices: Any = None, **given: Any) -> Shortlist:
    return Shortlist(NETWORK, offers(**given), prices or Prices())


PRICES = [
    Prices(),
    Prices({"int8": 0.3, "prune": 0.6, "pixels": 0.4, "phase": 0.5, "crs": 0.5}),
    Prices({"int8": 0.9, "prune": 0.8, "pixels": 0.1, "phase": 0.2}),
]


@pytest.mark.parametrize("prices", PRICES)
@pytest.mark.parametrize("budget", [0.001, 0.01, 0.1, 0.3, 2.0, "auto"])
def test_plans_are_those_of_all_candidates(prices: Prices, budget: Any) -> None:
    names = ("int8", "prune", "pixels", "phase")
    everything = supposed(offers(names))
    keys = shortlist(prices, names=names).keys(NoiseTable())
    assert len(keys) < len(everything.entries)
    some = replace(everything, entries={k: e for k, e in everything.entries.items() if k in keys})
    plans = [
        make_plan(NETWORK, Options(budget=budget, methods=names), 0, None, table, prices)
        for table in (everything, some)
    ]
    assert plans[0].decisions == plans[1].decisions


# Before and after measuring.


def measured(keys: frozenset[Key], louder: float = 1.0) -> NoiseTable:
    """Return a table in which everything is as its prior has it, `int8` so many times as noisy."""
    table = supposed(offers())
    entries: dict[Key, LocalNoise] = {}
    for key in keys:
        local = table.entries.get(key) or LocalNoise(1.0, 0.0, 1.0)
        factor = louder if key[1] == "int8" else 1.0
        # In units of a run, where gradients are small.
        entries[key] = LocalNoise(local.noise * factor / 100, local.bias / 100, local.square / 100)
    variance, square = (
        {name: value / 100 for name, value in whole.items()}
        for whole in (table.variance, table.square)
    )
    return NoiseTable(entries, variance, square)


CLEAR = Prices({"int8": 0.3, "prune": 0.6, "crs": 0.5})


def methods_of(keys: frozenset[Key]) -> set[str]:
    return {method for _, method, _ in keys}


def test_what_was_left_out_comes_back_where_the_other_is_noisier_than_supposed() -> None:
    known = shortlist(CLEAR, names=("int8", "prune", "crs"))
    first = known.keys(NoiseTable())
    assert methods_of(first) == {"int8"}
    assert known.keys(measured(first)) == first
    # Of a weight gradient, the priors of `prune` and `int8` are 33 and 80 times apart.
    assert known.keys(measured(first, louder=5.0)) == first
    louder = known.keys(measured(first, louder=20.0))
    assert louder > first
    assert methods_of(louder) == {"int8", "prune", "crs"}
    # `crs` is measured to be far noisier.
    assert methods_of(known.keys(measured(louder, louder=20.0))) == {"int8", "prune"}


def test_the_correction_of_input_gradients_is_no_change_of_the_picture() -> None:
    """Errors of all of them reach the weights by more or less than priors have it."""
    known = shortlist(CLEAR, names=("int8", "prune"))
    first = known.keys(NoiseTable())
    table = measured(first)
    entries = {
        key: replace(entry, noise=entry.noise * (16 if key[0].endswith("input") else 1))
        for key, entry in table.entries.items()
    }
    assert known.keys(replace(table, entries=entries, correction=1 / 16)) == first


def test_methods_without_a_prior_are_measured_where_the_budget_is_tight() -> None:
    known = shortlist(CLEAR, names=("int8", "crs"))
    assert methods_of(known.keys(NoiseTable(), UNKNOWN)) == {"int8"}
    assert methods_of(known.keys(NoiseTable(), 1e-4)) == {"int8", "crs"}


def test_what_was_not_measured_is_not_chosen_and_is_labelled() -> None:
    known = shortlist(CLEAR, names=("int8", "prune", "crs"))
    # By its prior, `prune` is now far better than `int8`.
    table = known.labelled(measured(known.keys(NoiseTable()), louder=1000.0))
    options = Options(budget=1e-3, methods=("int8", "prune", "crs"))
    plan = make_plan(
        NETWORK, options, 0, None, table, Prices({"int8": 0.3, "prune": 0.2, "crs": 0.5})
    )
    assert {decision.method for decision in plan.approximated} <= {"int8"}
    assert plan.prediction is not None
    others = plan.prediction.sites["conv3:weight"].others
    (pruned,) = (text for text in others if "p=0.99" in text or text.startswith("prune:"))
    assert "not known before it is measured: prior tau 0.0" in pruned
    assert "not measured, as another way takes no longer and should add far less" in pruned
    (sampled,) = (text for text in others if text.startswith("crs"))
    assert "prior none; not measured" in sampled
    # Where nothing was measured at all, nothing is left out.
    before = make_plan(NETWORK, options, 0, None, None, CLEAR).prediction
    assert before is not None
    assert not any(
        "takes no longer" in text for site in before.sites.values() for text in site.others
    )


def test_keys_are_those_of_candidates() -> None:
    given = offers()
    every = {key_of(r.site.id, r.method.name, r.params) for r in given}
    assert shortlist().keys(NoiseTable()) <= every
