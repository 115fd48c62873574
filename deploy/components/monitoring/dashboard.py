"""Write dashboard.json, the Grafana dashboard.

    python -m deploy.components.monitoring.dashboard > deploy/components/monitoring/dashboard.json

The panels are in serving.py and storing.py. A test compares the file with the output of ``text``.
"""

from __future__ import annotations

import json
from itertools import count

from grafana_foundation_sdk.builders import common, dashboard, heatmap, prometheus, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as options
from grafana_foundation_sdk.models import dashboard as model
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from deploy.components.monitoring.panel import Kind, Panel
from deploy.components.monitoring.serving import SERVING
from deploy.components.monitoring.storing import STORING

ORDER = (  # of the rows
    *("Overview", "Traffic", "Latency", "Engine", "Tiers", "Admission and eviction"),
    *("Log and freshness", "Checkpoints", "Saturation", "Security", "GPU"),
)
WIDTH, HEIGHT = 24, 8  # of the page and of a panel, in cells of Grafana's grid
SOURCE = model.DataSourceRef(type_val="prometheus", uid="${datasource}")


def text() -> str:
    """Return the contents of dashboard.json."""
    return json.dumps(build(), cls=JSONEncoder, indent=1, sort_keys=True) + "\n"


def build() -> model.Dashboard:
    """Return the dashboard. The ids of its rows and panels are 1, 2, 3, ... in their order."""
    builder = (
        dashboard.Dashboard("embedding-ps")
        .uid("embedding-ps")
        .tags(["embedding-ps"])
        .refresh("30s")
        .time("now-1h", "now")
        .timezone("browser")
        .tooltip(model.DashboardCursorSync.CROSSHAIR)
        .with_variable(dashboard.DatasourceVariable("datasource").type("prometheus"))
        .with_variable(_choice("job", ""))
        .with_variable(_choice("shard", '{job=~"$job"}'))
    )
    rows, ids = {**SERVING, **STORING}, count(1)
    for title in ORDER:
        builder.with_row(dashboard.Row(title).id(next(ids)))
        panels = rows.pop(title)
        for panel, width in zip(panels, _widths(len(panels)), strict=True):
            builder.with_panel(_drawn(panel).id(next(ids)).span(width).height(HEIGHT))
    assert not rows, f"rows without a place in ORDER: {list(rows)}"
    return builder.build()


def _widths(count: int) -> list[int]:
    """Return the widths of a row's panels: three on each line, or two where three leave a gap."""
    pairs = {0: 0, 1: min(count, 4), 2: 2}[count % 3]
    wide = WIDTH // 2 if count > 1 else WIDTH
    return [WIDTH // 3] * (count - pairs) + [wide] * pairs


def _drawn(panel: Panel) -> timeseries.Panel | heatmap.Panel:
    """Return a panel with its title, explanation, queries and unit, in the way of its kind."""
    drawn = _heatmap(panel) if panel.kind is Kind.HEATMAP else _lines(panel)
    drawn.title(panel.title).description(panel.help).datasource(SOURCE)
    for at, (legend, expression) in enumerate(panel.lines.items()):
        query = prometheus.Dataquery().ref_id(chr(ord("A") + at)).expr(expression)
        if panel.kind is Kind.HEATMAP:
            query.format(PromQueryFormat.HEATMAP)
        drawn.with_target(query.legend_format(legend))
    return drawn


def _lines(panel: Panel) -> timeseries.Panel:
    """Return an empty panel with lines, or with areas on top of each other."""
    legend = common.VizLegendOptions().show_legend(True).placement(options.LegendPlacement.BOTTOM)
    drawn = timeseries.Panel().unit(panel.unit).min(0).legend(legend).fill_opacity(10)
    drawn.tooltip(common.VizTooltipOptions().mode(options.TooltipDisplayMode.MULTI))
    if panel.kind is Kind.STACKED:
        drawn.fill_opacity(40).stacking(common.StackingConfig().mode(options.StackingMode.NORMAL))
    if panel.limit is not None:
        line = options.GraphThresholdsStyleMode.LINE
        steps = [
            model.Threshold(value=None, color="green"),
            model.Threshold(value=panel.limit, color="red"),
        ]
        drawn.thresholds(
            dashboard.ThresholdsConfig().mode(model.ThresholdsMode.ABSOLUTE).steps(steps)
        )
        drawn.thresholds_style(common.GraphThresholdsStyleConfig().mode(line))
    return drawn


def _heatmap(panel: Panel) -> heatmap.Panel:
    """Return an empty panel for the buckets of a histogram."""
    color = heatmap.HeatmapColorOptions().mode(HeatmapColorMode.SCHEME).scheme("Blues").steps(64)
    axis = heatmap.YAxisConfig().unit(panel.unit)
    return heatmap.Panel().calculate(False).color(color).y_axis(axis)


def _choice(label: str, among: str) -> dashboard.QueryVariable:
    """Return the field in which a reader selects values of ``label``; default: all.

    among  PromQL selector of the series whose values are offered
    """
    return (
        dashboard.QueryVariable(label)
        .datasource(SOURCE)
        .query(f"label_values(ps_version{among}, {label})")
        .refresh(model.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .multi(True)
        .include_all(True)
        .current(model.VariableOption(text="All", value="$__all"))
    )


if __name__ == "__main__":
    print(text(), end="")
