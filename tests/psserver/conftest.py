"""Fixtures for tests of checkpoints: a place for them, and clusters in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from homes import Homes

Make = Callable[..., Homes]


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"file://{tmp_path}/checkpoints"


@pytest.fixture
def make(tmp_path: Path, url: str) -> Iterator[Make]:
    """make(shards): a cluster, closed after the test."""
    made: list[Homes] = []

    def new(shards: int, **settings: Any) -> Homes:
        directory = tmp_path / f"cluster-{len(made)}"
        made.append(Homes(directory, shards, url, **settings).__enter__())
        return made[-1]

    yield new
    for each in made:
        each.__exit__(None, None, None)
