"""Checkpoints of DeepRec: TensorFlow bundles with embedding variables. Needs TensorFlow.

For an embedding variable NAME, or each of its parts NAME/part_0, NAME/part_1 and so on, the bundle
has the tensors

    NAME-keys      int64[n]
    NAME-values    float32[n, dim]
    NAME-freqs     int64[n]  becomes the frequency
    NAME-versions  int64[n]  step of the last update: becomes the step
    NAME/Adagrad-values and so on for the optimizers' slots, which have keys of their own
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from psclient.errors import InvalidArgument
from psclient.tools import locations
from psclient.tools.incoming import Piece
from psclient.tools.kinds import Request, piece_of


class BundleArray:
    """A tensor of a TensorFlow bundle. Reading keeps the whole tensor in memory: one part of an
    embedding variable at a time."""

    def __init__(self, label: str, reader: Any, name: str, low: int | None = None) -> None:
        """Describe the tensor ``name``.

        reader  reader of the bundle
        low     replace smaller values by this one: DeepRec stores -1 for what it did not count
        """
        self.label = f"{label}: tensor {name!r}"
        self.dtype = np.dtype(reader.get_variable_to_dtype_map()[name].as_numpy_dtype).str
        self.shape = tuple(reader.get_variable_to_shape_map()[name])
        self._reader = reader
        self._name = name
        self._low = low
        self._values: NDArray[Any] | None = None

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Return the rows start..stop-1."""
        if self._values is None:
            values = np.asarray(self._reader.get_tensor(self._name))
            self._values = values if self._low is None else np.maximum(values, self._low)
        return self._values[start:stop]

    def offset(self, row: int) -> int | None:
        """Return None: the position of a tensor in the bundle is unknown."""
        return None

    def close(self) -> None:
        """Free the memory."""
        self._values = None


def deeprec(request: Request) -> Sequence[Piece]:
    """A checkpoint of DeepRec: its path without .index, as TensorFlow's Saver returns it.

    ``map`` has table=NAME, the name of the embedding variable, by default the name of the table.
    """
    request.require("table")
    locations.local(f"{request.location}.index", "deeprec")
    try:
        import tensorflow
    except ImportError as error:
        raise InvalidArgument(
            f"{request.location}: files of the kind 'deeprec' need TensorFlow: pip install"
            " tensorflow-cpu"
        ) from error
    try:
        reader = tensorflow.train.load_checkpoint(request.location)
        names = set(reader.get_variable_to_shape_map())
    except Exception as error:  # TensorFlow may raise anything for a malformed file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InvalidArgument(
            f"{request.location}: cannot be read as a checkpoint of TensorFlow: {reason}"
        ) from error
    name = request.map.get("table", request.target.table)
    pattern = re.compile(rf"{re.escape(name)}(/part_\d+)?-keys")
    found = sorted(
        (each.removesuffix("-keys") for each in names if pattern.fullmatch(each)),
        key=lambda each: int(each.rsplit("_", 1)[-1]) if "/part_" in each else 0,
    )
    if not found:
        known = sorted({re.sub(r"(/part_\d+)?-keys$", "", n) for n in names if n.endswith("-keys")})
        raise InvalidArgument(
            f"{request.location}: has no embedding variable {name!r}; it has"
            f" {', '.join(known) or 'none'}. Choose one: --map table=NAME"
        )
    return [_piece(request, reader, names, each) for each in found]


def _piece(request: Request, reader: Any, names: set[str], variable: str) -> Piece:
    """Return the rows of one part of an embedding variable."""
    fields = {"key": "keys", "embedding": "values", "frequency": "freqs", "step": "versions"}
    arrays = {
        field: BundleArray(
            request.location,
            reader,
            f"{variable}-{end}",
            0 if field in ("frequency", "step") else None,
        )
        for field, end in fields.items()
        if f"{variable}-{end}" in names
    }
    if "embedding" not in arrays:
        raise InvalidArgument(f"{request.location}: the tensor {variable + '-values'!r} is missing")
    return piece_of(request, arrays, None)
