"""Tables of layers in saved models: their names are saved, and their client is found again."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from psclient.client import Client
from psclient.errors import InvalidArgument
from psclient.table import Table

_seen: weakref.WeakSet[Any] = weakref.WeakSet()  # clients of tables whose settings were asked for
_given: ContextVar[Client | None] = ContextVar("client of the model that is loaded", default=None)


def table_settings(table: Table) -> dict[str, Any]:
    """Return what a saved layer contains of its table: its name, and the servers' addresses."""
    _seen.add(table.client)
    return {"name": table.name, "servers": _servers(table.client)}


def table_of(settings: dict[str, Any]) -> Table:
    """Return the Table of saved settings.

    Its client is that of ``load_model``. Elsewhere, for example in keras.models.clone_model, it is
    one of this process that has the same servers. Raises InvalidArgument if there is none.
    """
    client = _given.get()
    if client is None:
        known = [each for each in _seen if _servers(each) == settings["servers"]]
        if not known:
            raise InvalidArgument(
                f"the layer of table {settings['name']!r} has no client: load the model with"
                " psclient.keras.load_model(path, client)"
            )
        client = known[0]
    return client.table(settings["name"])


@contextmanager
def client_for_loading(client: Client) -> Iterator[None]:
    """Use ``client`` for the tables of layers that are made during the block."""
    token = _given.set(client)
    try:
        yield
    finally:
        _given.reset(token)


def _servers(client: Any) -> str | list[str]:
    """Return the addresses that a client was made with."""
    addresses = client._addresses
    return addresses if isinstance(addresses, str) else list(addresses)
