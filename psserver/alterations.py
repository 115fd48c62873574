"""Apply an AlterTable request to a schema; define which fields of a table can be altered."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from psproto import ps_pb2 as pb
from psserver.errors import BadRequest, NotAlterable
from psserver.schemas import read_admission, read_durability, read_evictions, refused
from storage.schema import TableSchema

Change = Callable[[TableSchema, pb.TableSchema], dict[str, Any]]


def _lr(schema: TableSchema, asked: pb.TableSchema) -> dict[str, Any]:
    parameters = asked.optimizer.parameters
    if "lr" not in parameters:
        raise ValueError('lr: schema.optimizer.parameters["lr"], the new value, is missing')
    return {"optimizer": dataclasses.replace(schema.optimizer, lr=parameters["lr"])}


def _max_step_ahead(_: TableSchema, asked: pb.TableSchema) -> dict[str, Any]:
    if not asked.HasField("max_step_ahead"):
        raise ValueError("max_step_ahead: schema.max_step_ahead, the new value, is missing")
    return {"max_step_ahead": asked.max_step_ahead}


# name of a field -> function of (present schema, requested schema) that returns the new values
ALTERABLE: dict[str, Change] = {
    "lr": _lr,
    "serving_default": lambda _, asked: {"serving_default": asked.serving_default},
    "durability": lambda _, asked: {"durability": read_durability(asked)},
    "admission": lambda _, asked: {"admission": read_admission(asked)},
    "evictions": lambda _, asked: {"evictions": read_evictions(asked)},
    "max_step_ahead": _max_step_ahead,
}
FIXED = {  # name of a field -> why it cannot be altered
    "name": "the log, checkpoints and the initial values of rows use it",
    "dim": "every row has this many numbers",
    "optimizer": "every row contains the state of this optimizer; only lr can be altered",
    "initializer": "keys without a row are read as this initial value, and must keep it",
    "seed": "keys without a row are read as an initial value drawn from it, and must keep it",
}


def require_alterable(request: pb.AlterTableRequest) -> None:
    """Raise an error unless each name in ``request.fields`` is a field that can be altered.

    Raises NotAlterable for a field that is fixed at the table's creation, and BadRequest if a field
    does not exist or no field is named.
    """
    table = request.schema.name
    if not request.fields:
        raise BadRequest(
            "INVALID_ARGUMENT",
            f"table {table[:200]!r}: 'fields' is empty; name at least one field to alter",
        )
    for field in request.fields:
        if field in FIXED:
            raise NotAlterable(table, field, FIXED[field], ", ".join(ALTERABLE))
        if field not in ALTERABLE:
            raise BadRequest(
                "INVALID_ARGUMENT",
                f"table {table[:200]!r}: no field {field[:200]!r}; alterable are:"
                f" {', '.join(ALTERABLE)}",
            )


def altered(schema: TableSchema, request: pb.AlterTableRequest) -> TableSchema:
    """Return a copy of ``schema`` in which the fields named by ``request`` have their new values.

    The names must have passed ``require_alterable``. Raises BadRequest if a value is missing or
    invalid.
    """
    try:
        for field in request.fields:
            schema = dataclasses.replace(schema, **ALTERABLE[field](schema, request.schema))
    except ValueError as error:
        raise refused(request.schema.name, error) from error
    return schema
