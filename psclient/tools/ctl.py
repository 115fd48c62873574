"""The command ``psctl``: look at a cluster from outside."""

from __future__ import annotations

from psclient.tools.commands import analyses, checkpoints, cluster, rows, tables
from psclient.tools.commands.shell import app

__all__ = ["analyses", "app", "checkpoints", "cluster", "main", "rows", "tables"]


def main() -> None:
    """Entry point of the ``psctl`` command."""
    app()
