"""A round of measurements: a few probes, and a window in which gradients are compared.

Everything is counted in training calls of one graph, and read a fixed number of calls after it
was asked for: a run that is resumed, or that runs on a device behind the host, decides the same on
the same step.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from codegen import notes
from graphpass.noise import Key, LocalNoise, NoiseTable, PlanNoise, Reach
from graphpass.propagation import Propagation
from graphpass.sheet import Probe, Reading, Sheet, Subject
from graphpass.sketch import Sketch, values_of

# Calls that the last backward pass may be behind the calls of the graph.
_LAG = 2
# What is left of the batch's noise, at least, when the plan's share is taken off it.
_LEAST_SHARE = 0.1
_CORRECTIONS = (1 / 32, 32.0)


@dataclass(frozen=True, slots=True)
class Measured:
    """What was found out about the noise of a plan.

    Attributes:
        step: when it was.
        tau: what the plan added, measured on the whole; 0 for a plan without approximations.
        predicted: what the table has for the same plan.
        table: what was measured of candidates and of the batch.
    """

    step: int
    tau: float
    predicted: PlanNoise
    table: NoiseTable


def joined(parts: Sequence[Measured]) -> Measured | None:
    """Return what was found out about a model that was compiled in several graphs."""
    if len(parts) <= 1:
        return next(iter(parts), None)
    entries: dict[Key, LocalNoise] = {}
    variance: dict[str, float] = {}
    square: dict[str, float] = {}
    for part in parts:
        entries |= part.table.entries
        variance |= part.table.variance
        square |= part.table.square
    noises = [sum(part.table.variance.values()) for part in parts]
    squares = [sum(part.table.square.values()) for part in parts]

    def mean(values: Sequence[float], weights: Sequence[float]) -> float:
        whole = sum(weights)
        pairs = zip(values, weights, strict=True)
        return sum(value * weight for value, weight in pairs) / whole if whole else 0.0

    predicted = PlanNoise(
        mean([part.predicted.tau for part in parts], noises),
        mean([part.predicted.from_inputs for part in parts], noises),
        mean([part.predicted.bias for part in parts], squares),
    )
    correction = mean([part.table.correction for part in parts], noises)
    table = NoiseTable(entries, variance, square, correction)
    tau = mean([part.tau for part in parts], noises)
    return Measured(max(part.step for part in parts), tau, predicted, table)


@dataclass(frozen=True, slots=True)
class Names:
    """What the numbers of one graph are called in tables.

    Attributes:
        candidates: key of each candidate, by its number among the replacements.
        parameters: names of the parameters, by position.
        weights: positions of the parameters that a weight gradient belongs to, by its site.
        reach: weight gradients that an input gradient flows into, by its site.
    """

    candidates: Mapping[int, Key]
    parameters: Mapping[int, str]
    weights: Mapping[str, tuple[int, ...]]
    reach: Reach


class Round:
    """One round; see the module's text.

    Attributes:
        probes: what is run on its first calls, one a call.
    """

    def __init__(
        self, probes: Sequence[Probe], subject: Subject, window: int, sketch: Sketch | None
    ) -> None:
        """Begin with the next call.

        Args:
            probes: what is run on the first calls.
            subject: what is known of the graph.
            window: number of calls whose gradients are compared; 0 for none.
            sketch: compares them; None for none.
        """
        self.probes = tuple(probes)
        self._subject = subject
        self._window = window
        self._sketch = sketch
        self._calls = 0
        self._approximate = 0
        self._pages: list[Tensor] = []
        self._sent: list[notes.Reading] = []

    @property
    def length(self) -> int:
        """Calls until everything can be read."""
        return max(len(self.probes), self._window) + _LAG

    @property
    def is_over(self) -> bool:
        """Whether everything can be read."""
        return self._calls >= self.length

    def next(
        self, approximate: bool, parameters: Mapping[int, Tensor], device: torch.device
    ) -> tuple[Probe, Tensor] | None:
        """Return the probe to run in this call and its notes; None for none.

        Args:
            approximate: whether the call would approximate anything.
            parameters: what is trained, by position.
            device: where notes are taken.
        """
        number, self._calls = self._calls, self._calls + 1
        self._compare(number, parameters)
        if self._calls == self.length:
            self._send()
        if number < len(self.probes):
            probe = self.probes[number]
            page = notes.fresh(self._sheet(probe).size, device)
            self._pages.append(page)
            return probe, page
        if number < self._window:
            self._approximate += approximate
        return None

    def _compare(self, number: int, parameters: Mapping[int, Tensor]) -> None:
        if self._sketch is None:
            return
        self._sketch.fold()
        if number < self._window and not self._sketch.is_open:
            self._sketch.open(parameters)
        if number >= self._window:
            self._sketch.close()

    def _send(self) -> None:
        self._sent = [notes.Reading(page) for page in self._pages]
        if self._sketch is not None:
            self._sent.append(notes.Reading(self._sketch.result()))

    def read(self) -> list[Reading] | None:
        """Return what each probe found; None if one has not ended, or in no finite number."""
        if not self._sent:
            self._send()
        readings = [
            self._sheet(probe).read(sent.values())
            for probe, sent in zip(self.probes, self._sent, strict=False)
        ]
        found = [reading for reading in readings if reading is not None and reading.is_finite]
        return found if len(found) == len(readings) else None

    def batch_noise(self) -> dict[int, tuple[float, float]] | None:
        """Return half of |g_t - g_(t-1)|^2 and |g|^2 by position; None if not looked at.

        None as well if no two gradients followed each other.
        """
        if self._sketch is None or not self._sketch.pairs:
            return None
        values = values_of(self._sent[-1].values())
        if not any(square for _, square in values):
            return None
        return dict(zip(self._sketch.positions, values, strict=True))

    @property
    def approximate_share(self) -> float:
        """The part of the compared gradients that were approximate."""
        return self._approximate / self._window if self._window else 0.0

    def close(self) -> None:
        """Leave nothing behind in the model."""
        if self._sketch is not None:
            self._sketch.close()

    def _sheet(self, probe: Probe) -> Sheet:
        return self._subject.sheet(len(probe.candidates))

    def state_dict(self) -> dict[str, Any]:
        """Return where the round stands; plain numbers and lists."""
        return {
            "probes": [[sorted(probe.candidates), sorted(probe.plan)] for probe in self.probes],
            "window": self._window,
            "calls": self._calls,
            "approximate": self._approximate,
            "pages": [page.tolist() for page in self._pages],
            "sketch": None if self._sketch is None else self._sketch.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Go on from where another round of the same probes stood."""
        self._calls, self._approximate = state["calls"], state["approximate"]
        self._pages = [
            torch.tensor(page, dtype=torch.float64, device=device) for page in state["pages"]
        ]
        if self._sketch is not None:
            self._sketch.load_state_dict(state["sketch"])


