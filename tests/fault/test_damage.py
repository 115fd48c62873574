"""Bits of stored rows flip under a running shard. It names the damage, and psctl repairs it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fault.nursery import Nursery, Shard
from fault.rowflips import flip
from servers import eventually, free_ports
from typer.testing import CliRunner, Result

from psclient import Client, Table
from psclient.errors import DataLoss
from psclient.tools import ctl

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

DIM = 32
KEYS = np.arange(40_000)
FLAGS = "--metrics-port 0 --host-bytes 4000000 --flush-seconds 0.2 --scrub-seconds 3"


@pytest.fixture
def shard(tmp_path: Path) -> Iterator[Shard]:
    with Nursery() as nursery:
        flags = f"--port {free_ports(1)} {FLAGS} --data-dir {tmp_path}/shard"
        flags += f" --checkpoint-url file://{tmp_path}/checkpoints"
        shard = Shard(nursery, tmp_path / "log", *flags.split()).start()
        shard.wait()
        yield shard
        shard.kill()


def address(shard: Shard) -> str:
    return f"127.0.0.1:{shard.flags[1]}"


def psctl(shard: Shard, *words: str, status: int = 0) -> str:
    environment = {"PSCTL_SERVERS": address(shard), "COLUMNS": "160"}
    done: Result = CliRunner().invoke(ctl.app, words, env=environment)
    assert done.exit_code == status, (done.exception, done.stdout, done.stderr)
    return done.stdout


def lost(table: Table) -> int:
    """Pull all rows, which must be right or refused by name; return how many were refused."""
    refused = 0
    for first in range(0, len(KEYS), 20):
        keys = KEYS[first : first + 20]
        try:
            assert (table.pull(keys) == np.floor(keys / 100)[:, None]).all()
        except DataLoss as error:
            refused += len(keys)
            message = str(error)
            if "of table 't', with" not in message:
                raise
    return refused


@pytest.mark.parametrize("restart", [False, True])
def test_flipped_rows_are_refused_and_repaired(shard: Shard, tmp_path: Path, restart: bool) -> None:
    rng = random.Random(7)
    with Client([address(shard)]) as client:
        table = client.create_table("t", DIM, optimizer="sgd", lr=1.0, initializer="zeros")
        for first in range(0, len(KEYS), 4000):
            keys = KEYS[first : first + 4000]
            table.push(keys, -np.repeat(np.floor(keys / 100)[:, None], DIM, 1))
        psctl(shard, "checkpoint", "monday")
        eventually(lambda: client.describe_table("t").tiers["lmdb"].rows > len(KEYS) // 2)
        if restart:
            shard.kill()
        flip(tmp_path / "shard", rng, 3)
        if restart:
            shard.start().wait()
        eventually(lambda: client.describe_table("t").damaged_blocks, 30.0)
        eventually(lambda: [e for e in shard.log() if e["event"] == "a block on disk is damaged"])
        assert "lost rows" in psctl(shard, "verify", status=1)
        assert "damaged blocks" in psctl(shard, "status")
        refused = lost(table)
        assert 0 < refused < len(KEYS) // 10
        assert "0 left" in psctl(shard, "repair", "t", "--from", "monday")
        assert lost(table) == 0
        table.push(KEYS[:4], np.zeros((4, DIM)), durability="fsync")
        eventually(lambda: not client.describe_table("t").damaged_blocks)
        assert "undamaged" in psctl(shard, "verify")
        psctl(shard, "checkpoint", "tuesday")
    shard.kill()
    shard.start().wait()
    with Client([address(shard)]) as client:
        assert lost(client.table("t")) == 0
