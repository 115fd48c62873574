"""One rank of a job of torchrun: runs the cases of a plan in turn, and notes what came of each.

    torchrun --standalone --nproc-per-node 2 worker.py PLAN.json

The plan has the servers' addresses, the tables of each case, and the directory for RANK.json.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

from psclient import Client, rank_identity
from psclient.errors import PsError
from psclient.torch import EmbeddingBag, EmbeddingGroup, RowOptimizer

DIM, ROWS, BAGS, STEPS = 4, 40, 8, 6
SHORT = 20.0  # seconds that the ranks of a case wait for one that does not come
KEY = 5


class Model(nn.Module):
    """One feature per table, all with the same keys, and a dense layer."""

    def __init__(self, client: Client, tables: list[str]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.group = EmbeddingGroup(
            client, {each: EmbeddingBag(client.table(each), mode="mean") for each in tables}
        )
        self.head = nn.Linear(DIM * len(tables), 1)

    def forward(self, keys: Tensor) -> Tensor:
        out = self.group(dict.fromkeys(self.group.features, keys))
        scores: Tensor = self.head(torch.cat(list(out.values()), -1))
        return scores


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Keys of BAGS bags, some of them frequent, and their labels."""
    seed = np.random.default_rng(step)
    keys = torch.from_numpy(seed.zipf(1.3, (BAGS, 3)) % ROWS)
    return keys, torch.from_numpy(seed.normal(size=(BAGS, 1)).astype(np.float32))


def train(model: Any, rows: Any, dense: Any, share: Callable[[Tensor], Tensor]) -> None:
    """Train by STEPS batches, of each of which ``share`` returns this process's share."""
    for step in range(STEPS):
        keys, labels = (share(part) for part in batch(step))
        dense.zero_grad()
        (model(keys) - labels).square().mean().backward()
        dense.step()
        rows.step()


def equal(client: Client, tables: list[str], group: Any = None, **options: Any) -> list[float]:
    """Train as one rank of ``group``; return the weights of the dense layer."""
    rank, size = distributed.get_rank(group), distributed.get_world_size(group)
    model = Model(client, tables)
    rows = model.group.optimizer(reduce="sum", sync=True, process_group=group, **options)
    wrapped = DistributedDataParallel(model, process_group=group) if size > 1 else model
    dense = torch.optim.SGD(model.parameters(), lr=0.1)
    train(wrapped, rows, dense, lambda part: part.chunk(size)[rank])
    return model.head.weight.flatten().tolist()


def piped(client: Client, tables: list[str]) -> list[float]:
    """Do the same as ``equal``, but pull and push through a pipeline."""
    rank, size = distributed.get_rank(), distributed.get_world_size()
    model = Model(client, tables)
    rows = model.group.optimizer(reduce="sum", sync=True)
    head = DistributedDataParallel(model.head)
    dense = torch.optim.SGD(model.parameters(), lr=0.1)
    shares = [[part.chunk(size)[rank] for part in batch(step)] for step in range(STEPS)]

    def keys(share: list[Tensor]) -> dict[str, Tensor]:
        return dict.fromkeys(tables, share[0])

    with model.group.pipeline(shares, keys, lookahead=0) as batches:
        for (_, labels), outputs in batches:
            dense.zero_grad()
            scores = head(torch.cat([outputs[each] for each in tables], -1))
            (scores - labels).square().mean().backward()
            dense.step()
            rows.step()
    return model.head.weight.flatten().tolist()


