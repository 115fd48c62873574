"""Plots as HTML and SVG, without scripts, in the colors of the page.

The curves are an SVG that is stretched to the width of the page, with strokes that keep their
width. All text is HTML above it, so that it has the same size on every screen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

SIDE = 1000  # width and height of the SVG, in units that are stretched
MARKED = 40  # a curve with more points has no dots

STYLE = """
.chart { margin: 8px 0 0; }
.frame { display: grid; grid-template-columns: 4.2em 1fr; height: 290px; font-size: 12px;
         color: var(--soft); }
.ys, .area { position: relative; }
.ys span { position: absolute; right: 6px; transform: translateY(50%); white-space: nowrap; }
.area { border-left: 1px solid var(--edge); border-bottom: 1px solid var(--edge); }
.area svg { position: absolute; inset: 0; width: 100%; height: 100%; overflow: visible; }
.area svg * { vector-effect: non-scaling-stroke; fill: none; }
.xs { position: relative; height: 1.6em; margin: 3px 0 0 4.2em; font-size: 12px;
      color: var(--soft); }
.xs span { position: absolute; transform: translateX(-50%); white-space: nowrap; }
.xs span.last { transform: translateX(-100%); }
.note { position: absolute; white-space: nowrap; font-size: 12px; padding: 0 4px;
        background: color-mix(in srgb, var(--card) 80%, transparent); color: var(--text); }
.up { margin: 0 0 10px; font-size: 12px; color: var(--soft); }
.axis { text-align: center; margin-left: 4.2em; font-size: 12px; color: var(--soft); }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; margin: 0 0 8px 4.2em; font-size: 13px;
          color: var(--text); }
.legend i { display: inline-block; width: 16px; height: 0; border-top: 3px solid;
            margin-right: 6px; vertical-align: middle; }
