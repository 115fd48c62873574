"""Plot the results of longtail.py on one self-contained HTML page."""

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots
from tail import DAYS, HELD_OUT, Seen, Stream
from ways import FEWER, LOAD, Result, Way

from psclient import Table
from psclient.multihash import KHash, MultiHash, QuotientRemainder

COLOURS = {  # palette of Okabe and Ito, which color-blind people can distinguish
    "hashing": "#D55E00",
    "multi-hash": "#E69F00",
    "everything": "#333333",
    "admission": "#0072B2",
    "admission + eviction": "#009E73",
}
ABOVE = {"hashing": "top", "admission": "top"}  # points with their label above instead of below
LOADS = (1 / 16, 1 / 4, 1, 4)  # ids per bucket for which collisions are counted
PANELS = (
    "Rows of users and items, day by day",
    "AUC lost against everything, day by day",
    "AUC of the days held out, and its price",
    "Memory: rows and their index; counters",
    "Items that share all they have, by load",
    "How often ids occur",
)


def page(
    stream: Stream, seen: Mapping[str, Seen], ways: Sequence[Way], results: Sequence[Result]
) -> str:
    """Return the HTML text of the page, which needs no other files and no network.

    stream   the stream of clicks
    seen     the distinct ids in it, by field ("user", "item")
    ways     the five ways, with their measurements of each day
    results  their results at the end
    """
    figure = make_subplots(3, 2, subplot_titles=PANELS, vertical_spacing=0.1)
    _days(figure, ways)
    _price(figure, results)
    _memory(figure, results)
    _load(figure, seen["item"], ways[0].features["item"].tables[0])
    _law(figure, seen)
    subtitle = f"{stream.scale}, {HELD_OUT} days held out"
    figure.update_layout(
        title={"text": f"Five ways to keep embeddings: {subtitle}", "y": 0.98},
        template="plotly_white",
        height=1400,
        margin={"t": 150},
        legend={"orientation": "h", "y": 1.04, "yanchor": "bottom"},
        barmode="stack",
    )
    html: str = figure.to_html(include_plotlyjs=True)
    return html


def _days(figure: go.Figure, ways: Sequence[Way]) -> None:
    """Plot the rows of each way, and the AUC of "everything" minus its AUC, for each day."""
    days = np.arange(1, DAYS - HELD_OUT + 1)
    everything = next(way for way in ways if way.name == "everything")
    for way in ways:
        line = {"color": COLOURS[way.name]}
        rows = go.Scatter(x=days, y=way.rows[: len(days)], name=way.name, line=line)
        figure.add_trace(rows.update(legendgroup=way.name), 1, 1)
        lost = np.subtract(everything.aucs, way.aucs)
        lines = go.Scatter(x=days, y=lost, name=way.name, line=line, showlegend=False)
        figure.add_trace(lines.update(legendgroup=way.name), 1, 2)
    figure.update_xaxes(title="day", row=1)
    figure.update_yaxes(title="rows", rangemode="tozero", row=1, col=1)
    figure.update_yaxes(title="AUC of everything - AUC", row=1, col=2)


def _price(figure: go.Figure, results: Sequence[Result]) -> None:
    """Plot the AUC of each way over its memory, as one point per way."""
    for result in results:
        point = go.Scatter(
            x=[result.bytes / 1e6],
            y=[result.auc],
            mode="markers+text",
            marker={"color": COLOURS[result.name], "size": 12},
            text=[result.name],
            textposition=f"{ABOVE.get(result.name, 'bottom')} center",
            cliponaxis=False,
            showlegend=False,
        )
        figure.add_trace(point, 2, 1)
    values = [result.auc for result in results]
    room = 0.2 * (max(values) - min(values))
    figure.update_xaxes(title="MB on the servers", rangemode="tozero", row=2, col=1)
    figure.update_yaxes(title="AUC", range=[min(values) - room, max(values) + room], row=2, col=1)


def _memory(figure: go.Figure, results: Sequence[Result]) -> None:
    """Plot the memory of each way as a bar: rows with their index, and counters."""
    names = [result.name for result in results]
    colours = [COLOURS[name] for name in names]
    rows = [(result.bytes - result.counter_bytes) / 1e6 for result in results]
    counters = [result.counter_bytes / 1e6 for result in results]
    for values, shape in ((rows, ""), (counters, "/")):
        marker = {"color": colours, "pattern": {"shape": shape}}
        figure.add_trace(go.Bar(x=names, y=values, marker=marker, showlegend=False), 2, 2)
    figure.update_yaxes(title="MB on the servers", row=2, col=2)


def _load(figure: go.Figure, seen: Seen, table: Table) -> None:
    """Plot the share of ids that share all their rows with another id, by the load of the table.

    The lines are the expected share, ``1 - exp(-ids / codes)``, where a code is a combination of
    one row from each part. The points are measured.

    seen   the ids
    table  any table: only its name is used, nothing is pulled
    """
    ids = len(seen.keys)
    loads = np.geomspace(min(LOADS), max(LOADS))
    for parts, name, dash in ((1, "hashing", "solid"), (2, "multi-hash", "solid"), (3, "", "dash")):
        label = f"{name or 'multi-hash'}, {parts} {'parts' if parts > 1 else 'bucket'}"
        colour = COLOURS[name or "multi-hash"]
        fewer = FEWER if parts > 1 else 1
        expected = -np.expm1(-ids / (ids / loads / fewer / parts) ** parts)
        line = {"color": colour, "dash": dash}
        curve = go.Scatter(x=loads, y=expected, mode="lines", line=line, hovertext=label)
        figure.add_trace(curve.update(showlegend=False), 3, 1)
        figure.add_annotation(
            x=np.log10(loads[-20]),
            y=np.log10(expected[-20]),
            text=label,
            font={"color": colour},
            showarrow=False,
            xanchor="left",
            yshift=-10,
            row=3,
            col=1,
        )
        features = [_feature(table, round(ids / load / fewer / parts), parts) for load in LOADS]
        shares = [feature.collisions(seen.keys) or None for feature in features]
        points = go.Scatter(x=LOADS, y=shares, mode="markers", marker={"color": colour, "size": 9})
        figure.add_trace(points.update(showlegend=False), 3, 1)
    figure.add_vline(x=LOAD, line={"color": "#999999", "dash": "dot"}, row=3, col=1)
    figure.update_xaxes(title="ids for each bucket of hashing", type="log", row=3, col=1)
    figure.update_yaxes(title="share of the ids", type="log", exponentformat="power", row=3, col=1)


def _feature(table: Table, size: int, parts: int) -> MultiHash:
    """Return a feature that maps a key to one row in each of ``parts`` parts of ``size`` rows."""
    kind = KHash if parts == 1 else QuotientRemainder
    return kind(table, (size,) * parts)


def _law(figure: go.Figure, seen: Mapping[str, Seen]) -> None:
    """Plot the share of ids that occur at least k times in the stream, over k."""
    for (name, those), colour in zip(seen.items(), ("#56B4E9", "#CC79A7"), strict=True):
        counts, ids = np.unique(those.counts, return_counts=True)
        share = ids[::-1].cumsum()[::-1] / len(those.keys)  # with at least this many occurrences
        line = {"color": colour}
        figure.add_trace(
            go.Scatter(x=counts, y=share, name=f"{name}s (bottom right)", line=line), 3, 2
        )
    figure.update_xaxes(title="occurrences, or more", type="log", row=3, col=2)
    figure.update_yaxes(title="share of the ids", type="log", exponentformat="power", row=3, col=2)
