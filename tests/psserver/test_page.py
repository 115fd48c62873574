"""The status page in a browser: what it shows of shards that serve, hang, lie or are gone."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
from servers import free_ports
from sites import HOST, Figures, site

from psclient.tools.figures import size
from psproto import ps_pb2 as pb

playwright = pytest.importorskip("playwright.sync_api", reason="pip install embedding-ps[test]")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="embedding-ps[test]")

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or ""
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not CHROMIUM, reason="needs Chromium: apt-get install chromium, or set CHROMIUM to its path"
    ),
]
FORMS = [(scheme, width) for scheme in ("light", "dark") for width in (1280, 390)]
HOSTILE = '<img src=x onerror="hacked=1"><script>hacked=1</script>"\'`${hacked=1}'
BOUNDS = (0.001, 0.01, 0.1)


class Busy(Figures):
    """Figures of a shard that serves: each time they are read, a second has passed."""

    def read(self, most_tables: int = 256) -> pb.GetStatusResponse:
        status = self.status
        status.uptime_seconds += 1
        status.time += 1
        status.rows += 10
        status.engine.busy_seconds += 0.25
        for method in status.methods:
            method.requests += 100
            method.keys += 1000
            method.bytes += 4000
            buckets = [
                old + new for old, new in zip(method.latency.buckets, (90, 9, 1, 0), strict=True)
            ]
            method.latency.buckets[:] = buckets
        queued = status.request_queue.buckets
        status.request_queue.buckets[:] = [
            old + new for old, new in zip(queued, (0, 0, 10, 0), strict=True)
        ]
        for table in status.tables:
            table.requests += 100
            table.pulled_keys += 500
        return super().read(most_tables)


def busy(shard: int, name: str = "ads.user") -> Busy:
    """Figures of a shard with a table of that name, an error and all budgets."""
    tiers = [
        pb.TierStats(tier="host", rows=900, hits=99, misses=1),
        pb.TierStats(tier="lmdb", rows=100, on_disk=True),
    ]
    return Busy(
        shard,
        release="0.3.0",
        shards=3,
        cluster="ads/prod",
        start=shard + 1,
        time=1.8e9,
        uptime_seconds=3600,
        rows=1000,
        table_count=1,
        tables=[pb.TableStatus(name=name, rows=1000, bytes=1 << 20, tiers=tiers)],
        methods=[
            pb.MethodStatus(method=each, latency=pb.Timing(bounds=BOUNDS, buckets=[0] * 4))
            for each in ("Pull", "Push", "Exchange")
        ],
        errors=[pb.ErrorCount(method="Pull", code="NOT_FOUND", reason="TABLE_NOT_FOUND", count=2)],
        recent_errors=[
            pb.RecentError(
                time=1.8e9, method="Pull", code="NOT_FOUND", reason="X", message=name, count=2
            )
        ],
        budgets=[pb.Budget(name="host_bytes", used=5, limit=10), pb.Budget(name="max_tables")],
        log=pb.LogStatus(fsync=pb.Timing(bounds=BOUNDS, buckets=[0] * 4)),
        storage=pb.StorageStatus(flush_age_seconds=5),
        subscribers=pb.FeedStatus(subscribers=1, lag_seconds=0.5),
        engine=pb.EngineStatus(queue_wait=pb.Timing(bounds=BOUNDS, buckets=[0] * 4)),
        requests_waiting=7,
        request_queue=pb.Timing(bounds=BOUNDS, buckets=[0] * 4),
    )


@contextmanager
def cluster(*figures: Figures, dead: int = 0) -> Iterator[int]:
    """Serve the pages of shards with these figures, and add ``dead`` addresses where nobody
    listens. Yields the port of shard 0.
    """
    first = free_ports(len(figures) + dead)
    addresses = [f"{HOST}:{first + number}" for number in range(len(figures) + dead)]
    with ExitStack() as stack:
        for number, each in enumerate(figures):
            stack.enter_context(site(each, addresses, port=first + number))
        yield first


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        yield browser
        browser.close()


class Visit:
    """A page in the browser, with all that went wrong there.

    complaints  errors and warnings of the console, and uncaught errors
    foreign     requests to other places than the server of the page
    """

    def __init__(self, browser: Any, port: int, scheme: str = "light", width: int = 1280) -> None:
        self.home = f"http://{HOST}:{port}/"
        self.complaints: list[str] = []
        self.foreign: list[str] = []
        self.context = browser.new_context(
            color_scheme=scheme, viewport={"width": width, "height": 800}
        )
        page = self.page = self.context.new_page()
        page.set_default_timeout(60_000)
        page.on("console", lambda message: self.complaints.append(message.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("dialog", lambda dialog: self.complaints.append(dialog.message))
        page.on("request", lambda request: self._asked(request.url))
        page.goto(self.home)

    def _asked(self, url: str) -> None:
        if not url.startswith(self.home):
            self.foreign.append(url)

    def wait(self, selector: str, text: str) -> None:
        """Wait until an element has a text."""
        self.page.locator(selector).filter(has_text=text).first.wait_for()

    def texts(self, selector: str) -> list[str]:
        found: list[str] = self.page.locator(selector).all_inner_texts()
        return found


@pytest.fixture
def visit(browser: Any) -> Iterator[Any]:
    """Open pages: visit(port, scheme, width)."""
    opened: list[Visit] = []

    def visit(port: int, scheme: str = "light", width: int = 1280) -> Visit:
        opened.append(Visit(browser, port, scheme, width))
        return opened[-1]

    yield visit
    for each in opened:
        each.context.close()


@pytest.mark.parametrize(("scheme", "width"), FORMS)
def test_every_form_is_readable_and_accessible(visit: Any, scheme: str, width: int) -> None:
    with cluster(busy(0, "a" * 128), busy(1, "a" * 128), dead=1) as port:
        seen = visit(port, scheme, width)
        seen.wait("#verdict", "1 of 3 shards is not ready")
        seen.wait("#methods td", "Exchange")
        assert seen.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        found = axe.Axe().run(seen.page)
        assert not found.violations_count, found.generate_report()
    assert (seen.complaints, seen.foreign) == ([], [])


def test_axe_finds_what_is_wrong(visit: Any) -> None:
    """So the test above can fail."""
    with cluster(busy(0)) as port:
        seen = visit(port)
        seen.wait("#methods td", "Exchange")
        seen.page.evaluate("document.querySelector('footer a').style.color = '#ddd'")
        seen.page.evaluate("document.documentElement.removeAttribute('lang')")
        found = {each["id"] for each in axe.Axe().run(seen.page).response["violations"]}
    assert found == {"color-contrast", "html-has-lang"}


class TestLive:
    def test_rates_and_percentiles_are_those_of_the_last_seconds(self, visit: Any) -> None:
        with cluster(busy(0), busy(1), busy(2)) as port:
            seen = visit(port)
            seen.wait("#verdict.ok", "All 3 shards are ready")
            seen.wait(".card", "900")  # 3 shards with 3 methods of 100 requests per second
            cards = dict(reversed(each.split("\n")) for each in seen.texts(".card"))
            assert cards["shards ready"] == "3 of 3"
            assert cards["requests/s"] == "900"
            assert cards["keys/s"] == "9,000"
            assert cards["p50 latency"] == "0.56 ms"  # 50 of the 90 between 0 and 1 ms
            assert cards["p99 latency"] == "10 ms"
            rows = [each.split("\t") for each in seen.texts("#shards tbody tr")]
            assert [each[0].strip() for each in rows] == ["0", "1", "2"]
            assert "25 %" in rows[0][9]
            assert rows[0][10].strip() == "7 (99 ms)"  # 99 % of the way from 10 to 100 ms
            before = cards["rows"]
            seen.page.wait_for_function(
                "old => document.querySelectorAll('.card b')[1].textContent !== old", arg=before
            )
            assert seen.page.title() == "3/3 ready · ads/prod"
            assert seen.page.evaluate("plots.requests.data[0].length") > 1
        assert seen.foreign == []

    def test_figures_of_a_shard_that_has_not_read_its_rows_are_unknown(self, visit: Any) -> None:
        with cluster(Figures(0, shards=1)) as port:
            seen = visit(port)
            seen.wait("#no-disk", "No shard has read its data yet.")
            cards = dict(reversed(each.split("\n")) for each in seen.texts(".card"))
            row = seen.texts("#shards tbody tr")[0].split("\t")
        assert cards["rows"] == row[4].strip() == "\u2013"
        assert [each.strip() for each in row[6:]] == [""] * 7

    def test_a_restarted_shard_has_no_rate_until_its_second_figures(self, visit: Any) -> None:
        with cluster(busy(0)) as port:
            seen = visit(port)
            rates = seen.page.evaluate(
                """() => {
                  const shard = new Shard(), status = (start, uptime, requests) => ({
                    start, uptime_seconds: uptime, tables: [], errors: [], methods: [{
                      method: "Pull", requests, keys: 0, bytes: 0,
                      latency: { bounds: [1], buckets: [requests, 0] } }] });
                  return [[1, 10, 100], [1, 12, 120], [2, 1, 5], [2, 2, 9]].map((each) => {
                    shard.add(status(...each));
                    return shard.recent && shard.recent.requests;
                  });
                }"""
            )
        assert rates == [None, 10, None, 4]

    def test_numbers_are_rounded_to_plain_digits(self, visit: Any) -> None:
        with cluster(busy(0)) as port:
            seen = visit(port)
            for code, expected in [
                ("milliseconds(0.0994)", "99 ms"),
                ("milliseconds(0.0999)", "100 ms"),
                ("milliseconds(0.00996)", "10 ms"),
                ("milliseconds(99.9)", "100 s"),
                ("count(999999999)", "1000 M"),
            ]:
                assert seen.page.evaluate(code) == expected

    def test_the_numbers_beside_a_plot_are_not_cut_off(self, visit: Any) -> None:
        """The first columns of a plot's canvas are empty."""
        with cluster(busy(0)) as port:
            touched = visit(port).page.evaluate(
                """() => {
                  const text = (value) => value.toFixed(3);
                  const plot = new Plot(document.body, "Wide", ["a"], text, 1);
                  for (const at of [1, 2, 3]) plot.add(at, [123456789 * at]);
                  const canvas = plot.canvas.querySelector("canvas");
                  return new Promise((done) => setTimeout(() => {
                    const { data } = canvas.getContext("2d").getImageData(0, 0, 2, canvas.height);
                    done(data.some((value) => value > 0));
                  }, 200));
                }"""
            )
        assert touched is False

    def test_bytes_are_written_as_psctl_writes_them(self, visit: Any) -> None:
        with cluster(busy(0)) as port:
            seen = visit(port)
            for number in (0, 1, 1023, 1024, 99.99 * 1024, 123_456, 5 << 30, 3 << 50, 5000 << 50):
                assert seen.page.evaluate(f"bytes({number})") == size(number)

    def test_a_percentile_is_found_in_its_bucket(self, visit: Any) -> None:
        with cluster(busy(0)) as port:
            seen = visit(port)
            for buckets, share, expected in [
                ([10, 10, 0], 0.5, "1"),
                ([10, 10, 0], 0.75, "1.5"),
                ([0, 0, 1], 0.5, "Infinity"),
                ([0, 0, 0], 0.5, "null"),
            ]:
                code = f"String(quantile([1, 2], {buckets}, {share}))"
                assert seen.page.evaluate(code) == expected


