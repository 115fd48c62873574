"""Parquet files as others write them: what can be stored is read, all else is refused by name."""

from __future__ import annotations

import decimal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from psclient.errors import InvalidArgument
from psclient.tools import source
from psclient.tools.source import Target, files_of, read, require

TARGET = Target("t", 2, 4, "adagrad")
STATE = {"ps.schema": '{"optimizer": {"name": "adagrad"}}'}
KEYS = [1, -1, -(2**63), 2**63 - 1]
BITS = [1, 2**64 - 1, 2**63, 2**63 - 1]
LISTS = [[float(i), 0.5] for i in range(4)]


def write(path: Path, metadata: dict[str, str] | None = None, **columns: Any) -> Path:
    table = pa.table({"key": pa.array(KEYS), "embedding": pa.array(LISTS, pa.list_(pa.float32()))})
    for name, column in columns.items():
        if name in table.column_names:
            table = table.drop_columns(name)
        if column is not None:
            table = table.append_column(name, column)
    parquet.write_table(table.replace_schema_metadata(metadata), path)
    return path


def everything(path: Path) -> list[source.Rows]:
    require(path, TARGET)
    return list(read(path, TARGET))


def rows_of(path: Path) -> tuple[list[Any], ...]:
    assert require(path, TARGET) == 4
    [rows] = read(path, TARGET)
    return rows.keys.tolist(), rows.rows.tolist(), rows.steps, rows.frequencies


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "x.parquet"


# ---- what is read


UNSIGNED = pa.array(BITS, pa.uint64())
EXACT = decimal.Context(prec=40)
DECIMALS = [decimal.Decimal(bits) for bits in BITS]
KEY_COLUMNS = {
    "int64": pa.array(KEYS),
    "uint64": UNSIGNED,
    "decimal(20, 0), as Spark writes uint64": pa.array(DECIMALS, pa.decimal128(20, 0)),
    "negative decimals": pa.array([decimal.Decimal(k) for k in KEYS], pa.decimal128(38, 0)),
    "decimal256": pa.array(DECIMALS, pa.decimal256(40, 0)),
    "dictionary": UNSIGNED.dictionary_encode(),
}


@pytest.mark.parametrize("kind", KEY_COLUMNS)
def test_keys_of_every_type_mean_the_same_bits(path: Path, kind: str) -> None:
    assert rows_of(write(path, key=KEY_COLUMNS[kind])) == (BITS, LISTS, None, None)


@pytest.mark.parametrize("kind", [pa.int8(), pa.int16(), pa.int32()])
def test_narrow_keys_keep_their_sign(path: Path, kind: Any) -> None:
    write(path, key=pa.array([1, -1, -128, 127], kind))
    assert rows_of(path)[0] == [1, 2**64 - 1, 2**64 - 128, 127]


LIST_TYPES = {
    "list": pa.list_(pa.float32()),
    "list, as DuckDB writes it": pa.list_(pa.field("element", pa.float64())),
    "large list, as polars writes it": pa.large_list(pa.field("element", pa.float32())),
    "fixed size": pa.list_(pa.float32(), 2),
    "fixed size of float16": pa.list_(pa.float16(), 2),
    "float16": pa.list_(pa.float16()),
    "float64": pa.list_(pa.float64()),
}


@pytest.mark.parametrize("kind", LIST_TYPES)
def test_embeddings_of_every_type_of_list_are_read(path: Path, kind: str) -> None:
    lists = [[np.float16(x) for x in each] for each in LISTS] if "16" in kind else LISTS
    write(path, embedding=pa.array(lists, LIST_TYPES[kind]))
    assert rows_of(path)[:2] == (BITS, LISTS)


def test_state_is_read_where_the_file_says_that_it_is_of_the_optimizer(path: Path) -> None:
    state = pa.array([[7.0, 8.0]] * 4, pa.list_(pa.float32()))
    assert rows_of(write(path, STATE, state=state))[1][1] == [1.0, 0.5, 7.0, 8.0]
    for metadata in ({}, {"ps.schema": "junk"}, {"ps.schema": '{"optimizer": 3}'}):
        assert rows_of(write(path, metadata, state=state))[1] == LISTS