.grid { stroke: var(--grid); stroke-width: 1; }
.one { stroke: var(--one); color: var(--one); }
.two { stroke: var(--two); color: var(--two); }
.three { stroke: var(--three); color: var(--three); }
.soft { stroke: var(--soft); color: var(--soft); }
.bad { stroke: var(--bad); color: var(--bad); }
.line { stroke-width: 2; stroke-linejoin: round; }
.dash { stroke-dasharray: 6 5; stroke-width: 1.5; }
.legend i.dash { border-top-style: dashed; border-top-width: 2px; }
.dot { stroke-width: 8; stroke-linecap: round; }
"""


@dataclass(frozen=True, slots=True)
class Curve:
    """A curve: points (x, y) and how it looks.

    color   "one", "two", "three", "soft" or "bad"
    dashed  whether it is dashed
    """

    name: str
    color: str
    points: Sequence[tuple[float, float]]
    dashed: bool = False


@dataclass(frozen=True, slots=True)
class Mark:
    """A straight line across the plot, at one value of x or of y, with a text.

    height  where the text of an x mark is, as a share of the plot's height
    before  whether the text of an x mark is left of its line
    """

    text: str
    color: str
    x: float | None = None
    y: float | None = None
    height: float = 1.0
    before: bool = False


@dataclass(frozen=True, slots=True)
class Axis:
    """Range and labels of an axis.

    title   text below or above the axis
    low     value at its start
    high    value at its end
    ticks   (value, text)
    log     whether it is logarithmic
    """

    title: str
    low: float
    high: float
    ticks: Sequence[tuple[float, str]]
    log: bool = False

    def at(self, value: float) -> float:
        """Return where a value is, 0.0 at the start and 1.0 at the end of the axis."""
        low, high = self.low, self.high
        if self.log:
            value, low, high = (math.log(max(each, 1e-300)) for each in (value, low, high))
        return min(max((value - low) / ((high - low) or 1.0), 0.0), 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """A plot: axes, curves, marks. ``label`` describes it to those who do not see it."""

    label: str
    x: Axis
    y: Axis
    curves: Sequence[Curve]
    marks: Sequence[Mark] = field(default_factory=list)


def linear(title: str, values: Sequence[float], show: Callable[[float], str]) -> Axis:
    """Return an axis from 0 to the largest of ``values``, with round labels made by ``show``."""
    high = max([each for each in values if math.isfinite(each)], default=1.0) or 1.0
    power = 10 ** math.floor(math.log10(high / 4))
    step = next(each * power for each in (1, 2, 2.5, 5, 10) if high / (each * power) <= 5)
    count = math.ceil(high / step - 1e-9)
    return Axis(title, 0.0, step * count, [(step * i, show(step * i)) for i in range(count + 1)])


def logarithmic(title: str, values: Sequence[float], show: Callable[[float], str]) -> Axis:
    """Return a logarithmic axis that includes all positive ``values``, labelled by ``show``."""
    positive = [each for each in values if each > 0 and math.isfinite(each)] or [1.0]
    low, high = _round_down(min(positive)), _round_up(max(positive))
    if high <= low:
        high = 10 * low
    ticks, power = [], 10 ** math.floor(math.log10(low) + 1e-9)
    few = high / low > 200
    while power <= high * 1.001:
        for factor in (1,) if few else (1, 2, 5):
            if low * 0.999 <= power * factor <= high * 1.001:
                ticks.append((power * factor, show(power * factor)))
        power *= 10
    return Axis(title, low, high, ticks, log=True)


def drawn(plot: Plot) -> str:
    """Return the HTML of a plot."""
    x, y = plot.x, plot.y
    legend = "".join(
        f"<span><i class='{each.color}{' dash' if each.dashed else ''}'></i>"
        f"{escape(each.name)}</span>"
        for each in plot.curves
    )
    ys = "".join(
        f"<span style='bottom:{100 * y.at(value):.2f}%'>{escape(text)}</span>"
        for value, text in y.ticks
    )
    xs = "".join(
        f"<span{' class=last' if x.at(value) > 0.97 else ''} style='left:{100 * x.at(value):.2f}%'>"
        f"{escape(text)}</span>"
        for value, text in x.ticks
    )
    shapes = _grid(x, y) + "".join(_mark(each, x, y) for each in plot.marks)
    shapes += "".join(_curve(each, x, y) for each in plot.curves)
    notes = "".join(_note(each, x, y) for each in plot.marks)
    return (
        f"<figure class=chart role=img aria-label='{escape(plot.label, quote=True)}'>"
        f"<div class=legend>{legend}</div><div class=up>{escape(y.title)}</div>"
        f"<div class=frame><div class=ys>{ys}</div><div class=area>"
        f"<svg viewBox='0 0 {SIDE} {SIDE}' preserveAspectRatio='none' aria-hidden=true>"
        f"{shapes}</svg>{notes}</div></div>"
        f"<div class=xs>{xs}</div><div class=axis>{escape(x.title)}</div></figure>"
    )


def _grid(x: Axis, y: Axis) -> str:
    """Return the lines of the grid."""
    lines = [f"M0 {_v(y.at(value))}H{SIDE}" for value, _ in y.ticks]
    lines += [f"M{_h(x.at(value))} 0V{SIDE}" for value, _ in x.ticks]
    return f"<path class=grid d='{''.join(lines)}'/>"


def _curve(curve: Curve, x: Axis, y: Axis) -> str:
    """Return the line of a curve, and a dot for each point if there are few."""
    if not curve.points:
        return ""
    at = [(_h(x.at(px)), _v(y.at(py)), px, py) for px, py in curve.points]
    path = "L".join(f"{h} {v}" for h, v, _, _ in at)
    kind = f"{curve.color} {'dash' if curve.dashed else 'line'}"
    line = f"<path class='{kind}' d='M{path}'/>"
    if len(at) > MARKED or curve.dashed:
        return line
    return line + "".join(
        f"<path class='{curve.color} dot' d='M{h} {v}h0'>"
        f"<title>{escape(curve.name)}: {px:.4g}, {py:.4g}</title></path>"
        for h, v, px, py in at
    )


def _mark(mark: Mark, x: Axis, y: Axis) -> str:
    """Return the line of a mark."""
    if mark.x is not None:
        path = f"M{_h(x.at(mark.x))} 0V{SIDE}"
    else:
        path = f"M0 {_v(y.at(mark.y or 0.0))}H{SIDE}"
    return f"<path class='{mark.color} dash' d='{path}'/>"


def _note(mark: Mark, x: Axis, y: Axis) -> str:
    """Return the text of a mark, next to its line and inside the plot."""
    if mark.x is None:
        place = f"left:0;bottom:{100 * y.at(mark.y or 0.0):.2f}%"
    else:
        left = x.at(mark.x)
        side = f"right:{100 * (1 - left):.2f}%" if mark.before else f"left:{100 * left:.2f}%"
        place = f"{side};bottom:calc({100 * mark.height:.0f}% - 1.2em)"
    return f"<span class=note style='{place}'>{escape(mark.text)}</span>"


def _h(share: float) -> str:
    return f"{SIDE * share:.1f}"


def _v(share: float) -> str:
    return f"{SIDE * (1 - share):.1f}"


def _round_down(value: float) -> float:
    """Return the largest of 1, 2, 5 times a power of ten that is at most ``value``."""
    power = 10.0 ** math.floor(math.log10(value) + 1e-9)
    return max(each * power for each in (1, 2, 5) if each * power <= value * 1.0001)


def _round_up(value: float) -> float:
    """Return the smallest of 1, 2, 5 times a power of ten that is at least ``value``."""
    power = 10.0 ** math.floor(math.log10(value) + 1e-9)
    return min(each * power for each in (1, 2, 5, 10) if each * power >= value * 0.9999)
