"""From the local noise of one product to the noise of the whole gradient.

The error of a weight gradient is an error of the gradient itself. That of an input gradient goes on
to the layers before it: a relative error e in it becomes one of e in every weight gradient that it
reaches, times a correction that is measured. That of a forward product becomes one of the whole
gradient, without a correction. With V and S the variance and the square of the weight
gradients, by layer, a plan adds

    tau  = [sum of noise + correction * sum over inputs of (noise / square) * (V + S reached)] / V,
    bias = the same of `bias`, over S.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from graphpass.capture import Analysis
from graphpass.dependence import reached
from graphpass.noise import LocalNoise, NoiseTable
from graphpass.site import Gradient, Site


@dataclass(frozen=True, slots=True)
class Effect:
    """What one approximation adds to the noise and to the bias of the gradient.

    Attributes:
        tau: noise, relative to the noise of the gradient.
        bias: squared bias, relative to the squared gradient.
    """

    tau: float
    bias: float

    def __str__(self) -> str:
        """Return both, or the noise alone where there is no bias."""
        return f"tau {self.tau:.2g}" + (f", bias {self.bias:.2g}" if self.bias else "")


class Propagation:
    """How errors of a graph's sites reach its gradient.

    Attributes:
        variance: V of the whole gradient.
        square: |E g|^2 of the whole gradient.
    """

    def __init__(self, analysis: Analysis, table: NoiseTable) -> None:
        """Add up what every site reaches.

        Args:
            analysis: what the graph holds.
            table: what is known of its noise.
        """
        sites = analysis.sites
        weights = [site.id for site in sites if site.gradient is Gradient.WEIGHT]
        self.variance = math.fsum(table.variance.get(name, 0.0) for name in weights)
        self.square = math.fsum(table.square.get(name, 0.0) for name in weights)
        self._correction = table.correction
        both = {
            name: table.variance.get(name, 0.0) + table.square.get(name, 0.0) for name in weights
        }
        self._behind: Mapping[str, float] = {
            sites[number].id: math.fsum(both[sites[i].id] for i in found)
            for number, found in reached(analysis.flow, sites).items()
        }

    @property
    def noise_ratio(self) -> float:
        """The ratio r = V / |E g|^2; infinite where the gradient is nothing but noise."""
        return _ratio(self.variance, self.square)

    def effect(self, site: Site, local: LocalNoise) -> Effect | None:
        """Return what an approximation adds; None where that cannot be told.

        That is where a figure is not finite, and where the gradient has no noise to compare with:
        every weight gradient is zero, or none is computed.
        """
        if not self.variance > 0:
            return None
        if site.gradient is Gradient.WEIGHT:
            noise, bias = local.noise, local.bias
        else:
            forward = site.gradient is Gradient.FORWARD
            gain = (1.0 if forward else self._correction) * self._behind[site.id]
            noise = _ratio(local.noise, local.square) * gain if local.noise else 0.0
            bias = _ratio(local.bias, local.square) * gain if local.bias else 0.0
        # What is estimated as a difference may come out below zero.
        noise, bias = max(noise, 0.0), max(bias, 0.0)
        result = Effect(_ratio(noise, self.variance), _ratio(bias, self.square))
        return result if math.isfinite(result.tau) and math.isfinite(result.bias) else None


def _ratio(part: float, whole: float) -> float:
    if part == 0:
        return 0.0
    # Less than nothing is left of an estimate whose noise exceeds it.
    return part / whole if whole > 0 else math.inf
