"""Analyses of a real cluster: what is summed up is what its tables hold."""

from __future__ import annotations

import json
import sys
import time
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import pytest
from numpy.testing import assert_array_equal
from servers import Cluster, eventually
from typer.testing import CliRunner

from psclient import Client, admin, hash_keys
from psclient.errors import CheckpointUnfit, InvalidArgument, TableNotFound
from psclient.tools import importer
from psclient.tools.analysis import analyze
from psclient.tools.ctl import app
from psclient.tools.history import Moment, append_history, read_history
from psclient.tools.keys import inspect
from psclient.tools.sink import ParquetSink
from psclient.tools.summary import Analysis, Histogram, RowColumns

DIM = 3
LISTS = ("most_frequent", "least_frequent", "largest", "smallest")


@pytest.fixture
def client(cluster2: Cluster, connect: Any) -> Client:
    return connect(cluster2)


@pytest.fixture
def filled(client: Client, name: str) -> str:
    """A table with rows of many kinds, and two keys that went."""
    table = client.create_table(name, DIM, optimizer="adagrad", lr=0.5)
    rng = np.random.default_rng(0)
    for step in range(20):
        keys = rng.integers(-200, 200, 100)
        table.push(keys, rng.normal(size=(100, DIM)).astype(np.float32), step=5 * step)
    table.delete(np.array([-5, 5]))
    return name


def whole(client: Client, name: str) -> dict[str, np.ndarray]:
    """All rows, by key."""
    _, *batches = admin.read_rows(client, name)
    columns = {
        field: np.concatenate([getattr(batch, field) for batch in batches])
        for field in ("keys", "versions", "steps", "frequencies")
    }
    columns["rows"] = np.concatenate([batch.rows[:, :DIM] for batch in batches if len(batch.keys)])
    columns["norms"] = np.sqrt((columns["rows"].astype(np.float64) ** 2).sum(axis=1))
    order = np.argsort(columns["keys"])
    return {field: column[order] for field, column in columns.items()}


def test_an_analysis_sums_up_all_shards(client: Client, filled: str) -> None:
    told: list[tuple[int, int]] = []
    found = analyze(
        client,
        filled,
        frequencies=[3],
        ages=[33],
        norms=[0.7],
        grace=10,
        top=7,
        progress=lambda done, total: told.append((done, total)),
    )
    rows, info = whole(client, filled), client.describe_table(filled)
    frequencies, norms, ages = rows["frequencies"], rows["norms"], 95 - rows["steps"]
    assert (found.rows, found.shard_rows) == (info.rows, info.shard_rows)
    assert found.versions == info.versions
    eventually(lambda: analyze(client, filled).bytes == client.describe_table(filled).bytes)
    assert (found.step, found.dim, found.optimizer) == (95, DIM, "adagrad")
    assert found.row_bytes == 4 * 2 * DIM + 32
    assert [tier.name for tier in found.tiers] == ["host", "lmdb"]
    assert sum(tier.rows for tier in found.tiers) == info.rows
    assert found.occurrences == int(frequencies.sum())
    assert found.norm_mean == pytest.approx(norms.mean())
    for threshold in (1, 2, 3, 4, 8, 16):
        admitted = frequencies >= threshold
        lost = frequencies[~admitted].sum() + (threshold - 1) * admitted.sum()
        assert found.admitted(threshold) == admitted.sum()
        assert found.dropped(threshold) == lost
    for ttl in (0, 1, 16, 32, 33, 64):
        assert found.idle(ttl) == (ages > ttl).sum()
    for threshold in (0.1, 0.5, 0.7, 1.0):
        assert found.small(threshold) == ((norms < threshold) & (ages >= 10)).sum()
    assert (found.norms.below(0.7), found.norms.above(0.7)) == (
        (norms < 0.7).sum(),
        (norms >= 0.7).sum(),
    )
    keys = rows["keys"]
    for field, values in zip(LISTS, [-1.0 * frequencies, frequencies, -norms, norms], strict=True):
        order = np.lexsort((keys, values))[:7]
        chosen = getattr(found, field)
        assert_array_equal(chosen.keys, keys[order])
        assert_array_equal(chosen.frequencies, frequencies[order])
        assert_array_equal(chosen.steps, rows["steps"][order])
        assert_array_equal(chosen.versions, rows["versions"][order])
        assert set(chosen.tiers) <= {"host", "lmdb"}
    assert told[-1] == (info.rows, info.rows)


