"""Line charts as SVG text, with no library: axes, ticks, lines, dots, rules, a legend inside."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

INK, QUIET, GRID = "#222222", "#5f5f5f", "#e6e6e6"
BLUE, ORANGE = "#0072b2", "#d55e00"
FONT = "font-family=\"system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif\""
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 26, 40
MOST_POINTS = 400


@dataclass
class Line:
    x: Sequence[float]
    y: Sequence[float]
    label: str = ""
    colour: str = BLUE
    dashed: bool = False
    faint: bool = False
    dots: str = ""
    """"", "filled" or "hollow"."""
    marker: str = "circle"
    """The shape of its dots: circle, square, triangle, diamond or down."""
    size: float = 3.0
    """Half a dot's width, pixels."""
    joined: bool = True
    """Draw the path through the points."""


@dataclass
class Rule:
    """Something a person did at x; marked with ◆ and told below the picture."""

    x: float
    y: float | None = None
    """Draw the mark at this height and no rule."""


@dataclass
class Plot:
    title: str
    x_label: str
    y_label: str
    lines: list[Line]
    rules: list[Rule] = field(default_factory=list)
    tell_rules: bool = True
    """Explain the marks in the legend."""

    def draw(self, left: float, top: float, width: float, height: float) -> str:
        """The plot as SVG elements within the rectangle."""
        x0, x1 = bounds([value for line in self.lines for value in line.x], from_zero=True)
        y0, y1 = bounds([value for line in self.lines for value in line.y])
        inner_width, inner_height = width - LEFT - RIGHT, height - TOP - BOTTOM

        def at(x: float, y: float) -> tuple[float, float]:
            return LEFT + (x - x0) / (x1 - x0) * inner_width, TOP + (1 - (y - y0) / (y1 - y0)) * inner_height

        out = [f'<g transform="translate({left:g},{top:g})">']
        out.append(text(LEFT, 14, self.title, size=12, weight=600))
        bottom, right = TOP + inner_height, LEFT + inner_width
        for value in ticks(y0, y1):
            y = at(x0, value)[1]
            out.append(f'<path d="M{LEFT} {y:.1f}H{right:.1f}" stroke="{GRID}"/>')
            out.append(text(LEFT - 6, y + 3.5, tick(value), anchor="end", colour=QUIET))
        for value in ticks(x0, x1):
            x = at(value, y0)[0]
            out.append(f'<path d="M{x:.1f} {bottom:.1f}v4" stroke="{QUIET}"/>')
            out.append(text(x, bottom + 16, tick(value), anchor="middle", colour=QUIET))
        out.append(f'<path d="M{LEFT} {bottom:.1f}H{right:.1f}" stroke="{QUIET}"/>')
        out.append(text(LEFT + inner_width / 2, height - 6, self.x_label, anchor="middle", colour=QUIET))
        middle = TOP + inner_height / 2
        out.append(
            f'<text x="12" y="{middle:.1f}" transform="rotate(-90 12 {middle:.1f})" text-anchor="middle" '
            f'font-size="11" fill="{QUIET}">{escape(self.y_label)}</text>'
        )
        for rule in self.rules:
            x, y = at(rule.x, y1 if rule.y is None else rule.y)
            if rule.y is None:
                out.append(f'<path d="M{x:.1f} {TOP}V{bottom:.1f}" stroke="{ORANGE}" stroke-dasharray="3 3"/>')
            out.append(f'<path d="M{x:.1f} {y - 5:.1f}l5 5l-5 5l-5 -5z" fill="{ORANGE}"/>')
        for line in self.lines:
            out.append(self._line(line, at))
        out.append(self._legend(right, bottom))
        return "".join([*out, "</g>"])

    def _line(self, line: Line, at: Callable[[float, float], tuple[float, float]]) -> str:
        points = thin([point for point in zip(line.x, line.y, strict=True) if math.isfinite(point[0] + point[1])])
        if not points:
            return ""
        pixels = [at(x, y) for x, y in points]
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in pixels)
        style = f'stroke="{line.colour}" stroke-width="{1 if line.faint or line.dots else 2}"'
        style += ' stroke-opacity="0.3"' if line.faint else ""
        style += ' stroke-dasharray="5 3"' if line.dashed else ""
        out = f'<path d="{path}" fill="none" {style} stroke-linejoin="round"/>' if line.joined else ""
        if line.dots:
            fill = line.colour if line.dots == "filled" else "#ffffff"
            look = f'fill="{fill}" stroke="{line.colour}" stroke-width="1.5"'
            look += ' opacity="0.35"' if line.faint else ""
            out += "".join(dot(line.marker, x, y, line.size, look) for x, y in pixels)
        elif len(pixels) == 1:
            out += f'<circle cx="{pixels[0][0]:.1f}" cy="{pixels[0][1]:.1f}" r="2.5" fill="{line.colour}"/>'
        return out

    def _legend(self, right: float, bottom: float) -> str:
        """In the lower right, on a ground of its own: lines may pass behind it."""
        named = [line for line in self.lines if line.label]
        told = bool(self.rules) and self.tell_rules and bool(named)
        height = 15 * (len(named) + told)
        if not height:
            return ""
        left, y = right - 168, bottom - height
        ground = f'x="{left:.1f}" y="{y - 6:.1f}" width="168" height="{height + 2}"'
        out = [f'<rect {ground} fill="#ffffff" fill-opacity="0.85"/>']
        for line in named:
            y += 15
            fill = line.colour if line.dots == "filled" else "#ffffff"
            dash = ' stroke-dasharray="5 3"' if line.dashed else ""
            out.append(
                f'<path d="M{left + 8:.1f} {y - 8:.1f}h18" stroke="{line.colour}" stroke-width="2"{dash}/>'
                + dot(line.marker, left + 17, y - 8, 3, f'fill="{fill}" stroke="{line.colour}"')
            )
            out.append(text(left + 32, y - 4, line.label))
        if told:
            y += 15
            out.append(f'<path d="M{left + 17:.1f} {y - 13:.1f}l5 5l-5 5l-5 -5z" fill="{ORANGE}"/>')
            out.append(text(left + 32, y - 4, "a coefficient was moved"))
        return "".join(out)


