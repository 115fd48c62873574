"""Discovery: find the shards of a cluster behind one DNS name.

Every shard answers GetServerInfo with its number, the number of shards, the name of its cluster,
and the address that clients should use, if that is configured. So the client looks the name up and
asks every address. The addresses need no order, and need not all be those of shards: an address
that does not answer, or answers with an error, is asked again until all shards are found.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any

import grpc

from psclient.access import Access, host_of
from psclient.channel import Cancelled, Channel
from psclient.errors import (
    InvalidArgument,
    PsError,
    ServerFailure,
    TlsError,
    Unavailable,
    answer_of,
)
from psclient.lookup import look_up
from psclient.retry import rpc_error
from psclient.routes import Route
from psproto import ps_pb2 as pb
from psproto.routing import MAX_SHARDS

LOOK_SECONDS = 0.5  # time between two look-ups, and between two questions to an address
ASK_SECONDS = 5.0  # maximum time of one question
FIRST_SECONDS = 1.0  # time to wait for the first answer of an address, once all shards are found
AGAIN_SECONDS = 2.0  # time after which an address that answered as a shard is asked again
SPARE_SECONDS = 10.0  # the same for an address that is probably of no use
FORGET_SECONDS = 60.0  # an address is forgotten that look-ups have not returned for this time
FRESH_SECONDS = 5.0  # an answer that is older is forgotten
INFO = "/ps.v1.InfoService/GetServerInfo"


@dataclass(frozen=True, slots=True)
class Found:
    """A server that answered, and when."""

    asked: str  # address that was asked: "host:port"
    address: str  # address that clients should use: "host:port"
    cluster: str  # name of its cluster; "": it has none
    shards: int  # number of shards in its cluster
    shard: int  # number of the shard
    start: int  # random number that its process drew at its start; 0: an older release
    at: float  # when it answered, in monotonic seconds

    @property
    def process(self) -> tuple[int, str]:
        """Return a key that identifies the server process: its start, or else its address."""
        return self.start, "" if self.start else self.address


class Discovery:
    """Asks all addresses behind one name, again and again, until it is closed.

    name     "host:port" with a DNS name
    access   how to connect; certificates must be for the host of ``name``
    known    addresses to ask in addition to those of the name
    spare    returns addresses that are probably of no use at the moment, so that they are asked
             only every SPARE_SECONDS

    Attributes:

    found   newest answer of each process, by ``Found.process``
    errors  address -> reason why its last question found no shard; "" -> why the look-up failed
    surplus addresses in ``errors`` whose server belongs to no shard: its number is too large
    refused those of ``errors`` to which no TLS connection is possible, with the error
    """

    def __init__(
        self,
        name: str,
        access: Access,
        known: Iterable[str] = (),
        spare: Callable[[], set[str]] = set,
    ) -> None:
        self.name = name
        self.found: dict[tuple[int, str], Found] = {}
        self.errors: dict[str, str] = {}
        self.surplus: set[str] = set()
        self.refused: dict[str, TlsError] = {}
        self._access = access
        self._spare = spare
        self._events: SimpleQueue[tuple[str, Any]] = SimpleQueue()
        # address -> since when it is known, in monotonic seconds
        self._addresses = dict.fromkeys(known, time.monotonic())
        self._seen: dict[str, float] = {}  # address -> when a look-up last returned it
        self._asking: dict[str, tuple[Channel, Any]] = {}  # address -> channel, gRPC's call
        self._due: dict[str, float] = {}  # address -> when to ask it again
        self._heard: dict[str, float] = {}  # address -> when it last answered, or failed to
        self._look = 0.0  # when to look up next, in monotonic seconds
        self._looking = False

    def step(self, until: float) -> None:
        """Ask what is due, and wait for one event, at most until ``until`` (monotonic seconds)."""
        now = time.monotonic()
        if now >= self._look and not self._looking:
            self._looking = True
            try:
                threading.Thread(target=self._look_up, name="psclient-lookup", daemon=True).start()
            except RuntimeError as error:  # no thread can be started at the moment
                self._looked_up(error)
        spare = self._spare()
        for address in self._addresses:
            due = self._due.get(address, 0.0)
            if address in spare:
                due = max(due, self._heard.get(address, self._addresses[address]) + SPARE_SECONDS)
            if address not in self._asking and now >= due:
                self._ask(address)
        try:
            pause = min(until, now + LOOK_SECONDS / 5) - now
            what, value = self._events.get(timeout=max(pause, 0))
        except Empty:
            return
        if what:
            self._answered(what, value)
        else:
            self._looked_up(value)

    def complete(self) -> list[Found] | None:
        """Return one answer per shard, in order, if all shards of one cluster were found.

        Returns None while shards are missing, while an address has not answered for less than
        FIRST_SECONDS, and while two servers answer as one shard or more than one cluster answers.
        """
        now = time.monotonic()
        self.found = {k: each for k, each in self.found.items() if now - each.at < FRESH_SECONDS}
        known = self._addresses.items()
        if any(now - since < FIRST_SECONDS for each, since in known if each not in self._heard):
            return None
        whole = [group for group in self._groups().values() if _whole(group)]
        if len(whole) != 1 or len(self._names()) > 1:
            return None
        return sorted(whole[0], key=lambda each: each.shard)

    def best(self) -> list[Found]:
        """Return the answers of the cluster of which most shards were found, in order of shards."""
        group = max(self._groups().values(), key=len, default=[])
        return self.complete() or sorted(group, key=lambda each: each.shard)

    @property
    def heard(self) -> bool:
        """Return whether the name was looked up, and every address has answered or failed to."""
        return bool(self._addresses) and self._addresses.keys() <= self._heard.keys()

    @property
    def hopeless(self) -> bool:
        """Return whether TLS permits a connection to none of the addresses."""
        return self.heard and self._addresses.keys() <= self.refused.keys()

    def problem(self) -> PsError:
        """Return the error that explains why ``complete`` returned None."""
        if self.refused and not self.found:
            address, refused = min(self.refused.items())
            problem = TlsError(f"{self.name}: {address}: {str(refused).removeprefix(': ')}")
            problem.reason = refused.reason
            return problem
        if not self._addresses and not self.found:
            return Unavailable(f"{self.name}: {self.errors.get('', 'the name was not looked up')}")
        groups = self._groups()
        if len(self._names()) > 1 or sum(map(_whole, groups.values())) > 1:
            which = "; ".join(sorted(map(_group_text, groups.values())))
            return InvalidArgument(
                f"{self.name}: the name leads to more than one cluster: {which}. Use a name that"
                " leads to the shards of one cluster"
            )
        texts = sorted(map(_missing, groups.values())) or ["no shard was found"]
        if len(self._addresses) == 1 and groups:
            texts.append(
                "the name has one address only: in Kubernetes, use the name of a headless Service"
                " (clusterIP: None)"
            )
        texts += [f"{each}: {text}" for each, text in sorted(self.errors.items()) if each][:8]
        if (text := self.errors.get("")) is not None:
            texts.append(text)
        return Unavailable(f"{self.name}: {'; '.join(texts)}")

    def close(self) -> None:
        """Cancel the questions that are not answered yet."""
        for channel, _ in self._asking.values():
            channel.close()
        self._asking.clear()

    def _look_up(self) -> None:
        """Look the name up, and put the addresses, or the error, into the queue of events."""
        try:
            self._events.put(("", look_up(self.name)))
        except Exception as error:
            self._events.put(("", error))

    def _looked_up(self, result: list[str] | Exception) -> None:
        """Take the result of a look-up. Addresses that an earlier look-up returned stay."""
        self._looking, now = False, time.monotonic()
        self._look = now + LOOK_SECONDS
        if isinstance(result, Exception):
            text = getattr(result, "strerror", None) or str(result)
            self.errors[""] = f"the host name cannot be resolved: {text}"
            return
        self.errors.pop("", None)
        for address in result:
            self._addresses.setdefault(address, now)
            self._seen[address] = now
        for address in [each for each, at in self._seen.items() if now - at > FORGET_SECONDS]:
            del self._addresses[address], self._seen[address]
            self.errors.pop(address, None)
            self.surplus.discard(address)
            self.refused.pop(address, None)

    def _ask(self, address: str) -> None:
        """Ask an address for its shard, on a new connection: it may lead to another server."""
        channel = Channel(Route(address, name=host_of(self.name)), self._access)
        call = channel.start(INFO, pb.GetServerInfoRequest().SerializeToString(), ASK_SECONDS)
        self._asking[address] = channel, call
        call.add_done_callback(lambda _: self._events.put((address, call)))

    def _answered(self, address: str, call: Any) -> None:
        """Take the outcome of a question."""
        channel, asked = self._asking.pop(address, (None, None))
        if channel is None or asked is not call:
            return
        self.surplus.discard(address)
        self.refused.pop(address, None)
        try:
            info = answer_of(pb.GetServerInfoResponse, channel.result(call), "")
        except Cancelled:  # by a fork
            self._due[address] = 0.0
        except grpc.RpcError as error:
            self._heard[address] = time.monotonic()
            self._due[address] = time.monotonic() + LOOK_SECONDS
            failure = rpc_error(error, channel, "")
            self.errors[address] = str(failure).removeprefix(": ")
            if isinstance(failure, TlsError):
                self.refused[address] = failure
            if failure.reason == "NOT_A_SHARD":
                self.surplus.add(address)
        except ServerFailure as failure:  # not a shard
            self._heard[address] = time.monotonic()
            self._due[address] = time.monotonic() + LOOK_SECONDS
            self.errors[address] = str(failure).removeprefix(": ")
        else:
            self._heard[address] = time.monotonic()
            self._take(address, info)
        finally:
            channel.close()

    def _take(self, address: str, info: pb.GetServerInfoResponse) -> None:
        """Remember that a server answered ``info`` at ``address``."""
        now, shards = time.monotonic(), info.shard_map.shards
        alone = len(self._addresses) == 1  # may be a load balancer: the next answer may differ
        self._due[address] = now + (LOOK_SECONDS if alone else AGAIN_SECONDS)
        if not info.shard < shards <= MAX_SHARDS:
            self.errors[address] = f"it answers as shard {info.shard} of {shards}, which is invalid"
            return
        self.errors.pop(address, None)
        found = Found(
            asked=address,
            address=info.advertise or address,
            cluster=info.cluster,
            shards=shards,
            shard=info.shard,
            start=info.start,
            at=now,
        )
        known = self.found.get(found.process)
        if known is None or known.asked >= address:  # of several addresses, always the same one
            self.found[found.process] = found

    def _names(self) -> set[str]:
        """Return the names of all clusters whose servers answered."""
        return {each.cluster for each in self.found.values() if each.cluster}

    def _groups(self) -> dict[tuple[str, int], list[Found]]:
        """Return the answers by name of the cluster and its number of shards.

        If only one cluster has a name, servers without a name count as its shards: the setting may
        just be rolled out.
        """
        names = self._names()
        alone = names.pop() if len(names) == 1 else ""
        groups: dict[tuple[str, int], list[Found]] = {}
        for each in self.found.values():
            groups.setdefault((each.cluster or alone, each.shards), []).append(each)
        return groups


def _numbers(group: list[Found]) -> list[int]:
    """Return the sorted numbers of the shards in a group of answers; a number may repeat."""
    return sorted(each.shard for each in group)


def _whole(group: list[Found]) -> bool:
    """Return whether exactly one process answered as each shard of a cluster."""
    return _numbers(group) == list(range(group[0].shards))


def _group_text(group: list[Found]) -> str:
    """Describe the servers of one cluster: its name, its number of shards, and their addresses."""
    cluster = max(each.cluster for each in group)
    name = f"cluster {cluster!r}" if cluster else "a cluster without a name"
    where = ", ".join(sorted(each.asked for each in group))
    return f"{name} of {group[0].shards} shards at {where}"


def _missing(group: list[Found]) -> str:
    """Describe which shards of a cluster were not found, and which were found more than once."""
    numbers = _numbers(group)
    lost = [shard for shard in range(group[0].shards) if shard not in numbers]
    texts = [f"found {len(set(numbers))} of {group[0].shards} shards"]
    if cluster := max(each.cluster for each in group):
        texts[0] += f" of cluster {cluster!r}"
    if lost:
        some = ", ".join(map(str, lost[:8])) + (", ..." if len(lost) > 8 else "")
        texts.append(f"missing: shard {some}")
    for shard in sorted({each for each in numbers if numbers.count(each) > 1}):
        where = " and ".join(sorted(each.asked for each in group if each.shard == shard))
        texts.append(f"shard {shard} answers at {where}, which are different servers")
    return "; ".join(texts)
