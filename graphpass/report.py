"""What was done to each graph, and why: the record behind every table, file and figure.

Figures are FLOPs and bytes of the products, exact by formula, the bytes kept for backward as
Inductor's partitioner decided them, and beside them what is predicted of time and noise. What is
predicted and what was measured never share a field.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from codegen.cache import write_atomically
from codegen.kernel import missing_toolchain
from cost_model import Cost, total
from graphpass import figures, memory, pages, render
from graphpass.capture import Analysis
from graphpass.errors import Reason
from graphpass.outlook import Measured
from graphpass.plan import Plan
from graphpass.planner import replacements
from graphpass.prediction import Prediction, SitePrediction
from graphpass.variants import Active, VariantLog


@dataclass(frozen=True, slots=True)
class Row:
    """One product of the model.

    Attributes:
        where: module path, with `#n` for the n-th use.
        gradient: "forward", "input" or "weight".
        layer: number of the layer in forward order, from 1.
        op: kind of product.
        method: name of the method, or "exact".
        params: parameters of the method.
        reason: why the product is exact; "" otherwise.
        exact_flops: FLOPs of the exact product.
        planned_flops: FLOPs of what is computed on a step that the schedule selects.
        exact_bytes: bytes read and written by the exact product.
        planned_bytes: bytes read and written on a step that the schedule selects.
        site: name of the product in plans.
        prediction: seconds, noise and bias that are predicted; None where nothing is.
    """

    where: str
    gradient: str
    layer: int
    op: str
    method: str
    params: Mapping[str, Any]
    reason: str
    exact_flops: int
    planned_flops: int
    exact_bytes: int
    planned_bytes: int
    site: str = ""
    prediction: SitePrediction | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """What was done to one training graph.

    Attributes:
        rows: one a product, in the order of the joint graph.
        schedule: name of the schedule.
        picture: layers by steps, for the planned layers; "" if there are none.
        exact_saved_bytes: bytes kept from forward to backward by the exact graph.
        planned_saved_bytes: the same with every planned site approximated; None while that
            variant has not been compiled.
        variants: number of compiled variants.
        sizes: value of each dynamic size that the figures are for.
        note: why the whole graph is exact; "" otherwise.
        plain_torch: why no kernel of ours can be built here, so that methods run in plain torch;
            "" where they can.
        prediction: what is predicted of the step as a whole; None where nothing is (budget 0).
        measured: what the run has shown since.
        halted: what failed while training, and how it went on; "" for nothing.
    """

    rows: tuple[Row, ...]
    schedule: str
    picture: str
    exact_saved_bytes: int
    planned_saved_bytes: int | None
    variants: int
    sizes: Mapping[str, int]
    note: str = ""
    plain_torch: str = ""
    prediction: Prediction | None = None
    measured: Measured | None = None
    halted: str = ""

    @property
    def approximated(self) -> tuple[Row, ...]:
        """The rows that name a method."""
        return tuple(row for row in self.rows if row.method != "exact")

    def to_json(self) -> str:
        """Return the report as JSON, which `from_json` reads."""
        record = asdict(self)
        if record["prediction"] is not None:
            # Every row has its own.
            del record["prediction"]["sites"]
        return json.dumps(record, indent=1, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "Report":
        """Return the report that `to_json` wrote."""
        record = json.loads(text)
        rows = record.pop("rows")
        sites = {row["site"]: row["prediction"] for row in rows if row.get("prediction")}
        prediction, measured = record.pop("prediction", None), record.pop("measured", None)
        if prediction is not None:
            prediction = Prediction.from_dict({**prediction, "sites": sites})
        for row in rows:
            row["prediction"] = prediction.sites.get(row["site"]) if prediction else None
        return cls(
            rows=tuple(Row(**row) for row in rows),
            prediction=prediction,
            measured=None if measured is None else Measured(**measured),
            **record,
        )

    def to_dot(self) -> str:
        """Return the layers and their products as a graph in Graphviz's language."""
        return figures.report_dot(self)

    def to_html(self, path: str | Path) -> None:
        """Write the report as one HTML page, whole or not at all."""
        write_atomically(Path(path), pages.report_html(self))

    def __str__(self) -> str:
        """Return the report as a table, with the schedule drawn below it."""
        text = render.report_table(self)
        return f"all of the graph is exact: {self.note}\n{text}" if self.note else text


