"""A plot of lines as an SVG file, without a plotting library."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from jinja2 import Environment

# Distinct in hue and in lightness (Okabe and Ito's palette), then again dashed.
_COLOURS = ("#000000", "#e69f00", "#56b4e9", "#009e73", "#d55e00", "#0072b2", "#cc79a7")
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _LEGEND = 560, 360, 60, 48, 250

_SVG = """\
<svg xmlns="http://www.w3.org/2000/svg" width="{{ width + legend }}" height="{{ height }}"
 font-family="sans-serif" font-size="12">
<rect width="100%" height="100%" fill="white"/>
<text x="{{ left }}" y="16" font-weight="bold">{{ title }}</text>
{% for at, label in x_ticks %}<line x1="{{ at }}" x2="{{ at }}" y1="24" y2="{{ base }}"
 stroke="#eee"/><text x="{{ at }}" y="{{ base + 16 }}" text-anchor="middle">{{ label }}</text>
{% endfor %}
{% for at, label in y_ticks %}<line x1="{{ left }}" x2="{{ width }}" y1="{{ at }}" y2="{{ at }}"
 stroke="#eee"/><text x="{{ left - 6 }}" y="{{ at + 4 }}" text-anchor="end">{{ label }}</text>
{% endfor %}
<text x="{{ (left + width) / 2 }}" y="{{ height - 8 }}" text-anchor="middle">{{ x_label }}</text>
<text transform="translate(14 {{ base / 2 }}) rotate(-90)" text-anchor="middle">{{ y_label }}</text>
{% for line in lines %}<polyline fill="none" stroke="{{ line.colour }}" stroke-width="1.6"
 stroke-dasharray="{{ line.dash }}" points="{{ line.points }}"/>
<line x1="{{ width + 12 }}" x2="{{ width + 36 }}" y1="{{ line.y }}" y2="{{ line.y }}"
 stroke="{{ line.colour }}" stroke-width="1.6" stroke-dasharray="{{ line.dash }}"/>
<text x="{{ width + 42 }}" y="{{ line.y + 4 }}">{{ line.name }}</text>
{% endfor %}
</svg>
"""


def write(
    path: Path,
    title: str,
    labels: tuple[str, str],
    x: Sequence[float],
    lines: Mapping[str, Sequence[float]],
) -> None:
    """Write a plot of several lines over common abscissas, both axes linear; ordinates from 0.

    Args:
        path: file to write.
        title: stands above.
        labels: of the two axes.
        x: abscissas, ascending.
        lines: ordinates by name.
    """
    top, base = max(max(values) for values in lines.values()), _HEIGHT - _BOTTOM

    def across(value: float) -> float:
        return round(_LEFT + (value - x[0]) / (x[-1] - x[0]) * (_WIDTH - _LEFT - 10), 1)

    def up(value: float) -> float:
        return round(base - value / top * (base - 24), 1)

    drawn = [
        {
            "name": name,
            "colour": _COLOURS[number % len(_COLOURS)],
            "dash": "5 3" if number >= len(_COLOURS) else "none",
            "points": " ".join(
                f"{across(a)},{up(b)}" for a, b in zip(x, values, strict=True)
            ),
            "y": 36 + 18 * number,
        }
        for number, (name, values) in enumerate(lines.items())
    ]  # fmt: skip
    text = (
        Environment(autoescape=True)
        .from_string(_SVG)
        .render(
            title=title, x_label=labels[0], y_label=labels[1], lines=drawn, width=_WIDTH,
            height=_HEIGHT, left=_LEFT, base=base, legend=_LEGEND,
            x_ticks=[(across(value), f"{value:g}") for value in x],
            y_ticks=[(up(top * i / 5), f"{top * i / 5:.3f}") for i in range(6)],
        )
    )  # fmt: skip
    path.write_text(text)
