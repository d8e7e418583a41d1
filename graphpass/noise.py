"""What is known of the noise of a step: of its gradient, and of what approximations add to it.

For the gradient g of a mini-batch, V = E|g - E g|^2 is the noise that it has; an approximation adds
E|approximate - E approximate|^2, and a biased one |E approximate - exact|^2 beside.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LocalNoise:
    """What one approximation does to the product of one site.

    Attributes:
        noise: E|approximate - E approximate|^2 of the product, summed over its elements, mean over
            batches.
        bias: |E approximate - exact|^2.
        square: |exact|^2 of the product, of one batch.
    """

    noise: float
    bias: float
    square: float


# Site id, method name, canonical JSON of the method's parameters.
Key = tuple[str, str, str]


@dataclass(frozen=True, slots=True)
class NoiseTable:
    """The noise of a graph's gradients, and of candidates for its sites.

    Attributes:
        entries: what each candidate does to its site.
        variance: V by layer: E|g - E g|^2 of the weight gradient, by the id of its site.
        square: |E g|^2 by the same key.
        correction: tau that the errors of input gradients were measured to make, over what their
            local errors predict.
        source: "measured" or "prior".
    """

    entries: Mapping[Key, LocalNoise]
    variance: Mapping[str, float]
    square: Mapping[str, float]
    correction: float = 1.0
    source: str = "measured"
