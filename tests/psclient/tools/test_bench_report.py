"""The report of a load test: nothing is loaded, all figures are there, it fits every screen."""

from __future__ import annotations

import io
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from psclient.tools.bench.knee import Knee, Point, knee_of
from psclient.tools.bench.latencies import Latencies
from psclient.tools.bench.live import Board
from psclient.tools.bench.plan import Plan
from psclient.tools.bench.plots import Axis, linear, logarithmic
from psclient.tools.bench.report import report
from psclient.tools.bench.result import Result, Second
from psclient.tools.bench.shards import ShardUse
from psclient.tools.bench.sizing import Cost
from psclient.tools.bench.trial import Objective, Times, Trial
from psclient.tools.bench.words import doubts, facts, verdict

EVIL = "</style><script>alert(1)</script><img src=http://example.org/x onerror=alert(1)>"
CHROMIUM = shutil.which("chromium")


def latencies(count: int, scale: float = 0.002, seed: int = 0) -> Latencies:
    drawn = Latencies()
    drawn.record(np.random.default_rng(seed).lognormal(np.log(scale), 0.5, count))
    return drawn


def second(number: int, ok: int = 400, failed: int = 0) -> Second:
    errors = {"OVERLOADED": failed} if failed else {}
    return Second(
        second=number,
        seconds=1.0,
        offered=ok + failed,
        ok=ok,
        refused=failed,
        keys=1000 * ok,
        bytes=10**6,
        errors=errors,
        latency=latencies(ok, seed=number),
    )


def a_result(**changes: Any) -> Result:
    values: dict[str, Any] = {
        "rate": 400.0,
        "seconds": 5.0,
        "warmup": 1.0,
        "offered": 401.0,
        "achieved": 399.0,
        "keys": 399_000.0,
        "bytes": 34.5e6,
        "refused": 1,
        "waited": 3,
        "latency": latencies(2000),
        "service": latencies(2000, 0.0015),
        "kinds": {"pull": latencies(1900), "push": latencies(100, 0.004)},
        "errors": {EVIL: latencies(1, 0.0001)},
        "lag": latencies(2000, 0.0001),
        "cores": [0.25, 0.5],
        "series": [second(number, failed=number == 3) for number in range(6)],
    }
    return Result(**{**values, **changes})


def point(rate: float, p99: float, achieved: float) -> Point:
    return Point(
        rate=rate, seconds=5.0, offered=rate, achieved=achieved, failed=0.0,
        p50=p99 / 4, p99=p99, p999=2 * p99, longest=3 * p99,
    )  # fmt: skip


POINTS = [
    point(100, 0.004, 100),
    point(200, 0.006, 200),
    point(400, 0.01, 399),
    point(600, 0.3, 512),
]


def knee(**changes: Any) -> Knee:
    """A sweep whose points differ from POINTS in these fields."""
    return knee_of([replace(each, **changes) for each in POINTS], p99=0.02)


def a_trial(*, sweep: bool = True, **changes: Any) -> Trial:
    values: dict[str, Any] = {
        "plan": Plan(mix="B", prefix=EVIL),
        "objective": Objective(wanted=2000.0),
        "times": Times(),
        "shards": 2,
        "row_bytes": 356.0,
        "result": a_result(),
        "uses": [ShardUse(0.9, 0.5), ShardUse(0.8, 0.4)],
        "busy": 0.5,
        "knee": knee_of(POINTS, p99=0.02) if sweep else None,
        "cost": Cost(200e-6, 1.5e-6) if sweep else None,
    }
    return Trial(**{**values, **changes})


