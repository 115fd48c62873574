"""The command ``psctl``, which operates a cluster over the network."""

from __future__ import annotations

from psclient.tools.commands import (
    alter,
    analyses,
    bench,
    checkpoints,
    cluster,
    doctor,
    repairs,
    rows,
    tables,
    top,
)
from psclient.tools.commands.shell import app

COMMANDS = (cluster, top, doctor, tables, alter, checkpoints, repairs, rows, analyses, bench)
GROUPS = [each.__name__ for each in COMMANDS]
app.registered_commands.sort(key=lambda each: GROUPS.index(each.callback.__module__))


def main() -> None:
    """Run ``psctl``."""
    app(prog_name="psctl")


if __name__ == "__main__":
    main()