def table_of(
    readings: Mapping[Probe, Sequence[Reading]],
    compared: Mapping[int, tuple[float, float]] | None,
    share: float,
    names: Names,
    before: NoiseTable,
) -> tuple[NoiseTable, float]:
    """Return what is known after a round, and the tau of the plan that was probed.

    Args:
        readings: of the round, by probe.
        compared: half of |g_t - g_(t-1)|^2 and |g|^2, by position; None keeps what was known.
        share: part of the compared gradients that had the plan's noise in them.
        names: what numbers are called.
        before: what was known.
    """
    entries = dict(before.entries)
    for probe, several in readings.items():
        for place, number in enumerate(sorted(probe.candidates)):
            entries[names.candidates[number]] = _mean([reading.local[place] for reading in several])
    of_plan = {probe: several for probe, several in readings.items() if probe.plan}
    totals: dict[int, float] = {}
    for several in of_plan.values():
        for position in several[0].total:
            totals[position] = sum(r.total[position] for r in several) / len(several)
    variance, square = dict(before.variance), dict(before.square)
    if compared is not None:
        variance, square = _batch(compared, totals, share, names)
    table = NoiseTable(entries, variance, square, before.correction)
    for probe, several in of_plan.items():
        table = _corrected(table, probe, several, totals, names)
    noise = sum(variance.values())
    tau = sum(totals.values()) / noise if noise else 0.0
    return table, tau


def _mean(several: Sequence[LocalNoise]) -> LocalNoise:
    numbers = ((entry.noise, entry.bias, entry.square, entry.density) for entry in several)
    columns = zip(*numbers, strict=True)
    return LocalNoise(*(sum(column) / len(several) for column in columns))


def _batch(
    compared: Mapping[int, tuple[float, float]],
    totals: Mapping[int, float],
    share: float,
    names: Names,
) -> tuple[dict[str, float], dict[str, float]]:
    """Return V and |E g|^2 by name."""
    variance: dict[str, float] = {}
    square: dict[str, float] = {}
    for position, (half, mean_square) in compared.items():
        # The gradients compared have the plan's noise in them; its square, their noise.
        noise = max(half - share * totals.get(position, 0.0), _LEAST_SHARE * half)
        exact = max(mean_square - half, 0.0)
        owners = [site for site, ends in names.weights.items() if position in ends]
        owners = owners or [names.parameters[position]]
        for owner in owners:
            variance[owner] = variance.get(owner, 0.0) + noise / len(owners)
            square[owner] = square.get(owner, 0.0) + exact / len(owners)
    return variance, square


def _corrected(
    table: NoiseTable,
    probe: Probe,
    several: Sequence[Reading],
    totals: Mapping[int, float],
    names: Names,
) -> NoiseTable:
    """Return the table with the correction that the plan's own probe asks for."""
    # Forward products of the plan are no candidates: probes leave them exact.
    known = [names.candidates[n] for n in sorted(probe.plan) if n in names.candidates]
    chosen = [key for key in known if key in table.entries]
    plain = Propagation(replace(table, correction=1.0), names.reach).plan(chosen)
    supposed = plain.from_inputs * sum(table.variance.values())
    with_product = {position for ends in names.weights.values() for position in ends}
    arrived = sum(sum(reading.propagated) for reading in several) / len(several)
    arrived += sum(value for position, value in totals.items() if position not in with_product)
    if not supposed or not arrived:
        return table
    low, high = _CORRECTIONS
    return replace(table, correction=min(max(arrived / supposed, low), high))