@pytest.mark.parametrize("kind", [pa.int8(), pa.uint16(), pa.int64(), pa.uint64()])
def test_steps_and_frequencies_of_every_integer_type_are_read(path: Path, kind: Any) -> None:
    numbers = pa.array([0, 1, 2, 127], kind)
    _, _, steps, frequencies = rows_of(write(path, step=numbers, frequency=numbers))
    assert steps.tolist() == frequencies.tolist() == [0, 1, 2, 127]


def test_other_columns_are_ignored(path: Path) -> None:
    write(path, name=pa.array(["a", None, "c", "d"]), version=pa.array([1.5, None, 3, 4]))
    assert rows_of(path)[:2] == (BITS, LISTS)


@pytest.mark.parametrize("groups", [0, 1, 3])
def test_a_file_without_rows_has_none(path: Path, groups: int) -> None:
    empty = parquet.read_table(write(path)).slice(0, 0)
    with parquet.ParquetWriter(path, empty.schema) as out:
        for _ in range(groups):
            out.write_table(empty)
    assert require(path, TARGET) == 0
    assert sum(len(rows.keys) for rows in read(path, TARGET)) == 0


def test_many_batches_are_read_in_order(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "BATCH_BYTES", 100)
    write(path)
    assert [rows.keys.tolist() for rows in read(path, TARGET)] == [BITS[:2], BITS[2:]]


# ---- what is refused


