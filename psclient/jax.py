"""JAX: rows of the servers as inputs of a compiled step, and their gradients as its outputs.

    feed = Feed(client, {"user": users, "item": items}, batches, staleness=1)

    @jax.jit
    def step(params, rows, places, y):
        grad = jax.value_and_grad(loss_of, argnums=(0, 1))
        loss, (g, row_gradients) = grad(params, rows, places, y)
        return update(params, g), row_gradients, loss

    with feed:
        for t in feed:
            params, row_gradients, loss = step(params, t.rows, t.places, t.batch["y"])
            feed.push(t, row_gradients)  # returns at once

In ``loss_of``, the embeddings of a feature are ``rows[table][places[feature]]``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import jax
import numpy as np
from jax.experimental import io_callback

from psclient import checked
from psclient.choices import MODES, Mode, Wire
from psclient.errors import InvalidArgument
from psclient.padding import Room
from psclient.pipeline import Pipeline
from psclient.rowclient import RowClient
from psclient.table import Table
from psclient.ticket import Ticket

MOST = 1 << 31  # rows


@dataclass(frozen=True, slots=True, eq=False)
class Turn:
    """One batch with its rows, on the device.

    step    training step of the batch
    batch   the batch, as ``batches`` yielded it
    rows    {table: float32[room, dim]}: the row of each distinct key, then rows of zeros
    places  {feature: int32[*shape of its keys]}: index in ``rows[its table]`` of each key's row
    ticket  the ticket of the pipeline
    """

    step: int
    batch: Any
    rows: dict[str, jax.Array]
    places: dict[str, jax.Array]
    ticket: Ticket


class Feed:
    """Iterable of the batches of a training loop, with their rows. The module shows a loop.

    client     the client of all tables
    features   {name of a feature: its Table}; features may share a table
    batches    any iterable. Every iteration of the feed iterates over it
    keys       function that returns {feature: keys} of a batch; keys are integers of any shape.
               None: batches are dicts with the keys of each feature
    staleness  the rows of a batch may lack the pushes of so many batches just before it. 0: exact
    lookahead  number of batches whose rows are pulled while a batch is computed; None: as many as
               ``staleness``, but at least 1
    pad        how many rows ``Turn.rows`` has per table. A compiled step is compiled anew for each
               new number. "sqrt2": one of 16, 23, 32, 46, 64, ...; it grows with the largest batch
               so far. An integer: always so many; a batch with more distinct keys is refused
    step       training step of the first batch; each batch adds 1
    wire       dtype of rows and gradients on the wire; None: the client's

    ``pipe`` is the Pipeline. Leaving the ``with`` block waits for all pushes, and so does the end
    of a loop.
    """

    def __init__(
        self,
        client: RowClient,
        features: Mapping[str, Table],
        batches: Iterable[Any],
        *,
        keys: Callable[[Any], Mapping[str, Any]] | None = None,
        staleness: int = 0,
        lookahead: int | None = None,
        pad: str | int = "sqrt2",
        step: int = 0,
        wire: Wire | None = None,
    ) -> None:
        if isinstance(pad, str) and pad != "sqrt2":
            raise InvalidArgument(f"pad must be 'sqrt2' or a number of rows, got {pad!r}")
        self._fixed = None if isinstance(pad, str) else checked.integer("pad", pad, 1, MOST)
        self.pipe = Pipeline(
            client, features, staleness=staleness, lookahead=lookahead, step=step, wire=wire
        )
        names = tuple(features)
        self._keys = keys or (lambda batch: {name: batch[name] for name in names})
        self._batches = batches
        self._rooms: dict[str, Room] = {}

    def __enter__(self) -> Self:
        self.pipe.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.pipe.__exit__(*error)

    def __iter__(self) -> Iterator[Turn]:
        """Yield the Turn of each batch.

        Call ``push`` or ``skip`` before the next turn. A failed push raises PushFailed in a later
        turn, or when the loop ends.
        """
        for ticket in self.pipe.over(self._keys, self._batches):
            rows = {table: jax.device_put(self._padded(table, ticket)) for table in ticket.rows}
            places = {name: jax.device_put(each) for name, each in ticket.places.items()}
            yield Turn(ticket.step, ticket.batch, rows, places, ticket)
        self.pipe.flush()

    def push(
        self, turn: Turn, gradients: Mapping[str, jax.Array], *, lr: float | None = None
    ) -> None:
        """Push the gradients of a batch, and return at once.

        turn       the Turn of the batch
        gradients  {table: float[room, dim]}, the gradients of ``turn.rows``. A background thread
                   waits for them. Do not donate them to a later step
        lr         learning rate of this push; None: the tables'
        """
        counts = {table: len(batch.keys) for table, batch in turn.ticket.keys.items()}
        later = {
            table: partial(_first, each, counts[table]) if table in counts else each
            for table, each in gradients.items()
        }
        self.pipe.push(turn.ticket, later, lr=lr)

    def skip(self, turn: Turn) -> None:
        """End the turn of a batch without a push."""
        self.pipe.skip(turn.ticket)

    def flush(self) -> None:
        """Wait until all pushes are answered. Raises PushFailed if one failed."""
        self.pipe.flush()

    def _padded(self, table: str, ticket: Ticket) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Return a copy of the rows of a ticket, with rows of zeros at the end."""
        rows = ticket.rows[table]
        if self._fixed is not None and len(rows) > self._fixed:
            raise InvalidArgument(
                f"table {table!r}: the batch of step {ticket.step} has {len(rows)} distinct keys,"
                f" but pad is {self._fixed}: pass pad={len(rows)} or more, or pad='sqrt2'"
            )
        size = self._fixed or self._rooms.setdefault(table, Room()).fit(len(rows))
        padded = np.zeros((size, rows.shape[1]), np.float32)
        padded[: len(rows)] = rows
        return padded


