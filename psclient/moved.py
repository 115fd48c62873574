"""Send requests again to the owners of their keys, after a shard refused them.

A shard refuses keys that it does not own, which happens if the client's shard map is outdated.
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

Places = NDArray[np.int64]  # [n] indices into the keys of the refused push or pull


def resend(
    links: Sequence[Link],
    shard_map: routing.ShardMap,
    exchange: codec.Exchange,
    min_versions: Sequence[Versions],
    deadline: float,
) -> codec.Exchanged:
    """Send a refused exchange to the shards that own its keys; return the combined answer.

    links         connections to all shards
    shard_map     the newest shard map
    exchange      the pushes and pulls, of which the refusing shard applied nothing
    min_versions  for each pull, smallest version of each shard to read from; (): any
    deadline      monotonic seconds

    The answer looks as if one shard had answered. Raises the first PsError once all shards have
    answered.
    """
    push_owners = [routing.owners(push.keys, shard_map) for push in exchange.pushes]
    pull_owners = [routing.owners(pull.keys, shard_map) for pull in exchange.pulls]
    sent: list[tuple[Link, Call, list[int]]] = []
    places: list[list[Places]] = [[] for _ in exchange.pulls]
    for shard, link in enumerate(links):
        pushes, pulls, numbers = [], [], []
        for push, owners in zip(exchange.pushes, push_owners, strict=True):
            at = np.flatnonzero(owners == shard)
            if at.size:
                pushes.append(_some_push(push, at))
        for number, (pull, owners) in enumerate(zip(exchange.pulls, pull_owners, strict=True)):
            at = np.flatnonzero(owners == shard)
            if at.size:
                pulls.append(_some_pull(pull, at, min_versions[number], shard))
                numbers.append(number)
                places[number].append(at)
        if pushes or pulls:
            sent.append((link, Call(codec.Exchange(pushes, pulls), deadline), numbers))
    try:
        answers = _answers(sent, len(exchange.pulls))
    except BaseException:
        for link, call, _ in sent:
            link.abandon(call)
        raise
    return codec.Exchanged([], [_joined(*each) for each in zip(answers, places, strict=True)])


def _answers(
    calls: Sequence[tuple[Link, Call, Sequence[int]]], pulls: int
) -> list[list[codec.Pulled]]:
    """Send the calls and wait; return for each pull the answers to its parts, or raise the first
    error.

    calls  (link, call, numbers): numbers[i] is the index in the refused exchange of the pull that
           the call's pull i is a part of
    pulls  number of pulls in the refused exchange
    """
    answers: list[list[codec.Pulled]] = [[] for _ in range(pulls)]
    failure = None
    for link, call, _ in calls:
        link.submit(call)
    for link, call, numbers in calls:
        try:
            for number, pulled in zip(numbers, link.wait(call).pulls, strict=True):
                answers[number].append(pulled)
        except PsError as error:
            failure = failure or error
    if failure is not None:
        raise failure
    return answers


def _some_push(push: codec.PushMessage, at: Places) -> codec.PushMessage:
    """Return the part of a push that has the keys at indices ``at``."""
    header = pb.PushHeader()
    header.CopyFrom(push.header)
    gradients = push.gradients.reshape(len(push.keys), -1)[at]
    counts = None if push.counts is None else push.counts[at]
    return codec.PushMessage(header, push.keys[at], counts, gradients)


def _some_pull(
    pull: codec.PullMessage, at: Places, least: Versions, shard: int
) -> codec.PullMessage:
    """Return the part of a pull, for one shard, that has the keys at indices ``at``.

    least  smallest version of each shard to read from; (): any
    """
    header = pb.PullHeader()
    header.CopyFrom(pull.header)
    header.min_version = least[shard] if least else 0
    header.min_epoch = least.epochs[shard] if least else 0
    return codec.PullMessage(header, pull.keys[at])


def _joined(answers: list[codec.Pulled], places: list[Places]) -> codec.Pulled:
    """Combine the answers to the parts of a pull into one, with rows in the order of its keys.

    places  for each answer, the indices of its keys in the pull
    """
    order = np.argsort(np.concatenate(places))

    def whole(field: str) -> NDArray[Any]:
        parts = [
            getattr(answer, field).reshape(len(at), -1)
            for answer, at in zip(answers, places, strict=True)
        ]
        return np.concatenate(parts)[order].reshape(-1)

    return codec.Pulled(
        answers[0].header,
        whole("embeddings"),
        whole("versions"),
        whole("steps"),
        whole("frequencies"),
    )
