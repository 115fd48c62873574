"""An analysis as one HTML page with plots.

The page is self-contained: it includes plotly.js, and a content security policy forbids the browser
to load anything. Each plot comes with a table of its numbers. All text from data is escaped.
Needs plotly: pip install 'embedding-ps[report]'.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from string import Template
from typing import Any

import numpy as np

from psclient.errors import InvalidArgument
from psclient.tools.arrow import KeyType
from psclient.tools.charts import Chart, charts
from psclient.tools.document import card, document, folded, table, tiles
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
    footer = (
        f"<footer>The analysis read every row once, in {result.seconds:.2g} s. Counts on either"
        " side of a threshold are exact. ◆ marks thresholds given by the caller.</footer>"
    )
    return document(
        title(result),
        result.table,
        title(result).partition(" · ")[2],
        f'{tiles(facts(result))}<div class="cards">{cards}</div>{footer}',
        scripts=_SCRIPTS.substitute(figures=_json(figures), library=library),
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
    numbers = folded("Figures", table(chart.columns, chart.lines))
    return card(chart.head, chart.about, f"<div class=plot id={id}></div>{numbers}")


def _list_card(head: str, rows: RowList, keys: KeyType) -> str:
    """Return the HTML of a list of extreme rows, titled ``head``; "" if the list is empty."""
    if not len(rows.keys):
        return ""
    inner = f"<div class=scroll tabindex=0>{table(EXTREMES, lines(rows, keys))}</div>"
    return card(head, "", inner, wide=True)


_SCRIPTS = Template("""<script type="application/json" id="figures">$figures</script>
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
""")
