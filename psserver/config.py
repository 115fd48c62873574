"""How a server is set up: flags, then environment (PSCONFIG_*), then a TOML file, then defaults.

Every name is known or refused, wherever it comes from.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, CliApp, PydanticBaseSettingsSource, SettingsConfigDict

PREFIX = "PSCONFIG_"  # no service in Kubernetes injects variables of that name
CONFIG = "PSCONFIG_FILE"


class ConfigError(Exception):
    """A setting is unknown or breaks a rule."""


def _memory() -> int:
    """Four fifths of the memory that this process may use, in bytes."""
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            available = min(available, int(Path(limit).read_text()))
        except (OSError, ValueError):  # no such hierarchy, or no limit
            continue
    return available * 4 // 5


class ServerConfig(BaseSettings):
    """One shard's server."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, extra="forbid", frozen=True, cli_kebab_case=True, cli_prog_name="serve"
    )

    shard: int = Field(0, ge=0, description="number of this shard")
    shards: int = Field(1, ge=1, le=1024, description="shards in the cluster")
    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(7000, ge=1, le=65535, description="port of the service")
    metrics_port: int = Field(9400, ge=0, le=65535, description="port of /metrics; 0: none")
    data_dir: Path | None = Field(None, description="directory of this shard alone; locked")
    memory_bytes: int = Field(
        default_factory=_memory, ge=1 << 20, description="tables may take; default 80 %% of limit"
    )
    max_message_bytes: int = Field(64 << 20, ge=1 << 16, le=1 << 30, description="of one request")
    max_keys: int = Field(4_000_000, ge=1, description="in one pull or push")
    max_inflight_bytes: int = Field(
        1 << 30, ge=1 << 16, description="of requests and replies in memory; a stream may have 1/8"
    )
    max_tables: int = Field(1024, ge=1, description="tables on this shard")
    max_sessions: int = Field(65_536, ge=1, description="clients remembered")
    session_ttl_seconds: float = Field(
        86_400.0, ge=600, description="an idle session is kept so long"
    )
    segment_bytes: int = Field(256 << 20, ge=1 << 20, description="of a file of the version log")
    fsync_seconds: float = Field(
        0.02, gt=0, le=10, description="a change waits so long for its way to the disk to begin"
    )
    log_keep_bytes: int = Field(
        2 << 30, ge=0, description="of the log kept for subscribers beyond what a restart needs"
    )
    log_keep_seconds: float = Field(0.0, ge=0, description="at least so much of the log is kept")
    flush_seconds: float = Field(
        60.0, gt=0, description="seconds between flushes of changed rows to the data directory"
    )
    checkpoint_url: str | None = Field(
        None,
        description="where named checkpoints are, the same for all shards: file:///..., s3://...",
    )
    max_tombstones: int = Field(
        1 << 20, ge=0, description="deleted keys remembered for subscribers that come back"
    )
    max_subscribers: int = Field(64, ge=0, description="streams of changes at a time")
    busy_poll_seconds: float = Field(
        0.0, ge=0, le=1, description="the server does not sleep so long after a request"
    )
    drain_seconds: float = Field(10.0, ge=0, description="work in hand may take so long at a stop")

    @model_validator(mode="after")
    def _shard_in_cluster(self) -> ServerConfig:
        if self.shard >= self.shards:
            raise ValueError(f"shard must be below shards ({self.shards}), got {self.shard}")
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return env_settings, init_settings  # init: the file; flags stand before both


def load(flags: Sequence[str], environment: Mapping[str, str] | None = None) -> ServerConfig:
    """Read the configuration; ConfigError names what is unknown or wrong."""
    environment = os.environ if environment is None else environment
    known = {PREFIX + name.upper() for name in ServerConfig.model_fields} | {CONFIG}
    unknown = sorted(n for n in environment if n.upper().startswith(PREFIX) and n not in known)
    if unknown:
        raise ConfigError(f"unknown environment variables: {', '.join(unknown)}")
    rest = list(flags)
    path = environment.get(CONFIG)
    for at, flag in enumerate(rest):
        name, joined, value = flag.partition("=")
        if name == "--config":
            if not joined and at + 1 == len(rest):
                raise ConfigError("--config needs a path")
            path = value if joined else rest[at + 1]
            del rest[at : at + 2 - len(joined)]
            break
    try:
        return CliApp.run(ServerConfig, cli_args=rest, **_file(path))
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(item) for item in error.errors())) from error


def _file(path: str | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        values = tomllib.loads(Path(path).read_text())
    except (OSError, ValueError) as error:  # unreadable, not UTF-8, not TOML
        raise ConfigError(f"config file {path}: {error}") from error
    for name in values:
        if name not in ServerConfig.model_fields:
            raise ConfigError(f"config file {path}: {name}: unknown setting")
    return values


def _explain(item: Any) -> str:
    name = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        return f"{name}: unknown setting"
    return f"{name or 'settings'}: {item['msg']}, got {item['input']!r}" if name else item["msg"]
