"""Reports for other programs: a graph in Graphviz's language."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from graphpass.render import method_text

if TYPE_CHECKING:
    from graphpass.report import Report, Row

_EXACT_COLOUR = "white"
_APPROXIMATED_COLOUR = "lightblue"


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
