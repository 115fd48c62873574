"""Imports of files of other programs into real clusters: dry runs, crashes, memory, psctl."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filled import whole
from servers import Cluster
from typer.testing import CliRunner, Result

from psclient import Client
from psclient.errors import InvalidArgument, TableNotFound
from psclient.tools import ctl, duplicates, importer
from psclient.tools.importer import ImportIncomplete, import_rows, open_source
from psclient.tools.journal import journal_of

DIM, N = 4, 1000
WEIGHT = np.random.default_rng(0).standard_normal((N, DIM)).astype(np.float32)


@pytest.fixture
def client(cluster2: Cluster, connect: Callable[..., Client]) -> Client:
    return connect(cluster2)


@pytest.fixture
def table(client: Client, name: str) -> Iterator[str]:
    client.create_table(name, DIM, optimizer="adagrad")
    yield name
    client.drop_table(name)


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    return tmp_path / "journal"


def psctl(cluster: Cluster, journal: Path, *words: str) -> Result:
    variables = {"PSCTL_SERVERS": ",".join(cluster.addresses), "XDG_STATE_HOME": str(journal)}
    return CliRunner().invoke(ctl.app, words, env=variables | {"COLUMNS": "80"})


def test_rows_and_state_are_written_bit_for_bit(
    client: Client, table: str, tmp_path: Path, journal: Path
) -> None:
    np.savez(tmp_path / "x.npz", keys=np.arange(N) - 5, embeddings=WEIGHT, sums=WEIGHT**2)
    count = import_rows(client, table, tmp_path / "x.npz", map={"state": "sums"}, journal=journal)
    assert count == N
    rows = {key: row for key, (row, *_) in whole(client, table).items()}
    wanted = map(bytes, np.hstack([WEIGHT, WEIGHT**2]))
    assert rows == dict(zip((np.arange(N) - 5).view(np.uint64).tolist(), wanted, strict=True))
    assert list(journal.iterdir()) == []


def test_a_dry_run_counts_and_names_the_first_bad_row(
    client: Client, table: str, tmp_path: Path
) -> None:
    weight, keys = WEIGHT.copy(), np.arange(N)
    weight[[70, 900], 1] = np.nan, np.inf
    keys[[10, 20, 500]] = 3, 3, 4
    np.save(tmp_path / "x.npy", weight)
    np.save(tmp_path / "keys.npy", keys)
    source = open_source(client, table, tmp_path / "x.npy", map={"key": "keys.npy"})
    found = importer.count(source)
    assert (found.rows, found.dim, found.duplicates, found.not_finite) == (N, DIM, 3, 2)
    at = 128 + 70 * DIM * 4  # after NumPy's header
    where = f"{tmp_path}/x.npy: row 70 (counted from 0, at byte {at:,}): key 70"
    assert str(found.first_not_finite).startswith(where)
    with (tmp_path / "x.npy").open("rb") as file:
        file.seek(at)
        assert np.isnan(np.frombuffer(file.read(16), "<f4")).tolist() == [False, True, False, False]
    assert str(found.first_duplicate).endswith("key 3 occurs again")
    assert "row 10 " in str(found.first_duplicate)
    with pytest.raises(InvalidArgument, match=r"row 70 .* got nan at position 1"):
        import_rows(client, table, tmp_path / "x.npy", journal=tmp_path)
    assert client.describe_table(table).rows == 0


def test_many_duplicates_are_counted_exactly(
    client: Client, table: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duplicates, "SPOOL_BYTES", 1000)  # so that groups become files
    keys = np.random.default_rng(1).integers(-500, 500, 20_000)
    np.save(tmp_path / "keys.npy", keys)
    np.save(tmp_path / "x.npy", np.zeros((len(keys), DIM), np.float32))
    found = importer.count(open_source(client, table, tmp_path / "x.npy", map={"key": "keys.npy"}))
    assert found.duplicates == len(keys) - len(np.unique(keys))
    seen = np.unique(keys, return_index=True)[1]
    first = np.setdiff1d(np.arange(len(keys)), seen)[0]
    assert f"row {first} " in str(found.first_duplicate)


def test_what_is_wrong_with_the_arguments_is_said(
    client: Client, table: str, tmp_path: Path
) -> None:
    np.save(tmp_path / "x.npy", WEIGHT)
    np.save(tmp_path / "x", WEIGHT)
    with pytest.raises(TableNotFound, match="nothing"):
        open_source(client, "nothing", tmp_path / "x.npy")
    with pytest.raises(InvalidArgument, match=r"'kind' must be one of parquet, csv, .*, got 'xls'"):
        open_source(client, table, tmp_path / "x.npy", kind="xls")
    with pytest.raises(InvalidArgument, match="the name does not tell the kind of the files"):
        open_source(client, table, tmp_path / "x")
    with pytest.raises(InvalidArgument, match=r"'offset' must be in -2\^63\.\.2\^63-1, got 922337"):
        open_source(client, table, tmp_path / "x.npy", offset=2**63)


# ---- continuing


def stopped_import(client: Client, table: str, path: Path, journal: Path) -> Any:
    """An import that fails after two of its batches; return its (source, journal)."""
    source = open_source(client, table, path)
    record = journal_of(journal, source.id)
    calls = iter(range(9))

    def fail(*_: Any) -> None:
        if next(calls) == 1:
            raise KeyboardInterrupt

    with pytest.raises(ImportIncomplete):
        importer.write(client, source, progress=fail, journal=record)
    return source, record


@pytest.fixture
def stopped(
    client: Client,
    table: str,
    tmp_path: Path,
    journal: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Any:
    """(source, journal) of an import of 10 batches that failed after its second."""
    monkeypatch.setattr(importer, "SAVE_ROWS", 1)
    monkeypatch.setattr("psclient.tools.incoming.BATCH_BYTES", (8 * 2 * DIM + 24) * 100)
    np.save(tmp_path / "x.npy", WEIGHT)
    return stopped_import(client, table, tmp_path / "x.npy", journal)


def test_a_repeated_import_continues_and_checks_nothing_again(
    client: Client, table: str, stopped: Any, tmp_path: Path, journal: Path
) -> None:
    source, record = stopped
    client.table(table).push(np.arange(150, 170), np.ones((20, DIM)))  # training goes on
    assert importer.resumed(client, source, record) == (0, 200)
    told: list[tuple[int, int]] = []
    done = import_rows(
        client, table, tmp_path / "x.npy", journal=journal, progress=lambda *each: told.append(each)
    )
    assert (done, told[0], told[-1]) == (N, (300, N), (N, N))
    assert client.describe_table(table).rows == N
    assert record.position() is None


def test_a_changed_file_is_imported_anew(
    client: Client, table: str, stopped: Any, tmp_path: Path, journal: Path
) -> None:
    np.save(tmp_path / "x.npy", -WEIGHT)
    source = open_source(client, table, tmp_path / "x.npy")
    assert importer.resumed(client, source, journal_of(journal, source.id)) is None
    for other in ({"offset": 1}, {"kind": "npy", "map": {"key": "k.npy"}}):
        np.save(tmp_path / "k.npy", np.arange(N))
        source = open_source(client, table, tmp_path / "x.npy", **other)
        assert journal_of(journal, source.id).position() is None


def test_a_table_created_anew_is_filled_from_the_start(
    client: Client, table: str, stopped: Any, tmp_path: Path, journal: Path
) -> None:
    source, record = stopped
    client.drop_table(table)
    client.create_table(table, DIM, optimizer="adagrad")
    assert importer.resumed(client, source, record) is None
    client.table(table).push(np.arange(N), np.ones((N, DIM)))  # the same keys, other rows
    assert importer.resumed(client, source, record) is None
    assert import_rows(client, table, tmp_path / "x.npy", journal=journal) == N
    assert np.array_equal(client.table(table).pull(np.arange(N), mode="serve"), WEIGHT)


def test_a_journal_that_is_damaged_or_cannot_be_written_does_no_harm(
    client: Client, table: str, stopped: Any, tmp_path: Path
) -> None:
    source, record = stopped
    for damage in ("", "{", "[]", '{"import": 3}', record.path.read_text().replace("200", '"x"')):
        record.path.write_text(damage)
        assert importer.resumed(client, source, record) is None
    nowhere = tmp_path / "x.npy" / "below a file"
    assert import_rows(client, table, tmp_path / "x.npy", journal=nowhere) == N


SLOW = """
import os, sys, time
from psclient.tools import ctl, importer, incoming
importer.SAVE_ROWS = 1
incoming.BATCH_BYTES = 100_000
inner, done = importer._write, iter(range(1 << 30))
def write(*batch):
    inner(*batch)
    if next(done) == 5:
        print("five", flush=True)
        time.sleep(120)
