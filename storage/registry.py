"""Build an object from its name and parameters, as a client sends them.

A registry is a literal dict from names to dataclasses, for example from "adam" to Adam. The fields
of the dataclass are the parameters that a client may send.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import TypeVar

T = TypeVar("T")


def build(
    kind: str, registry: Mapping[str, type[T]], name: str, parameters: Mapping[str, float]
) -> T:
    """Construct the dataclass that ``registry`` has under ``name``.

    kind        noun for the objects of the registry, for error messages: "optimizer"
    parameters  values by field name; parameters that are left out keep their defaults

    Raises ValueError for an unknown name or parameter, or for a value that is not allowed. The
    message lists the allowed ones.
    """
    if name not in registry:
        raise ValueError(f"no {kind} {name!r}; there are: {', '.join(registry)}")
    make: Callable[..., T] = registry[name]
    allowed: list[str] = [field.name for field in fields(registry[name])]  # type: ignore[arg-type]
    for parameter in parameters:
        if parameter not in allowed:
            has = ", ".join(allowed) or "none"
            raise ValueError(f"{kind} {name!r} has no parameter {parameter!r}; it has: {has}")
    return make(**parameters)
