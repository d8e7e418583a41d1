"""A machine as the cost model sees it: figures with their sources, and the seconds they give.

A kernel takes the longer of its compute time (FLOPs at the peak of its element type) and its memory
time (bytes at the bandwidth), divided by the efficiency that kernels of its kind reach at its
sizes, and one launch more. On a GPU, products are cut into whole tiles, and what fits into the
cache moves at its rate.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import sympy

from cost_model.cost import Dim
from cost_model.efficiency import EfficiencyTable, Estimate
from cost_model.figure import Figure
from cost_model.kernel import KernelCost, counted_once
from cost_model.multiprocessors import Multiprocessors

# Of kernels that nothing is known about: as far from a measurement as can be.
_UNKNOWN = math.inf


@dataclass(frozen=True, slots=True)
class Hardware:
    """What a machine can do.

    Attributes:
        name: the machine, as a person knows it.
        peak_flops_per_s: dense peak by element type; "float32" is among them. "tf32" is what
            float32 is multiplied as where that is allowed.
        bandwidth_bytes_per_s: of its main memory.
        launch_s: seconds that a kernel takes which does nothing.
        efficiencies: by kind and element type; where a table is missing, the ideal is supposed.
        calibrated: whether this very machine was measured; otherwise the figures are published
            ones, and say so in reports.
        multiprocessors: of a GPU.
    """

    name: str
    peak_flops_per_s: Mapping[str, Figure]
    bandwidth_bytes_per_s: Figure
    launch_s: Figure
    efficiencies: Mapping[tuple[str, str], EfficiencyTable] = field(
        default_factory=lambda: MappingProxyType({})
    )
    calibrated: bool = False
    multiprocessors: Multiprocessors | None = None

    def __post_init__(self) -> None:
        """Check that there is a peak to compare with.

        Raises:
            ValueError: if the peak of float32 is missing.
        """
        if "float32" not in self.peak_flops_per_s:
            raise ValueError(f"{self.name!r} has no peak for float32")

    def ideal_s(self, kernel: KernelCost) -> float:
        """Return the seconds of the kernel at the peak, or at the bandwidth if that is longer.

        An element type without a peak of its own, such as float64, counts as the slowest that has
        one.

        Raises:
            ValueError: if a symbol has no value.
        """
        flops, read, written = kernel.cost.evaluate()
        slowest = min(figure.value for figure in self.peak_flops_per_s.values())
        own = self.peak_flops_per_s.get(kernel.dtype)
        peak = slowest if own is None else own.value
        computing, moving = flops / peak, (read + written) / self.bandwidth_bytes_per_s.value
        if self.multiprocessors is not None:
            units = self.multiprocessors
            # The other half of the cache holds what other kernels left.
            if read + written <= units.cache_bytes.value / 2:
                moving = (read + written) / units.cache_bytes_per_s.value
            if flops:
                sizes = {name: float(size) for name, size in kernel.sizes.items()}
                tiled = units.of_kernel(kernel.kind, sizes, kernel.dtype, peak)
                computing = max(computing, tiled)
        return max(computing, moving)

    def efficiency(self, kernel: KernelCost) -> Estimate:
        """Return the share of the ideal speed that the kernel reaches."""
        table = self.efficiencies.get((kernel.kind, kernel.dtype))
        if table is None or not set(table.names) <= set(kernel.sizes):
            return Estimate(1.0, _UNKNOWN)
        return table.at({name: float(kernel.sizes[name]) for name in table.names})

    def kernel_s(self, kernel: KernelCost) -> float:
        """Return the seconds of one kernel.

        Raises:
            ValueError: if a symbol has no value.
        """
        return self.ideal_s(kernel) / self.efficiency(kernel).efficiency + self.launch_s.value


def seconds(
    kernels: Iterable[KernelCost],
    hardware: Hardware,
    sizes: Mapping[sympy.Symbol, Dim] | None = None,
) -> float:
    """Return the seconds of kernels run one after the other, shared ones once.

    Args:
        kernels: of one product, or of a whole plan.
        hardware: what runs them.
        sizes: value of each symbol.

    Raises:
        ValueError: if a symbol has no value.
    """
    run = counted_once(kernels)
    return sum(hardware.kernel_s(kernel.subs(sizes) if sizes else kernel) for kernel in run)
