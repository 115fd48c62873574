"""psctl and what it does, as functions: export, import, analyze, inspect.

Needs more than the client does: pip install 'embedding-ps[ctl]'.

staged.py                 files that appear under their name when they are complete
arrow.py                  what reading and writing Parquet share
columns.py                rows by columns, as every format of an export has them
parquet.py                a table as a Parquet file
safetensors.py            a table as a safetensors file
export.py                 a table to a file, or to a file per shard
cells.py                  columns of a Parquet file as arrays, checked
source.py                 Parquet files as a source of rows, checked
importer.py               Parquet files into a table
summary.py                a table, summed up
analysis.py               sum up a table, or a checkpoint's
sink.py                   rows of an analysis as a Parquet file
history.py                how a table grew: a file that remembers analyses
keys.py                   where a key's row is, or why it has none
status.py                 the state of each shard
rules.py                  rules of a table as they are typed
figures.py                figures of an analysis as text
listing.py                tables of a terminal
terminal.py               an analysis for the terminal
charts.py                 an analysis as plots
page.py                   an analysis as an HTML page
commands/shell.py         what all commands share
commands/cluster.py       psctl status, tail
commands/tables.py        psctl tables, table, create, drop, evict
commands/alter.py         psctl alter
commands/checkpoints.py   psctl checkpoint, checkpoints, verify, restore, delete, prune
commands/rows.py          psctl export, import
commands/analyses.py      psctl analyze, inspect
ctl.py                    the command psctl
"""
