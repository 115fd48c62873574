"""Inputs of the modules of psclient.torch: which keys to pull, and which bag each belongs to.

The rules are those of torch.nn.Embedding and torch.nn.EmbeddingBag, with these differences: keys
are any 64-bit integers, arguments may also be NumPy arrays or sequences, and what torch does not
check, such as offsets that decrease, is refused too. docs/trainers.md has the list.

All functions raise InvalidArgument if an argument breaks a rule. A module calls them before it
pulls anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from psclient.arrays import END, LOW, MASK, as_array, as_keys
from psclient.errors import InvalidArgument

Keys = NDArray[np.uint64]
Pooling = Literal["sum", "mean", "max"]  # modes of EmbeddingBag
POOLINGS = get_args(Pooling)
NEUTRAL: dict[str, tuple[Any, ...]] = {  # arguments of torch's modules without counterpart here,
    "max_norm": (None,),  # and values of each that change nothing
    "norm_type": (2, 2.0),
    "scale_grad_by_freq": (False,),
}
REASONS = {  # why other values of an argument are refused
    "max_norm": "the servers do not change the norm of rows that are read",
    "norm_type": "it belongs to max_norm, which has no counterpart here",
    "scale_grad_by_freq": "only Embedding has it: torch's EmbeddingBag divides by the counts of"
    " other keys",
}


class Bags(NamedTuple):
    """Arguments of a call of an EmbeddingBag, checked; padding keys are left out.

    keys     uint64[n] to pull, all in a bag
    offsets  int64[bags + 1]; bag b has the keys ``offsets[b] <= i < offsets[b + 1]``
    weights  float[n], factor of each key's row; None: all are 1
    """

    keys: Keys
    offsets: Tensor
    weights: Tensor | None


class CheckedKeys(NamedTuple):
    """Arguments of a call of an Embedding or MultiHashEmbedding, checked.

    keys     uint64[*shape] to pull; uint64[n] without the padding keys if there are some
    padding  bool[*shape], True where a key is the padding key; None: nowhere
    jagged   the nested tensor of keys that the module was called with; None: it was not nested
    """

    keys: Keys
    padding: Tensor | None = None
    jagged: Any = None


@dataclass(frozen=True, slots=True)
class Bagging:
    """Checks the arguments of calls of one EmbeddingBag.

    table    name of the table, for errors
    mode     "sum", "mean" or "max"
    padding  key whose rows are left out of their bags; None: no key
    closed   whether offsets[bags + 1] ends with the end of the last bag (include_last_offset)
    like     tensor with the dtype and device that weights must have
    """

    table: str
    mode: str
    padding: int | None
    closed: bool
    like: Tensor

    def bags(self, keys: Any, offsets: Any, weights: Any) -> Bags:
        """Check the arguments of a call; return them without padding and keys outside all bags.

        keys     integers[bags, m]; or integers[n] with offsets; or a jagged nested tensor of them
        offsets  integers[bags], index of the first key of each bag, ascending from 0; or
                 integers[bags + 1] if ``closed``
        weights  float[*shape of keys], per_sample_weights; None: all are 1
        """
        if jagged(keys):
            if offsets is not None:
                raise self._wrong(
                    "offsets must be None if keys are a nested tensor", _text(offsets)
                )
            weights = self._values(weights, keys)
            flat, offsets = as_keys(host(keys.values())), keys.offsets()
            checked = replace(self, closed=True)
            return checked._flat(flat, offsets, checked._weights(weights, flat.shape))
        array = as_keys(host(keys))
        factors = self._weights(weights, array.shape)
        if array.ndim == 1:
            return self._flat(array, offsets, factors)
        if array.ndim != 2:
            raise self._wrong("keys must have 1 or 2 dimensions", f"shape {list(array.shape)}")
        if offsets is not None:
            raise self._wrong("offsets must be None if keys have 2 dimensions", _text(offsets))
        count, size = array.shape
        if not size:
            raise self._wrong(
                "keys of 2 dimensions must have at least 1 column",
                f"shape {list(array.shape)}",
            )
        bounds = np.arange(count + 1) * size
        flattened = None if factors is None else factors.reshape(-1)
        return self._without_padding(array.reshape(-1), bounds, flattened)

    def _flat(self, keys: Keys, offsets: Any, weights: Tensor | None) -> Bags:
        """Do what ``bags`` does for keys uint64[n] and checked weights."""
        bounds = self._bounds(offsets, len(keys))
        end = int(bounds[-1])
        return self._without_padding(keys[:end], bounds, None if weights is None else weights[:end])

    def _bounds(self, offsets: Any, n: int) -> NDArray[np.int64]:
        """Check offsets into n keys; return the bounds of the bags, int64[bags + 1]."""
        if offsets is None:
            raise self._wrong("offsets must be given if keys have 1 dimension", _text(offsets))
        given = as_array(host(offsets), "offsets")
        if given.size and given.dtype.kind not in "iu":
            raise self._wrong("offsets must be integers", f"dtype {given.dtype}")
        if given.ndim != 1:
            raise self._wrong("offsets must have 1 dimension", f"shape {list(given.shape)}")
        bounds = given.astype(np.int64)
        if not bounds.size and (self.closed or n):
            least = "the end of the last bag" if self.closed else f"the start of a bag of {n} keys"
            raise self._wrong(f"offsets must have at least 1 number, {least}", "none")
        if bounds.size and bounds[0]:
            raise self._wrong("offsets must start at 0", str(bounds[0]))
        if (falls := np.flatnonzero(np.diff(bounds) < 0)).size:
            at = int(falls[0])
            got = f"{bounds[at]}, {bounds[at + 1]} at position {at}"
            raise self._wrong("offsets must not decrease", got)
        if bounds.size and bounds[-1] > n:
            raise self._wrong(f"offsets must be at most {n}, the number of keys", str(bounds[-1]))
        return bounds if self.closed else np.append(bounds, n)

    def _weights(self, weights: Any, shape: tuple[int, ...]) -> Tensor | None:
        """Check per_sample_weights for keys of this shape; return them as a tensor, or None."""
        if weights is None:
            return None
        if self.mode != "sum":
            raise self._wrong("per_sample_weights need mode 'sum'", f"mode {self.mode!r}")
        tensor = weights if isinstance(weights, Tensor) else self._tensor(weights)
        for name in ("dtype", "device"):
            expected, got = getattr(self.like, name), getattr(tensor, name)
            if got != expected:
                rule = f"per_sample_weights must have the {name} of the module, {expected}"
                raise self._wrong(rule, f"{name} {got}")
        if tuple(tensor.shape) != shape:
            raise self._wrong(
                f"per_sample_weights must have the shape of the keys, {list(shape)}",
                f"shape {list(tensor.shape)}",
            )
        return tensor

    def _tensor(self, weights: Any) -> Tensor:
        """Convert weights, an array or a sequence of Python numbers, to a tensor."""
        array = as_array(weights, "per_sample_weights")
        floats = array.dtype == np.float64 and isinstance(weights, list | tuple)
        try:
            dtype = self.like.dtype if floats else None
            return torch.tensor(array, dtype=dtype, device=self.like.device)
        except (TypeError, ValueError, RuntimeError) as error:
            raise self._wrong("per_sample_weights must be numbers", str(error)) from error

    def _values(self, weights: Any, keys: Any) -> Any:
        """Return the values of weights for nested keys: a nested tensor of the same shape."""
        if weights is None:
            return None
        if not jagged(weights) or weights.size() != keys.size():
            raise self._wrong("per_sample_weights must be nested as the keys are", _text(weights))
        return weights.values()

    def _without_padding(
        self, keys: Keys, bounds: NDArray[np.int64], weights: Tensor | None
    ) -> Bags:
        """Return the Bags of keys uint64[n], bounds int64[bags + 1] and weights, less padding."""
        if self.padding is not None and not (kept := keys != np.uint64(self.padding)).all():
            bounds = np.append(0, np.cumsum(kept))[bounds]
            keys = keys[kept]
            weights = None if weights is None else weights[_tensor(kept, weights)]
        return Bags(keys, torch.from_numpy(bounds), weights)

    def _wrong(self, rule: str, got: str) -> InvalidArgument:
        """Return the error for an argument that breaks a rule; ``got`` shows its value."""
        return InvalidArgument(f"EmbeddingBag of table {self.table!r}: {rule}; got {got}")


def check_keys(module: str, padding: int | None, arguments: tuple[Any, ...]) -> CheckedKeys:
    """Check the arguments of a call of an Embedding or MultiHashEmbedding.

    module     description of the module, for errors
    padding    key whose embedding is zero, and whose row is not pulled; None: no key
    arguments  (keys,): integers of any shape, or a jagged nested tensor of integers
    """
    if len(arguments) != 1:
        raise InvalidArgument(f"{module} takes keys only, got {len(arguments) - 1} more arguments")
    (given,) = arguments
    nested = given if jagged(given) else None
    keys = as_keys(host(given if nested is None else nested.values()))
    if padding is None or not (found := np.asarray(keys == np.uint64(padding))).any():
        return CheckedKeys(keys, None, nested)
    return CheckedKeys(keys[~found], torch.from_numpy(found), nested)


def host(values: Any) -> Any:
    """Return a tensor on an accelerator as a tensor in host memory; anything else unchanged."""
    if isinstance(values, Tensor) and values.device.type not in ("cpu", "meta"):
        return values.detach().cpu()
    return values


def jagged(values: Any) -> bool:
    """Return whether ``values`` is a nested tensor of one value per element of its rows.

    Raises InvalidArgument if it is a nested tensor of another kind.
    """
    if not isinstance(values, Tensor) or not values.is_nested:
        return False
    nested: Any = values  # has methods that Tensor lacks
    if nested.layout != torch.jagged or nested.dim() != 2 or nested.lengths() is not None:
        raise InvalidArgument(
            "a nested tensor must have layout=torch.jagged, 2 dimensions and no gaps between its"
            f" rows; got layout {nested.layout}, {nested.dim()} dimensions"
        )
    return True


def check_options(module: str, others: Mapping[str, Any]) -> None:
    """Refuse arguments of torch's constructor that have no counterpart here.

    module  "Embedding" or "EmbeddingBag"
    others  {argument: value}

    Values that change nothing are accepted. Raises TypeError for names that torch does not have.
    """
    for name, value in others.items():
        if name not in NEUTRAL:
            raise TypeError(f"{module} got an unexpected argument {name!r}")
        if value not in NEUTRAL[name]:
            raise InvalidArgument(
                f"{module}: {name} must be left out ({REASONS[name]}); got {value!r}"
            )


def check_bool(module: str, name: str, value: Any) -> bool:
    """Return ``value``, the argument ``name`` of a module, if it is True or False."""
    if not isinstance(value, bool):
        raise InvalidArgument(f"{module}: {name} must be True or False, got {value!r}")
    return value


def padding_key(module: str, value: Any) -> int | None:
    """Return the argument padding_idx as a key in 0..2^64-1; None: there is no padding key.

    A negative value k is the key ``k + 2^64``, as everywhere: keys have no end to count from.
    """
    if value is None:
        return None
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not whole or not LOW <= value < END:
        raise InvalidArgument(
            f"{module}: padding_idx must be a key, an integer in -2^63..2^64-1, or None;"
            f" got {value!r}"
        )
    return int(value) & MASK


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor in host memory on a device. Does not wait for the copy to a GPU.

    The copy is from page-locked memory, which PyTorch uses again once the copy is over. Kernels
    launched later on the current stream find the numbers there.
    """
    if device.type != "cuda" or tensor.device.type != "cpu" or not tensor.numel():
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def _tensor(array: NDArray[Any], like: Tensor) -> Tensor:
    """Return ``array`` as a tensor on the device of ``like``."""
    return torch.from_numpy(array).to(like.device)


def _text(value: Any) -> str:
    """Return a short text that shows a value in an error."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}"
    return repr(value) if value is None or np.isscalar(value) else f"a {type(value).__name__}"
