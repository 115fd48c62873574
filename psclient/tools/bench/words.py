"""A load test in words: its main figures, and sentences that say what they mean."""

from __future__ import annotations

from psclient.tools.bench.knee import problem
from psclient.tools.bench.result import Result
from psclient.tools.bench.sizing import sentences
from psclient.tools.bench.trial import Trial, point_of
from psclient.tools.figures import percent, size

FULL = 0.95  # share of busy processors beyond which a machine may be the bottleneck


def facts(trial: Trial) -> list[tuple[str, str]]:
    """Return the main figures, as (name, value)."""
    result, found = trial.result, []
    if trial.knee is not None:
        at = trial.knee.at
        found = [
            ("recommended rate", f"{rate(trial.knee.recommended)} requests/s"),
            ("knee", f"{rate(at.rate)} requests/s" if at else "not found"),
        ]
    p50, p99, p999 = result.latency.percentiles([50, 99, 99.9])
    return [
        *found,
        ("offered in this run", f"{rate(result.offered)} requests/s"),
        ("achieved", f"{rate(result.achieved)} requests/s"),
        ("keys pulled and pushed", f"{rate(result.keys)}/s"),
        ("rows and gradients", f"{size(result.bytes)}/s"),
        ("p50 latency", duration(p50)),
        ("p99 latency", duration(p99)),
        ("p99.9 latency", duration(p999)),
        ("longest", duration(result.latency.longest)),
        ("refused for now", percent(result.refused_share)),
        ("failed otherwise", percent(_share_otherwise(result))),
    ]


def _share_otherwise(result: Result) -> float:
    """Return the share of requests that failed and were not refused for now."""
    return (result.failed - result.refused) / max(result.failed + len(result.latency), 1)


def verdict(trial: Trial) -> list[str]:
    """Return sentences that say what the figures mean, and how large a cluster should be."""
    said = []
    if trial.interrupted:
        said.append(_interrupted_text(trial))
    if trial.knee is None:
        said.append(_run_text(trial))
    elif trial.knee.at is not None:
        said += [_recommended_text(trial), _knee_text(trial)]
    if trial.sizing is not None:
        said += sentences(trial.sizing, wanted=trial.objective.wanted)
    return [*said, *_use_text(trial)]


def _recommended_text(trial: Trial) -> str:
    """Return the rate to plan with, and what was measured at it."""
    knee, result = trial.knee, trial.result
    assert knee is not None
    cluster = "this shard" if trial.shards == 1 else f"these {trial.shards} shards"
    said = (
        f"Plan with at most {rate(knee.recommended)} requests per second for {cluster}, with"
        f" {trial.plan.batch * trial.plan.tables:,} keys each."
    )
    if trial.interrupted:
        return said
    if not trial.held:
        return (
            f"Do not plan with this test: at the rate that it would recommend,"
            f" {rate(knee.recommended)} requests per second,"
            f" {problem(point_of(result), trial.objective.p99)}. Repeat it while nothing else runs"
            " on these machines."
        )
    return (
        f"{said} At this rate, 99 % of the requests were answered within"
        f" {duration(result.latency.percentile(99))}; the objective is"
        f" {duration(trial.objective.p99)}."
    )


def _interrupted_text(trial: Trial) -> str:
    """Return which part of the test has ended."""
    seconds = f"The figures are those of the last run, of which {trial.result.seconds:.3g} s count."
    if trial.knee is None:
        return f"The test was interrupted. {seconds}"
    count = len(trial.knee.points)
    steps = "1 step that ended" if count == 1 else f"{count} steps that ended"
    return (
        f"The test was interrupted, so the knee and the recommended rate may be higher: they are"
        f" those of the {steps} before. {seconds}"
    )


def _knee_text(trial: Trial) -> str:
    """Return where the knee is, and why less is recommended."""
    knee, goal = trial.knee, trial.objective
    assert knee is not None
    assert knee.at is not None
    why = f" At {rate(knee.above.rate)}, {knee.why}." if knee.above else " No rate failed."
    return (
        f"The knee is at {rate(knee.at.rate)} requests per second: the highest rate at which 99 %"
        f" of the requests were answered within {duration(goal.p99)}, and all that arrived were"
        f" answered.{why} The recommended rate is {share(goal.safety)} of it,"
        f" {rate(knee.recommended)}: the rest is room for bursts, flushes, checkpoints, and the"
        " time after a restart."
    )


def _run_text(trial: Trial) -> str:
    """Return what a run without a sweep showed."""
    result = trial.result
    others = ""
    if result.failed:
        others = (
            f" Shards refused {result.refused:,} requests for now, and"
            f" {result.failed - result.refused:,} failed."
        )
    if not result.rate:
        return (
            f"Closed loop: {trial.plan.clients} clients, of which each waits for its answer before"
            f" it sends the next request, made {rate(result.achieved)} requests per second.{others}"
            " If the server stalls, such clients stop to send, so these latencies do not show what"
            " users see at a given rate. Use --rate or --sweep for that."
        )
    return (
        f"Open loop: {rate(result.offered)} requests per second arrived, {rate(result.achieved)}"
        f" succeeded. 99 % of these were answered within"
        f" {duration(result.latency.percentile(99))}.{others} Use --sweep to find the highest rate."
    )


def _use_text(trial: Trial) -> list[str]:
    """Return what the shards and the load generator used."""
    result, said = trial.result, []
    if trial.uses:
        cores = ", ".join(f"{each.cores:.2f}" for each in trial.uses)
        noun = "The shard" if len(trial.uses) == 1 else "The shards"
        engine = max(each.engine for each in trial.uses)
        rows = f" The thread that owns the rows was busy {share(engine)} of the time."
        said.append(f"{noun} used {cores} cores in this run.{rows if engine else ''}")
    own = ", ".join(f"{each:.2f}" for each in result.cores)
    lag = duration(result.lag.percentile(99))
    late = "" if not result.rate else f" 99 % of its requests started at most {lag} late."
    said.append(
        f"The load generator used {own} cores per process.{late} The processors of its machine were"
        f" {share(trial.busy)} busy, other programs included."
    )
    return said


def doubts(trial: Trial) -> list[str]:
    """Return why the figures may be those of something else than the shards; []: no reason."""
    found = trial.result.doubts()
    knee = trial.knee
    if knee is not None and not trial.interrupted:
        if knee.at is not None and not trial.held:
            found.append(
                "the run at the recommended rate did not keep the objective, so something disturbed"
                " it or the sweep; repeat the test"
            )
        last = knee.above or knee.at
        if last is not None:
            found += [f"at {rate(last.rate)} requests per second, {each}" for each in last.doubts]
    if trial.busy > FULL:
        found.append(
            f"the processors of the load generator's machine were {share(trial.busy)} busy: if the"
            " shards or other programs run there too, the shards alone carry more than this"
        )
    if trial.sizing is not None and not trial.sizing.limited:
        found.append(
            f"at the knee, the busiest shard used only {trial.knee_cores:.2f} cores, so that"
            " the load generator, its machine, the network or the disk was the limit"
        )
    return found


def share(part: float) -> str:
    """Format a share in whole percents: 0.7 as "70 %"."""
    return f"{100 * part:.0f} %"


def duration(seconds: float) -> str:
    """Format a duration: "123 us", "1.23 ms", "1.2 s"."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.3g} us"
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def rate(value: float) -> str:
    """Format a number per second: "1,234", "12.3"."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