def test_a_threshold_that_was_not_asked_for_is_not_guessed(client: Client, filled: str) -> None:
    found = analyze(client, filled)
    with pytest.raises(InvalidArgument, match="3 is not an edge"):
        found.admitted(3)
    with pytest.raises(InvalidArgument, match="33 is not an edge"):
        found.idle(33)
    with pytest.raises(InvalidArgument, match=r"1e\+12 is not an edge"):
        found.small(1e12)


@pytest.mark.parametrize(
    "thresholds",
    [{"frequencies": [0]}, {"ages": [-1]}, {"norms": [0.0]}, {"frequencies": [1.5]}, {"top": 9999}],
)
def test_bad_thresholds_are_refused(client: Client, filled: str, thresholds: Any) -> None:
    with pytest.raises(InvalidArgument):
        analyze(client, filled, **thresholds)


def test_what_does_not_exist_is_not_analyzed(client: Client, filled: str) -> None:
    with pytest.raises(TableNotFound):
        analyze(client, "nothing")
    with pytest.raises(TableNotFound):
        inspect(client, "nothing", [])
    with pytest.raises(CheckpointUnfit):  # the shared servers have no place for checkpoints
        analyze(client, filled, checkpoint="c")


@pytest.mark.parametrize("embeddings", [False, True])
def test_parquet_has_a_line_for_each_row(
    client: Client, filled: str, tmp_path: Path, embeddings: bool
) -> None:
    path = tmp_path / "t.parquet"
    with ParquetSink(path) as sink:
        analyze(client, filled, sink=sink, embeddings=embeddings)
    rows = whole(client, filled)
    table = parquet.read_table(path).sort_by("key")
    names = ["key", "frequency", "step", "version", "norm", "tier"]
    assert table.column_names == [*names, *(["embedding"] if embeddings else [])]
    columns = zip(names, ("keys", "frequencies", "steps", "versions"), strict=False)
    for column, field in columns:
        assert_array_equal(table[column].to_numpy(), rows[field])
    np.testing.assert_allclose(table["norm"].to_numpy(), rows["norms"])
    assert set(table["tier"].to_pylist()) <= {"host", "lmdb"}
    if embeddings:
        assert_array_equal(np.stack(table["embedding"].to_numpy()), rows["rows"])
    assert sink.rows == len(rows["keys"])
    assert [each.name for each in tmp_path.iterdir()] == ["t.parquet"]


def test_parquet_with_embeddings_can_be_imported(
    client: Client, filled: str, tmp_path: Path, name: str
) -> None:
    with ParquetSink(tmp_path / "t.parquet") as sink:
        analyze(client, filled, sink=sink, embeddings=True)
    client.create_table(f"{name}.copy", DIM)
    assert importer.import_parquet(client, f"{name}.copy", tmp_path / "t.parquet") == sink.rows
    copy, rows = whole(client, f"{name}.copy"), whole(client, filled)
    for field in ("keys", "steps", "frequencies", "rows"):
        assert_array_equal(copy[field], rows[field])


@pytest.mark.parametrize("embeddings", [False, True])
def test_parquet_of_a_table_without_rows_has_its_columns(
    client: Client, filled: str, name: str, tmp_path: Path, embeddings: bool
) -> None:
    schemas = []
    client.create_table(f"{name}.empty", DIM)
    for table in (filled, f"{name}.empty"):
        with ParquetSink(tmp_path / "t.parquet") as sink:
            found = analyze(client, table, sink=sink, embeddings=embeddings)
        schemas.append(parquet.read_schema(tmp_path / "t.parquet"))
    assert parquet.read_table(tmp_path / "t.parquet").num_rows == found.rows == 0
    assert schemas[0] == schemas[1]


