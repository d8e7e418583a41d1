"""Parameters of column-row sampling: what is sampled, how, and how much."""

from dataclasses import dataclass
from typing import ClassVar

from graphpass.errors import ConfigError

AXES = ("terms", "samples", "channels")


@dataclass(frozen=True, slots=True)
class Sampling:
    """Parameters of column-row sampling.

    Attributes:
        keep: share of the terms that is taken, in (0, 1].
        sampling: how terms are chosen.
        replacement: whether a term can be taken more than once.
        axis: what is sampled. "terms": what the product sums over (input channels forward, output
            channels for the input gradient, output pixels for the weight gradient; of a matrix
            product, columns and rows). "samples": whole samples of the batch, of gradients.
            "channels": of gradients, the input channels of a convolution or features of a linear
            layer that its forward product takes with the same parameters; others get no gradient.
        again: with "channels", the share of the gradient's own terms that is taken, of those with
            the sampled channels: the largest, without weights (paper, section 5).
        least: terms taken at least, whatever `keep` says (paper, section 5); products that have no
            more stay exact.
        narrow: whether sampled pixels may be rounded to bfloat16 in float32 training.
    """

    keep: float = 0.5
    sampling: str = "norm"
    replacement: bool = False
    axis: str = "terms"
    again: float = 1.0
    least: int = 10
    narrow: bool = True

    method: ClassVar[str]
    legal: ClassVar[tuple[str, ...]]
    scaled: ClassVar[bool]

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: if a value is out of range.
        """
        checks = {
            "keep": (_is_share(self.keep), "a number in (0, 1]"),
            "again": (_is_share(self.again), "a number in (0, 1]"),
            "sampling": (self.sampling in self.legal, " or ".join(map(repr, self.legal))),
            "replacement": (isinstance(self.replacement, bool), "True or False"),
            "axis": (self.axis in AXES, " or ".join(map(repr, AXES))),
            "least": (type(self.least) is int and self.least >= 1, "an integer >= 1"),
            "narrow": (isinstance(self.narrow, bool), "True or False"),
        }
        for name, (good, wanted) in checks.items():
            if not good:
                value = getattr(self, name)
                raise ConfigError(f"method {self.method!r}: {name}={value!r}; give {wanted}")
        if self.sampling == "top" and self.replacement:
            raise ConfigError(
                f"method {self.method!r}: the largest terms are taken once; give replacement=False"
            )
        if self.again < 1 and (self.scaled or self.axis != "channels"):
            raise ConfigError(
                f"method {self.method!r}: again={self.again!r}; only the channels of "
                "'crs_unscaled' are sampled again: give again=1.0"
            )


def _is_share(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1
