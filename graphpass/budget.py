"""What a plan may cost, and what it is to reach: the forms of the option `budget`.

Every form is a point on one frontier, noise against time: a number is the most noise, "auto" the
least predicted time to the same loss, `Speedup` the least noise that is so fast, and `AccuracyDrop`
the most noise that costs so many points of accuracy.
"""

import math
import sys
from dataclasses import dataclass

from graphpass.curve import Curve
from graphpass.errors import ConfigError

AUTO = "auto"


@dataclass(frozen=True, slots=True)
class Speedup:
    """The least noise with which a step is predicted to be so many times faster.

    A model that is compiled in several graphs has to reach it in each of them.

    Attributes:
        factor: exact step time over planned step time; at least 1.
    """

    factor: float

    def __post_init__(self) -> None:
        """Check the range.

        Raises:
            ConfigError: if the factor is no finite number of at least 1.
        """
        if not _is_number(self.factor) or not 1 <= self.factor <= sys.float_info.max:
            raise ConfigError(f"Speedup({self.factor!r}): give a finite number that is at least 1")


@dataclass(frozen=True, slots=True)
class AccuracyDrop:
    """The most noise that is expected to cost at most so many points of accuracy.

    Attributes:
        points: points of accuracy, such as 0.3 of 100; more than 0.
        curve: from noise to accuracy, as `graphpass.tune` fits it; None where none is known yet.
    """

    points: float
    curve: Curve | None = None

    def __post_init__(self) -> None:
        """Check the range.

        Raises:
            ConfigError: if the points are no finite positive number, or the curve is none.
        """
        if not _is_number(self.points) or not 0 < self.points <= sys.float_info.max:
            raise ConfigError(f"AccuracyDrop({self.points!r}): give a finite number of points > 0")
        if self.curve is not None and not isinstance(self.curve, Curve):
            raise ConfigError(
                f"AccuracyDrop: curve={self.curve!r}; give the curve of what graphpass.tune "
                "returned, or None"
            )

    @property
    def tau(self) -> float:
        """The noise that costs so many points.

        Raises:
            ConfigError: if no curve is known.
        """
        if self.curve is None:
            raise ConfigError(
                f"budget=AccuracyDrop({self.points:g}): what noise costs in accuracy is not known "
                "for this model; graphpass.tune(train, budget=...) measures it with short runs and "
                "returns options to train with"
            )
        return self.curve.tau_for(self.points)


Budget = float | str | Speedup | AccuracyDrop


def check_budget(budget: object) -> None:
    """Check the option `budget`.

    Raises:
        ConfigError: if it is none of its forms.
    """
    if isinstance(budget, (Speedup, AccuracyDrop)) or (isinstance(budget, str) and budget == AUTO):
        return
    # `not <=` also refuses NaN; an integer may be larger than every floating-point number.
    if not _is_number(budget) or not 0 <= budget <= sys.float_info.max:  # type: ignore[operator]
        raise ConfigError(
            f'budget={budget!r}: give "auto" or a finite number that is at least 0, '
            "graphpass.Speedup(x) or graphpass.AccuracyDrop(points)"
        )


def check_bias(max_bias: object) -> None:
    """Check the option `max_bias`.

    Raises:
        ConfigError: if it is no finite number of at least 0.
    """
    if not _is_number(max_bias) or not 0 <= max_bias <= sys.float_info.max:  # type: ignore[operator]
        raise ConfigError(f"max_bias={max_bias!r}: give a finite number that is at least 0")


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return not isinstance(value, float) or not math.isnan(value)
