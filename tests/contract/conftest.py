"""Peers for the tests of the contract: servers behind generated stubs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from servers import Cluster, free_ports, serve
from stubs import WAIT, Conversation, Peer


@pytest.fixture
def peers(cluster2: Cluster) -> Iterator[list[Peer]]:
    both = [Peer(address) for address in cluster2.addresses]
    yield both
    for peer in both:
        peer.channel.close()


@pytest.fixture
def peer(peers: list[Peer]) -> Peer:
    return peers[1]


@pytest.fixture(scope="module")
def limited() -> Iterator[Peer]:
    """A server with small limits: over them is over them for whole messages."""
    flags = "--max-message-bytes 131072 --max-keys 1000 --max-inflight-bytes 131072"
    flags += " --max-tables 3 --max-sessions 2 --memory-bytes 8388608"
    cluster = Cluster(1, *flags.split()).start()
    peer = Peer(cluster.addresses[0])
    peer.create("limits")
    yield peer
    peer.channel.close()
    assert cluster.stop() == 0


@pytest.fixture
def conversation(peer: Peer) -> Iterator[Conversation]:
    stream = Conversation(peer)
    yield stream
    stream.end()


@pytest.fixture(scope="module")
def small() -> Iterator[Peer]:
    """A server with little memory and without a data directory, so that no row can leave memory."""
    port = free_ports(1)
    flags = "--metrics-port 0 --memory-bytes 8388608"
    with serve("--port", str(port), *flags.split()) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        peer = Peer(f"127.0.0.1:{port}")
        peer.create("limits")
        yield peer
        peer.channel.close()
        process.terminate()
        process.communicate(timeout=WAIT)
    assert process.returncode == 0


@pytest.fixture(scope="module")
def forgetful() -> Iterator[Peer]:
    """A server without a data directory, and so without a log."""
    port = free_ports(1)
    with serve("--port", str(port), "--metrics-port", "0") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        peer = Peer(f"127.0.0.1:{port}")
        yield peer
        peer.channel.close()
        process.terminate()
        process.communicate(timeout=WAIT)
    assert process.returncode == 0