def test_a_parquet_file_that_was_given_up_is_not_there(tmp_path: Path) -> None:
    numbers = np.arange(3)
    columns = RowColumns(numbers, numbers, numbers, numbers, numbers / 2, "host", None)
    with suppress(KeyError), ParquetSink(tmp_path / "t.parquet") as sink:
        sink(columns)
        sink._write()
        assert len(list(tmp_path.iterdir())) == 1
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_keys_tell_where_they_are_or_why_they_are_not(
    client: Client, filled: str, name: str
) -> None:
    rows = whole(client, filled)
    there = int(rows["keys"].astype(np.int64)[0])
    keys = [there, 5, -5, 999, -999, there]
    found = inspect(client, filled, keys, embeddings=True)
    assert [each.key for each in found] == keys
    assert [each.state for each in found] == ["row", "gone", "gone", "new", "new", "row"]
    assert found[0].frequency == rows["frequencies"][0]
    assert found[0].step == rows["steps"][0]
    assert_array_equal(found[0].embedding, rows["rows"][0])
    assert found[0].tier in {"host", "lmdb"}
    assert found[0].reason == f"has a row in tier {found[0].tier}"
    assert found[3].reason == "was never pushed"
    [gone] = found[1].deletions
    assert (gone.cause, gone.step) == ("request", 95)
    assert time.time() - 60 < gone.time < time.time() + 1
    assert found[1].reason.startswith(f"deleted on request at version {gone.version}, step 95, 20")
    assert {each.shard for each in found} == {0, 1}


def test_a_key_that_waits_says_for_what(client: Client, name: str) -> None:
    table = client.create_table(
        name,
        DIM,
        admission="counter",
        admission_args={"threshold": 3},
        eviction={"step_ttl": {"steps": 10}},
    )
    table.push(np.array([7, 7, -8, -8, -8]), np.ones((5, DIM), np.float32), step=1)
    waits, has = inspect(client, name, [7, -8])
    assert (waits.reason, waits.threshold) == ("waits for admission: 2 of 3 occurrences", 3)
    assert has.frequency == 3
    assert analyze(client, name).waiting == 1


@pytest.mark.parametrize("key", [1 << 64, -(1 << 63) - 1])
def test_a_key_of_more_than_64_bits_is_refused(client: Client, filled: str, key: int) -> None:
    with pytest.raises(InvalidArgument, match="each key must be in -2"):
        inspect(client, filled, [key])


def test_nothing_changes_by_looking(client: Client, filled: str) -> None:
    before, versions = whole(client, filled), client.describe_table(filled).versions
    analyze(client, filled, top=5)
    inspect(client, filled, range(-300, 300), embeddings=True)
    assert client.describe_table(filled).versions == versions
    for field, column in whole(client, filled).items():
        assert_array_equal(column, before[field])


# ---- history


def an_analysis(**changes: Any) -> Analysis:
    empty = Histogram(np.array([1.0]), np.array([0, 0]))
    values: dict[str, Any] = {field.name: 0 for field in fields(Analysis)}
    values |= {"table": "t", "checkpoint": None, "tiers": (), "frequencies": empty}
    return Analysis(**{**values, **changes})


def test_a_history_remembers_every_analysis_of_a_table(tmp_path: Path) -> None:
    path = tmp_path / "h.jsonl"
    append_history(path, an_analysis(time=9.0, rows=5, index_bytes=100, waiting=2, step=7))
    append_history(path, an_analysis(table="u"))
    append_history(path, an_analysis(time=4.0, rows=3, checkpoint="c", occurrences=8))
    assert read_history(path, "t") == [
        Moment(4.0, "t", "c", 3, 0, 0, 8, 0),
        Moment(9.0, "t", None, 5, 100, 2, 0, 7),
    ]
    assert [json.loads(line)["table"] for line in path.read_text().splitlines()] == ["t", "u", "t"]


FAR = json.dumps(dict.fromkeys(Moment.__slots__, 10**30))


@pytest.mark.parametrize("line", ["{", "[]", "{}", '{"time": 1, "rows": 2}', "3", "\udcff", FAR])
def test_a_history_with_something_else_in_it_is_refused_by_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "h.jsonl"
    append_history(path, an_analysis())
    with path.open("a", errors="surrogateescape") as file:
        file.write(line + "\n")
    with pytest.raises(InvalidArgument, match="line 2 is not an analysis"):
        read_history(path, "t")


