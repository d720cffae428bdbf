"""Line charts and picture grids for the report: plain SVG and embedded PNG, no script, no font, no link."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from PIL import Image

# Okabe and Ito's colours, told apart with every kind of colour vision; dashes and markers tell them
# apart without colour.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
DASHES = ("", "7 4", "2 3", "10 3 2 3", "4 2", "1 2")
MARKERS = ("circle", "square", "triangle")

WIDTH, HEIGHT = 560, 280
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 14, 42


@dataclass(frozen=True)
class Line:
    """A named line of (x, y) points; ``style`` picks colour, dash and marker: a method keeps its own."""

    name: str
    points: Sequence[tuple[float, float]]
    style: int


def line_chart(lines: Sequence[Line], x_label: str, y_label: str, *, from_zero: bool = False) -> str:
    """An SVG chart of lines with a legend.

    Raises:
        ValueError: there is no point at all.
    """
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points if math.isfinite(y)]
    if not xs or not ys:
        raise ValueError("line_chart: lines must hold at least one finite point, got none")
    x_ticks, y_ticks = ticks(min(xs), max(xs)), ticks(0.0 if from_zero else min(ys), max(ys))
    x_low, x_high = min(xs), max(max(xs), min(xs) + 1e-9)
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low)
        up = (y - y_low) / (y_high - y_low)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(y_label)}">']
    for y in y_ticks:
        _, py = at(x_low, y)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{py:.1f}" y2="{py:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{py + 4:.1f}" text-anchor="end">{y:g}</text>')
    for x in x_ticks:
        if x_low <= x <= x_high:
            px, _ = at(x, y_low)
            parts.append(f'<text x="{px:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{x:g}</text>')
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">'
        f"{escape(x_label)}</text>"
        f'<text transform="rotate(-90)" x="{-(TOP + HEIGHT - BOTTOM) / 2}" y="12" text-anchor="middle">'
        f"{escape(y_label)}</text>"
    )
    for line in lines:
        colour, dash = COLOURS[line.style % len(COLOURS)], DASHES[line.style % len(DASHES)]
        spots = [at(x, y) for x, y in line.points if math.isfinite(y)]
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in spots)
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2.2" '
            f'stroke-dasharray="{dash}"><title>{escape(line.name)}</title></polyline>'
        )
        if len(spots) <= 30:
            for (px, py), (x, y) in zip(spots, line.points):
                label = f"{escape(line.name)}: {y:.4g} at {x:g}"
                parts.append(_marker(line.style, px, py, colour, label))
    parts.append("</svg>")
    return "".join(parts) + legend(lines)


def legend(lines: Sequence[Line]) -> str:
    """The key of a chart, as HTML."""
    items = []
    for line in lines:
        colour, dash = COLOURS[line.style % len(COLOURS)], DASHES[line.style % len(DASHES)]
        items.append(
            f'<span class="key"><svg viewBox="0 0 34 12" width="34" height="12"><line x1="0" x2="34" y1="6" '
            f'y2="6" stroke="{colour}" stroke-width="2.2" stroke-dasharray="{dash}"/>'
            f"{_marker(line.style, 17, 6, colour, '')}</svg> {escape(line.name)}</span>"
        )
    return f'<p class="legend">{"".join(items)}</p>'


def _marker(style: int, x: float, y: float, colour: str, label: str) -> str:
    shape = MARKERS[style % len(MARKERS)]
    title = f"<title>{label}</title>" if label else ""
    if shape == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.4" fill="{colour}">{title}</circle>'
    if shape == "square":
        corner = f'x="{x - 3.2:.1f}" y="{y - 3.2:.1f}"'
        return f'<rect {corner} width="6.4" height="6.4" fill="{colour}">{title}</rect>'
    points = f"{x:.1f},{y - 4:.1f} {x - 4:.1f},{y + 3.2:.1f} {x + 4:.1f},{y + 3.2:.1f}"
    return f'<polygon points="{points}" fill="{colour}">{title}</polygon>'


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers that enclose an interval."""
    span = (high - low) or abs(high) or 1.0
    step = 10.0 ** math.floor(math.log10(span / about))
    step *= next(m for m in (1, 2, 2.5, 5, 10) if span / (m * step) <= about + 0.5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    last = max(last, first + 1)
    return [round(i * step, 12) for i in range(first, last + 1)]


def smooth(values: Sequence[float], width: int) -> list[tuple[float, float]]:
    """(step, mean over the last ``width`` values), for noisy losses."""
    sums = np.cumsum([0.0, *values])
    points = []
    for i in range(len(values)):
        first = max(0, i + 1 - width)
        points.append((float(i + 1), float(sums[i + 1] - sums[first]) / (i + 1 - first)))
    return points


def picture_grid(images: np.ndarray, alt: str, columns: int = 4, gap: int = 1) -> str:
    """(N, H, W, 3) uint8 as one embedded PNG; the page enlarges it without blur."""
    count, height, width, _ = images.shape
    rows = math.ceil(count / columns)
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 4), 0, dtype=np.uint8)
    for i, image in enumerate(images):
        top, left = (i // columns) * (height + gap), (i % columns) * (width + gap)
        sheet[top : top + height, left : left + width, :3] = image
        sheet[top : top + height, left : left + width, 3] = 255
    stream = io.BytesIO()
    Image.fromarray(sheet, "RGBA").save(stream, "PNG", optimize=True)
    data = base64.b64encode(stream.getvalue()).decode()
    return f'<img class="pixels" alt="{escape(alt)}" src="data:image/png;base64,{data}">'
