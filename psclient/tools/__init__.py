"""The command psctl, and its operations as functions: export, import, analyze, inspect.

Needs additional packages: pip install 'embedding-ps[ctl]'.

staged.py                 files that get their final name once they are complete
arrow.py                  load pyarrow; read and write the metadata of Parquet files
columns.py                columns of an exported table, for every file format
parquet.py                a table as a Parquet file
safetensors.py            a table as a safetensors file
export.py                 export a table to one file, or to one file per shard
cells.py                  columns of a Parquet file, checked and converted to arrays
source.py                 read and check the rows of Parquet files
importer.py               import Parquet files into a table
summary.py                summary statistics of a table
misses.py                 how often rows would miss in host memory of any size
analysis.py               compute the summary of a live table, or of one in a checkpoint
sink.py                   write the rows that an analysis read to a Parquet file
history.py                a file with the results of past analyses: how a table grew
keys.py                   find the row of a key, or the reason why it has none
status.py                 ask every shard for its state
doctor.py                 what is wrong with a cluster, and what to do
rules.py                  rules as typed on the command line: counter:threshold=3
figures.py                numbers and counts of an analysis, formatted as text
listing.py                aligned columns of text for the terminal
terminal.py               an analysis for the terminal
charts.py                 an analysis as plots
page.py                   an analysis as an HTML page
commands/shell.py         options, connection and error handling of all commands
commands/cluster.py       psctl status, tail
commands/doctor.py        psctl doctor
commands/tables.py        psctl tables, table, create, drop, evict
commands/alter.py         psctl alter
commands/checkpoints.py   psctl checkpoint, checkpoints, restore, delete, prune
commands/repairs.py       psctl verify, repair
commands/rows.py          psctl export, import
commands/analyses.py      psctl analyze, inspect
ctl.py                    the command psctl
"""
