"""The cost record: conversion, checks, arithmetic, substitution, evaluation."""

from __future__ import annotations

import dataclasses
from fractions import Fraction

import pytest
import sympy
from hypothesis import given
from hypothesis import strategies as st

from cost_model import Cost

B, KEEP = sympy.symbols("B keep", positive=True)

COUNTS = st.integers(0, 10**18)
COSTS = st.builds(Cost, COUNTS, COUNTS, COUNTS)
SYMBOLIC_COSTS = st.builds(lambda fixed, per_sample: fixed + per_sample * B, COSTS, COSTS)
FACTORS = st.one_of(st.integers(0, 1000), st.decimals(0, 1, places=6).map(float))


def test_numbers_become_expressions() -> None:
    """Callers can use sympy methods on every field, whatever they passed in."""
    cost = Cost(6, 2.5, B)
    assert (cost.flops, cost.bytes_read, cost.bytes_written) == (6, sympy.Rational(5, 2), B)
    assert all(isinstance(getattr(cost, f.name), sympy.Expr) for f in dataclasses.fields(cost))
    assert cost.bytes == B + sympy.Rational(5, 2)
    assert cost == Cost(sympy.Integer(6), 2.5, B)
    assert hash(cost) == hash(Cost(6, sympy.Rational(5, 2), B))


def test_is_frozen() -> None:
    """A cost is a value."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        Cost.zero().flops = 1  # type: ignore[misc]


@pytest.mark.parametrize("field", ["flops", "bytes_read", "bytes_written"])
@pytest.mark.parametrize(
    "value", [-1, -0.5, -B, float("inf"), float("nan"), sympy.I, sympy.zoo], ids=str
)
def test_impossible_quantities_are_rejected(field: str, value: float) -> None:
    """No cost is negative, infinite or complex, and the message names the field."""
    with pytest.raises(ValueError, match=f"{field} must be a finite number >= 0"):
        dataclasses.replace(Cost.zero(), **{field: value})


@pytest.mark.parametrize("value", ["B", None, True, [1]], ids=str)
def test_other_types_are_rejected(value: object) -> None:
    """In particular strings, which sympy would evaluate."""
    with pytest.raises(TypeError, match="flops must be a number or a sympy expression"):
        Cost(value, 0, 0)


def test_arithmetic_refuses_other_operands() -> None:
    """A cost is neither a number nor squared, and no negative multiple of it exists."""
    cost = Cost(1, 2, 3)
    with pytest.raises(TypeError, match="unsupported operand"):
        cost + 1  # type: ignore[operator]
    with pytest.raises(TypeError, match="unsupported operand"):
        cost * cost
    with pytest.raises(ValueError, match="factor must be a finite number >= 0"):
        Cost.zero() * -1


@given(SYMBOLIC_COSTS, SYMBOLIC_COSTS, SYMBOLIC_COSTS)
def test_addition(a: Cost, b: Cost, c: Cost) -> None:
    """Costs form a commutative monoid, which is what `sum` needs."""
    assert a + b == b + a
    assert (a + b) + c == a + (b + c)
    assert a + Cost.zero() == a
    assert sum([a, b, c], Cost.zero()) == a + b + c
    assert (a + b).bytes == a.bytes + b.bytes


@given(COSTS, COSTS, FACTORS)
def test_scaling(a: Cost, b: Cost, factor: float) -> None:
    """Scaling distributes over sums, from either side, for ints, floats and expressions."""
    assert (a + b) * factor == a * factor + b * factor
    assert factor * a == a * factor
    assert sympy.sympify(str(factor), rational=True) * a == a * factor
    assert B * a == a * B


@given(COSTS, st.decimals(0, 1, places=6).map(float))
def test_floats_are_exact_decimals(cost: Cost, keep: float) -> None:
    """Scaling by a float, or substituting one, is exact: no rounding error can accumulate."""
    exact = Fraction(str(keep)) * int(cost.flops)
    assert (cost * keep).flops == sympy.Rational(exact.numerator, exact.denominator)
    assert (cost * KEEP).subs({KEEP: keep}) == cost * keep


@given(COSTS, COSTS, st.integers(1, 10**6))
def test_substitution(fixed: Cost, per_sample: Cost, batch: int) -> None:
    """A symbol can be given its value before or after the arithmetic."""
    cost = fixed + per_sample * B
    assert cost.subs({B: batch}) == fixed + per_sample * batch
    assert cost.evaluate({B: batch}) == (fixed + per_sample * batch).evaluate()
    assert cost.subs({KEEP: 1}) == cost


def test_substitution_is_simultaneous() -> None:
    """Replacements do not see each other, so their order cannot matter."""
    assert Cost(B, KEEP, 0).subs({B: KEEP, KEEP: B}) == Cost(KEEP, B, 0)
    with pytest.raises(ValueError, match="flops must be a finite number >= 0"):
        Cost(B, 0, 0).subs({B: -1})


def test_evaluate_returns_plain_ints() -> None:
    """Expected costs are rounded; large ones keep every digit."""
    numbers = Cost(10**30 + 1, KEEP * B, 2.5).evaluate({B: 10, KEEP: 0.34})
    assert numbers == (10**30 + 1, 3, 3)
    assert all(type(number) is int for number in numbers)


def test_evaluate_names_the_free_symbols() -> None:
    """The message says which symbols still need a value."""
    with pytest.raises(ValueError, match="free symbols B, keep: give each a value"):
        Cost(KEEP, 1, B).evaluate()
    with pytest.raises(ValueError, match="free symbols keep:"):
        Cost(KEEP, 1, B).evaluate({B: 1})
