"""Where the shards of a cluster are: at listed addresses, or at those behind one DNS name.

places = places_of(["ps-0:7000", "ps-1:7000"])   # all shards, in order
places = places_of("ps:7000")                    # a name that leads to all shards, in any order
routes = places.routes(deadline)                 # one Route per shard
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress

from psclient.access import Access, host_of
from psclient.discovery import Discovery, Found
from psclient.errors import DeadlineExceeded
from psclient.routes import Route

SEARCH_SECONDS = 10.0  # a search ends when no call has failed for this time
STEP_SECONDS = 0.1  # maximum time between two looks at the answers of a search


class Places(ABC):
    """Knows where the shards of a cluster are. Thread-safe; usable in forked processes."""

    @abstractmethod
    def routes(self, deadline: float) -> list[Route]:
        """Return one Route per shard, in the order of the shards.

        deadline  monotonic seconds

        Raises a PsError if the shards are not found before the deadline.
        """

    @abstractmethod
    def where(self, shard: int) -> str:
        """Return the name of a shard in error messages."""


class Listed(Places):
    """Shards at a list of addresses, "host:port" each, in the order of the shards."""

    def __init__(self, addresses: Sequence[str]) -> None:
        self._addresses = addresses

    def routes(self, deadline: float) -> list[Route]:
        return [Route(address) for address in self._addresses]

    def where(self, shard: int) -> str:
        return f"shard {shard} at {self._addresses[shard]}"


class Named(Places):
    """Shards behind one DNS name. Follows each shard to another address.

    name    "host:port"
    access  how to connect. Certificates of all shards must be for the host of ``name``

    When a call does not reach its shard, a background thread searches for the shard, and changes
    the address of the shard's Route.
    """

    def __init__(self, name: str, access: Access) -> None:
        self._name = name
        self._access = access
        self._routes: list[Route] | None = None
        self._found: list[Found] = []  # the process that each Route leads to
        self._prepare()
        _named.add(self)

    def routes(self, deadline: float) -> list[Route]:
        try:  # a signal handler may raise after the lock is taken, before ``acquire`` returns
            if not self._finding.acquire(timeout=max(deadline - time.monotonic(), 0)):
                raise DeadlineExceeded(
                    f"{self._name}: another thread is still searching for the shards"
                )
            if self._routes is None:
                self._found = self._find(deadline)
                self._routes = [
                    Route(each.address, self._failed, name=host_of(self._name))
                    for each in self._found
                ]
                for each, route in zip(self._found, self._routes, strict=True):
                    route.expect(each.shard, each.shards, each.cluster)
            return list(self._routes)
        finally:
            with suppress(RuntimeError):  # raised if this thread does not hold the lock
                self._finding.release()

    def where(self, shard: int) -> str:
        return f"shard {shard} of {self._name}"

    def _find(self, deadline: float) -> list[Found]:
        """Search until all shards are found; return where each is.

        Raises Unavailable, or InvalidArgument if there is more than one cluster, at the deadline;
        TlsError as soon as TLS permits a connection to none of the addresses.
        """
        discovery = Discovery(self._name, self._access)
        try:
            while (found := discovery.complete()) is None:
                if discovery.hopeless or time.monotonic() >= deadline:
                    raise discovery.problem()
                discovery.step(deadline)
            return found
        finally:
            discovery.close()

    def _prepare(self) -> None:
        """Create the locks, at the start and in a forked child, where no search is running."""
        self._finding = threading.RLock()
        self._starting = threading.Lock()  # held for an instant, also on gRPC's threads
        # route -> when a call first failed at its current address, in monotonic seconds
        self._lost: dict[Route, float] = {}
        self._last_failure = 0.0  # on any route, in monotonic seconds
        self._searching = False

    def _failed(self, route: Route) -> None:
        """Search for the shard of ``route`` in the background, unless a search is running."""
        with self._starting:
            self._last_failure = time.monotonic()
            self._lost.setdefault(route, self._last_failure)
            start, self._searching = not self._searching, True
        if start:
            try:
                threading.Thread(target=self._search, name="psclient-search", daemon=True).start()
            except RuntimeError:  # the process is ending
                self._searching = False

    def _search(self) -> None:
        """Search for the lost shards until they are found or nobody needs them.

        A background thread runs this method.
        """
        known = [address for each in self._found for address in _of(each)]
        discovery = Discovery(self._name, self._access, known, self._settled)
        try:
            while self._follow(discovery):
                discovery.step(time.monotonic() + STEP_SECONDS)
        except BaseException:  # this search has failed: the next failure of a call starts another
            with self._starting:
                self._searching = False
            raise
        finally:
            discovery.close()

    def _settled(self) -> set[str]:
        """Return the addresses of the shards that are not lost.

        A lost shard may still be at one of them: two shards may have swapped their addresses while
        calls were made to only one of them.
        """
        assert self._routes is not None
        with self._starting:
            lost = set(self._lost)
        both = zip(self._found, self._routes, strict=True)
        return {address for each, route in both if route not in lost for address in _of(each)}

    def _follow(self, discovery: Discovery) -> bool:
        """Change the routes of lost shards to where they answered; return whether to search on.

        A shard counts as found again if it answered after the first failure. The search also ends
        when no call has failed for SEARCH_SECONDS, because then nobody needs the lost shards.
        """
        assert self._routes is not None
        for each in sorted(discovery.found.values(), key=lambda each: each.at):
            if not self._fits(each):
                continue
            route = self._routes[each.shard]
            with self._starting:
                if route in self._lost and self._lost[route] < each.at:
                    del self._lost[route]
                    self._found[each.shard] = each
                    route.address = each.address
        with self._starting:
            idle = time.monotonic() - self._last_failure
            self._searching = bool(self._lost) and idle < SEARCH_SECONDS
            if not self._searching:
                self._lost.clear()
            return self._searching

    def _fits(self, found: Found) -> bool:
        """Return whether a server that answered is a shard of this cluster."""
        names = {each.cluster for each in self._found if each.cluster}
        named = found.cluster in names or not found.cluster or not names
        return named and found.shards == self._found[0].shards


def _of(found: Found) -> tuple[str, str]:
    """Return the address at which a server was asked, and the one that clients should use."""
    return found.asked, found.address


def places_of(where: str | Sequence[str], access: Access) -> Places:
    """Return the Places of checked addresses: of a DNS name, or of a list of addresses.

    access  how to connect
    """
    return Named(where, access) if isinstance(where, str) else Listed(where)


_named: weakref.WeakSet[Named] = weakref.WeakSet()


def _after_fork() -> None:
    """In a forked child: forget searches of the parent, whose threads do not run here."""
    for places in list(_named):
        places._prepare()


os.register_at_fork(after_in_child=_after_fork)