importer._write = write
ctl.main()
"""  # psctl that stops to be killed after its sixth batch


@pytest.mark.slow
def test_an_import_that_is_killed_is_continued_by_the_same_command(
    cluster2: Cluster, client: Client, table: str, tmp_path: Path, journal: Path
) -> None:
    n = 30_000
    weight = np.random.default_rng(2).standard_normal((n, DIM)).astype(np.float32)
    np.save(tmp_path / "x.npy", weight)
    words = ["import", table, str(tmp_path / "x.npy"), "--journal", str(journal)]
    variables = {**os.environ, "PSCTL_SERVERS": ",".join(cluster2.addresses)}
    importing = subprocess.Popen(
        [sys.executable, "-c", SLOW, *words], env=variables, stdout=subprocess.PIPE, text=True
    )
    assert importing.stdout is not None
    with importing.stdout:
        assert importing.stdout.readline() == "five\n"
    importing.kill()
    importing.wait()
    begun = client.describe_table(table).rows
    assert 0 < begun < n
    done = psctl(cluster2, journal, *words)
    assert done.exit_code == 0, done.stderr
    assert done.stdout == f"{table}: {n:,} rows\n"
    assert "an earlier import of these files is continued" in done.stderr
    rows = client.table(table).pull(np.arange(n), mode="serve")
    assert np.array_equal(rows, weight)
    assert list(journal.iterdir()) == []


LIMITED = r"""
import re, resource, sys
import numpy, grpc, numba, torch
from psclient import Client
from psclient.tools import importer
def memory(name): return int(re.search(name + r":\s+(\d+)", open("/proc/self/status").read())[1])
limit = (memory("VmData") << 10) + (int(sys.argv[1]) << 20)
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
with Client(sys.argv[2].split(",")) as client:
    source = importer.open_source(client, sys.argv[3], sys.argv[4], kind=sys.argv[5])
    importer.check(source)
    print(importer.count(source).rows)
