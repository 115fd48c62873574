"""Tensors of PyTorch's distributed checkpoints (DCP): a directory with .metadata and data files.

The file .metadata is a pickle. It is read as data, without unpickling. The data files contain
tensors in the format of torch.save, which are loaded with weights_only.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from psclient.errors import InvalidArgument
from psclient.tools import inert, locations
from psclient.tools.stored import BFLOAT16

MAX_METADATA = 1 << 30  # maximum size of .metadata in bytes


class DistributedArray:
    """A tensor of a distributed checkpoint, stored in one or more parts.

    Reading keeps one part in memory.
    """

    def __init__(
        self,
        label: str,
        dtype: str,
        shape: tuple[int, ...],
        parts: list[tuple[tuple[int, ...], tuple[int, ...], str, int, int]],
    ) -> None:
        """Describe the tensor.

        parts  (offsets, sizes, file, begin, length) of each: where it is in the tensor, and where
               its bytes are in the file
        """
        self.label = label
        self.dtype = dtype
        self.shape = shape
        self._parts = sorted(parts)
        self._loaded: tuple[int, Any] | None = None  # number of a part, and its tensor

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Return the rows start..stop-1."""
        kind = np.float32 if self.dtype == BFLOAT16 else np.dtype(self.dtype)
        out = np.zeros((stop - start, *self.shape[1:]), kind)
        filled = 0
        for number, (offsets, sizes, *_) in enumerate(self._parts):
            first, last = max(start, offsets[0]), min(stop, offsets[0] + sizes[0])
            if first >= last:
                continue
            some = self._part(number)[first - offsets[0] : last - offsets[0]]
            some = some.float() if self.dtype == BFLOAT16 else some
            ends = tuple(o + s for o, s in zip(offsets[1:], sizes[1:], strict=True))
            columns = tuple(slice(o, e) for o, e in zip(offsets[1:], ends, strict=True))
            out[(slice(first - start, last - start), *columns)] = some.numpy()
            filled += some.numel()
        if filled != out.size:
            raise InvalidArgument(
                f"{self.label}: the checkpoint has {filled:,} of the {out.size:,} numbers of the"
                f" rows {start}..{stop - 1}"
            )
        return out

    def offset(self, row: int) -> int | None:
        """Return None: a row may be in several files."""
        return None

    def close(self) -> None:
        """Forget the part that is in memory."""
        self._loaded = None

    def _part(self, number: int) -> Any:
        """Load the tensor of a part, unless it is the last one that was loaded."""
        import torch

        if self._loaded is None or self._loaded[0] != number:
            self._loaded = None
            _, sizes, file, begin, length = self._parts[number]
            with locations.open_file(file) as source:
                source.seek(begin)
                data = source.read(length)
            try:
                tensor = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
            except Exception as error:  # torch may raise anything for a malformed file
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise InvalidArgument(f"{file}: cannot be loaded: {reason}") from error
            if tuple(getattr(tensor, "shape", ())) != sizes:
                raise InvalidArgument(f"{file}: {self.label}: a part must have shape {sizes}")
            self._loaded = number, tensor.detach()
        return self._loaded[1]


def distributed_arrays(directory: str) -> dict[str, DistributedArray]:
    """Return the tensors of a distributed checkpoint by name.

    Raises InvalidArgument if the directory has no valid .metadata.
    """
    location = locations.joined(directory, ".metadata")
    with locations.open_file(location) as file:
        data = file.read(MAX_METADATA)
    metadata = inert.read(data, location)
    try:
        stored = _stored(metadata["storage_data"], directory)
        return {
            name: _array(f"{directory}: tensor {name!r}", each, stored.get(name, {}))
            for name, each in _entries(metadata["state_dict_metadata"]).items()
            if isinstance(each, inert.Object) and "chunks" in each.attributes and each["chunks"]
        }
    except InvalidArgument:
        raise
    except Exception as error:  # whatever a pickle with other contents leads to
        raise InvalidArgument(
            f"{location}: is not the metadata of a distributed checkpoint: {error!r}"
        ) from error


Part = tuple[str, int, int]  # (file, position of its first byte, number of bytes)


def _stored(entries: Any, directory: str) -> dict[str, dict[tuple[int, ...], Part]]:
    """Return where each part of each tensor is: {name: {offsets in the tensor: Part}}.

    Raises InvalidArgument if the name of a file leads out of the directory.
    """
    found: dict[str, dict[tuple[int, ...], Part]] = {}
    for index, info in _entries(entries).items():
        name = str(info["relative_path"])
        if name != name.rsplit("/", 1)[-1] or name in ("", ".", "..") or "\\" in name:
            raise InvalidArgument(f"{directory}: .metadata has a file outside: {name!r}")
        if info.attributes.get("transform_descriptors"):
            raise InvalidArgument(f"{directory}: {name}: compressed data cannot be read")
        offset = index.attributes.get("offset")
        at = () if offset is None else _size(offset)
        part = locations.joined(directory, name), int(info["offset"]), int(info["length"])
        found.setdefault(str(index["fqn"]), {})[at] = part
    return found


def _array(label: str, entry: inert.Object, parts: Mapping[tuple[int, ...], Part]) -> Any:
    """Return a tensor. entry: its TensorStorageMetadata; parts: {offsets: Part}."""
    shape = _size(entry["size"])
    found = []
    for chunk in entry["chunks"]:
        offsets, sizes = _size(chunk["offsets"]), _size(chunk["sizes"])
        place = parts.get(offsets) or (parts.get(()) if math.prod(sizes) else None)
        if place is None:
            raise InvalidArgument(f"{label}: the part at {offsets} is missing")
        if offsets:
            found.append((offsets, sizes, *place))
    dtype = _dtype(entry["properties"])
    return DistributedArray(label, dtype, shape, found)


def _dtype(properties: Any) -> str:
    """Return the dtype of a tensor. properties: its TensorProperties."""
    name = properties.attributes.get("dtype")
    if name is None:  # pickled as a tuple, which begins with the dtype
        name = next(each for each in properties.state if isinstance(each, inert.Name))
    text = str(name.name)
    return text if text == BFLOAT16 else np.dtype(text).str


def _entries(value: Any) -> dict[Any, Any]:
    """Return the items of a dict, or of an object of a class derived from dict."""
    return value.items if isinstance(value, inert.Object) else value


def _size(value: Any) -> tuple[int, ...]:
    """Return the numbers of a torch.Size."""
    numbers = value.arguments if isinstance(value, inert.Object) else value
    while len(numbers) == 1 and isinstance(numbers[0], (tuple, list)):
        numbers = numbers[0]
    return tuple(int(n) for n in numbers)
