"""What a plan is predicted to do: to the time of a step, to the noise, and so to the whole run.

Seconds are per step, on the steps that the schedule selects. Nothing here is a measurement of the
plan as a whole; where a single figure was measured on this machine or in this run, its source says
so.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from graphpass import prior
from graphpass.candidates import effect_of
from graphpass.capture import Analysis
from graphpass.dependence import reach_of
from graphpass.frontier import Point
from graphpass.noise import NoiseTable, key_of, steps_inflation
from graphpass.pricing import Pricing
from graphpass.propagation import Propagation
from graphpass.rewrite import Replacement
from graphpass.site import Gradient

# Points of the frontier that are kept.
_POINTS = 24


@dataclass(frozen=True, slots=True)
class SitePrediction:
    """What is predicted of one site.

    Attributes:
        exact_s: seconds of the exact product.
        exact_source: where they come from: "datasheet", "calibrated" or "measured".
        planned_s: seconds of the product as planned; work that sites share is counted at the first.
        planned_source: where those come from.
        approximated: whether the plan approximates it.
        tau: noise that it adds, relative to the noise of the gradient; None where not known.
        bias: squared bias that it adds, relative to the squared gradient; None where not known.
        noise_source: where both come from: "prior" or "measured"; "" for an exact site.
        density: share of the output gradient that is left, of a method that drops values; None
            for others, and where it has not been measured.
        others: what was considered beside, and why it was not chosen.
    """

    exact_s: float
    exact_source: str
    planned_s: float
    planned_source: str
    approximated: bool = False
    tau: float | None = 0.0
    bias: float | None = 0.0
    noise_source: str = ""
    density: float | None = None
    others: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Prediction:
    """What is predicted of a plan.

    Attributes:
        sites: by the id of the site.
        rest_s: seconds of an exact step that no site takes: normalisations, activations.
        variance: V of the gradient, in the unit that `sites` were weighed with.
        square: |E g|^2 of the gradient.
        frontier: corners of the frontier of noise against time, seconds of the whole step; empty
            where the user named the methods.
        planned_rest_s: the same of a step as planned; None for that of an exact one.
    """

    sites: Mapping[str, SitePrediction]
    rest_s: float
    variance: float
    square: float
    frontier: tuple[Point, ...] = field(default=())
    planned_rest_s: float | None = None

    @property
    def exact_step_s(self) -> float:
        """Seconds of an exact step."""
        return self.rest_s + math.fsum(site.exact_s for site in self.sites.values())

    @property
    def step_s(self) -> float:
        """Seconds of a step as planned."""
        return self.rest_as_planned_s + math.fsum(site.planned_s for site in self.sites.values())

    @property
    def ceiling_s(self) -> float:
        """Seconds of a step if every approximated site cost nothing (Amdahl)."""
        left = (site.exact_s for site in self.sites.values() if not site.approximated)
        return self.rest_as_planned_s + math.fsum(left)

    @property
    def rest_as_planned_s(self) -> float:
        """Seconds of a step as planned that no site takes."""
        return self.rest_s if self.planned_rest_s is None else self.planned_rest_s

    @property
    def tau(self) -> float | None:
        """Noise of the plan; None where that of a site is not known."""
        return _sum(site.tau for site in self.sites.values())

    @property
    def bias(self) -> float | None:
        """Squared bias of the plan; None where that of a site is not known."""
        return _sum(site.bias for site in self.sites.values())

    @property
    def noise_ratio(self) -> float:
        """The ratio r = V / |E g|^2."""
        return self.variance / self.square if self.square > 0 else math.inf

    @property
    def inflation(self) -> float | None:
        """Factor on the number of steps to the same loss, 1 + tau r / (1 + r); bias left out."""
        if self.tau is None:
            return None
        return steps_inflation(self.tau, self.noise_ratio)

    @property
    def time_ratio(self) -> float | None:
        """Predicted time to the same loss, over that of exact training."""
        if self.inflation is None:
            return None
        whole = self.exact_step_s
        return self.inflation * (self.step_s / whole if whole > 0 else 1.0)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, which `from_dict` reads."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> "Prediction":
        """Return the prediction that `to_dict` wrote.

        Raises:
            KeyError: if a field is missing.
            TypeError: if a field is unknown or of another type.
        """
        sites = {
            name: SitePrediction(**{**site, "others": tuple(site["others"])})
            for name, site in record["sites"].items()
        }
        points = tuple(Point(**point) for point in record["frontier"])
        figures = {name: float(record[name]) for name in ("rest_s", "variance", "square")}
        # Plans of earlier versions have none.
        planned_rest_s = record.get("planned_rest_s")
        return cls(sites=sites, frontier=points, planned_rest_s=planned_rest_s, **figures)


def predict(
    analysis: Analysis,
    replacements: Sequence[Replacement],
    pricing: Pricing,
    noise: NoiseTable | None = None,
    frontier: Sequence[Point] = (),
    others: Mapping[str, tuple[str, ...]] | None = None,
) -> Prediction:
    """Return what a plan of one graph is predicted to do.

    Args:
        analysis: what the graph holds.
        replacements: what the plan approximates.
        pricing: prices of products.
        noise: what was measured; None for what is supposed before.
        frontier: corners of the frontier, seconds of all products.
        others: what was considered for a site and not chosen, by its id.
    """
    planned = {replacement.site.id: replacement for replacement in replacements}
    table = noise or prior.noise_table(
        analysis, {name: [(r.method, r.params)] for name, r in planned.items()}
    )
    propagation = Propagation(table, reach_of(analysis.flow, analysis.sites))
    seen, sites = set[str](), {}
    for site in analysis.sites:
        exact = pricing.exact(site)
        figures = SitePrediction(exact.seconds, exact.source, exact.seconds, exact.source)
        chosen = planned.get(site.id)
        if chosen is not None:
            price = pricing.approximate(site, chosen.method, chosen.params)
            done = sum(s for name, s in price.shared.items() if name in seen)
            seen.update(price.shared)
            effect = effect_of(site, chosen.method, chosen.params, table, propagation)
            # Never measured in training.
            forward = site.gradient is Gradient.FORWARD
            figures = replace(
                figures,
                planned_s=price.seconds - done,
                planned_source=price.source,
                approximated=True,
                tau=None if effect is None else effect.tau,
                bias=None if effect is None else effect.bias,
                noise_source=prior.SOURCE if forward else table.source,
                density=_density(chosen, table),
            )
        sites[site.id] = replace(figures, others=(others or {}).get(site.id, ()))
    rest_s, share = pricing.rest().seconds, _approximated_share(sites.values())
    planned_rest_s = pricing.rest(share).seconds
    found = Prediction(
        sites, rest_s, propagation.variance, propagation.square, planned_rest_s=planned_rest_s
    )
    return replace(found, frontier=_whole_steps(thinned(frontier), found))


def _approximated_share(sites: Iterable[SitePrediction]) -> float:
    """Return the share of the products' exact time that is approximated."""
    known = list(sites)
    whole = math.fsum(site.exact_s for site in known)
    return _share(math.fsum(site.exact_s for site in known if site.approximated), whole)


