"""Predictions in words and figures: what plans, reports and pages show of them.

What is predicted, what was measured on this machine, what a prior supposes and what a run showed
have columns of their own, and a column that would be empty is left out.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from graphpass.prediction import Prediction, SitePrediction

_MICRO, _MILLI = 1e6, 1e3
_BAR = 40
_MEASURED = "measured"


@dataclass(frozen=True, slots=True)
class Measured:
    """What a run showed of a plan; None where it has not been measured.

    Attributes:
        exact_step_s: seconds of an exact step.
        step_s: seconds of a step as planned.
        tau: noise that the plan adds, relative to the noise of the gradient.
        bias: squared bias that it adds, relative to the squared gradient.
    """

    exact_step_s: float | None = None
    step_s: float | None = None
    tau: float | None = None
    bias: float | None = None


def site_table(
    prediction: Prediction, methods: Mapping[str, str]
) -> tuple[list[str], list[list[str]]]:
    """Return names of columns and rows of text: one row a site that is approximated.

    Args:
        prediction: what is predicted.
        methods: method of each site, by its id.
    """
    chosen = {name: site for name, site in prediction.sites.items() if site.approximated}
    columns = ["product", "method"]
    rows = [[name, methods.get(name, "")] for name in chosen]
    for title, cells in _figures(list(chosen.values())):
        if any(cells):
            columns.append(title)
            rows = [[*row, cell] for row, cell in zip(rows, cells, strict=True)]
    return columns, rows


def summary(prediction: Prediction, measured: Measured | None) -> list[str]:
    """Return what a plan is predicted to do as a whole, a line each, beside what was measured."""
    known = measured or Measured()
    exact, planned, least = prediction.exact_step_s, prediction.step_s, prediction.ceiling_s
    lines = [
        f"step, predicted: {_ms(exact)} exact, {_ms(planned)} planned{_faster(exact, planned)}; "
        f"{_ms(least)} if what is approximated cost nothing{_faster(exact, least)}",
        f"step, measured: {_ms(known.exact_step_s)} exact, {_ms(known.step_s)} planned",
        f"noise of the plan, predicted: tau {_number(prediction.tau)}, "
        f"bias {_number(prediction.bias)} ({_sources(prediction)})",
        f"noise of the plan, measured: tau {_number(known.tau, 'not yet')}, "
        f"bias {_number(known.bias, 'not yet')}",
    ]
    if prediction.inflation is not None and prediction.time_ratio is not None:
        lines.append(
            f"to the same loss, predicted: {prediction.inflation:.3f} times the steps "
            f"(V / |E g|^2 = {prediction.noise_ratio:.3g}), {prediction.time_ratio:.3f} times the "
            "time"
        )
    return lines


def frontier_text(prediction: Prediction) -> str:
    """Return the frontier as a figure: the time of a step at growing noise; "" without one."""
    points = prediction.frontier
    if len(points) < 2:
        return ""
    longest = max(point.seconds for point in points)
    lines = ["frontier of noise against the predicted time of a step:"]
    entries = [(point.seconds, point.tau, "") for point in points]
    if prediction.tau is not None:
        same = [entry for entry in entries if math.isclose(entry[0], prediction.step_s)]
        entries = [entry for entry in entries if entry not in same]
        entries.append((prediction.step_s, prediction.tau, "  <- this plan"))
    for step_s, tau, mark in sorted(entries, reverse=True):
        bar = "#" * round(_BAR * step_s / longest)
        lines.append(f"  tau {tau:<9.3g} {_ms(step_s):>12}  {bar}{mark}")
    return "\n".join(lines)


def frontier_svg(prediction: Prediction) -> str:
    """Return the frontier as a drawing for a page, the plan marked; "" without one."""
    points = prediction.frontier
    if len(points) < 2 or points[0].seconds <= 0:
        return ""
    width, height, left, low = 560, 240, 60, 200
    most_tau = max(point.tau for point in points) or 1.0
    most_s = max(point.seconds for point in points)

    def place(tau: float, seconds: float) -> tuple[float, float]:
        # Roots spread the small noises, where most of the corners are.
        x = left + (width - left - 20) * math.sqrt(min(tau / most_tau, 1.0))
        return x, low - (low - 20) * seconds / most_s

    corners = [place(point.tau, point.seconds) for point in points]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in corners)
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in corners)
    x, y = place(prediction.tau or 0.0, prediction.step_s)
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" role="img">'
        f'<path d="M{left} 10V{low}H{width - 10}" fill="none" stroke="black"/>'
        f'<polyline points="{line}" fill="none" stroke="steelblue"/>{dots}'
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="7" fill="none" stroke="crimson" stroke-width="2"/>'
        f'<text x="{left}" y="{height - 15}">noise tau, 0 to {most_tau:.3g} '
        "(square root); the plan is circled</text>"
        f'<text x="2" y="24">{html.escape(_ms(most_s))}</text><text x="40" y="{low}">0</text></svg>'
    )


def _figures(sites: Sequence[SitePrediction]) -> list[tuple[str, list[str]]]:
    """Return the title of each column, and its cells; a cell that does not apply is empty."""

    def seconds(value: float, source: str, measured: bool) -> str:
        return f"{value * _MICRO:.1f}" if (source == _MEASURED) == measured else ""

    def noise(value: float | None, source: str, measured: bool) -> str:
        return _number(value, "?") if (source == _MEASURED) == measured else ""

    columns = []
    for measured, word in ((False, "predicted"), (True, "measured")):
        exact = [seconds(s.exact_s, s.exact_source, measured) for s in sites]
        planned = [seconds(s.planned_s, s.planned_source, measured) for s in sites]
        columns += [(f"us exact, {word}", exact), (f"us planned, {word}", planned)]
    for measured, word in ((False, "prior"), (True, "measured")):
        taus = [noise(s.tau, s.noise_source, measured) for s in sites]
        biases = [noise(s.bias, s.noise_source, measured) for s in sites]
        columns += [(f"tau, {word}", taus), (f"bias, {word}", biases)]
    densities = ["" if s.density is None else _number(s.density) for s in sites]
    return [*columns, ("density, measured", densities)]


def _sources(prediction: Prediction) -> str:
    sources = {site.noise_source for site in prediction.sites.values()} - {""}
    words = {"prior": "from a prior, not of this model", _MEASURED: "from its sites, measured"}
    return ", ".join(words.get(source, source) for source in sorted(sources)) or "nothing added"


def _faster(exact_s: float, planned_s: float) -> str:
    return f" ({exact_s / planned_s:.2f} times faster)" if planned_s > 0 else ""


def _ms(seconds: float | None) -> str:
    return "not yet" if seconds is None else f"{seconds * _MILLI:.3f} ms"


def _number(value: float | None, missing: str = "not known") -> str:
    return missing if value is None else f"{value:.3g}"
