"""The components of a recovered shard whose figures are shown to operators."""

from __future__ import annotations

from dataclasses import dataclass

from psserver.checkpoints import Checkpoints
from psserver.feed import Feed
from psserver.flusher import Flusher
from psserver.lane import Lanes
from psserver.restore import Restores
from psserver.shard import Shard
from storage.versionlog import VersionLog


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """The components of one shard.

    log, feed, flusher  None: the shard has no data directory
    lanes               None: the server offers no same-host lane
    """

    shard: Shard
    checkpoints: Checkpoints
    restores: Restores
    log: VersionLog | None = None
    feed: Feed | None = None
    flusher: Flusher | None = None
    lanes: Lanes | None = None
