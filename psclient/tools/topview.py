"""Draw a sample of ``psctl top`` so that it fits into the terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from psclient.tools.figures import UNITS
from psclient.tools.rates import Sample, ShardError, ShardRates, TableRates

View = Literal["all", "shards", "tables", "errors"]
VIEWS: tuple[View, ...] = ("all", "shards", "tables", "errors")
SORTS = ("shard", "requests", "p99", "memory")  # columns by which shards can be sorted
CLOCK = 90  # columns of a terminal from which on the time is shown
WIDE = 160  # columns of a terminal from which on more is shown
WIDER = 180  # the same, with amounts of memory and disk in addition to shares
WIDEST = 205  # the same, if there is a column of GPU memory
ADDRESS = 24  # longest address that is shown
HEADS = 3  # lines of a table besides its rows: title, heads, rule
STYLES = {"ready": "green", "starting": "magenta", "restoring": "magenta", "draining": "magenta"}
BAD = "bold red"  # style of states in which a shard does not work, and of what is nearly used up
FULL = 0.9  # used part of a limit that is shown in the style BAD


@dataclass(slots=True)
class Look:
    """What the user chose with keys.

    view  which tables are shown
    sort  column by which shards are sorted; tables are sorted by requests, except with "shard"
    """

    view: View = "all"
    sort: str = "shard"

    def press(self, key: str) -> None:
        """Change the choice as a key says; a key without a meaning changes nothing."""
        if key == "s":
            self.sort = SORTS[(SORTS.index(self.sort) + 1) % len(SORTS)]
        if key in ("t", "v"):
            self.view = VIEWS[(VIEWS.index(self.view) + 1) % len(VIEWS)]


def screen(sample: Sample, look: Look, width: int, height: int, *, keys: bool) -> RenderableType:
    """Return what to show of a sample in ``height`` lines of ``width`` characters.

    keys  whether to name the keys in the first line
    """
    parts: list[RenderableType] = [_title(sample, look, width, keys=keys)]
    left = height - 1
    for name in ("shards", "tables", "errors"):
        if look.view not in ("all", name):
            continue
        last = name == "errors" or look.view == name
        share = left if last else left * 2 // 3
        title, table = DRAWN[name](sample, look, width, max(share - HEADS - 1, 1))
        lines = len(table.rows) + HEADS + 1
        if lines > left:
            break
        parts += [Text(), Text(title, style="bold"), table]
        left -= lines
    return Group(*parts)


def whole(sample: Sample, look: Look, width: int) -> RenderableType:
    """Return all of a sample, however many lines it takes."""
    return screen(sample, look, width, 1 << 20, keys=False)


def _title(sample: Sample, look: Look, width: int, *, keys: bool) -> Text:
    """Return the first line: how many shards are ready, the time, and the keys."""
    ready = sum(each.state == "ready" for each in sample.shards)
    total = sum(each.requests_per_second or 0.0 for each in sample.shards)
    clock = time.strftime("  %H:%M:%S", time.localtime(sample.time)) if width >= CLOCK else ""
    state = f"{ready} of {len(sample.shards)} shards ready"
    style = "bold" if ready == len(sample.shards) else BAD
    text = Text(no_wrap=True, overflow="ellipsis")
    text.append(state, style=style).append(f"  {count(total)} req/s{clock}")
    if keys:
        shown = f"q quit  s sort:{look.sort}  t show:{look.view}"
        text.append(" " * max(width - text.cell_len - len(shown), 2)).append(shown, style="dim")
    return text


def _table(*heads: str) -> Table:
    """Return an empty table; cells are aligned right, or left if the head ends with "<"."""
    table = Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        collapse_padding=True,
    )
    for head in heads:
        justify: Literal["left", "right"] = "left" if head.endswith("<") else "right"
        table.add_column(head.removesuffix("<"), justify=justify, no_wrap=True)
    return table


def _fill(table: Table, lines: Sequence[Sequence[str | Text]], most: int) -> Table:
    """Add lines to a table and return it. Beyond ``most`` lines, the last says how many more."""
    shown = lines if len(lines) <= most else lines[: most - 1]
    for line in shown:
        table.add_row(*line)
    if len(shown) < len(lines):
        more = f"{len(lines) - len(shown)} more"
        at = next(i for i, each in enumerate(table.columns) if each.justify == "left")
        table.add_row(*(more if i == at else "" for i in range(len(table.columns))), style="dim")
    return table


# ---- shards


def _shards(sample: Sample, look: Look, width: int, most: int) -> tuple[str, Table]:
    """Return the title and the table of shards, with at most ``most`` lines."""
    wide = width >= WIDE
    columns = [each for each in COLUMNS if wide or not each.wide]
    if all(each.gpu_bytes is None for each in sample.shards):
        columns = [each for each in columns if each.head != "GPU"]
    amounts = width >= (WIDER if len(columns) < len(COLUMNS) else WIDEST)
    cells = [each.full or each.cell if amounts else each.cell for each in columns]
    table = _table(*(each.head for each in columns))
    lines = [
        [cell(each) for cell in cells] for each in sorted(sample.shards, key=_order(look.sort))
    ]
    return "shards", _fill(table, lines, most)


Value = Callable[[ShardRates], float | None]


def _order(sort: str) -> Callable[[ShardRates], Any]:
    """Return the key by which shards are sorted: by number, or the largest value first."""
    values: dict[str, Value] = {
        "requests": lambda each: each.requests_per_second,
        "p99": lambda each: each.p99_seconds,
        "memory": lambda each: part(each.memory_bytes, each.memory_limit_bytes),
    }
    if sort not in values:
        return lambda each: each.shard
    value = values[sort]
    return lambda each: (-(value(each) or 0.0), each.shard)


def _state(each: ShardRates) -> Text:
    """Return the state of a shard."""
    return Text(each.state, style=STYLES.get(each.state, BAD))


def _share(used: int | None, limit: int | None) -> Text:
    """Return how much of a limit is used, in percent."""
    value = part(used, limit)
    if value is None:
        return Text("-")
    return Text(f"{value:.0%}", style=BAD if value >= FULL else "")


def _amount(used: int | None, limit: int | None) -> Text:
    """Return how much is used, of how much, and in percent."""
    if used is None:
        return Text("-")
    if not limit:
        return Text(size(used))
    return Text.assemble(f"{size(used)} of {size(limit)} ", _share(used, limit))


def _lag(each: ShardRates) -> str:
    """Return the age of the oldest change that the slowest subscriber has not received."""
    return duration(each.lag_seconds) if each.subscribers else "-"


Cell = Callable[[ShardRates], str | Text]


@dataclass(frozen=True, slots=True)
class Column:
    """A column of the table of shards.

    head  its head; it is aligned right, or left if the head ends with "<"
    cell  returns the cell for a shard
    full  the same in a wide terminal; None: as ``cell``
    wide  whether only a wide terminal has this column
    """

    head: str
    cell: Cell
    full: Cell | None = None
    wide: bool = False


COLUMNS = (
    Column("#", lambda each: str(each.shard)),
    Column("address<", lambda each: shortened(each.address, ADDRESS), wide=True),
    Column("state<", _state),
    Column("up", lambda each: duration(each.uptime_seconds), wide=True),
    Column("req/s", lambda each: count(each.requests_per_second)),
    Column("keys/s", lambda each: count(each.keys_per_second)),
    Column("B/s", lambda each: size(each.bytes_per_second)),
    Column("p50", lambda each: duration(each.p50_seconds)),
    Column("p99", lambda each: duration(each.p99_seconds)),
    Column("busy", lambda each: percent(each.engine_busy)),
    Column("wait", lambda each: duration(each.queue_wait_seconds)),
    Column("queue", lambda each: count(each.requests_waiting), wide=True),
    Column("turn", lambda each: duration(each.turn_wait_seconds), wide=True),
    Column("CPU", lambda each: percent(each.cpu), wide=True),
    Column(
        "mem",
        lambda each: _share(each.memory_bytes, each.memory_limit_bytes),
        lambda each: _amount(each.memory_bytes, each.memory_limit_bytes),
    ),
    Column(
        "GPU",
        lambda each: _share(each.gpu_bytes, each.gpu_limit_bytes),
        lambda each: _amount(each.gpu_bytes, each.gpu_limit_bytes),
        wide=True,
    ),
    Column(
        "disk",
        lambda each: _share(each.disk_bytes, each.disk_limit_bytes),
        lambda each: _amount(each.disk_bytes, each.disk_limit_bytes),
    ),
    Column("lag", _lag),
    Column("flush", lambda each: duration(each.flush_age_seconds), wide=True),
    Column("err/s", lambda each: count(each.errors_per_second), wide=True),
)


# ---- tables and errors


def _tables(sample: Sample, look: Look, width: int, most: int) -> tuple[str, Table]:
    """Return the title and the table of tables, with at most ``most`` lines."""
    heads = ("table<", "rows", "memory", "req/s", "pulled keys/s", "pushed keys/s")
    lines = [
        (
            Text(shortened(each.table, max(width - 60, 16))),
            count(each.rows),
            size(each.bytes),
            count(each.requests_per_second),
            count(each.pulled_keys_per_second),
            count(each.pushed_keys_per_second),
        )
        for each in sorted(sample.tables, key=_busiest if look.sort != "shard" else _largest)
    ]
    none = [Text("none"), *(Text("-") for _ in heads[1:])]
    return "tables", _fill(_table(*heads), lines or [none], most)


def _busiest(each: TableRates) -> Any:
    return (-(each.requests_per_second or 0.0), each.table)


def _largest(each: TableRates) -> Any:
    return (-each.rows, each.table)


def _errors(sample: Sample, _: Look, width: int, most: int) -> tuple[str, Table]:
    """Return the title and the table of errors, with at most ``most`` lines."""
    table = _table("age", "shard", "error<")
    lines = [
        ("now", str(each.shard), Text(shortened(each.problem or each.state, width - 13), BAD))
        for each in sample.shards
        if each.state != "ready"
    ]
    lines += [_error(each, sample.time, width) for each in sample.errors]
    shown = _fill(table, lines or [("-", "-", Text("none"))], most)
    return "problems and recent errors", shown


def _error(each: ShardError, now: float, width: int) -> tuple[str, str, Text]:
    """Return the cells for a recent error."""
    text = f"{each.method} {each.reason or each.code}: {' '.join(each.message.split())}"
    if each.count > 1:
        text = f"{each.count} x {text}"
    age = duration(max(now - each.time, 0.0))
    return age, str(each.shard), Text(shortened(text, width - 13))


Drawn = Callable[[Sample, Look, int, int], tuple[str, Table]]
DRAWN: dict[str, Drawn] = {"shards": _shards, "tables": _tables, "errors": _errors}


# ---- numbers


def part(used: int | None, limit: int | None) -> float | None:
    """Return the used part of a limit, 0..1; None: it is not known, or there is no limit."""
    return None if used is None or not limit else used / limit


def count(value: float | None) -> str:
    """Format a number in at most 5 characters: "-", "0.5", "12", "1.2k", "35M"."""
    if value is None:
        return "-"
    if value < 9.95:
        return f"{value:.1f}".removesuffix(".0")
    for unit in ("", "k", "M", "G", "T"):
        if value < 999.5 or unit == "T":
            return f"{value:.1f}{unit}" if unit and value < 9.95 else f"{value:.0f}{unit}"
        value /= 1000
    raise AssertionError


def size(value: float | None) -> str:
    """Format a number of bytes in at most 6 characters: "-", "12B", "1.2KiB", "35MiB"."""
    if value is None:
        return "-"
    for unit in UNITS:
        if value < 999.5 or unit == UNITS[-1]:
            return f"{value:.1f}{unit}" if unit != "B" and value < 9.95 else f"{value:.0f}{unit}"
        value /= 1024
    raise AssertionError


def duration(seconds: float | None) -> str:
    """Format a duration in at most 5 characters: "-", "850us", "1.2ms", "3s", "5min", "2d"."""
    if seconds is None:
        return "-"
    for unit, length in (("us", 1e-6), ("ms", 1e-3), ("s", 1.0)):
        value = seconds / length
        if value < (99.5 if unit == "s" else 999.5):
            return f"{value:.1f}{unit}" if 0 < value < 9.95 else f"{value:.0f}{unit}"
    for unit, length in (("min", 60.0), ("h", 3600.0)):
        if seconds / length < 99.5:
            return f"{seconds / length:.0f}{unit}"
    return f"{seconds / 86_400:.0f}d"


def percent(value: float | None) -> str:
    """Format a share in percent."""
    return "-" if value is None else f"{value:.0%}"


def shortened(text: str, length: int) -> str:
    """Return the first ``length`` characters of a text; an ellipsis marks that it was longer."""
    return text if len(text) <= length else f"{text[: max(length - 1, 0)]}…"
