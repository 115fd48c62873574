"""Identity: which shard of which cluster a server is. Clients name the shard that a call is for.

Machines and pods are replaced, and their addresses used again. So a client may reach a server that
is not the one it knew. Each call of a client that knows the shard carries the metadata IDENTITY:
the number of the shard, the number of shards and the name of the cluster, "1/3/prod".
"""

from __future__ import annotations

import re
from dataclasses import dataclass

IDENTITY = "ps-shard"  # key of the metadata
_FORMAT = re.compile(r"([0-9]{1,4})/([0-9]{1,4})/([A-Za-z0-9_./-]{0,128})")


@dataclass(frozen=True, slots=True)
class Identity:
    """Which shard of which cluster a server is."""

    shard: int  # number of the shard
    shards: int  # number of shards in the cluster
    cluster: str  # name of the cluster; "": it has none

    def differs(self, value: str | bytes) -> str | None:
        """Return None if ``value``, metadata of a call, names this shard; else what it names.

        The name of the cluster is compared only if both sides know one.
        """
        match = _FORMAT.fullmatch(str(value))
        if match is None:
            return f"{str(value)[:64]!r}, which is not SHARD/SHARDS/CLUSTER"
        other = Identity(int(match[1]), int(match[2]), match[3])
        named = bool(self.cluster and other.cluster)
        same = (other.shard, other.shards) == (self.shard, self.shards)
        if same and not (named and other.cluster != self.cluster):
            return None
        return str(other)

    def __str__(self) -> str:
        """Return, for example, "shard 1 of 3 of cluster 'prod'"."""
        name = f" of cluster {self.cluster!r}" if self.cluster else ""
        return f"shard {self.shard} of {self.shards}{name}"
