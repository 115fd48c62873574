"""The page and the tables of the terminal: every figure is there, nothing comes from outside."""

from __future__ import annotations

import html
import io
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from psclient.errors import InvalidArgument
from psclient.tools import figures as known
from psclient.tools import page as pages
from psclient.tools import terminal
from psclient.tools.history import Moment
from psclient.tools.keys import Deletion, KeyInfo
from psclient.tools.summary import Analysis, Histogram, RowList, Tier

ROOT = Path(__file__).parents[3]

EVIL = "</script><img src=x onerror=alert(1)>&\"'"


def histogram(edges: list[float], counts: list[int]) -> Histogram:
    return Histogram(np.array(edges), np.array(counts))


def rows(*keys: int) -> RowList:
    n = len(keys)
    ones, norms = np.ones(n, np.uint64), np.full(n, 0.25)
    steps, shards = np.full(n, 77), np.zeros(n, np.int64)
    return RowList(np.array(keys, np.uint64), ones, steps, ones, norms, (EVIL,) * n, shards)


def an_analysis(**changes: Any) -> Analysis:
    values: dict[str, Any] = {
        "table": "ads/user",
        "checkpoint": None,
        "asked": {"frequencies": (3.0,), "ages": (5.0,), "norms": (0.7,)},
        "time": 1_700_000_000.0,
        "seconds": 0.5,
        "dim": 4,
        "row_bytes": 56,
        "optimizer": "adagrad",
        "versions": (12, 34),
        "step": 1234,
        "rows": 1000,
        "shard_rows": (600, 400),
        "occurrences": 5000,
        "norm_mean": 0.5,
        "frequencies": histogram([1, 2, 3, 4, 8, 16], [0, 500, 200, 100, 150, 50, 0]),
        "occurrences_between": np.array([0, 500, 400, 300, 800, 3000, 0]),
        "ages": histogram([0, 1, 2, 4, 5, 8, 16], [10, 20, 30, 40, 400, 500, 0, 0]),
        "norms": histogram([0.5, 0.7, 1.0], [300, 300, 300, 100]),
        "idle_norms": histogram([0.5, 0.7, 1.0], [200, 300, 300, 100]),
        "grace": 2,
        "tiers": (Tier("host", 1000, 123_456), Tier(EVIL, 0, 7)),
        "index_bytes": 2048,
        "waiting": 77,
        "waiting_bytes": 4096,
        "most_frequent": rows(2**64 - 1, 42),
        "least_frequent": rows(43),
        "largest": rows(44),
        "smallest": rows(),
        "reuses": histogram([1, 10, 100, 1000], [0, 20, 30, 40, 0]),
        "first_pushes": 10,
        "pull_reuses": histogram([1, 10, 100, 1000], [0, 50, 10, 0, 0]),
    }
    return Analysis(**{**values, **changes})


MOMENTS = [Moment(1.7e9 + i, "ads/user", None, 10 * i, 100 * i, i, 5, 6) for i in range(3)]


