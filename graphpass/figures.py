"""Reports for other programs: a graph in Graphviz's language, and one HTML page."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from jinja2 import Environment

from graphpass import outlook
from graphpass.parameters import short_text
from graphpass.render import method_text, totals

if TYPE_CHECKING:
    from graphpass.report import Report, Row

_EXACT_COLOUR = "white"
_APPROXIMATED_COLOUR = "lightblue"

_PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>graphpass report</title>
<style>
body { font: 15px/1.4 system-ui, sans-serif; margin: 2em; }
table { border-collapse: collapse; }
th, td { padding: .2em .7em; text-align: left; border-bottom: 1px solid #ddd; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
tr.approximated { background: #e3f1fb; }
</style>
</head>
<body>
<h1>What was approximated, where, and why</h1>
<ul>{% for line in totals %}<li>{{ line }}</li>{% endfor %}</ul>
{% if report.picture %}
<h2>Schedule {{ report.schedule }}</h2>
<pre>{{ report.picture }}</pre>
{% endif %}
<h2>Products</h2>
<table>
<tr><th>layer</th><th>where</th><th>gradient</th><th>method</th><th>why exact</th>
<th>MFLOP exact</th><th>MFLOP planned</th><th>MB moved exact</th><th>MB moved planned</th></tr>
{% for row in report.rows %}
<tr{% if row.method != "exact" %} class="approximated"{% endif %}>
<td class="number">{{ row.layer }}</td><td>{{ row.where }}</td><td>{{ row.gradient }}</td>
<td>{{ method_text(row.method, row.params) }}</td><td>{{ row.reason }}</td>
{% for figure in (row.exact_flops, row.planned_flops, row.exact_bytes, row.planned_bytes) %}
<td class="number">{{ "%.2f" | format(figure / 1e6) }}</td>{% endfor %}
</tr>
{% endfor %}
</table>
{% if report.prediction %}
<h2>What is predicted</h2>
<ul>{% for line in summary %}<li>{{ line }}</li>{% endfor %}</ul>
{# Drawn by us from numbers: nothing in it is to be escaped. #}{{ frontier | safe }}
{% if sites %}
<table class="predicted">
<tr>{% for name in columns %}<th>{{ name }}</th>{% endfor %}</tr>
{% for cells in sites %}<tr>{% for cell in cells %}
<td{% if loop.index > 2 %} class="number"{% endif %}>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table>
{% endif %}
<h2>What else was considered</h2>
{% for row in report.rows if row.prediction and row.prediction.others %}
<details><summary>{{ row.site }}: {{ row.method }}</summary>
<ul>{% for text in row.prediction.others %}<li>{{ text }}</li>{% endfor %}</ul></details>
{% endfor %}
{% endif %}
</body>
</html>
"""


def report_html(report: Report) -> str:
    """Return a report as one HTML page that needs nothing else."""
    page = Environment(autoescape=True).from_string(_PAGE)
    more: dict[str, object] = {}
    if report.prediction is not None:
        methods = {row.site: short_text(row.method, row.params) for row in report.approximated}
        columns, sites = outlook.site_table(report.prediction, methods)
        summary = outlook.summary(report.prediction, report.measured)
        frontier = outlook.frontier_svg(report.prediction)
        more = {"columns": columns, "sites": sites, "summary": summary, "frontier": frontier}
    return page.render(report=report, totals=totals(report), method_text=method_text, **more)


def report_dot(report: Report) -> str:
    """Return the layers in forward order, each with its products; approximated ones are coloured.

    Every layer is a cluster of its products. Edges run forward between the forward products, and
    backward between the input gradients: the way that an error in one of them travels.
    """
    layers: dict[str, list[Row]] = {}
    for row in sorted(report.rows, key=lambda row: row.layer):
        layers.setdefault(row.where, []).append(row)
    lines = ["digraph report {", "  node [shape=box, style=filled];"]
    for number, (where, rows) in enumerate(layers.items()):
        lines.append(f"  subgraph cluster_{number} {{ label={_quoted(where)};")
        lines += [f"    {_node(row)}" for row in rows]
        lines.append("  }")
    for gradient, reverse in (("forward", False), ("input", True)):
        chain = [row for rows in layers.values() for row in rows if row.gradient == gradient]
        if reverse:
            chain.reverse()
        lines += [f"  {_id(a)} -> {_id(b)};" for a, b in pairwise(chain)]
    return "\n".join([*lines, "}"]) + "\n"


def _node(row: Row) -> str:
    colour = _EXACT_COLOUR if row.method == "exact" else _APPROXIMATED_COLOUR
    label = f"{row.gradient}\n{method_text(row.method, row.params)}"
    return f"{_id(row)} [label={_quoted(label)}, fillcolor={colour}];"


def _id(row: Row) -> str:
    return _quoted(f"{row.where}:{row.gradient}")


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
