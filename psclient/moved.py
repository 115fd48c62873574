"""Send a request that a shard refused again, to the shards that own its keys.

A shard refuses a request with keys that it does not own. The client sends such a request if its
shard map is outdated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from psclient.errors import PsError
from psclient.link import Link
from psclient.session import Call
from psclient.versions import Versions
from psproto import codec, routing
from psproto import ps_pb2 as pb

Indices = NDArray[np.int64]  # [n] indices into the keys of the refused push or pull


def resend(
    links: Sequence[Link],
    shard_map: routing.ShardMap,
    exchange: codec.Exchange,
    min_versions: Sequence[Versions],
    deadline: float,
) -> codec.Exchanged:
    """Send the pushes and pulls of a refused exchange to the owners of their keys; wait for them.

    links         connections to all shards
    shard_map     the newest shard map
    exchange      the pushes and pulls; the shard that refused them applied nothing
    min_versions  for each pull: oldest version at which each shard may be read; (): any version
    deadline      monotonic seconds

    Returns the combined answer, in the form of an answer by one shard to the whole exchange. Raises
    the first PsError once all shards have answered.
    """
    sent = [
        _Resent(link, exchange, shard, shard_map, min_versions, deadline)
        for shard, link in enumerate(links)
    ]
    sent = [each for each in sent if each.call.exchange.pushes or each.call.exchange.pulls]
    try:
        answers = _answers(sent)
    except BaseException:
        for each in sent:
            each.link.abandon(each.call)
        raise
    return codec.Exchanged([], [_joined(answers[n]) for n in range(len(exchange.pulls))])


class _Resent:
    """The part of a refused exchange that one shard owns, as a call to this shard.

    link   connection to the shard
    call   pushes and pulls, with only those keys that the shard owns
    pulls  (n, indices) for each pull of the call: it has the keys at these indices of pull n of the
           refused exchange

    ``resend`` explains the arguments; ``shard`` is the number of the shard.
    """

    def __init__(
        self,
        link: Link,
        exchange: codec.Exchange,
        shard: int,
        shard_map: routing.ShardMap,
        min_versions: Sequence[Versions],
        deadline: float,
    ) -> None:
        self.link = link
        self.pulls: list[tuple[int, Indices]] = []
        pushes, pulls = [], []
        for push in exchange.pushes:
            at = np.flatnonzero(routing.owners(push.keys, shard_map) == shard)
            if at.size:
                pushes.append(_some_push(push, at))
        for n, (pull, least) in enumerate(zip(exchange.pulls, min_versions, strict=True)):
            at = np.flatnonzero(routing.owners(pull.keys, shard_map) == shard)
            if at.size:
                pulls.append(_some_pull(pull, at, least, shard))
                self.pulls.append((n, at))
        self.call = Call(codec.Exchange(pushes, pulls), deadline)


def _answers(sent: Sequence[_Resent]) -> dict[int, list[tuple[Indices, codec.Pulled]]]:
    """Send the calls of all shards and wait for their answers.

    Returns for pull n of the refused exchange a list of (indices, answer): the answer has the rows
    of the keys at these indices. Raises the first PsError once all shards have answered.
    """
    answers: dict[int, list[tuple[Indices, codec.Pulled]]] = {}
    failure = None
    for each in sent:
        each.link.submit(each.call)
    for each in sent:
        try:
            for (n, at), pulled in zip(each.pulls, each.link.wait(each.call).pulls, strict=True):
                answers.setdefault(n, []).append((at, pulled))
        except PsError as error:
            failure = failure or error
    if failure is not None:
        raise failure
    return answers


def _some_push(push: codec.PushMessage, at: Indices) -> codec.PushMessage:
    """Return a push of only those keys of ``push`` that have the indices ``at``."""
    header = pb.PushHeader()
    header.CopyFrom(push.header)
    gradients = push.gradients.reshape(len(push.keys), -1)[at]
    counts = None if push.counts is None else push.counts[at]
    return codec.PushMessage(header, push.keys[at], counts, gradients)


def _some_pull(
    pull: codec.PullMessage, at: Indices, least: Versions, shard: int
) -> codec.PullMessage:
    """Return a pull, from one shard, of only those keys of ``pull`` that have the indices ``at``.

    least  oldest version at which each shard may be read; (): any version
    shard  number of the shard
    """
    header = pb.PullHeader()
    header.CopyFrom(pull.header)
    header.min_version = least[shard] if least else 0
    header.min_epoch = least.epochs[shard] if least else 0
    return codec.PullMessage(header, pull.keys[at], pull.dim)


def _joined(answers: Sequence[tuple[Indices, codec.Pulled]]) -> codec.Pulled:
    """Combine the answers of several shards to parts of one pull.

    answers  (indices, answer) of each shard: the answer has the rows of the keys at these indices

    Returns one answer with the rows in the order of the pull's keys.
    """
    order = np.argsort(np.concatenate([at for at, _ in answers]))

    def whole(field: str) -> NDArray[Any]:
        parts = [getattr(answer, field).reshape(len(at), -1) for at, answer in answers]
        return np.concatenate(parts)[order].reshape(-1)

    return codec.Pulled(
        answers[0][1].header,
        whole("embeddings"),
        whole("versions"),
        whole("steps"),
        whole("frequencies"),
    )
