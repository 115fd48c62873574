"""Files of PyTorch and of TorchRec: torch.save, safetensors, distributed checkpoints.

Files of torch.save are loaded with weights_only and mapped into memory, so that only the rows that
are read take memory. A file with Python objects other than tensors and plain values is refused.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from psclient.errors import InvalidArgument
from psclient.tools import locations, stored
from psclient.tools.arraypiece import ArrayPiece, per_row
from psclient.tools.distributed import distributed_arrays
from psclient.tools.incoming import Piece
from psclient.tools.kinds import FIELDS, Request, listed, named, piece_of
from psclient.tools.stored import Stored, TorchArray

STATES = {  # optimizers whose state has the same layout here: names of the state there
    "adagrad": ("sum", "momentum1", "momentum_1"),
    "rowwise_adagrad": ("sum", "momentum1", "momentum_1"),
    "momentum": ("momentum_buffer",),
}


def torch(request: Request) -> Sequence[Piece]:
    """A file of torch.save: a tensor, or dicts and lists of tensors, such as a state dict.

    The name of a tensor in nested dicts is made of the keys, with a dot between them.
    """
    request.require(*FIELDS)
    arrays: dict[str, Stored] = dict(torch_arrays(request.location))
    keys, weight = arrays.get("keys"), arrays.get("weight")
    if keys is not None and isinstance(weight, TorchArray) and _is_frozen(keys, weight):
        arrays["weight"] = TorchArray(weight.label, weight.tensor[:-1])
    return [named(request, arrays, None)]


def _is_frozen(keys: Stored, weight: Stored) -> bool:
    """Return whether the weight has a last row without a key, as psclient.frozen writes it."""
    return len(weight.shape) == 2 and keys.shape == (weight.shape[0] - 1,)


def torchrec(request: Request) -> Sequence[Piece]:
    """The state dict of a TorchRec model: the tensor ...embedding_bags.TABLE.weight.

    A file of torch.save or safetensors, or a directory with a distributed checkpoint.
    """
    request.require("table", "state", "key", "step", "frequency")
    arrays = _model_arrays(request.location)
    name = request.map.get("table", request.target.table)
    pattern = re.compile(rf"(?:.*\.)?(?:embedding_bags|embeddings)\.{re.escape(name)}\.weight")
    found = [each for each in arrays if pattern.fullmatch(each)]
    if len(found) != 1:
        tables = re.compile(r"(?:.*\.)?(?:embedding_bags|embeddings)\.([^.]+)\.weight")
        known = sorted({match[1] for each in arrays if (match := tables.fullmatch(each))})
        raise InvalidArgument(
            f"{request.location}: must have exactly one tensor"
            f" ...embedding_bags.{name}.weight, got {len(found)}; its tables are"
            f" {', '.join(known) or 'none'}. Choose one: --map table=NAME"
        )
    chosen: dict[str, Stored] = {"embedding": arrays[found[0]]}
    for field in ("state", "key", "step", "frequency"):
        if field in request.map:
            if request.map[field] not in arrays:
                raise InvalidArgument(
                    f"{request.location}: 'map': {field} must be one of the tensors"
                    f" {listed(arrays)}, got {request.map[field]!r}"
                )
            chosen[field] = arrays[request.map[field]]
    return [_with_state(request, arrays, name, chosen)]


def torch_arrays(location: str) -> dict[str, TorchArray]:
    """Return the tensors in a file of torch.save by name. A lone tensor has the name "weight".

    Raises InvalidArgument if the file is not one, or contains other Python objects.
    """
    path = locations.local(location, "torch")
    try:
        import torch as framework
    except ImportError as error:
        raise InvalidArgument(
            f"{location}: files of the kind 'torch' need PyTorch: pip install 'embedding-ps[torch]'"
        ) from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = framework.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch may raise anything for a malformed file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InvalidArgument(
            f"{location}: cannot be loaded with weights_only=True, which allows only tensors and"
            f" plain values: {reason}"
        ) from error
    if isinstance(loaded, framework.Tensor):
        loaded = {"weight": loaded}
    return {
        name: TorchArray(f"{location}: tensor {name!r}", tensor.detach())
        for name, tensor in _tensors(loaded, "")
        if tensor.layout == framework.strided and not tensor.is_quantized
    }


def _model_arrays(location: str) -> Mapping[str, Stored]:
    """Return the tensors of a file of torch.save, of safetensors, or of a distributed checkpoint.

    Raises InvalidArgument if the location is none of them.
    """
    if locations.is_directory(location):
        return distributed_arrays(location)
    if location.endswith(".safetensors"):
        return stored.safetensors_arrays(location)[0]
    return torch_arrays(location)


def _with_state(
    request: Request, arrays: Mapping[str, Stored], table: str, chosen: dict[str, Stored]
) -> ArrayPiece:
    """Return the piece with the optimizer state that the model has for a table, if it fits.

    arrays  all tensors of the model
    table   name of the table in the model
    chosen  the fields that were found so far
    """
    optimizer = request.target.optimizer
    if "state" in chosen:
        return piece_of(request, chosen, optimizer)
    ends = "|".join(STATES.get(optimizer, ()))
    pattern = re.compile(
        rf"(?:.*\.)?(?:embedding_bags|embeddings)\.{re.escape(table)}\.weight\."
        rf"(?:{re.escape(table)}\.)?(?:{ends})"
    )
    found = [each for each in arrays if ends and pattern.fullmatch(each)]
    if len(found) != 1:
        return piece_of(request, chosen, None)
    state, needed = arrays[found[0]], request.target.width - request.target.dim
    if (numbers := per_row(state)) != needed:
        why = f"{found[0]} has {numbers} numbers per row, but {optimizer!r} has {needed}"
        return replace(piece_of(request, chosen, None), state=why)
    return piece_of(request, {**chosen, "state": state}, optimizer)


def _tensors(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Yield (name, tensor) for all tensors in nested dicts and lists."""
    if isinstance(value, Mapping):
        for key, each in value.items():
            yield from _tensors(each, f"{name}.{key}" if name else str(key))
    elif isinstance(value, (list, tuple)):
        for number, each in enumerate(value):
            yield from _tensors(each, f"{name}.{number}" if name else str(number))
    elif hasattr(value, "is_quantized"):
        yield name, value
