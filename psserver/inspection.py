"""Report the state of single keys: rows, admission counters, and remembered deletes.

A tombstone is the record of one deleted key that the shard keeps in memory.
"""

from __future__ import annotations

import numpy as np

from psproto import ps_pb2 as pb
from psproto import routing
from psserver.engine import Engine
from psserver.errors import BadRequest, TooLarge, WrongShard
from psserver.schemas import write_schema
from psserver.shard import Shard
from psserver.tombstones import Tombstones, joined, no_tombstones
from psserver.views import KeyView
from storage.errors import Compacted
from storage.kernels import Keys, norms_of
from storage.records import Cause, DeleteRecord, decode
from storage.versionlog import VersionLog

MAX_INSPECTED = 1000  # maximum number of keys in a request
DEAD = 65_536  # maximum number of tombstones read in one engine call
MAX_GONE = 16  # maximum number of deletes returned per key, the newest ones
MAX_READS = 256  # maximum number of log records read per request; each takes about a millisecond


class Inspector:
    """Reports the state of single keys of one shard. Thread-safe.

    log  version log, to look up time and step of a delete; None: both are left out
    """

    def __init__(self, shard: Shard, engine: Engine, log: VersionLog | None) -> None:
        self._shard = shard
        self._engine = engine
        self._log = log

    def inspect(self, request: pb.InspectRequest) -> pb.InspectResponse:
        """Return the state of each key in ``request.keys``.

        A key has a row, is counted until it is admitted, was deleted, is new, or is unknown. This
        blocks, so it must run on a worker thread. Raises BadRequest, TooLarge, WrongShard or
        UnknownTable.
        """
        keys = self._keys(request)
        known = self._known(request.table, keys)
        gone, horizon = self._gone(known, keys)
        response = pb.InspectResponse(
            version=known.version,
            created=known.created,
            tombstone_horizon=horizon,
            step=known.step,
            admission=write_schema(known.schema).admission,
        )
        norms = norms_of(known.embeddings, known.embeddings.shape[1])
        for i, key in enumerate(keys.tolist()):
            facts = response.keys.add(key=key, gone=gone.get(key, ()))
            if known.versions[i]:
                facts.norm = norms[i]
                if request.embeddings:
                    facts.embedding.extend(known.embeddings[i].tolist())
            _set_state(facts, known, i, horizon)
        return response

    def _known(self, table: str, keys: Keys) -> KeyView:
        """Return the rows of keys. Rows on disk are read first, because the engine must not wait.

        Raises UnknownTable, and Corrupt if a row on disk is damaged.
        """
        shard = self._shard
        number = self._engine.run(lambda: shard.number_of(table))
        read = self._engine.run(lambda: shard.cold_read(number, keys))
        reads = [] if read is None else [read]
        for each in reads:
            each.pages.warm()

        def view() -> KeyView:
            shard.settle(reads)
            return shard.view_keys(table, keys)

        return self._engine.run(view)

    def _keys(self, request: pb.InspectRequest) -> Keys:
        """Return the keys of a request: uint64[n], distinct, all owned by this shard.

        Raises BadRequest, TooLarge or WrongShard.
        """
        shard, where = self._shard, f"table {request.table[:200]!r}"
        if len(request.keys) % 8:
            raise BadRequest(
                "INVALID_ARGUMENT",
                f"{where}: field 'keys' must have 8 bytes per key, got {len(request.keys)} bytes",
            )
        keys = np.frombuffer(request.keys, "<u8")
        if len(keys) > MAX_INSPECTED:
            raise TooLarge(
                "TOO_MANY_KEYS",
                f"{where}: expected at most {MAX_INSPECTED} keys in a request, got {len(keys)}",
            )
        repeated, foreign = routing.check(keys, shard.shard_map, shard.number)
        if foreign >= 0:
            key, shard_map = keys[foreign], shard.shard_map
            belongs = int(routing.owners(keys[foreign : foreign + 1], shard_map)[0])
            raise WrongShard(request.table, int(key), belongs, shard.number, shard_map.epoch)
        if repeated:
            raise BadRequest("INVALID_ARGUMENT", f"{where}: field 'keys' must have distinct keys")
        return keys

    def _gone(self, known: KeyView, keys: Keys) -> tuple[dict[int, list[pb.KeyFacts.Gone]], int]:
        """Return (key -> its newest deletes, horizon).

        known  rows of the keys in one table, at one version; later deletes are left out
        keys   the keys, uint64[n]

        Deletes up to the version ``horizon`` may be missing.
        """
        newest, at = no_tombstones(), known.created
        while True:
            dead = self._engine.run(lambda at=at: self._shard.tombstones(at, DEAD))  # type: ignore[misc]
            dead = dead.take(dead.versions <= known.version)
            if not len(dead):
                return self._by_key(newest), self._shard.tombstone_horizon
            at = int(dead.versions[-1])
            hits = dead.take((dead.tables == known.number) & np.isin(dead.keys, keys))
            newest = newest_of(joined([newest, hits]), MAX_GONE)

    def _by_key(self, dead: Tombstones) -> dict[int, list[pb.KeyFacts.Gone]]:
        """Return key -> its deletes, oldest first.

        dead  tombstones (remembered deletes) of the keys, ordered by version

        Only the newest MAX_READS deletes get their time and step, which are read from the log.
        """
        versions, first = np.unique(dead.versions, return_index=True)
        causes = dead.causes[first].tolist()  # all tombstones of a version have the same cause
        readable = len(versions) - MAX_READS
        deletes = {
            version: self._delete_of(version, Cause(cause), read=number >= readable)
            for number, (version, cause) in enumerate(zip(versions.tolist(), causes, strict=True))
        }
        found: dict[int, list[pb.KeyFacts.Gone]] = {}
        for key, version in zip(dead.keys.tolist(), dead.versions.tolist(), strict=True):
            found.setdefault(key, []).append(deletes[version])
        return found

    def _delete_of(self, version: int, cause: Cause, *, read: bool) -> pb.KeyFacts.Gone:
        """Return a message about the delete of this version.

        cause  why the rows were deleted
        read   also read time and training step from the log, if it still has the record
        """
        gone = pb.KeyFacts.Gone(version=version, cause=cause.name.lower())
        if self._log is None or not read:
            return gone
        try:
            frames = self._log.read(version - 1, upto=version)
        except Compacted:
            return gone
        for frame in frames[:1]:
            record = decode(frame)
            if isinstance(record, DeleteRecord):
                gone.time_us, gone.step = record.origin.time_us, record.origin.step
        return gone


