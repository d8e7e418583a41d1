"""Plans and reports as text."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cost_model import Hardware
from graphpass import outlook
from graphpass.parameters import short_text

if TYPE_CHECKING:
    from graphpass.outlook import Measured
    from graphpass.plan import Plan
    from graphpass.prediction import Prediction
    from graphpass.report import Report

_WIDTH = 132


def plan_table(plan: Plan) -> str:
    """Return a plan as a table: one line a product, and the schedule."""
    table = Table(box=SIMPLE, pad_edge=False)
    for name in ("layer", "product", "op", "output", "method", "why exact"):
        table.add_column(name, overflow="fold")
    for d in plan.decisions:
        method = method_text(d.method, d.params) if d.method else "exact"
        shape = "x".join(map(str, d.output))
        _add_row(table, str(d.layer), d.site, d.op, shape, method, d.reason)
    count = len(plan.approximated)
    head = (
        f"{count} of {len(plan.decisions)} products approximated, schedule {plan.schedule.name!r}"
    )
    methods = {d.site: short_text(d.method, d.params) for d in plan.approximated if d.method}
    return "\n".join([head, _text(table), *prediction_parts(plan.prediction, methods, None)])


def report_table(report: Report) -> str:
    """Return a report as text: a table of the gradients, totals, and the schedule as a figure."""
    table = Table(box=SIMPLE, pad_edge=False)
    table.add_column("layer", justify="right")
    for name in ("where", "gradient", "method", "why exact"):
        table.add_column(name, overflow="fold")
    for name in ("MFLOP exact", "planned", "MB moved exact", "planned"):
        table.add_column(name, justify="right")
    for row in report.rows:
        if row.gradient == "forward" and row.method == "exact":
            continue
        _add_row(
            table,
            str(row.layer),
            row.where,
            row.gradient,
            method_text(row.method, row.params),
            row.reason,
            f"{row.exact_flops / 1e6:.2f}",
            f"{row.planned_flops / 1e6:.2f}",
            f"{row.exact_bytes / 1e6:.2f}",
            f"{row.planned_bytes / 1e6:.2f}",
        )
    methods = {row.site: short_text(row.method, row.params) for row in report.approximated}
    parts = [
        _text(table),
        *totals(report),
        *prediction_parts(report.prediction, methods, report.measured),
    ]
    if report.picture:
        parts.append(f"schedule {report.schedule!r}\n{report.picture}")
    return "\n".join(parts)


def prediction_parts(
    prediction: Prediction | None, methods: Mapping[str, str], measured: Measured | None
) -> list[str]:
    """Return what is predicted as text: a table of the approximated sites, the step, the frontier.

    Args:
        prediction: what is predicted; None for nothing, of which nothing is said.
        methods: method of each site, by its id.
        measured: what a run showed.
    """
    if prediction is None:
        return []
    columns, rows = outlook.site_table(prediction, methods)
    parts = outlook.summary(prediction, measured)
    if rows:
        table = Table(box=SIMPLE, pad_edge=False)
        for name in columns:
            text = name in {"product", "method"}
            table.add_column(name, justify="left" if text else "right", overflow="fold")
        for row in rows:
            _add_row(table, *row)
        parts = [_text(table), *parts]
    figure = outlook.frontier_text(prediction)
    return [*parts, figure] if figure else parts


def method_text(name: str, params: Mapping[str, Any]) -> str:
    """Return a method with its parameters, as `topk(k=2)`; parameters left out are None."""
    given = ", ".join(f"{key}={value}" for key, value in params.items() if value is not None)
    return f"{name}({given})" if given else name


def totals(report: Report) -> list[str]:
    """Return what the rows of a report add up to, a line each."""
    exact = sum(row.exact_flops for row in report.rows)
    planned = sum(row.planned_flops for row in report.rows)
    forward = [row for row in report.rows if (row.gradient, row.method) == ("forward", "exact")]
    saved = report.planned_saved_bytes
    kept = "not known" if saved is None else f"{saved / 1e6:.2f} MB"
    lines = [
        f"{len(report.approximated)} of {len(report.rows)} products approximated; "
        f"{len(forward)} forward products are exact and not listed",
        f"GFLOP of a step: {exact / 1e9:.3f} exact, {planned / 1e9:.3f} with every planned product "
        "approximated (forward included)",
        f"kept for backward: {report.exact_saved_bytes / 1e6:.2f} MB exact, {kept} with every "
        "planned product approximated",
        f"compiled variants: {report.variants}",
    ]
    if report.plain_torch:
        lines.append(f"methods run in plain torch, without kernels: {report.plain_torch}")
    if report.halted:
        lines.append(f"failed while training: {report.halted}")
    if report.sizes:
        sizes = ", ".join(f"{name} = {value}" for name, value in sorted(report.sizes.items()))
        lines.append(f"dynamic sizes; figures are for {sizes}")
    return lines


def _add_row(table: Table, *cells: str) -> None:
    # A plain string would be read as markup: `blocks[left]` is a legal name of a module.
    table.add_row(*map(Text, cells))


def _text(table: Table) -> str:
    buffer = io.StringIO()
    Console(file=buffer, width=_WIDTH, color_system=None).print(table)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines())


def hardware_table(hardware: Hardware) -> Table:
    """Return the figures of a machine, each with its source."""
    table = Table(title=hardware.name)
    for column in ("figure", "value", "source"):
        table.add_column(column, overflow="fold")
    for dtype, peak in sorted(hardware.peak_flops_per_s.items()):
        table.add_row(f"peak of {dtype}", f"{peak.value / 1e9:.0f} GFLOP/s", peak.source)
    bandwidth, launch = hardware.bandwidth_bytes_per_s, hardware.launch_s
    table.add_row("bandwidth", f"{bandwidth.value / 1e9:.1f} GB/s", bandwidth.source)
    table.add_row("launch", f"{launch.value * 1e6:.1f} us", launch.source)
    table.add_row("kinds of kernels", str(len(hardware.efficiencies)), "")
    return table
