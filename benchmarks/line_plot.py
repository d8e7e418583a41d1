"""A plot of lines and points as an SVG file, without a plotting library."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment

# Distinct in hue and in lightness (Okabe and Ito's palette), then again dashed.
_COLOURS = ("#000000", "#e69f00", "#56b4e9", "#009e73", "#d55e00", "#0072b2", "#cc79a7")
_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM, _LEGEND = 560, 360, 60, 24, 48, 250
_Y_TICKS = 5

_SVG = """\
<svg xmlns="http://www.w3.org/2000/svg" width="{{ width + legend }}" height="{{ height }}"
 font-family="sans-serif" font-size="12">
<rect width="100%" height="100%" fill="white"/>
<text x="{{ left }}" y="16" font-weight="bold">{{ title }}</text>
{% for at, label in x_ticks %}<line x1="{{ at }}" x2="{{ at }}" y1="{{ top }}" y2="{{ base }}"
 stroke="#eee"/><text x="{{ at }}" y="{{ base + 16 }}" text-anchor="middle">{{ label }}</text>
{% endfor %}
{% for at, label in y_ticks %}<line x1="{{ left }}" x2="{{ width }}" y1="{{ at }}" y2="{{ at }}"
 stroke="#eee"/><text x="{{ left - 6 }}" y="{{ at + 4 }}" text-anchor="end">{{ label }}</text>
{% endfor %}
<text x="{{ (left + width) / 2 }}" y="{{ height - 8 }}" text-anchor="middle">{{ x_label }}</text>
<text transform="translate(14 {{ base / 2 }}) rotate(-90)" text-anchor="middle">{{ y_label }}</text>
{% for line in lines %}{% if line.joined %}<polyline fill="none" stroke="{{ line.colour }}"
 stroke-width="1.6" stroke-dasharray="{{ line.dash }}" points="{{ line.points }}"/>
<line x1="{{ width + 12 }}" x2="{{ width + 36 }}" y1="{{ line.y }}" y2="{{ line.y }}"
 stroke="{{ line.colour }}" stroke-width="1.6" stroke-dasharray="{{ line.dash }}"/>
{% else %}<circle cx="{{ width + 24 }}" cy="{{ line.y }}" r="4" fill="{{ line.colour }}"/>
{% for x, y in line.marks %}<circle cx="{{ x }}" cy="{{ y }}" r="4" fill="{{ line.colour }}"/>
{% endfor %}{% endif %}
{% for x, low, high in line.bars %}<line x1="{{ x }}" x2="{{ x }}" y1="{{ low }}" y2="{{ high }}"
 stroke="{{ line.colour }}" stroke-width="1.2"/>
{% endfor %}
<text x="{{ width + 42 }}" y="{{ line.y + 4 }}">{{ line.name }}</text>
{% endfor %}
</svg>
"""


@dataclass(frozen=True, slots=True)
class Line:
    """Points of a plot.

    Attributes:
        x: abscissas.
        y: ordinates.
        errors: half of the length of each point's error bar; empty for none.
        joined: whether a line joins the points; without it they are dots.
    """

    x: Sequence[float]
    y: Sequence[float]
    errors: Sequence[float] = ()
    joined: bool = True


def write(
    path: Path,
    title: str,
    labels: tuple[str, str],
    x_ticks: Sequence[float],
    lines: Mapping[str, Line],
    lowest: float = 0.0,
) -> None:
    """Write a plot of several lines, both axes linear.

    Args:
        path: file to write.
        title: stands above.
        labels: of the two axes.
        x_ticks: abscissas that are marked, ascending; the axis goes from the first to the last.
        lines: by name.
        lowest: ordinate at the foot of the plot.
    """
    ends = [
        y + error
        for line in lines.values()
        for y, error in zip(line.y, line.errors or [0.0] * len(line.y), strict=True)
    ]
    span, base = max(ends) - lowest, _HEIGHT - _BOTTOM
    first, last = x_ticks[0], x_ticks[-1]

    def across(value: float) -> float:
        return round(_LEFT + (value - first) / (last - first) * (_WIDTH - _LEFT - 10), 1)

    def up(value: float) -> float:
        return round(base - (value - lowest) / span * (base - _TOP), 1)

    drawn = []
    for number, (name, line) in enumerate(lines.items()):
        marks = [(across(x), up(y)) for x, y in zip(line.x, line.y, strict=True)]
        bars = [
            (across(x), up(y - error), up(y + error))
            for x, y, error in zip(line.x, line.y, line.errors, strict=bool(line.errors))
        ]
        drawn.append(
            {
                "name": name,
                "colour": _COLOURS[number % len(_COLOURS)],
                "dash": "5 3" if number >= len(_COLOURS) else "none",
                "points": " ".join(f"{x},{y}" for x, y in marks),
                "marks": marks,
                "bars": bars,
                "joined": line.joined,
                "y": 36 + 18 * number,
            }
        )
    values = [lowest + span * i / _Y_TICKS for i in range(_Y_TICKS + 1)]
    digits = 1 if span > _Y_TICKS else 3
    text = (
        Environment(autoescape=True)
        .from_string(_SVG)
        .render(
            title=title, x_label=labels[0], y_label=labels[1], lines=drawn, width=_WIDTH,
            height=_HEIGHT, left=_LEFT, top=_TOP, base=base, legend=_LEGEND,
            x_ticks=[(across(value), f"{value:g}") for value in x_ticks],
            y_ticks=[(up(value), f"{value:.{digits}f}") for value in values],
        )
    )  # fmt: skip
    path.write_text(text)