class TestTrouble:
    def test_a_hostile_name_is_text(self, visit: Any) -> None:
        figures = busy(0, HOSTILE)
        figures.status.cluster = figures.status.release = HOSTILE
        figures.status.storage.flush_failure = HOSTILE
        latency = pb.Timing(bounds=BOUNDS, buckets=[0] * 4)
        figures.status.methods.add(method=HOSTILE, requests=1, latency=latency)
        figures.status.budgets.add(name=HOSTILE, used=99, limit=100)
        with cluster(figures, dead=1) as port:
            seen = visit(port)
            seen.wait("#tables td", HOSTILE)
            seen.wait("#errors td", HOSTILE)
            seen.wait("h1", HOSTILE)
            assert seen.page.evaluate("typeof hacked") == "undefined"
            assert seen.page.locator("main img, main script").count() == 0
        assert seen.complaints == []

    def test_a_script_from_elsewhere_does_not_run(self, visit: Any) -> None:
        with cluster(busy(0)) as port:
            seen = visit(port)
            seen.page.evaluate(
                """() => {
                  const script = document.createElement("script");
                  script.textContent = "hacked = 1";
                  document.body.append(script);
                  document.body.insertAdjacentHTML("beforeend", '<img src=x onerror="hacked=1">');
                }"""
            )
            seen.page.wait_for_timeout(500)
            assert seen.page.evaluate("typeof hacked") == "undefined"
        assert any("Content Security Policy" in each for each in seen.complaints)

    @pytest.mark.parametrize(
        ("change", "expected"),
        [
            ({"phase": pb.PHASE_RECOVERY}, "Shard 0 starts: it reads its rows and replays its log"),
            ({"phase": pb.PHASE_RESTORING}, "a checkpoint is being restored"),
            ({"damaged_blocks": 3}, "Shard 0 has 3 damaged blocks on disk"),
            ({"storage": pb.StorageStatus(flush_failure="no space")}, "no space"),
            ({"storage": pb.StorageStatus(flush_age_seconds=7200)}, "has not flushed for 2.0 h"),
            ({"budgets": [pb.Budget(name="disk", used=97, limit=100)]}, "used 97 % of disk"),
            ({"subscribers": pb.FeedStatus(lag_seconds=60)}, "60 s behind"),
            ({"gpu_paused": True}, "moves no rows to the GPU"),
            ({"certificate_expires": 1.8e9 + 86400}, "certificate that expires in 24"),
            ({"certificate_expires": 1.7e9}, "has an expired certificate"),
        ],
        ids=str,
    )
    def test_what_is_wrong_stands_at_the_top(
        self, visit: Any, change: dict[str, Any], expected: str
    ) -> None:
        figures = busy(0)
        for name in change:
            figures.status.ClearField(name)  # type: ignore[arg-type]
        figures.status.MergeFrom(pb.GetStatusResponse(**change))
        with cluster(figures) as port:
            visit(port).wait("#problems li", expected)

    @pytest.mark.parametrize(
        ("seconds", "share", "expected"),
        [
            (0.2, 0.1, []),
            (0.2, 0.95, ["Shard 0 has a busy engine (95 %): it is near its capacity"]),
            (0.3, 0.95, ["a busy engine", "(p99 of those that wait: 298 ms)"]),
            (
                0.3,
                0.1,
                ["(p99 of those that wait: 298 ms): its engine or its processor is too busy"],
            ),
        ],
    )
    def test_long_waits_are_said_whatever_is_short(
        self, visit: Any, seconds: float, share: float, expected: list[str]
    ) -> None:
        """A server whose processor is short has an idle engine."""
        with cluster(busy(0)) as port:
            found = visit(port).page.evaluate(
                """([seconds, busy]) => problemsOf(
                  { shard: 0, status: { phase: "PHASE_READY", budgets: [] } },
                  { recent: { busy, queue: { bounds: [0.1, seconds], buckets: [0, 9, 0] } } },
                )""",
                [seconds, share],
            )
        assert len(found) == len(expected)
        for (severity, text), part in zip(found, expected, strict=True):
            assert severity == "warn"
            assert part in text

    def test_a_page_whose_server_is_gone_says_so(self, visit: Any) -> None:
        with cluster(busy(0)) as port:
            seen = visit(port)
            seen.wait("#verdict.ok", "The shard is ready")
        seen.wait("#verdict.bad", "The server of this page does not answer")
        seen.wait("#problems", "The figures below are")
        assert seen.page.evaluate("document.body.className") == "stale"
        with cluster_at(port, busy(0)):
            seen.wait("#verdict.ok", "The shard is ready")
            assert seen.page.evaluate("document.body.className") == ""


@contextmanager
def cluster_at(port: int, figures: Figures) -> Iterator[None]:
    """Serve the pages of one shard at a port that was used before."""
    with site(figures, [f"{HOST}:{port}"], port=port):
        yield
