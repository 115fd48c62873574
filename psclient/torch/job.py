"""JobRanks: the ranks of torch.distributed, for a Checkpointer."""

from __future__ import annotations

from typing import Any

from torch import distributed


class JobRanks:
    """All ranks of a torch.distributed process group, as Checkpointer needs them.

    group  process group; None: the default one. Values travel pickled; with NCCL, through the GPU
    """

    def __init__(self, group: Any = None) -> None:
        self._group = group
        self.rank = distributed.get_rank(group)
        self.size = distributed.get_world_size(group)

    def gather(self, value: Any) -> list[Any]:
        """Return the values that all ranks have passed, by rank. All ranks call it together."""
        values: list[Any] = [None] * self.size
        distributed.all_gather_object(values, value, group=self._group)
        return values
