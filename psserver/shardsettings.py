"""Settings of one shard: where it listens and stores its rows, and its limits.

config.py adds the settings of security, and reads all settings.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import Field, field_validator, model_validator
from pydantic_settings import BaseSettings

from psproto import names
from psserver.addresses import UNDER_UP, addresses_of, bare_host, require_address
from psserver.memory import GPU_BYTES, Plan, default_inflight, memory_limit, transport_bytes
from psserver.tablesettings import HbmBytes, TableSettings
from psserver.unusable import ConfigError


class ShardSettings(BaseSettings):
    """Settings of one shard, without those of security. ServerConfig extends it."""

    shard: int = Field(
        0,
        ge=0,
        description="Number of this shard, from 0. A server whose number is not below shards stores"
        " no rows and never becomes ready",
    )
    shards: int = Field(
        1,
        ge=1,
        le=1024,
        description="Number of shards in the cluster; the same for all of them. It is fixed when"
        " the first row is stored: to change it, restore a checkpoint into a new cluster",
    )
    cluster: str = Field(
        "",
        description="Name of the cluster, the same for all its shards: at most 128 letters, digits"
        " and _ . / - . With it, clients never mistake a shard of another cluster for one of"
        " theirs, even if it gets the same address",
    )
    advertise: str = Field(
        "",
        description="Address HOST:PORT under which clients that look up one DNS name reach this"
        " shard. Without it, they use the address at which the shard answered them",
    )
    host: str = Field(
        "127.0.0.1",
        description="Address to listen on, for clients and for metrics: a name, an IPv4 or an IPv6"
        " address; 0.0.0.0 or :: listens on all addresses",
    )
    port: int = Field(7000, ge=1, le=65535, description="Port for clients (gRPC)")
    metrics_port: int = Field(
        9400,
        ge=0,
        le=65535,
        description="Port for HTTP: the status page, /metrics for Prometheus, /livez and /readyz"
        " for probes; 0: none of them",
    )
    http_peers: str = Field(
        "",
        description="Addresses of the HTTP ports of all shards, which the status page shows:"
        " HOST:PORT of each shard, by number, separated by commas; or a pattern for all, such as"
        " ps-{shard}.ps:9400. Without it, the page shows this shard alone",
    )
    http_names: str = Field(
        "",
        description="Further host names in URLs of the HTTP port, separated by commas. Requests"
        " with other names are refused, so that web pages cannot read the figures through a DNS"
        " name of their own. IP addresses, names without a dot, names that end in .svc, .local or"
        " .internal, and names in host, advertise and http_peers are always accepted",
    )
    metrics_tables: int = Field(
        100,
        ge=0,
        le=65536,
        description="Maximum number of tables that have metrics of their own, the oldest ones. The"
        ' metrics of all other tables are summed under table="(other)", so that the number of'
        " series stays bounded",
    )
    data_dir: Path | None = Field(
        None,
        examples=["/data"],
        description="Directory for the rows and the version log; each shard needs its own. Without"
        " it, all rows are lost when the server stops",
    )
    colocated_shards: int = Field(
        1,
        ge=1,
        le=1024,
        description="Number of shards that share the memory of this machine or container. The"
        " defaults of host_bytes and max_inflight_bytes are divided by it",
    )
    max_message_bytes: int = Field(
        64 << 20, ge=1 << 16, le=1 << 30, description="Maximum size of a request, in bytes"
    )
    max_inflight_bytes: int = Field(
        default_factory=lambda data: _inflight(data),
        ge=1 << 16,
        examples=[1 << 30],
        description="Maximum total size of requests in flight and their replies, in bytes; at least"
        " max_message_bytes. One stream may use an eighth of it. Further requests are refused, and"
        " clients retry them",
    )
    hbm_bytes: HbmBytes = Field(
        0,
        ge=0,
        examples=[32 << 30],
        description="Maximum GPU memory for rows of all tables of this shard, in bytes, at least 32"
        " MiB; 0: do not use a GPU. Needs an NVIDIA GPU and the extra gpu12 or gpu13. Keys and"
        " metadata of these rows stay in host memory, within host_bytes",
    )
    memory_bytes: int | None = Field(
        None,
        ge=1 << 20,
        examples=[8 << 30],
        description="Former name of host_bytes, in bytes; still accepted",
    )
    host_bytes: int = Field(
        default_factory=lambda data: data["memory_bytes"] or _left_for_tables(data),
        ge=1 << 20,
        examples=[8 << 30],
        description="Maximum memory for all tables of this shard, in bytes. With data_dir, rows for"
        " which there is no room are kept on disk only. Without it, a push that needs more is"
        " refused",
    )
    disk_bytes: int = Field(
        0,
        ge=0,
        description="Maximum size of the base (the on-disk copy of all rows) in bytes; 0: no limit."
        " Pushes that would exceed it are refused with DISK_FULL. A sixteenth of it is reserved for"
        " flushes. The version log is not included",
    )
    lane: str = Field(
        "auto",
        description="Same-host lane, over which clients on this machine send exchanges through"
        " shared memory: on, its Unix socket is lane.sock in data_dir; a directory, its socket is"
        " lane-SHARD.sock there, and clients must find it under the same path; off; auto, on for"
        " the shards of psserver up, otherwise off",
    )
    lane_bytes: int = Field(
        4 << 30,
        ge=1 << 20,
        description="Maximum size of the shared memory that all clients of the same-host lane"
        " register, in bytes. It is memory of the clients, which this server only maps. Clients"
        " beyond it use gRPC",
    )
    io_threads: int = Field(
        8,
        ge=1,
        le=256,
        description="Number of threads that read rows from the disk for requests; each reads many"
        " rows at once",
    )
    tables: dict[str, TableSettings] = Field(
        {},
        description="Settings of single tables, by table name: host_bytes, hbm_bytes, cache and"
        " half_life. In the file, write them as sections [tables.NAME]",
    )
    max_keys: int = Field(
        4_000_000, ge=1, description="Maximum number of keys in one pull, push or delete"
    )
    max_tables: int = Field(4096, ge=1, description="Maximum number of tables on this shard")
    max_sessions: int = Field(
        65_536,
        ge=1,
        description="Maximum number of client sessions. A session records which pushes of a client"
        " were applied, so that a retry is not applied twice. At the maximum, a new session takes"
        " the place of the one that was idle longest, if that was idle for session_ttl_seconds;"
        " otherwise the new client is refused",
    )
    session_pushes: int = Field(
        4096,
        ge=64,
        le=1 << 20,
        description="Maximum number of pushes that a session records, about 100 bytes each. A push"
        " that is sent again is recognized if it is recorded. A trainer that comes back with policy"
        " 'once' (docs/trainers.md) needs as many as it pushes to a shard between two checkpoints."
        " All sessions together record 1048576 pushes, and each at least 64",
    )
    max_calls: int = Field(
        4096,
        ge=1,
        description="Maximum number of calls in progress, including open streams; further calls are"
        " refused",
    )
    max_connections: int = Field(
        8192, ge=1, description="Maximum number of open client connections"
    )
    receive_seconds: float = Field(
        60.0,
        gt=0,
        description="Maximum time for a message of more than 8 MiB to arrive completely, in"
        " seconds. A connection on which a message takes longer is closed",
    )
    session_ttl_seconds: float = Field(
        86_400.0,
        ge=600,
        description="Time for which a client session must have been idle before a new session may"
        " replace it, in seconds; see max_sessions",
    )
    segment_bytes: int = Field(
        256 << 20, ge=1 << 20, description="Size of a version-log segment file, in bytes"
    )
    fsync_seconds: float = Field(
        0.02,
        gt=0,
        le=10,
        description="Maximum time between the write of a change and the start of its sync to disk"
        " (fsync), in seconds; all changes written in this time share one sync",
    )
    log_keep_bytes: int = Field(
        2 << 30,
        ge=0,
        description="Size of the older part of the version log to keep for subscribers, in bytes."
        " It is kept in addition to the part that a restart needs",
    )
    log_keep_seconds: float = Field(
        0.0,
        ge=0,
        description="Time to keep changes in the version log for subscribers, in seconds, even if"
        " their size exceeds log_keep_bytes",
    )
    flush_seconds: float = Field(
        60.0,
        gt=0,
        description="Seconds between flushes of changed rows to the data directory. A restart"
        " replays all changes since the last flush",
    )
    scrub_seconds: float = Field(
        86_400.0,
        ge=0,
        description="Time in which all rows on disk are read once in the background, to notice"
        " damage, in seconds; 0: never",
    )
    checkpoint_url: str | None = Field(
        None,
        examples=["s3://bucket/checkpoints"],
        description="Location of named checkpoints, file:///path or s3://bucket/path; it must be"
        " the same for all shards",
    )
    checkpoint_store_seconds: float = Field(
        120.0,
        gt=0,
        le=3600,
        description="Maximum time for one file operation at checkpoint_url, in seconds; then the"
        " command that needs it fails",
    )
    max_tombstones: int = Field(
        1 << 20,
        ge=0,
        description="Maximum number of deleted keys to remember. A subscriber that reconnects needs"
        " a new snapshot if it missed deletes that are no longer remembered",
    )
    max_subscribers: int = Field(
        64, ge=0, description="Maximum number of open subscriptions to changes of this shard"
    )
    busy_poll_seconds: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Time to poll for the next request before sleeping, in seconds. Polling lowers"
        " latency, but keeps a core busy",
    )
    drain_seconds: float = Field(
        10.0,
        ge=0,
        description="Maximum time to finish requests in flight when the server stops, in seconds",
    )

    @field_validator("cluster")
    @classmethod
    def _check_cluster(cls, cluster: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9_./-]{0,128}", cluster):
            raise ValueError("must have at most 128 characters, all letters, digits or _ . / -")
        return cluster

    @field_validator("advertise")
    @classmethod
    def _check_advertise(cls, advertise: str) -> str:
        if advertise:
            require_address(advertise)
        return advertise

    @field_validator("http_peers")
    @classmethod
    def _check_peers(cls, peers: str) -> str:
        addresses_of(peers, 1)
        return peers

    @field_validator("http_names")
    @classmethod
    def _check_names(cls, names: str) -> str:
        for name in filter(None, names.split(",")):
            bare_host(name.strip())
        return names

    @field_validator("lane")
    @classmethod
    def _check_lane(cls, lane: str) -> str:
        if lane not in ("auto", "on", "off") and not lane.startswith("/"):
            raise ValueError("must be auto, on, off or the absolute path of a directory")
        return lane

    @field_validator("host")
    @classmethod
    def _host_alone(cls, host: str) -> str:
        return bare_host(host)

    @model_validator(mode="after")
    def _largest_message_fits(self) -> Self:
        if self.max_message_bytes > self.max_inflight_bytes:
            raise ValueError(
                f"max_inflight_bytes must be at least max_message_bytes={self.max_message_bytes},"
                f" got {self.max_inflight_bytes}: larger messages would always be refused; raise"
                " max_inflight_bytes or lower max_message_bytes"
            )
        return self

    @model_validator(mode="after")
    def _every_shard_has_an_address(self) -> Self:
        if (found := len(self.http_addresses)) != self.shards:
            raise ValueError(
                f"http_peers must have {self.shards} addresses, one per shard, got {found}"
            )
        return self

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        if self.memory_bytes is not None and self.memory_bytes != self.host_bytes:
            raise ValueError(
                "memory_bytes is the former name of host_bytes: set only host_bytes, got"
                f" host_bytes={self.host_bytes} and memory_bytes={self.memory_bytes}"
            )
        return self

    @model_validator(mode="after")
    def _tables_fit(self) -> Self:
        for name, table in self.tables.items():
            if problem := names.problem("table", name):
                raise ValueError(f"tables: {problem}")
            for field in ("host_bytes", "hbm_bytes"):
                given, most = getattr(table, field), getattr(self, field)
                if given is not None and given > most:
                    raise ValueError(
                        f"tables.{name}.{field} must be at most {field}={most}, got {given}"
                    )
        return self

    @property
    def lane_path(self) -> Path | None:
        """Path of the Unix socket of the same-host lane; None: off. Raises ConfigError."""
        lane, data = self.lane, self.data_dir
        if lane == "off" or (lane == "auto" and not (data and os.environ.get(UNDER_UP))):
            return None
        if lane not in ("on", "auto"):
            return Path(lane) / f"lane-{self.shard}.sock"
        if data is None:
            raise ConfigError("lane: on needs data_dir, where its socket is; or give a directory")
        return data.absolute() / "lane.sock"

    @property
    def http_addresses(self) -> list[str]:
        """HOST:PORT of the HTTP port of each shard, by number; "" if it is not known."""
        return addresses_of(self.http_peers, self.shards) or [""] * self.shards

    @property
    def surplus(self) -> bool:
        """Whether this server's number is not below the number of shards, so it has no rows."""
        return self.shard >= self.shards

    @property
    def memory(self) -> Plan:
        """Plan that divides the memory limit of this process among tables, requests and gRPC."""
        return _plan(self.model_dump())


def _inflight(data: Mapping[str, Any]) -> int:
    colocated = data["colocated_shards"]
    return default_inflight(memory_limit(colocated=colocated), colocated, data["max_message_bytes"])


def _plan(data: Mapping[str, Any]) -> Plan:
    return Plan(
        limit=memory_limit(colocated=data["colocated_shards"]),
        colocated=data["colocated_shards"],
        inflight=data["max_inflight_bytes"],
        transport=transport_bytes(data["max_message_bytes"], data["max_inflight_bytes"]),
        gpu=GPU_BYTES if data["hbm_bytes"] else 0,
    )


def _left_for_tables(data: Mapping[str, Any]) -> int:
    plan = _plan(data)
    if problem := plan.problem():
        raise ConfigError(problem)
    return plan.tables
