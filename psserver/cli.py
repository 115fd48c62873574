"""Parameter server for embedding tables.

Run one shard with `psserver serve`, or a cluster on this machine with `psserver up`.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from psserver import cluster
from psserver.unusable import ConfigError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help=__doc__,
)
COLORS = {"ok": "green", "warning": "yellow", "error": "red"}  # of the states of findings
_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}

# Each command imports what it needs. `psserver up` needs neither Numba nor the server, whose import
# takes ten times as long as all else that it does before it starts the shards.


@app.command(context_settings={**_PASS_ON, "help_option_names": []})
def serve(context: typer.Context) -> None:
    """Run one shard. `psserver serve --help` lists the settings."""
    from psserver.config import load
    from psserver.logs import log_to_stderr
    from psserver.process import serve as serve_shard

    log_to_stderr()
    try:
        serve_shard(load(context.args))
    except ConfigError as error:
        _refuse(error)


@app.command(context_settings=_PASS_ON)
def up(
    context: typer.Context,
    data_dir: Annotated[
        Path,
        typer.Option(
            help="Directory for all data: shard I stores its rows in shard-I/ and appends its"
            " messages to shard-I.log"
        ),
    ],
    shards: Annotated[int, typer.Option(min=1, max=64, help="Number of shards to run")] = 1,
    host: Annotated[
        str, typer.Option(help="Address to listen on: a name, an IPv4 or an IPv6 address")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=1, max=65535, help="Port of shard 0; shard I uses this port + I")
    ] = 7000,
    metrics_port: Annotated[
        int,
        typer.Option(
            min=0,
            max=65535,
            help="HTTP port of shard 0, for the status page and Prometheus; shard I uses this port"
            " + I; 0: none",
        ),
    ] = 9400,
) -> None:
    """Run a cluster on this machine: one process per shard, restarted when it dies.

    Prints "ready ADDRESS..." once all shards serve, and runs until SIGTERM or Ctrl-C. All other
    flags are passed to every shard: see `psserver serve --help`. The shards divide this machine's
    memory limit among them. Exit status: 0 after a signal, 1 if a shard does not start, 2 if a
    setting is invalid.
    """
    try:
        status = cluster.up(shards, host, port, metrics_port, data_dir, context.args)
    except ConfigError as error:
        _refuse(error)
    raise typer.Exit(status)


@app.command()
def warm(
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Compile nothing. Report whether a server with the same user and environment would"
            " find all kernels already compiled; exit with status 1 if not",
        ),
    ] = False,
) -> None:
    """Compile the kernels and save them, so that servers start quickly.

    Kernels are saved in the first of these that can be written: the directory NUMBA_CACHE_DIR if
    set, `__pycache__` next to the installed sources, `~/.cache/numba`. A server loads them from the
    first that has them, even if it is read-only or belongs to another user.
    """
    from psproto import cpu, kernelcache
    from psserver.warm import warm as warm_kernels

    if problem := cpu.problem():
        _refuse(ConfigError(problem))
    if not check:
        warm_kernels()
        if kernelcache.KernelCache.unsaved:
            _refuse(ConfigError("the kernels are compiled, but could not be saved: see above"))
        return
    kernelcache.require()
    try:
        warm_kernels()
    except kernelcache.NotCached as error:
        typer.echo(f"psserver: kernels would be compiled at each start: {error}", err=True)
        raise typer.Exit(1) from None
    typer.echo("all kernels are in the cache")


@app.command(context_settings=_PASS_ON)
def settings(context: typer.Context) -> None:
    """Print a TOML file that lists and explains all settings of a server.

    Takes the flags of `psserver serve`. Settings that a flag, a variable or the file of `--config`
    gives are set in the printed file. All others are comments with their defaults.
    """
    from psserver.config import load
    from psserver.settings import document, given

    try:
        typer.echo(document(given(load(context.args))), nl=False)
    except ConfigError as error:
        _refuse(error)


@app.command(context_settings=_PASS_ON)
def doctor(
    context: typer.Context,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a JSON list with one object per check")
    ] = False,
) -> None:
    """Check whether this machine and the settings suit a server, and say what to do if not.

    Takes the flags of `psserver serve`. Needs no server, and does not disturb one. To check all
    shards of a running cluster, use `psctl doctor`. Exit status: 0, or 1 if there is an error.
    """
    from psserver.config import load
    from psserver.doctor import Finding, examine

    try:
        found = examine(load(context.args), running=False)
    except ConfigError as error:
        found = [Finding("settings", "error", str(error), "correct this setting")]
    if as_json:
        typer.echo(json.dumps([asdict(each) for each in found], indent=1))
    else:
        for each in found:
            typer.secho(f"{each.state:8}", fg=COLORS[each.state], nl=False)
            typer.echo(f"{each.check:15} {each.found}")
            if each.advice:
                typer.echo(f"{'':23} What to do: {each.advice}")
    raise typer.Exit(any(each.state == "error" for each in found))


def _refuse(error: ConfigError) -> NoReturn:
    """Print the error and exit with status 2."""
    typer.echo(f"psserver: {error}", err=True)
    raise typer.Exit(2) from None


def main() -> None:
    """Run the command ``psserver`` with the arguments of this process."""
    app(prog_name="psserver")


if __name__ == "__main__":
    main()
