"""The live figures of all shards as one JSON document, /status.json of the HTTP port.

    {"shard": 0, "shards": [{"shard": 0, "address": "", "age_seconds": 0.0, "problem": "",
                             "status": {...}}, ...]}

The outer ``shard`` is the shard that answered. ``status`` is its newest GetStatusResponse as
statusjson.py writes it, or absent if the shard never answered. ``age_seconds`` is the time since
then. ``problem`` is why the newest request to that shard failed; "" if it did not.

However many viewers there are, a shard is asked once per second at most. A shard that is slow to
answer does not delay the others: after PATIENCE_SECONDS its last answer is shown with its age.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from typing import Any

from psserver.httppeers import TOGETHER, Peer
from psserver.livestatus import MOST_TABLES, LiveStatus
from psserver.pool import Pool
from psserver.security.httptoken import HttpToken
from psserver.statusjson import plain

FRESH_SECONDS = 0.9  # age up to which a document is served again; viewers ask every second
OWN_SECONDS = 0.4  # the same for this shard's own figures, which other shards also ask for
PATIENCE_SECONDS = 0.5  # maximum time to wait for the other shards
LOOKUPS = 4  # threads that look up host names
ROWS = 4096  # tables of all shards together in a document, as far as each may have LEAST_TABLES
LEAST_TABLES = 16  # tables of a shard that are shown in any case
SHARDS_PER_SECOND = 64  # larger clusters are asked less often: so many shards per second


class Overview:
    """Makes the documents. Must be used on the event loop of the HTTP thread.

    live       figures of this shard
    shard      number of this shard
    addresses  HOST:PORT of the HTTP port of each shard, by number; "": unknown
    token      token that the HTTP ports need; None: they need none
    """

    def __init__(
        self,
        live: LiveStatus,
        shard: int,
        addresses: Sequence[str],
        token: HttpToken | None = None,
    ) -> None:
        self._live = live
        self._shard = shard
        self._peers = [Peer(number, each, token) for number, each in enumerate(addresses)]
        self._tables = min(MOST_TABLES, max(LEAST_TABLES, ROWS // max(len(addresses), 1)))
        self._fresh = max(FRESH_SECONDS, len(addresses) / SHARDS_PER_SECOND)
        self._figures: dict[str, Any] = {}  # of this shard
        self._read = float("-inf")  # monotonic time at which they were read
        self._reading: asyncio.Task[None] | None = None
        self._document, self._made = b"", float("-inf")
        self._making: asyncio.Task[bytes] | None = None
        self._slots: asyncio.Semaphore | None = None
        self._lookups = Pool("host names", LOOKUPS)
        self._reader = Pool("figures", 1)

    async def alone(self, tables: int = MOST_TABLES) -> bytes:
        """Return the document of this shard alone.

        tables  maximum number of tables in it
        """
        entry = await self._entry(tables)
        return _encoded({"shard": self._shard, "shards": [entry]})

    async def all(self) -> bytes:
        """Return the document of all shards."""
        if time.monotonic() - self._made < self._fresh:
            return self._document
        if self._making is None or self._making.done():
            self._making = asyncio.create_task(self._make())
        return await asyncio.shield(self._making)

    async def _make(self) -> bytes:
        """Ask all shards, and make a new document."""
        if self._slots is None:
            self._slots = asyncio.Semaphore(TOGETHER)
        asked = [
            task
            for each in self._peers
            if each.shard != self._shard
            and (task := each.ask(self._slots, self._lookups, self._tables)) is not None
        ]
        if asked:
            await asyncio.wait(asked, timeout=PATIENCE_SECONDS)
        own, now = await self._entry(self._tables), time.monotonic()
        entries = [own if each.shard == self._shard else _shown(each, now) for each in self._peers]
        if self._shard >= len(self._peers):  # not a shard of the cluster
            entries.append(own)
        self._document = _encoded({"shard": self._shard, "shards": entries})
        self._made = time.monotonic()
        return self._document

    async def _entry(self, tables: int) -> dict[str, Any]:
        """Return the entry of this shard, at most OWN_SECONDS old."""
        now = time.monotonic()
        if self._reading is None or (self._reading.done() and now - self._read > OWN_SECONDS):
            self._reading = asyncio.create_task(self._read_own())
        await asyncio.shield(self._reading)
        figures = {**self._figures, "tables": self._figures["tables"][:tables]}
        address = self._peers[self._shard].address if self._shard < len(self._peers) else ""
        return {
            "shard": self._shard,
            "address": address,
            "age_seconds": max(now - self._read, 0.0),
            "problem": "",
            "status": figures,
        }

    async def _read_own(self) -> None:
        """Read the figures of this shard, on a thread: the disk may hang."""
        loop = asyncio.get_running_loop()
        figures = await loop.run_in_executor(self._reader, lambda: plain(self._live.read()))
        self._figures, self._read = figures, time.monotonic()


def _shown(peer: Peer, now: float) -> dict[str, Any]:
    """Return the entry of another shard.

    now  monotonic seconds
    """
    entry: dict[str, Any] = {
        "shard": peer.shard,
        "address": peer.address,
        "problem": peer.problem,
    }
    if peer.answered is None:
        entry["problem"] = peer.problem or "it has not answered yet"
    else:
        entry |= {"age_seconds": now - peer.answered, "status": peer.figures}
    return entry


def _encoded(document: dict[str, Any]) -> bytes:
    """Encode a document as JSON."""
    return json.dumps(document, separators=(",", ":"), allow_nan=False).encode()
