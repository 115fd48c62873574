"""Table schemas as messages."""

from __future__ import annotations

import dataclasses
from typing import Any

from psproto import ps_pb2 as pb
from psserver.errors import BadRequest
from storage.initializers import make_initializer
from storage.optimizers import make_optimizer
from storage.schema import TableSchema


def read_schema(message: pb.TableSchema) -> TableSchema:
    """The schema that a message asks for, defaults filled in; BadRequest if it breaks a rule."""
    parameters = dict(message.optimizer.parameters)
    lr = parameters.pop("lr", None)
    try:
        return TableSchema(
            name=message.name,
            dim=message.dim,
            optimizer=make_optimizer(message.optimizer.name or "adagrad", lr, parameters),
            initializer=make_initializer(
                message.initializer.name or "uniform", dict(message.initializer.parameters)
            ),
            seed=message.seed,
            serving_default=message.serving_default,
        )
    except ValueError as error:
        text = str(error)
        where = "" if repr(message.name) in text else f"table {message.name[:200]!r}: "
        raise BadRequest("INVALID_ARGUMENT", where + text) from error


def write_schema(schema: TableSchema) -> pb.TableSchema:
    """The message for a schema, every parameter named."""
    return pb.TableSchema(
        name=schema.name,
        dim=schema.dim,
        optimizer=_rule(schema.optimizer),
        initializer=_rule(schema.initializer),
        seed=schema.seed,
        serving_default=schema.serving_default,
    )


def _rule(rule: Any) -> pb.Rule:
    fields = dataclasses.fields(rule)
    parameters = {field.name: float(getattr(rule, field.name)) for field in fields}
    return pb.Rule(name=rule.name, parameters=parameters)
