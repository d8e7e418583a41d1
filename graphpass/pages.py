"""Reports and plans as HTML pages, each one file that needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from jinja2 import Environment

from graphpass import outlook
from graphpass.parameters import short_text
from graphpass.render import method_text, totals

if TYPE_CHECKING:
    from graphpass.outlook import Measured
    from graphpass.plan import Plan
    from graphpass.prediction import Prediction
    from graphpass.report import Report

_HEAD = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>graphpass</title>
<style>
body { font: 15px/1.4 system-ui, sans-serif; margin: 2em; }
table { border-collapse: collapse; }
th, td { padding: .2em .7em; text-align: left; border-bottom: 1px solid #ddd; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
tr.approximated { background: #e3f1fb; }
</style>
</head>
<body>
"""

_REPORT = """\
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
"""

_PLAN = """\
<h1>What is planned, where, and why</h1>
<p>{{ plan.approximated | length }} of {{ plan.decisions | length }} products approximated,
schedule {{ plan.schedule.name }}</p>
<table>
<tr><th>layer</th><th>product</th><th>op</th><th>method</th><th>why exact</th></tr>
{% for d in plan.decisions %}
<tr{% if d.method %} class="approximated"{% endif %}>
<td class="number">{{ d.layer }}</td><td>{{ d.site }}</td><td>{{ d.op }}</td>
<td>{{ method_text(d.method, d.params) if d.method else "exact" }}</td><td>{{ d.reason }}</td>
</tr>
{% endfor %}
</table>
"""

_PREDICTED = """\
{% if prediction %}
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
{% for name, site in prediction.sites.items() if site.others %}
<details><summary>{{ name }}: {{ methods.get(name, "exact") }}</summary>
<ul>{% for text in site.others %}<li>{{ text }}</li>{% endfor %}</ul></details>
{% endfor %}
{% endif %}
</body>
</html>
"""


def report_html(report: Report) -> str:
    """Return a report as a page."""
    methods = {row.site: short_text(row.method, row.params) for row in report.approximated}
    predicted = _predicted(report.prediction, methods, report.measured)
    return _page(_REPORT, {"report": report, "totals": totals(report), **predicted})


def plan_html(plan: Plan) -> str:
    """Return a plan as a page."""
    methods = {d.site: short_text(d.method, d.params) for d in plan.approximated if d.method}
    return _page(_PLAN, {"plan": plan, **_predicted(plan.prediction, methods, None)})


def _page(body: str, values: Mapping[str, Any]) -> str:
    template = Environment(autoescape=True).from_string(_HEAD + body + _PREDICTED)
    return template.render(method_text=method_text, **values)


def _predicted(
    prediction: Prediction | None, methods: Mapping[str, str], measured: Measured | None
) -> dict[str, Any]:
    """Return what the section on predictions shows."""
    if prediction is None:
        return {"prediction": None}
    columns, sites = outlook.site_table(prediction, methods)
    return {
        "prediction": prediction,
        "methods": methods,
        "columns": columns,
        "sites": sites,
        "summary": outlook.summary(prediction, measured),
        "frontier": outlook.frontier_svg(prediction),
    }
