"""Base classes of the modules, and the pull of the rows of a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from psclient.arrays import as_keys
from psclient.batch import Batch
from psclient.errors import InvalidArgument
from psclient.pending import Pending
from psclient.rowclient import RowClient
from psclient.table import Table
from psclient.torch.inputs import moved
from psclient.torch.optimizer import Trained
from psclient.torch.reach import Holder

Part = tuple[str, int]  # (name of a feature, index in its ``remotes()``)

Mode = Literal["train", "serve"]
MODE: dict[bool, Mode] = {True: "train", False: "serve"}  # mode of pulls, by nn.Module.training


class Feature(Trained):
    """Base class of modules that an EmbeddingGroup may contain.

    Its output combines rows of one table or, for several parts, of several tables.
    """

    def remotes(self) -> list[Remote]:
        """Return the modules that pull the rows of this module's parts, one per part.

        Each uses one table. A module that has no parts returns only itself.
        """
        raise NotImplementedError

    def requests(self, arguments: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        """Return for each module of ``remotes()`` the arguments (keys, ...) to call it with.

        arguments  arguments (keys, ...) of the ``forward`` of this module
        """
        raise NotImplementedError

    def merge(self, outputs: list[Tensor]) -> Tensor:
        """Combine the outputs of the modules of ``remotes()`` into the output of this module."""
        raise NotImplementedError

    def prefetch(self, keys: Any, *arguments: Any) -> Pending:
        """Ask the shards to read the rows of a later batch from disk into memory; return at once.

        keys, arguments  the arguments of a later call of this module

        Client.prefetch explains the result, which need not be waited for.
        """
        return start_prefetch(self.client, {"": self}, {"": (keys, *arguments)})

    @torch.compiler.disable
    def forward(self, keys: Any, *arguments: Any) -> Tensor:
        """Pull the rows of integer keys[*shape] in one round trip; return the output.

        The class explains the shape of the output, and ``arguments`` if there are any.
        """
        return pull_features(self.client, {"": self}, {"": (keys, *arguments)})[""]


class Remote(Holder, Feature):
    """Base class of Embedding and EmbeddingBag: modules that use the rows of one table.

    shown  names of the attributes that ``repr`` shows unless they are None or False
    """

    shown: tuple[str, ...] = ()

    def __init__(self, table: Table) -> None:
        super().__init__(table)
        self.client = table.client

    @property
    def embedding_dim(self) -> int:
        """Length of the rows."""
        return self.table.dim

    def remotes(self) -> list[Remote]:
        return [self]

    def requests(self, arguments: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        return [arguments]

    def merge(self, outputs: list[Tensor]) -> Tensor:
        return outputs[0]

    def combine(self, leaf: Tensor, places: Tensor, arguments: tuple[Any, ...]) -> Tensor:
        """Compute the output of ``forward`` from the pulled rows.

        leaf       float32[distinct, dim]  rows of the distinct keys
        places     int64[*shape]           index in ``leaf`` of each key's row
        arguments  arguments of ``forward`` after the keys
        """
        raise NotImplementedError

    def extra_repr(self) -> str:
        some = {name: getattr(self, name) for name in self.shown}
        texts = [
            f", {name}={value!r}"
            for name, value in some.items()
            if not (value is None or value is False)
        ]
        return f"{self.table.name!r}, dim={self.table.dim}{''.join(texts)}"


def pull_features(
    client: RowClient, features: Mapping[str, Feature], inputs: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Pull the rows of several features in one request; return {feature: output}.

    client    client of all tables
    features  {name: module}
    inputs    {name: keys, or a tuple of the module's arguments, keys first}
    """
    modules, arguments = requests_of(features, inputs)
    return merged(features, _pull(client, modules, arguments))


def merged(features: Mapping[str, Feature], outputs: Mapping[Part, Tensor]) -> dict[str, Tensor]:
    """Return {feature: output}, combined from the outputs of the parts of each feature."""
    return {
        name: feature.merge([outputs[name, part] for part in range(len(feature.remotes()))])
        for name, feature in features.items()
    }


def requests_of(
    features: Mapping[str, Feature], inputs: Mapping[str, Any]
) -> tuple[dict[Part, Remote], dict[Part, tuple[Any, ...]]]:
    """Split features into their parts, each of which is a module that uses one table.

    features  {name: module}
    inputs    {name: keys, or a tuple of the module's arguments, keys first}

    Returns ({part: its module}, {part: arguments to call that module with}). Raises InvalidArgument
    if a module refuses its arguments.
    """
    modules, arguments = {}, {}
    for name, feature in features.items():
        value = inputs[name] if isinstance(inputs[name], tuple) else (inputs[name],)
        try:
            requests = feature.requests(value)
        except InvalidArgument as error:
            raise InvalidArgument(f"feature {name!r}: {error}" if name else str(error)) from error
        for part, (remote, request) in enumerate(zip(feature.remotes(), requests, strict=True)):
            modules[name, part], arguments[name, part] = remote, request
    return modules, arguments