# ---- psctl


def psctl(cluster: Cluster, *words: str, fails: bool = False) -> str:
    where = {"PSCTL_SERVERS": ",".join(cluster.addresses), "COLUMNS": "160"}
    done = CliRunner().invoke(app, words, env=where)
    assert bool(done.exit_code) == fails, done.output
    return done.output


def test_psctl_analyze_shows_and_writes_all_of_it(
    cluster2: Cluster, filled: str, client: Client, tmp_path: Path
) -> None:
    words = ["analyze", filled, "--frequency", "3", "--ttl", "33", "--ttl", "7", "--norm", "0.7"]
    words += ["--grace", "4", "--top", "2", "--embeddings"]
    words += ["--parquet", str(tmp_path / "t.parquet"), "--html", str(tmp_path / "t.html")]
    words += ["--history", str(tmp_path / "h.jsonl")]
    psctl(cluster2, *words)
    shown = psctl(cluster2, *words)
    found = analyze(client, filled, frequencies=[3])
    for word in (
        filled,
        f"{found.rows:,}",
        "Refused by an admission threshold",
        "Evicted by a step TTL",
        "Evicted by a norm threshold, grace 4",
        f"{found.rows - found.admitted(3):,}",
        str(found.most_frequent.keys[0]),
    ):
        assert word in shown
    assert parquet.read_table(tmp_path / "t.parquet").num_rows == found.rows
    assert len(read_history(tmp_path / "h.jsonl", filled)) == 2
    page = (tmp_path / "t.html").read_text()
    assert f"<h1>{filled}</h1>" in page
    assert "Growth" in page


BAD = [
    (["--parquet", "no/such/t.parquet"], "t.parquet cannot be written: No such file or directory"),
    (["--html", "no/such/t.html"], "t.html cannot be written: No such file or directory"),
    (["--html", "."], "is a directory; choose the name of a file"),
    (["--parquet", "."], "is a directory; choose the name of a file"),
    (["--history", "no/such/h.jsonl"], "No such file or directory"),
    (["--history", "junk"], "line 1 is not an analysis"),
]


@pytest.mark.parametrize(("words", "message"), BAD)
def test_psctl_analyze_refuses_what_it_cannot_write_before_it_reads(
    cluster2: Cluster,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "junk").write_text("{}\n")
    shown = psctl(cluster2, "analyze", "nothing", *words, fails=True)
    assert message in shown  # and not that there is no such table
    assert [each.name for each in tmp_path.iterdir()] == ["junk"]


def test_psctl_analyze_refuses_a_page_without_its_library_before_it_reads(
    cluster2: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    words = ["analyze", "nothing", "--html", str(tmp_path / "t.html")]
    assert "needs plotly" in psctl(cluster2, *words, fails=True)
    assert list(tmp_path.iterdir()) == []


def test_psctl_analyze_shows_and_keeps_what_it_has_if_a_page_cannot_be_written(
    cluster2: Cluster, filled: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("psclient.tools.page.page", full)
    words = ["analyze", filled, "--parquet", "t.parquet", "--html", "t.html"]
    monkeypatch.chdir(tmp_path)
    shown = psctl(cluster2, *words, fails=True)
    assert "occurrences" in shown
    assert "psctl: [Errno 28] No space left on device" in shown
    assert [each.name for each in tmp_path.iterdir()] == ["t.parquet"]


def test_psctl_inspect_takes_keys_of_all_kinds(cluster2: Cluster, filled: str, name: str) -> None:
    shown = psctl(cluster2, "inspect", filled, "-5", "5", str(2**64 - 999), "0x3e8")
    lines = [line.split() for line in shown.splitlines() if line.strip()]
    assert [line[0] for line in lines] == ["-5", "5", str(2**64 - 999), "1000"]
    assert shown.count("deleted on request") == 2
    assert shown.count("was never pushed") == 2
    shown = psctl(cluster2, "inspect", filled, "--text", "male")
    assert "male" in shown
    assert str(hash_keys(["male"])[0]) in shown
    assert "KEY must be an integer" in psctl(cluster2, "inspect", filled, "x", fails=True)
    assert "no table" in psctl(cluster2, "inspect", "nothing", "1", fails=True)
