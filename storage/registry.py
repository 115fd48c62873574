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
    """Create an object of the class that ``registry`` has under ``name``.

    kind        noun for such objects in error messages, for example "optimizer"
    parameters  values of the object's fields by name; missing ones get their defaults

    Raises ValueError for an unknown name or parameter, with a list of the known ones, and for a
    value that is not allowed.
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
