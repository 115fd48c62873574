"""Rows, and what an import reads of a file of another program."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from psclient.tools.importer import KINDS
from psclient.tools.incoming import Piece, Rows, Target
from psclient.tools.kinds import Request

N, DIM = 7, 2
TARGET = Target("t", DIM, 2 * DIM, "adagrad")
SGD = Target("t", DIM, DIM, "sgd")
SCHEMA = json.dumps({"optimizer": {"name": "adagrad"}})
KEYS = np.array([5, -1, 3, 2**62, 0, -(2**63), 9])
STEPS = np.arange(N) - 3
FREQUENCIES = np.arange(N) * 10
WEIGHT = np.random.default_rng(0).standard_normal((N, DIM)).astype(np.float32)
STATE = WEIGHT**2


def pieces(kind: str, location: Path | str, target: Target = TARGET, **more: Any) -> list[Piece]:
    return list(KINDS[kind](Request(str(location), target, **more)))


def joined(found: list[Piece], start: int = 0) -> Rows:
    """All rows of some pieces, or of one piece from ``start`` on, as one batch."""
    batches = [rows for piece in found for rows in piece.read(start)]
    columns = (
        [getattr(each, name) for each in batches]
        for name in ("keys", "rows", "steps", "frequencies")
    )
    return Rows(*(None if c[0] is None else np.concatenate(c) for c in columns))


def require(
    found: Rows, *, keys: Any = KEYS, state: bool = False, steps: Any = None, counts: Any = None
) -> None:
    assert np.array_equal(found.keys, np.asarray(keys).view(np.uint64))
    assert np.array_equal(found.rows, np.hstack([WEIGHT, STATE]) if state else WEIGHT)
    for values, wanted in ((found.steps, steps), (found.frequencies, counts)):
        assert (values is None) == (wanted is None)
        assert wanted is None or np.array_equal(values, wanted)


def save_distributed(tensors: dict[str, torch.Tensor], path: Path) -> None:
    import torch.distributed.checkpoint as checkpoint

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        checkpoint.save(tensors, checkpoint_id=path)