FLOATS = pa.list_(pa.float32())
HUGE = [[1.0, 2.0]] * 3
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no key": ({"key": None}, "must have exactly one column 'key', got 0"),
    "no embedding": ({"embedding": None}, "must have exactly one column 'embedding', got 0"),
    "string keys": ({"key": pa.array(list("abcd"))}, "its type is string: turn strings into keys"),
    "double keys": ({"key": pa.array([1.0] * 4)}, "column 'key' must contain integers"),
    "boolean keys": ({"key": pa.array([True] * 4)}, "its type is bool"),
    "a fraction in keys": (
        {"key": pa.array([decimal.Decimal("1.5")] * 4, pa.decimal128(20, 1))},
        "column 'key' must contain integers of up to 64 bits or decimal(p, 0), but its type is dec",
    ),
    "null key": ({"key": pa.array([1, None, 3, 4])}, "row 1 (counted from 0): column 'key' must"),
    "large decimal key": (
        {"key": pa.array([decimal.Decimal(2**64)] * 4, pa.decimal128(20, 0))},
        "row 0 (counted from 0): column 'key' must contain keys in -2^63..2^64-1",
    ),
    "small decimal key": (
        {"key": pa.array([decimal.Decimal(-(2**63) - 1)] * 4, pa.decimal128(20, 0))},
        "column 'key' must contain keys in -2^63..2^64-1",
    ),
    "embedding no list": ({"embedding": pa.array([1.0] * 4)}, "must contain lists of float16"),
    "integers in lists": ({"embedding": pa.array([[1, 2]] * 4)}, "its type is list<"),
    "strings in lists": ({"embedding": pa.array([["a", "b"]] * 4)}, "its type is list<"),
    "nested lists": ({"embedding": pa.array([[[1.0, 2.0]]] * 4)}, "its type is list<"),
    "struct": ({"embedding": pa.array([{"list": [1.0, 2.0]}] * 4)}, "its type is struct<"),
    "null list": (
        {"embedding": pa.array([[1.0, 2.0], None] * 2, FLOATS)},
        "row 1 (counted from 0)",
    ),
    "null fixed list": (
        {"embedding": pa.array([[1.0, 2.0], None] * 2, pa.list_(pa.float32(), 2))},
        "row 1 (counted from 0): column 'embedding' must not be null",
    ),
    "null in list": (
        {"embedding": pa.array([*HUGE, [1.0, None]], FLOATS)},
        "row 3 (counted from 0): column 'embedding' must not contain null",
    ),
    "ragged": (
        {"embedding": pa.array([[1.0, 2.0], [1.0], [1.0, 2.0, 3.0], [1.0, 2.0]], FLOATS)},
        "row 1 (counted from 0): column 'embedding' must have 2 numbers, got 1",
    ),
    "empty lists": ({"embedding": pa.array([[]] * 4, FLOATS)}, "must have 2 numbers, got 0"),
    "another dim": ({"embedding": pa.array([[1.0] * 3] * 4, FLOATS)}, "must have 2 numbers"),
    "another fixed dim": (
        {"embedding": pa.array([[1.0] * 3] * 4, pa.list_(pa.float32(), 3))},
        "must contain lists of 2 numbers, got 3 (table 't', dim 2)",
    ),
    "NaN": (
        {"embedding": pa.array([*HUGE, [1.0, np.nan]], FLOATS)},
        "row 3 (counted from 0): column 'embedding' must be finite as float32, got nan at position"
        " 1",
    ),
    "infinite": ({"embedding": pa.array([*HUGE, [np.inf, 1.0]], FLOATS)}, "got inf at position 0"),
    "beyond float32": ({"embedding": pa.array([*HUGE, [1e39, 1.0]])}, "got 1e+39 at position 0"),
    "fractional step": ({"step": pa.array([1.5] * 4)}, "column 'step' must contain integers"),
    "double steps": ({"step": pa.array([1.0] * 4)}, "its type is double: cast it to int64"),
    "null step": ({"step": pa.array([1, 2, None, 4])}, "row 2 (counted from 0): column 'step'"),
    "large step": ({"step": pa.array([1, 2, 3, 2**47])}, "in -140737488355328..140737488355327"),
    "large unsigned step": ({"step": UNSIGNED}, "got 18446744073709551615"),
    "double frequency": (
        {"frequency": pa.array([np.nan] * 4)},
        "'frequency' must contain integers",
    ),
    "null frequency": ({"frequency": pa.array([1, None, 3, 4])}, "'frequency' must not be null"),
    "negative frequency": ({"frequency": pa.array([1, 2, -3, 4])}, "in 0..4294967295, got -3"),
    "large frequency": ({"frequency": pa.array([1, 2, 3, 2**32])}, "got 4294967296"),
    "decimal frequency": (
        {"frequency": pa.array([decimal.Decimal(1)] * 4, pa.decimal128(20, 0))},
        "'frequency' must contain integers",
    ),
    "strings of state": ({"state": pa.array(["x"] * 4)}, "'state' must contain lists"),
    "short state": (
        {"state": pa.array([[1.0]] * 4, FLOATS)},
        "column 'state' must have 2 numbers, got 1",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_stored_as_it_is_is_refused_by_name(path: Path, case: str) -> None:
    columns, message = REFUSED[case]
    write(path, STATE, **columns)
    with pytest.raises(InvalidArgument) as caught:
        everything(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_two_columns_of_one_name_are_refused(path: Path) -> None:
    column = pa.array(KEYS)
    names = ["key", "key", "embedding"]
    parquet.write_table(pa.table([column, column, pa.array(LISTS, FLOATS)], names), path)
    with pytest.raises(InvalidArgument, match="must have exactly one column 'key', got 2"):
        require(path, TARGET)


def test_the_row_is_counted_over_all_batches(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "BATCH_BYTES", 100)
    write(path, frequency=pa.array([1, 2, 3, -4]))
    with pytest.raises(InvalidArgument, match=r"row 3 \(counted from 0\)"):
        list(read(path, TARGET))


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def without_a_page(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:4] + bytes(200) + data[204:])


NOT_PARQUET: dict[str, Callable[[Path], Any]] = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("key,embedding\n1,2\n" * 99),
    "magic only": lambda path: path.write_bytes(b"PAR1PAR1"),
    "truncated": truncated,
    "damaged": without_a_page,
    "encrypted": lambda path: path.write_bytes(path.read_bytes()[:-4] + b"PARE"),
    "huge footer": lambda path: path.write_bytes(path.read_bytes()[:-8] + b"\xff\xff\xff\x7fPAR1"),
}


@pytest.mark.parametrize("kind", NOT_PARQUET)
def test_what_is_not_parquet_is_refused_by_file(path: Path, kind: str) -> None:
    NOT_PARQUET[kind](write(path))
    with pytest.raises(InvalidArgument) as caught:
        everything(path)
    assert str(caught.value).startswith(f"{path}: cannot be read as Parquet: ")
    assert "\n" not in str(caught.value)


