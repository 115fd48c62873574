"""What the processes of one trainer do together, without a framework."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

Result = TypeVar("Result")


class Ranks(Protocol):
    """The processes of a trainer that train together, such as those of torch.distributed.

    rank  number of this process
    size  number of processes
    """

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def gather(self, value: Any) -> list[Any]:
        """Return the values that all ranks have passed, by rank. All ranks call it together."""


class Alone:
    """The Ranks of a trainer that is one process."""

    rank, size = 0, 1

    def gather(self, value: Any) -> list[Any]:
        """Return ``[value]``."""
        return [value]


class Flushes(Protocol):
    """What can have pushes in progress, such as a Pipeline."""

    def flush(self) -> Any:
        """Wait until all pushes are answered. Raises the error of the first that failed."""


def on_rank_0(ranks: Ranks, decide: Callable[[], Result]) -> Result:
    """Run ``decide`` on rank 0, and return its result, or raise its error, on all ranks.

    ranks  the processes, which all call this together
    """
    outcome: tuple[Any, Exception | None] = None, None
    if ranks.rank == 0:
        try:
            outcome = decide(), None
        except Exception as error:
            outcome = None, error
    result, failure = ranks.gather(outcome)[0]
    if failure is not None:
        raise failure
    return result  # type: ignore[no-any-return]
