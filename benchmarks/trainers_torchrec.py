"""Measure a step of TorchRec's DLRM, against the same model around an EmbeddingGroup.

A step pulls the rows of a batch, computes the loss, its gradients and the dense layers' step, and
pushes the gradients of the rows. Each of several features has a table of its own, and bags of one
to three ids. Contenders take turns, from batches in the form that a loader gives them.

    dlrm     torchrec's DLRM around psclient.torchrec.EmbeddingBagCollection, KeyedJaggedTensors
    group    its dense layers around psclient.torch.EmbeddingGroup, called by hand with ids and
             offsets of each feature
    compute  the dense layers alone, with rows that are there already: what no service can beat

Needs the extra torchrec (docs/trainers.md).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchrec import EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.models.dlrm import DLRM

from benchmarks.report import Report, arguments, interleave, milliseconds
from benchmarks.servers import shards
from benchmarks.work import Work, standard_work
from psclient import Client
from psclient.torch import EmbeddingBag, EmbeddingGroup, RowOptimizer
from psclient.torchrec import EmbeddingBagCollection

FEATURES = [f"f{i}" for i in range(10)]
DENSE = 13  # inputs of the dense layers
CYCLE = 50  # different batches
SHARDS = 2


class Batch:
    """Ids of all features, dense inputs and labels of some samples.

    samples  number of samples
    seed     determines the batch
    """

    def __init__(self, samples: int, seed: int, dim: int) -> None:
        rng = np.random.default_rng(seed)
        sizes = rng.integers(1, 4, (len(FEATURES), samples))
        ids = []
        for feature, some in enumerate(sizes):
            work = Work(rows=30_000, dim=1, batch=int(some.sum()), seed=seed * 100 + feature)
            ids.append(standard_work(work, 1)[0][0])
        self.values = torch.from_numpy(np.concatenate(ids))
        self.lengths = torch.from_numpy(sizes.reshape(-1).astype(np.int32))
        self.bags = {
            name: (
                torch.from_numpy(ids[feature]),
                torch.from_numpy(np.append(0, np.cumsum(sizes[feature])[:-1])),
            )
            for feature, name in enumerate(FEATURES)
        }
        self.dense = torch.from_numpy(rng.standard_normal((samples, DENSE), dtype=np.float32))
        self.labels = torch.from_numpy(rng.integers(0, 2, samples).astype(np.float32))
        self.rows = torch.randn(samples, len(FEATURES), dim)


class Contender:
    """A DLRM with its optimizers, which does one step per call.

    forward  returns the logits of a batch: forward(model, batch)
    """

    def __init__(
        self,
        collection: EmbeddingBagCollection,
        batches: list[Batch],
        forward: Callable[[DLRM, Batch], Tensor],
        rows: RowOptimizer | None,
    ) -> None:
        torch.manual_seed(0)
        dim = collection.embedding_bag_configs()[0].embedding_dim
        self._model = DLRM(
            embedding_bag_collection=collection,
            dense_in_features=DENSE,
            dense_arch_layer_sizes=[64, dim],
            over_arch_layer_sizes=[64, 1],
        )
        self._dense = torch.optim.SGD(self._model.parameters(), lr=0.01)
        self._batches, self._forward, self._rows = batches, forward, rows

    def step(self, i: int) -> None:
        """Do one training step with batch number ``i``."""
        batch = self._batches[i % len(self._batches)]
        logits = self._forward(self._model, batch).squeeze(1)
        loss = nn.functional.binary_cross_entropy_with_logits(logits, batch.labels)
        self._dense.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self._dense.step()
        if self._rows is not None:
            self._rows.step()


def dense_layers(model: Any, dense: Tensor, rows: Tensor) -> Tensor:
    """Return a DLRM's logits for dense inputs and rows, float32[n, features, dim]."""
    logits: Tensor = model.over_arch(model.inter_arch(model.dense_arch(dense), rows))
    return logits


def contenders(ps: Client, batches: list[Batch], dim: int) -> dict[str, Any]:
    """Return {name of a contender: its step}. Each has tables of its own."""

    def collection(prefix: str) -> EmbeddingBagCollection:
        configs = [
            EmbeddingBagConfig(30_000, dim, f"{prefix}_{name}", feature_names=[name])
            for name in FEATURES
        ]
        return EmbeddingBagCollection(ps, configs, optimizer="adagrad", lr=0.05)

    theirs, ours = collection("dlrm"), collection("group")
    group = EmbeddingGroup(ps, {name: EmbeddingBag(ps.table(f"group_{name}")) for name in FEATURES})

    def dlrm(model: DLRM, batch: Batch) -> Tensor:
        features = KeyedJaggedTensor(FEATURES, batch.values, lengths=batch.lengths)
        logits: Tensor = model(batch.dense, features)
        return logits

    def by_hand(model: DLRM, batch: Batch) -> Tensor:
        out = group(batch.bags)
        return dense_layers(model, batch.dense, torch.stack([out[name] for name in FEATURES], 1))

    def compute(model: DLRM, batch: Batch) -> Tensor:
        return dense_layers(model, batch.dense, batch.rows.detach().requires_grad_())

    made = {
        "dlrm": Contender(theirs, batches, dlrm, theirs.optimizer()),
        "group": Contender(ours, batches, by_hand, group.optimizer()),
        "compute": Contender(ours, batches, compute, None),
    }
    return {name: each.step for name, each in made.items()}


def processor(step: Any, first: int, count: int) -> float:
    """Return the processor seconds of this process per step, over ``count`` steps."""
    start = time.process_time()
    for i in range(count):
        step(first + i)
    return (time.process_time() - start) / count


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--dim", type=int, default=32, metavar="N", help="Dim of the tables.")
    parser.add_argument(
        "--samples", type=int, default=1000, metavar="N", help="Samples per batch (default: 1000)."
    )
    given = parser.parse_args()
    torch.set_num_threads(1)
    report = Report("trainers_torchrec", given.json)
    steps, rounds = (40, 4) if given.quick else (400, 20)
    batches = [Batch(given.samples, seed, given.dim) for seed in range(5 if given.quick else CYCLE)]
    with shards(SHARDS) as (addresses, _), Client(addresses) as ps:
        made = contenders(ps, batches, given.dim)
        for step in made.values():
            for i in range(len(batches)):
                step(i)
        times = interleave(made, steps=steps, rounds=rounds, warm=3)
        used = {name: [] for name in made}  # type: dict[str, list[float]]
        for turn in range(rounds):
            for name, step in made.items():
                used[name].append(processor(step, turn, steps // rounds))
    base = float(np.median(times["compute"]))
    keys = int(np.mean([len(batch.values) for batch in batches]))
    report.section(
        f"DLRM: {len(FEATURES)} features, {given.samples} samples, {keys} ids, dim {given.dim}",
        [
            {
                "contender": name,
                **milliseconds(some),
                "outside ms": (float(np.median(some)) - base) * 1e3,
                "processor ms": float(np.median(used[name])) * 1e3,
            }
            for name, some in times.items()
        ],
    )
    ratio = float(np.median(times["dlrm"]) / np.median(times["group"]))
    spent = float(np.median(used["dlrm"]) / np.median(used["group"]))
    report.note(f"dlrm / group: step {ratio:.3f}, processor time of the trainer {spent:.3f}")
    report.close()


if __name__ == "__main__":
    main()
