"""load_model and export: models with Embedding layers in files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras

from psclient.client import Client
from psclient.keras.clients import client_for_loading


def load_model(path: str | Path, client: Client, **options: Any) -> Any:
    """Load a model that ``model.save`` has written, with its tables from the servers of ``client``.

    options  further arguments of keras.saving.load_model

    The file has no rows: save them with a checkpoint of the servers.
    """
    with client_for_loading(client):
        return keras.saving.load_model(path, **options)
