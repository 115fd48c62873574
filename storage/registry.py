"""Objects built by name from a registry of dataclasses.

A registry is a literal dict from the name that a client sends to the dataclass that it means. The
parameters that a client may send are the fields of the dataclass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import TypeVar

T = TypeVar("T")


def build(
    kind: str, registry: Mapping[str, type[T]], name: str, parameters: Mapping[str, float]
) -> T:
    """Return the object of that name; parameters that are left out keep their defaults.

    kind  what the registry contains, for error messages: "optimizer"

    Raises ValueError for an unknown name or parameter, or for a value that breaks a rule. The
    message lists what is allowed.
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