def test_flipped_bytes_of_an_export_are_noticed_or_harmless(path: Path) -> None:
    """No damage to a file leads to another error, or to other rows."""
    table = parquet.read_table(write(path))
    parquet.write_table(table, path, write_page_checksum=True, compression="none")
    data, rng = path.read_bytes(), np.random.default_rng(0)
    refused = 0
    for at in rng.choice(len(data), 150, replace=False).tolist():
        path.write_bytes(
            data[:at] + bytes([data[at] ^ (1 << int(rng.integers(8)))]) + data[at + 1 :]
        )
        try:
            require(path, TARGET)
            rows = [(each.keys.tolist(), each.rows.tolist()) for each in read(path, TARGET)]
        except InvalidArgument:
            refused += 1
        else:
            assert rows in ([(BITS, LISTS)], [])
    assert refused > 75


# ---- which files


def test_a_directory_gives_its_parquet_files_by_name(tmp_path: Path) -> None:
    for each in (
        "b.parquet",
        "a.parquet",
        "x/c.parquet",
        "_tmp/d.parquet",
        ".e.parquet",
        "_SUCCESS",
    ):
        (tmp_path / each).parent.mkdir(exist_ok=True)
        (tmp_path / each).touch()
    (tmp_path / "f.parquet").mkdir()
    names = [str(each.relative_to(tmp_path)) for each in files_of(tmp_path)]
    assert names == ["a.parquet", "b.parquet", "x/c.parquet"]
    assert files_of(tmp_path / "_SUCCESS") == [tmp_path / "_SUCCESS"]


def test_no_files_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"contains no \*\.parquet file"):
        files_of(tmp_path)
    with pytest.raises(InvalidArgument, match="nothing does not exist"):
        files_of(tmp_path / "nothing")
    with pytest.raises(InvalidArgument, match="/dev/null is not a file or a directory"):
        files_of(Path("/dev/null"))


# ---- memory


def peak(path: Path) -> tuple[float, str]:
    """MB that checking a file adds to a process, and the error."""
    code = f"""
import resource
from pathlib import Path
import numpy as np, pyarrow.parquet, pyarrow.compute
from psclient.tools.source import Target, read, require
def used(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
before, target = used(), Target("t", 2, 4, "adagrad")
try:
    require(Path({str(path)!r}), target)
    for _ in read(Path({str(path)!r}), target): pass
    error = "none"
except Exception as failure:
    error = f"{{type(failure).__name__}}: {{failure}}"
print(used() - before, error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    size, error = done.stdout.split(maxsplit=1)
    return float(size), error


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wide lists", "skewed lists", "wide fixed lists"])
def test_a_small_file_cannot_fill_the_memory(path: Path, kind: str) -> None:
    """Files of kilobytes whose lists have a gigabyte of zeros."""
    many = 128 << 20
    zeros = pa.array(np.zeros(many, np.float32))
    if kind == "wide fixed lists":
        lists = pa.FixedSizeListArray.from_arrays(zeros, many)
    elif kind == "wide lists":
        lists = pa.ListArray.from_arrays(pa.array([0, many], pa.int32()), zeros)
    else:  # as many numbers as there should be, all in the first row
        rows = many - 1
        offsets = np.full(rows + 1, many, np.int32)
        offsets[0] = 0
        lists = pa.ListArray.from_arrays(pa.array(offsets), zeros)
    table = pa.table({"key": pa.array(np.zeros(len(lists), np.int64)), "embedding": lists})
    parquet.write_table(table, path, compression="zstd", row_group_size=len(lists))
    del table, lists, zeros
    size, error = peak(path)
    assert error.startswith(f"InvalidArgument: {path}: ")
    assert size < 150
    assert path.stat().st_size < 1e6


@pytest.mark.slow
def test_a_large_row_group_is_read_in_small_batches(path: Path) -> None:
    rng, n = np.random.default_rng(0), 20 << 20
    numbers = pa.array(rng.random(2 * n, np.float32))
    table = pa.table(
        {"key": np.arange(n), "embedding": pa.FixedSizeListArray.from_arrays(numbers, 2)}
    )
    parquet.write_table(table, path, row_group_size=n)
    del table, numbers
    size, error = peak(path)
    assert error.strip() == "none"
    assert size < 150