"""  # reads a file while it may allocate only some MB more than at the start


WHOLE = """
try:
    numpy.ones(source.rows * 128, numpy.float32)
except MemoryError:
    print("the whole file does not fit")
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["npy", "npz"])
def test_a_file_larger_than_the_memory_is_read(
    cluster2: Cluster, client: Client, name: str, tmp_path: Path, kind: str
) -> None:
    n, dim = 1 << 20, 128
    client.create_table(name, dim, optimizer="sgd")
    weight = np.zeros((n, dim), np.float32)  # 512 MB
    path = tmp_path / f"x.{kind}"
    if kind == "npy":
        np.save(path, weight)
    else:
        np.savez_compressed(path, embeddings=weight)
    del weight
    words = ["384", ",".join(cluster2.addresses), name, str(path), kind]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED + WHOLE, *words], capture_output=True, text=True, check=False
    )
    client.drop_table(name)
    assert (done.stdout, done.returncode) == (f"{n}\nthe whole file does not fit\n", 0), done.stderr


@pytest.mark.slow
def test_a_mapped_file_of_torch_takes_no_memory_of_its_own(
    cluster2: Cluster, client: Client, name: str, tmp_path: Path
) -> None:
    """The kernel can drop what is mapped: memory that it cannot drop stays small."""
    import torch

    n, dim = 1 << 20, 128
    client.create_table(name, dim, optimizer="sgd")
    torch.save({"weight": torch.zeros(n, dim)}, tmp_path / "x.pt")
    code = LIMITED.replace("resource.setrlimit", "0 and resource.setrlimit")
    code += 'print(memory("RssAnon"))\n'
    words = ["512", ",".join(cluster2.addresses), name, str(tmp_path / "x.pt"), "torch"]
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, check=False
    )
    client.drop_table(name)
    assert done.returncode == 0, done.stderr
    rows, anonymous = map(int, done.stdout.split())
    assert rows == n
    assert anonymous < 400_000  # kB; the file has 524_288


# ---- psctl


def test_psctl_imports_and_says_what_it_does_not_read(
    cluster2: Cluster, client: Client, table: str, tmp_path: Path, journal: Path
) -> None:
    np.save(tmp_path / "x.npy", WEIGHT)
    done = psctl(cluster2, journal, "import", table, str(tmp_path / "x.npy"), "--offset", "7")
    assert (done.exit_code, done.stdout) == (0, f"{table}: 1,000 rows\n")
    assert done.stderr == (
        "note: optimizer state is not imported: the file has none that fits the optimizer"
        " 'adagrad'\n"
    )
    rows = client.table(table).pull(np.arange(7, 7 + N), mode="serve")
    assert np.array_equal(rows, WEIGHT)


def test_psctl_reports_a_dry_run(
    cluster2: Cluster, client: Client, table: str, tmp_path: Path, journal: Path
) -> None:
    weight = WEIGHT.copy()
    weight[5, 0] = np.nan
    np.savez(tmp_path / "x.npz", keys=np.arange(N) // 2, embeddings=weight)
    done = psctl(cluster2, journal, "import", table, str(tmp_path / "x.npz"), "--dry-run")
    assert done.exit_code == 1
    assert done.stdout == (
        f"{table}: 1,000 rows of dim 4 in 1 file\n"
        "duplicate keys: 500; the last row of each counts\n"
        f"  first: {tmp_path}/x.npz: array 'embeddings': row 1 (counted from 0): key 0 occurs"
        " again\n"
        "rows with NaN or infinity: 1\n"
        f"  first: {tmp_path}/x.npz: array 'embeddings': row 5 (counted from 0): key 2: numbers"
        " must be finite as float32, got nan at position 0\n"
    )
    assert client.describe_table(table).rows == 0
    assert not journal.exists()


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["x.npy", "--map", "key"], 2, "--map must be FIELD=NAME"),
        (["x.npy", "--parquet", "y"], 2, "expected TABLE PATH"),
        ([], 2, "expected TABLE PATH"),
        (["x.npy", "--from", "xls"], 1, "'kind' must be one of parquet"),
        (["nothing.npy"], 1, "nothing.npy does not exist"),
    ],
)
def test_psctl_refuses_arguments_by_name(
    cluster2: Cluster, table: str, journal: Path, words: list[str], status: int, message: str
) -> None:
    done = psctl(cluster2, journal, "import", table, *words)
    assert done.exit_code == status
    assert message in re.sub(r"\s+", " ", done.stderr.replace("│", " "))
