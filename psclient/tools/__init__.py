"""The command psctl, and its operations as functions: export, import, analyze, inspect.

Needs additional packages: pip install 'embedding-ps[ctl]'.

staged.py                 files that get their final name once they are complete
arrow.py                  load pyarrow; read and write the metadata of Parquet files
columns.py                columns of an exported table, for every file format
parquet.py                a table as a Parquet file
spool.py                  columns of an exported table in temporary files
safetensors.py            a table as a safetensors file
numpyfiles.py             a table as files of plain numbers: NumPy, HugeCTR, TFRA
models.py                 a table as a model of PyTorch or TorchRec
onnxfile.py               a table as an ONNX model
locations.py              files by path or by URL
offline.py                read a checkpoint without running servers
export.py                 export a table to one file, or to one file per shard
incoming.py               rows on their way from a file into a table
cells.py                  columns of a Parquet file, checked and converted to arrays
source.py                 read and check the rows of Parquet files
stored.py                 arrays in files, of which any range of rows can be read
arraypiece.py             rows whose fields are arrays
kinds.py                  arrays of NumPy, safetensors, HugeCTR, TFRA, DynamicEmb
csvsource.py              rows of CSV files
inert.py                  read a pickle as data, so that no code of it can run
distributed.py            tensors of PyTorch's distributed checkpoints
torchfiles.py             files of PyTorch and TorchRec
deeprec.py                checkpoints of DeepRec
duplicates.py             count keys that occur several times
journal.py                how far an import got
importer.py               import files into a table
summary.py                summary statistics of a table
misses.py                 how often rows would miss in host memory of any size
analysis.py               compute the summary of a live table, or of one in a checkpoint
sink.py                   write the rows that an analysis read to a Parquet file
history.py                a file with the results of past analyses: how a table grew
keys.py                   find the row of a key, or the reason why it has none
figures.py                numbers and counts of an analysis, formatted as text
resources.py              what psctl doctor finds in live figures
doctor.py                 what is wrong with a cluster, and what to do
rules.py                  rules as typed on the command line: counter:threshold=3
rates.py                  rates of a cluster between two samples
listing.py                aligned columns of text for the terminal
terminal.py               an analysis for the terminal
charts.py                 an analysis as plots
document.py               the frame that all HTML reports share
page.py                   an analysis as an HTML page
bench/plan.py             what a load test sends: mix, keys, tables, clients
bench/arrivals.py         when the requests of an open loop start
bench/draws.py            which keys a request has: Zipf, uniform, recent keys
bench/mixes.py            what a request does: pulls, pushes, training steps
bench/latencies.py        histograms of latencies, merged over processes
bench/worker.py           process that sends requests
bench/result.py           what a run measured
bench/fleet.py            the tables and processes of a load test
bench/knee.py             the highest rate at which a cluster keeps its objective
bench/shards.py           what the shards use during a run
bench/sizing.py           how many shards a rate needs, in words
bench/trial.py            a run, or a sweep that finds the knee
bench/words.py            main figures and sentences about a load test
bench/plots.py            plots as HTML and SVG, without scripts
bench/report.py           a load test as an HTML page
bench/live.py             figures of a run in the terminal, while it runs
topview.py                draw a sample of psctl top
commands/exits.py         exit statuses, and the status for each error
commands/output.py        results and errors as text or as JSON
commands/progress.py      progress bar
commands/shell.py         options, connection and errors of all commands
commands/completion.py    names of tables and checkpoints for the completion of a shell
commands/cluster.py       psctl status, tail
commands/top.py           psctl top
commands/doctor.py        psctl doctor
commands/tables.py        psctl tables, table, create, drop, evict
commands/alter.py         psctl alter
commands/checkpoints.py   psctl checkpoint, checkpoints, restore, delete, prune
commands/repairs.py       psctl verify, repair
commands/rows.py          psctl export, import
commands/analyses.py      psctl analyze, inspect
commands/bench.py         psctl bench
ctl.py                    the command psctl
"""
