"""Ranks of a torch.distributed job: they sum gradients by owner, and check each other's steps.

    job = Job(tables, "sum", sync=True, process_group=None, timeout=1800.0)
    turn, mine = job.reduce(turn, sums)   # gradients of the keys that this rank owns, of all ranks
    ...                                   # push them
    job.settle(turn, None)                # all ranks have pushed

With reduce="sum", a hash of each key chooses the rank that owns the key. Each rank sends the
gradients of its batch to the owners of their keys. An owner sums them in the order of the ranks,
and pushes one gradient per key. So each key is pushed once per step, as if one process had the
whole batch.

Whenever all ranks wait for each other, each tells its Turn (training step, learning rate) to all
others. A rank that has no more batches takes part, too, with ``active=False``.

A Job makes a gloo process group of its own. So its messages are never mixed up with those of other
parts of the model, and the model itself may use NCCL.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch import distributed as dist

from psclient import checked
from psclient.errors import InvalidArgument, RankFailed, StepsDisagree
from psclient.strings import hash_keys
from psclient.table import Table

Reduce = Literal["none", "sum"]
REDUCE = {"none": 0, "sum": 1}  # whether gradients are summed by owner before they are pushed

TIMEOUT = 1800.0  # seconds that a rank waits for the others; as gloo does by default
CHECKED = 1000  # without reduce and sync, steps are checked at the first of so many pushes
GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 divided by the golden ratio

ACTIVE, FAILED, STEP, RATE, TABLES, SIZES = range(6)  # columns of a Turn; one size per rank


class Sum(NamedTuple):
    """Gradients of distinct keys of one table.

    keys       uint64[n]
    counts     uint32[n]       occurrences whose gradients are summed in each
    gradients  float32[n, dim]
    """

    keys: NDArray[np.uint64]
    counts: NDArray[np.uint32]
    gradients: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Turn:
    """One call of ``step`` on one rank, as that rank tells it to all ranks.

    step    training step
    lr      learning rate; None: that of each table
    active  whether the rank has a batch. False: it has no gradients, takes part so that the others
            need not wait for it, and pushes the sums of the keys that it owns
    """

    step: int
    lr: float | None
    active: bool = True


class Job:
    """All ranks of a job, as seen from one of them. All ranks must create it, in the same order.

    tables         tables whose gradients are pushed; the same on all ranks
    reduce         "sum": gradients are summed by owner; "none": each rank pushes its own
    sync           whether all ranks push a step before any pulls for the next one
    process_group  ranks that take part, a torch.distributed group; None: all
    timeout        seconds that one rank waits for the others

    size           number of ranks
    rank           number of this process among them

    Raises RankFailed if not all ranks create it before the timeout.
    """

    def __init__(
        self,
        tables: Sequence[Table],
        reduce: Reduce,
        *,
        sync: bool,
        process_group: Any,
        timeout: float,
    ) -> None:
        self.sums = bool(checked.one_of("reduce", reduce, REDUCE))
        self.sync = bool(sync)
        self._timeout = checked.seconds("timeout", timeout)
        self._tables = sorted(tables, key=lambda table: table.name)
        texts = [f"{table.name}:{table.dim}" for table in self._tables]
        self._digest = int(hash_keys([",".join(texts)]).view(np.int64)[0])
        self._group = self._gloo(process_group)
        self.size = dist.get_world_size(self._group)
        self.rank = dist.get_rank(self._group)
        self._turns = 0
        self._pending: tuple[Any, list[Tensor]] | None = None  # a check under way, and its result

    def _gloo(self, process_group: Any) -> Any:
        """Create a gloo group with the ranks of ``process_group``."""
        try:
            return dist.new_group(
                dist.get_process_group_ranks(process_group or dist.group.WORLD),
                timeout=timedelta(seconds=self._timeout),
                backend="gloo",
                use_local_synchronization=process_group is not None,
            )
        except RuntimeError as error:
            raise self._lost("when the optimizer was created", error) from error

    # ---- one step

    def reduce(
        self, turn: Turn, sums: Mapping[str, Sum], error: Exception | None = None
    ) -> tuple[Turn, dict[str, list[Sum]]]:
        """Wait until all ranks have computed their gradients; exchange them if reduce="sum".

        turn   that of this rank
        sums   {table: gradients of this rank}
        error  why this rank will not push; it is raised here, and the other ranks raise RankFailed

        Returns the Turn with which to push, and {table: the Sums to add, in the order of the
        ranks}. A key may be in several Sums. Without reduce="sum" these are ``sums``.
        """
        self._turns += 1
        if self.sums:
            parts = [self._encode(each) for each in self._split(sums)]
            turn, sizes = self._meet(turn, error, [len(part) for part in parts])
            received = self._deliver(turn, parts, sizes)
            decoded = [self._decode(each) for each in received]
            names = [table.name for table in self._tables]
            return turn, {name: [each[name] for each in decoded] for name in names}
        if self.sync:
            turn, _ = self._meet(turn, error)
        elif error is None:
            self._check_in_passing(turn)
        if error is not None:
            raise error
        return turn, {name: [each] for name, each in sums.items()}

    def settle(self, turn: Turn, error: Exception | None) -> None:
        """If ``sync``, wait until all ranks have pushed.

        error  why the push of this rank failed, raised here; the other ranks raise RankFailed.
               None: it did not fail
        """
        if self.sync:
            self._meet(turn, error)

    # ---- turns

    def _meet(
        self, turn: Turn, error: Exception | None, sizes: Sequence[int] = ()
    ) -> tuple[Turn, list[int]]:
        """Tell the Turn of this rank to all ranks, and wait for theirs.

        error  why this rank failed; it is raised once the others know. None: it did not fail
        sizes  bytes to send to each rank later

        Returns the Turn of the active ranks, and the number of bytes that each rank will send.
        Raises RankFailed if another rank failed or does not answer, StepsDisagree if the steps of
        two active ranks differ.
        """
        row = self._row(turn, error is not None, sizes)
        met = [torch.empty_like(row) for _ in range(self.size)]
        try:
            dist.all_gather(met, row, group=self._group)
        except RuntimeError as failure:
            raise error or self._lost(f"at step {turn.step}", failure) from failure
        if error is not None:
            raise error
        table = torch.stack(met).numpy()
        self._agree(table)
        first = table[np.argmax(table[:, ACTIVE])]
        rate = float(first[RATE : RATE + 1].view(np.float64)[0])
        mine = Turn(int(first[STEP]), None if np.isnan(rate) else rate, turn.active)
        return mine, [int(size) for size in table[:, SIZES + self.rank]]

    def _row(self, turn: Turn, failed: bool, sizes: Sequence[int]) -> Tensor:
        """Encode a Turn as int64[5 + ranks]: the columns ACTIVE, FAILED, ... and one size per rank.

        failed  whether this rank cannot push
        sizes   bytes to send to each rank later; (): none
        """
        row = np.zeros(SIZES + self.size, np.int64)
        row[:SIZES] = turn.active, failed, turn.step, 0, self._digest
        row[RATE : RATE + 1].view(np.float64)[0] = np.nan if turn.lr is None else turn.lr
        row[SIZES : SIZES + len(sizes)] = sizes
        return torch.from_numpy(row)

    def _agree(self, met: NDArray[np.int64]) -> None:
        """Raise an error if a rank has failed, or if steps, rates or tables differ.

        met  int64[ranks, 5 + ranks], the encoded Turn of each rank
        """
        if (failed := np.flatnonzero(met[:, FAILED])).size:
            raise RankFailed(
                f"rank {failed[0]} could not push at step {met[failed[0], STEP]}; its own error"
                " says why. Restart the job from its last checkpoint"
            )
        active = np.flatnonzero(met[:, ACTIVE])
        for column, what in ((STEP, "training step"), (RATE, "lr"), (TABLES, "tables")):
            some = active if column != TABLES else np.arange(self.size)
            differ = some[met[some, column] != met[some[:1], column]]
            if differ.size:
                raise self._differ(what, met, int(some[0]), int(differ[0]))

    def _differ(
        self, what: str, met: NDArray[np.int64], one: int, other: int
    ) -> StepsDisagree | InvalidArgument:
        """Return the error for two ranks that differ.

        what        "training step", "lr" or "tables"
        met         int64[ranks, 5 + ranks], the encoded Turn of each rank
        one, other  numbers of the two ranks
        """
        if what == "training step":
            return StepsDisagree(
                f"training step must be the same on all ranks: rank {one} is at step"
                f" {met[one, STEP]}, rank {other} at step {met[other, STEP]}. Start all ranks from"
                " the same step, and let each call step() once per batch"
            )
        rates = met[:, RATE : RATE + 1].copy().view(np.float64)[:, 0]
        values = f": {rates[one]} and {rates[other]}" if what == "lr" else ""
        return InvalidArgument(
            f"{what} must be the same on all ranks, got different ones on ranks {one} and"
            f" {other}{values}"
        )

    def _check_in_passing(self, turn: Turn) -> None:
        """Compare the steps of all ranks at the first of every CHECKED pushes, without waiting.

        A later push looks at the result and raises StepsDisagree. A rank that has ended does not
        disturb the others.
        """
        if self._pending is not None and self._pending[0].is_completed():
            (work, met), self._pending = self._pending, None
            if work.exception() is None:
                self._agree(torch.stack(met).numpy())
        if self._turns % CHECKED == 1:
            row = self._row(turn, False, ())
            met = [torch.empty_like(row) for _ in range(self.size)]
            try:
                work = dist.all_gather(met, row, group=self._group, async_op=True)
            except RuntimeError:  # a rank has ended: there is nobody to compare with
                return
            self._pending = work, met

    def _lost(self, when: str, error: Exception) -> RankFailed:
        """Return the error for a rank that does not answer.

        when   text such as "at step 5"
        error  gloo's error
        """
        text = str(error).strip().split("\n")[0]
        return RankFailed(
            f"not all ranks answered {when} (waiting at most {self._timeout:g} s): a rank has ended"
            " or hangs, or has fewer batches; then use torch.distributed.algorithms.Join."
            f" gloo says: {text}"
        )

    # ---- gradients

    def _split(self, sums: Mapping[str, Sum]) -> list[dict[str, Sum]]:
        """Split gradients by the rank that owns their key; return {table: Sum} for each rank."""
        parts: list[dict[str, Sum]] = [{} for _ in range(self.size)]
        for name, (keys, counts, gradients) in sums.items():
            owner = _owners(keys, self.size)
            for rank, part in enumerate(parts):
                mine = owner == rank
                part[name] = Sum(keys[mine], counts[mine], gradients[mine])
        return parts

    def _encode(self, sums: Mapping[str, Sum]) -> bytes:
        """Encode the gradients for one rank: for each table n, keys, counts and gradients."""
        parts: list[bytes] = []
        for table in self._tables:
            each = sums.get(table.name)
            parts.append(struct.pack("<Q", 0 if each is None else len(each.keys)))
            if each is not None:
                parts += [array.tobytes() for array in each]
        return b"".join(parts)

    def _decode(self, data: bytes) -> dict[str, Sum]:
        """Decode the gradients of one rank; return {table: Sum}."""
        sums, at = {}, 0
        for table in self._tables:
            (n,) = struct.unpack_from("<Q", data, at)
            keys = np.frombuffer(data, np.uint64, n, at + 8)
            counts = np.frombuffer(data, np.uint32, n, at + 8 + 8 * n)
            gradients = np.frombuffer(data, np.float32, n * table.dim, at + 8 + 12 * n)
            sums[table.name] = Sum(keys, counts, gradients.reshape(n, table.dim))
            at += 8 + (12 + 4 * table.dim) * n
        return sums

    def _deliver(self, turn: Turn, parts: Sequence[bytes], sizes: Sequence[int]) -> list[bytes]:
        """Send each rank its part; return the parts received, in the order of the ranks.

        sizes  number of bytes that each rank sends to this one
        """
        sent = torch.frombuffer(bytearray(b"".join(parts)), dtype=torch.uint8)
        received = torch.empty(sum(sizes), dtype=torch.uint8)
        try:
            dist.all_to_all_single(
                received, sent, list(sizes), [len(part) for part in parts], group=self._group
            )
        except RuntimeError as failure:
            raise self._lost(f"at step {turn.step}", failure) from failure
        ends = np.cumsum(sizes).tolist()
        data = received.numpy().tobytes()
        return [data[end - size : end] for end, size in zip(ends, sizes, strict=True)]


def several(process_group: Any) -> bool:
    """Return whether this process is one of several ranks of torch.distributed.

    process_group  a torch.distributed group; None: all ranks

    Raises InvalidArgument if this process is not in the group.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return False
    if (size := dist.get_world_size(process_group)) < 0:
        raise InvalidArgument(
            f"process_group must contain this process, rank {dist.get_rank()}; it does not"
        )
    return size > 1


def _owners(keys: NDArray[np.uint64], ranks: int) -> NDArray[np.uint64]:
    """Return the rank that owns each key, by a hash that does not depend on the key's shard."""
    half = np.uint64(32)
    return ((keys ^ (keys >> half)) * GOLDEN >> half) % np.uint64(ranks)
