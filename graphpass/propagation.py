"""The law of noise: from the errors of single products to the noise of the whole gradient.

With V = E|g - E g|^2 the noise of a mini-batch gradient, over all trained parameters, and S =
|E g|^2 its square, approximations that add A = E|ĝ - g|^2 have tau = A / V, and squared bias is
told against S. The error of a weight gradient is an error of the gradient itself. That of an input
gradient goes on to the layers before it: a relative error e in it becomes one of e in every weight
gradient that it reaches, times a correction that is measured. That of a forward product becomes one
of the whole gradient, without a correction. So, with V_w and S_w those of single weight gradients,

    A = sum of noise of weight gradients
      + correction * sum over input gradients of (noise / square) * (V_w + S_w reached)
      + sum over forward products of (noise / square) * (V + S),

and the squared bias is the same of `bias`.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from graphpass.noise import Key, LocalNoise, NoiseTable, PlanNoise, Reach, divided
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

    def __init__(self, table: NoiseTable, reach: Reach) -> None:
        """Add up what every site reaches.

        Args:
            table: what is known of the graph's noise.
            reach: weight gradients that each input gradient flows into.
        """
        self.variance = math.fsum(table.variance.values())
        self.square = math.fsum(table.square.values())
        self._table = table
        self._behind = {
            site: math.fsum(table.variance.get(w, 0.0) + table.square.get(w, 0.0) for w in reached)
            for site, reached in reach.items()
        }

    @property
    def noise_ratio(self) -> float:
        """The ratio r = V / |E g|^2; infinite where the gradient is nothing but noise."""
        # Less than nothing is left of an estimate whose noise exceeds it.
        return divided(self.variance, self.square)

    def effect(self, site: Site, local: LocalNoise) -> Effect | None:
        """Return what an approximation adds; None where that cannot be told.

        That is where a figure is not finite, and where the gradient has no noise to compare with:
        every parameter's gradient is zero, or none is computed.
        """
        if not self.variance > 0:
            return None
        if site.gradient is Gradient.FORWARD:
            noise, bias = _passed_on(local, self.variance + self.square)
        else:
            noise, bias = self._added(site.id, local)
        # What is estimated as a difference may come out below zero.
        noise, bias = max(noise, 0.0), max(bias, 0.0)
        result = Effect(divided(noise, self.variance), divided(bias, self.square))
        return result if math.isfinite(result.tau) and math.isfinite(result.bias) else None

    def plan(self, chosen: Iterable[Key]) -> PlanNoise:
        """Return what a plan adds.

        Args:
            chosen: the candidates that it uses; products not named are exact. Those of forward
                products are no part of it: they were never measured.

        Raises:
            KeyError: if a candidate is not in the table.
        """
        noise = inputs = bias = 0.0
        for key in chosen:
            site = key[0]
            added, squared = self._added(site, self._table.entries[key])
            noise += added
            inputs += added if site in self._behind else 0.0
            bias += squared
        return PlanNoise(
            divided(noise, self.variance),
            divided(inputs, self.variance),
            divided(bias, self.square),
        )

    def _added(self, site: str, local: LocalNoise) -> tuple[float, float]:
        """Return noise and squared bias that come from an error of a gradient."""
        if site not in self._behind:
            return local.noise, local.bias
        return _passed_on(local, self._table.correction * self._behind[site])


def _passed_on(local: LocalNoise, behind: float) -> tuple[float, float]:
    """Return noise and squared bias where a relative error becomes one of something else."""
    return divided(local.noise, local.square) * behind, divided(local.bias, local.square) * behind
