"""GroupPipeline: batches of a DataLoader with the outputs of an EmbeddingGroup, pulled ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, Self

import numpy as np
from torch import Tensor

from psclient import checked
from psclient.arrays import as_keys
from psclient.batch import Batch
from psclient.choices import Durability, Wire
from psclient.errors import InvalidArgument, PsError
from psclient.pipeline import MOST, Pipeline
from psclient.rowclient import RowClient
from psclient.ticket import Ticket
from psclient.torch.feature import (
    Feature,
    Part,
    Remote,
    merged,
    output_of,
    places_of,
    requests_of,
    rows_at,
)
from psclient.torch.gradients import Gradients
from psclient.torch.ranks import Turn
from psclient.torch.reach import holders
from psclient.torch.transfer import transfer_to

Arguments = dict[Part, tuple[Any, ...]]


class GroupPipeline:
    """Iterates over a loader: yields (batch, {feature: output}) with rows that were pulled ahead.

    EmbeddingGroup.pipeline creates it, and explains the arguments. Use it in a ``with`` block.
    While the block runs, ``step`` of the optimizer, or of the group, pushes through the pipeline.

    pipe  the psclient Pipeline, with ``stats``, ``flush`` and ``state``
    """

    def __init__(
        self,
        client: RowClient,
        features: Mapping[str, Feature],
        loader: Iterable[Any],
        keys: Callable[[Any], Mapping[str, Any]],
        *,
        lookahead: int | None,
        staleness: int,
        step: int,
        accumulate: int,
        device: Any,
        wire: Wire | None,
        durability: Durability | None,
    ) -> None:
        self._client, self._features = client, features
        self._loader, self._keys = loader, keys
        self._accumulate = checked.integer("accumulate", accumulate, 1, 1 << 31)
        parts = [
            ((name, part), remote)
            for name, feature in features.items()
            for part, remote in enumerate(feature.remotes())
        ]
        self._modules: dict[Part, Remote] = dict(parts)
        self._names = {part: str(number) for number, (part, _) in enumerate(parts)}
        staleness = checked.integer("staleness", staleness, 0, MOST)
        self._transfer = transfer_to(device, staleness + 3)
        self.pipe = Pipeline(
            client,
            {self._names[part]: remote.table for part, remote in parts},
            lookahead=lookahead,
            staleness=staleness,
            step=step,
            wire=wire,
            durability=durability,
            empty=self._transfer.empty,
            gpu=self._transfer.gpu,
        )
        self._planned: deque[tuple[Arguments, dict[Part, Batch]]] = deque()
        self._ticket: Ticket | None = None  # the batch at hand, until it is pushed
        self._held = 0  # batches before it whose gradients were not pushed yet
        self._running = False

    def __enter__(self) -> Self:
        gradients = self._gradients()
        if any(each.route is not None for each in gradients):
            raise InvalidArgument(
                "a module of the group is in another pipeline: end that one first"
            )
        for each in gradients:
            each.route = self
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Wait for all pushes; later calls of ``step`` push as usual."""
        for each in self._gradients():
            each.route = None
        self._transfer.finish()
        self.pipe.__exit__(kind, error, trace)

    def __iter__(self) -> Iterator[tuple[Any, dict[str, Tensor]]]:
        """Begin an epoch: read the loader anew."""
        if any(each.route is not self for each in self._gradients()):
            raise InvalidArgument("the pipeline of a group must be used in a 'with' block")
        self._planned.clear()
        turns = self.pipe.over(self._keys_of, self._loader)
        try:
            for ticket in turns:
                self._ticket, self._running = ticket, True
                yield ticket.batch, self._outputs(ticket)
                self._end_turn()
        finally:
            turns.close()  # type: ignore[attr-defined]
            self._running = False
            with suppress(PsError):  # which was raised already
                self._skip()

    def push_sums(self, sums: Mapping[str, tuple[Batch, Tensor]], turn: Turn) -> None:
        """Push the gradients of the batch at hand: {table: (keys, float32[distinct, dim])}.

        turn  training step, and learning rate
        """
        if self._ticket is None:
            if self._running:
                raise InvalidArgument(
                    f"step {turn.step}: the gradients of this batch were pushed already: call step"
                    " once per batch, with one optimizer for the whole group"
                )
            self.pipe.flush()
            given = {name: (batch, each.cpu().numpy()) for name, (batch, each) in sums.items()}
            self._client.push_distinct(given, step=turn.step, lr=turn.lr)
            return
        ticket = self._ticket
        gradients: dict[str, Any] = dict.fromkeys(ticket.keys)
        for table, (batch, tensor) in sums.items():
            gradients[table] = _with_keys(batch, self._transfer.gradients(table, tensor))
        if not any(map(callable, gradients.values())):  # nothing else waits for the rows' copies
            self._transfer.finish()
        self.pipe.push(ticket, gradients, lr=turn.lr, step=turn.step)
        self._ticket, self._held = None, 0

    def pushed(self) -> None:
        """End the turn of the batch at hand, whose gradients were pushed by the client."""
        self._held = 0
        self._skip()

    # ---- one batch

    def _keys_of(self, batch: Any) -> dict[str, Callable[[], Batch]]:
        """Return functions that find the distinct keys of each part of each feature of a batch."""
        inputs = self._keys(batch)
        if not isinstance(inputs, Mapping) or set(inputs) != set(self._features):
            got = sorted(map(str, inputs)) if isinstance(inputs, Mapping) else type(inputs).__name__
            raise InvalidArgument(
                "keys(batch) must return a mapping with the features"
                f" {sorted(self._features)}, got {got}"
            )
        _, arguments = requests_of(self._features, inputs)
        keys = {part: as_keys(each[0]) for part, each in arguments.items()}
        batches: dict[Part, Batch] = {}

        def batch_of(part: Part) -> Batch:
            batches[part] = self._client.batch(keys[part])
            return batches[part]

        self._planned.append((arguments, batches))
        return {self._names[part]: partial(batch_of, part) for part in keys}

    def _outputs(self, ticket: Ticket) -> dict[str, Tensor]:
        """Return {feature: output} of the batch at hand."""
        arguments, batches = self._planned.popleft()
        rows = {
            table: self._transfer.rows(each, ticket.wanted[table].output)
            for table, each in ticket.rows.items()
        }
        outputs = {}
        for part, module in self._modules.items():
            batch, mine = batches[part], rows[module.table.name]
            if batch is not ticket.keys[module.table.name]:  # the table has several parts
                places = places_of(batch).reshape(-1)
                inner = np.empty(len(batch.keys), np.int64)
                inner[places.numpy()] = ticket.places[self._names[part]].reshape(-1)
                mine = rows_at(mine, inner)
            outputs[part] = output_of(module, batch, mine, arguments[part])
        return merged(self._features, outputs)

    def _end_turn(self) -> None:
        """Skip the batch at hand if it was not pushed.

        Raises InvalidArgument if its gradients are neither pushed nor discarded, except if they may
        be part of a later push.
        """
        if self._ticket is None:
            return
        waiting = any(each.passes for each in self._gradients())
        self._held = self._held + 1 if waiting else 0
        if self._held >= self._accumulate:
            most = f"; accumulate={self._accumulate} allows fewer batches" * (self._accumulate > 1)
            raise InvalidArgument(
                f"the gradients of the batch of step {self._ticket.step} were neither pushed nor"
                " discarded: call step() or zero_grad() of the optimizer before the next batch, or"
                f" pass accumulate=n to push the sum over n batches{most}"
            )
        self._skip()

    def _skip(self) -> None:
        """End the turn of the batch at hand, if there is one, without a push."""
        ticket, self._ticket = self._ticket, None
        if ticket is not None:
            self._transfer.finish()
            self.pipe.skip(ticket)

    def _gradients(self) -> list[Gradients]:
        """Return the gradients of all modules of the group."""
        found = [each for module in self._modules.values() for each in holders(module)]
        return [holder.gradients for holder in found]


def _with_keys(batch: Batch, gradients: Any) -> Any:
    """Return gradients, or a function that returns them, as (Batch, gradients)."""
    return (lambda: (batch, gradients())) if callable(gradients) else (batch, gradients)
