"""Fixtures for all tests: servers, clients and unused table names.

cluster1, cluster2, cluster3  shared by the session; no test may harm them
start_cluster                 a cluster of the test's own, which it may kill
name                          of a table that no other test has
"""

from __future__ import annotations

import gc
import itertools
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import hypothesis
import pytest
import raised
import sampling
import squeeze
from absent import pytest_pycollect_makemodule  # noqa: F401
from servers import Cluster

from psclient import Client

_numbers = itertools.count(1)

hypothesis.settings.register_profile("patient", deadline=None)  # a busy machine is no fault
hypothesis.settings.load_profile("patient")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cold", action="store_true", help="run tests while rows are on disk")
    parser.addoption("--hbm", action="store_true", help="run tests while rows are on a fake GPU")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--cold"):
        squeeze.activate()
    if config.getoption("--hbm"):
        raised.activate()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    sampling.mark(items)
    if config.getoption("--cold"):
        items[:], others = squeeze.choose(items)
        config.hook.pytest_deselected(items=others)


def pytest_runtest_setup(item: pytest.Item) -> None:
    squeeze.begin(item.nodeid)
    raised.begin(item)


def pytest_collection_finish() -> None:
    """Leave libraries and thousands of tests out of every later garbage collection."""
    gc.collect()
    gc.freeze()


def _shared(shards: int) -> Iterator[Cluster]:
    cluster = Cluster(shards, "--metrics-tables", "65536", metrics=True).start()
    try:
        yield cluster
    finally:
        assert cluster.stop() == 0


@pytest.fixture(scope="session")
def cluster1() -> Iterator[Cluster]:
    yield from _shared(1)


@pytest.fixture(scope="session")
def cluster2() -> Iterator[Cluster]:
    yield from _shared(2)


@pytest.fixture(scope="session")
def cluster3() -> Iterator[Cluster]:
    yield from _shared(3)


@pytest.fixture
def start_cluster() -> Iterator[Callable[..., Cluster]]:
    """Return start_cluster(shards, *flags, metrics=False). Its clusters stop after the test."""
    with ExitStack() as stack:

        def start(shards: int, *flags: str, metrics: bool = False) -> Cluster:
            cluster = Cluster(shards, *flags, metrics=metrics).start()
            stack.callback(cluster.stop)
            return cluster

        yield start


@pytest.fixture
def public_path() -> Iterator[Path]:
    """A directory that other users can read; pytest's own are private."""
    with tempfile.TemporaryDirectory(prefix="ps-test-") as directory:
        path = Path(directory)
        path.chmod(0o755)
        yield path


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    words = re.sub(r"[^A-Za-z0-9]+", "_", request.node.originalname)
    return f"{words.removeprefix('test_')[:60]}.{next(_numbers)}"


@pytest.fixture
def connect() -> Iterator[Callable[..., Client]]:
    """Return connect(cluster, **options). Its clients are closed after the test.

    They use gRPC, unless they are given lane="auto" or "require". transport="lane" means the
    latter.
    """
    with ExitStack() as stack:

        def make(cluster: Cluster, **options: object) -> Client:
            chosen = {"timeout": 60.0, "lane": "never", **options}
            if chosen.get("transport") == "lane":
                chosen |= {"transport": "stream", "lane": "require"}
            client = Client(cluster.addresses, **chosen)  # type: ignore[arg-type]
            stack.callback(client.close)
            return client

        yield make
