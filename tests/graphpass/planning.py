"""Graphs and prices that tests of the planner are about, without a model and a machine."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from graphpass.capture import Analysis
from graphpass.method import Method
from graphpass.pricing import Price
from graphpass.site import ConvGeometry, Gradient, Site
from graphpass.timings import Way


def conv_layer(number: int, channels: int = 32, size: int = 16, batch: int = 32) -> list[Site]:
    """Return the three products of a 3x3 convolution; the first layer has no input gradient."""
    x = y = (batch, channels, size, size)
    w = (channels, channels, 3, 3)
    geometry = ConvGeometry((1, 1), (1, 1), (1, 1), False, (0, 0), 1)
    outputs = {Gradient.FORWARD: y, Gradient.INPUT: x, Gradient.WEIGHT: w}
    if number == 1:
        del outputs[Gradient.INPUT]
    return [
        Site(
            name=f"conv{number}", path=f"conv{number}", gradient=gradient, op="convolution",
            node=f"{gradient}{number}", result=None, layer=number, shapes=(x, w, y),
            output=output, dtype="float32", itemsize=4, conv=geometry,
        )
        for gradient, output in outputs.items()
    ]  # fmt: skip


def chain(layers: list[list[Site]]) -> Analysis:
    """Return a graph of layers in a row: forward products first, then backward from the last."""
    forward = [layer[0] for layer in layers]
    sites = tuple(forward + [site for layer in reversed(layers) for site in layer[1:]])
    place = {site.id: number for number, site in enumerate(sites)}
    flow = [
        (place[f"{after.name}:input"], place[f"{before.name}:{gradient}"])
        for before, after in itertools.pairwise(forward)
        for gradient in ("weight", "input")
        if f"{before.name}:{gradient}" in place
    ]
    return Analysis(sites, flow=tuple(flow))


@dataclass(frozen=True)
class Prices:
    """Seconds by method, in parts of the exact second; int8 shares its rounding in a layer."""

    parts: Mapping[str, float] = field(
        default_factory=lambda: {"int8": 0.6, "prune": 0.7, "pixels": 0.4, "phase": 0.45}
    )
    rest_s: float = 0.0
    # Of the rest, what is left where everything is approximated.
    warm: float = 1.0

    def exact(self, site: Site) -> Price:
        return Price(1.0 + site.layer / 100, {}, "calibrated")

    def approximate(self, site: Site, method: Method, params: Any) -> Price:
        part = self.parts.get(method.name, 2.0) + getattr(params, "keep", 0.0) / 10
        shared = {f"{site.name}:g": 0.25} if method.name == "int8" else {}
        return Price(self.exact(site).seconds * part, shared, "calibrated")

    def rest(self, approximated: float = 0.0) -> Price:
        part = 1 - approximated * (1 - self.warm)
        return Price(self.rest_s * part, {}, "calibrated")

    def confirm(self, doubtful: Iterable[Sequence[Way]]) -> bool:
        return False
