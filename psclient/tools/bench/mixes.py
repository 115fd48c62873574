"""What a request does: draw its kind and its keys, and send it.

The mixes have the letters of the workloads of YCSB (Cooper et al., 2010) that they resemble; F is a
read-modify-write. plan.py lists them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from psclient.batch import Batch
from psclient.client import Client
from psclient.tools.bench.draws import Churn, Keys, Ranks, key_of
from psclient.tools.bench.plan import Plan

PUSHES = 0.05  # share of pushes in mixes B and D
KINDS = ("pull", "push", "step", "exchange")


@dataclass(frozen=True, slots=True)
class Request:
    """One request, drawn before it is due.

    kind      one of KINDS; "step": a pull, then a push to the same keys
    pull      keys to pull of each table; None: it pulls nothing
    push      keys to push to, of each table; None: it pushes nothing
    """

    kind: str
    pull: Sequence[Keys] | None
    push: Sequence[Keys] | None


class Mix:
    """Draws the requests of one stream of requests. Equal seeds give equal requests.

    process  number of the process
    seed     of this stream

    batch    keys per request and table; at first those of the plan
    """

    def __init__(self, plan: Plan, process: int, seed: tuple[int, ...]) -> None:
        self._plan = plan
        self.batch = plan.batch
        self._rng = np.random.default_rng(seed)
        self._ranks = Ranks(plan.keys, plan.skew)
        self._churn = Churn(plan.keys, plan.skew, process, plan.processes)
        self._last: list[Keys] | None = None

    def next(self) -> Request:
        """Return the next request."""
        mix = self._plan.mix
        if mix in "BD" and self._rng.random() < PUSHES:
            return Request("push", None, self._new() if mix == "D" else self._known())
        keys = self._recent() if mix == "D" else self._known()
        if mix == "F":
            return Request("step", keys, keys)
        if mix == "X":
            last, self._last = self._last or keys, keys
            return Request("exchange", keys, last)
        return Request("pull", keys, None)

    def _known(self) -> list[Keys]:
        return [key_of(self._ranks.draw(self._rng, self.batch)) for _ in self._plan.names]

    def _recent(self) -> list[Keys]:
        return [key_of(self._churn.read(self._rng, self.batch)) for _ in self._plan.names]

    def _new(self) -> list[Keys]:
        keys = key_of(self._churn.new(self.batch))
        return [keys] * self._plan.tables


class Sender:
    """Sends requests through one client, and counts keys and bytes.

    gradients  float32[batch, dim], pushed by every request
    """

    def __init__(self, client: Client, plan: Plan, gradients: NDArray[np.float32]) -> None:
        self._client = client
        self._names = plan.names
        self._gradients = gradients
        self._row = plan.dim * (4 if plan.wire == "float32" else 2)
        self._step = 0

    def send(self, request: Request) -> tuple[int, int]:
        """Send a request, wait for its answer; return (keys, bytes) of its pulls and pushes.

        keys   number of keys, duplicates included
        bytes  size of the distinct keys, rows and gradients in the messages, without headers

        Raises the PsError of the client.
        """
        client = self._client
        self._step += 1
        pull = None if request.pull is None else self._batches(request.pull)
        if request.push is None:
            assert pull is not None
            client.pull(pull)
            return self._counted(pull, {})
        same = request.push is request.pull and pull is not None
        push = pull if same and pull is not None else self._batches(request.push)
        gradients = {name: (batch, self._gradients[: len(batch)]) for name, batch in push.items()}
        if request.kind == "exchange":
            client.exchange(gradients, pull or {}, step=self._step)
        else:
            if pull is not None:
                client.pull(pull)
            client.push(gradients, step=self._step)
        return self._counted(pull or {}, push)

    def _batches(self, keys: Sequence[Keys]) -> dict[str, Batch]:
        """Find the distinct keys of each table, as every trainer must: part of the latency."""
        found: dict[int, Batch] = {}  # tables may share their array
        for each in keys:
            if id(each) not in found:
                found[id(each)] = self._client.batch(each)
        return {name: found[id(each)] for name, each in zip(self._names, keys, strict=True)}

    def _counted(self, pull: Mapping[str, Any], push: Mapping[str, Any]) -> tuple[int, int]:
        keys = size = 0
        for each in pull.values():
            keys += len(each)
            size += len(each.keys) * (8 + self._row)
        for each in push.values():
            keys += len(each)
            size += len(each.keys) * (12 + self._row)
        return keys, size
