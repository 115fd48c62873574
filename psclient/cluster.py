"""Connections to all shards, and the shard map."""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

import numpy as np

from psclient.access import Access
from psclient.addresses import hint, is_name
from psclient.errors import InvalidArgument, PsError, Unavailable, answer_of
from psclient.fanout import Ask, ask_all
from psclient.lanelink import LaneLink
from psclient.link import Link
from psclient.places import Places
from psclient.routes import Route
from psclient.session import Session
from psclient.signals import Shield, wake_delayed
from psclient.stream import StreamLink
from psclient.unary import UnaryLink
from psproto import ps_pb2 as pb
from psproto import routing

WATCH = 0.1  # seconds between two checks for calls past their deadline
PATIENCE = 0.05  # seconds that such a check waits for a link that is busy
ROOM = 4096  # bytes of each message that are reserved for headers

Result = TypeVar("Result")


class Cluster:
    """Connections of one process to all shards of a cluster. A forked child creates its own.

    Arguments:

    places       where the shards are
    transport    "stream" or "unary"
    lane         whether streams use the same-host lane: "auto", "never" or "require"
    client_id    identity of the client; 0: a random one for each shard
    incarnation  number that grows with each use of the same client_id
    renew        whether to go on with the next incarnation after SessionExpired
    retry_refused  whether to send a request again that a shard refuses for now
    access       how to connect
    deadline     monotonic seconds at which the shards must have answered

    Attributes:

    process        id of the process that created the connections
    links          connections, one per shard, in order
    shard_map      which shard owns each key
    message_bytes  size of the largest request or reply that every shard accepts, without headers
    keys           maximum number of keys in a request that every shard accepts

    Raises Unavailable if a shard cannot be reached, and InvalidArgument if the servers are not the
    shards of one cluster in order.
    """

    def __init__(
        self,
        places: Places,
        transport: str,
        lane: str,
        client_id: int,
        incarnation: int,
        *,
        renew: bool = True,
        retry_refused: bool = True,
        access: Access,
        deadline: float,
    ) -> None:
        self.process = os.getpid()
        self._stop: SimpleQueue[None] = SimpleQueue()
        self.links: list[Link] = []
        for shard, route in enumerate(places.routes(deadline)):
            client = client_id or secrets.randbits(63) + 1
            session = Session(client, incarnation, renews=renew, repeats=retry_refused)
            link = _link(transport, lane, places.where(shard), route, session, access)
            self.links.append(link)
        try:
            infos = self.refresh(deadline)
            for link, info in zip(self.links, infos, strict=True):
                if isinstance(link, LaneLink):
                    link.offered(info)
        except Unavailable as error:
            self.close()
            raise _explained(error, access.proxy) from None
        except BaseException:
            self.close()
            raise
        for shard, (link, info) in enumerate(zip(self.links, infos, strict=True)):
            link.channel.route.expect(shard, len(infos), info.cluster)
        self.message_bytes = min(int(info.limits.message_bytes) for info in infos) - ROOM
        self.keys = min(int(info.limits.keys) for info in infos)
        with Shield():
            threading.Thread(target=_watch, args=(self.links, self._stop), daemon=True).start()

    def refresh(self, deadline: float) -> list[pb.GetServerInfoResponse]:
        """Fetch the newest shard map from the shards and store it in ``shard_map``.

        deadline  monotonic seconds

        Returns the shards' answers to GetServerInfo, which also contain their limits.
        """
        request = pb.GetServerInfoRequest()
        infos = self.on_all(
            "InfoService/GetServerInfo", request, pb.GetServerInfoResponse, deadline
        )
        self.shard_map = self._check(infos)
        return infos

    def on_all(
        self, method: str, request: Any, answer: Any, deadline: float, *, first: bool = False
    ) -> list[Any]:
        """Call a unary method on every shard at once; return the replies in shard order.

        method    service and name of the method, such as "TableService/CreateTable"
        request   message to send
        answer    class of the reply message
        deadline  monotonic seconds
        first     call shard 0 before the others, so that of several clients with conflicting
                  requests one wins on all shards

        Raises the error of the first shard that failed, or whose reply is not a valid message.
        """
        message = request.SerializeToString()
        asks = [Ask(link, method, message) for link in self.links]
        for some in (asks[:1], asks[1:]) if first else (asks,):
            ask_all(some, deadline)
            for ask in some:
                if ask.error is not None:
                    raise ask.error
        return [answer_of(answer, ask.answer or b"", ask.link.where) for ask in asks]

    def on_each(self, work: Callable[[int], Result]) -> list[Result]:
        """Run ``work(shard number)`` for every shard, each on a new thread.

        Waits for all threads, then returns the results in shard order, or raises the error of the
        first shard that failed. If a signal interrupts the caller, the threads still finish their
        work.
        """
        done: SimpleQueue[tuple[int, Any, BaseException | None]] = SimpleQueue()

        def run(shard: int) -> None:
            try:
                done.put((shard, work(shard), None))
            except BaseException as error:
                done.put((shard, None, error))

        with Shield():
            for shard in range(len(self.links)):
                threading.Thread(target=run, args=(shard,), daemon=True).start()
        ended = sorted((done.get() for _ in self.links), key=lambda each: each[0])
        for _, _, error in ended:
            if error is not None:
                raise error
        return [result for _, result, _ in ended]

    def close(self) -> None:
        """Close all connections; calls that wait for an answer fail."""
        for link in self.links:
            link.close()
        self._stop.put(None)

    def forget(self) -> None:
        """Make the watch thread close the connections; return at once.

        Called when the client is garbage-collected, where waiting for a lock could deadlock.
        """
        if self.process == os.getpid():
            self._stop.put(None)

    def _check(self, infos: list[pb.GetServerInfoResponse]) -> routing.ShardMap:
        """Check that the connections are to all shards of one cluster, in order.

        infos  answer of each shard to GetServerInfo

        Returns the newest shard map in ``infos``. Raises InvalidArgument if the number or the order
        of the addresses is wrong.
        """
        for shard, (link, info) in enumerate(zip(self.links, infos, strict=True)):
            if info.shard_map.shards != len(self.links):
                address = link.channel.route.address
                alone = len(self.links) == 1 and is_name(address)
                rest = f"; for a name that leads to all shards, pass {address!r}, not in a list"
                raise InvalidArgument(
                    f"addresses: {link.where} belongs to a cluster of {info.shard_map.shards}"
                    f" shards, but {len(self.links)} addresses were given{rest if alone else ''}"
                )
            if info.shard != shard:
                raise InvalidArgument(
                    f"addresses: {link.where} is shard {info.shard}; list the addresses in the"
                    " order of the shards"
                )
        newest = max(infos, key=lambda info: info.shard_map.epoch).shard_map
        table = np.frombuffer(newest.shard_of_bucket, "<u2")
        return routing.ShardMap(newest.epoch, newest.shards, table)


