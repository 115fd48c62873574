"""PyTorch in the process of the trainer: no server, and row numbers instead of keys."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from benchmarks.peers.peer import EPSILON, LEARNING_RATE, Peer, Unavailable
from benchmarks.work import Ids, Rows, Step, Work, initial_rows, of_every_id


class Torch(Peer):
    """``torch.nn.Embedding`` and ``torch.optim.Adagrad`` with torch's default threads.

    The gradient is given as a coalesced sparse tensor: the optimizer need not sort it, and no
    backward pass builds it. With ``training``, a backward pass builds a gradient for every id, and
    the optimizer sums those of equal ids, which is how torch is used.
    """

    def __init__(self, work: Work, *, training: bool = False) -> None:
        self.name = "torch in-process, training" if training else "torch in-process"
        self._training = training
        try:
            self._torch: Any = importlib.import_module("torch")
        except ImportError as error:
            raise Unavailable("pip install torch") from error
        # The optimizer makes sparse tensors implicitly; torch would warn about each.
        self._torch.sparse.check_sparse_tensor_invariants.disable()
        # A copy, because from_numpy would keep the page size and the placement of the array.
        weight = self._torch.from_numpy(initial_rows(work)).clone()
        self._embedding = self._torch.nn.Embedding.from_pretrained(
            weight, freeze=False, sparse=True
        )
        self._optimizer = self._torch.optim.Adagrad(
            self._embedding.parameters(), lr=LEARNING_RATE, eps=EPSILON
        )

    def run(self, steps: Sequence[Step]) -> list[float]:
        if self._training:
            steps = [(step[0], step[1], of_every_id(step)) for step in steps]
        return super().run(steps)

    def step(self, ids: Ids, distinct: Ids, grads: Rows) -> Rows:
        torch = self._torch
        if self._training:
            self._optimizer.zero_grad()
            pulled = self._embedding(torch.from_numpy(ids))
            pulled.backward(torch.from_numpy(grads))
            self._optimizer.step()
            return pulled.detach().numpy()  # type: ignore[no-any-return]
        with torch.no_grad():
            rows: Rows = self._embedding(torch.from_numpy(ids)).numpy()
        weight = self._embedding.weight
        weight.grad = torch.sparse_coo_tensor(
            torch.from_numpy(distinct).unsqueeze(0),
            torch.from_numpy(grads),
            weight.shape,
            check_invariants=False,
            is_coalesced=True,
        )
        self._optimizer.step()
        return rows

    def close(self) -> None:
        del self._embedding, self._optimizer