def halves(client: Client, tables: list[str]) -> list[float]:
    """Train as two groups of ranks, each with a table of its own."""
    size, rank = distributed.get_world_size(), distributed.get_rank()
    ranks = [list(range(size // 2)), list(range(size // 2, size))]
    groups = [distributed.new_group(each) for each in ranks]
    mine = rank >= size // 2
    return equal(client, [tables[mine]], groups[mine])


def one_row(client: Client, table: str, **options: Any) -> tuple[Any, RowOptimizer]:
    """Return a module of one table, and its optimizer."""
    module = EmbeddingBag(client.table(table))
    return module, module.optimizer(ranks="sum", **options)


def uneven(client: Client, tables: list[str]) -> int:
    """Train by 1 + 2 * rank batches, each of which moves the row of KEY by -1."""
    for table, options in zip(tables, OPTIONS, strict=True):
        module, rows = one_row(client, table, **options)
        with Join([rows]):
            for _ in range(1 + 2 * distributed.get_rank()):
                module(torch.tensor([[KEY]])).sum().backward()
                rows.step()
    return int(rows.state_dict()["step"])


def uneven_model(client: Client, tables: list[str]) -> list[float]:
    """Train a model by 2 + rank batches; return the weights of the dense layer."""
    model = Model(client, tables)
    rows = model.group.optimizer(reduce="sum", sync=True)
    wrapped = DistributedDataParallel(model)
    dense = torch.optim.SGD(model.parameters(), lr=0.1)
    with Join([wrapped, rows]):
        for step in range(2 + distributed.get_rank()):
            keys, labels = batch(step)
            dense.zero_grad()
            (wrapped(keys) - labels).square().mean().backward()
            dense.step()
            rows.step()
    return model.head.weight.flatten().tolist()


def uneven_piped(client: Client, tables: list[str]) -> list[int]:
    """Do the same as ``uneven`` through pipelines that pull ahead; return the next steps."""
    steps = []
    for table, staleness in zip(tables, (0, 2), strict=True):
        group = EmbeddingGroup(client, {"a": EmbeddingBag(client.table(table))})
        rows = group.optimizer(ranks="sum", reduce="sum")
        loader = [torch.tensor([[KEY]])] * (1 + 2 * distributed.get_rank())
        with (
            Join([rows]),
            group.pipeline(loader, lambda each: {"a": each}, staleness=staleness) as batches,
        ):
            for _, outputs in batches:
                outputs["a"].sum().backward()
                rows.step()
        steps.append(int(rows.state_dict()["step"]))
    return steps


def refused(client: Client, tables: list[str]) -> str:
    """A pipeline that pulls ahead cannot wait for all ranks."""
    group = EmbeddingGroup(client, {"a": EmbeddingBag(client.table(tables[0]))})
    rows = group.optimizer(sync=True)
    with group.pipeline([torch.tensor([[KEY]])], lambda each: {"a": each}) as batches:
        for _, outputs in batches:
            outputs["a"].sum().backward()
            return error_of(rows.step)
    return ""


OPTIONS = ({"reduce": "sum"}, {"reduce": "sum", "sync": True}, {"sync": True}, {})


def failing(client: Client, tables: list[str], first: Callable[[Any, RowOptimizer], Any]) -> Any:
    """Let rank 1 do ``first`` before all ranks push; return the errors under all options."""
    errors = []
    for table, options in zip(tables, OPTIONS[:3], strict=True):
        module, rows = one_row(client, table, **options)
        module(torch.tensor([[KEY]])).sum().backward()
        if distributed.get_rank() == 1:
            first(module, rows)
        errors.append(error_of(rows.step))
    return errors


def error_of(call: Callable[[], Any]) -> str:
    """Call a function, and return its error as "Type: text"; "" if there is none."""
    try:
        call()
    except PsError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def disagree(client: Client, tables: list[str]) -> Any:
    """Rank 1 is at another training step than rank 0."""
    return failing(client, tables, lambda _, rows: setattr(rows, "_next", 7))


def other_lr(client: Client, tables: list[str]) -> Any:
    """Rank 1 has another learning rate than rank 0."""
    return failing(client, tables, lambda _, rows: rows.param_groups[0].update(lr=0.5))


def infinite(client: Client, tables: list[str]) -> Any:
    """Rank 1 has an infinite gradient."""
    return failing(client, tables, lambda _, rows: rows.leaves()[0].grad.fill_(torch.inf))


def in_passing(client: Client, tables: list[str]) -> str:
    """Ranks that do not wait for each other are at different steps; the second push notices."""
    module, rows = one_row(client, tables[0], step=7 * distributed.get_rank())

    def push() -> None:
        module(torch.tensor([[KEY]])).sum().backward()
        rows.step()

    push()
    distributed.barrier()
    assert rows._job is not None
    assert rows._job._pending is not None
    deadline = time.monotonic() + 60
    while not rows._job._pending[0].is_completed():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return error_of(push)


def absent(client: Client, tables: list[str]) -> str:
    """Rank 1 makes no step, but runs on until the others have given up."""
    module, rows = one_row(client, tables[0], reduce="sum", timeout=SHORT)
    module(torch.tensor([[KEY]])).sum().backward()
    error = ""
    if distributed.get_rank() != 1:
        error = error_of(rows.step)
    distributed.barrier()
    return error


def gone(client: Client, tables: list[str]) -> str:
    """Rank 1 ends; the others notice it at once."""
    module, rows = one_row(client, tables[0], reduce="sum")
    module(torch.tensor([[KEY]])).sum().backward()
    return "" if distributed.get_rank() == 1 else error_of(rows.step)


CASES: dict[str, Callable[[Client, list[str]], Any]] = {
    "equal": equal,
    "piped": piped,
    "halves": halves,
    "uneven": uneven,
    "uneven_model": uneven_model,
    "uneven_piped": uneven_piped,
    "refused": refused,
    "disagree": disagree,
    "other_lr": other_lr,
    "infinite": infinite,
    "in_passing": in_passing,
    "absent": absent,
    "gone": gone,
}


def main(plan: Any) -> None:
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    notes = {}
    with Client(plan["addresses"], timeout=60.0, **rank_identity()) as client:
        for case, tables in plan["cases"].items():
            distributed.barrier()
            notes[case] = CASES[case](client, tables)
    Path(plan["directory"], f"{rank}.json").write_text(json.dumps(notes))
    if "gone" not in plan["cases"]:
        distributed.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
