"""The processes: `psserver up` and `psserver serve`, their ends and their restarts."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from servers import Cluster, Labels, alive, eventually, free_ports, serve
from stores import Home, push, schema, tail

from psclient import Client, PsError, Table
from psproto.routing import even_map
from psserver.datadir import claim

pytestmark = pytest.mark.slow

DIM = 4
WAIT = 60.0  # seconds


def summing(client: Client, name: str) -> Table:
    """A table whose rows are minus the sums of the gradients pushed."""
    return client.create_table(name, DIM, optimizer="sgd", lr=1.0, initializer="zeros")


@pytest.fixture
def unstarted() -> Iterator[Callable[..., Cluster]]:
    """unstarted(shards): a cluster for the test to launch; stopped afterwards."""
    made: list[Cluster] = []

    def make(shards: int, *flags: str) -> Cluster:
        made.append(Cluster(shards, *flags))
        return made[-1]

    yield make
    for cluster in made:
        cluster.stop()


class TestUp:
    def test_ready_means_that_every_shard_serves(
        self, start_cluster: Any, connect: Any, name: str
    ) -> None:
        cluster = start_cluster(2)
        assert cluster.output == f"ready {' '.join(cluster.addresses)}\n"
        for address in cluster.addresses:
            host, port = address.split(":")
            socket.create_connection((host, int(port)), timeout=1).close()
        summing(connect(cluster, timeout=5.0), name)

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_a_signal_stops_all(self, start_cluster: Any, number: signal.Signals) -> None:
        cluster = start_cluster(2)
        pids = [*cluster.pids(0), *cluster.pids(1)]
        assert len(pids) == 2
        os.kill(cluster.process.pid, number)
        assert cluster.process.wait(WAIT) == 0
        assert [pid for pid in pids if alive(pid)] == []
        for shard in range(2):
            assert [entry["event"] for entry in cluster.log(shard)] == [
                "memory",
                "kernels",
                "recovered",
                "ready",
                "stopping",
                "stopped",
            ]

    def test_shards_end_with_a_parent_that_is_killed(self, start_cluster: Any) -> None:
        cluster = start_cluster(2)
        pids = [*cluster.pids(0), *cluster.pids(1)]
        cluster.process.kill()
        eventually(lambda: not any(alive(pid) for pid in pids), WAIT)

    def test_a_killed_shard_is_started_again(
        self, start_cluster: Any, connect: Any, name: str
    ) -> None:
        cluster = start_cluster(2)
        client = connect(cluster, timeout=WAIT)
        keys, ones = np.arange(100), np.ones((100, DIM), np.float32)
        table = summing(client, name)
        table.push(keys, ones)
        (survivor,), (victim,) = cluster.pids(0), cluster.pids(1)
        os.kill(victim, signal.SIGKILL)
        assert_array_equal(table.pull(keys), -ones)  # what was answered is kept
        assert cluster.pids(0) == [survivor]
        assert len(cluster.pids(1)) == 2
        assert "shard 1 exited with status -9; restarting it" in cluster.errors
        table.push(keys, ones)
        assert_array_equal(table.pull(keys), -2 * ones)

    def test_a_port_in_use_is_an_error(self, unstarted: Any) -> None:
        cluster = unstarted(2)
        with socket.socket() as squatter:
            squatter.bind(("127.0.0.1", cluster.port + 1))
            squatter.listen()
            cluster.launch()
            assert cluster.process.wait(WAIT) == 1
        assert cluster.output == ""
        assert "shard 1 did not start:" in cluster.errors
        assert f"psserver: port: cannot listen on {cluster.addresses[1]}" in cluster.errors
        assert "Traceback" not in cluster.errors

    def test_an_unknown_flag_is_an_error_of_the_shards(self, unstarted: Any) -> None:
        cluster = unstarted(1, "--max-kyes", "3")
        cluster.launch()
        assert cluster.process.wait(WAIT) == 1
        assert "unrecognized arguments: --max-kyes 3" in cluster.errors

    def test_metrics_carry_the_traffic(self, start_cluster: Any, connect: Any, name: str) -> None:
        cluster = start_cluster(2, metrics=True)
        client = connect(cluster)
        table = summing(client, name)
        keys = np.arange(1000)
        for _ in range(3):
            table.push(keys, np.ones((1000, DIM), np.float32))
        table.pull(keys)
        with pytest.raises(PsError):
            client.push({name: (keys, np.ones((1000, DIM), np.float32))}, lr=float("nan"))
        sizes = np.diff(client.batch(keys).split.bounds).tolist()
        for shard, size in enumerate(sizes):
            page = cluster.metrics(shard)

            def value(sample: str, page: Any = page, **labels: str) -> float:
                return page[sample, Labels(labels)]

            for method, requests in (("Push", 3), ("Pull", 1)):
                labels = {"method": method, "table": name}
                assert value("ps_requests_total", **labels) == requests
                assert value("ps_keys_total", **labels) == requests * size
                assert value("ps_array_bytes_total", **labels) == requests * size * (8 + 4 * DIM)
                lane = {"method": method, "lane": "stream"}
                assert value("ps_request_duration_seconds_count", **lane) == requests
                assert 0 < value("ps_request_duration_seconds_sum", **lane) < 5 * requests
                whole = value("ps_request_duration_seconds_bucket", le="+Inf", **lane)
                assert whole == requests
            refused = {"method": "Stream", "code": "INVALID_ARGUMENT"}
            errors = {key: n for key, n in page.items() if key[0] == "ps_errors_total" and n}
            assert sum(errors.values()) == 1
            assert refused.items() <= next(iter(errors))[1].items()
            tiers = [
                n
                for (sample, labels), n in page.items()
                if sample == "ps_table_rows" and labels["table"] == name
            ]
            assert sum(tiers) == size  # with --cold, rows may be on disk already
            assert value("ps_table_bytes", table=name, tier="host") > 0
            assert value("ps_version") == 4  # a table, three pushes
            assert value("ps_sessions") == 1
            assert value("ps_streams") == 1
            assert value("ps_inflight_bytes") == value("ps_engine_waiting") == 0
            assert value("ps_memory_bytes") >= value("ps_table_bytes", table=name, tier="host")
            assert value("process_resident_memory_bytes") > 0

    @pytest.mark.parametrize("transport", ["stream", "unary"])
    def test_a_stop_during_pushes_loses_none_that_was_acknowledged(
        self, start_cluster: Any, connect: Any, name: str, transport: str
    ) -> None:
        cluster = start_cluster(2)
        client = connect(cluster, transport=transport, timeout=3.0)
        summing(client, name)
        keys = np.arange(500)
        threads = 4
        answered: list[list[float]] = [[] for _ in range(threads)]
        failures: list[PsError] = []
        going = threading.Barrier(threads + 1)

        def train(number: int) -> None:
            mine = keys * threads + number
            push = {name: (mine, np.ones((500, DIM), np.float32))}
            try:
                while True:
                    rows = client.exchange(push, {name: mine})[name]
                    assert_array_equal(rows, np.full((500, DIM), rows[0, 0]))
                    answered[number].append(float(rows[0, 0]))
                    if len(answered[number]) == 20:
                        going.wait(WAIT)
            except PsError as error:
                failures.append(error)

        workers = [threading.Thread(target=train, args=(number,)) for number in range(threads)]
        for worker in workers:
            worker.start()
        going.wait(WAIT)
        assert cluster.stop() == 0
        for worker in workers:
            worker.join(WAIT)
            assert not worker.is_alive()
        assert len(failures) == threads
        for seen in answered:
            assert len(seen) >= 20
            assert seen == [-float(n) for n in range(1, len(seen) + 1)]

    def test_a_shard_stopped_by_itself_is_started_again(self, start_cluster: Any) -> None:
        cluster = start_cluster(1)
        os.kill(cluster.pids(0)[0], signal.SIGTERM)
        eventually(lambda: len(cluster.pids(0)) == 2, WAIT)
        assert "shard 0 exited with status 0; restarting it" in cluster.errors


class Server:
    """`psserver serve` for a while."""

    def __init__(self, *flags: str, **environment: str) -> None:
        self.process = serve(*flags, **environment)

    def __enter__(self) -> Server:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        try:
            self.process.communicate(timeout=WAIT)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()


def refused(*flags: str, **environment: str) -> str:
    """What a server that does not start writes to stderr; its status is 2."""
    process = serve(*flags, **environment)
    try:
        out, err = process.communicate(timeout=WAIT)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, out) == (2, "")
    assert "Traceback" not in err
    return "".join(line for line in err.splitlines(keepends=True) if not line.startswith("{"))


class TestServe:
    def test_a_data_directory_serves_one_server_at_a_time(self, tmp_path: Path) -> None:
        data = ("--data-dir", str(tmp_path / "data"), "--metrics-port", "0")
        first, second = free_ports(2), free_ports(1)
        with Server(*data, "--port", str(first)):
            err = refused(*data, "--port", str(second))
            assert err == (
                f"psserver: data_dir: {tmp_path}/data is in use by another server; stop it, or"
                " choose another data_dir\n"
            )
        with Server(*data, "--port", str(second)):
            pass

    def test_a_data_directory_of_another_number_of_shards_is_refused(self, tmp_path: Path) -> None:
        claim(tmp_path, 1, even_map(2))
        flags = ("--metrics-port", "0", "--port", str(free_ports(1)), "--data-dir", str(tmp_path))
        err = refused(*flags, "--shards", "3", "--shard", "1")
        assert err.startswith(f"psserver: data_dir: {tmp_path} belongs to shard 1 of 2 ")

    def test_damage_is_refused_and_named(self, tmp_path: Path) -> None:
        with Home(tmp_path / "data") as home:
            home.shard.create_table(schema())
            for _ in range(3):
                home.shard.exchange([push([1, 2])], [])
        path, end = tail(tmp_path / "data")
        data = bytearray(path.read_bytes())
        data[end // 2] ^= 1
        path.write_bytes(data)
        flags = ("--metrics-port", "0", "--port", str(free_ports(1)))
        err = refused("--data-dir", str(tmp_path / "data"), *flags)
        assert err.startswith(f"psserver: data_dir: DATA_LOSS: {path} at byte ")

    def test_flags_stand_before_the_environment_and_that_before_the_file(
        self, tmp_path: Path
    ) -> None:
        port = free_ports(3)
        file = tmp_path / "server.toml"
        file.write_text(
            f"port = {port}\nmax_keys = 11\nmax_message_bytes = 70000\nmetrics_port = 0\n"
        )
        with (
            Server(
                *("--config", str(file), "--port", str(port + 2)),
                PSCONFIG_PORT=str(port + 1),
                PSCONFIG_MAX_KEYS="22",
            ),
            Client([f"127.0.0.1:{port + 2}"], timeout=60) as client,
        ):
            client.list_tables()
            cluster = client._connect()
            assert (cluster.keys, cluster.message_bytes) == (22, 70_000 - 4096)

    def test_a_metrics_port_in_use_is_an_error(self) -> None:
        with socket.socket() as squatter:
            squatter.bind(("127.0.0.1", 0))
            squatter.listen()
            taken = squatter.getsockname()[1]
            err = refused("--port", str(free_ports(1)), "--metrics-port", str(taken))
        assert f"metrics_port: cannot listen on 127.0.0.1:{taken}" in err

    @pytest.mark.parametrize(
        ("flags", "environment", "message"),
        [
            (["--prot", "1"], {}, "unrecognized arguments: --prot 1"),
            (["--port", "x"], {}, "port: Input should be a valid integer"),
            (["--shard", "-1"], {}, "shard: Input should be greater than or equal to 0"),
            ([], {"PSCONFIG_PROT": "1"}, "unknown environment variables: PSCONFIG_PROT"),
        ],
    )
    def test_a_setting_that_is_unknown_or_wrong_is_named(
        self, flags: list[str], environment: dict[str, str], message: str
    ) -> None:
        assert message in refused(*flags, **environment)