def start_prefetch(
    client: RowClient, features: Mapping[str, Feature], inputs: Mapping[str, Any]
) -> Pending:
    """Ask the shards to read the rows of several features from disk, in one request.

    client    client of all tables
    features  {name: module}
    inputs    {name: keys, or a tuple of the module's arguments, keys first}
    """
    modules, arguments = requests_of(features, inputs)
    keys: dict[str, list[Any]] = {}
    for part, module in modules.items():
        keys.setdefault(module.table.name, []).append(as_keys(arguments[part][0]).reshape(-1))
    return client.prefetch({table: np.concatenate(each) for table, each in keys.items()})


def _pull(
    client: RowClient, modules: Mapping[Part, Remote], arguments: Mapping[Part, tuple[Any, ...]]
) -> dict[Part, Tensor]:
    """Pull the rows of several modules; return the output of each.

    client     client of all tables
    modules    modules that use the rows of one table each
    arguments  arguments (keys, ...) of each module's ``forward``

    Takes one request, or two if some modules are in training mode and others are not.
    """
    outputs: dict[Part, Tensor] = {}
    for training, mode in MODE.items():
        some = {part: each for part, each in modules.items() if each.training == training}
        if some:
            outputs |= _pull_once(client, some, arguments, mode)
    return outputs


def _pull_once(
    client: RowClient,
    modules: Mapping[Part, Remote],
    arguments: Mapping[Part, tuple[Any, ...]],
    mode: Mode,
) -> dict[Part, Tensor]:
    """Do what ``_pull`` does in one request, with this mode of the pull.

    If all modules of a table are on one GPU, its rows are pulled into a tensor there.
    """
    batches = {part: client.batch(as_keys(arguments[part][0])) for part in modules}
    by_table: dict[str, list[Part]] = {}
    for part, module in modules.items():
        by_table.setdefault(module.table.name, []).append(part)
    joint = {
        table: batches[parts[0]]
        if len(parts) == 1
        else client.batch(np.concatenate([batches[part].keys for part in parts]))
        for table, parts in by_table.items()
    }
    out = {
        table: torch.empty(
            (len(joint[table].keys), modules[parts[0]].table.dim),
            dtype=torch.float32,
            device=device,
        )
        for table, parts in by_table.items()
        if (device := _gpu_of([modules[part] for part in parts])) is not None
    }
    pulled = client.pull_distinct(joint, mode=mode, out=out)
    outputs = {}
    for table, parts in by_table.items():
        ends = np.cumsum([len(batches[part].keys) for part in parts])[:-1]
        places = np.split(joint[table].split.inverse, ends)  # of the keys of each part in the rows
        for part, place in zip(parts, places, strict=True):
            rows = pulled[table] if len(parts) == 1 else rows_at(pulled[table], place)
            outputs[part] = output_of(modules[part], batches[part], rows, arguments[part])
    return outputs


def _gpu_of(modules: Sequence[Remote]) -> torch.device | None:
    """Return the GPU that modules are on; None if they are not all on the same one."""
    devices = {module.like.device for module in modules}
    (device,) = devices if len(devices) == 1 else (None,)
    return device if device is not None and device.type == "cuda" else None


def rows_at(rows: Any, index: NDArray[Any]) -> Any:
    """Return the rows with these indices of an array, or of a tensor on any device."""
    if not isinstance(rows, Tensor):
        return rows[index]
    return rows[moved(torch.from_numpy(index.astype(np.int64)), rows.device)]


def output_of(
    module: Remote,
    batch: Batch,
    rows: NDArray[np.float32] | Tensor,
    arguments: tuple[Any, ...],
) -> Tensor:
    """Compute the output of a module from the rows of the distinct keys of its batch.

    rows       float32[distinct, dim]
    arguments  arguments (keys, ...) of the module's ``forward``
    """
    leaf = module.seen(module.collect(batch, rows))
    return module.combine(leaf, moved(places_of(batch), module.like.device), arguments[1:])


def places_of(batch: Batch) -> Tensor:
    """Return the index of each key's row among the rows of the distinct keys, int64[*shape]."""
    return torch.from_numpy(batch.split.inverse.astype(np.int64)).reshape(batch.shape)
