"""Route: the address of one shard, and what the client knows about the shard there."""

from __future__ import annotations

from collections.abc import Callable

IDENTITY = "ps-shard"  # key of the metadata of a call that names the shard which the call is for
Metadata = tuple[tuple[str, str], ...]


class Route:
    """Address of one shard. It may change while connections use it.

    address    "host:port"
    name       DNS name through which the shard was found, which its certificate must be for; "":
               none, then it must be for the host in the address
    on_failed  called when a call did not reach the shard at its current address, on one of gRPC's
               threads; must return at once. None: not called

    metadata   sent with every call; see ``expect``
    """

    def __init__(
        self,
        address: str,
        on_failed: Callable[[Route], None] | None = None,
        *,
        name: str = "",
    ) -> None:
        self.address = address
        self.name = name
        self.metadata: Metadata = ()
        self._on_failed = on_failed

    def expect(self, shard: int, shards: int, cluster: str) -> None:
        """Let each call name the shard that it is for; any other server then refuses the call.

        shard    number of the shard
        shards   number of shards in the cluster
        cluster  name of the cluster; "": not known, so it is not checked

        So a call has no effect on a server that has got the address of the shard.
        """
        self.metadata = ((IDENTITY, f"{shard}/{shards}/{cluster}"),)

    def failed(self, address: str) -> None:
        """Report that a call did not reach the shard at ``address``."""
        if self._on_failed is not None and address == self.address:
            self._on_failed(self)