def _set_state(facts: pb.KeyFacts, known: KeyView, i: int, horizon: int) -> None:
    """Set the state of a key in ``facts``, and the fields that belong to this state.

    facts    message about the key, which has the deletes of the key already
    known    rows and admission counters of several keys; the key has the index ``i``
    horizon  version up to which deletes may be forgotten
    """
    if known.versions[i]:
        facts.state = pb.KeyFacts.STATE_ROW
        facts.tier, facts.version = known.tiers[i], int(known.versions[i])
        facts.step, facts.frequency = int(known.steps[i]), int(known.frequencies[i])
    elif known.waiting[i]:
        facts.state, facts.waiting = pb.KeyFacts.STATE_WAITING, int(known.waiting[i])
    elif facts.gone:
        facts.state = pb.KeyFacts.STATE_GONE
    elif known.loss_reason:
        facts.state, facts.why = pb.KeyFacts.STATE_UNKNOWN, known.loss_reason
    elif horizon >= known.created:  # they are equal after a restore from a checkpoint
        facts.state = pb.KeyFacts.STATE_UNKNOWN
        facts.why = f"deletes up to version {horizon} may have lost their tombstones"
    else:
        facts.state = pb.KeyFacts.STATE_NEW


def newest_of(dead: Tombstones, most: int) -> Tombstones:
    """Return the newest ``most`` tombstones (remembered deletes) per key, ordered by version."""
    order = np.lexsort((dead.versions, dead.keys))
    keys = dead.keys[order]
    from_end = np.searchsorted(keys, keys, "right") - np.arange(len(keys))  # 1: the newest of a key
    return dead.take(np.sort(order[from_end <= most]))
