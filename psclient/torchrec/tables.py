"""Tables on the servers for the configs of a collection, and their initial embeddings.

tables = tables_of(client, configs, {}, {"optimizer": "adagrad"})   # {name of the config: Table}
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch.nn import init
from torchrec.modules.embedding_configs import DataType, NoEvictionPolicy

from psclient.client import Client
from psclient.errors import InvalidArgument, SchemaMismatch, TableNotFound
from psclient.table import Table

Initializer = tuple[
    str, Mapping[str, float]
]  # name and parameters, as Client.create_table has them

CUT = 2.0  # standard deviations at which the servers truncate


def tables_of(
    client: Client,
    configs: Sequence[Any],
    initializers: Mapping[str, Initializer],
    options: Mapping[str, Any],
) -> dict[str, Table]:
    """Return {name: Table} for the configs of a collection; create the tables that do not exist.

    configs       EmbeddingBagConfig or EmbeddingConfig of torchrec
    initializers  {name of a table: its initializer}, instead of those of the configs
    options       further arguments of Client.create_table

    Everything is checked before a table is created. Raises InvalidArgument for a config without
    counterpart, SchemaMismatch if a table exists with another dim or another optimizer than that in
    ``options``.
    """
    names = [config.name for config in configs]
    for name in names:
        if names.count(name) > 1:
            raise InvalidArgument(f"tables: each name must be used once, got {name!r} twice")
    if unknown := sorted(set(initializers) - set(names)):
        raise InvalidArgument(f"initializers: no table {unknown[0]!r}; tables are {sorted(names)}")
    chosen = {}
    for config in configs:
        _check(config)
        chosen[config.name] = initializers.get(config.name) or initializer_of(config)
    existing = {config.name: _existing(client, config, options) for config in configs}
    return {
        config.name: existing[config.name]
        or client.create_table(
            config.name,
            config.embedding_dim,
            initializer=chosen[config.name][0],
            initializer_args=chosen[config.name][1],
            **options,
        )
        for config in configs
    }


def _existing(client: Client, config: Any, options: Mapping[str, Any]) -> Table | None:
    """Return the table of a config; None if it does not exist. Raises SchemaMismatch."""
    try:
        info = client.describe_table(config.name)
    except TableNotFound:
        return None
    if info.dim != config.embedding_dim:
        raise SchemaMismatch(
            f"table {config.name!r} exists with dim {info.dim}, but its config has embedding_dim"
            f" {config.embedding_dim}: give the config another name, or drop the table"
        )
    wanted = options.get("optimizer")
    if wanted is not None and info.optimizer != wanted:
        raise SchemaMismatch(
            f"table {config.name!r} exists with optimizer {info.optimizer!r}, got {wanted!r}:"
            " leave out optimizer to use the table as it is, or drop the table"
        )
    return client.table(config.name)


def _check(config: Any) -> None:
    """Refuse a config that asks for what the servers do not do. Raises InvalidArgument."""
    at = f"table {config.name!r}"
    if config.data_type != DataType.FP32:
        raise InvalidArgument(
            f"{at}: data_type must be FP32, because rows are float32 on the servers, got"
            f" {config.data_type.name}. Client(wire='bfloat16') makes the messages smaller"
        )
    policy = config.virtual_table_eviction_policy
    if policy is not None and not isinstance(policy, NoEvictionPolicy):
        raise InvalidArgument(
            f"{at}: virtual_table_eviction_policy must be None, got {type(policy).__name__}: pass"
            " eviction, which Client.create_table explains"
        )
    names = config.feature_names
    for feature in names:
        if names.count(feature) > 1:
            raise InvalidArgument(f"{at}: feature_names must differ, got {feature!r} twice")


# ---- initial embeddings


def initializer_of(config: Any) -> Initializer:
    """Return the servers' initializer that draws from the distribution of a config's init_fn.

    The numbers differ from those of init_fn: servers draw those of a row from its key. Raises
    InvalidArgument if no initializer has this distribution.
    """
    given = config.init_fn
    function = given.func if isinstance(given, partial) else given
    name = getattr(function, "__qualname__", type(function).__qualname__)
    if function not in COUNTERPARTS:
        known = ", ".join(sorted(each.__name__ for each in COUNTERPARTS))
        raise InvalidArgument(
            f"table {config.name!r}: init_fn {name} has no counterpart on the servers; those of"
            f" torch.nn.init with one are {known}. Pass initializers={{{config.name!r}: (name,"
            " parameters)}, which Client.create_table explains"
        )
    bound = inspect.signature(function).bind(
        None, *getattr(given, "args", ()), **getattr(given, "keywords", {})
    )
    bound.apply_defaults()
    arguments = dict(bound.arguments)
    try:
        return COUNTERPARTS[function](arguments)
    except ValueError as error:
        raise InvalidArgument(f"table {config.name!r}: init_fn {name}: {error}") from error


def _uniform(arguments: Mapping[str, Any]) -> Initializer:
    return "uniform", {"low": float(arguments["a"]), "high": float(arguments["b"])}


def _normal(arguments: Mapping[str, Any]) -> Initializer:
    return "normal", {"mean": float(arguments["mean"]), "std": float(arguments["std"])}


def _truncated(arguments: Mapping[str, Any]) -> Initializer:
    """Accept a normal distribution only if it is truncated where the servers truncate theirs."""
    mean, std = float(arguments["mean"]), float(arguments["std"])
    for name, bound in (("a", mean - CUT * std), ("b", mean + CUT * std)):
        if not math.isclose(arguments[name], bound, rel_tol=1e-6, abs_tol=1e-12):
            raise ValueError(
                f"{name} must be {bound:g}, {CUT:g} standard deviations from the mean, where the"
                f" servers truncate; got {arguments[name]:g}"
            )
    return "truncated_normal", {"mean": mean, "std": std}


COUNTERPARTS: dict[Callable[..., Any], Callable[[Mapping[str, Any]], Initializer]] = {
    init.uniform_: _uniform,
    init.normal_: _normal,
    init.trunc_normal_: _truncated,
    init.constant_: lambda arguments: ("constant", {"value": float(arguments["val"])}),
    init.zeros_: lambda _: ("zeros", {}),
    init.ones_: lambda _: ("constant", {"value": 1.0}),
}
