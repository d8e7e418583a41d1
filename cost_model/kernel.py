"""One kernel of an operation: its cost, and what its speed depends on beside the cost."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import sympy

from cost_model.cost import Cost, Dim


@dataclass(frozen=True, slots=True)
class KernelCost:
    """One kernel, launched once.

    Attributes:
        kind: key of an efficiency table, such as "convolution_forward" or "int8_round".
        cost: FLOPs and bytes.
        dtype: element type that it computes in, such as "float32".
        shared: name of work that several products of a layer have in common, such as the rounding
            of an operand; kernels of equal names are run once in a plan. "" for its own work.
        sizes: what its efficiency depends on, by name: channels, rows, taps. All are >= 1.
    """

    kind: str
    cost: Cost
    dtype: str
    shared: str = ""
    sizes: Mapping[str, Dim] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the names.

        Raises:
            ValueError: if kind or dtype is empty.
        """
        if not self.kind or not self.dtype:
            raise ValueError(f"a kernel needs a kind and a dtype, got {self!r}")

    def subs(self, mapping: Mapping[sympy.Symbol, Dim | float]) -> KernelCost:
        """Return this kernel with symbols replaced in its cost and its sizes."""
        sizes = {
            name: sympy.sympify(size).xreplace(dict(mapping)) for name, size in self.sizes.items()
        }
        return replace(self, cost=self.cost.subs(mapping), sizes=sizes)


def total(kernels: Iterable[KernelCost]) -> Cost:
    """Return the cost of all kernels of one product, what it could share with others included."""
    return sum((kernel.cost for kernel in kernels), start=Cost.zero())


def counted_once(kernels: Iterable[KernelCost]) -> Iterator[KernelCost]:
    """Yield the kernels of a plan that are run: of those that share a name, the first."""
    seen = set()
    for kernel in kernels:
        if kernel.shared not in seen:
            yield kernel
        if kernel.shared:
            seen.add(kernel.shared)
