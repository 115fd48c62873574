"""All shards as one process sees them."""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import Any

import numpy as np

from psclient.errors import InvalidArgument
from psclient.retry import retry
from psclient.session import Session
from psclient.stream import Link
from psclient.unary import UnaryLink
from psproto import ps_pb2 as pb
from psproto import routing

WATCH = 0.1  # seconds between looks for readers that wait past their deadline
ROOM = 4096  # bytes of a message left for headers


class Cluster:
    """The shards as one process sees them; made again after a fork."""

    def __init__(
        self,
        addresses: Sequence[str],
        transport: str,
        client_id: int,
        incarnation: int,
        deadline: float,
    ) -> None:
        self.process = os.getpid()
        self.links: list[Link | UnaryLink] = []
        kind = Link if transport == "stream" else UnaryLink
        for shard, address in enumerate(addresses):
            session = Session(client_id or secrets.randbits(63) + 1, incarnation)
            self.links.append(kind(f"shard {shard} at {address}", address, session))
        self.pool = ThreadPoolExecutor(len(self.links), "psclient")
        try:
            infos = self.refresh(deadline)
        except BaseException:
            self.close()
            raise
        self.message_bytes = min(int(info.limits.message_bytes) for info in infos) - ROOM
        self.keys = min(int(info.limits.keys) for info in infos)
        self._closed = threading.Event()
        threading.Thread(target=self._watch, args=(self.links,), daemon=True).start()

    def refresh(self, deadline: float) -> list[pb.GetServerInfoResponse]:
        """Ask the shards for their map, and what else they tell of themselves."""
        request = pb.GetServerInfoRequest()
        infos = self.on_all(
            "InfoService/GetServerInfo", request, pb.GetServerInfoResponse, deadline
        )
        self.shard_map = self._check(infos)
        return infos

    def on_all(
        self, method: str, request: Any, answer: Any, deadline: float, *, first: bool = False
    ) -> list[Any]:
        """Call a unary method on every shard at once; answers in the order of the shards.

        first  on shard 0 before the others: of several clients that do not agree, one is ahead
        """
        message = request.SerializeToString()

        def call(link: Link | UnaryLink) -> Any:
            def attempt(left: float) -> bytes:
                return link.channel.call(f"/ps.v1.{method}", message, left)

            return answer.FromString(retry(attempt, link.where, deadline, count()))

        done = [call(self.links[0])] if first else []
        return done + list(self.pool.map(call, self.links[len(done) :]))

    def close(self) -> None:
        for link in self.links:
            link.close()
        self.pool.shutdown(wait=False)
        if hasattr(self, "_closed"):
            self._closed.set()

    def _check(self, infos: list[pb.GetServerInfoResponse]) -> routing.ShardMap:
        """The shard map, if the servers are the shards of one cluster in their order."""
        for shard, (link, info) in enumerate(zip(self.links, infos, strict=True)):
            if info.shard_map.shards != len(self.links):
                raise InvalidArgument(
                    f"addresses: {link.where} is one of {info.shard_map.shards} shards,"
                    f" {len(self.links)} addresses were given"
                )
            if info.shard != shard:
                raise InvalidArgument(f"addresses: {link.where} serves shard {info.shard}")
        newest = max(infos, key=lambda info: info.shard_map.epoch).shard_map
        table = np.frombuffer(newest.shard_of_bucket, "<u2")
        return routing.ShardMap(newest.epoch, newest.shards, table)

    def _watch(self, links: list[Link | UnaryLink]) -> None:
        while not self._closed.wait(WATCH):
            now = time.monotonic()
            for link in links:
                link.watch(now)