def _whole_steps(points: Sequence[Point], plan: Prediction) -> tuple[Point, ...]:
    """Return points in seconds of whole steps; the rest of a step falls as products do."""
    exact_s = plan.exact_step_s - plan.rest_s
    fall = _share(
        plan.rest_s - plan.rest_as_planned_s, exact_s - (plan.step_s - plan.rest_as_planned_s)
    )
    return tuple(
        replace(p, seconds=p.seconds + plan.rest_s - fall * (exact_s - p.seconds)) for p in points
    )


def _density(chosen: Replacement, table: NoiseTable) -> float | None:
    if chosen.method.density is None or table.source == prior.SOURCE:
        return None
    key = key_of(chosen.site.id, chosen.method.name, chosen.params)
    return table.entries[key].density if key in table.entries else None


def joined(predictions: Sequence[Prediction]) -> Prediction | None:
    """Return the prediction of a model that was compiled in several graphs; None without any.

    Noise is relative to that of the whole model's gradient then. There is no common frontier: each
    graph has its own.
    """
    if len(predictions) <= 1:
        return next(iter(predictions), None)
    variance = math.fsum(p.variance for p in predictions)
    square = math.fsum(p.square for p in predictions)
    sites = {}
    for p in predictions:
        shares = [_share(p.variance, variance), _share(p.square, square)]
        for name, site in p.sites.items():
            tau = None if site.tau is None else site.tau * shares[0]
            bias = None if site.bias is None else site.bias * shares[1]
            sites[name] = replace(site, tau=tau, bias=bias)
    rest_s, planned_rest_s = (
        math.fsum(rests)
        for rests in zip(*((p.rest_s, p.rest_as_planned_s) for p in predictions), strict=True)
    )
    return Prediction(sites, rest_s, variance, square, planned_rest_s=planned_rest_s)


def thinned(points: Sequence[Point], count: int = _POINTS) -> tuple[Point, ...]:
    """Return at most so many of the points, evenly over their seconds, with both ends."""
    if len(points) <= count:
        return tuple(points)
    first, last = points[0].seconds, points[-1].seconds
    marks = [first + (last - first) * i / (count - 1) for i in range(count)]
    nearest = (min(range(len(points)), key=lambda i: abs(points[i].seconds - m)) for m in marks)
    return tuple(points[i] for i in sorted(set(nearest)))


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0


def _sum(values: Iterable[float | None]) -> float | None:
    total = 0.0
    for value in values:
        if value is None:
            return None
        total += value
    return total