class Page(HTMLParser):
    """Elements, attributes, text outside of scripts, and scripts by their id."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self._inside: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self._inside and self._inside.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self._inside and self._inside[-1] == "script":
            self.scripts.append((self.tags[-1][1], data))
        else:
            self.text.append(data)


def figures(page: Page) -> dict[str, Any]:
    [text] = [text for attrs, text in page.scripts if attrs.get("id") == "figures"]
    return dict(json.loads(text))


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(pages.page(an_analysis(), MOMENTS))


def test_every_figure_is_plotted(page: Page) -> None:
    plots = figures(page)
    divs = {attrs["id"] for tag, attrs in page.tags if tag == "div" and "id" in attrs}
    assert set(plots) == divs
    by_axis = {
        plot["layout"][axis].get("title", {}).get("text"): plot["data"]
        for plot in plots.values()
        for axis in ("xaxis", "yaxis")
    }
    [frequency] = by_axis["occurrences"]
    assert frequency["y"] == ["1", "2", "3", "4 … 7", "8 … 15"]
    assert frequency["x"] == [500, 200, 100, 150, 50]
    refused, lost = by_axis["admission threshold, occurrences"]
    assert refused["x"] == [2, 3, 4, 8, 16]
    assert refused["y"] == [0.5, 0.7, 0.8, 0.95, 1.0]
    assert lost["y"] == [0.2, 0.3, 0.36, 0.47, 1.0]
    assert refused["marker"]["symbol"] == ["circle", "diamond", "circle", "circle", "circle"]
    [age] = by_axis["steps"]
    assert age["y"] == ["0", "1", "2", "3 … 4", "5", "6 … 8"]
    [evicted] = by_axis["step TTL, steps"]
    assert (evicted["x"], evicted["y"]) == ([1, 2, 4, 5, 8], [0.97, 0.94, 0.9, 0.5, 0.0])
    [norm] = by_axis["norm"]
    assert norm["y"] == ["< 0.5", "0.5 … 0.7", "0.7 … 1", "≥ 1"]
    [small] = by_axis["norm threshold"]
    assert (small["x"], small["y"]) == ([0.5, 0.7, 1.0], [0.2, 0.5, 0.8])
    [shards] = by_axis["shard"]
    assert (shards["y"], shards["x"]) == (["0", "1"], [600, 400])
    lines = [line for plot in plots.values() for line in plot["data"] if line.get("name") == "rows"]
    assert lines[0]["y"] == [0, 10, 20]
    [memory] = [p["data"][0] for p in plots.values() if "host" in p["data"][0].get("y", ())]
    assert memory["x"] == [123_456, 7, 2048, 4096]


def test_every_figure_stands_in_a_table_too(page: Page) -> None:
    cells = [text.strip() for text in page.text]
    for word in (
        "1,000",
        "77",
        "5,000",
        "1,234",
        "12, 34",
        "4 … 7",
        "950",
        "95.0%",
        "3 ◆",
        "36.0%",
    ):
        assert word in cells
    assert str(2**64 - 1) in cells


def test_the_page_loads_nothing(page: Page) -> None:
    loading = {"src", "href", "srcset", "action", "data", "poster", "background", "style"}
    for tag, attrs in page.tags:
        assert not loading & set(attrs), (tag, attrs)
        assert tag not in {"link", "iframe", "object", "embed", "base", "img"}
    [policy] = [a["content"] for tag, a in page.tags if a.get("http-equiv")]
    assert policy is not None
    assert "default-src 'none'" in policy
    assert "http" not in policy
    [style] = [text for text in page.text if ":root" in text]
    assert "url(" not in style
    assert "@import" not in style
    assert any("plotly.js" in text[:2000] for _, text in page.scripts)


def test_the_page_knows_light_and_dark(page: Page) -> None:
    [style] = [text for text in page.text if ":root" in text]
    assert "color-scheme: light dark" in style
    assert "prefers-color-scheme: dark" in style


def test_what_comes_from_data_is_escaped() -> None:
    moments = [Moment(i, "t", EVIL, 1, 2, 3, 4, 5) for i in range(2)]
    text = pages.page(an_analysis(table=EVIL, checkpoint=EVIL, optimizer=EVIL), moments)
    assert "<img" not in text.replace(pages._library(), "")
    page = Page(text)
    assert [attrs for tag, attrs in page.tags if tag == "img"] == []
    assert len([tag for tag, _ in page.tags if tag == "script"]) == 3
    assert EVIL in "".join(page.text)
    [memory] = [p["data"][0] for p in figures(page).values() if "host" in p["data"][0].get("y", ())]
    assert html.escape(EVIL) in memory["y"]  # plotly.js knows some HTML


def test_an_empty_table_makes_a_page_and_tables() -> None:
    empty = histogram([1.0, 2.0], [0, 0, 0])
    nothing = an_analysis(
        rows=0,
        shard_rows=(0, 0),
        occurrences=0,
        occurrences_between=np.zeros(3, np.int64),
        frequencies=empty,
        ages=empty,
        norms=empty,
        idle_norms=empty,
        asked={},
    )
    assert "<h1>ads/user</h1>" in pages.page(nothing)
    assert "ads/user" in shown(nothing)


def test_numbers_that_json_does_not_know_make_no_broken_page() -> None:
    odd = rows(1)
    odd.norms[:] = np.nan
    found = an_analysis(norm_mean=float("inf"), largest=odd)
    assert figures(Page(pages.page(found)))
    assert "nan" in shown(found)


def test_without_plotly_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(InvalidArgument, match=r"\[report\]"):
        pages.page(an_analysis())


# ---- terminal


def console(width: int) -> Console:
    return Console(file=io.StringIO(), width=width, highlight=False, color_system=None)


def shown(found: Analysis, width: int = 140) -> str:
    out = console(width)
    terminal.show(out, found)
    return out.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_the_terminal_shows_what_thresholds_would_do() -> None:
    lines = [" ".join(line.split()) for line in shown(an_analysis(), 60).splitlines()]
    for line in (
        "rows 1,000",
        "waiting keys 77",
        "host 1,000 121 KiB",
        "admission 4.00 KiB",
        "shard 1 400 40.0% ████████████████",
        "4 … 7 150 15.0% ███████▎",
        "3 700 70.0% 30.0%",
        "5 500 50.0%",
        "0.7 500 50.0%",
        "Evicted by a norm threshold, grace 2",
    ):
        assert line in lines
    wide = [" ".join(line.split()) for line in shown(an_analysis(), 140).splitlines()]
    assert f"{2**64 - 1} 1 0.25 77 1 0 {EVIL}" in wide


def test_wide_terminals_show_two_tables_beside_one_another() -> None:
    wide = shown(an_analysis(), 140).splitlines()
    assert any("Frequency of keys" in line and "Refused by an" in line for line in wide)


def test_markup_in_data_is_text() -> None:
    assert "[red]evil[/red]" in shown(an_analysis(table="[red]evil[/red]"))


def test_keys_show_what_is_known_of_them() -> None:
    gone = Deletion(7, "step_ttl", 1.7e9, -4), Deletion(8, "request", None, None)
    nothing = (None,) * 6
    found = [
        KeyInfo(-1, 0, "row", "host", 9, 5, 4, 0.5, np.ones(2, np.float32), 0, None, gone, ""),
        KeyInfo(2, 1, "waiting", *nothing, 2, 3, gone[:1], ""),
        KeyInfo(3, 1, "gone", *nothing, 0, None, gone, ""),
        KeyInfo(4, 0, "new", *nothing, 0, None, (), ""),
        KeyInfo(5, 0, "unknown", *nothing, 0, None, (), "[b]lost[/b]"),
    ]
    out = console(100)
    terminal.show_keys(out, found)
    lines = [" ".join(line.split()) for line in out.file.getvalue().splitlines()]  # type: ignore[attr-defined]
    evicted = str(gone[0])
    assert [line for line in lines if line] == [
        "-1 has a row in tier host shard 0",
        "4 occurrences · last pushed at step 5, version 9 · norm 0.5",
        "earlier: deleted on request at version 8",
        f"earlier: {evicted}",
        "[1. 1.]",
        "2 waits for admission: 2 of 3 occurrences shard 1",
        f"earlier: {evicted}",
        "3 deleted on request at version 8 shard 1",
        f"earlier: {evicted}",
        "4 was never pushed shard 0",
        "5 has no record: it was never pushed, or its record is lost ([b]lost[/b]) shard 0",
    ]
    assert evicted.startswith("evicted by step_ttl at version 7, step -4, 2023-11-1")


# ---- numbers


@pytest.mark.parametrize(
    ("count", "text"),
    [
        *((0, "0 B"), (1023, "1023 B"), (1024, "1.00 KiB"), (123_456, "121 KiB")),
        *((99.99 * 1024, "100 KiB"), (5 << 50, "5.00 PiB"), (5000 << 50, "5000 PiB")),
    ],
)
def test_bytes_have_units(count: float, text: str) -> None:
    assert known.size(count) == text


def test_no_program_and_no_panel_writes_bytes_with_other_units() -> None:
    other = re.compile(
        r'(?<![\w-])[kKMGT]B\b|filesize\.decimal|"(Bps|decbytes|deckbytes|decmbytes)"'
    )
    places = ("psclient", "psserver", "storage", "deploy/components/monitoring")
    files = [
        path
        for place in places
        for path in (ROOT / place).rglob("*")
        if path.suffix in (".py", ".js") and not path.name.startswith("uPlot")
    ]
    assert len(files) > 300
    found = [
        f"{path.name}: {line.strip()}"
        for path in files
        for line in path.read_text().splitlines()
        if other.search(line.replace(r"(\d+) kB$", ""))  # of /proc/meminfo
    ]
    assert found == []


@pytest.mark.parametrize("most", [0, 1, 7, 999, 123_456, 7 << 30, 50 << 30, 600 << 40, 3000 << 50])
def test_an_axis_of_bytes_has_few_ticks_in_one_unit_up_to_its_end(most: int) -> None:
    values, labels = known.size_ticks(most)
    assert values[0] == 0
    assert len(values) <= 9
    assert values[-2] <= most <= values[-1]
    (unit,) = {each.split()[1] for each in labels[1:]}
    power = 1024 ** known.UNITS.index(unit)
    assert [each * power for each in [0, *(int(each.split()[0]) for each in labels[1:])]] == values


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0.0, "0%"),
        (1.0, "100%"),
        (0.5, "50.0%"),
        (1e-5, "0.001%"),
        (0.99999, "99.999%"),
        (5648 / 5649, "99.98%"),
    ],
)
def test_shares_tell_little_from_nothing(share: float, text: str) -> None:
    assert known.percent(share) == text


def test_keys_are_shown_as_the_trainer_sees_them_and_whole() -> None:
    """No digit of a key is cut off where the terminal is narrow."""
    unsigned, out = shown(an_analysis(), 80), console(80)
    terminal.show(out, an_analysis(), keys=np.int64)
    signed = out.file.getvalue()  # type: ignore[attr-defined]
    assert str(2**64 - 1) in unsigned
    assert str(2**64 - 1) not in signed
    assert re.search(r"^ *-1 +1 ", signed, re.M)
    text = pages.page(an_analysis(), keys=np.int64)
    assert "<td>-1</td>" in text
