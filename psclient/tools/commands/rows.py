"""psctl export, import: write tables to files and read them back."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from psclient import admin
from psclient.client import Client
from psclient.errors import CheckpointNotFound, InvalidArgument, TableNotFound
from psclient.tools import export, importer, offline
from psclient.tools.commands import completion
from psclient.tools.commands.exits import Exit
from psclient.tools.commands.output import Output, plain
from psclient.tools.commands.progress import bar, summed
from psclient.tools.commands.shell import Session, command
from psclient.tools.journal import journal_of


class Keys(StrEnum):
    """Types that the keys in a file can have."""

    UINT64 = "uint64"
    INT64 = "int64"


KeysOption = Annotated[
    Keys,
    typer.Option(
        help="Type of the keys in files: choose the type that the keys have in the data that you"
        " will join the file with."
    ),
]


NameArgument = Annotated[
    str,
    typer.Argument(
        metavar="NAME",
        help="Name of a live table, or of a checkpoint.",
        autocompletion=completion.both,
    ),
]
OutOption = Annotated[
    Path,
    typer.Option(
        help="File to write; it is replaced if it exists. To export all tables of a checkpoint:"
        " directory in which one file per table is written."
    ),
]
TableOption = Annotated[
    str | None,
    typer.Option(help="Export only this table of the checkpoint NAME. Default: all tables."),
]
FormatOption = Annotated[
    str,
    typer.Option(metavar="FORMAT", help=f"Format of the files: {', '.join(export.FORMATS)}."),
]
CheckpointOption = Annotated[
    str | None,
    typer.Option(
        help="Directory or URL of a checkpoint: NAME is one of its tables. It is read without the"
        " servers of the cluster."
    ),
]
BarrierOption = Annotated[
    str | None,
    typer.Option(
        help="Name of a barrier that a trainer will place: write the live table NAME as it is then,"
        " on all shards."
    ),
]
RowsOption = Annotated[
    int | None,
    typer.Option(
        min=1, help="State dict: number of rows of the tensor. Default: the largest key plus 1."
    ),
]
TensorOption = Annotated[
    str | None,
    typer.Option(help="State dict: name of the tensor. Default: embedding_bags.TABLE.weight."),
]
ModeOption = Annotated[
    str | None,
    typer.Option(help="ONNX: how the rows of a line of keys are combined: sum, mean, max or none."),
]
PartsOption = Annotated[
    bool,
    typer.Option(
        "--parts",
        help="Write a directory instead of a file for each table, with one file per shard. The"
        " files are written in parallel.",
    ),
]


@command("export")
def export_(
    session: Session,
    name: NameArgument,
    out: OutOption,
    table: TableOption = None,
    format: FormatOption = "parquet",
    keys: KeysOption = Keys.UINT64,
    parts: PartsOption = False,
    checkpoint: CheckpointOption = None,
    barrier: BarrierOption = None,
    rows: RowsOption = None,
    tensor: TensorOption = None,
    mode: ModeOption = None,
) -> None:
    """Write tables to files, as rows or as models.

    \b
      psctl export user --out user.parquet                   the live table user
      psctl export monday --table user --out user.parquet    table user of a checkpoint
      psctl export monday --out directory                    all tables of a checkpoint
      psctl export user --barrier end --out user.npz         as it is at the barrier end
      psctl export user --checkpoint /backup/monday --format torch --out user.pt
                                                             without servers

    Changes nothing in the cluster. A file gets its name only once it is complete. docs/models.md
    describes all formats.

    Use --keys int64 if the file will be joined with data that has int64 keys: pandas, polars and
    DuckDB compare uint64 with int64 by value, so that negative keys would never match.
    """
    if format not in export.FORMATS:
        raise typer.BadParameter(
            f"--format must be one of {', '.join(export.FORMATS)}, got {format!r}"
        )
    if (checkpoint is not None) + (barrier is not None) + (table is not None) > 1:
        raise typer.BadParameter("expected at most one of --table, --checkpoint and --barrier")
    given = {"rows": rows, "name": tensor, "mode": mode}
    options: dict[str, Any] = {
        "format": format,
        "keys": keys,
        "parts": parts,
        "options": {key: value for key, value in given.items() if value is not None},
    }
    if checkpoint is not None:
        with offline.opened(checkpoint) as (client, stored):
            if name not in (known := admin.describe(client, stored).rows):
                raise TableNotFound(
                    f"checkpoint {checkpoint} has no table {name!r}; it has {', '.join(known)}"
                )
            files = [_export(session, client, name, out, checkpoint=stored, **options)]
        session.show({"files": files}, lambda: None)
        return
    with session.client() as client:
        if barrier is not None:
            told = f"all shards wait for the barrier {barrier}, at most 600 s"
            with export.at_barrier(client, barrier, on_ready=lambda: session.note(told)) as stored:
                files = [_export(session, client, name, out, checkpoint=stored, **options)]
        else:
            suffix = "" if parts else export.FORMATS[format].suffix
            files = [
                _export(session, client, each, path, checkpoint=held, **options)
                for each, held, path in _exports(client, name, table, out, suffix)
            ]
    session.show({"files": files}, lambda: None)


def _export(
    session: Session, client: Client, table: str, path: Path, **options: Any
) -> dict[str, Any]:
    """Export a table with a progress bar; print its number of rows at once, if as text.

    options  arguments of ``export.export``

    Returns the table, the path and the number of rows, for JSON.
    """
    with bar(f"export {table}", unit="rows") as show:
        rows = export.export(client, table, path, progress=summed(show), **options)
    if session.output is Output.TEXT:
        typer.echo(f"{path}: {rows:,} rows")
    return {"table": table, "path": path, "rows": rows}


def _exports(
    client: Client, name: str, table: str | None, out: Path, suffix: str
) -> list[tuple[str, str | None, Path]]:
    """Return (table, checkpoint, path) for each file or directory to write.

    name    live table, or checkpoint
    table   table of the checkpoint; None: all tables
    out     value of --out
    suffix  suffix of the names of files in ``out``

    In the result, the checkpoint is None for a live table.
    """
    if table is not None:
        return [(table, name, out)]
    if any(each.name == name for each in client.list_tables()):
        return [(name, None, out)]
    try:
        tables = admin.describe(client, name).rows
    except CheckpointNotFound:
        raise CheckpointNotFound(f"no table and no checkpoint is named {name!r}") from None
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidArgument(f"{out} cannot be created: {error.strerror}") from error
    return [(each, name, out / f"{each.replace('/', '%2F')}{suffix}") for each in tables]


TargetArgument = Annotated[
    str,
    typer.Argument(
        metavar="TABLE", help="Existing table to write to.", autocompletion=completion.tables
    ),
]
PathArgument = Annotated[
    str,
    typer.Argument(
        metavar="PATH", show_default=False, help="File or directory to read, or a URL of one."
    ),
]
KindOption = Annotated[
    str | None,
    typer.Option(
        "--from",
        metavar="KIND",
        help=f"Kind of the files: {', '.join(importer.KINDS)}. Default: by the end of the name,"
        " such as .npy or .parquet.",
    ),
]
MapOption = Annotated[
    list[str],
    typer.Option(
        "--map",
        metavar="FIELD=NAME",
        help="Name in the file of a field: key, embedding, state, step, frequency, or table. May be"
        " given several times.",
    ),
]
OffsetOption = Annotated[
    int, typer.Option(help="Key of the first row, for files without keys; the next has 1 more.")
]
DryRunOption = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="Write nothing: count rows, duplicate keys and rows with NaN or infinity."
    ),
]
ParquetOption = Annotated[
    str | None, typer.Option(help="The same as PATH with --from parquet.", show_default=False)
]
JournalOption = Annotated[
    Path | None,
    typer.Option(
        help="Directory for the file with which a repeated import continues where a killed one"
        " stopped. Default: ~/.local/state/embedding-ps."
    ),
]


@command("import")
def import_(
    session: Session,
    table: TargetArgument,
    path: PathArgument = "",
    kind: KindOption = None,
    map: MapOption = [],  # noqa: B006  typer does not change it
    offset: OffsetOption = 0,
    dry_run: DryRunOption = False,
    parquet: ParquetOption = None,
    journal: JournalOption = None,
) -> None:
    """Import rows from files into an existing table.

    \b
      psctl import user rows.parquet                      columns key, embedding, step, frequency
      psctl import user rows.npy --map key=keys.npy       row i has the i-th key of keys.npy
      psctl import user rows.npy --offset 1000            row i has the key 1000 + i
      psctl import user model.pt --from torchrec          tensor ...embedding_bags.user.weight
      psctl import user s3://bucket/rows.npz --dry-run    count and check, write nothing

    Existing rows of the same keys are replaced. docs/models.md describes all kinds of files.

    All files are checked before the first row is written. Exit status 1: nothing was written. Exit
    status 4: some rows were written and stay; repeat the command to complete the import. It
    continues where it stopped, unless the files changed.
    """
    if (parquet is None) == (not path) or (parquet is not None and kind is not None):
        raise typer.BadParameter(
            "expected TABLE PATH, with or without --from; or TABLE --parquet PATH"
        )
    with session.client() as client:
        source = importer.open_source(
            client,
            table,
            parquet or path,
            kind=kind if parquet is None else "parquet",
            map=_pairs(map),
            offset=offset,
        )
        for note in source.notes:
            session.note(f"note: {note}")
        if dry_run:
            _dry_run(session, table, source)
            return
        record = journal_of(journal, source.id)
        begun = importer.resumed(client, source, record)
        if begun is None:
            with bar(f"check {_last(path or parquet)}", unit="rows") as show:
                importer.check(source, progress=show)
        elif begun != (0, 0):
            session.note("note: an earlier import of these files is continued")
        with bar(f"import {_last(path or parquet)}", unit="rows") as show:
            rows = importer.write(
                client, source, progress=show, journal=record, begin=begun or (0, 0)
            )
    session.show({"table": table, "rows": rows}, lambda: typer.echo(f"{table}: {rows:,} rows"))


def _dry_run(session: Session, table: str, source: importer.Source) -> None:
    """Count the rows of a source and print the result. Exits with status 1 if a row is refused."""
    with bar("check", unit="rows") as show:
        found = importer.count(source, progress=show)
    shown = {"table": table, "files": len(source.pieces)} | plain(found)
    session.show(shown, lambda: _print_found(shown))
    if found.first_not_finite:
        raise typer.Exit(Exit.FAILED)


def _print_found(found: dict[str, Any]) -> None:
    """Print what a dry run found: the fields of importer.Found, the table, the number of files."""
    files = f"{found['files']:,} file" + ("" if found["files"] == 1 else "s")
    typer.echo(f"{found['table']}: {found['rows']:,} rows of dim {found['dim']} in {files}")
    typer.echo(f"duplicate keys: {found['duplicates']:,}; the last row of each counts")
    if found["first_duplicate"]:
        typer.echo(f"  first: {found['first_duplicate']}")
    typer.echo(f"rows with NaN or infinity: {found['not_finite']:,}")
    if found["first_not_finite"]:
        typer.echo(f"  first: {found['first_not_finite']}")


def _pairs(words: list[str]) -> dict[str, str]:
    """Return {field: name} for values of --map. Exits with status 2 if one is not FIELD=NAME."""
    pairs = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not (name and equals and value) or name in pairs:
            raise typer.BadParameter(f"--map must be FIELD=NAME, once per field, got {word!r}")
        pairs[name] = value
    return pairs


def _last(location: str | None) -> str:
    """Return the last part of a path or URL."""
    return (location or "").rstrip("/").rsplit("/", 1)[-1]
