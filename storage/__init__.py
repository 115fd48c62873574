"""Rows by key, in tiers. No RPC, no clock that it was not given.

errors.py        what can go wrong
kernels.py       the loops numpy cannot express
registry.py      objects built by name
arena.py         memory that grows by chunks and never moves
index.py         key -> location
initializers.py  what a row starts from
optimizer.py     the contract of an optimizer
sgd.py           SGD and momentum
adagrad.py       Adagrad, row-wise Adagrad, AdagradDecay
adam.py          Adam, AdamW, AdamAsync
ftrl.py          FTRL and group FTRL
optimizers.py    all optimizers by name
disk.py          system calls that write; names and files that survive a power failure
segment.py       one file of the version log, made of frames
tail.py          the end of a segment: torn tail or damage
records.py       what a frame of the version log says
admission/gates.py    which keys may have a row: gates, and what they promise
admission/counter.py  exact counters of the keys that wait
admission/sketch.py   a counting Bloom filter of them
admission/rules.py    the admission rules of a table's schema
eviction/timeline.py   which versions are older than a TTL
eviction/contract.py   what an eviction rule is, and what it looks at
eviction/rules.py      the eviction rules of a table's schema
eviction/selection.py  the rows of the lowest scores, found by slices
eviction/sweep.py      one pass of rules over the rows
eviction/evictor.py    the eviction of one table: when to sweep
schema.py        what a table is
history.py       epochs: which versions belong to the history of a log
marks.py         up to where the version log is on disk
logfiles.py      the version log's files
cursor.py        a reader of the version log
versionlog.py    the version log: appended, synced, read, truncated
block.py         many rows, or tombstones, as one run of bytes
basestate.py     which blocks of the base are live
pages.py         LMDB's pages, checked before LMDB follows them
base.py          the blocks that the rest of the log builds on
deadline.py      blocking calls with a deadline
store.py         files under a URL
sealed.py        small JSON files with a checksum
manifest.py      what the manifests of a checkpoint contain
checkpoint.py    the files of a checkpoint, and the chain it belongs to
part_writer.py   one shard's part of a checkpoint, written
part_reader.py   one shard's part of a checkpoint, read
tiers/base.py    the contract of a tier
tiers/host.py    rows in host memory
overflow.py      which pushes may leave infinity or NaN in a row
results.py       what the calls of a table return
table.py         a table's part on one shard
analysis.py      what a table holds, summed up
"""
