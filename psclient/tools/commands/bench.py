"""psctl bench: load a cluster, and find the rate that it carries."""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from psclient.tools.bench import latencies
from psclient.tools.bench.fleet import Fleet
from psclient.tools.bench.live import Board
from psclient.tools.bench.plan import MIXES, Plan
from psclient.tools.bench.report import report
from psclient.tools.bench.trial import Objective, Runner, Times, Trial
from psclient.tools.bench.words import doubts, facts, verdict
from psclient.tools.commands.exits import Exit
from psclient.tools.commands.progress import bar
from psclient.tools.commands.shell import Session, command
from psclient.tools.staged import staged_file

MIX_HELP = "What a request does. " + "; ".join(f"{name}: {about}" for name, about in MIXES.items())


@command()
def bench(
    session: Session,
    rate: Annotated[
        float,
        typer.Option(
            help="Requests per second, which arrive at random times (open loop). 0: each client"
            " waits for its answer before it sends the next request (closed loop)."
        ),
    ] = 0.0,
    sweep: Annotated[
        bool,
        typer.Option(
            "--sweep",
            help="Raise the rate until p99 exceeds --p99-ms or requests are missing, then run at"
            " the recommended rate. Begins at --rate, or at an eighth of a closed loop.",
        ),
    ] = False,
    mix: Annotated[str, typer.Option(help=f"{MIX_HELP}.")] = "F",
    seconds: Annotated[float, typer.Option(help="Duration of a run, in seconds.")] = 10.0,
    warmup: Annotated[
        float, typer.Option(help="Seconds before each run that are not counted.")
    ] = 2.0,
    step_seconds: Annotated[
        float, typer.Option(help="Duration of each step of --sweep, in seconds.")
    ] = 5.0,
    p99_ms: Annotated[
        float,
        typer.Option(
            "--p99-ms", help="Objective of --sweep: longest p99 latency, in milliseconds."
        ),
    ] = 20.0,
    safety: Annotated[
        float, typer.Option(help="Recommended rate / highest rate that keeps the objective.")
    ] = 0.7,
    wanted: Annotated[
        float,
        typer.Option(help="Requests per second that you need: the report says how many shards."),
    ] = 0.0,
    tables: Annotated[
        int, typer.Option(help="Number of tables; each request has keys of all of them.")
    ] = 1,
    keys: Annotated[int, typer.Option(help="Number of different keys per table.")] = 100_000,
    dim: Annotated[int, typer.Option(help="Length of the embeddings.")] = 32,
    batch: Annotated[int, typer.Option(help="Keys per request and table.")] = 1000,
    skew: Annotated[
        float, typer.Option(help="Exponent of the Zipf distribution of keys; 0: uniform.")
    ] = 0.99,
    clients: Annotated[
        int, typer.Option(help="Number of clients; each has its own connections.")
    ] = 4,
    processes: Annotated[
        int, typer.Option(help="Number of processes that the clients are divided among.")
    ] = 1,
    in_flight: Annotated[
        int, typer.Option(help="Maximum number of unanswered requests in an open loop.")
    ] = 64,
    optimizer: Annotated[str, typer.Option(help="Optimizer of the tables.")] = "adagrad",
    durability: Annotated[
        str, typer.Option(help="Durability of pushes: applied, log or fsync.")
    ] = "log",
    wire: Annotated[
        str, typer.Option(help="Numbers in messages: float32, bfloat16 or float16.")
    ] = "float32",
    lane: Annotated[
        str, typer.Option(help="Same-host lane: auto, never or require; see docs/lane.md.")
    ] = "auto",
    timeout: Annotated[float, typer.Option(help="Timeout of each request, in seconds.")] = 10.0,
    retry_refused: Annotated[
        bool,
        typer.Option(
            "--retry-refused",
            help="Let clients repeat refused requests, as trainers do; else each refusal counts as"
            " a failure.",
        ),
    ] = False,
    seed: Annotated[int, typer.Option(help="Equal seeds send equal requests.")] = 0,
    prefix: Annotated[
        str, typer.Option(help="The tables are PREFIX.0, PREFIX.1 and so on.")
    ] = "bench",
    reuse: Annotated[
        bool,
        typer.Option("--reuse", help="Use tables of these names that exist; their rows change."),
    ] = False,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the tables at the end.")] = False,
    fill: Annotated[
        bool, typer.Option(help="Create a row for every key before the first run.")
    ] = True,
    html: Annotated[
        Path | None, typer.Option(help="Write a report with plots to this HTML file.")
    ] = None,
) -> None:
    """Load a cluster with requests, and show how fast it answers.

    Creates tables of its own, fills them, and drops them at the end. Latency counts from the moment
    at which a request was due, so that a stall of the server is seen whole. Do not run it against a
    cluster that others use: it takes what the cluster can carry. Ctrl-C ends the test early; the
    report then has what was measured until then.
    """
    values = dict(
        mix=mix,
        tables=tables,
        keys=keys,
        dim=dim,
        batch=batch,
        skew=skew,
        clients=clients,
        processes=processes,
        in_flight=in_flight,
        seed=seed,
        prefix=prefix,
        optimizer=optimizer,
        durability=durability,
        wire=wire,
        timeout=timeout,
        retry_refused=retry_refused,
    )
    objective = Objective(p99=p99_ms / 1e3, safety=safety, wanted=wanted)
    times = Times(seconds=seconds, warmup=warmup, step=step_seconds)
    latencies.require()
    with (
        session.client() as client,
        staged_file(html) if html else nullcontext() as page,
        ExitStack() as stack,
    ):
        with bar("filling tables", "rows") as show:
            fleet = Fleet(
                session.addresses,
                Plan(**values),  # type: ignore[arg-type]  # Plan checks them
                options={**client._options, "lane": lane},
                reuse=reuse,
                keep=keep,
                fill=fill,
                on_fill=show,
            )
            stack.enter_context(fleet)
        with Board(Console(stderr=True), session.note) as board:
            runner = Runner(
                fleet,
                client,
                objective=objective,
                times=times,
                on_run=board.begin,
                on_second=board.second,
                on_end=board.result,
            )
            trial = runner.sweep(rate) if sweep else runner.single(rate)
        if page is not None:
            page.write_text(report(trial), encoding="utf-8")
    for name, why in fleet.left.items():
        session.note(f"table {name!r} was not dropped, drop it with psctl drop: {why}")
    session.show(trial.as_json(), lambda: _print(trial))
    if trial.interrupted:
        raise typer.Exit(Exit.INTERRUPTED)


def _print(trial: Trial) -> None:
    """Print the main figures, and what they mean."""
    width = max(len(name) for name, _ in facts(trial))
    for name, value in facts(trial):
        typer.echo(f"{name:<{width}}  {value}")
    typer.echo()
    for each in verdict(trial):
        typer.echo(each)
    for each in doubts(trial):
        typer.echo(f"Doubt: {each}.")