class Page(HTMLParser):
    """Elements and attributes of a page, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += f"{data}\n"


def pages() -> dict[str, str]:
    closed = a_result(rate=0.0)
    nothing = a_result(
        latency=Latencies(),
        service=Latencies(),
        kinds={},
        errors={},
        refused=0,
        series=[],
        achieved=0.0,
    )
    none = knee_of([point(100, 1.0, 100)], p99=0.02)
    return {
        "sweep": report(a_trial()),
        "run": report(a_trial(sweep=False)),
        "closed": report(a_trial(sweep=False, result=closed)),
        "nothing succeeded": report(a_trial(sweep=False, result=nothing, uses=[])),
        "no knee": report(a_trial(knee=none, cost=None)),
    }


@pytest.mark.parametrize("kind", pages())
def test_the_page_loads_nothing_and_runs_nothing(kind: str) -> None:
    text = pages()[kind]
    page = Page(text)
    assert not {tag for tag, _ in page.tags} & {"script", "img", "link", "iframe", "object"}
    for _, attributes in page.tags:
        assert not {name for name in attributes if name.startswith("on")}
        assert not {"src", "href", "xlink:href"} & set(attributes)
    assert "url(" not in text
    assert "@import" not in text
    policy = next(each["content"] for _, each in page.tags if "http-equiv" in each)
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data: blob:"
    assert EVIL in page.text  # as text
    assert len(text) < 60_000
    assert not re.search(r"\bnan\b|\binf\b", text)


def test_every_figure_is_on_the_page() -> None:
    trial = a_trial()
    page = Page(report(trial))
    for name, value in facts(trial):
        assert name in page.text
        assert value in page.text
    for sentence in (*verdict(trial), *doubts(trial)):
        assert sentence.replace(" %", "\xa0%") in page.text  # a line does not end in between
    assert "\xa0%" in page.text
    for each in POINTS:
        assert f"{each.rate:,.0f}" in page.text
    for words in ("failed: ", "pull", "push", "same, from their actual start", "recommended"):
        assert words in page.text
    for name, value in trial.plan.as_json().items():
        assert name in page.text
        assert f"{value}" in page.text


def test_plots_have_one_dot_per_point_within_their_frame() -> None:
    text = report(a_trial())
    [latency, *_] = re.findall(r"<figure.*?</figure>", text, re.DOTALL)
    assert latency.count("class='two dot'") == len(POINTS)
    for figure in re.findall(r"<figure.*?</figure>", text, re.DOTALL):
        numbers = [float(each) for each in re.findall(r"[ML ](\d+\.\d)", figure)]
        assert all(0 <= each <= 1000 for each in numbers)


# ---- words


def test_the_verdict_says_what_a_sweep_found() -> None:
    said = " ".join(verdict(a_trial()))
    assert "The knee is at 400 requests per second" in said
    assert "At 600, only 512 of 600 requests per second were answered" in said
    assert "The recommended rate is 70 % of it, 280" in said
    assert said.startswith("Plan with at most 280 requests per second for these 2 shards")
    assert not doubts(a_trial())


@pytest.mark.parametrize(
    ("changes", "doubt"),
    [
        ({"result": a_result(cores=[0.2, 0.95])}, "used 0.95 cores, near the one core"),
        ({"result": a_result(lag=latencies(2000, 0.02))}, "late although the load generator had"),
        ({"result": a_result(waited=500)}, "25 % of the requests waited because as many as"),
        ({"busy": 0.99}, "the load generator's machine were 99 % busy"),
        ({"knee": knee(shard=0.2)}, "the busiest shard used only 0.20 cores"),
        (
            {"knee": knee(doubts=("the network is slow",))},
            "at 600 requests per second, the network",
        ),
        (
            {"result": a_result(latency=latencies(2000, 0.1))},
            "the run at the recommended rate did not keep",
        ),
    ],
)
def test_limits_of_the_load_generator_do_not_pass_unnoticed(
    changes: dict[str, Any], doubt: str
) -> None:
    trial = replace(a_trial(), **changes)
    [found] = doubts(trial)
    assert doubt in found
    assert found.replace(" %", "\xa0%") in Page(report(trial)).text


def test_a_test_that_ctrl_c_ended_says_so_and_promises_nothing() -> None:
    for trial in (a_trial(interrupted=True), a_trial(sweep=False, interrupted=True)):
        said = verdict(trial)
        assert said[0].startswith("The test was interrupted")
        assert not any("shards carry" in each for each in said)
        assert trial.sizing is None
        assert not doubts(trial)
        assert said[0] in Page(report(trial)).text


# ---- axes


def test_axes_have_few_round_labels() -> None:
    for high in (0.7, 3.0, 12.0, 99.0, 123.0, 4567.0):
        axis = linear("x", [high], str)
        assert high <= axis.high < 1.5 * high
        assert 3 <= len(axis.ticks) <= 7
        assert (axis.at(0.0), axis.at(axis.high)) == (0.0, 1.0)
    for values in ([0.001], [0.001, 0.0011], [1e-4, 3.0], [0.003, 0.05], []):
        axis = logarithmic("y", values, str)
        assert all(axis.low <= each <= axis.high for each in values)
        assert 2 <= len(axis.ticks) <= 9
    assert Axis("x", 1.0, 100.0, [], log=True).at(10.0) == pytest.approx(0.5)


# ---- the terminal


def test_the_terminal_shows_all_runs() -> None:
    notes: list[str] = []
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, width=160)
    for each in (console, Console(file=io.StringIO())):
        with Board(each, notes.append) as board:
            board.begin("closed loop", 0.0)
            for number in range(3):
                board.second(second(number))
            board.result(a_result(offered=123.0))
            board.begin("sweep", 400.0)
            for number in range(3):
                board.second(second(number, failed=5))
    for words in ("closed loop", "sweep 400/s", "so far", "last second", "p99.9", "achieved/s"):
        assert words in shown.getvalue()
    assert [each.split(":")[0] for each in notes] == ["closed loop", "sweep 400/s"]
    assert "offered/s 123, achieved/s 399" in notes[0]  # those of the result
    assert "refused 1, failed 0" in notes[0]
    assert "offered/s 405, achieved/s 400" in notes[1]
    assert "refused 10, failed 0" in notes[1]


# ---- a browser


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_the_page_fits_every_screen(tmp_path: Path) -> None:
    from axe_playwright_python.sync_playwright import Axe
    from playwright.sync_api import sync_playwright

    path = tmp_path / "report.html"
    path.write_text(report(a_trial()), encoding="utf-8")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for width in (1280, 390):
            for scheme in ("light", "dark"):
                page = browser.new_page(
                    viewport={"width": width, "height": 900},
                    color_scheme=scheme,  # type: ignore[arg-type]
                )
                seen: list[str] = []
                page.on("request", lambda request, seen=seen: seen.append(request.url))
                page.on("console", lambda message, seen=seen: seen.append(message.text))
                page.goto(path.as_uri())
                assert page.evaluate("document.documentElement.scrollWidth") == width
                assert seen == [path.as_uri()]
                found = Axe().run(page)
                assert found.violations_count == 0, found.generate_report()
                page.close()
        browser.close()
