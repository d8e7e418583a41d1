"""What is known of noise: of single approximations, of the batch, and so of a plan.

With g the gradient of a mini-batch and ĝ that of a plan, V = E|g - E g|^2 is the noise that the
choice of the batch makes, and A = E|ĝ - g|^2, over the draws of the approximations, what the plan
adds. The number of steps to a given loss grows with tau = A / V and r = V / |E g|^2 by
1 + tau r / (1 + r) (McCandlish et al., "An Empirical Model of Large-Batch Training", 2018,
arXiv:1812.06162: steps are proportional to 1 + r, and a plan makes 1 + tau times the noise).

How the errors of single products make A is the law in `graphpass.propagation`.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from typing import Any

from graphpass.errors import ConfigError

# Site, method, and the method's parameters as canonical JSON.
Key = tuple[str, str, str]
# Weight gradients that an input gradient flows into, by site.
Reach = Mapping[str, tuple[str, ...]]

_VERSION = 1


@dataclass(frozen=True, slots=True)
class LocalNoise:
    """What an approximation adds to the product it replaces; sums over the elements.

    Attributes:
        noise: E|approximate - E approximate|^2, over the draws.
        bias: |E approximate - exact|^2.
        square: |exact|^2, of one batch.
        density: share of the output gradient that is left, of a method that drops values; else 1.
    """

    noise: float
    bias: float
    square: float
    density: float = 1.0


@dataclass(frozen=True, slots=True)
class NoiseTable:
    """What a plan's noise is worked out from.

    Attributes:
        entries: of every candidate, by site, method and parameters.
        variance: E|g - E g|^2 of a weight gradient, by its site; parameters that no product
            belongs to (norms, biases) by a name of their own.
        square: |E g|^2, by the same names.
        correction: by how much more input gradients' errors reach the weights than supposed.
        source: "measured", or "prior" for what is supposed before anything was measured.
        left_out: what is supposed of candidates that were not worth measuring; None where nothing
            is known. No plan uses them, and no JSON holds them.
    """

    entries: Mapping[Key, LocalNoise] = field(default_factory=dict)
    variance: Mapping[str, float] = field(default_factory=dict)
    square: Mapping[str, float] = field(default_factory=dict)
    correction: float = 1.0
    source: str = "measured"
    left_out: Mapping[Key, LocalNoise | None] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """The noise of the batch against the gradient, r = V / |E g|^2."""
        return divided(sum(self.variance.values()), sum(self.square.values()))

    def scaled(self, factor: float) -> "NoiseTable":
        """Return the table with every candidate's noise multiplied."""
        entries = {
            key: replace(entry, noise=entry.noise * factor) for key, entry in self.entries.items()
        }
        return replace(self, entries=entries)

    def to_json(self) -> str:
        """Return the table as JSON, which `from_json` reads."""
        record = {
            "version": _VERSION,
            "entries": [[*key, *asdict(entry).values()] for key, entry in self.entries.items()],
            "variance": dict(self.variance),
            "square": dict(self.square),
            "correction": self.correction,
            "source": self.source,
        }
        return json.dumps(record)

    @classmethod
    def from_json(cls, text: str) -> "NoiseTable":
        """Return the table that `to_json` wrote.

        Raises:
            ConfigError: if the text is something else, or from a newer version.
        """
        try:
            return _table(json.loads(text))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"this is no noise table: {type(error).__name__}: {error}") from error


@dataclass(frozen=True, slots=True)
class PlanNoise:
    """What a plan adds to the gradient.

    Attributes:
        tau: the noise it adds against the batch's own.
        from_inputs: the part of `tau` that comes from input gradients.
        bias: its squared bias against |E g|^2.
    """

    tau: float
    from_inputs: float
    bias: float


def key_of(site: str, method: str, params: Any) -> Key:
    """Return the key of a candidate.

    Args:
        site: `Site.id`.
        method: name of the method.
        params: its parameters, a record or a mapping.
    """
    values = asdict(params) if is_dataclass(params) else dict(params)  # type: ignore[arg-type]
    return site, method, json.dumps(values, sort_keys=True)


def saturation(ratio: float) -> float:
    """Return r / (1 + r): the part of the noise of a plan that the number of steps grows by.

    Args:
        ratio: noise of the batch against the gradient, r = V / |E g|^2; may be infinite.
    """
    return 1.0 if math.isinf(ratio) else ratio / (1.0 + ratio)


def steps_inflation(tau: float, ratio: float) -> float:
    """Return how many times as many steps a plan needs to the same loss.

    Args:
        tau: noise of the plan against that of the batch.
        ratio: noise of the batch against the gradient, V / |E g|^2; may be infinite.
    """
    return 1.0 + tau * saturation(ratio)


def divided(part: float, whole: float) -> float:
    """Return the ratio: 0 of nothing, and infinity where there is something but nothing of it."""
    if part == 0:
        return 0.0
    return part / whole if whole > 0 else math.inf


def _table(record: Mapping[str, Any]) -> NoiseTable:
    if record["version"] != _VERSION:
        raise ValueError(f"its format is {record['version']!r}; this version reads {_VERSION}")
    entries = {
        (str(site), str(method), str(params)): LocalNoise(*map(float, numbers))
        for site, method, params, *numbers in record["entries"]
    }
    variance, square = (
        {str(name): float(value) for name, value in record[kind].items()}
        for kind in ("variance", "square")
    )
    source = str(record["source"])
    return NoiseTable(entries, variance, square, float(record["correction"]), source)