def _first(gradients: jax.Array, count: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Wait for an array of the device; return its first ``count`` rows."""
    return np.asarray(gradients)[:count]


def lookup(table: Table, keys: jax.Array, *, mode: Mode = "train") -> jax.Array:
    """Return the rows of integer keys[*shape], float32[*shape, dim]; may be called inside jax.jit.

    mode  embedding of a key without a row: "train" or "serve", see Client.pull

    For convenience, not for speed: the device waits while the host pulls the rows. ``Feed`` pulls
    them earlier. The call is an ordered io_callback, so:

    - it cannot be inside jax.vmap or jax.pmap;
    - the rows are constants for jax.grad. To get their gradients, call ``lookup`` outside the
      function that is differentiated, and pass it the rows. Nothing is pushed: push the gradients
      after the step, for example by ``table.push``. A push inside a compiled function would be
      lost without an error if the compiler found that nothing uses its result;
    - without ``jax_enable_x64``, JAX has keys of 32 bits only. ``Feed`` has no such limit, because
      its keys never reach the device.
    """
    checked.one_of("mode", mode, MODES)
    return _lookup(table, mode, keys)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _lookup(table: Table, mode: Mode, keys: jax.Array) -> jax.Array:
    shape = jax.ShapeDtypeStruct((*keys.shape, table.dim), np.float32)
    pulled: jax.Array = io_callback(partial(_pull, table, mode), shape, keys, ordered=True)
    return pulled


def _pull(table: Table, mode: Mode, keys: Any) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Pull rows on the host."""
    return table.pull(np.asarray(keys), mode=mode)


def _forward(table: Table, mode: Mode, keys: jax.Array) -> tuple[jax.Array, tuple[int, ...]]:
    return _lookup(table, mode, keys), keys.shape


def _backward(table: Table, mode: Mode, shape: tuple[int, ...], _: jax.Array) -> tuple[Any]:
    """Return the gradient of the keys: integers have none."""
    return (np.zeros(shape, jax.dtypes.float0),)


_lookup.defvjp(_forward, _backward)
