"""An analysis as one HTML page with plots.

The page is self-contained: it includes plotly.js, and a content security policy forbids the browser
to load anything. Each plot comes with a table of its numbers. All text from data is escaped.
Needs plotly: pip install 'embedding-ps[report]'.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from string import Template
from typing import Any

import numpy as np

from psclient.errors import InvalidArgument
from psclient.tools.arrow import KeyType
from psclient.tools.charts import Chart, charts
from psclient.tools.figures import EXTREMES, LISTS, facts, lines, title
from psclient.tools.history import Moment
from psclient.tools.summary import Analysis, RowList


def require() -> None:
    """Raise InvalidArgument if plotly, which ``page`` needs, is not installed."""
    _library()


def page(result: Analysis, moments: Sequence[Moment] = (), *, keys: KeyType = np.uint64) -> str:
    """Return an analysis as an HTML page.

    moments  earlier analyses of the table, ordered by time, for plots of its growth
    keys     type in which keys are shown: np.uint64 or np.int64

    Raises InvalidArgument if plotly is not installed.
    """
    library = _library()
    drawn = charts(result, moments)
    cards = "".join(_card(f"chart{i}", chart) for i, chart in enumerate(drawn)) + "".join(
        _list_card(head, getattr(result, field), keys) for field, head in LISTS
    )
    figures = {f"chart{i}": {"data": c.data, "layout": c.layout} for i, c in enumerate(drawn)}
    tiles = "".join(
        f"<div class=tile><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
        for name, value in facts(result)
    )
    return _PAGE.substitute(
        title=escape(title(result)),
        table=escape(result.table),
        subtitle=escape(title(result).partition(" · ")[2]),
        seconds=f"{result.seconds:.2g}",
        tiles=tiles,
        cards=cards,
        figures=_json(figures),
        library=library,
    )


def _library() -> str:
    """Return the source of plotly.js. Raises InvalidArgument if plotly is not installed."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise InvalidArgument(
            "an HTML report needs plotly: pip install 'embedding-ps[report]'"
        ) from error
    return str(get_plotlyjs())


def _json(value: Any) -> str:
    """Convert a value to JSON that is safe inside a script element."""
    text = json.dumps(value, allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _card(id: str, chart: Chart) -> str:
    """Return the HTML of a chart. The plot is drawn in its element with the id ``id``."""
    return (
        f"<section class=card><h2>{escape(chart.head)}</h2>"
        f"<p>{escape(chart.about)}</p><div class=plot id={id}></div>"
        f"<details><summary>Figures</summary>{_html_table(chart.columns, chart.lines)}</details>"
        "</section>"
    )


def _list_card(head: str, rows: RowList, keys: KeyType) -> str:
    """Return the HTML of a list of extreme rows, titled ``head``; "" if the list is empty."""
    if not len(rows.keys):
        return ""
    table = _html_table(EXTREMES, lines(rows, keys))
    heading = f"<h2>{escape(head)}</h2>"
    return f"<section class='card wide'>{heading}<div class=scroll>{table}</div></section>"


def _html_table(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return an HTML table.

    columns  column heads
    lines    text of the cells, one per column
    """
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>" for line in lines
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; script-src 'unsafe-inline';\
 style-src 'unsafe-inline'; img-src data: blob:">
<title>$title</title>
<style>
:root {
  color-scheme: light dark;
  --page: #f5f6f8; --card: #ffffff; --edge: #e1e4e9; --text: #1d2229; --soft: #5d6673;
  --grid: #e8eaee; --one: #2f6fde; --two: #e07b1a; --three: #159a80;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #111418; --card: #1a1e24; --edge: #2b313a; --text: #e5e8ec; --soft: #98a2b0;
    --grid: #2a3039; --one: #6ea0ff; --two: #f2a254; --three: #4fc9ad;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text);
       font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 32px 20px 48px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0; overflow-wrap: anywhere; }
header p, .card p, footer { color: var(--soft); }
header p { margin: 4px 0 20px; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); gap: 12px;
     margin: 0 0 16px; }
.tile, .card { background: var(--card); border: 1px solid var(--edge); border-radius: 10px; }
.tile { padding: 10px 14px; }
dt { color: var(--soft); font-size: 13px; }
dd { margin: 0; font-size: 17px; font-weight: 600; font-variant-numeric: tabular-nums;
     overflow-wrap: anywhere; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 520px), 1fr));
         gap: 16px; }
.card { padding: 16px 18px; min-width: 0; }
h2 { font-size: 17px; margin: 0; }
.card p { margin: 2px 0 6px; font-size: 14px; min-height: 2.9em; }
.plot { height: 300px; }
.wide { grid-column: 1 / -1; }
.scroll { overflow-x: auto; margin-top: 8px; }
details { margin-top: 6px; }
summary { cursor: pointer; color: var(--soft); font-size: 14px; }
table { border-collapse: collapse; width: 100%; font-size: 13px;
        font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 4px 8px; border-bottom: 1px solid var(--edge);
         white-space: nowrap; }
th { color: var(--soft); font-weight: 500; }
th:first-child, td:first-child { text-align: left; }
footer { margin-top: 24px; font-size: 13px; }
@media print { details > table { display: table; } .card { break-inside: avoid; } }
</style>
</head>
<body>
<main>
<header><h1>$table</h1><p>$subtitle</p></header>
<dl>$tiles</dl>
<div class="cards">$cards</div>
<footer>The analysis read every row once, in $seconds s. Counts on either side of a threshold are
exact. ◆ marks thresholds given by the caller.</footer>
</main>
<script type="application/json" id="figures">$figures</script>
<script>$library</script>
<script>
"use strict";
const figures = JSON.parse(document.getElementById("figures").textContent);
function themed(figure) {
  const style = getComputedStyle(document.documentElement);
  const color = name => style.getPropertyValue(name).trim();
  const axis = {
    gridcolor: color("--grid"), linecolor: color("--edge"), zerolinecolor: color("--grid"),
    automargin: true, fixedrange: true, title: { font: { size: 13 }, standoff: 8 },
  };
  const layout = {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: color("--text"), family: "system-ui, sans-serif", size: 12 },
    colorway: [color("--one"), color("--two"), color("--three")],
    margin: { l: 8, r: 8, t: 8, b: 8 }, bargap: 0.12,
    legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom" },
    hoverlabel: { bgcolor: color("--card"), bordercolor: color("--edge"),
                  font: { color: color("--text") } },
  };
  for (const [name, value] of Object.entries(figure.layout)) {
    layout[name] = name.includes("axis")
      ? { ...axis, ...value, title: { ...axis.title, ...value.title } } : value;
  }
  return layout;
}
function draw() {
  for (const [id, figure] of Object.entries(figures)) {
    Plotly.react(id, figure.data, themed(figure), { responsive: true, displayModeBar: false });
  }
}
draw();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
</script>
</body>
</html>
""")