def _link(
    transport: str, lane: str, where: str, route: Route, session: Session, access: Access
) -> Link:
    """Return a connection to one shard.

    transport  "stream" or "unary"
    lane       whether a stream uses the same-host lane: "auto", "never" or "require"

    ``Link`` explains the other arguments.
    """
    if transport == "unary":
        return UnaryLink(where, route, session, access)
    if lane == "never":
        return StreamLink(where, route, session, access)
    return LaneLink(where, route, session, access, demanded=lane == "require")


def _watch(links: Sequence[Link], stop: SimpleQueue[None]) -> None:
    """Look for calls past their deadline, in each of ``links``, every WATCH seconds.

    When ``stop`` receives a message, close the links and return. A background thread runs this
    function.
    """
    while True:
        try:
            stop.get(timeout=WATCH)
        except Empty:
            wake_delayed()
            now = time.monotonic()
            for link in links:
                if link.lock.acquire(timeout=PATIENCE):  # else it opens a lane: the others go on
                    link.lock.release()
                    link.watch(now)
        else:
            for link in links:
                link.close()
            return


def _explained(error: PsError, proxy: bool) -> PsError:
    """Append a guess at the cause to the error of an unreachable server; return the new error."""
    explained = type(error)(f"{error}{hint(str(error), proxy=proxy)}")
    explained.reason, explained.retry_after = error.reason, error.retry_after
    return explained
