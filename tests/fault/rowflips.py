"""Flip bits of stored rows, in the data directory of a shard that may be running."""

from __future__ import annotations

import random
from pathlib import Path

from storage.base import Base
from storage.block import ROWS


def flip(directory: Path, rng: random.Random, count: int) -> None:
    """Flip a bit of a row in each of some blocks in a data directory.

    count  maximum number of blocks
    """
    with Base(directory / "base", readonly=True) as base:
        assert base.state is not None
        blocks = [(number, block) for number in base.state.blocks if (block := base.block(number))]
        rows = [(number, block) for number, block in blocks if block.kind == ROWS]
        with (directory / "base" / "data.mdb").open("r+b", buffering=0) as file:
            for number, block in rng.sample(rows, min(count, len(rows))):
                start = base.offset(number)
                assert start is not None
                first = block.rows.ctypes.data - block.data.ctypes.data
                at = start + first + rng.randrange(block.rows.nbytes)
                file.seek(at)
                old = file.read(1)[0]
                file.seek(at)
                file.write(bytes([old ^ 1 << rng.randrange(8)]))
