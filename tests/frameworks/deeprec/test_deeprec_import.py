"""Checkpoints of DeepRec: bundles of TensorFlow with the tensors of embedding variables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from psclient.errors import InvalidArgument
from psclient.tools.importer import KINDS
from psclient.tools.incoming import Target
from psclient.tools.kinds import Request

KEYS = np.array([5, -1, 2**62, 7])
VALUES = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
FREQUENCIES, VERSIONS = np.array([3, 0, -1, 9]), np.array([10, -1, 0, 12])
TARGET = Target("user", 3, 6, "adagrad")


def save(path: Path, **variables: slice) -> str:
    """Write a bundle. variables: {name, with _ for /: rows of the four tensors}."""
    names, tensors = [], []
    for name, rows in variables.items():
        for end, values in (
            ("keys", KEYS), ("values", VALUES), ("freqs", FREQUENCIES), ("versions", VERSIONS)
        ):  # fmt: skip
            names.append(f"{name.replace('__', '/')}-{end}")
            tensors.append(tf.constant(values[rows]))
    names.append("global_step")
    tensors.append(tf.constant(3))
    tf.raw_ops.SaveV2(
        prefix=str(path / "model"),
        tensor_names=names,
        shape_and_slices=[""] * len(names),
        tensors=tensors,
    )
    return str(path / "model")


def everything(location: str, **more: Any) -> tuple[Any, ...]:
    pieces = KINDS["deeprec"](Request(location, TARGET, **more))
    assert {each.state for each in pieces} == {
        "the file has none that fits the optimizer 'adagrad'"
    }
    rows = [each for piece in pieces for each in piece.read()]
    return tuple(
        np.concatenate([getattr(each, name) for each in rows])
        for name in ("keys", "rows", "steps", "frequencies")
    )


@pytest.mark.parametrize("parts", [1, 2])
def test_all_parts_of_a_variable_are_read(tmp_path: Path, parts: int) -> None:
    one = {"user": slice(0, 4)}
    two = {"user__part_0": slice(0, 1), "user__part_1": slice(1, 4)}
    location = save(tmp_path, **(one if parts == 1 else two), other=slice(0, 2))
    keys, rows, steps, frequencies = everything(location)
    assert np.array_equal(keys, KEYS.view(np.uint64))
    assert np.array_equal(rows, VALUES)
    assert steps.tolist() == [10, 0, 0, 12]  # -1: not counted
    assert frequencies.tolist() == [3, 0, 0, 9]


def test_a_variable_is_chosen_by_name(tmp_path: Path) -> None:
    location = save(tmp_path, deep__emb=slice(0, 4))
    with pytest.raises(InvalidArgument, match=r"no embedding variable 'user'; it has deep/emb\."):
        everything(location)
    assert np.array_equal(everything(location, map={"table": "deep/emb"})[1], VALUES)


def test_a_damaged_bundle_is_refused_by_name(tmp_path: Path) -> None:
    location = save(tmp_path, user=slice(0, 4))
    (tmp_path / "model.index").write_bytes(b"x" * 100)
    with pytest.raises(InvalidArgument, match="cannot be read as a checkpoint of TensorFlow"):
        everything(location)
