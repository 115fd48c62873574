"""The command line: ``psserver serve`` for one shard, ``psserver up`` for a local cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from psserver import cluster
from psserver.config import ConfigError, load
from psserver.logs import log_to_stderr
from psserver.process import serve as serve_shard
from psserver.warm import warm as warm_kernels

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__
)
_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}


@app.command(context_settings={**_PASS_ON, "help_option_names": []})
def serve(context: typer.Context) -> None:
    """Serve one shard. Settings: flags (see --help), PSCONFIG_* variables, --config FILE."""
    log_to_stderr()
    try:
        serve_shard(load(context.args))
    except ConfigError as error:
        typer.echo(f"psserver: {error}", err=True)
        raise typer.Exit(2) from None


@app.command(context_settings=_PASS_ON)
def up(
    context: typer.Context,
    data_dir: Annotated[Path, typer.Option(help="gets a directory and a log for each shard")],
    shards: Annotated[int, typer.Option(min=1, max=64)] = 1,
    host: Annotated[str, typer.Option()] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="of shard 0; shard i listens on port + i")] = 7000,
    metrics_port: Annotated[int, typer.Option(help="of shard 0; 0: none")] = 9400,
) -> None:
    """Run a local cluster; further flags go to every serve. Prints 'ready' once all serve."""
    raise typer.Exit(cluster.up(shards, host, port, metrics_port, data_dir, context.args))


@app.command()
def warm() -> None:
    """Compile the kernels into the cache, so that servers start quickly."""
    warm_kernels()


def main() -> None:
    """Entry point of the ``psserver`` command."""
    app()
