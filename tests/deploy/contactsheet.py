"""Draw all panels of the dashboard with the data of a Prometheus, as an HTML page and a picture.

    python -m tests.deploy.contactsheet http://127.0.0.1:9090 sheet.html [sheet.png]

This is not Grafana, but it has the same panels, queries, units and legends at the same places, for
the last two minutes. The picture needs Chromium.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from psclient.tools.figures import size_ticks

Ask = Callable[[str], list[dict[str, Any]]]  # PromQL expression -> series of its result
SECONDS, STEP = 120, 2  # length of the time axis, and distance of two points
CELL = (66, 36)  # width and height of a cell of Grafana's grid, in pixels
COLORS = ("#7eb26d", "#eab839", "#6ed0e0", "#ef843c", "#e24d42", "#1f78c1", "#ba43a9", "#705da0")
UNITS: dict[str, dict[str, Any]] = {  # Grafana's unit -> format of the axis
    "s": {"exponentformat": "SI", "ticksuffix": "s"},
    "bytes": {"tickmode": "array"},
    "binBps": {"tickmode": "array", "ticksuffix": "/s"},
    "reqps": {"exponentformat": "SI", "ticksuffix": " req/s"},
    "cps": {"exponentformat": "SI", "ticksuffix": "/s"},
    "percentunit": {"tickformat": ".3~%"},
    "short": {"exponentformat": "SI"},
}
HEAD = """<!doctype html><meta charset="utf-8"><title>embedding-ps</title>
<style>
body { background: #111217; color: #ccccdc; font: 14px system-ui, sans-serif; margin: 12px; }
#grid { display: grid; grid-template-columns: repeat(24, %dpx); grid-auto-rows: %dpx; gap: 4px; }
.panel { background: #181b1f; border: 1px solid #2c3235; overflow: hidden; }
.row { font-weight: 600; padding-top: 8px; }
</style>
<div id="grid"></div>
<script>%s</script>
<script>
for (const [box, title, figure] of %s) {
  const place = document.createElement("div");
  place.style.gridArea = `${box.y + 1} / ${box.x + 1} / span ${box.h} / span ${box.w}`;
  place.className = figure ? "panel" : "row";
  document.getElementById("grid").append(place);
  if (figure) Plotly.newPlot(place, figure.data, figure.layout, {staticPlot: true});
  else place.textContent = title;
}
</script>
"""


def filled(expression: str, window: str = "10s") -> str:
    """Return an expression of the dashboard with values for its variables.

    window  value of $__rate_interval
    """
    return re.sub(r"\$(job|shard)", ".+", expression.replace("$__rate_interval", window))


def asker(url: str, end: float) -> Ask:
    """Return a function that asks a Prometheus for the result of an expression.

    end  Unix time of the end of the time axis
    """

    def ask(expression: str) -> list[dict[str, Any]]:
        times = {"start": end - SECONDS, "end": end, "step": STEP}
        query = urllib.parse.urlencode({"query": filled(expression), **times})
        where = f"{url}/api/v1/query_range?{query}"
        with urllib.request.urlopen(where, timeout=60) as answer:  # noqa: S310
            return list(json.load(answer)["data"]["result"])

    return ask


def page(panels: list[dict[str, Any]], ask: Ask) -> str:
    """Return an HTML page with the panels of a dashboard, which are in Grafana's JSON model."""
    drawn = []
    for panel in panels:
        figure = None if panel["type"] == "row" else json.loads(_figure(panel, ask).to_json())
        drawn.append((panel["gridPos"], panel["title"], figure))
    data = json.dumps(drawn).replace("</", "<\\/")
    return HEAD % (*CELL, get_plotlyjs(), data)


def picture(html: Path, png: Path) -> None:
    """Draw an HTML page with Chromium."""
    rows = json.loads(
        re.search(r"const \[box, title, figure\] of (.*)\) \{$", html.read_text(), re.M)[1]
    )
    height = max(box["y"] + box["h"] for box, _, _ in rows) * (CELL[1] + 4) + 40
    width = 24 * (CELL[0] + 4) + 40
    chromium = shutil.which("chromium") or "chromium"
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [f"--window-size={width},{height}", "--virtual-time-budget=20000"]
    command += [f"--user-data-dir={png.parent / 'chromium'}", f"--screenshot={png}"]
    subprocess.run([*command, html.as_uri()], check=True, capture_output=True, timeout=180)


def _figure(panel: dict[str, Any], ask: Ask) -> go.Figure:
    """Return a panel as a figure of Plotly."""
    figure = go.Figure()
    (_heatmap if panel["type"] == "heatmap" else _lines)(figure, panel, ask)
    figure.update_layout(
        title={"text": panel["title"], "font": {"size": 14}, "x": 0.02, "y": 0.97},
        width=panel["gridPos"]["w"] * (CELL[0] + 4) - 4,
        height=panel["gridPos"]["h"] * (CELL[1] + 4) - 4,
        margin={"l": 64, "r": 12, "t": 34, "b": 8},
        template="plotly_dark",
        paper_bgcolor="#181b1f",
        plot_bgcolor="#181b1f",
        colorway=COLORS,
        showlegend=panel["type"] != "heatmap",
        legend={"orientation": "h", "y": -0.14, "yanchor": "top", "font": {"size": 11}},
    )
    figure.update_xaxes(type="date", tickformat="%H:%M:%S", nticks=5)
    return figure


def _lines(figure: go.Figure, panel: dict[str, Any], ask: Ask) -> None:
    """Add the lines of a panel, and the red line of its threshold."""
    defaults = panel["fieldConfig"]["defaults"]
    stacked = defaults.get("custom", {}).get("stacking", {}).get("mode") == "normal"
    for target in panel["targets"]:
        for series in ask(target["expr"]):
            x, y = _points(series)
            legend = _legend(target["legendFormat"], series["metric"])
            group = {"stackgroup": "one"} if stacked else {}
            figure.add_scatter(x=x, y=y, name=legend, mode="lines", line={"width": 1.5}, **group)
    highest = max((max(line.y, default=0) for line in figure.data), default=0)
    for step in defaults.get("thresholds", {}).get("steps", []):
        if step["value"] is not None and step["value"] < 4 * highest:  # otherwise it is far above
            figure.add_hline(step["value"], line={"color": "#e02f44", "dash": "dash", "width": 1.5})
    if not figure.data:
        figure.add_annotation(text="No data", showarrow=False, font={"size": 16})
    axis = {**UNITS[defaults["unit"]]}
    if axis.get("tickmode") == "array":
        heights = [max(line.y, default=0) for line in figure.data]
        most = sum(heights) if stacked else highest
        axis["tickvals"], axis["ticktext"] = size_ticks(most)
    figure.update_yaxes(rangemode="tozero", nticks=6, **axis)


def _heatmap(figure: go.Figure, panel: dict[str, Any], ask: Ask) -> None:
    """Add the buckets of a histogram: the brighter, the more observations."""
    found = ask(panel["targets"][0]["expr"])
    buckets = sorted(found, key=lambda series: float(series["metric"]["le"]))
    rows, below = [], [0.0] * 10_000
    for series in buckets:
        x, counts = _points(series)
        rows.append([max(0.0, count - low) for count, low in zip(counts, below, strict=False)])
        below = counts
    bounds = [series["metric"]["le"] for series in buckets]
    figure.add_heatmap(x=x, y=bounds, z=rows, colorscale="Blues_r", showscale=False)
    figure.update_yaxes(type="category", ticksuffix=" s", nticks=12)


def _points(series: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Return times, in milliseconds, and values of a series. Points that are not numbers are left
    out.
    """
    points = [(1000 * at, float(value)) for at, value in series["values"] if value != "NaN"]
    return [at for at, _ in points], [value for _, value in points]


def _legend(form: str, labels: dict[str, str]) -> str:
    """Return a legend with the values of labels in the place of {{label}}."""
    return re.sub(r"\{\{\s*(\w+)\s*\}\}", lambda match: labels.get(match[1], ""), form)


def main(url: str, html: str, *png: str) -> None:
    """Draw the dashboard of the repository from a Prometheus."""
    dashboard = Path(__file__).parents[2] / "deploy/components/monitoring/dashboard.json"
    panels = json.loads(dashboard.read_text())["panels"]
    Path(html).write_text(page(panels, asker(url, time.time())))
    for each in png:
        picture(Path(html).resolve(), Path(each).resolve())


if __name__ == "__main__":
    main(*sys.argv[1:])
