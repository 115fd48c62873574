"""Two ranks of DistributedDataParallel: they train as one process does, and stay equal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from torch import Tensor, nn
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.nn.utils import clip_grad_norm_

from psclient import Client, Table
from psclient.torch import EmbeddingBag, EmbeddingGroup

DIM, ROWS, STEPS, RANKS = 4, 30, 5, 2
SECONDS = 200
ENVIRONMENT = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}


class Model(nn.Module):
    """A group of one feature, or torch's own module in its place, and a dense layer."""

    def __init__(self, embed: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = embed, nn.Linear(DIM, 1)

    def forward(self, keys: Tensor) -> Tensor:
        if isinstance(self.embed, EmbeddingGroup):
            return self.head(self.embed({"a": keys})["a"])
        return self.head(self.embed(keys))


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Keys of 8 bags, and their labels."""
    seed = np.random.default_rng(step)
    labels = torch.from_numpy(seed.normal(size=(8, 1)).astype(np.float32))
    return torch.from_numpy(seed.integers(0, ROWS, (8, 3))), labels


def share(rank: int, model: nn.Module, step: int) -> Tensor:
    """Loss of a rank's share of the batch of a step."""
    keys, labels = (part.chunk(RANKS)[rank] for part in batch(step))
    return (model(keys) - labels).square().mean()


def plain(rank: int, model: Any, dense: Any, rows: Any, scaler: Any, step: int) -> None:
    """Step without clipping and scaler; all ranks pull before any pushes."""
    share(rank, model, step).backward()
    torch.distributed.barrier()  # all have pulled
    dense.step()
    rows.step()
    torch.distributed.barrier()  # all have pushed


def clipped(rank: int, model: Any, dense: Any, rows: Any, scaler: Any, step: int) -> None:
    """Step with clipping; rank 1 has the larger gradients."""
    (share(rank, model, step) * (1 + 9 * rank)).backward()
    clip_grad_norm_(model.parameters(), 0.1)
    clip_grad_norm_(rows.leaves(), 0.1)
    dense.step()
    rows.step()


def scaled(rank: int, model: Any, dense: Any, rows: Any, scaler: Any, step: int) -> None:
    """Step of mixed precision. In the first one, only rows of rank 1 have infinite gradients."""
    loss = share(rank, model, step)
    if step == 0 and rank == 1:
        loss = loss + model.module.embed({"a": torch.tensor([[1]])})["a"].sum() * 1e38
    scaler.scale(loss).backward()
    scaler.step(dense)
    scaler.step(rows)
    scaler.update()


CASES = {"plain": plain, "clipped": clipped, "scaled": scaled}


def run_rank(rank: int, store: str, addresses: list[str], name: str, case: str) -> None:
    """Train as one rank by the steps of ``CASES[case]``; print the dense layer."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS
    )
    with Client(addresses, timeout=60.0) as client:
        group = EmbeddingGroup(client, {"a": EmbeddingBag(client.table(name))})
        model = nn.parallel.DistributedDataParallel(Model(group))
        dense, rows = torch.optim.SGD(model.parameters(), lr=0.1), group.optimizer(lr=0.1)
        scaler = ShardedGradScaler("cpu", init_scale=1024.0)
        for step in range(STEPS):
            model.zero_grad()
            CASES[case](rank, model, dense, rows, scaler, step)
        print(json.dumps(model.module.head.weight.flatten().tolist()))
    torch.distributed.destroy_process_group()


def weights(cluster: Any, store: Path, name: str, case: str) -> list[list[float]]:
    """Run all ranks; the numbers that each has printed."""
    command = [sys.executable, __file__, case, str(store), name, *cluster.addresses]
    ranks = [
        subprocess.Popen(
            command,
            env={**os.environ, "RANK": str(rank), **ENVIRONMENT},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(RANKS)
    ]
    try:
        printed = [rank.communicate(timeout=SECONDS)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * RANKS
    return [json.loads(each) for each in printed]


@pytest.mark.slow
def test_two_ranks_equal_one_process(
    cluster2: Any, connect: Any, name: str, tmp_path: Path
) -> None:
    client: Client = connect(cluster2)
    table: Table = client.create_table(name, DIM, optimizer="sgd", lr=9.0, initializer="normal")
    first = torch.from_numpy(table.pull(np.arange(ROWS)))
    model = Model(nn.EmbeddingBag.from_pretrained(first.clone(), mode="sum", freeze=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(STEPS):
        keys, labels = batch(step)
        optimizer.zero_grad()
        (model(keys) - labels).square().mean().backward()
        optimizer.step()

    for weight in weights(cluster2, tmp_path / "store", name, "plain"):
        assert_allclose(weight, model.head.weight.detach()[0], atol=1e-5)
    assert_allclose(table.pull(np.arange(ROWS)), model.embed.weight.detach(), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["clipped", "scaled"])
def test_dense_layers_stay_equal(
    cluster2: Any, connect: Any, name: str, tmp_path: Path, case: str
) -> None:
    connect(cluster2).create_table(name, DIM, optimizer="sgd", lr=9.0, initializer="normal")
    first, second = weights(cluster2, tmp_path / "store", name, case)
    assert first == second
    assert first != Model(None).head.weight[0].tolist()


if __name__ == "__main__":
    run_rank(int(os.environ["RANK"]), sys.argv[2], sys.argv[4:], sys.argv[3], sys.argv[1])
