"""The cost record: floating-point operations done, bytes read and bytes written.

One fused multiply-add counts 2 FLOPs. Bytes are compulsory traffic: every operand is read once and
every result written once, however often a cache serves them in between. Each quantity is a sympy
expression, so a cost may depend on dimensions (a dynamic batch) or on a method's parameters (the
fraction of rows it keeps) that get their values later.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TypeAlias

import sympy

Dim: TypeAlias = int | sympy.Expr


@dataclass(frozen=True, slots=True)
class Cost:
    """What one operation, or a sum of operations, costs.

    Numbers are turned into sympy expressions. Floats become the decimals they print as, so that
    arithmetic is exact: `cost * 0.1 * 10 == cost`. Equality compares the expressions' form.

    Attributes:
        flops: floating-point operations; 0 for an operation that only moves data.
        bytes_read: bytes of every operand, each counted once.
        bytes_written: bytes of every result, each counted once.
    """

    flops: sympy.Expr
    bytes_read: sympy.Expr
    bytes_written: sympy.Expr

    def __post_init__(self) -> None:
        """Turn numbers into exact expressions and check them.

        Raises:
            TypeError: if a quantity is neither a number nor a sympy expression.
            ValueError: if a quantity is negative, infinite or not real.
        """
        for field in fields(self):
            value = _quantity(getattr(self, field.name), field.name)
            # A frozen record offers no other way to convert a field while it is being made.
            object.__setattr__(self, field.name, value)

    @classmethod
    def zero(cls) -> Cost:
        """Return the cost of doing nothing, the start value for `sum`."""
        return cls(flops=0, bytes_read=0, bytes_written=0)

    @property
    def bytes(self) -> sympy.Expr:
        """Bytes read plus bytes written."""
        return self.bytes_read + self.bytes_written

    def __add__(self, other: Cost) -> Cost:
        """Return the cost of both operations, one after the other."""
        if not isinstance(other, Cost):
            return NotImplemented
        return Cost(
            flops=self.flops + other.flops,
            bytes_read=self.bytes_read + other.bytes_read,
            bytes_written=self.bytes_written + other.bytes_written,
        )

    def __mul__(self, factor: Dim | float) -> Cost:
        """Return the cost of `factor` such operations; a fraction is an expected cost.

        Raises:
            ValueError: if `factor` is negative, infinite or not real.
        """
        if not isinstance(factor, (int, float, sympy.Expr)):
            return NotImplemented
        scale = _quantity(factor, "factor")
        return Cost(
            flops=self.flops * scale,
            bytes_read=self.bytes_read * scale,
            bytes_written=self.bytes_written * scale,
        )

    __rmul__ = __mul__

    def subs(self, mapping: Mapping[sympy.Symbol, Dim | float]) -> Cost:
        """Return this cost with symbols replaced, all at once; symbols not in it are ignored.

        Args:
            mapping: a number or an expression for each symbol to be replaced.

        Raises:
            ValueError: if a quantity becomes negative, infinite or not real.
        """
        values = {symbol: _exact(value) for symbol, value in mapping.items()}
        return Cost(
            flops=self.flops.xreplace(values),
            bytes_read=self.bytes_read.xreplace(values),
            bytes_written=self.bytes_written.xreplace(values),
        )

    def evaluate(
        self, mapping: Mapping[sympy.Symbol, Dim | float] | None = None
    ) -> tuple[int, int, int]:
        """Return `(flops, bytes_read, bytes_written)` as ints, expected costs rounded.

        Args:
            mapping: replaces symbols first, as `subs` does.

        Raises:
            ValueError: if a symbol is left without a value, or a quantity becomes negative.
        """
        cost = self if mapping is None else self.subs(mapping)
        quantities = (cost.flops, cost.bytes_read, cost.bytes_written)
        free = set[str]().union(*({s.name for s in q.free_symbols} for q in quantities))
        if free:
            raise ValueError(
                f"cannot evaluate a cost with free symbols {', '.join(sorted(free))}: "
                "give each a value in `mapping`"
            )
        # int() truncates, so adding a half rounds: no quantity is negative
        flops, bytes_read, bytes_written = (int(q + sympy.Rational(1, 2)) for q in quantities)
        return flops, bytes_read, bytes_written


def _quantity(value: Dim | float, name: str) -> sympy.Expr:
    """Return `value` as an exact expression that is not known to be negative or infinite.

    Raises:
        TypeError: if `value` is neither a number nor a sympy expression.
        ValueError: if `value` is negative, infinite or not real.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, sympy.Expr)):
        raise TypeError(f"{name} must be a number or a sympy expression, got {value!r}")
    expr = _exact(value)
    if expr is sympy.nan or expr.is_real is False or expr.is_negative:
        raise ValueError(f"{name} must be a finite number >= 0, got {value}")
    return expr


def _exact(value: Dim | float) -> sympy.Expr:
    """Return `value` as an expression in which every float is the decimal it prints as."""
    expr = sympy.sympify(value)
    floats = expr.atoms(sympy.Float)
    return expr.xreplace({f: sympy.Rational(str(f)) for f in floats}) if floats else expr
