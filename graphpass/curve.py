"""The curve from the noise of a plan to the accuracy that training with it reaches.

By the law of the gradient's noise scale (McCandlish et al., "An Empirical Model of Large-Batch
Training", 2018), noise tau lets training of N steps get as far as exact training of N / i, with
i = 1 + s tau, s = r / (1 + r) and r = V / |E g|^2. Accuracy grows with the logarithm of the length
of training, over the short range that matters here, so

    accuracy(tau) = exact - slope * log(1 + s tau),

which is linear in its two unknowns. They are fitted by least squares.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from graphpass.errors import ConfigError

# Two-sided 95 % points of Student's t, by degrees of freedom from 1; beyond the list the normal's.
_STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)
_NORMAL = 1.96


@dataclass(frozen=True, slots=True)
class Curve:
    """A fitted curve from tau to accuracy.

    Attributes:
        exact: accuracy of exact training, in points.
        slope: points lost for every factor e of lost training length; not negative.
        slope_error: half of the 95 % interval of the slope; infinite with fewer than three points.
        saturation: s, in [0, 1].
        largest_tau: largest noise among the fitted points: beyond it nothing is known.
    """

    exact: float
    slope: float
    slope_error: float
    saturation: float
    largest_tau: float

    def drop(self, tau: float) -> float:
        """Return the points that noise `tau` is expected to cost."""
        return self.slope * math.log1p(self.saturation * tau)

    def tau_for(self, points: float) -> float:
        """Return the largest noise, among what was tried, that costs at most so many points."""
        if self.slope <= 0:
            return self.largest_tau
        # exp of a large number overflows, and nothing beyond `largest_tau` is given anyway.
        exponent = min(points / self.slope, 50.0)
        limit = math.expm1(exponent) / self.saturation if self.saturation > 0 else math.inf
        return min(self.largest_tau, limit)


def fit(taus: Sequence[float], accuracies: Sequence[float], saturation: float) -> Curve:
    """Return the curve of least squared error.

    Args:
        taus: noise of each run; at least one must differ from another.
        accuracies: accuracy of each run, in points.
        saturation: r / (1 + r).

    Raises:
        ConfigError: if all runs had the same noise, or a figure is not finite.
    """
    if not all(map(math.isfinite, (*taus, *accuracies))):
        raise ConfigError(f"accuracies must be finite numbers; got {list(accuracies)}")
    x = [math.log1p(saturation * tau) for tau in taus]
    mean_x, mean_y = sum(x) / len(x), sum(accuracies) / len(x)
    spread = sum((value - mean_x) ** 2 for value in x)
    if spread <= 0:
        raise ConfigError(
            f"a curve needs runs with different noise; all of {len(x)} have tau {taus[0]:.4g}"
        )
    product = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, accuracies, strict=True))
    slope = -product / spread
    exact = mean_y + slope * mean_x
    left = sum((b - exact + slope * a) ** 2 for a, b in zip(x, accuracies, strict=True))
    error = _slope_error(left, spread, len(x))
    # More noise cannot help: a curve that rises is one that could not be told from a flat one.
    return Curve(exact, max(slope, 0.0), error, saturation, max(taus))


def _slope_error(residual: float, spread: float, count: int) -> float:
    freedom = count - 2
    if freedom < 1:
        return math.inf
    factor = _STUDENT[freedom - 1] if freedom <= len(_STUDENT) else _NORMAL
    return factor * math.sqrt(residual / freedom / spread)