def dot(marker: str, x: float, y: float, size: float, look: str) -> str:
    """A mark of about the same area whatever its shape: the shape tells series apart where colour cannot."""
    if marker == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{size:g}" {look}/>'
    side = size * 0.9
    corners = {
        "square": f"M{x - side:.1f} {y - side:.1f}h{2 * side:.1f}v{2 * side:.1f}h{-2 * side:.1f}z",
        "triangle": f"M{x:.1f} {y - 1.2 * size:.1f}L{x + 1.2 * size:.1f} {y + size:.1f}H{x - 1.2 * size:.1f}z",
        "down": f"M{x:.1f} {y + 1.2 * size:.1f}L{x + 1.2 * size:.1f} {y - size:.1f}H{x - 1.2 * size:.1f}z",
        "diamond": f"M{x:.1f} {y - 1.3 * size:.1f}L{x + 1.3 * size:.1f} {y:.1f}L{x:.1f} {y + 1.3 * size:.1f}"
        f"L{x - 1.3 * size:.1f} {y:.1f}z",
    }
    return f'<path d="{corners[marker]}" {look}/>'


def text(
    x: float, y: float, content: str, *, size: int = 11, anchor: str = "start", colour: str = INK, weight: int = 400
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" font-weight="{weight}" '
        f'fill="{colour}">{escape(content)}</text>'
    )


def document(width: float, height: float, title: str, parts: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        f'height="{height:g}" style="max-width:100%;height:auto" {FONT} role="img"><title>{escape(title)}</title>'
        f'<rect width="100%" height="100%" fill="#ffffff"/>{"".join(parts)}</svg>'
    )


def thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most MOST_POINTS: of each bucket the lowest and the highest, in order."""
    if len(points) <= MOST_POINTS:
        return points
    buckets, kept = MOST_POINTS // 2, []
    for bucket in range(buckets):
        part = points[bucket * len(points) // buckets : (bucket + 1) * len(points) // buckets]
        ends = sorted({part.index(min(part, key=lambda p: p[1])), part.index(max(part, key=lambda p: p[1]))})
        kept += [part[index] for index in ends]
    return kept


def bounds(values: Sequence[float], *, from_zero: bool = False) -> tuple[float, float]:
    """A range around finite values that is never empty."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return 0.0, 1.0
    low, high = (0.0 if from_zero else min(finite)), max(finite)
    margin = (high - low) * 0.06 if high > low else abs(high) * 0.1 or 0.5
    return (low if from_zero and high > 0 else low - margin), high + margin


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round values within a range."""
    rough = (high - low) / about
    size = 10 ** math.floor(math.log10(rough))
    step = min((factor * size for factor in (1, 2, 2.5, 5, 10)), key=lambda each: abs(each - rough))
    first = math.ceil(low / step)
    return [index * step for index in range(first, math.floor(high / step) + 1)]


def tick(value: float) -> str:
    return "0" if abs(value) < 1e-12 else f"{value:.4g}".replace("-", "−")