@dataclass(slots=True)
class TrainingGraph:
    """A compiled training graph, as far as reports need it.

    Attributes:
        analysis: what the graph holds.
        plan: what was decided.
        key: identity of the graph in the cache; "" if it is another graph's, seen by other names.
        log: its compiled variants.
        measured: what the run has shown of the plan.
        halted: what failed while training, and how it went on; "" for nothing.
    """

    analysis: Analysis
    plan: Plan
    key: str
    log: VariantLog
    measured: Measured | None = None
    halted: str = ""

    def remember(self) -> None:
        """Write to disk what compiling the variants showed, for processes that need not compile."""
        if not self.key:
            return
        counts = {
            key: count
            for active, count in self.log.saved_bytes.items()
            if (key := self.log.keys.get(active)) is not None
        }
        known = {**self.analysis.variants, **counts}
        if known != self.analysis.variants:
            self.analysis = replace(self.analysis, variants=known)
            memory.store(self.key, self.analysis)

    def report(self) -> Report:
        """Return what is known of the graph now."""
        plan, analysis = self.plan, self.analysis
        planned = {r.site.id: r for r in replacements(plan, analysis.sites)}
        prediction, rows = plan.prediction, []
        for site, decision in zip(analysis.sites, plan.decisions, strict=True):
            exact = site.cost
            chosen = planned.get(site.id)
            approximate = total(chosen.method.cost(site, chosen.params)) if chosen else exact
            flops, moved = _figures(exact, analysis.hints)
            planned_flops, planned_moved = _figures(approximate, analysis.hints)
            rows.append(
                Row(
                    where=site.name,
                    gradient=site.gradient.value,
                    layer=decision.layer,
                    op=site.op,
                    method=decision.method or "exact",
                    params=dict(decision.params),
                    reason=decision.reason,
                    exact_flops=flops,
                    planned_flops=planned_flops,
                    exact_bytes=moved,
                    planned_bytes=planned_moved,
                    site=site.id,
                    prediction=prediction.sites.get(site.id) if prediction else None,
                )
            )
        layers = dict.fromkeys((d.layer, d.site.rsplit(":", 1)[0]) for d in plan.approximated)
        picture = plan.schedule.picture(sorted(layers), plan.warmup_steps) if layers else ""
        return Report(
            rows=tuple(rows),
            schedule=plan.schedule.name,
            picture=picture,
            exact_saved_bytes=analysis.saved_bytes,
            planned_saved_bytes=self._planned_saved_bytes(),
            variants=len(self.log.compiled),
            sizes=dict(analysis.hints),
            note=Reason.NESTED_REGION.value if analysis.nested else "",
            plain_torch=missing_toolchain(),
            prediction=prediction,
            measured=self.measured,
            halted=self.halted,
        )

    def _planned_saved_bytes(self) -> int | None:
        if not self.plan.approximated:
            return self.analysis.saved_bytes
        largest: Active = max(self.log.compiled, key=len, default=frozenset())
        counted = self.log.saved_bytes.get(largest)
        remembered = self.analysis.variants.get(self.log.keys.get(largest) or "")
        return remembered if counted is None else counted


def record(analysis: Analysis, plan: Plan, key: str, log: VariantLog) -> TrainingGraph:
    """Note a training graph for `reports`."""
    graph = TrainingGraph(analysis, plan, key, log)
    _GRAPHS.append(graph)
    return graph


def forget(graph: TrainingGraph) -> None:
    """Leave a training graph out of `reports` again."""
    _GRAPHS.remove(graph)


def reports() -> tuple[Report, ...]:
    """Return a report for every training graph compiled in this process, in order.

    Models of one class share what is compiled, and so a report; blocks of one model that share a
    graph have a report each, by their own names.
    """
    return tuple(graph.report() for graph in _GRAPHS)


_GRAPHS: list[TrainingGraph] = []


def _figures(cost: Cost, sizes: Mapping[str, int]) -> tuple[int, int]:
    """Return FLOPs and bytes; sizes by name, as traced symbols carry assumptions with them."""
    symbols = cost.flops.free_symbols | cost.bytes.free_symbols
    flops, read, written = cost.evaluate({symbol: sizes[str(symbol)] for symbol in symbols})
    return flops, read + written
