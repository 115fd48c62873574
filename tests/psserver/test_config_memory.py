"""The settings of memory, and those of single tables."""

from __future__ import annotations

from pathlib import Path

import given
import pytest
from given import environment, flag

from psserver import shardsettings as module
from psserver.config import ConfigError, load
from psserver.memory import Limit
from psserver.tablesettings import TableSettings

MIB, GIB = 1 << 20, 1 << 30
unset = given.unset


def sections(directory: Path, text: str) -> list[str]:
    path = directory / "ps.toml"
    path.write_text(text)
    return ["--config", str(path)]


def test_a_table_has_a_section_of_its_own(tmp_path: Path) -> None:
    text = (
        "host_bytes = 64_000_000\n[tables.user]\nhost_bytes = 2_000_000\ncache = 'lfu'\n"
        "half_life = 500\n[tables.'item/v2.1']\nhost_bytes = 1_048_576\n"
    )
    config = load(sections(tmp_path, text))
    assert config.tables == {
        "user": TableSettings(host_bytes=2_000_000, cache="lfu", half_life=500.0),
        "item/v2.1": TableSettings(host_bytes=1 << 20, cache="lru", half_life=1e5),
    }


def test_tables_may_be_set_by_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    environment(monkeypatch, tables='{"user": {"cache": "lfu"}}')
    assert load([]).tables == {"user": TableSettings(cache="lfu")}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[tables.t]\nhost_bytes = 1000", "tables.t.host_bytes: Input should be greater than or"),
        (
            "[tables.t]\ncache = 'fifo'",
            "tables.t.cache: Input should be 'lru' or 'lfu', got 'fifo'",
        ),
        ("[tables.t]\nhalf_life = 0", "tables.t.half_life: Input should be greater than 0, got 0"),
        ("[tables.t]\nrows = 1", "tables.t.rows: unknown setting"),
        ("tables.t = 5", "tables.t: "),
        ("[tables.'a b']\ncache = 'lru'", "tables: "),
        (
            "host_bytes = 2_000_000\n[tables.t]\nhost_bytes = 3_000_000",
            "tables.t.host_bytes must be at most host_bytes=2000000, got 3000000",
        ),
        ("[tables.t]\nhbm_bytes = -1", "tables.t.hbm_bytes: Input should be greater than or"),
        (
            "[tables.t]\nhbm_bytes = 40_000_000",
            "tables.t.hbm_bytes must be at most hbm_bytes=0, got 40000000",
        ),
        (
            "hbm_bytes = 40_000_000\n[tables.t]\nhbm_bytes = 3",
            "tables.t.hbm_bytes: must be 0, or at least 33554432",
        ),
        (
            "host_bytes = 2_000_000\nmemory_bytes = 3_000_000",
            "memory_bytes is the former name of host_bytes: set only host_bytes, got"
            " host_bytes=2000000 and memory_bytes=3000000",
        ),
    ],
)
def test_a_bad_setting_of_a_table_is_refused_by_name(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(sections(tmp_path, text))
    assert str(caught.value).startswith(said)


# ---- the memory of a server


def test_the_defaults_of_memory_follow_from_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "memory_limit", lambda **_: Limit(8 * GIB, "test"))
    whole, half = load([]), load(["--colocated-shards", "2"])
    assert (whole.max_inflight_bytes, half.max_inflight_bytes) == (GIB, GIB // 2)
    assert 4.5 * GIB < whole.host_bytes == whole.memory.tables < 7 * GIB
    assert 2 * half.host_bytes <= whole.host_bytes
    assert load(["--max-inflight-bytes", str(2 * GIB)]).host_bytes < whole.host_bytes


def test_a_message_that_could_never_be_admitted_is_refused_at_the_start() -> None:
    least = load([*flag("max_message_bytes", MIB), *flag("max_inflight_bytes", MIB)])
    assert least.max_message_bytes == least.max_inflight_bytes == MIB
    with pytest.raises(ConfigError) as caught:
        load([*flag("max_message_bytes", MIB), *flag("max_inflight_bytes", MIB - 1)])
    assert str(caught.value) == (
        f"max_inflight_bytes must be at least max_message_bytes={MIB}, got {MIB - 1}: larger"
        " messages would always be refused; raise max_inflight_bytes or lower max_message_bytes"
    )


@pytest.mark.parametrize("limit", [400 << 20, 500 << 20, 640 << 20, 8 * GIB])
def test_by_default_every_message_up_to_the_limit_can_be_admitted(
    limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "memory_limit", lambda **_: Limit(limit, "test"))
    config = load(flag("memory_bytes", 16 << 20))
    assert config.max_message_bytes <= config.max_inflight_bytes
    config = load([*flag("memory_bytes", 16 << 20), *flag("max_message_bytes", GIB)])
    assert config.max_inflight_bytes == GIB


def test_a_limit_that_leaves_nothing_is_refused_unless_the_budget_is_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "memory_limit", lambda **_: Limit(200 << 20, "test"))
    with pytest.raises(ConfigError, match=r"^no memory is left for tables: the limit is 200 MiB"):
        load([])
    assert load(["--memory-bytes", str(64 << 20)]).host_bytes == 64 << 20
