"""Delete rows on every shard that owns some of the keys."""

from __future__ import annotations

import numpy as np

from psclient.batch import Batch
from psclient.cluster import Cluster
from psclient.errors import SessionExpired, WrongShard, answer_of
from psclient.link import Link
from psclient.retry import retry
from psproto import codec
from psproto import ps_pb2 as pb


def delete_rows(
    cluster: Cluster, table: str, batch: Batch, durability: int, deadline: float
) -> int:
    """Delete the rows of a batch of keys on all shards; return the number of rows deleted.

    table       name of the table
    durability  number in ps.proto; 0: the table's durability
    deadline    monotonic seconds

    If a shard refuses keys that it does not own, fetches the newest shard map and sends these keys
    to their owners.
    """
    refused: list[codec.Keys] = []
    deleted = _round(cluster, table, batch, durability, deadline, refused)
    if refused:
        cluster.refresh(deadline)
        again = Batch(np.concatenate(refused), cluster.shard_map)
        deleted += _round(cluster, table, again, durability, deadline, None)
    return deleted


def _round(
    cluster: Cluster,
    table: str,
    batch: Batch,
    durability: int,
    deadline: float,
    refused: list[codec.Keys] | None,
) -> int:
    """Send the keys of a batch to the shards that own them; return the number of rows deleted.

    refused  list that receives the keys which a shard refuses because it does not own them; None:
             raise WrongShard instead. ``delete_rows`` explains the other arguments
    """
    most = min(cluster.keys, cluster.message_bytes // 8)

    def part(shard: int) -> int:
        deleted = 0
        first, last = batch.split.bounds[shard : shard + 2].tolist()
        for low in range(first, last, most):
            header = pb.PushHeader(table=table, durability=durability)  # type: ignore[arg-type]
            some = batch.keys[low : min(low + most, last)]
            try:
                deleted += _delete(cluster.links[shard], header, some, deadline)
            except WrongShard:
                if refused is None:
                    raise
                refused.append(some)
        return deleted

    return sum(cluster.on_each(part))


def _delete(link: Link, header: pb.PushHeader, keys: codec.Keys, deadline: float) -> int:
    """Delete rows on one shard; retry until it answers. The shard applies the delete exactly once.

    link      connection to the shard
    header    table and durability; the sequence number is written into it
    keys      uint64[n], distinct
    deadline  monotonic seconds

    Returns the number of rows deleted. Raises WrongShard if the shard does not own all the keys.
    """
    session, data = link.session, None
    try:
        with link.lock:
            session.number(header)
        data = _send(link, header, keys, deadline)
    finally:
        with link.lock:
            session.over(header, applied=data is not None)
    return int(answer_of(pb.DeleteResponse, data, link.where).deleted)


def _send(link: Link, header: pb.PushHeader, keys: codec.Keys, deadline: float) -> bytes:
    """Send a delete to one shard until it answers; return the encoded DeleteResponse.

    If the shard refuses the first attempt with SessionExpired, the delete was never applied. So,
    if the session may be renewed, it gets a new number (``Session.renew``), and is sent again.
    ``_delete`` explains the arguments.
    """
    session, attempts = link.session, 0

    def attempt(left: float) -> bytes:
        nonlocal attempts
        attempts += 1
        message = codec.encode_delete(header, keys)
        return link.channel.call("/ps.v1.RowService/Delete", message, left)

    try:
        return retry(attempt, link.channel, link.where, deadline)  # type: ignore[no-any-return]
    except SessionExpired:
        if attempts > 1 or not session.renews:
            raise
    with link.lock:
        if header.incarnation == session.incarnation:
            session.renew()
        session.number(header)
    return retry(attempt, link.channel, link.where, deadline)  # type: ignore[no-any-return]
