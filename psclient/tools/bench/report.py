"""A load test as one HTML page: figures, plots, and the size of a cluster in words.

The page is self-contained and has no scripts: the browser loads nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from html import escape

from psclient.tools import document
from psclient.tools.bench.latencies import SHOWN, Latencies
from psclient.tools.bench.plan import MIXES
from psclient.tools.bench.plots import STYLE, Axis, Curve, Mark, Plot, drawn, linear, logarithmic
from psclient.tools.bench.result import Result
from psclient.tools.bench.sizing import table
from psclient.tools.bench.trial import Trial
from psclient.tools.bench.words import doubts, duration, facts, rate, verdict
from psclient.tools.figures import percent, size

NINES = (50.0, 90.0, 99.0, 99.9, 99.99, 99.999)  # labels of the plot of percentiles
STEPS = 120  # points of a curve of percentiles

WORDS = """
dl { grid-template-columns: repeat(auto-fit, minmax(165px, 1fr)); }
.words { display: flex; flex-wrap: wrap; gap: 8px 32px; }
.words > div { flex: 1 1 300px; max-width: 75ch; min-width: 0; }
.words > aside { flex: 1 1 260px; min-width: 0; }
.words h3 { font-size: 14px; margin: 6px 0; color: var(--soft); font-weight: 500; }
.words p { color: var(--text); font-size: 15px; min-height: 0; margin: 6px 0; }
.lead { font-size: 19px; line-height: 1.45; max-width: 60ch; margin: 4px 0 18px; }
.words .warn { border-left: 3px solid var(--bad); padding-left: 10px; }
"""


def report(trial: Trial) -> str:
    """Return a load test as an HTML page."""
    knee = trial.knee
    cards = [_verdict(trial)]
    if knee is not None:
        cards += [_throughput(trial), _goodput(trial)]
    cards += [
        _percentiles(trial, wide=knee is None),
        _rates(trial.result),
        _over_time(trial.result),
    ]
    cards += [_kinds(trial.result), _settings(trial)]
    first = f"<p class=lead>{_prose(verdict(trial)[0])}</p>"
    body = f'{first}{document.tiles(facts(trial))}<div class="cards">{"".join(cards)}</div>'
    body += (
        "<footer>Latencies count from the moment at which a request was due, also if it was sent"
        " later because others were unanswered. Failed requests are not part of them."
        "</footer>"
    )
    return document.document(
        "Load test" if knee is None else "Load test: knee and recommended rate",
        f"Load test, mix {trial.plan.mix}: {MIXES[trial.plan.mix]}",
        f"{_when(trial.time)} · {trial.shards} {'shard' if trial.shards == 1 else 'shards'}"
        f" · {trial.plan.batch * trial.plan.tables:,} keys per request"
        f" · {trial.plan.clients} clients",
        body,
        style=STYLE + WORDS,
    )


# ---- words and tables


def _prose(sentence: str) -> str:
    """Return a sentence as HTML whose lines do not end between a number and its per cent sign."""
    return escape(sentence).replace(" %", "&nbsp;%")


def _verdict(trial: Trial) -> str:
    """Return the card that says what the figures mean."""
    text = "".join(f"<p class=warn>Doubt: {_prose(each)}.</p>" for each in doubts(trial))
    text += "".join(f"<p>{_prose(each)}</p>" for each in verdict(trial)[1:])
    inner = f"<div>{text}</div>"
    if trial.sizing is not None and (lines := table(trial.sizing)):
        numbers = document.table(("shards", "keys of a shard per request", "requests/s"), lines)
        inner += f"<aside><h3>Recommended rates of other clusters</h3>{numbers}</aside>"
    head = "What this test says" if trial.knee is None else "How large a cluster"
    return document.card(head, "", f"<div class=words>{inner}</div>", wide=True)


def _kinds(result: Result) -> str:
    """Return the card with the latencies of each kind of request, and of failed ones."""
    columns = ("requests", "count", *(f"p{each:g}" for each in SHOWN), "max")
    lines = [_line(kind, each) for kind, each in result.kinds.items()]
    if len(lines) != 1:
        lines.insert(0, _line("all that succeeded", result.latency))
    lines.append(_line("same, from their actual start", result.service))
    lines += [_line(f"failed: {code}", each) for code, each in result.errors.items()]
    inner = f"<div class=scroll tabindex=0>{document.table(columns, lines)}</div>"
    about = (
        "Failed requests are counted apart, so that quick refusals do not look like quick answers."
    )
    return document.card("Requests", about, inner, wide=True)


def _line(name: str, each: Latencies) -> list[str]:
    found = [duration(value) for value in (*each.percentiles(SHOWN), each.longest)]
    return [name, f"{len(each):,}", *found]


def _settings(trial: Trial) -> str:
    """Return the card with all settings and the facts of the machine."""
    host, lines = trial.host, [(name, f"{value}") for name, value in trial.plan.as_json().items()]
    lines += [
        ("seconds", f"{trial.times.seconds:g}"),
        ("warm-up", f"{trial.times.warmup:g} s"),
        ("seconds of a step", f"{trial.times.step:g}"),
        ("objective for p99", duration(trial.objective.p99)),
        ("release", trial.release),
        ("processor", host.processor),
        ("cores", f"{host.cores}"),
        ("memory", size(host.memory)),
        ("system", host.system),
        ("Python", host.python),
    ]
    about = "Everything that is needed to repeat this test, and the machine of the load generator."
    inner = document.folded("Show", document.table(("setting", "value"), lines))
    return document.card("Settings", about, inner, wide=True)


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))


# ---- plots


def _throughput(trial: Trial) -> str:
    """Return the card with latency by rate, up to the knee and beyond."""
    knee, goal = trial.knee, trial.objective
    assert knee is not None
    points = knee.points
    curves = [
        Curve(name, color, [(each.achieved, getattr(each, field)) for each in points])
        for name, color, field in (
            ("p50", "one", "p50"),
            ("p99", "two", "p99"),
            ("p99.9", "three", "p999"),
        )
    ]
    marks = [Mark(f"objective for p99: {duration(goal.p99)}", "bad", y=goal.p99)]
    if knee.at is not None:
        marks += [
            Mark("knee", "soft", x=knee.at.rate),
            Mark("recommended", "soft", x=knee.recommended, before=True),
        ]
    values = [value for each in points for value in (each.p50, each.p99, each.p999)]
    plot = Plot(
        label="Latency by achieved rate",
        x=linear("achieved requests per second", _highest(trial), rate),
        y=logarithmic("latency", [*values, goal.p99], duration),
        curves=curves,
        marks=marks,
    )
    about = "Latency at rising rates. Beyond the knee, it rises without the rate."
    inner = drawn(plot) + _points(trial)
    return document.card("Throughput and latency", about, inner, wide=True)


def _points(trial: Trial) -> str:
    """Return the table of all rates of a sweep."""
    assert trial.knee is not None
    columns = ("rate", "offered", "achieved", "failed", "p50", "p99", "p99.9", "max")
    lines = [
        [
            rate(each.rate),
            rate(each.offered),
            rate(each.achieved),
            percent(each.failed),
            *map(duration, (each.p50, each.p99, each.p999, each.longest)),
        ]
        for each in trial.knee.points
    ]
    return document.folded("Figures", document.table(columns, lines))


def _goodput(trial: Trial) -> str:
    """Return the card with the achieved rate by offered rate."""
    assert trial.knee is not None
    points = trial.knee.points
    high = max(_highest(trial))
    plot = Plot(
        label="Achieved rate by offered rate",
        x=linear("offered requests per second", _highest(trial), rate),
        y=linear("achieved requests per second", _highest(trial), rate),
        curves=[
            Curve("all are answered", "soft", [(0.0, 0.0), (high, high)], dashed=True),
            Curve("achieved", "one", [(each.offered, each.achieved) for each in points]),
        ],
    )
    about = (
        "Requests that succeeded, by those that arrived. Below the dashed line, some are missing."
    )
    return document.card("Offered and achieved", about, drawn(plot))


def _highest(trial: Trial) -> list[float]:
    """Return rates that must be on the axes of a sweep."""
    assert trial.knee is not None
    found = [value for each in trial.knee.points for value in (each.offered, each.achieved)]
    return [*found, trial.knee.recommended, 1.0]


def _percentiles(trial: Trial, *, wide: bool) -> str:
    """Return the card with the latency at each percentile, in the manner of HdrHistogram."""
    result = trial.result
    names = [("from the intended start", "one", result.latency)]
    if result.rate:
        names.append(("from the actual start", "two", result.service))
    curves = [Curve(name, color, _curve(each)) for name, color, each in names]
    count = max(len(result.latency), 10)
    shown = [each for each in NINES if _nines(each) <= count]
    x = Axis("percentile", 1.0, count, [(_nines(each), f"{each:g} %") for each in shown], log=True)
    values = [y for curve in curves for _, y in curve.points]
    plot = Plot(
        label="Latency by percentile",
        x=x,
        y=logarithmic("latency", values, duration),
        curves=curves,
    )
    about = (
        f"How long the slowest requests took, at {rate(result.offered)} requests per second. The"
        " space between the curves is time that requests waited to be sent."
    )
    if not result.rate:
        about = "How long the slowest requests took, in a closed loop."
    return document.card("Percentiles", about, drawn(plot), wide=wide)


def _curve(each: Latencies) -> list[tuple[float, float]]:
    """Return points (1 / share of slower requests, latency), up to the longest latency."""
    count = len(each)
    if not count:
        return []
    shares = [count ** (i / STEPS) for i in range(STEPS + 1)]
    wanted = [100 * (1 - 1 / share) for share in shares]
    return list(zip(shares, each.percentiles(wanted), strict=True))


def _nines(percentile: float) -> float:
    """Return 1 / share of slower requests, where a percentile is on the axis."""
    return 1 / (1 - percentile / 100)


def _rates(result: Result) -> str:
    """Return the card with the rates per second of the run."""
    series = [each for each in result.series if each.second]
    refused = [(each.second, each.refused / each.seconds) for each in series]
    failed = [
        (each.second, (sum(each.errors.values()) - each.refused) / each.seconds) for each in series
    ]
    curves = [
        Curve("offered", "soft", [(s.second, s.offered / s.seconds) for s in series], dashed=True),
        Curve("achieved", "one", [(s.second, s.ok / s.seconds) for s in series]),
    ]
    for name, color, points in (("refused", "two", refused), ("failed", "bad", failed)):
        if any(value for _, value in points):
            curves.append(Curve(name, color, points))
    plot = Plot(
        label="Requests per second, over time",
        x=_seconds(series),
        y=linear("requests per second", [y for each in curves for _, y in each.points], rate),
        curves=curves,
    )
    return document.card("Rates over time", "Requests per second of the run.", drawn(plot))


def _over_time(result: Result) -> str:
    """Return the card with the latencies per second of the run."""
    series = [each for each in result.series if each.second and len(each.latency)]
    found = [(each.second, each.latency.percentiles([50, 99]), each.latency) for each in series]
    curves = [
        Curve("p50", "one", [(second, values[0]) for second, values, _ in found]),
        Curve("p99", "two", [(second, values[1]) for second, values, _ in found]),
        Curve("max", "three", [(second, each.longest) for second, _, each in found]),
    ]
    plot = Plot(
        label="Latency over time",
        x=_seconds(series),
        y=logarithmic("latency", [y for each in curves for _, y in each.points], duration),
        curves=curves,
    )
    about = "Latency of the requests that were answered in each second."
    return document.card("Latency over time", about, drawn(plot))


def _seconds(series: Sequence[object]) -> Axis:
    """Return the axis of the seconds of a run."""
    axis = linear("seconds", [float(max(len(series), 1))], lambda value: f"{value:g}")
    return Axis(
        axis.title, 0.0, float(max(len(series), 1)), [t for t in axis.ticks if t[0] <= len(series)]
    )
