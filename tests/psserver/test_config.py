"""The configuration: which source counts, and how each refuses what it does not know."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import given
import pytest
from given import environment, file, flag
from pydantic import ValidationError

from psserver.config import CONFIG, PREFIX, ConfigError, ServerConfig, load
from psserver.memory import memory_limit

unset = given.unset

MIB, GIB = 1 << 20, 1 << 30

# field -> (in a file, in the environment, as a flag): three different, valid values
VALUES: dict[str, tuple[Any, Any, Any]] = {
    "shard": (1, 2, 3),
    "shards": (10, 11, 12),
    "host": ("10.0.0.1", "10.0.0.2", "::1"),
    "port": (7001, 7002, 7003),
    "metrics_port": (0, 9401, 9402),
    "http_peers": ("", "ps-{shard}.ps:9400", "[fd00::{shard}]:80"),
    "http_names": ("", "ps.example.com", "a.b, c.d"),
    "data_dir": (Path("/a"), Path("/b"), Path("/c")),
    "memory_bytes": (GIB, 2 * GIB, 3 * GIB),
    "host_bytes": (GIB, 2 * GIB, 3 * GIB),
    "hbm_bytes": (0, GIB, 2 * GIB),
    "disk_bytes": (0, GIB, 2 * GIB),
    "lane": ("off", "/run/ps", "auto"),
    "lane_bytes": (1 << 20, 1 << 30, 2 << 30),
    "io_threads": (1, 16, 256),
    "colocated_shards": (2, 3, 4),
    "max_message_bytes": (1 << 20, 2 << 20, 3 << 20),
    "max_keys": (10, 20, 30),
    "max_inflight_bytes": (1 << 27, 1 << 28, 1 << 29),
    "max_calls": (1, 2, 3),
    "max_connections": (1, 2, 3),
    "receive_seconds": (0.5, 1.0, 2.0),
    "max_tables": (1, 2, 3),
    "max_sessions": (1, 2, 3),
    "session_ttl_seconds": (600.0, 700.5, 800.0),
    "session_pushes": (64, 4096, 1 << 20),
    "segment_bytes": (1 << 20, 2 << 20, 3 << 20),
    "fsync_seconds": (0.001, 0.5, 10.0),
    "busy_poll_seconds": (0.0, 0.002, 1.0),
    "log_keep_bytes": (0, 1, 2),
    "log_keep_seconds": (0.0, 1.5, 2.0),
    "flush_seconds": (0.5, 1.0, 2.0),
    "scrub_seconds": (0.0, 60.0, 3600.0),
    "max_tombstones": (0, 1, 2),
    "metrics_tables": (0, 7, 100),
    "max_subscribers": (0, 1, 2),
    "checkpoint_url": ("file:///a", "file:///b", "s3://c"),
    "checkpoint_store_seconds": (1.0, 2.5, 120.0),
    "drain_seconds": (0.0, 1.5, 2.0),
    "policy_file": (Path("/a"), Path("/b"), Path("/c")),
    "http_token_file": (Path("/a"), Path("/b"), Path("/c")),
    "audit_file": (Path("/a"), Path("/b"), Path("/c")),
    "cluster": ("", "a", "prod/ps-0.b_c"),
    "advertise": ("ps-0.ps:7000", "10.0.0.1:1", "[fd00::1]:65535"),
    "plaintext": (1, 0, 1),
    "tls_certificate": (Path("/a"), Path("/b"), Path("/c")),
    "tls_key": (Path("/a"), Path("/b"), Path("/c")),
    "tls_ca": (Path("/a"), Path("/b"), Path("/c")),
    "tls_client_auth": ("required", "none", "required"),
}
PARTNERS = {  # settings that a setting needs
    "tls_certificate": {"tls_key": "/k", "tls_ca": "/a"},
    "tls_key": {"tls_certificate": "/c", "tls_ca": "/a"},
    "tls_ca": {"tls_certificate": "/c", "tls_key": "/k"},
    "tls_client_auth": {"tls_certificate": "/c", "tls_key": "/k", "tls_ca": "/a"},
    "host": {"plaintext": 1},
    "shards": {},
}
CLUSTER = {"shards": 100}  # so that every shard number above is one of the cluster

# field -> values just beyond its bounds, and the rule that the message names
BAD: list[tuple[str, Any, str]] = [
    ("shard", -1, "greater than or equal to 0"),
    ("shards", 0, "greater than or equal to 1"),
    ("hbm_bytes", -1, "greater than or equal to 0"),
    ("hbm_bytes", (32 << 20) - 1, "must be 0, or at least 33554432 (32 MiB)"),
    ("shards", 1025, "less than or equal to 1024"),
    ("port", 0, "greater than or equal to 1"),
    ("port", 65536, "less than or equal to 65535"),
    ("metrics_port", -1, "greater than or equal to 0"),
    ("metrics_port", 65536, "less than or equal to 65535"),
    ("http_peers", "ps-{shard}", "must be HOST:PORT"),
    ("http_peers", "http://ps-{shard}:80", "must be a host without a port"),
    ("http_peers", "a:1,b", "must be HOST:PORT"),
    ("http_names", "http://ps", "must be a host without a port"),
    ("http_names", "a b", "must be a name, an IPv4 or an IPv6 address"),
    ("colocated_shards", 0, "greater than or equal to 1"),
    ("colocated_shards", 1025, "less than or equal to 1024"),
    ("host", "", "must be a name, an IPv4 or an IPv6 address"),
    ("host", "a b", "must be a name, an IPv4 or an IPv6 address"),
    ("host", "127.0.0.1:7000", "must be a host without a port"),
    ("host", "[::1]:7000", "must be a host without a port"),
    ("host", "[localhost]", "must be a host without a port"),
    ("host", "unix:/tmp/x", "must be a host without a port"),
    ("memory_bytes", (1 << 20) - 1, "greater than or equal to 1048576"),
    ("host_bytes", (1 << 20) - 1, "greater than or equal to 1048576"),
    ("disk_bytes", -1, "greater than or equal to 0"),
    ("lane", "data", "must be auto, on, off or the absolute path of a directory"),
    ("lane_bytes", 1, "greater than or equal to 1048576"),
    ("io_threads", 0, "greater than or equal to 1"),
    ("io_threads", 257, "less than or equal to 256"),
    ("max_message_bytes", (1 << 16) - 1, "greater than or equal to 65536"),
    ("max_message_bytes", GIB + 1, "less than or equal to 1073741824"),
    ("max_keys", 0, "greater than or equal to 1"),
    ("max_inflight_bytes", (1 << 16) - 1, "greater than or equal to 65536"),
    ("max_calls", 0, "greater than or equal to 1"),
    ("max_connections", 0, "greater than or equal to 1"),
    ("receive_seconds", 0.0, "greater than 0"),
    ("max_tables", 0, "greater than or equal to 1"),
    ("max_sessions", 0, "greater than or equal to 1"),
    ("session_ttl_seconds", 599.0, "greater than or equal to 600"),
    ("session_pushes", 63, "greater than or equal to 64"),
    ("session_pushes", (1 << 20) + 1, "less than or equal to 1048576"),
    ("segment_bytes", (1 << 20) - 1, "greater than or equal to 1048576"),
    ("fsync_seconds", 0.0, "greater than 0"),
    ("fsync_seconds", 10.5, "less than or equal to 10"),
    ("busy_poll_seconds", -0.1, "greater than or equal to 0"),
    ("busy_poll_seconds", 1.5, "less than or equal to 1"),
    ("log_keep_bytes", -1, "greater than or equal to 0"),
    ("log_keep_seconds", -0.5, "greater than or equal to 0"),
    ("flush_seconds", 0.0, "greater than 0"),
    ("scrub_seconds", -1.0, "greater than or equal to 0"),
    ("metrics_tables", 65_537, "less than or equal to 65536"),
    ("max_tombstones", -1, "greater than or equal to 0"),
    ("checkpoint_store_seconds", 0, "greater than 0"),
    ("drain_seconds", -0.5, "greater than or equal to 0"),
    ("cluster", "a b", "must have at most 128 characters"),
    ("cluster", 129 * "a", "must have at most 128 characters"),
    ("advertise", "ps-0.ps", "must be HOST:PORT"),
    ("advertise", "ps-0.ps:0", "must be HOST:PORT"),
    ("advertise", "ps-0.ps:65536", "must be HOST:PORT"),
    ("advertise", "http://ps-0.ps:7000", "must be a host without a port"),
    ("advertise", "fd00::1:7000", "an IPv6 address must be in brackets"),
    ("tls_client_auth", "optional", "should be 'required' or 'none'"),
    ("port", "seventy", "valid integer"),
    ("drain_seconds", "soon", "valid number"),
]

# ---- which source counts


def test_without_any_source_the_defaults_hold() -> None:
    config = load([]).model_dump()
    memory = config.pop("host_bytes")
    assert config == {
        "memory_bytes": None,
        "hbm_bytes": 0,
        "disk_bytes": 0,
        "lane": "auto",
        "lane_bytes": 4 << 30,
        "io_threads": 8,
        "tables": {},
        "shard": 0,
        "shards": 1,
        "host": "127.0.0.1",
        "port": 7000,
        "metrics_port": 9400,
        "data_dir": None,
        "colocated_shards": 1,
        "max_message_bytes": 64 << 20,
        "max_keys": 4_000_000,
        "max_inflight_bytes": memory_limit().bytes // 8 if memory_limit().bytes < 8 * GIB else GIB,
        "max_calls": 4096,
        "max_connections": 8192,
        "receive_seconds": 60.0,
        "max_tables": 4096,
        "max_sessions": 65_536,
        "session_ttl_seconds": 86_400.0,
        "session_pushes": 4096,
        "segment_bytes": 256 << 20,
        "fsync_seconds": 0.02,
        "log_keep_bytes": 2 << 30,
        "log_keep_seconds": 0.0,
        "flush_seconds": 60.0,
        "scrub_seconds": 86_400.0,
        "policy_file": None,
        "audit_file": None,
        "http_token_file": None,
        "checkpoint_url": None,
        "checkpoint_store_seconds": 120.0,
        "max_tombstones": 1 << 20,
        "metrics_tables": 100,
        "max_subscribers": 64,
        "busy_poll_seconds": 0.0,
        "drain_seconds": 10.0,
        "cluster": "",
        "advertise": "",
        "http_peers": "",
        "http_names": "",
        "plaintext": False,
        "tls_certificate": None,
        "tls_key": None,
        "tls_ca": None,
        "tls_client_auth": "required",
    }
    assert 0 < memory < memory_limit().bytes


def test_every_setting_is_tried_below() -> None:
    assert {*VALUES, "tables"} == set(ServerConfig.model_fields)


@pytest.mark.parametrize("field", VALUES)
def test_flags_stand_before_the_environment_before_the_file(
    field: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_file, in_environment, in_flags = VALUES[field]
    base = PARTNERS.get(field, CLUSTER)
    for sources in range(1, 8):
        path = file(tmp_path, **base, **({field: in_file} if sources & 1 else {}))
        flags, want = ["--config", str(path)], in_file
        with monkeypatch.context() as patch:
            if sources & 2:
                environment(patch, **{field: in_environment})
                want = in_environment
            if sources & 4:
                flags += flag(field, in_flags)
                want = in_flags
            assert getattr(load(flags), field) == want, sources


def test_settings_of_different_sources_come_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment(monkeypatch, shards=8)
    path = file(tmp_path, port=7100, shards=2)
    config = load(["--shard", "5", "--config", str(path), "--metrics-port", "0"])
    got = (config.shard, config.shards, config.port, config.metrics_port)
    assert got == (5, 8, 7100, 0)


def test_the_file_may_be_named_by_the_environment_and_a_flag_names_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CONFIG, str(file(tmp_path, port=7100)))
    assert load([]).port == 7100
    (tmp_path / "other").mkdir()
    other = file(tmp_path / "other", port=7200)
    assert load(["--config", str(other)]).port == 7200
    assert load([f"--config={other}", "--shards", "3"]).model_dump(include={"port", "shards"}) == {
        "port": 7200,
        "shards": 3,
    }


def test_a_configuration_does_not_change() -> None:
    config = load([])
    with pytest.raises(ValidationError, match=r"frozen"):
        config.port = 1  # type: ignore[misc]


# ---- names that nobody knows


def test_an_unknown_flag_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    for flags in (["--prot", "7000"], ["--por", "7000"], ["--memory", "1"], ["7000"]):
        with pytest.raises(SystemExit) as caught:
            load(flags)
        assert caught.value.code == 2
        assert f"unrecognized arguments: {' '.join(flags)}" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["PROT", "CONFIG", "", "PORT_", "port"])
def test_an_unknown_variable_is_refused_by_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PREFIX + name, "1")
    monkeypatch.setenv(PREFIX + "ZZZ", "1")
    with pytest.raises(ConfigError) as caught:
        load([])
    assert str(caught.value) == f"unknown environment variables: {PREFIX}{name}, {PREFIX}ZZZ" or (
        str(caught.value) == f"unknown environment variables: {PREFIX}ZZZ, {PREFIX}{name}"
    )


def test_variables_of_others_are_none_of_our_business(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PORT", "SHARD", "PS_PORT", "PSSERVER_PORT", "MY_PSCONFIG_PORT"):
        monkeypatch.setenv(name, "nonsense")
    assert load([]).port == 7000


@pytest.mark.parametrize(
    "name",
    [
        "prot",
        "PORT",
        "_env_prefix",
        "_cli_parse_args",
        "cli_args",
        "model_cls",
        "cli_exit_on_error",
        "config",
        "file",
    ],
)
def test_an_unknown_name_in_the_file_is_refused_by_name(name: str, tmp_path: Path) -> None:
    path = file(tmp_path, **{name: "1"})
    with pytest.raises(ConfigError, match=rf"{name}: unknown setting"):
        load(["--config", str(path)])


def test_a_section_in_the_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ps.toml"
    path.write_text("[server]\nport = 7000\n")
    with pytest.raises(ConfigError, match=r"server: unknown setting"):
        load(["--config", str(path)])


# ---- values that break a rule


@pytest.mark.parametrize("source", ["flag", "environment", "file"])
@pytest.mark.parametrize(("field", "value", "rule"), BAD)
def test_a_bad_value_is_refused_with_the_field_the_rule_and_the_value(
    field: str,
    value: Any,
    rule: str,
    source: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flags = []
    if source == "flag":
        flags = [f"--{field.replace('_', '-')}={value}"]
    elif source == "environment":
        environment(monkeypatch, **{field: value})
    else:
        flags = ["--config", str(file(tmp_path, **{field: value}))]
    with pytest.raises(ConfigError) as caught:
        load(flags)
    said = str(caught.value)
    assert said.startswith(f"{field}: ")
    assert rule in said
    assert said.endswith((f"got {value!r}", f"got {str(value)!r}"))


def test_every_bad_value_is_named_at_once() -> None:
    with pytest.raises(ConfigError, match=r"^port: .*, got '0'; max_keys: .*, got '0'$"):
        load(["--port", "0", "--max-keys", "0"])


@pytest.mark.parametrize(("shard", "shards"), [(1, 1), (2, 2), (3, 2), (1024, 1024)])
def test_a_number_that_is_not_below_shards_is_of_no_shard(shard: int, shards: int) -> None:
    assert load([*flag("shard", shard), *flag("shards", shards)]).surplus
    assert not load([*flag("shard", shards - 1), *flag("shards", shards)]).surplus


def test_a_missing_config_file_is_refused_by_path(tmp_path: Path) -> None:
    path = tmp_path / "none.toml"
    with pytest.raises(ConfigError, match=rf"^config file {path}: .*No such file"):
        load(["--config", str(path)])


def test_a_config_flag_without_a_path_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"^--config: expected the path of a TOML file, got nothing$"
    ):
        load(["--port", "7000", "--config"])


@pytest.mark.parametrize("content", [b"port = ", b"port 7000", b"\xff\xfe", b"port = 1\nport = 2"])
def test_a_file_that_is_no_toml_is_refused_by_path(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "ps.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"^config file {path}: "):
        load(["--config", str(path)])


# ---- what users read


@pytest.mark.parametrize(
    ("given", "host"),
    [("::1", "::1"), ("[::1]", "::1"), ("::", "::"), ("[::]", "::"), ("localhost", "localhost")],
)
def test_an_ipv6_address_may_have_brackets(given: str, host: str) -> None:
    assert load(["--plaintext", "--host", given]).host == host


@pytest.mark.parametrize("field", ServerConfig.model_fields)
def test_every_help_text_stands_alone(field: str) -> None:
    text = ServerConfig.model_fields[field].description or ""
    assert text[:1].isupper()
    assert len(text) >= 20
    assert not text.endswith(".")
    assert not text.lower().startswith(("of ", "in ", "a ", "the "))
    if field.endswith("_bytes"):
        assert "bytes" in text
    if field.endswith("_seconds"):
        assert "econds" in text


def test_help_shows_sizes_with_units_and_computed_defaults_in_words(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as caught:
        load(["--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "(default: 67108864, 64 MiB)" in text
    assert text.count("(default: from the memory limit)") == 2
    assert "--data-dir PATH" in text
    for noise in ("factory", "null", "%%"):
        assert noise not in text
