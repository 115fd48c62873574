"""Two ranks of DistributedDataParallel train as one process with the whole batch does."""

from __future__ import annotations

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

from psclient import Client, Table
from psclient.torch import EmbeddingBag, EmbeddingGroup

DIM, ROWS, STEPS, RANKS = 4, 30, 5, 2
SECONDS = 200


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


def run_rank(rank: int, store: str, addresses: list[str], name: str) -> None:
    """Train as one rank, with its share of each batch; print the dense layer."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS
    )
    with Client(addresses, timeout=60.0) as client:
        group = EmbeddingGroup(client, {"a": EmbeddingBag(client.table(name))})
        model = nn.parallel.DistributedDataParallel(Model(group))
        dense, rows = torch.optim.SGD(model.parameters(), lr=0.1), group.optimizer(lr=0.1)
        for step in range(STEPS):
            keys, labels = (part.chunk(RANKS)[rank] for part in batch(step))
            model.zero_grad()
            (model(keys) - labels).square().mean().backward()
            torch.distributed.barrier()  # all have pulled
            dense.step()
            rows.step()
            torch.distributed.barrier()  # all have pushed
        print(model.module.head.weight.flatten().tolist())
    torch.distributed.destroy_process_group()


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

    addresses = cluster2.addresses
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(tmp_path / "store"), name, *addresses],
            env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
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
    for each in printed:
        weight = [float(number) for number in each.strip().strip("[]").split(",")]
        assert_allclose(weight, model.head.weight.detach()[0], atol=1e-5)
    assert_allclose(table.pull(np.arange(ROWS)), model.embed.weight.detach(), atol=1e-5)


if __name__ == "__main__":
    run_rank(int(sys.argv[1]), sys.argv[2], sys.argv[4:], sys.argv[3])
