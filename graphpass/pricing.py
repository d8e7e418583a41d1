"""Seconds of products: a plain roofline, from generic figures of a processor core.

Seconds are the larger of the time to compute and the time to move the bytes, and a launch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Protocol

from cost_model import Cost, element_count
from graphpass.capture import Analysis
from graphpass.method import Method
from graphpass.site import Gradient, Site

# Of no machine in particular: the order of magnitude of one core with vectors of 512 bits.
_FLOPS_PER_S_AND_THREAD = 5e10
_BYTES_PER_S_AND_THREAD = 1e10
_LAUNCH_S = 1e-5
# So often do a normalisation and an activation, forward and backward, pass over their data.
_PASSES = 12


@dataclass(frozen=True, slots=True)
class Price:
    """What a product costs in time.

    Attributes:
        seconds: of the whole product, shared kernels included.
        shared: seconds of the shared kernels among them, by name.
        source: "datasheet", "calibrated" or "measured".
    """

    seconds: float
    shared: Mapping[str, float] = field(default_factory=dict)
    source: str = "datasheet"


class Pricing(Protocol):
    """Knows what products cost on a machine."""

    def exact(self, site: Site) -> Price:
        """Return the price of the exact product."""
        ...

    def approximate(self, site: Site, method: Method, params: Any) -> Price:
        """Return the price of the product by a method."""
        ...

    def rest(self) -> Price:
        """Return the price of everything of a step that is no product."""
        ...


@dataclass(frozen=True, slots=True)
class Roofline:
    """Generic prices.

    Attributes:
        sites: every product of the graph.
        sizes: value of each symbolic size.
        threads: number of threads.
    """

    sites: tuple[Site, ...]
    sizes: Mapping[str, int]
    threads: int

    def exact(self, site: Site) -> Price:
        """Return the price of the exact product."""
        return Price(self._seconds(site.cost))

    def approximate(self, site: Site, method: Method, params: Any) -> Price:
        """Return the price of the product by a method."""
        return Price(self._seconds(method.cost(site, params)))

    def rest(self) -> Price:
        """Return the price of the passes over the outputs of all layers."""
        outputs = (
            Cost(0, element_count(site.output) * site.itemsize, 0)
            for site in self.sites
            if site.gradient is Gradient.FORWARD
        )
        return Price(self._seconds(sum(outputs, Cost.zero()) * _PASSES))

    def _seconds(self, cost: Cost) -> float:
        flops, read, written = _evaluated(cost, tuple(sorted(self.sizes.items())))
        compute_s = flops / (_FLOPS_PER_S_AND_THREAD * self.threads)
        move_s = (read + written) / (_BYTES_PER_S_AND_THREAD * self.threads)
        return max(compute_s, move_s) + _LAUNCH_S


def of(analysis: Analysis, threads: int) -> Pricing:
    """Return the prices of a graph's products.

    Args:
        analysis: what the graph holds.
        threads: number of threads that compute.
    """
    return Roofline(analysis.sites, analysis.hints, threads)


@cache
def _evaluated(cost: Cost, sizes: tuple[tuple[str, int], ...]) -> tuple[int, int, int]:
    values = dict(sizes)
    symbols = cost.flops.free_symbols | cost.bytes.free_symbols
    return cost.evaluate({symbol: values[str(symbol)] for symbol in symbols})
