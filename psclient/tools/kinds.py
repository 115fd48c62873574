"""Kinds of files that can be imported, except those of PyTorch and TensorFlow.

To add a kind: write a function (Request) -> list of pieces and add it to KINDS in importer.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from psclient.errors import InvalidArgument
from psclient.tools import locations, stored
from psclient.tools.arraypiece import ArrayPiece, chosen_state
from psclient.tools.arrow import SCHEMA, optimizer_of
from psclient.tools.incoming import Piece, Target
from psclient.tools.stored import Stored

FIELDS = ("key", "embedding", "state", "step", "frequency")
NAMES = {  # names of the arrays in files that hold several, in order of preference
    "key": ("keys", "key"),
    "embedding": ("embeddings", "embedding", "weight"),
    "state": ("states", "state"),
    "step": ("steps", "step"),
    "frequency": ("frequencies", "frequency"),
}


@dataclass(frozen=True, slots=True)
class Request:
    """The source of an import, as the caller names it, and the table for its rows.

    location  file or directory: a local path or a URL
    target    the table
    map       {field: name in the file}; see docs/models.md
    offset    key of the first row of a file without keys
    """

    location: str
    target: Target
    map: Mapping[str, str] = field(default_factory=dict)
    offset: int = 0

    def require(self, *allowed: str) -> None:
        """Raise InvalidArgument unless all fields of ``map`` are in ``allowed``."""
        for name in self.map:
            if name not in allowed:
                choice = ", ".join(allowed) or "none"
                raise InvalidArgument(
                    f"'map': this kind of file has the fields {choice}, got {name!r}"
                )


Reader = Callable[[Request], Sequence[Piece]]


def npy(request: Request) -> Sequence[Piece]:
    """One .npy file with the embeddings; other fields in .npy files of their own."""
    request.require("key", "state", "step", "frequency")
    directory = locations.parent_of(request.location)
    arrays: dict[str, Any] = {
        name: stored.numpy_array(locations.joined(directory, file))
        for name, file in request.map.items()
    }
    arrays["embedding"] = stored.numpy_array(request.location)
    return [piece_of(request, arrays, request.target.optimizer)]


def npz(request: Request) -> Sequence[Piece]:
    """A .npz file with one matrix, or with the arrays keys, embeddings, states, steps, frequencies.

    ``map`` gives the names of arrays that have other names.
    """
    request.require(*FIELDS)
    arrays = stored.zipped_arrays(request.location)
    schema = arrays.pop(SCHEMA, None)
    optimizer = None
    if schema is not None and schema.dtype == "|u1" and len(schema.shape) == 1:
        text = schema.read(0, schema.shape[0]).tobytes()
        schema.close()
        optimizer = optimizer_of({SCHEMA.encode(): text})
    return [named(request, arrays, optimizer)]


def safetensors(request: Request) -> Sequence[Piece]:
    """A safetensors file with tensors of the names that arrays have in a .npz file."""
    request.require(*FIELDS)
    arrays, metadata = stored.safetensors_arrays(request.location)
    text = metadata.get(SCHEMA)
    optimizer = optimizer_of({SCHEMA.encode(): str(text).encode()} if text else None)
    return [named(request, arrays, optimizer)]


def hps(request: Request) -> Sequence[Piece]:
    """A directory with the sparse model of one table, as HugeCTR writes it for its Hierarchical
    Parameter Server: key (int64) and emb_vector (float32)."""
    request.require()
    keys = stored.raw_array(locations.joined(request.location, "key"), "<i8")
    file = locations.joined(request.location, "emb_vector")
    arrays = {"key": keys, "embedding": stored.raw_array(file, "<f4", request.target.dim)}
    return [piece_of(request, arrays, None)]


def tfra(request: Request) -> Sequence[Piece]:
    """A directory of TensorFlow Recommenders Addons: for each part NAME_mht_IofN-keys and -values.

    The slots of its optimizers are tables of their own there. They are not read.
    """
    request.require("table", "key", "embedding")
    found: dict[str, list[str]] = {}
    for file in locations.files_in(request.location, "*-keys"):
        name = file.replace("\\", "/").rsplit("/", 1)[-1].removesuffix("-keys")
        if match := re.fullmatch(r"(.+?)_mht_\d+of\d+(_rank\d+_size\d+)?", name):
            found.setdefault(match[1], []).append(file.removesuffix("-keys"))
    keys = request.map.get("key", "<i8")
    values = request.map.get("embedding", "<f4")
    return [
        piece_of(
            request,
            {
                "key": stored.raw_array(f"{each}-keys", keys),
                "embedding": stored.raw_array(f"{each}-values", values, request.target.dim),
            },
            None,
        )
        for each in _of_table(request, found, "NAME_mht_1of1-keys")
    ]


def dynamicemb(request: Request) -> Sequence[Piece]:
    """A directory of NVIDIA's DynamicEmb: for each rank TABLE_emb_keys, _emb_values, _emb_scores.

    Scores are the time, the step or the frequency, by the table's strategy of eviction there. They
    are read if ``map`` says which: step=scores or frequency=scores.
    """
    request.require("table", "step", "frequency")
    for name in ("step", "frequency"):
        if request.map.get(name, "scores") != "scores":
            raise InvalidArgument(f"'map': {name} must be 'scores', got {request.map[name]!r}")
    found: dict[str, list[str]] = {}
    for file in locations.files_in(request.location, "*_emb_keys.rank_*"):
        name = file.replace("\\", "/").rsplit("/", 1)[-1].split("_emb_keys.rank_")[0]
        found.setdefault(name, []).append(file)
    pieces: list[Piece] = []
    for each in _of_table(request, found, "NAME_emb_keys.rank_0.world_size_1"):
        head, tail = each.rsplit("_emb_keys.", 1)
        arrays: dict[str, Any] = {"key": stored.raw_array(each, "<i8")}
        values = f"{head}_emb_values.{tail}"
        arrays["embedding"] = stored.raw_array(values, "<f4", request.target.dim)
        for name in {"step", "frequency"} & set(request.map):
            arrays[name] = stored.raw_array(f"{head}_emb_scores.{tail}", "<i8")
        optimizer = _optimizer(f"{head}_opt_args.json")
        if optimizer is not None and optimizer == request.target.optimizer:
            state = f"{head}_emb_opt_values.{tail}"
            arrays["state"] = stored.raw_array(state, "<f4", request.target.dim)
        pieces.append(piece_of(request, arrays, optimizer))
    return pieces


def piece_of(request: Request, arrays: Mapping[str, Any], optimizer: str | None) -> ArrayPiece:
    """Return the piece whose fields are ``arrays``: {field: array}.

    optimizer  the optimizer whose state the array "state" is; None: unknown
    """
    states = [arrays["state"]] if "state" in arrays else []
    chosen, why = chosen_state(request.target, states, optimizer)
    return ArrayPiece(
        request.target,
        arrays["embedding"],
        arrays.get("key", request.offset),
        chosen,
        arrays.get("step"),
        arrays.get("frequency"),
        why,
    )


def named(request: Request, arrays: Mapping[str, Stored], optimizer: str | None) -> ArrayPiece:
    """Return the piece in a file with several named arrays.

    optimizer  the optimizer that the file names; None: it names none. State that ``map`` names is
               taken as state of the table's optimizer
    """
    chosen: dict[str, Stored] = {}
    for name in FIELDS:
        wanted = request.map.get(name)
        if wanted is not None and wanted not in arrays:
            raise InvalidArgument(
                f"{request.location}: 'map': {name} must be one of the arrays {listed(arrays)}, got"
                f" {wanted!r}"
            )
        found = wanted or next((each for each in NAMES[name] if each in arrays), None)
        if found is not None:
            chosen[name] = arrays[found]
    if "embedding" not in chosen:
        matrices = [name for name, each in arrays.items() if len(each.shape) == 2]
        if len(matrices) != 1:
            raise InvalidArgument(
                f"{request.location}: must have an array 'embeddings', or exactly one matrix; name"
                f" the array: --map embedding=NAME. The arrays are {listed(arrays)}"
            )
        chosen["embedding"] = arrays[matrices[0]]
    return piece_of(
        request, chosen, request.target.optimizer if "state" in request.map else optimizer
    )


def listed(arrays: Mapping[str, Stored]) -> str:
    """Return names, dtypes and shapes of at most 8 arrays, as text."""
    shown = [
        f"{name} {stored.dtype_name(a.dtype)}{list(a.shape)}"
        for name, a in list(arrays.items())[:8]
    ]
    return ", ".join(shown) + (f" and {len(arrays) - 8} more" if len(arrays) > 8 else "")


def _of_table(request: Request, found: Mapping[str, list[str]], pattern: str) -> list[str]:
    """Return the files of the table that ``map`` names. Without a name, return those of the table
    with the target's name, or of the only table.

    found    {table: files}
    pattern  name of a file that was looked for, for errors
    """
    if not found:
        raise InvalidArgument(f"{request.location} contains no file such as {pattern}")
    name = request.map.get("table", request.target.table)
    if name not in found and "table" not in request.map and len(found) == 1:
        [name] = found
    if name not in found:
        raise InvalidArgument(
            f"{request.location} has the tables {', '.join(sorted(found))}, but no {name!r}; choose"
            " one: --map table=NAME"
        )
    return found[name]


def _optimizer(location: str) -> str | None:
    """Return our name of the optimizer in a JSON file of DynamicEmb, or None if it is unknown."""
    try:
        with locations.open_file(location) as file:
            kind = json.loads(file.read(1 << 16)).get("opt_type")
    except (InvalidArgument, ValueError, AttributeError):
        return None
    # The state of its other optimizers is padded, or lacks what ours have.
    return "adagrad" if str(kind).lower() in ("adagrad", "exact_adagrad") else None
